#!/usr/bin/env bash
# Installs with the test extras and runs the tests; arguments go to pytest, e.g. bash scripts/test.sh -k loading.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="test${EXTRAS:+,$EXTRAS}" bash setup.sh
if [ "${VENV:-}" = none ]; then
    exec "${PYTHON:-python}" -m pytest "$@"
fi
exec "${VENV:-.venv}/bin/python" -m pytest "$@"
