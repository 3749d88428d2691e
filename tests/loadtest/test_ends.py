"""
However a run of the load test ends: a clear sentence, the results so far, the right exit code.
"""

import contextlib
import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import jwt
import pytest

from app.stack import reserve_port
from loadtest.__main__ import _new_folder, _target, parser
from loadtest.result import Result
from tests.loadtest.runs import PATIENT, ROOT, TOPIC, Run, processes_of


def refused(*arguments: str, **more) -> subprocess.CompletedProcess[str]:
    """A run that must not even begin."""
    command = [sys.executable, "-m", "loadtest", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **more)


class TestBefore:
    def test_target_away(self):
        """Nobody listens: one sentence, and nothing is started."""
        port, holder = reserve_port()

        run = refused("--host", f"http://127.0.0.1:{port}")

        if holder is not None:
            holder.close()
        assert (2, "") == (run.returncode, run.stdout)
        assert f"HOST must answer, but http://127.0.0.1:{port} does not" in run.stderr
        assert 1 == run.stderr.count("\n")

    def test_token_that_expires_meanwhile(self):
        """A token that does not last is told before ten thousand streams learn it."""
        soon = jwt.encode({"sub": "a", "exp": int(time.time()) + 5}, "x" * 32, "HS256")
        late = jwt.encode({"sub": "a", "exp": int(time.time()) - 5}, "x" * 32, "HS256")

        for token, state in ((soon, "expires in"), (late, "has expired")):
            run = refused("--host", "http://127.0.0.1:1", "--token", token)

            assert 2 == run.returncode
            assert "TOKEN must be valid for the whole run" in run.stderr
            assert state in run.stderr

    def test_token_refused(self, server):
        """The server's own words for a token that it does not take."""
        truth = server(**{TOPIC: {"refuse_head": True}})

        run = refused("--host", truth.url, "--token", "opaque")

        assert 2 == run.returncode
        assert "The token was refused" in run.stderr
        assert "the token expired" in run.stderr

    def test_moved(self, server):
        """Browsers would follow, and every connect of a load test would have a redirect in it: where to is told."""
        truth = server(**{TOPIC: {"moved": "https://elsewhere.test/events"}})

        run = refused("--host", truth.url)

        assert 2 == run.returncode
        assert "answered 301, to https://elsewhere.test/events" in run.stderr

    def test_too_few_descriptors(self):
        """The limit of one process, and how many would do."""

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (700, 700))

        run = refused("--host", "http://127.0.0.1:1", "--streams", "1200", preexec_fn=limit)

        assert 2 == run.returncode
        assert "its limit is 700" in run.stderr
        assert "PROCESSES=3" in run.stderr

    def test_too_few_ports(self):
        """One source address holds only so many streams to one target."""
        run = refused(
            "--host", "http://127.0.0.1:1", "--streams", "100000", "--processes", "64", "--sources", "127.0.0.1"
        )

        assert 2 == run.returncode
        assert "ip_local_port_range" in run.stderr
        assert "--sources=" in run.stderr

    def test_port_of_the_master_is_taken(self):
        """Another run's master perhaps, whose workers ours must not become."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]

            for more in (["--processes", "2"], ["--master"]):
                run = refused("--host", "http://127.0.0.1:1", f"--master-port={port}", *more)

                assert (2, "") == (run.returncode, run.stdout)
                assert f"--master-port must be a port that is free here, got {port}: something listens" in run.stderr
                assert 1 == run.stderr.count("\n")

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--master-port", "70000"], "--master-port must be from 1 to 65535, got 70000"),
            (["--scenario", "averageload"], "SCENARIO must be one of smoke, average-load"),
            (["--thresholds", "p99 <= 5"], "a threshold must be of a known figure, got 'p99'"),
            (["--streams", "-1"], "STREAMS must be from 1 to"),
            (["--host", "localhost:8080"], "HOST must be a URL"),
            (["--host", "http://localhost:99999"], "HOST must be a URL"),
            (["--host", "http://me:word@localhost"], "HOST must have no user and password in it"),
            (["--rate", "-5"], "RATE must be from 1 to"),
            (["--expect-workers", "0"], "--expect-workers must be from 1 to"),
            (["--results", "/dev/null/x"], "--results must be a folder that can be made"),
            (["--sources", "192.0.2.1"], "--sources must be IPv4 addresses of this machine, got '192.0.2.1'"),
            (["--claims", "[]"], "--claims must be a JSON object"),
            (["--scenarios", "/nowhere.toml"], "/nowhere.toml must be a file that can be read"),
        ],
    )
    def test_wrong_options(self, arguments, sentence):
        """Name, rule, value and cure, in one line."""
        run = refused("--host", "http://127.0.0.1:1", *arguments)

        assert (2, "") == (run.returncode, run.stdout)
        assert sentence in run.stderr
        assert 1 == run.stderr.count("\n")


class TestMeanwhile:
    def test_ctrl_c(self, tmp_path, server):
        """Ctrl-C keeps the results so far, and is no success; what was on its way is no loss."""
        truth = server(**{TOPIC: {"delay_ms": 2500}})
        run = Run(tmp_path, truth.url, PATIENT, seconds=60)
        run.until("hold.*deliveries [1-9]")

        run.process.send_signal(signal.SIGINT)

        assert 130 == run.end(30), run.output
        assert "interrupted: the results so far are kept" in run.lines[-1]
        assert run.figures["deliveries"] > 0 == run.figures["lost"]
        assert (tmp_path / "results/report.html").exists()

    def test_target_dies(self, tmp_path, server):
        """A target that dies midway: the run ends by itself, failed, and says since when."""
        truth = server()
        run = Run(tmp_path, truth.url, PATIENT, "--patience=2", seconds=60)
        run.until("hold")

        truth.close()

        assert 1 == run.end(60), run.output
        assert "FAILED: the target is gone: no stream has been open for 2 s" in run.lines[-1]
        assert run.figures["deliveries"] > 0
        assert run.result["broken"]["ECONNREFUSED"] > 0

    def test_token_expires(self, tmp_path, server):
        """Tokens that are no longer taken: every stream gives up, as a browser does."""
        truth = server(**{TOPIC: {"cut_at": [20], "refuse_at": 8}})

        run = Run(tmp_path, truth.url, PATIENT, seconds=60)

        assert 1 == run.end(60), run.output
        assert "FAILED: every stream was refused for ever: 8 times 401" in run.lines[-1]
        assert (8, 8) == (run.figures["gave_up"], run.result["refused"]["401"])


def none_is_left(run: Run) -> None:
    deadline = time.monotonic() + 20
    while left := processes_of(run):
        if time.monotonic() > deadline:
            for process in left:
                os.kill(process, signal.SIGKILL)
            raise AssertionError(f"{len(left)} processes were left")
        time.sleep(0.05)


class TestNothingIsLeft:
    """Whatever ends a run, none of its processes outlives it."""

    @pytest.mark.parametrize("who", ["the command", "the master"])
    def test_killed(self, tmp_path, server, who):
        """SIGKILL of the command: the run ends in good order. Of the master: there is no result, and that is said."""
        run = Run(tmp_path, server().url, PATIENT, "--processes=2", seconds=60)
        run.until("hold")
        parents = processes_of(run)
        [master] = [process for process, parent in parents.items() if parent == run.process.pid]
        workers = [process for process, parent in parents.items() if parent == master]

        os.kill(run.process.pid if who == "the command" else master, signal.SIGKILL)

        run.process.wait(30)
        none_is_left(run)
        run.end()
        assert 2 == len(workers)
        if who == "the command":
            assert "interrupted" == run.result["verdict"]
            assert run.figures["deliveries"] > 0 == run.figures["lost"]
        else:
            assert 2 == run.code
            assert "must live until its end, but SIGKILL ended it: there is no result" in run.lines[-1]

    @pytest.mark.usefixtures("server")  # ends the run
    def test_master_that_can_not_listen(self, tmp_path):
        """Locust's own command, where nobody looks at the port before: its workers don't wait for ever."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            run = Run(
                tmp_path, "http://127.0.0.1:1",
                f"--master-bind-port={other.getsockname()[1]}", f"--master-port={other.getsockname()[1]}",
                "--headless", "--processes=2", program=("locust", "-f", "loadtest/locustfile.py"),
            )  # fmt: skip

            code = run.process.wait(60)

            none_is_left(run)
            run.end()
            assert 1 == code, run.output
            assert "port" in run.output

    def test_ctrl_c_before_it_began(self, tmp_path, server):
        """A master that waits for workers which never come."""
        port, holder = reserve_port()
        if holder is not None:
            holder.close()
        run = Run(tmp_path, server().url, PATIENT, "--master", f"--master-port={port}")
        run.until("Waiting on port")
        # Locust takes its time until it listens.
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)

        run.process.send_signal(signal.SIGINT)

        assert 130 == run.end(30), run.output
        assert "interrupted before the run began" == run.lines[-1]
        assert "Traceback" not in run.output
        none_is_left(run)

    def test_a_reader_that_has_enough(self, tmp_path, server):
        """`| head`: the run goes on, its results are written, and its exit code is its own."""
        out, into = os.pipe()
        os.close(out)

        run = Run(tmp_path, server().url, PATIENT, seconds=1, stdout=into)

        os.close(into)
        assert 0 == run.end(60), run.output
        assert "" == run.output
        assert "passed" == run.result["verdict"]
        none_is_left(run)


