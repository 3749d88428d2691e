#!/bin/sh
# Install programs of the system that are missing, by the system's package manager.
#
#   .make/packages.sh stack        nginx, Redis or Valkey, and curl to try them
#   .make/packages.sh stack test   these, and what the tests drive
#   .make/packages.sh stack bench  these, a C compiler, and what we measure against
#   .make/packages.sh venv PYTHON  the part of PYTHON that makes environments
#
# Knows apt-get; elsewhere it says what to install. Never starts or enables a
# service: the kit runs these programs itself, on ports of its own.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*"; }
fail() { printf '%s\n' "$*" >&2; exit 1; }
# Debian keeps servers in sbin, which is not on an ordinary user's PATH.
have() { PATH=$PATH:/usr/sbin:/sbin:/usr/local/sbin command -v "$1" >/dev/null 2>&1; }
candidate() { LC_ALL=C apt-cache policy "$1" 2>/dev/null | grep -q 'Candidate: [^(]'; }
installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# --- As root: apt-get, with its lock waited for and its services kept quiet

policy=/usr/sbin/policy-rc.d
mark='# sse-kit: temporary, while packages are installed'

# apt-get waits for dpkg's lock by itself, but not for that of its lists.
apt() {
    log=$(mktemp)
    tries=100
    until DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get -q -y \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold \
        "$@" >"$log" 2>&1 </dev/null; do
        tries=$((tries - 1))
        if [ $tries -eq 0 ] || ! grep -q -E 'Could not get lock|Unable to lock' "$log"; then
            tail -n 20 "$log" >&2
            rm -f "$log"
            return 1
        fi
        sleep 3
    done
    rm -f "$log"
}

services() {
    find /etc/init.d/* /usr/lib/systemd/system/*.service /lib/systemd/system/*.service -prune 2>/dev/null |
        sed 's|.*/||; s|\.service$||; /@/d' | sort -u
}

quiet_services() {
    # A killed run of ours left it; nobody else is here, we hold the lock.
    if grep -q "$mark" "$policy" 2>/dev/null; then rm -f "$policy"; fi
    if [ -e "$policy" ]; then
        # Somebody else's policy stays. Container images have one that forbids
        # all starts, which is all we want.
        code=0
        "$policy" nginx start >/dev/null 2>&1 || code=$?
        [ $code -eq 101 ] || fail "$policy must forbid to start services, but allows it (exit $code)." \
            "It is not ours to change; install these yourself, then run make again: $*"
    else
        new=$(mktemp "$policy.XXXXXX")
        printf '#!/bin/sh\n%s\nexit 101\n' "$mark" >"$new"
        chmod 755 "$new"
        ln "$new" "$policy" || true # fails, rather than overwrites
        rm -f "$new"
    fi
}

# The policy stops starts only. That a service is enabled for the next boot is
# the package's own doing, so it is undone for those that are new.
restore() {
    if grep -q "$mark" "$policy" 2>/dev/null; then rm -f "$policy"; fi
    for service in $(services | comm -13 "$before" -); do
        [ ! -e "/etc/init.d/$service" ] || update-rc.d "$service" disable >/dev/null 2>&1 || true
        deb-systemd-helper disable "$service.service" >/dev/null 2>&1 || true
    done
    rm -f "$before"
}

as_root() {
    # One at a time, also for two clones; a lock on a folder leaves no file.
    exec 9</usr/sbin
    flock 9
    wanted=''
    for package; do
        installed "$package" || wanted="$wanted $package"
    done
    [ -n "$wanted" ] || return 0
    before=$(mktemp)
    services >"$before"
    trap restore EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    quiet_services "$wanted"
    # Lists may name packages that the mirror has replaced: once more with new ones.
    # shellcheck disable=SC2086 # words, not one argument
    apt install --no-install-recommends $wanted 2>/dev/null ||
        { apt update && apt install --no-install-recommends $wanted; }
}

case ${1:-} in
as-root-update) apt update; exit ;;
as-root-install) shift; as_root "$@"; exit ;;
esac

# --- As whoever called make

# Sudo may ask for a password only where somebody can answer.
may_be_root() { [ "$(id -u)" -eq 0 ] || { have sudo && { [ -t 0 ] || sudo -n true 2>/dev/null; }; }; }
become_root() { if [ "$(id -u)" -eq 0 ]; then sh .make/packages.sh "$@"; else sudo sh .make/packages.sh "$@"; fi; }

install() {
    may_be_root || {
        say "Only root may install, and sudo is not possible here. As root: apt-get install $*" >&2
        return 1
    }
    say "Installing with apt-get: $*. Nothing is started or enabled."
    become_root as-root-install "$@"
}

# A fresh machine has no lists, and then knows no packages.
refresh() {
    for package; do
        candidate "$package" && return
    done
    if may_be_root; then become_root as-root-update || true; fi
}

# --- What is missing?

case ${1:-} in
venv)
    python=$2
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    have apt-get && [ "$("$python" -c 'import sys; print(sys.base_prefix)')" = /usr ] ||
        fail "$python must be able to make virtual environments, but its ensurepip or venv is missing." \
            "Install the package that has it."
    refresh "python$version-venv"
    install "python$version-venv" || fail "$python needs its venv module, which could not be installed (see above)."
    ;;
stack)
    required='' optional='' brew=''
    have nginx || { required="$required nginx" brew="$brew nginx"; }
    have redis-server || have valkey-server || { required="$required redis-server" brew="$brew redis"; }
    have curl || { required="$required curl" brew="$brew curl"; } # for the two lines to try
    case ${2:-} in test | bench) have cc || optional="$optional gcc libc6-dev" ;; esac
    case ${2:-} in
    test)
        have chromium || optional="$optional chromium"
        have firefox-esr || optional="$optional firefox-esr"
        have node || optional="$optional nodejs"
        have php || optional="$optional php-cli"
        have npm || optional="$optional npm"
        have ip || optional="$optional iproute2"
        have nft || optional="$optional nftables"
        have haproxy || optional="$optional haproxy"
        have caddy || optional="$optional caddy"
        have promtool || optional="$optional prometheus" # for promtool; the server is never started
        ;;
    bench)
        [ -e /usr/lib/nginx/modules/ngx_nchan_module.so ] || optional="$optional libnginx-mod-nchan"
        have pushpin || optional="$optional pushpin condure zurl"
        ;;
    esac
    [ -n "$required$optional" ] || exit 0
    if ! have apt-get; then
        [ -z "$required" ] && exit 0 # tests without their tool are skipped, by name
        case $(uname) in
            Darwin) fail "Programs are missing. Run: brew install$brew" ;;
            *) fail "Programs must be installed that only your package manager can bring:$brew (or valkey)." ;;
        esac
    fi
    # shellcheck disable=SC2086 # words, not one argument
    refresh $required $optional
    case $required in
        *redis-server*) candidate redis-server || ! candidate valkey-server ||
            required=$(say "$required" | sed 's/redis-server/valkey-server/') ;;
    esac
    # The others only serve tests and figures, which are skipped by name without
    # them; Ubuntu, for one, has no browser as a package.
    for package in $optional; do
        if candidate "$package"; then required="$required $package"
        else say "Not to be had here: $package. What needs it is skipped."; fi
    done
    [ -n "$required" ] || exit 0
    # shellcheck disable=SC2086 # words, not one argument
    install $required || {
        [ -z "$brew" ] || fail "nginx and Redis must be installed for this (see above)."
        say "What needs them is skipped."
    }
    ;;
*) fail "packages.sh takes stack, stack test, stack bench or venv PYTHON, got '$*'." ;;
esac
