#!/usr/bin/env bash
# Installs the project and its dependencies into a virtual environment; quick when nothing changed, safe to repeat.
#
#   bash setup.sh                   into .venv here, made when it is missing
#   EXTRAS=test,wandb bash setup.sh with optional groups of pyproject.toml: test, dev, modelscope, wandb, bitsandbytes
#   VENV=/path bash setup.sh        into another virtual environment (a relative path starts at this folder)
#   VENV=none bash setup.sh         into the current interpreter, e.g. of an activated conda environment
#   PYTHON=/path/to/python ...      with this interpreter instead of the first of python3.11, python3.12, python3
# pip's own settings (PIP_INDEX_URL, PIP_NO_INDEX, pip.conf, its cache, ...) hold.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv="${VENV:-.venv}"
extras="${EXTRAS:-}"

fail() {
    printf 'setup.sh: %s\n' "$@" >&2
    exit 1
}

supported() {  # is "$1" a Python this project runs on?
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11 or 3.12"
        printf '%s\n' "$PYTHON"
        return
    fi
    # with VENV=none the interpreter that the user activated comes before any other
    for candidate in $([ "$venv" = none ] && echo python) python3.11 python3.12 python3 python; do
        if supported "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 found; install one (Debian, Ubuntu: apt install python3.11 python3.11-venv;" \
        "macOS: brew install python@3.11; conda: conda env create -f environment.yml) or name it by PYTHON=/path"
}

make_venv() {  # also finishes one whose making was interrupted; never touches what it did not make
    if [ -d "$venv" ] && [ -n "$(ls -A "$venv")" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
        fail "VENV=$venv is a folder but no virtual environment; name another or remove it"
    fi
    if { [ -e "$python" ] || [ -L "$python" ]; } && ! supported "$python"; then
        fail "$python is not a working Python 3.11 or 3.12; remove the folder $venv and run this script again"
    fi
    local base
    base="$(find_python)"
    echo "making the virtual environment $venv with $("$base" --version)"
    "$base" -m venv "$venv" >"$log" 2>&1 ||
        fail "$base cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv):" "$(tail -n 3 "$log")"
}

run_pip() {  # pip install "$@", showing only the large downloads; the whole output goes to the log
    if ! PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 "$python" -m pip install --progress-bar off \
        --no-build-isolation -c constraints.txt "$@" 2>&1 | tee -a "$log" |
        sed -nE 's/^ *(Downloading .*[0-9]{3}\.[0-9] MB.*|Downloading .* GB.*)$/  \1/p; s/^Installing collected packages.*/  unpacking and installing/p'
    then
        grep -E '^ *(ERROR|error|WARNING: Retrying)' "$log" | tail -n 4 | cut -c 1-300 >&2 || tail -n 15 "$log" >&2
        fail "pip failed; its whole output is in $log" \
            "without a network, or to use a mirror: set PIP_INDEX_URL, or PIP_NO_INDEX=1 and PIP_FIND_LINKS=/folder/of/wheels" \
            "when the disk is full: the environment needs 7 GB; then run this script again"
    fi
}

if [ "$venv" = none ]; then
    python="$(find_python)"
    stamp="$("$python" -c 'import sys; print(sys.prefix)')/.r1-omni-installed"
else
    python="$venv/bin/python"
    stamp="$venv/.r1-omni-installed"
fi

# The stamp holds what was installed last: a checksum of the requirements and of this folder's path, then every extra.
wanted="$(cat pyproject.toml constraints.txt | cksum) $PWD"
installed="$(sed -n 1p "$stamp" 2>/dev/null || true)"
have=""
[ "$installed" != "$wanted" ] || have="$(sed -n 2p "$stamp")"
missing="$(comm -23 <(tr ',' '\n' <<<"$extras" | sort -u) <(tr ',' '\n' <<<"$have" | sort -u))"
if [ "$installed" = "$wanted" ] && [ -z "$missing" ] && [ -x "$(command -v "$python")" ]; then
    echo "setup.sh: up to date ($stamp)"
    exit 0
fi
log="$(mktemp "${TMPDIR:-/tmp}/r1-omni-setup.XXXXXX")"
trap '[ -s "$log" ] || rm -f "$log"' EXIT

if [ "$venv" != none ] && ! { supported "$python" && "$python" -m pip --version >/dev/null 2>&1; }; then
    make_venv
fi
rm -f "$stamp"  # an interrupted run leaves no stamp, so the next one starts again
all="$(printf '%s\n' ${have//,/ } ${extras//,/ } | sort -u | paste -sd, -)"
echo "installing r1-omni${all:+[$all]} into $("$python" -c 'import sys; print(sys.prefix)'); the first time this loads about 3 GB"
# setuptools first: source packages (moviepy, deepspeed) are then built by the tested release, and a repeat needs no index
run_pip "setuptools"
run_pip -e ".${all:+[$all]}"
printf '%s\n%s\n' "$wanted" "$all" >"$stamp"
rm -f "$log"
echo "done; next: bash scripts/quickstart.sh"
