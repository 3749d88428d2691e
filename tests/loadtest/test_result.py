"""The verdict says what decided it; the page needs nothing from outside."""

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.compare import compare
from loadtest.measures import Collected, Measures
from loadtest.page import MOST_POINTS, page, thinned
from loadtest.result import FIGURES, Result, judge, verdict_line
from loadtest.scenario import Threshold, load_scenarios, load_thresholds

ROOT = Path(__file__).parents[2]


def collected(lost: int = 0, lag: float = 0.001, delivery: float = 0.01, seconds: int = 5) -> Collected:
    found = Collected()
    for second in range(seconds):
        measures = Measures()
        measures.open = 10
        measures.counts.lost = lost if second == 2 else 0
        measures.tally.update({"deliveries": 100, "connects": 10, "opened": 10, "ended:draining": 1, "refused:429": 2})
        measures.took("delivery", delivery)
        measures.took("open", delivery)
        measures.took("lag", lag)
        found.add("a", measures.hand_over() | {"at": 1000.0 + second, "seconds": 1.0, "cpu_percent": 10.0})
    found.end()
    return found


def judged(found: Collected, thresholds: list[Threshold] | None = None, **more) -> Result:
    scenario = more.pop("scenario", load_scenarios()["average-load"])
    if thresholds is None:
        thresholds = load_thresholds("average-load", [], FIGURES)
    began = datetime(2026, 11, 21, 12, tzinfo=UTC)
    options = {"target": "http://x", "streams": 10, "workers": 1, "began": began, "seconds": 5.0, "held": 4.0} | more
    return judge(found, thresholds, scenario=scenario, **options)


class TestVerdict:
    def test_passed(self):
        result = judged(collected())

        assert (0, "passed") == (result.exit_code, result.verdict)
        assert re.fullmatch(r"passed: (\d+) of \1 thresholds hold", verdict_line(result))

    def test_failed_names_figure_and_bound(self):
        result = judged(collected(lost=3, delivery=2.0))

        assert 1 == result.exit_code
        line = verdict_line(result)
        assert "FAILED: lost is 3, must be exactly 0; delivery_p99_ms is 2,000, must be at most 1000" == line

    def test_void_counts_more(self):
        """A generator that was late proves neither failure nor success."""
        result = judged(collected(lost=3, lag=5.0))

        assert (1, "void") == (result.exit_code, result.verdict)
        assert verdict_line(result).startswith("VOID, because of the generator: lag_p99_ms is 5,000, must")

    def test_a_process_that_is_missing(self):
        """Figures of a process that died are not there: what the others have proves nothing."""
        result = judged(collected(), workers=2, workers_missing=1)

        assert (1, "void") == (result.exit_code, result.verdict)
        assert "1 of 2 generator processes did not hand over" in verdict_line(result)

    def test_nothing_was_read(self):
        result = judged(Collected(), [])

        assert 1 == result.exit_code
        assert "deliveries is 0" in verdict_line(result)

    def test_nothing_was_measured(self):
        """A threshold of the scenario's own is not kept by what never happened; one of [all] may be."""
        storm = load_thresholds("reconnect-storm", [], FIGURES)
        result = judged(collected(), storm)

        assert (1, "failed") == (result.exit_code, result.verdict)
        assert "resume_p99_ms was not measured, must be at most 15000" in result.failed
        assert 0 == judged(collected()).exit_code  # nor was publish_delay_p99_ms

    def test_a_generator_that_was_not_measured(self):
        found = collected()
        found.times["lag"].reset()

        assert "VOID, because of the generator: lag_p99_ms was not measured" in verdict_line(judged(found))

    def test_limit_of_nothing(self):
        """Where no event was ever read, no limit was found."""
        found, more = Collected(), {"stopped": "limit at 5 streams: 5 streams refused", "exit_code": 0}
        scenario = load_scenarios()["breakpoint"]

        assert 1 == judged(found, [], scenario=scenario, **more).exit_code
        assert 0 == judged(collected(), [], scenario=scenario, **more).exit_code

    def test_processes_changed(self):
        """A process that died, or that came meanwhile, makes the run void and ends it."""
        result = judged(
            collected(),
            stopped="1 of 2 generator processes dead or silent",
            void_because="1 of 2 generator processes dead or silent",
        )

        assert (1, "void") == (result.exit_code, result.verdict)
        assert "VOID, because of the generator: 1 of 2 generator processes dead or silent" == verdict_line(result)

    def test_interrupted(self):
        result = judged(collected(), stopped="interrupted", exit_code=130)

        assert (130, "interrupted: the results so far are kept") == (result.exit_code, verdict_line(result))


