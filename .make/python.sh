#!/bin/sh
# Make .venv: a virtual environment of Python 3.13 with what a hashed lock names.
#
#   .make/python.sh run     what the application needs (app/requirements.txt)
#   .make/python.sh test    that, and what the tests need (tests/requirements.txt)
#
# Writes only into .venv, and into .python where it has to fetch an interpreter.
# Does nothing if all is there.
set -eu
cd "$(dirname "$0")/.."

want=${1:-run}
case $want in
    run) lock=app/requirements.txt ;;
    test) lock=tests/requirements.txt ;;
    *) echo "python.sh takes run or test, got '$want'." >&2; exit 2 ;;
esac

# Two makes at the same time: the second waits, and then finds all done. The
# lock is on this script itself, so no file is left behind. macOS has no
# flock(1); there, do not start two first makes at once.
if [ "${SSE_KIT_LOCKED:-}" != yes ] && command -v flock >/dev/null 2>&1; then
    SSE_KIT_LOCKED=yes exec flock .make/python.sh sh .make/python.sh "$want"
fi

say() { printf '%s\n' "$*"; }
is_313() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' >/dev/null 2>&1; }
is_usable() { "$1" -c 'import sys, ssl; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1; }

# Debian splits a part of venv off; without it `python -m venv` fails half-way.
ensure_venv() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1 && return
    sh .make/packages.sh venv "$1"
}

# Candidates are run, not only looked up: a shim of pyenv may stand on PATH for
# a version that is not chosen, and then it only prints an error.
find_313() {
    for candidate in python3.13 python3 python \
        "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python3.13 \
        "${HOME:-}"/.local/share/uv/python/cpython-3.13*/bin/python3.13 \
        .python/cpython-3.13*/bin/python3.13; do
        is_313 "$candidate" && python=$candidate && return
    done
    return 1
}

# No 3.13 anywhere: any Python 3.8 or newer can run uv, which can fetch one.
fetch_313() {
    for candidate in python3 python /usr/bin/python3; do
        is_usable "$candidate" && break
        candidate=''
    done
    [ -n "$candidate" ] || return 1
    ensure_venv "$candidate" || return 1
    say "No Python 3.13 on this machine. Fetching one into .python with uv."
    [ -x .python/uv/bin/uv ] || {
        "$candidate" -m venv --clear .python/uv &&
            awk '/^uv==/ { on = 1 } on { print } on && !/\\$/ { exit }' tests/requirements.txt \
                >.python/uv.txt &&
            .python/uv/bin/python -m pip install -qq --disable-pip-version-check \
                --require-hashes --only-binary :all: -r .python/uv.txt
    } || return 1
    UV_PYTHON_INSTALL_DIR=$PWD/.python .python/uv/bin/uv python install --no-bin 3.13 && find_313
}

if ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null; then
    find_313 || fetch_313 || {
        cat >&2 <<'TEXT'
Python 3.13 must be on this machine, found none: not on PATH, not among pyenv's
versions, and uv could not fetch one (see above). Install it, for example by
  Debian 13, Ubuntu 25.04:  apt-get install python3 python3-venv
  macOS:                    brew install python@3.13
  anywhere:                 pyenv install 3.13, or uv python install 3.13
and run make again.
TEXT
        exit 1
    }
    ensure_venv "$python"
    say "Making .venv with $("$python" -c 'import platform; print("Python", platform.python_version())')."
    "$python" -m venv --clear .venv
fi

# The lock that was installed is kept beside the packages: same lock, no work.
if ! cmp -s "$lock" ".venv/lock-$want.txt" || ! cmp -s app/requirements.txt .venv/lock-run.txt; then
    say "Installing the packages of $lock into .venv."
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-input \
        --require-hashes --only-binary :all: -r "$lock"
    cp app/requirements.txt .venv/lock-run.txt # the tests' lock has these too
    cp "$lock" ".venv/lock-$want.txt"
fi
