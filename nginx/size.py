"""
Print the settings that follow from a number of streams.

    python nginx/size.py STREAMS [--way plain|tls|h2] [--workers N] [--nofile N] [--ports N]

`make nginx-size STREAMS=50000` calls it. Figures are measured ones, see
nginx/README.md; nothing here is changed by running it. Standard library only.
"""

import argparse
import math
import os
import sys

# User space per idle stream, in bytes: tests/nginx/measure.py, nginx 1.30.6.
STREAM_BYTES = {"plain": 17_900, "tls": 45_800, "h2": 19_000}
# Two sockets in the kernel, idle: the slab objects of each (socket, inode,
# dentry, file, epoll item: 3.7 KB on Linux 6.18).
KERNEL_BYTES = 2 * 3_700
# What a stalled client may hold: sndbuf=64k, which Linux doubles.
STALLED_BYTES = 2 * 65_536
# Per worker, for nginx itself and for each of its worker_connections.
WORKER_BYTES = 2_600_000
CONNECTION_BYTES = 429
# Streams spread over workers by chance; and some room is for reconnects.
HEADROOM = 1.25
# Files, logs, listeners, upstream keep-alive.
OTHER_FILES = 512
# An entry of limit_conn with a key of up to 60 bytes.
ZONE_ENTRY_BYTES = 128


def up(number: float, step: int) -> int:
    """Return the next multiple of *step*."""
    return math.ceil(number / step) * step


def port_range() -> int:
    """Return how many ports this machine gives to outgoing connections; Linux's default elsewhere."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:  # noqa: PTH123
            low, high = map(int, file.read().split())
    except OSError:
        return 28_232
    return high - low + 1


def sizes(streams: int, way: str, workers: int, nofile: int, ports: int) -> dict[str, int]:
    """Return every setting by name."""
    # A proxied stream has two connections, and worker_connections counts both.
    # Over HTTP/2 clients share theirs, but one tab of one browser does not.
    connections = 2 * streams * HEADROOM
    workers = max(workers, math.ceil(connections / (nofile - OTHER_FILES)))
    each = up(connections / workers, 1024)
    if each + OTHER_FILES > nofile:
        each = nofile - OTHER_FILES
    user = streams * STREAM_BYTES[way] + workers * (WORKER_BYTES + each * CONNECTION_BYTES)
    stalled = math.ceil(streams / 100) * STALLED_BYTES
    processes = max(math.ceil(streams * HEADROOM / ports), math.ceil(streams * HEADROOM / 15_000))
    return {
        "worker_processes": workers,
        "worker_connections": each,
        "worker_rlimit_nofile": each + OTHER_FILES,
        # What is left over is for publishers, health checks and uneven workers.
        "all streams": workers * each * 2 // 5,
        "zone": max(10, up(streams * HEADROOM * ZONE_ENTRY_BYTES / 1_048_576, 1)),
        "application processes": processes,
        "SSE_MAX_STREAMS": up(streams * HEADROOM / processes, 100),
        "memory": up((user + streams * KERNEL_BYTES + stalled) * 1.2 / 1_048_576, 32),
        "nf_conntrack_max": up(2 * connections, 1024),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print what follows; return 2 for a number that cannot be."""
    parser = argparse.ArgumentParser(prog="size.py", description="Print nginx's settings for a number of streams.")
    parser.add_argument("streams", type=int, nargs="?", help="streams that one nginx (one pod) holds at once")
    parser.add_argument("--way", choices=sorted(STREAM_BYTES), default="tls", help="how clients come (default: tls)")
    parser.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 2), help="at least; default: CPUs, or 2")
    parser.add_argument("--nofile", type=int, default=65_536, help="descriptors one process may have (default: 65536)")
    parser.add_argument("--ports", type=int, default=port_range(), help="of ip_local_port_range (default: this machine's)")
    options = parser.parse_args(arguments)
    if options.streams is None:
        print("STREAMS must be given, got none. For example: make nginx-size STREAMS=50000", file=sys.stderr)
        return 2
    for name, value, low, high in (
        ("STREAMS", options.streams, 1, 10_000_000),
        ("--workers", options.workers, 1, 1_024),
        ("--nofile", options.nofile, 1_024, 1 << 30),
        ("--ports", options.ports, 1_000, 65_535),
    ):
        if not low <= value <= high:
            print(f"{name} must be from {low} to {high}, got {value}.", file=sys.stderr)
            return 2
    found = sizes(options.streams, options.way, options.workers, options.nofile, options.ports)
    print(f"""\
For {options.streams} streams ({options.way}) through one nginx, with a quarter more for uneven spread and reconnects:

# nginx.conf
worker_processes {found["worker_processes"]};
worker_rlimit_nofile {found["worker_rlimit_nofile"]};
events {{ worker_connections {found["worker_connections"]}; }}

# snippets/sse-limits.conf
limit_conn sse_streams_of_nginx {found["all streams"]};

# snippets/sse-limits.http.conf, limit_conn_zone of the user and of the address
zone=...:{found["zone"]}m

# the application: {options.ports:,} streams per process are the ports' limit, 15,000 SSE_MAX_STREAMS' default
{found["application processes"]} processes at least, each SSE_MAX_STREAMS={found["SSE_MAX_STREAMS"]}
(one port per stream to each address; in Kubernetes more by the sysctl net.ipv4.ip_local_port_range "1024 65535")

# the system, or the pod
{found["memory"]} MiB of memory ({STREAM_BYTES[options.way] / 1000:g} KB per stream, {KERNEL_BYTES / 1000:g} KB in the kernel, 1 % stalled clients, a fifth more)
net.core.somaxconn 4096
net.netfilter.nf_conntrack_max {found["nf_conntrack_max"]}, where connections are tracked""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
