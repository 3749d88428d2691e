#!/bin/sh
# Fetch nginx 1.30 beside the system's own, into .cache/nginx: for tests alone.
#
#   .make/nginx.sh          fetch it, unless it is there
#   .make/nginx.sh again    fetch it, in place of what is there
#   .make/nginx.sh version  print which one is there
#
# Debian's stable release has an older one, its unstable suite the current one.
# The packages come by apt-get from the mirror that this machine uses already,
# with their signatures checked, and are unpacked, not installed: apt's own
# configuration and lists stay untouched, and root is not needed. They bring
# their own C library, so nginx starts under that library's loader.
set -eu
cd "$(dirname "$0")/.."

# The security floor of the stable line: older ones have known holes.
floor=1.30.6
packages='nginx libc6 libcrypt1 libpcre2-8-0 libssl3t64 zlib1g libgcc-s1 libzstd1'
folder=.cache/nginx

say() { printf '%s\n' "$*"; }
fail() { printf '%s\n' "$*" >&2; exit 1; }
version() { "$folder/nginx" -v 2>&1 | sed -n 's|.*nginx/\([0-9.]*\).*|\1|p'; }
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

if [ "${1:-}" = version ]; then
    [ -x "$folder/nginx" ] || fail "nginx $floor or later must be in $folder, found none. Run: .make/nginx.sh"
    version
    exit
fi
# Two at the same time: the second waits, and finds all done.
if [ "${SSE_KIT_NGINX_LOCKED:-}" != yes ] && command -v flock >/dev/null 2>&1; then
    SSE_KIT_NGINX_LOCKED=yes exec flock .make/nginx.sh sh .make/nginx.sh "$@"
fi
if [ "${1:-}" != again ] && [ -x "$folder/nginx" ] && at_least "$(version)" "$floor"; then exit 0; fi

cannot() { say "nginx $floor cannot be fetched here: $*. Tests that need it are skipped."; exit 0; }
command -v apt-get >/dev/null 2>&1 && command -v dpkg-deb >/dev/null 2>&1 || cannot "this is no Debian"

# The mirror of the machine's own main component; the first is as good as any.
mirror=$(apt-get indextargets --format '$(IDENTIFIER) $(ORIGIN) $(COMPONENT) $(REPO_URI)' 'Identifier: Packages' 2>/dev/null |
    awk '$1 == "Packages" && $2 == "Debian" && $NF !~ /security/ { print $NF; exit }')
# Without lists, as in many images, apt-get names none: then as it is written down.
[ -n "$mirror" ] || mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list \
    /etc/apt/sources.list.d/*.sources 2>/dev/null |
    awk '$1 == "URIs:" || $1 == "deb" { for (i = 2; i <= NF; i++) if ($i ~ /\/debian\/?$/) { print $i; exit } }')
[ -n "$mirror" ] || cannot "apt-get knows no mirror of Debian"

room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
mkdir -p "$room/lists/partial" "$room/cache/archives/partial" "$room/parts" "$room/unpacked" "$room/debs"
keys=/usr/share/keyrings/debian-archive-keyring.gpg
signed=''
[ ! -e $keys ] || signed="[signed-by=$keys] "
say "deb ${signed}$mirror sid main" >"$room/sources.list"
# A root-started apt-get fetches as user _apt, who must get at the folder.
chmod -R a+rX "$room"
aside() {
    apt-get -q -o Dir::Etc::SourceList="$room/sources.list" -o Dir::Etc::SourceParts="$room/parts" \
        -o Dir::State::Lists="$room/lists" -o Dir::Cache="$room/cache" \
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false \
        -o APT::Sandbox::User="$(id -un)" -o Acquire::Retries=3 "$@"
}
say "Fetching nginx $floor or later from the system's own mirror into $folder; nothing is installed."
aside update >"$room/log" 2>&1 || { tail -n 5 "$room/log" >&2; cannot "the mirror has no unstable suite (see above)"; }
wanted=$(for package in $packages; do printf '%s/sid ' "$package"; done)
# shellcheck disable=SC2086 # words, not one argument
(cd "$room/debs" && aside download $wanted) >"$room/log" 2>&1 ||
    { tail -n 5 "$room/log" >&2; cannot "its packages could not be downloaded (see above)"; }
for deb in "$room"/debs/*.deb; do dpkg-deb -x "$deb" "$room/unpacked"; done

loader=$(cd "$room/unpacked" && find . -name 'ld-linux*.so.*' | head -n 1)
library=$(cd "$room/unpacked" && dirname "$(find . -name 'libc.so.6' | head -n 1)")
ssl=$(cd "$room/unpacked" && dirname "$(find . -name 'libssl.so.3' | head -n 1)")
[ -n "$loader" ] && [ -x "$room/unpacked/usr/sbin/nginx" ] || cannot "its packages have another shape than expected"
mkdir -p "$room/nginx/lib"
# Only what runs: the loader, the libraries and nginx itself.
cp -L "$room/unpacked/usr/sbin/nginx" "$room/nginx/nginx-binary"
cp -L "$room/unpacked/$loader" "$room/nginx/lib/loader"
for name in libc.so.6 libcrypt.so.1 libpcre2-8.so.0 libssl.so.3 libcrypto.so.3 libz.so.1 libgcc_s.so.1 \
    libzstd.so.1 libdl.so.2 libpthread.so.0 libm.so.6 libnss_files.so.2 libnss_compat.so.2; do
    for from in "$room/unpacked/$library" "$room/unpacked/$ssl"; do
        [ ! -e "$from/$name" ] || cp -L "$from/$name" "$room/nginx/lib/$name"
    done
done
cat >"$room/nginx/nginx" <<'WRAPPER'
#!/bin/sh
# Written by .make/nginx.sh: nginx under the loader and libraries that it came with.
here=$(cd "$(dirname "$0")" && pwd)
exec "$here/lib/loader" --library-path "$here/lib" "$here/nginx-binary" "$@"
WRAPPER
chmod 755 "$room/nginx/nginx" "$room/nginx/lib/loader" "$room/nginx/nginx-binary"
mkdir -p .cache
rm -rf "$folder"
mv "$room/nginx" "$folder"
found=$(version)
[ -n "$found" ] || { rm -rf "$folder"; cannot "what was fetched does not start"; }
at_least "$found" "$floor" || cannot "the mirror has nginx $found"
say "nginx $found is in $folder."
