"""
The reader of runs may be believed: what a server does wrong with tokens, it counts exactly.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from app.parser import ServerSentEvent
from loadtest.generator import Generator
from loadtest.options import OPTIONS
from loadtest.runs import RunStream
from loadtest.scenario import load_scenarios
from loadtest.sse_client import Target
from tests.loadtest.runs import BUSY, Run, Truth, all_at_once, wrong_with_runs

READERS = """
users = { run = 1 }
run_every = 1.0
run_words = 20
"""
# Per run; a word of the prompt by its number.
FAULTS = {
    # A connection that breaks in the middle of each run.
    "none": {"cut_at": [9]},
    "faults": {"drop": [0, 7, 19], "drop_own": -1, "repeat": [3], "again": [5], "swap": [11], "cut_at": [15],
               "lose_on_cut": True},
    "late": {"first_ms": 600, "model": "somebody's"},
    "fails": {"fail": 10},
    "no end": {"no_end": 10},
    "refuses": {"refuse_after": 3},
}  # fmt: skip


@pytest.fixture(scope="class")
def runs(tmp_path_factory) -> Iterator[dict[str, tuple[Run, Truth]]]:
    """One run of the load test for each fault."""
    thresholds = f"{BUSY},opened_percent>=0,tokens_lost==0,tokens_duplicate==0,runs_done>=1"

    def start(name: str) -> tuple[Run, Truth]:
        truth = Truth({"runs": FAULTS[name]})
        folder = tmp_path_factory.mktemp("run")
        return Run(folder, truth.url, thresholds, "--settle=5", rate=0, scenario=READERS), truth

    with all_at_once(FAULTS, start) as found:
        yield found


class TestCounts:
    def test_a_server_without_fault(self, runs):
        """Every run came to its end, every word came once, across a reconnect in each run."""
        run, truth = runs["none"]

        assert 0 == run.code, run.output
        told, figures = truth.truth(), run.figures
        assert told["runs"] == told["runs_cut"] == figures["runs"] == figures["runs_done"] == figures["reconnects"] > 8
        assert 22 * told["runs"] == figures["tokens"] == figures["deliveries"]
        assert {} == wrong_with_runs(run)
        # `retry:` is 0.1 s.
        assert figures["resume_p50_ms"] >= 100
        # The ends of the last ones may not have been read when the figures were gathered.
        assert told["runs"] - 8 <= run.result["ended"]["run_ended"] <= told["runs"]

    def test_lost_doubled_and_reordered(self, runs):
        """Exact counts, for words of the answer's own, too, and the last one of all."""
        run, truth = runs["faults"]
        told, figures = truth.truth(), run.figures

        assert (5, 2, 1) == tuple(told[f"words_{what}"] // told["runs"] for what in ("dropped", "repeated", "swapped"))
        assert told["words_dropped"] == figures["tokens_lost"]
        assert told["words_repeated"] == figures["tokens_duplicate"]
        assert told["words_swapped"] == figures["tokens_out_of_order"]
        assert 1 == run.code
        assert f"FAILED: tokens_lost is {told['words_dropped']}, must be exactly 0" in run.lines[-1]

    def test_late(self, runs):
        """A first token that is 600 ms late, against a control; of another model's words, losses can't be told."""
        run, _ = runs["late"]
        added = run.figures["first_token_p50_ms"] - runs["none"][0].figures["first_token_p50_ms"]

        # What a busy machine adds, it adds to both, and not alike.
        assert 400 <= added <= 1500
        assert run.figures["runs_done"] == run.figures["runs_unjudged"] > 8

    def test_failed(self, runs):
        """`run.failed` is an end, and no success; its reason is told."""
        run, truth = runs["fails"]

        assert 1 == run.code
        assert "runs_done is 0, must be at least 1" in run.lines[-1]
        assert truth.truth()["runs"] == run.figures["runs_failed"] == run.result["run_failed"]["upstream_broken"]
        assert 0 == run.figures["runs_unended"]

    def test_never_ended(self, runs):
        """A run that falls silent is one without end, not one that is merely not over yet."""
        run, truth = runs["no end"]

        assert 8 == truth.truth()["runs"] == run.figures["runs"] == run.figures["runs_unended"]

    def test_refused(self, runs):
        """Runs that the server does not start are told, and their readers try again when the next is due."""
        run, _ = runs["refuses"]

        assert 3 == run.figures["runs"] == run.figures["runs_done"]
        assert run.figures["runs_refused"] == run.result["refused"]["429"] > 8
        assert 0 == run.figures["gave_up"]

    def test_report(self, runs):
        """The report and the last lines have what a run reader saw."""
        run, _ = runs["none"]
        page = (run.folder / "results/report.html").read_text()

        assert "Time to the first token of runs" in page
        assert any(line.startswith("  runs ") and " done, 0 failed, 0 refused, " in line for line in run.lines)
        assert any(line.startswith("  first token ") for line in run.lines)


class TestTimes:
    def test_to_the_first_and_between(self, monkeypatch):
        """From the plan to the first token; between reads of one connection, not across two."""
        now = 100.0
        monkeypatch.setattr("loadtest.runs.time", SimpleNamespace(monotonic=lambda: now))
        options = SimpleNamespace(**{o.flag.removeprefix("--").replace("-", "_"): o.default for o in OPTIONS})
        generator = Generator(load_scenarios()["runs"], options, Target("http://127.0.0.1:1"), streams=1, run="r")  # type: ignore[arg-type]
        stream = RunStream(generator, 0, due=99.5)

        def heard(at: float, *words: str) -> None:
            nonlocal now
            now = at
            stream.take([ServerSentEvent(event="run.token", data=f'{{"text": "{word}"}}', id=word) for word in words])

        stream.opened(0.1, '{"topics": ["run:abc"]}')
        heard(100.25, "#0")
        heard(101.25, "#1")
        stream.ended(clean=False)
        stream.opened(0.1, '{"topics": ["run:abc"]}')
        heard(109.25, "#2")
        heard(109.75, "#3")

        times = generator.measures.times
        assert (1, 750) == (times["first_token"].total_count, times["first_token"].max_value // 1000)
        assert (2, 500, 1000) == (
            times["between_tokens"].total_count,
            times["between_tokens"].min_value // 1000,
            times["between_tokens"].max_value // 1000,
        )
        assert ("GET", "/runs/abc/events?user=lt-r-0") == stream.request()[:2]
