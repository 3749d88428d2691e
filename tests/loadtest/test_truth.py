"""
The load test may be believed: what a server is told to do wrong, it counts exactly.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.loadtest.runs import PATIENT, ROOT, TOPIC, Run, Truth, all_at_once

FAULTS = {
    "none": {},
    # 1 is the first event of all, and 20 to 21 a gap of two.
    "faults": {"drop": [1, 10, 20, 21], "repeat": [4, 24], "swap": [6, 12, 16]},
    "loses": {"cut_at": [40], "lose_on_cut": True},
    "replays": {"cut_at": [40]},
    "resets": {"cut_at": [40], "lose_on_cut": True, "reset": True},
    "silent at the end": {"drop": list(range(45, 10_000))},
    # All streams leave before the end.
    "silent to who leaves": {"drop": list(range(5, 10_000))},
    "soft": {"fallback": 5},
    **{f"{delay} ms": {"delay_ms": delay} for delay in (50, 200, 500)},
}


@pytest.fixture(scope="class")
def runs(tmp_path_factory) -> Iterator[dict[str, tuple[Run, Truth]]]:
    """One run for each fault."""

    def start(name: str) -> tuple[Run, Truth]:
        truth = Truth({TOPIC.replace("__", "/"): FAULTS[name]})
        # Back after 0.1 s of `retry:`: some events pass meanwhile.
        leave = "{ streams = 1, seconds = 3 }, { streams = 0, seconds = 1 }" if "leaves" in name else ""
        return Run(tmp_path_factory.mktemp("run"), truth.url, PATIENT, "--settle=2", rate=40, stages=leave), truth

    with all_at_once(FAULTS, start) as found:
        yield found


class TestCounts:
    def test_a_server_without_fault(self, runs):
        """All that was published reached all streams, and the run passes."""
        run, truth = runs["none"]

        assert 0 == run.code, run.output
        assert truth.truth()["published"] == run.figures["published"] > 60
        assert 8 * run.figures["published"] == run.figures["deliveries"]
        assert [0] * 4 == [run.figures[name] for name in ("lost", "duplicate", "out_of_order", "unfinished")]
        assert run.lines[-1].startswith("passed: ")

    def test_dropped_repeated_and_reordered(self, runs):
        """Exact counts: 4 dropped, 2 repeated and 3 reordered events, on each of 8 streams."""
        run, truth = runs["faults"]

        counted = truth.truth()
        assert (32, 16, 24) == tuple(counted[name] for name in ("dropped", "repeated", "swapped"))
        assert (32, 16, 24) == tuple(run.figures[name] for name in ("lost", "duplicate", "out_of_order"))
        assert 1 == run.code
        assert "FAILED: lost is 32, must be exactly 0" in run.lines[-1]

    def test_across_reconnects(self, runs):
        """What is lost between two connections of one stream is lost; what is replayed is not."""
        (lost, loses), (kept, _) = runs["loses"], runs["replays"]

        assert (1, 0) == (lost.code, kept.code), lost.output + kept.output
        assert loses.truth()["missed"] == lost.figures["lost"] >= 8
        assert 8 * lost.figures["published"] - lost.figures["deliveries"] == lost.figures["lost"]
        assert 0 == kept.figures["lost"] == kept.figures["duplicate"]
        assert 8 * kept.figures["published"] == kept.figures["deliveries"]
        assert (8, 8) == (lost.figures["reconnects"], kept.figures["reconnects"])
        assert 8 == kept.result["ended"]["cut"]
        assert 100 <= kept.figures["resume_p50_ms"]

    def test_announced(self, runs):
        """What `stream.reset` told of is counted apart: the server kept its word."""
        run, truth = runs["resets"]

        assert 0 == run.code, run.output
        assert 0 == run.figures["lost"]
        assert truth.truth()["missed"] == run.figures["announced"] >= 8

    def test_the_last_events(self, runs):
        """Events that never come at the end are lost, too, though no later number shows it."""
        run, truth = runs["silent at the end"]

        assert 1 == run.code, run.output
        assert truth.truth()["dropped"] == run.figures["lost"] > 0

    def test_who_leaves(self, runs):
        """Who leaves before the end must have what was published before: nobody is left to miss it then."""
        run, truth = runs["silent to who leaves"]

        assert 1 == run.code, run.output
        assert 0 < run.figures["lost"] <= truth.truth()["dropped"]
        assert 0 == run.figures["lost"] % 8

    def test_soft_failed(self, runs):
        """A 200 that is no stream is not an open: it is counted, and the client comes back."""
        run, _ = runs["soft"]

        assert 0 == run.code, run.output
        assert (5, 8, 13) == tuple(run.figures[name] for name in ("soft_failed", "opened", "connects"))

    def test_delays(self, runs):
        """Delays of 50, 200 and 500 ms are recovered, against a control without."""
        control = runs["none"][0].figures["delivery_p50_ms"]
        for delay in (50, 200, 500):
            # A busy machine adds to all of them, and to the control alike; the median is
            # what it adds least to.
            added = runs[f"{delay} ms"][0].figures["delivery_p50_ms"] - control

            assert abs(added - delay) <= max(100, delay / 2), (delay, added, control)


class TestTime:
    def test_iter_lines_is_wrong(self, tmp_path, server):
        """Locust's own way says an event is late by what a buffer of 1,024 bytes takes to fill."""
        truth = server()
        script = tmp_path / "iter_lines.py"
        script.write_text(_ITER_LINES)
        # Until the other client has read what it needs, however late it starts on a busy machine.
        run = Run(tmp_path, truth.url, PATIENT, seconds=300, rate=10)
        run.until("hold")

        wrong = subprocess.run(
            [sys.executable, str(script), truth.url], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )

        run.process.send_signal(signal.SIGINT)
        assert 130 == run.end(), run.output
        assert 0 == wrong.returncode, wrong.stderr
        # The same events of the same run: 250 bytes each, so four of them fill the buffer.
        late = float(wrong.stdout.split()[-1])
        assert late - run.figures["delivery_p50_ms"] > 100, wrong.stdout + wrong.stderr

    def test_saturated(self, tmp_path, server):
        """A generator that can't keep up is void, whatever it measured."""
        # 20,000 events of a few bytes cost the server one write, and the generator its core.
        truth = server(**{TOPIC: {"flood": 20_000}})

        run = Run(tmp_path, truth.url, "--thresholds=lag_p99_ms<=50,delivery_p99_ms<=60000", "--settle=1", seconds=2)

        assert 1 == run.end(), run.output
        assert run.lines[-1].startswith("VOID, because of the generator: "), run.output
        assert "void" == run.result["verdict"]


_ITER_LINES = """
import statistics, sys, time
from locust.contrib.fasthttp import FastHttpSession
from locust import events
import gevent

session = FastHttpSession(sys.argv[1], events.request, None)
late = []
with gevent.Timeout(50, False):
    for line in session.iter_lines("/events?topic=loadtest%2F0", headers={"Accept-Encoding": "identity"}):
        line = line.decode() if isinstance(line, bytes) else line
        if line.startswith("data: sse1 "):
            late.append(time.time() * 1000 - int(line.split(" ")[4]) / 1000)
            if len(late) == 16:
                break
print(len(late), statistics.median(late))
"""