def alone(script: str) -> subprocess.CompletedProcess[str]:
    """Run *script* in a process of its own: Locust makes everything gevent's."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


class TestMasterAlone:
    def test_workers_changed(self):
        """One that died took its figures with it; one that came would publish what another one does."""
        script = alone(_WORKERS_CHANGED)

        assert [
            "(2, 0): ''",
            "(2, 1): '1 of 2 generator processes dead or silent'",
            "(1, 0): '1 of 2 generator processes dead or silent'",
            "(3, 0): '1 generator processes more than the run began with'",
        ] == [line for line in script.stdout.splitlines() if line.startswith("(")], script.stderr


_WORKERS_CHANGED = """
from types import SimpleNamespace
from locust.runners import STATE_MISSING, STATE_RUNNING, MasterRunner, WorkerNode, WorkerNodes
from loadtest.__main__ import parser
from loadtest.conductor import Conductor

MasterRunner.__del__ = lambda self: None
MasterRunner.user_count = 0
for here, missing in ((2, 0), (2, 1), (1, 0), (3, 0)):
    runner = MasterRunner.__new__(MasterRunner)
    runner.clients = WorkerNodes()
    for number in range(here):
        runner.clients[str(number)] = WorkerNode(str(number), STATE_MISSING if number < missing else STATE_RUNNING)
    conductor = Conductor(SimpleNamespace(runner=runner, host="http://x"), parser().parse_args([]))
    conductor.workers = 2
    conductor.finish = lambda: None
    conductor.tick()
    assert conductor.stopped == conductor.void
    print(f"{(here, missing)}: {conductor.void!r}", flush=True)
