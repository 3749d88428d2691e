#!/bin/sh
# Say whether what stands still on purpose is still the newest: the nginx that
# tests use, and gixy-ng with its table of nginx's known holes.
#
# Not part of any test: what was right yesterday must not turn red by itself.
set -eu
cd "$(dirname "$0")/.."

stale=0
installed=$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("gixy-ng"))')
newest=$(.venv/bin/python -m pip index versions --disable-pip-version-check gixy-ng 2>/dev/null |
    sed -n 's/^gixy-ng (\(.*\))$/\1/p') || newest=''
if [ -z "$newest" ]; then
    printf 'gixy-ng: %s is installed; the package index does not say which is the newest.\n' "$installed"
    stale=1
elif [ "$installed" != "$newest" ]; then
    printf 'gixy-ng: %s is installed, %s is the newest. Set it in tests/requirements.in, then: make lock\n' "$installed" "$newest"
    stale=1
else
    printf 'gixy-ng: %s is the newest.\n' "$installed"
fi

floor=$(sed -n 's/^floor=//p' .make/nginx.sh)
.make/nginx.sh again
found=$(.make/nginx.sh version 2>/dev/null || true)
if [ -z "$found" ]; then
    printf 'nginx: none could be fetched; %s is the floor.\n' "$floor"
    stale=1
elif .venv/bin/gixy -l --nginx-version "$floor" nginx/nginx.conf | grep -i -A 3 'cve'; then
    printf 'nginx: gixy knows holes of %s, our floor. Raise floor= in .make/nginx.sh and nginx/README.md; here is %s.\n' "$floor" "$found"
    stale=1
else
    printf 'nginx: %s is the floor and has no hole that gixy knows; here is %s.\n' "$floor" "$found"
fi
exit $stale
