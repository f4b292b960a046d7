#!/usr/bin/env bash
# Downloads a released checkpoint and its towers; bash scripts/download_models.sh --help tells the options.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-.venv}"
case "$venv" in
    none) python="${PYTHON:-python}" ;;
    /*) python="$venv/bin/python" ;;
    *) python="$root/$venv/bin/python" ;;
esac
if ! command -v "$python" >/dev/null; then
    echo "error: $python is missing; run: bash $root/setup.sh" >&2
    exit 2
fi
exec "$python" -m open_r1.download_models "$@"
