"""
What a run showed: its figures, whether they keep their bounds, and the verdict.
"""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from loadtest.measures import PERCENTILES, TIMES, Collected, milliseconds
from loadtest.scenario import Scenario, Threshold

VERSION = 1

_WHAT = {
    "head": "from the connect to the answer's head",
    "open": "from the connect to `stream.open`",
    "delivery": "from the publish to the read of an event",
    "resume": "from the loss of a stream to its next `stream.open`",
    "publish": "a publish that was acknowledged, repeats included",
    "publish_delay": "how late a publish was sent, by the plan",
    "first_token": "from a run's planned start to the read of its first token",
    "between_tokens": "from one read of a run's tokens to the next, on one connection",
    "lag": "how late this generator's own timers fire",
}
# Every figure of a run, and what it means.
FIGURES: dict[str, str] = {
    "streams": "streams that were wanted",
    "streams_most": "most streams open in one moment",
    "opened_percent": "streams_most of streams",
    "connects": "connects that were begun",
    "connects_per_second_max": "most connects in one second",
    "opened": "times that `stream.open` was read",
    "reconnects": "connects of streams that had been open",
    "soft_failed": "opens told to come back later: 200 without a stream, or X-Sse-Fallback",
    "refused": "answers that are not 200, which make a browser give up",
    "gave_up": "streams that a browser would have given up for ever",
    "broken": "connects that failed, or broke before an answer",
    "deliveries": "events that were read",
    "deliveries_per_second": "deliveries in an average second of the run",
    "deliveries_per_second_max": "deliveries in its fullest second",
    "lost": "events that never came, by their numbers, across reconnects",
    "announced": "events that never came, after `stream.reset` said so",
    "duplicate": "events that came again",
    "out_of_order": "events that came after later ones",
    "unfinished": "streams that were not back at the end, and still owed events",
    "resets": "`stream.reset` that were read",
    "most_per_user": "most streams that one user had open, each for half a second at least",
    "published": "events that were acknowledged",
    "publish_repeated": "publishes that were sent again with the same key",
    "publish_failed": "events that were given up or refused",
    "runs": "runs that were started",
    "runs_done": "runs whose `run.done` was read",
    "runs_failed": "runs whose `run.failed` was read",
    "runs_refused": "runs that the server did not start",
    "runs_unended": "runs whose end never came, though there was time enough",
    "runs_skipped": "planned starts for which the reader's run before left no time",
    "runs_unjudged": "runs of a model that does not repeat its prompt: of their tokens, losses can't be told",
    "tokens": "words of runs that were read",
    "tokens_lost": "words of runs that never came, by their numbers, across reconnects",
    "tokens_duplicate": "words of runs that came again",
    "tokens_out_of_order": "words of runs that came after later ones",
    "other_clock": "deliveries published on another machine: counted, but without a latency",
    "cpu_percent": "CPU of the busiest generator process, percent of a core, on average",
    "generator_errors": "connects that failed because the generator ran out of descriptors or ports",
    **{
        f"{name}_{percentile}_ms": f"{percentile.replace('_', '.')}: {_WHAT[name]}"
        for name in TIMES
        for percentile, _ in PERCENTILES
    },
}


_STREAMS = "  streams       {streams_most} of {streams} open, {connects} connects, at most {connects_per_second_max}/s"
_DELIVERIES = "  deliveries    {deliveries}, {deliveries_per_second}/s, at most {deliveries_per_second_max}/s"
_LOST = (
    "  lost {lost}, duplicate {duplicate}, out of order {out_of_order}, announced {announced}, unfinished {unfinished}"
)
_RUNS = (
    "  runs          {runs} started, {runs_done} done, {runs_failed} failed, {runs_refused} refused, "
    "{runs_unended} without end, {runs_skipped} skipped"
)
_TOKENS = (
    "  tokens        {tokens}: lost {tokens_lost}, duplicate {tokens_duplicate}, out of order {tokens_out_of_order}"
)


