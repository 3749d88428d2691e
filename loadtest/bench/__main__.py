"""
`python -m loadtest.bench`: run the benchmark.

Exit code 0: all limits hold. 1: a limit is broken or void; the row is named.
2: the run could not be made.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from ..terminal import say
from .chart import draw
from .client import client_command
from .compiler import CompileError
from .peers import PEERS, Absent
from .peers.sse_starlette import install
from .process import guardian
from .report import Report, describe_machine
from .scenario import FULL, QUICK, ROWS, Bench, progress

DESCRIPTION = """\
Measure this kit and other servers of event streams side by side: CPU per delivery,
deliveries per second, memory per stream, cost of connects and of their return.
The full run takes about 20 minutes, --quick less than 5; the machine should have
nothing else to do. All traffic stays on the loopback.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """
    Read the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        default=os.environ.get("QUICK", "") not in ("", "0"),
        help="a fifth of the streams, fewer rounds (also: QUICK=1)",
    )
    parser.add_argument(
        "--only",
        metavar="ROW,...",
        default=",".join(sorted(ROWS)),
        help=f"only these figures: {', '.join(sorted(ROWS))}",
    )
    parser.add_argument(
        "--peers", metavar="NAME,...", default=",".join(PEERS), help=f"only these servers: {', '.join(PEERS)}"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        help="where to write results.json, table.md and chart.svg (default: .run/bench/TIME)",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each scenario")
    parser.add_argument(
        "--install",
        action="store_true",
        help="first install what is missing: sse-starlette into an environment of its own, and, as root"
        " on Debian, nginx, Nchan, Pushpin and Redis from its packages, without starting a service",
    )
    options = parser.parse_args(arguments)
    options.only = _names(parser, "--only", options.only, ROWS)
    options.peers = _names(parser, "--peers", options.peers, PEERS)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}. Leave it out for the usual number.")
    return options


def _names(parser: argparse.ArgumentParser, option: str, text: str, known: object) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:  # type: ignore[operator]
            parser.error(f"{option} must name known ones, got {name!r}. Known: {', '.join(sorted(known))}.")  # type: ignore[call-overload]
    return names


# Debian's packages of the peers that have some.
PACKAGES = {
    "floor": ("gcc", "libc6-dev"),
    "app-nginx": ("redis-server", "nginx"),
    "nchan": ("nginx", "libnginx-mod-nchan"),
    "pushpin": ("pushpin", "condure", "zurl"),
}


def install_peers() -> None:
    """
    Install the peers that can be.
    """
    install()
    missing = set()
    for name, needed in PACKAGES.items():
        try:
            PEERS[name].version()
        except Absent:
            missing.update(needed)
    packages = sorted(missing)
    if not packages or not shutil.which("apt-get"):
        return
    if os.geteuid() != 0:
        progress(f"not root: install the rest yourself: apt-get install {' '.join(packages)}")
        return
    progress(f"installing {', '.join(packages)}")
    # Debian's packages start their services unless a policy forbids it.
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        command = ["apt-get", "install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run([*command, *packages], check=True, env=environment, stdout=sys.stderr)
    finally:
        if made:
            policy.unlink()


def main(arguments: list[str]) -> int:
    """
    Run the benchmark and return the exit code.
    """
    options = parse(arguments)
    # A run in CI is ended by SIGTERM: it must clean up as at Ctrl-C, which a shell
    # turns off for what it runs in the background.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.install:
        install_peers()
    size = QUICK if options.quick else FULL
    if options.rounds:
        size = size.with_rounds(options.rounds)
    rows = set(options.only)

    peers, versions, absent = [], {}, {}
    for name in PEERS:
        if name in options.peers:
            try:
                versions[name] = PEERS[name].version()
                peers.append(PEERS[name])
            except Absent as error:
                absent[name] = str(error)
                progress(f"skipped: {name}. {error}")
    client = client_command()[1]
    if client == "Python":
        progress("no C compiler: the load client is the Python fallback, several processes")
    machine = describe_machine()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sse-bench-", ignore_cleanup_errors=True) as folder:
        guardian.tell("=", folder)
        results = Bench(peers, size, rows, Path(folder)).run()
    report = Report(results, size, peers, versions, absent, machine, client, rows, time.monotonic() - began)

    root = Path(__file__).parents[2]
    output = options.output or root / ".run" / "bench" / f"{datetime.now():%Y%m%d-%H%M%S}"
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n")
    (output / "table.md").write_text(report.as_text())
    (output / "chart.svg").write_text(draw(report))
    say(report.as_text())
    say(f"Written: {output}")
    for failed in report.broken:
        say(f"{failed.verdict.value}: {failed.limit.row}: {failed.limit.text}. {failed.reason}".rstrip(". ") + ".")
    return 1 if report.broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (CompileError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
