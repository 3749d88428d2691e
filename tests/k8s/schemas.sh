#!/bin/sh
# Fetch the published types and schemas of custom resources into a cache folder.
#
#   schemas.sh FOLDER
set -eu
folder=$1
packages='@kubernetes-models/gateway-api@2.0.0 @kubernetes-models/prometheus-operator@6.0.0
@kubernetes-models/keda@2.0.0 @kubernetes-models/envoy-gateway@2.0.0 typescript@7.0.2'

# Two at the same time: the second waits, and finds all done.
if [ "${SSE_KIT_LOCKED:-}" != yes ]; then
    mkdir -p "$folder"
    SSE_KIT_LOCKED=yes exec flock "$folder" sh "$0" "$folder"
fi
[ "$(cat "$folder/packages" 2>/dev/null)" = "$packages" ] && exit 0
echo '{"private": true}' >"$folder/package.json"
# No scripts of strangers: types and schemas need none.
# shellcheck disable=SC2086 # words, not one argument
# Without a network npm tries for ever, and would outlive its test.
timeout 150 npm install --prefix "$folder" --ignore-scripts --no-audit --no-fund --loglevel=error $packages >&2
printf '%s\n' "$packages" >"$folder/packages"
