# Start one of the three Sentinels, each in the pod of a Valkey.
set -eu
umask 077
domain=$(awk '$1 == "search" { print $2; exit }' /etc/resolv.conf)
own=/data/sentinel.conf

# What it found out and decided is kept: who it is, who is master, whom it voted for.
# (!) Without it a restarted Sentinel would take the first Valkey for the master,
# and could vote twice.
known='^sentinel (monitor|myid|current-epoch|config-epoch|leader-epoch|known-replica|known-slave|known-sentinel) '
kept=$(grep -E "$known" "$own" 2>/dev/null || true)
# 2: the majority of three must agree that a master is dead.
[ -n "$kept" ] || kept="sentinel monitor sse sse-redis-0.sse-redis.$domain 6379 2"

# Written anew at each start, so that a changed sentinel.conf counts.
password=$(cat /sse/secret/sentinel-password)
cat /sse/config/sentinel.conf - >"$own.new" <<END
sentinel announce-ip $HOSTNAME.sse-redis.$domain
sentinel announce-port 26379
sentinel sentinel-user sentinel
sentinel sentinel-pass $password
$kept
sentinel auth-user sse sentinel
sentinel auth-pass sse $password
END
mv "$own.new" "$own"
exec valkey-server "$own" --sentinel
