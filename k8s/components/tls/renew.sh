# Have nginx read its certificate again when the Secret has a new one. Old workers
# keep their streams until these end by themselves (worker_shutdown_timeout).
set -eu
# Process 1 of a shared process namespace is not this shell, so signals reach it.
trap 'exit 0' TERM INT

sum() { cat /sse/tls/tls.crt /sse/tls/tls.key | sha256sum; }

known=$(sum)
while :; do
    # In the background, so that the trap is heard at once.
    sleep 60 &
    wait $!
    new=$(sum)
    [ "$new" = "$known" ] && continue
    kill -HUP "$(cat /tmp/nginx.pid)"
    known=$new
    echo "The certificate is new: nginx reads it."
done