"""


class TestResults:
    def test_can_not_be_written(self):
        """A disk that is full after an hour: the figures are shown all the same, and it is no success."""
        script = alone(_UNWRITABLE)

        assert re.search(r"(?m)^  streams +0 of 20 open", script.stdout), script.stderr
        assert "The results could not be written into /dev/null/x: Not a directory." in script.stdout
        assert "exit code 2" == script.stdout.splitlines()[-1]

    def test_in_one_second(self, tmp_path):
        """Two runs of one scenario that begin together have a folder each."""
        assert ["run", "run-2"] == [_new_folder(tmp_path / "run").name for _ in range(2)]

    def test_whole_or_not_at_all(self, tmp_path, monkeypatch):
        """Nobody reads half a result."""

        def full(path: Path, text: str) -> None:
            path.write_bytes(text[:10].encode())
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        result = Result.__new__(Result)
        monkeypatch.setattr("loadtest.result.asdict", lambda _: {"figures": "many"})

        with pytest.raises(OSError, match="No space"):
            result.write(tmp_path / "result.json")

        assert [] == list(tmp_path.iterdir())


_UNWRITABLE = """
from types import SimpleNamespace
from loadtest.__main__ import parser
from loadtest.conductor import Conductor

environment = SimpleNamespace(runner=None, host="http://x")
conductor = Conductor(environment, parser().parse_args(["--results=/dev/null/x"]))
conductor._conclude()
print("exit code", environment.process_exit_code)
"""


class TestStack:
    def test_ctrl_c_while_it_ends(self, monkeypatch):
        """A local stack that was started for the run ends with it, however impatient somebody is."""
        ended = []

        def run(command: list[str], **_: object) -> SimpleNamespace:
            if "down" in command:
                os.kill(os.getpid(), signal.SIGINT)
                ended.append(command)
            return SimpleNamespace(returncode=0)

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr("loadtest.__main__.subprocess.run", run)
        options = parser().parse_args(["--port=1"])
        try:
            with contextlib.suppress(KeyboardInterrupt), _target(options):
                pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

        assert 1 == len(ended)


class TestLimit:
    def test_what_failed_most(self):
        """A stack that cuts most connects and refuses two is said to cut them, and how; a generator that is full is no limit of its."""
        script = alone(_LIMIT)

        assert [
            "limit at 100 streams: 2,560 connects failed (ECONNRESET)",
            "limit at 100 streams: 9 streams refused (500)",
            "limit at 100 streams: 1 events lost",
            "limit at 100 streams: delivery p99 900 ms; no part was at its limit",
            "limit at 100 streams: the generator gave way first, its CPU at 97 %; use more processes",
        ] == script.stdout.splitlines(), script.stderr


_LIMIT = """
from types import SimpleNamespace
from loadtest.__main__ import parser
from loadtest.conductor import Conductor
from loadtest.result import FIGURES
from loadtest.scenario import load_thresholds

