# Lay out nginx's files in one folder, and generate the only one that differs from
# place to place: upstream.conf, the application's pods. All others stay byte for
# byte what nginx/ holds.
#
#   start.sh LISTEN SERVICE:PORT
#
# LISTEN is the form of listen.conf: listen.conf or listen.tls.conf.
set -eu
to=/sse/nginx

cp /sse/from/*.conf "$to/"
cp "/sse/from/$1" "$to/listen.conf"
mkdir -p "$to/snippets" "$to/tls" # tls: where the Secret's volume goes, if there is one
cp /sse/snippets/*.conf "$to/snippets/"

# nginx asks a name server itself, and knows neither /etc/resolv.conf nor search
# domains. upstream.sh reads both, so that neither the cluster's domain nor the
# name server's address has to be written down.
sh /sse/from/upstream.sh resolve "$2" >"$to/upstream.conf"
cat "$to/upstream.conf"
