#!/bin/sh
# Write all locks anew from the .in files: exact versions and hashes, for every
# platform, without addresses. The tests' lock holds the application's versions.
set -eu
cd "$(dirname "$0")/.."

compile() {
    .venv/bin/uv pip compile --quiet --universal --python-version 3.13 --generate-hashes \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links "$@"
}

# From within each folder, because the lock repeats paths of its -c and -r.
compile --upgrade app/requirements.in -o app/requirements.txt
compile --upgrade loadtest/requirements.in -o loadtest/requirements.txt
compile --upgrade tests/requirements.in -o tests/requirements.txt
if grep -n -E '://|^-|@ ' app/requirements.txt loadtest/requirements.txt tests/requirements.txt; then
    echo "A lock must have versions and hashes alone; see the lines above." >&2
    exit 1
fi