class TestFile:
    def test_read_again(self, tmp_path):
        result = judged(collected())
        result.write(tmp_path / "result.json")

        assert result == Result.read(tmp_path / "result.json")

    @pytest.mark.parametrize("text", ["{", "[]", '{"version": 99}', '{"version": 1}'])
    def test_not_ours(self, tmp_path, text):
        (tmp_path / "result.json").write_text(text)

        with pytest.raises(ValueError, match=r"must be a result\.json of the load test"):
            Result.read(tmp_path / "result.json")


class TestPage:
    def test_is_whole(self):
        """One file: nothing is fetched, and every tag that must be closed is."""
        text = page(judged(collected(), parts=[], stopped=""))

        class Reader(HTMLParser):
            def __init__(self):
                super().__init__()
                self.found = []
                self.svgs = 0

            def handle_starttag(self, tag, attributes):
                self.found.append((tag, dict(attributes)))
                self.svgs += tag == "svg"

            def handle_endtag(self, tag):
                self.svgs -= tag == "svg"

        reader = Reader()
        reader.feed(text)
        tags = [tag for tag, _ in reader.found]

        assert {"script", "link", "img", "iframe"}.isdisjoint(tags)
        assert not [attributes for _, attributes in reader.found if {"src", "href"} & attributes.keys()]
        assert "url(" not in text
        assert "@import" not in text
        assert (0, 6) == (reader.svgs, tags.count("svg"))

    def test_says_what_matters(self):
        text = page(judged(collected(lost=3)))

        assert "FAILED: lost is 3" in text
        for name in FIGURES:
            assert f"<td>{name}<" in text

    def test_what_was_not_measured(self):
        """It is not called kept, and has no empty chart."""
        found = collected()
        for point in found.timeline:
            point.update(p50_ms=None, p99_ms=None, max_ms=None)
        text = page(judged(found))

        assert "<td>publish_delay_p99_ms &lt;= 1000<td>-<td>not measured" in text
        assert "Delivery latency over time" in page(judged(collected()))
        assert "Delivery latency over time" not in text

    def test_names_are_escaped(self):
        assert "<b>" not in page(judged(collected(), target="http://x/<b>"))

    def test_thinned_keeps_the_worst(self):
        """An hour has more seconds than a chart has pixels; its peaks stay."""
        points = [{"at": at, "open": 1 if at == 777 else 5, "p99_ms": 99 if at == 1234 else None} for at in range(3600)]

        few = thinned(points)

        assert len(few) <= MOST_POINTS
        assert 99 == max(point["p99_ms"] for point in few if point["p99_ms"] is not None)
        assert 1 == min(point["open"] for point in few)


class TestCompare:
    def test_better_and_worse(self):
        text = compare(judged(collected()), judged(collected(lost=4, delivery=0.02)))

        assert re.search(r"(?m)^lost +0 +4 +new  worse$", text)
        assert re.search(r"(?m)^delivery_p50_ms +\S+ +\S+ +\+[0-9.]+%  worse$", text)
        assert not re.search(r"(?m)^deliveries .*(worse|better)", text)

    def test_unlike(self):
        assert "Not alike: workers is 1 in A and 2 in B." in compare(
            judged(collected()), judged(collected(), workers=2)
        )

    def test_of_different_length(self):
        """Five times as many deliveries in five times the time are no better."""
        assert "Not alike: seconds is 5 in A and 25 in B; so are all counts." in compare(
            judged(collected()), judged(collected(), seconds=25.0)
        )

    def test_command(self, tmp_path, capsys):
        """Files or their folders."""
        judged(collected()).write(tmp_path / "result.json")

        assert 0 == main(["compare", str(tmp_path), str(tmp_path / "result.json")])
        assert capsys.readouterr().out.startswith("A  average-load, http://x")
        assert 2 == main(["compare", str(tmp_path / "nowhere"), str(tmp_path)])
        assert "nowhere must be a result.json" in capsys.readouterr().err
        assert 2 == main(["compare", "", ""])
        assert "A and B must be two results" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [["compare", "a.json", "a.json"], ["compare", "--help"]])
    def test_a_reader_that_has_enough(self, tmp_path, arguments):
        """`| head` ends it without a complaint."""
        judged(collected()).write(tmp_path / "a.json")
        out, into = os.pipe()
        os.close(out)

        # Unbuffered, argparse hears of it by itself.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
        done = subprocess.run(
            [sys.executable, "-m", "loadtest", *arguments], cwd=tmp_path, env=environment,
            stdout=into, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip

        os.close(into)
        assert (0, "") == (done.returncode, done.stderr)

    def test_result_is_plain_json(self, tmp_path):
        judged(collected()).write(tmp_path / "result.json")

        assert FIGURES.keys() == json.loads((tmp_path / "result.json").read_text())["figures"].keys()
