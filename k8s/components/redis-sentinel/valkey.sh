# Start one of the three Valkeys, as master or replica.
#
# Its names are those of the headless Service: addresses change with each pod, and
# Sentinels and the application must find it again.
set -eu
umask 077
domain=$(awk '$1 == "search" { print $2; exit }' /etc/resolv.conf)
own=/data/valkey.conf

# Whom it follows is kept beside its data: Sentinels have it written there. The very
# first time, all follow the first. (!) A returning master begins as one, and takes
# no writes, because nobody follows it; Sentinels make it a replica within seconds.
if [ -e "$own" ]; then
    follows=$(grep '^replicaof ' "$own" || true)
elif [ "$HOSTNAME" = sse-redis-0 ]; then
    follows=
else
    follows="replicaof sse-redis-0.sse-redis.$domain 6379"
fi

# Written anew at each start, so that a changed valkey.conf counts.
cat >"$own.new" <<END
include /sse/config/valkey.conf
replica-announce-ip $HOSTNAME.sse-redis.$domain
masteruser replica
masterauth $(cat /sse/secret/replica-password)
$follows
END
mv "$own.new" "$own"
exec valkey-server "$own"
