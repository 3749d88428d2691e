"""
However a run of the load test ends: a clear sentence, the results so far, the right exit code.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import time
import urllib.request

import jwt
import pytest

from app.stack import reserve_port
from tests.loadtest.runs import PATIENT, ROOT, TOPIC, Run


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

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--scenario", "averageload"], "SCENARIO must be one of smoke, average-load"),
            (["--thresholds", "p99 <= 5"], "a threshold must be of a known figure, got 'p99'"),
            (["--streams", "-1"], "STREAMS must be from 1 to"),
            (["--host", "localhost:8080"], "HOST must be a URL"),
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
        """Ctrl-C keeps the results so far, and is no success."""
        truth = server()
        run = Run(tmp_path, truth.url, PATIENT, seconds=60)
        run.until("hold")

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


class TestWebPage:
    def test_figures(self, tmp_path, server):
        """Locust's own page starts the run, and has our figures in its tables; /streams has the report."""
        truth = server()
        port, holder = reserve_port()
        if holder is not None:
            holder.close()
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
        if holder is not None:
            holder.close()
        servers = server(**{TOPIC: fault}), server(**{TOPIC: fault})

        one = Run(tmp_path / "one", servers[0].url, PATIENT, seconds=3)
        two = Run(tmp_path / "two", servers[1].url, PATIENT, "--processes=2", f"--master-port={port}", seconds=3)

        assert (1, 1) == (one.end(), two.end()), one.output + two.output
        for name in ("lost", "duplicate", "out_of_order", "streams_most", "opened", "unfinished"):
            assert one.figures[name] == two.figures[name], name
        assert (32, 16, 24) == tuple(two.figures[name] for name in ("lost", "duplicate", "out_of_order"))
        truth = servers[1].truth()
        assert 8 * truth["published"] - 32 + 16 == two.figures["deliveries"]
        assert truth["published"] == two.figures["published"]
        assert 175 <= two.figures["delivery_p50_ms"] <= 260
        assert 2 == two.result["workers"]
