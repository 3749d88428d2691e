"""
From samples to figures: medians with spread, ratios within one run, limits.

A ratio is taken round by round, between neighbours in time, and then its median:
what the machine did in one round divides out.
"""

from collections.abc import Container
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from .scenario import Sample

KIT = "app"


@dataclass(slots=True)
class Figure:
    """
    The median of the samples that count, with their range, and why others do not.
    """

    median: float
    low: float
    high: float
    count: int
    void: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """
        Whether most samples were good; else the figure is void.
        """
        return self.count > len(self.void) and not self.faults and self.count > 0


def make_figure(samples: list[Sample]) -> Figure:
    """
    Sum up the samples of one row and one peer.
    """
    good = [sample for sample in samples if sample.good]
    void = [f"round {sample.round + 1}: {sample.void}" for sample in samples if sample.void]
    faults = [f"round {sample.round + 1}: {fault}" for sample in samples for fault in sample.faults]
    values = [sample.value for sample in good]
    names = sorted({name for sample in good for name in sample.extra})
    extra = {name: median([sample.extra[name] for sample in good if name in sample.extra]) for name in names}
    if not values:
        return Figure(0.0, 0.0, 0.0, 0, void, faults)
    return Figure(median(values), min(values), max(values), len(values), void, faults, extra)


def ratio(above: list[Sample], below: list[Sample]) -> Figure:
    """
    Return the figure of *above* divided by *below*, round by round.
    """
    parts = {sample.round: sample for sample in below}
    samples = []
    for sample in above:
        other = parts.get(sample.round)
        if other is None or not other.value:
            continue
        samples.append(
            Sample(
                sample.value / other.value,
                sample.round,
                sample.void or other.void,
                [*sample.faults, *other.faults],
            )
        )
    return make_figure(samples)


class Verdict(StrEnum):
    """
    What a check says about its limit.
    """

    AIM = "aim met"
    OK = "within limit"
    BROKEN = "LIMIT BROKEN"
    VOID = "VOID"
    UNCHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class Limit:
    """
    One row that a run must show.
    """

    # What --only takes, and what a failed run names.
    row: str
    text: str
    limit: float
    aim: float
    # Samples of (row, peer), divided by those of another when there is one.
    above: tuple[str, str]
    below: tuple[str, str] | None = None
    # Throughput is bounded from below.
    at_least: bool = False
    digits: int = 2
    # What one event costs besides its deliveries weighs five times as much with a
    # fifth of the streams, and a connect of sse-starlette costs 360 µs among 1,000
    # streams, 500 among 5,000: then the limit says nothing.
    full_only: bool = False


LIMITS = (
    Limit(
        "single",
        "CPU per delivery, single events, divided by the C floor's",
        1.3,
        1.05,
        ("single", KIT),
        ("single", "floor"),
        full_only=True,
    ),
    Limit(
        "single",
        "the same, divided by Nchan's",
        0.85,
        0.65,
        ("single", KIT),
        ("single", "nchan"),
        full_only=True,
    ),
    Limit(
        "sparse",
        "CPU per delivery, single events at a low rate, divided by sse-starlette's",
        0.2,
        0.14,
        ("sparse", KIT),
        ("sparse", "sse-starlette"),
        digits=3,
        full_only=True,
    ),
    Limit(
        "burst",
        "deliveries per second, one process, bursts of 10",
        500_000,
        1_000_000,
        ("burst", KIT),
        at_least=True,
        digits=0,
    ),
    Limit(
        "connect",
        "CPU per connect with a token and a lease per stream, divided by without",
        1.4,
        1.2,
        ("connect", "app-auth"),
        ("connect", KIT),
    ),
    Limit("pss", "PSS per idle stream, KB", 8, 4, ("pss", KIT), digits=1),
    Limit(
        "reconnect",
        "CPU of reconnects with missed events, divided by sse-starlette's connects without replay",
        1.5,
        1.0,
        ("reconnect", KIT),
        ("connect", "sse-starlette"),
        full_only=True,
    ),
    Limit(
        "scale",
        "CPU per delivery with ten times the streams (two processes), divided by the same with few",
        1.2,
        1.05,
        ("scale_many", KIT),
        ("scale_few", KIT),
    ),
    Limit(
        "first_token",
        "time to a run's first token, divided by a plain Quart generator's",
        3.0,
        1.5,
        ("first_token", KIT),
        ("first_token", "quart"),
    ),
    Limit(
        "first_token",
        "what that is above the upstream's own, ms",
        20,
        5,
        ("first_token_added", KIT),
    ),
    Limit(
        "churn",
        "memory after all connects and disconnects, divided by after the first tenth",
        1.02,
        1.0,
        ("churn_last", KIT),
        ("churn_first", KIT),
        digits=3,
    ),
)


@dataclass(frozen=True, slots=True)
class Check:
    """
    One limit against this run.
    """

    limit: Limit
    verdict: Verdict
    figure: Figure | None = None
    reason: str = ""


def check(
    limit: Limit, samples: dict[str, dict[str, list[Sample]]], present: Container[str] = (), *, full: bool = True
) -> Check:
    """
    Hold one limit against the samples of a run, which is the *full* one or a quick one.

    A peer that is *present* and yet has no samples has failed, and voids the row.
    """
    sides = [limit.above, *([limit.below] if limit.below else [])]
    for row, peer in sides:
        if not samples.get(row, {}).get(peer):
            verdict = Verdict.VOID if peer in present else Verdict.UNCHECKED
            return Check(limit, verdict, None, f"{peer} was not measured")
    above = samples[limit.above[0]][limit.above[1]]
    figure = ratio(above, samples[limit.below[0]][limit.below[1]]) if limit.below else make_figure(above)
    own_faults = [fault for sample in above for fault in sample.faults]
    if own_faults:
        return Check(limit, Verdict.BROKEN, figure, f"wrong delivery: {'; '.join(own_faults)}")
    if not figure.counts:
        return Check(limit, Verdict.VOID, figure, "; ".join([*figure.void, *figure.faults]) or "no round counts")
    if limit.full_only and not full:
        return Check(limit, Verdict.UNCHECKED, figure, "with fewer streams it says nothing")
    value = figure.median
    within = value >= limit.limit if limit.at_least else value <= limit.limit
    # An aim of exactly 1.0 is met by what rounds to it.
    aim = round(value, limit.digits)
    met = aim >= limit.aim if limit.at_least else aim <= limit.aim
    return Check(limit, Verdict.BROKEN if not within else Verdict.AIM if met else Verdict.OK, figure)
