#!/usr/bin/env bash
# Installs with the test extras and runs the tests; arguments go to pytest, e.g. bash scripts/test.sh -k loading.
#   WORKERS  test processes at a time, one thread each (2)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="test${EXTRAS:+,$EXTRAS}" bash setup.sh
if [ "${VENV:-}" = none ]; then
    exec "${PYTHON:-python}" -m pytest -n "${WORKERS:-2}" --dist loadfile "$@"
fi
exec "${VENV:-.venv}/bin/python" -m pytest -n "${WORKERS:-2}" --dist loadfile "$@"