@dataclass(slots=True)
class Result:
    """
    One run. `result.json` holds exactly this.

    Attributes:
        verdict: passed, failed, void or interrupted.
        failed: The thresholds that did not hold, with figure and bound.
    """

    version: int
    scenario: str
    about: str
    target: str
    began: str
    seconds: float
    held_seconds: float
    workers: int
    machine: str
    figures: dict[str, float | None]
    refused: dict[str, int]
    broken: dict[str, int]
    ended: dict[str, int]
    publish_refused: dict[str, int]
    thresholds: list[dict[str, Any]]
    failed: list[str]
    verdict: str
    stopped: str
    exit_code: int
    steps: list[dict[str, Any]]
    parts: list[dict[str, Any]]
    timeline: list[dict[str, Any]]
    histograms: dict[str, list[list[float]]]
    run_failed: dict[str, int] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the result as JSON."""
        # Whole or not at all, on a full disk.
        unfinished = path.with_suffix(".part")
        try:
            unfinished.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> "Result":
        """
        Return the result in a file.

        Raises:
            ValueError: it is none of ours; the text says which file and why.
        """
        try:
            fields = json.loads(path.read_text())
            if fields["version"] != VERSION:
                raise ValueError(f"version {fields['version']}, this is for {VERSION}")
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must be a result.json of the load test: {error}") from None

    def as_text(self) -> str:
        """Return the result as lines for a terminal."""
        value = self.figures
        processes = "1 process" if self.workers == 1 else f"{self.workers} processes"
        shown = {name: _n(number) for name, number in value.items()}
        lines = [
            f"{self.scenario} against {self.target}, {processes}, {self.seconds:.0f} s",
            _STREAMS.format_map(shown),
            _DELIVERIES.format_map(shown),
            _LOST.format_map(shown),
        ]
        if value["runs"] or value["runs_refused"]:
            lines += [_RUNS.format_map(shown), _TOKENS.format_map(shown)]
        for name in TIMES:
            if value[f"{name}_max_ms"] is not None:
                percentiles = "  ".join(
                    f"{percentile.replace('_', '.')} {_n(value[f'{name}_{percentile}_ms'])}"
                    for percentile, _ in PERCENTILES
                )
                lines.append(f"  {name.replace('_', ' '):<14} {percentiles} ms")
        for name, counts in (
            ("refused", self.refused),
            ("broken", self.broken),
            ("ended", self.ended),
            ("publish refused", self.publish_refused),
            ("run failed", self.run_failed),
        ):
            if counts:
                lines.append(
                    f"  {name:<13} " + ", ".join(f"{what} {count:,}" for what, count in sorted(counts.items()))
                )
        lines.append(
            f"  soft-failed {_n(value['soft_failed'])}, reconnects {_n(value['reconnects'])}, "
            f"gave up {_n(value['gave_up'])}, generator's CPU {_n(value['cpu_percent'])} %"
        )
        for row in self.parts:
            cpu = "" if row["cpu_percent"] is None else f"CPU {row['cpu_percent']:g} %, "
            lines.append(
                f"  {row['part']:<13} {cpu}{row['memory_mb']:,.0f} MB"
                + (f", {row['kb_per_stream']:g} KB a stream" if row["kb_per_stream"] is not None else "")
            )
        return "\n".join(lines)


def _n(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.3g}"


def _split(tally: dict[str, int], kind: str) -> dict[str, int]:
    return {name.partition(":")[2]: count for name, count in tally.items() if name.startswith(f"{kind}:") and count}


def figures(collected: Collected, streams: int, seconds: float) -> dict[str, float | None]:
    """Return every figure of FIGURES."""
    tally, counts = collected.tally, collected.counts
    found: dict[str, float | None] = {
        "streams": streams,
        "streams_most": collected.most_open,
        "opened_percent": round(100 * collected.most_open / streams, 3) if streams else 0,
        "connects_per_second_max": collected.most_per_second["connects"],
        "deliveries_per_second": round(tally["deliveries"] / max(seconds, 1e-9), 1),
        "deliveries_per_second_max": collected.most_per_second["deliveries"],
        "refused": sum(_split(tally, "refused").values()),
        "broken": sum(_split(tally, "broken").values()),
        "lost": counts.lost,
        "announced": counts.announced,
        "duplicate": counts.duplicate,
        "out_of_order": counts.out_of_order,
        "most_per_user": collected.most_per_user,
        "cpu_percent": round(
            max((sum(percents) / len(percents) for percents in collected.cpu_by_worker.values()), default=0.0), 1
        ),
    }
    for name in FIGURES:
        if name not in found and not name.endswith("_ms"):
            found[name] = tally[name]
    for name in TIMES:
        for percentile, number in PERCENTILES:
            found[f"{name}_{percentile}_ms"] = milliseconds(collected.times[name], number)
    return {name: found[name] for name in FIGURES}


def judge(
    collected: Collected,
    thresholds: list[Threshold],
    *,
    scenario: Scenario,
    target: str,
    streams: int,
    workers: int,
    began: datetime,
    seconds: float,
    held: float,
    stopped: str = "",
    exit_code: int | None = None,
    workers_missing: int = 0,
    void_because: str = "",
    steps: list[dict[str, Any]] | None = None,
    parts: list[dict[str, Any]] | None = None,
) -> Result:
    """Return the result of a run: figures against thresholds."""
    wanted = streams
    if scenario.stop_at_limit and steps:
        # Up to the limit: what was wanted beyond it was never asked for.
        wanted = max(int(step["streams"]) for step in steps)
    found = figures(collected, wanted, seconds)
    rows, failed, void = [], [], []
    for threshold in thresholds:
        value = found[threshold.figure]
        holds = threshold.holds(value)
        rows.append({"threshold": str(threshold), "value": value, "holds": holds, "void": threshold.void})
        if not holds:
            is_ = "was not measured" if value is None else f"is {_n(value)}"
            (void if threshold.void else failed).append(f"{threshold.figure} {is_}, must be {_bound(threshold)}")
    if void_because:
        void.insert(0, void_because)
    elif workers_missing:
        void.insert(0, f"{workers_missing} of {workers} generator processes did not hand over their figures")
    if not collected.tally["deliveries"] and not failed and (not stopped or exit_code == 0):
        failed.append("deliveries is 0: no event was read, so nothing was shown")
    if stopped and exit_code is None and stopped != void_because:
        failed.insert(0, stopped)
    if exit_code == 0 and scenario.stop_at_limit and stopped.startswith("limit ") and collected.tally["deliveries"]:
        # The step that broke its thresholds is what was looked for.
        verdict, code, failed = "passed", 0, []
    elif exit_code:
        verdict, code = "interrupted", exit_code
    elif void:
        verdict, code, failed = "void", 1, void + failed
    elif failed:
        verdict, code = "failed", 1
    else:
        verdict, code = "passed", 0
    tally = collected.tally
    return Result(
        version=VERSION,
        scenario=scenario.name,
        about=scenario.about,
        target=target,
        began=began.isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        held_seconds=round(held, 1),
        workers=workers,
        machine=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        figures=found,
        refused=_split(tally, "refused"),
        broken=_split(tally, "broken"),
        ended=_split(tally, "ended"),
        publish_refused=_split(tally, "publish_refused"),
        run_failed=_split(tally, "run_failed"),
        thresholds=rows,
        failed=failed,
        verdict=verdict,
        stopped=stopped,
        exit_code=code,
        steps=steps or [],
        parts=parts or [],
        timeline=collected.timeline,
        histograms={name: _curve(collected, name) for name in TIMES if collected.times[name].total_count},
    )


def _bound(threshold: Threshold) -> str:
    words = {"<=": "at most", ">=": "at least", "<": "below", ">": "above", "==": "exactly"}
    return f"{words[threshold.sign]} {threshold.bound:g}"


def _curve(collected: Collected, name: str) -> list[list[float]]:
    """Return (percentile, ms) pairs that draw the whole distribution."""
    steps = [0, 10, 25, 50, 75, 90, 95, 97.5, 99, 99.5, 99.9, 99.95, 99.99, 100]
    pairs = [(step, milliseconds(collected.times[name], step)) for step in steps]
    return [[step, value] for step, value in pairs if value is not None and math.isfinite(value)]


def verdict_line(result: Result) -> str:
    """Return the last line of a run: its verdict, and what decided it."""
    match result.verdict:
        case "passed":
            kept = sum(row["holds"] for row in result.thresholds)
            if result.stopped:
                return f"passed: {result.stopped}"
            return f"passed: {kept} of {len(result.thresholds)} thresholds hold"
        case "interrupted":
            failed = f"; until then {result.failed[0]}" if result.failed else ""
            return f"{result.stopped or 'interrupted'}: the results so far are kept{failed}"
        case "void":
            return f"VOID, because of the generator: {'; '.join(result.failed)}"
    return f"FAILED: {'; '.join(result.failed)}"
