"""
The load test may be believed: what a server is told to do wrong, it counts exactly.
"""

import subprocess
import sys

from tests.loadtest.runs import PATIENT, ROOT, TOPIC, Run


class TestCounts:
    def test_a_server_without_fault(self, tmp_path, server):
        """All that was published reached all streams, and the run passes."""
        truth = server()

        run = Run(tmp_path, truth.url, PATIENT)

        assert 0 == run.end(), run.output
        assert truth.truth()["published"] == run.figures["published"] > 40
        assert truth.truth()["written"] == run.figures["deliveries"]
        assert [0] * 4 == [run.figures[name] for name in ("lost", "duplicate", "out_of_order", "unfinished")]
        assert run.lines[-1].startswith("passed: ")

    def test_dropped_repeated_and_reordered(self, tmp_path, server):
        """Exact counts: 4 dropped, 2 repeated and 3 reordered events, on each of 8 streams."""
        # Numbers that come when all streams are open; 70 and 71 are a gap of two.
        truth = server(**{TOPIC: {"drop": [52, 60, 70, 71], "repeat": [54, 74], "swap": [56, 62, 66]}})

        run = Run(tmp_path, truth.url, PATIENT, seconds=4)

        assert 1 == run.end(), run.output
        counted = truth.truth()
        assert {"dropped": 32, "repeated": 16, "swapped": 24} == {
            name: counted[name] for name in ("dropped", "repeated", "swapped")
        }
        assert (32, 16, 24) == tuple(run.figures[name] for name in ("lost", "duplicate", "out_of_order"))
        assert "FAILED: lost is 32, must be exactly 0" in run.lines[-1]

    def test_across_reconnects(self, tmp_path, server):
        """What is lost between two connections of one stream is lost; what is replayed is not."""
        loses = server(**{TOPIC: {"cut_at": [120], "lose_on_cut": True}})
        replays = server(**{TOPIC: {"cut_at": [120]}})
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()

        # Back after 0.1 s of `retry:`: with 50 events per second some pass meanwhile.
        lost = Run(tmp_path / "a", loses.url, PATIENT, rate=50)
        kept = Run(tmp_path / "b", replays.url, PATIENT, rate=50)

        assert (1, 0) == (lost.end(), kept.end()), lost.output + kept.output
        assert loses.truth()["missed"] == lost.figures["lost"] > 8
        assert 0 == kept.figures["lost"] == kept.figures["duplicate"]
        assert (8, 8) == (lost.figures["reconnects"], kept.figures["reconnects"])
        assert 8 == kept.result["ended"]["cut"]
        assert 100 <= kept.figures["resume_p50_ms"]

    def test_announced(self, tmp_path, server):
        """What `stream.reset` told of is counted apart: the server kept its word."""
        truth = server(**{TOPIC: {"cut_at": [120], "lose_on_cut": True, "reset": True}})

        run = Run(tmp_path, truth.url, PATIENT, rate=50)

        assert 0 == run.end(), run.output
        assert 0 == run.figures["lost"]
        assert truth.truth()["missed"] == run.figures["announced"] > 8

    def test_the_last_events(self, tmp_path, server):
        """Events that never come at the end are lost, too, though no later number shows it."""
        truth = server(**{TOPIC: {"drop": list(range(55, 10_000))}})

        run = Run(tmp_path, truth.url, PATIENT, "--settle=1")

        assert 1 == run.end(), run.output
        assert truth.truth()["dropped"] == run.figures["lost"] > 0

    def test_soft_failed(self, tmp_path, server):
        """A 200 that is no stream is not an open: it is counted, and the client comes back."""
        truth = server(**{TOPIC: {"fallback": 5}})

        run = Run(tmp_path, truth.url, PATIENT)

        assert 0 == run.end(), run.output
        assert (5, 8, 13) == tuple(run.figures[name] for name in ("soft_failed", "opened", "connects"))


class TestTime:
    def test_delays(self, tmp_path, server):
        """Delays of 50, 200 and 500 ms are recovered, against a control without."""
        faults = {f"loadtest__{at}": {"delay_ms": delay} for at, delay in enumerate((0, 50, 200, 500))}
        measured = {}
        for at, delay in enumerate((0, 50, 200, 500)):
            folder = tmp_path / str(delay)
            folder.mkdir()
            # One topic per run, each with the fault of its delay.
            truth = server(**{TOPIC: faults[f"loadtest__{at}"]})
            measured[delay] = Run(folder, truth.url, PATIENT, seconds=3)

        for delay, run in measured.items():
            assert 0 == run.end(), run.output
            # A machine that is busy adds to all of them, and to the control alike; the
            # median is what it adds least to.
            added = run.figures["delivery_p50_ms"] - measured[0].figures["delivery_p50_ms"]
            assert delay - 25 <= added <= delay + 60, (delay, run.figures["delivery_p50_ms"])

    def test_iter_lines_is_wrong(self, tmp_path, server):
        """Locust's own way says an event is late by what a buffer of 1,024 bytes takes to fill."""
        truth = server()
        script = tmp_path / "iter_lines.py"
        script.write_text(_ITER_LINES)
        run = Run(tmp_path, truth.url, PATIENT, seconds=6, rate=10)
        run.until("hold")

        wrong = subprocess.run(
            [sys.executable, str(script), truth.url], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )

        assert 0 == run.end(), run.output
        assert 0 == wrong.returncode, wrong.stderr
        # The same events of the same run: 250 bytes each, so four of them fill the buffer.
        assert float(wrong.stdout.split()[-1]) > 150, wrong.stdout + wrong.stderr
        assert run.figures["delivery_p50_ms"] < 60

    def test_saturated(self, tmp_path, server):
        """A generator that can't keep up is void, whatever it measured."""
        # 20,000 events of a few bytes cost the server one write, and the generator its core.
        truth = server(**{TOPIC: {"flood": 20_000}})

        run = Run(tmp_path, truth.url, "--thresholds=lag_p99_ms<=50,delivery_p99_ms<=60000", "--settle=1", seconds=2)

        assert 1 == run.end(), run.output
        assert run.lines[-1].startswith("VOID, the generator could not keep up: "), run.output
        assert "void" == run.result["verdict"]


_ITER_LINES = """
import statistics, sys, time
from locust.contrib.fasthttp import FastHttpSession
from locust import events
import gevent

session = FastHttpSession(sys.argv[1], events.request, None)
late = []
with gevent.Timeout(3, False):
    for line in session.iter_lines("/events?topic=loadtest%2F0", headers={"Accept-Encoding": "identity"}):
        line = line.decode() if isinstance(line, bytes) else line
        if line.startswith("data: sse1 "):
            late.append(time.time() * 1000 - int(line.split(" ")[4]) / 1000)
print(len(late), statistics.median(late))
"""
