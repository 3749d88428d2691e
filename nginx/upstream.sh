#!/bin/sh
# Print upstream.conf, the only file of nginx's that differs from place to place.
#
#   upstream.sh static HOST:PORT...          these processes; nginx 1.22 and later
#   upstream.sh resolve NAME:PORT [SERVER]   all addresses of a name, followed
#                                            without a reload; nginx 1.27.3 and later
#
# SERVER is the name server, ADDRESS or ADDRESS:PORT; without it, the first of
# /etc/resolv.conf. NAME must be absolute: nginx knows no search domains. A NAME
# with no dot is completed with the first search domain, which in Kubernetes
# makes `sse-app` into sse-app.NAMESPACE.svc.cluster.local.
set -eu

fail() { printf '%s\n' "$*" >&2; exit 2; }
usage='Usage: upstream.sh static HOST:PORT... | resolve NAME:PORT [SERVER]'
address='^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$'
asked='^(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(:[0-9]{1,5})?$'
check() { printf '%s\n' "$1" | grep -q -E "$address" || fail "HOST:PORT must be a host and a port, got '$1'. $usage"; }

form=${1:-}
[ $# -lt 1 ] || shift
case $form in
static)
    [ $# -ge 1 ] || fail "static must name at least one process, got none. $usage"
    for server; do check "$server"; done
    # Reasons are in the upstream.conf that is shipped.
    for server; do printf 'server %s max_fails=0;\n' "$server"; done
    ;;
resolve)
    [ $# -ge 1 ] && [ $# -le 2 ] || fail "resolve takes a name and perhaps a name server, got $# arguments. $usage"
    check "$1"
    name=${1%:*} port=${1##*:} server=${2:-}
    conf=${RESOLV_CONF:-/etc/resolv.conf}
    if [ -z "$server" ]; then
        server=$(awk '$1 == "nameserver" { print $2; exit }' "$conf" 2>/dev/null || true)
        [ -n "$server" ] || fail "A name server must be in $conf, found none. Give it as the last argument. $usage"
    fi
    # A bare IPv6 address, as /etc/resolv.conf has it, would be read as a port.
    case $server in \[*) ;; *:*:*) server="[$server]" ;; esac
    printf '%s\n' "$server" | grep -q -E "$asked" ||
        fail "SERVER must be ADDRESS or ADDRESS:PORT, got '$server'. $usage"
    case $name in
    *.*) ;;
    *)
        domain=$(awk '$1 == "search" || $1 == "domain" { print $2; exit }' "$conf" 2>/dev/null || true)
        [ -n "$domain" ] || fail "NAME must have a dot, or $conf a search domain, got '$name'. Write the whole name."
        name=$name.${domain%.}
        ;;
    esac
    cat <<END
# valid: look the name up this often, whatever its time to live; a new process
#   gets streams after at most this and a second. A process that is gone costs
#   proxy_connect_timeout until then, and its open streams go on to their end.
# ipv6=off: no question for addresses that are not there; leave it out where
#   processes have IPv6 alone.
# https://nginx.org/en/docs/http/ngx_http_upstream_module.html#resolver
resolver $server valid=5s ipv6=off;
resolver_timeout 2s;
server $name:$port resolve max_fails=0;
END
    ;;
-h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0" ;;
*) fail "The form must be static or resolve, got '$form'. $usage" ;;
esac
