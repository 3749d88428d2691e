#!/bin/sh
# Publish one event from a shell.
#
#   sh publish.sh redis 6379 orders 'a text'                       one XADD
#   sh publish.sh http http://localhost:8080 orders '{"id": 7}'    by HTTP; the data is JSON
#
# TOKEN=… is sent as a bearer by HTTP.
set -eu
how=$1 where=$2 topic=$3 data=$4
case $how in
redis)
    redis-cli -e -p "$where" XADD '{sse}:log' '*' v 1 topics "$topic" data "$data"
    ;;
http)
    # Topics need no quoting: their characters are A-Z a-z 0-9 . _ ~ : / @ - %
    curl --fail-with-body -sS "$where/publish" -H 'Content-Type: application/json' \
        ${TOKEN:+-H "Authorization: Bearer $TOKEN"} -d "{\"topics\": [\"$topic\"], \"data\": $data}"
    ;;
*) echo "how must be redis or http, got '$how'." >&2; exit 2 ;;
esac