conductor = Conductor(SimpleNamespace(runner=None, host="http://x"), parser().parse_args([]))
conductor.watch = None
conductor.collected.tally.update({"refused:500": 8, "refused:503": 1, "broken:ECONNRESET": 2560, "broken:EPIPE": 3})
none = dict.fromkeys(("lost", "gave_up", "soft_failed", "broken", "generator_errors"), 0)
none |= dict.fromkeys(("lag_p99_ms", "delivery_p99_ms", "cpu_percent"), 0)
late = {"delivery_p99_ms": 900}
conductor.thresholds = load_thresholds("breakpoint", [], FIGURES)
for failures in ({"gave_up": 2, "broken": 2560}, {"gave_up": 9}, {"lost": 1, "broken": 5}, late, late | {"cpu_percent": 97}):
    print(conductor._gave_way(none | failures | {"streams": 100, "open": 90}))
"""


class TestWebPage:
    def test_figures(self, tmp_path, server):
        """Locust's own page starts the run, and has our figures in its tables; /streams has the report."""
        truth = server()
        port, holder = reserve_port()
        run = Run(tmp_path, truth.url, PATIENT, "--web", f"--web-port={port}", seconds=3)

        def get(path: str, body: bytes | None = None) -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", body, timeout=10) as answer:
                return answer.read().decode()

        def until(path: str, text: str) -> str:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    if text in (answer := get(path)):
                        return answer
                time.sleep(0.1)
            raise TimeoutError(f"{path} never had {text!r}: {run.output}")

        until("/streams", "No run yet")
        get("/swarm", b"user_count=1&spawn_rate=1")
        until("/streams", "lost 0")
        report = until("/streams", "</svg>")
        rows = {row["name"]: row for row in json.loads(get("/stats/requests"))["stats"]}
        run.process.send_signal(signal.SIGINT)

        run.end(30)
        if holder is not None:
            holder.close()
        assert "passed: " in report
        assert (8, "SSE") == (rows["open"]["num_requests"], rows["open"]["method"])
        # The figures of the last half second are in the report alone.
        assert 0 < rows["delivery"]["num_requests"] <= run.figures["deliveries"]
        assert run.figures["lost"] == 0


class TestSeveralProcesses:
    def test_same_totals(self, tmp_path, server):
        """A master and two workers count what one process counts, latencies included."""
        fault = {"drop": [1, 10, 20, 21], "repeat": [4, 24], "swap": [6, 12, 16], "delay_ms": 200}
        (tmp_path / "one").mkdir()
        (tmp_path / "two").mkdir()
        port, holder = reserve_port()
        servers = server(**{TOPIC: fault}), server(**{TOPIC: fault})

        one = Run(tmp_path / "one", servers[0].url, PATIENT, seconds=3)
        two = Run(tmp_path / "two", servers[1].url, PATIENT, "--processes=2", f"--master-port={port}", seconds=3)

        assert (1, 1) == (one.end(), two.end()), one.output + two.output
        if holder is not None:
            holder.close()
        for name in ("lost", "duplicate", "out_of_order", "streams_most", "opened", "unfinished"):
            assert one.figures[name] == two.figures[name], name
        assert (32, 16, 24) == tuple(two.figures[name] for name in ("lost", "duplicate", "out_of_order"))
        truth = servers[1].truth()
        assert 8 * truth["published"] - 32 + 16 == two.figures["deliveries"]
        assert truth["published"] == two.figures["published"]
        assert 175 <= two.figures["delivery_p50_ms"] <= 1_000
        assert 2 == two.result["workers"]
