"""
`python -m loadtest`: check that a run is possible, start what it needs, run Locust, tell the verdict.

Exit code 0: all thresholds hold. 1: one does not, or the run is void. 2: the run could
not be made. 130: it was interrupted.
"""

import argparse
import base64
import contextlib
import errno
import functools
import http.client
import io
import itertools
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.lifeline import follow
from loadtest.terminal import say, stop_writing

ROOT = Path(__file__).resolve().parent.parent
USAGE, INTERRUPTED = 2, 130
# What a generator process opens beside its streams.
SPARE_DESCRIPTORS = 200
READY_SECONDS = 5.0
MASTER_PORT = 5557
# Forked workers are there in seconds; others are started by people or a scheduler (--wait).
FORKED_SECONDS = 120
# k8s/deploy.py looks for these lines.
RESULTS_BEGIN, RESULTS_END = "--- results, tar.gz in base64 ---", "--- end of results ---"

EPILOG = """\
scenarios:
{scenarios}
Without --host the local stack is the target: the one that runs on --port, or one that is
started for this run and ended after it. Other commands:
  python -m loadtest compare A B    two results side by side
  python -m loadtest cost           what a stream and an event cost the generator
"""


class CannotRun(Exception):
    """The run is not possible; the text says why, and the cure."""


def parser() -> argparse.ArgumentParser:
    """Return the command line of a run."""
    from loadtest.options import add_options
    from loadtest.scenario import load_scenarios

    scenarios = "".join(f"  {name:<17}{scenario.about}\n" for name, scenario in load_scenarios().items())
    made = argparse.ArgumentParser(
        prog="python -m loadtest",
        description="Hold many event streams open against a server, and tell a lost event from a late one.",
        epilog=EPILOG.format(scenarios=scenarios),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--host", default="", help="target, https://staging.example.com (default: the local stack)")
    made.add_argument("--port", type=int, default=8080, help="port of the local stack (default: 8080)")
    made.add_argument("--apps", type=int, default=2, help="application processes of a stack that is started")
    made.add_argument("--processes", type=int, default=1, help="generator processes on this machine (default: 1)")
    made.add_argument("--web", action="store_true", help="Locust's web page instead of starting at once")
    made.add_argument("--web-port", type=int, default=8089, help="port of that page (default: 8089)")
    made.add_argument("--master", action="store_true", help="lead --expect-workers workers on other machines")
    made.add_argument("--expect-workers", type=int, default=1, help="workers that the master waits for")
    made.add_argument(
        "--master-port",
        type=int,
        default=0,
        help=f"port of the master (default: {MASTER_PORT}; of --processes a free one)",
    )
    made.add_argument(
        "--wait", type=int, default=600, help="seconds that the master waits for them (default: 600; 0: for ever)"
    )
    made.add_argument("--print-results", action="store_true", help="write both files to standard output, too, packed")
    made.add_argument("--worker", default="", metavar="HOST", help="generate load for the master on HOST")
    add_options(made)
    return made


def main(arguments: list[str]) -> int:
    """Run one command; return the exit code."""
    if arguments[:1] == ["compare"]:
        return _compare(arguments[1:])
    if arguments[:1] == ["cost"]:
        from loadtest.cost import main as cost

        return cost(arguments[1:])
    options = parser().parse_args(arguments)
    options.token = options.token or os.environ.get("SSE_LOADTEST_TOKEN", "")
    # A secret that comes from a file ends with a line's end; the application does not count that either.
    options.secret = (options.secret or os.environ.get("SSE_LOADTEST_SECRET", "")).strip()
    from loadtest.scenario import ScenarioError

    # A run in CI is ended by SIGTERM: what was started must end, as at Ctrl-C, which a
    # shell turns off for what it runs in the background.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        _check_ports(options)
        if options.worker:
            port = str(options.master_port or MASTER_PORT)
            say(f"Working for the master on {options.worker}, port {port}, as soon as it is there.")
            code, interrupted = _locust(options, ["--worker", "--master-host", options.worker, "--master-port", port])
            return INTERRUPTED if interrupted else code
        _check_possible(options)
        with _target(options):
            _check_target(options)
            return _run(options)
    except (CannotRun, ScenarioError) as error:
        print(error, file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted before the run began", file=sys.stderr)
        return INTERRUPTED


# --- Before the run


def _check_possible(options: argparse.Namespace) -> None:
    """Check what can be known before anything is started."""
    from loadtest.options import chosen, chosen_thresholds, source_addresses
    from loadtest.tokens import Tokens

    scenario = chosen(options)
    chosen_thresholds(options)
    streams = options.streams or scenario.streams
    if not 1 <= options.processes <= 256:
        raise CannotRun(f"PROCESSES must be from 1 to 256, got {options.processes}.")
    for name in ("apps", "expect_workers"):
        if not 1 <= getattr(options, name) <= 1000:
            raise CannotRun(f"--{name.replace('_', '-')} must be from 1 to 1000, got {getattr(options, name)}.")
    tokens = Tokens(options.token, options.secret, options.claims)
    seconds = scenario.seconds + streams / scenario.connects_per_second
    left = tokens.expires_in()
    if left is not None and left < seconds:
        state = "has expired" if left <= 0 else f"expires in {left:.0f} s"
        raise CannotRun(
            f"TOKEN must be valid for the whole run of about {seconds:.0f} s, but it {state}. "
            f"Give a fresh one, or a secret: then every connect has a token of its own."
        )
    if options.results:
        try:
            Path(options.results).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotRun(
                f"--results must be a folder that can be made, got {options.results}: {error.strerror}."
            ) from None
    processes = options.expect_workers if options.master else options.processes
    each = -(-streams // processes)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not options.master and hard != resource.RLIM_INFINITY and each + SPARE_DESCRIPTORS > hard:
        enough = -(-streams // max(1, hard - SPARE_DESCRIPTORS))
        raise CannotRun(
            f"{each:,} streams in one process need as many descriptors, but its limit is {hard:,}. "
            f"Use more processes: PROCESSES={enough}; or raise the limit: ulimit -Hn."
        )
    host = options.host or f"http://127.0.0.1:{options.port}"
    if options.sources != "auto" and not options.master:
        for address in source_addresses(options, host):
            _check_source(address)
    sources = max(1, len(source_addresses(options, host)))
    ports = _ports()
    if not options.master and streams > ports * sources:
        raise CannotRun(
            f"{streams:,} streams from {sources} source address(es) need more ports than the {ports:,} of each "
            f"(net.ipv4.ip_local_port_range). Add addresses: --sources=10.0.0.5,10.0.0.6; or machines."
        )


def _check_ports(options: argparse.Namespace) -> None:
    """Check the ports that others come to; a free one for processes that only talk to each other."""
    for name in ("port", "master_port", "web_port"):
        value = getattr(options, name)
        if not 1 <= value <= 65_535 and (name != "master_port" or value):
            raise CannotRun(f"--{name.replace('_', '-')} must be from 1 to 65535, got {value}.")
    listens = []
    if options.master or (options.processes > 1 and not options.worker):
        if not options.master_port:
            options.master_port = MASTER_PORT if options.master else _free_port()
        listens.append(("--master-port", options.master_port))
    if options.web and not options.worker:
        listens.append(("--web-port", options.web_port))
    for name, port in listens:
        try:
            with socket.socket() as probe:
                # As those do that will listen: what a run before left in TIME_WAIT is no hindrance.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
        except OSError as error:
            why = "something listens there, perhaps another run" if error.errno == errno.EADDRINUSE else error.strerror
            raise CannotRun(
                f"{name} must be a port that is free here, got {port}: {why}. End that, or give another port."
            ) from None


def _check_source(address: str) -> None:
    try:
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError as error:
        raise CannotRun(
            f"--sources must be IPv4 addresses of this machine, got {address!r}: {error.strerror}."
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ports() -> int:
    with contextlib.suppress(OSError, ValueError):
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return int(high) - int(low) + 1
    return 28_000


@contextlib.contextmanager
def _target(options: argparse.Namespace) -> Iterator[None]:
    """Give the run a target: the one that is named, or the local stack."""
    if options.host:
        yield
        return
    options.host = f"http://127.0.0.1:{options.port}"
    folder = ROOT / ".run" / str(options.port)
    options.stack = options.stack or str(folder)
    if (folder / "state.json").exists():
        say(f"The target is the local stack on port {options.port}, which runs already.")
        yield
        return
    say(f"Starting the local stack on port {options.port} for this run.")
    command = [sys.executable, "-m", "app.stack"]
    where = ["--port", str(options.port)]
    try:
        # Not its output: its hints are for somebody who stays.
        up = subprocess.run(
            [*command, "up", *where, "--apps", str(options.apps)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            start_new_session=True,
        )
        if up.returncode:
            raise CannotRun(f"The local stack could not be started:\n{up.stderr.strip()}")
        yield
    finally:
        # An impatient Ctrl-C now would leave half of the stack behind. No SIG_IGN, which `down` would inherit.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        subprocess.run(
            [*command, "down", *where], cwd=ROOT, stdout=subprocess.DEVNULL, check=False, start_new_session=True
        )


def _check_target(options: argparse.Namespace) -> None:
    """Ask the target for a stream's head, so that a wrong address or token is told at once."""
    from loadtest.tokens import Tokens

    try:
        url = urlsplit(options.host)
        right = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        right = False
    if not right:
        raise CannotRun(f"HOST must be a URL, http://host:port or https://host, got {options.host!r}.")
    if url.username is not None:
        # Nor shown here: it would be in the report, too.
        raise CannotRun("HOST must have no user and password in it. Who the users are, tokens say: SSE_LOADTEST_TOKEN.")
    context = None
    if url.scheme == "https":
        context = ssl.create_default_context()
        if options.insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    headers = {"Accept": "application/json"} | Tokens(options.token, options.secret, options.claims).headers("lt-check")
    path = f"{url.path.rstrip('/')}/events?topic=loadtest%2F0"
    try:
        if url.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                url.hostname, url.port, timeout=READY_SECONDS, context=context
            )
        else:
            connection = http.client.HTTPConnection(url.hostname, url.port, timeout=READY_SECONDS)
        with contextlib.closing(connection):
            connection.request("HEAD", path, headers=headers)
            answer = connection.getresponse()
            if answer.status != 200:
                # A HEAD has no body, and the problem document says what is wrong.
                answer.read()
                connection.request("GET", path, headers=headers)
                answer = connection.getresponse()
            status, body = answer.status, answer.read(2000) if answer.status != 200 else b""
            moved = answer.getheader("Location", "") if status in (301, 302, 303, 307, 308) else ""
    except ssl.SSLError as error:
        raise CannotRun(
            f"{options.host} must have a certificate that can be trusted: {error}. "
            f"For an authority of your own: SSL_CERT_FILE=ca.pem; or, for any: --insecure."
        ) from None
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise CannotRun(f"HOST must answer, but {options.host} does not: {error or type(error).__name__}.") from None
    if status in (401, 403):
        given = "The token was refused" if options.token or options.secret else "A token is needed"
        raise CannotRun(
            f"{given}: {options.host} answered {status}{_detail(body)}. "
            f"Set SSE_LOADTEST_TOKEN to a valid token, or SSE_LOADTEST_SECRET to the secret of SSE_AUTH=jwt."
        )
    if moved:
        raise CannotRun(f"HOST must be where the streams are, but {options.host} answered {status}, to {moved}.")
    if status != 200:
        raise CannotRun(f"{options.host} must open a stream, but answered {status}{_detail(body)}.")


def _detail(body: bytes) -> str:
    with contextlib.suppress(ValueError):
        found = json.loads(body)
        if isinstance(found, dict) and found.get("detail"):
            return f": {found['detail']}"
    return ""


# --- The run


def _run(options: argparse.Namespace) -> int:
    from loadtest.options import results_folder

    if not options.results:
        options.results = str(
            _new_folder(ROOT / results_folder(options, f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{options.scenario}"))
        )
    folder = Path(options.results)
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    more = ["--web-port", str(options.web_port)] if options.web else ["--headless"]
    port = str(options.master_port)
    if options.master:
        say(f"Waiting on port {port} for workers: {options.expect_workers}.")
        more += ["--master", "--expect-workers", str(options.expect_workers), "--master-bind-port", port]
        more += ["--expect-workers-max-wait", str(options.wait)]
    elif options.processes > 1:
        # Nobody else has to reach it, and what it tells its workers has secrets in it.
        more += ["--processes", str(options.processes), "--master-bind-host", "127.0.0.1", "--master-bind-port", port]
        more += ["--master-port", port, "--expect-workers-max-wait", str(FORKED_SECONDS)]
    code, interrupted = _locust(options, [*more, "--only-summary", "--json-file", str(folder / "locust")])
    if options.web:
        return code
    if not result.exists():
        if interrupted:
            raise KeyboardInterrupt
        if code < 0:
            raise CannotRun(
                f"The process that leads the run must live until its end, but {signal.Signals(-code).name} ended it: "
                f"there is no result. If nobody did that, look for lack of memory (dmesg)."
            )
        raise CannotRun(
            f"Locust must leave a result, but ended with {code} before there was one; its own lines say why."
        )
    from loadtest.result import Result, verdict_line

    found = Result.read(result)
    if options.print_results:
        _print_results(folder)
    # Once more, so that it stands last, whatever Locust wrote meanwhile.
    say(verdict_line(found))
    return found.exit_code


def _new_folder(wanted: Path) -> Path:
    """Make a folder that no other run has, which perhaps began in the same second."""
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def _print_results(folder: Path) -> None:
    """Write the results as text: where a container's log is all that is left of it, they are in the log."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in ("result.json", "report.html"):
            archive.add(folder / name, name)
    say(f"{RESULTS_BEGIN}\n{base64.encodebytes(packed.getvalue()).decode()}{RESULTS_END}")


def _locust(options: argparse.Namespace, more: list[str]) -> tuple[int, bool]:
    """
    Run Locust to its end; Ctrl-C here ends it in good order, a second one at once.

    Return its exit code, and whether it was interrupted. None of its processes is left.
    """
    from loadtest.options import as_arguments

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Locust reads the secrets from the environment: an argument would be in everybody's `ps`.
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "LOCUST_SKIP_MONKEY_PATCH_WARNING": "1"}
    environment |= {"SSE_LOADTEST_TOKEN": options.token, "SSE_LOADTEST_SECRET": options.secret}
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest/locustfile.py"), "--loglevel", "ERROR"]
    command += ["--host", options.host] if options.host else []
    # A session of its own: Ctrl-C is for the master alone, which asks its workers for
    # their figures; hit by it themselves they would just end.
    with subprocess.Popen(
        [*command, *as_arguments(options), *more],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # In good order, if this process is killed.
        preexec_fn=functools.partial(follow, os.getpid(), signal.SIGINT),  # noqa: PLW1509 (no locks in it)
    ) as locust:
        interrupts = 0
        while True:
            try:
                # Not `wait` yet: until then the number of its group is nobody else's.
                os.waitid(os.P_PID, locust.pid, os.WEXITED | os.WNOWAIT)
                break
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts == 1:
                    print("\nEnding the run; again to end it without results.", file=sys.stderr, flush=True)
                    locust.send_signal(signal.SIGINT)
                else:
                    os.killpg(locust.pid, signal.SIGKILL)
        # Its workers have handed over what they have; one that waits for a dead master stays.
        with contextlib.suppress(OSError):
            os.killpg(locust.pid, signal.SIGKILL)
        return locust.wait(), interrupts > 0


def _compare(arguments: list[str]) -> int:
    from loadtest.compare import compare
    from loadtest.result import Result

    compared = argparse.ArgumentParser(prog="python -m loadtest compare", description="Set two results side by side.")
    compared.add_argument("a", type=Path, help="result.json, or the folder that holds it")
    compared.add_argument("b", type=Path)
    options = compared.parse_args(arguments)
    if "" in arguments:
        print("A and B must be two results, or their folders: make loadtest-compare A=… B=…", file=sys.stderr)
        return USAGE
    try:
        found = [Result.read(path / "result.json" if path.is_dir() else path) for path in (options.a, options.b)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE
    say(compare(*found))
    return 0


def _program() -> int:
    try:
        try:
            return main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        stop_writing()  # `--help | head`
        return 0


if __name__ == "__main__":
    sys.exit(_program())
