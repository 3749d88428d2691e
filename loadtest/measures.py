"""
What one generator process measures, and how the figures of all of them become one.

Latencies go into HDR histograms: their buckets add up exactly, whereas percentiles of
several processes can't be averaged. Every second a process hands over what was new.
http://hdrhistogram.org/
"""

import time
from collections import Counter
from typing import Any

from hdrh.histogram import HdrHistogram

from loadtest.sequence import MICROSECONDS, Counts

# 1 µs to 1 h, three significant digits: 190 KB each, 0.7 µs to record.
LOWEST, HIGHEST, DIGITS = 1, 3600 * MICROSECONDS, 3
PERCENTILES = (("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99_9", 99.9), ("max", 100.0))
# Everything that is measured in time.
TIMES = (
    "head", "open", "delivery", "resume", "publish", "publish_delay", "first_token", "between_tokens", "lag",
)  # fmt: skip


def histogram() -> HdrHistogram:
    """Return an empty histogram of microseconds."""
    return HdrHistogram(LOWEST, HIGHEST, DIGITS)


def milliseconds(values: HdrHistogram, percentile: float) -> float | None:
    """Return a percentile in ms; None of an empty histogram."""
    if not values.total_count:
        return None
    # The maximum is kept exactly, beside the buckets.
    value = values.max_value if percentile == 100 else min(values.get_value_at_percentile(percentile), values.max_value)
    return round(value / 1000, 3)


def merge(into: HdrHistogram, other: HdrHistogram) -> None:
    """Add *other*, and keep the maximum exactly; `add` alone rounds it up to its bucket."""
    highest = max(into.max_value, other.max_value)
    into.add(other)
    into.max_value = highest


class Measures:
    """
    The figures of this process since they were last handed over.

    Attributes:
        counts: What was lost, doubled or in a wrong order.
        tally: Everything that is counted, by name; `ended:draining` is one of `ended`.
        times: A histogram for each of TIMES.
        open: Streams that are open now.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self.tally: Counter[str] = Counter()
        self.times = {name: histogram() for name in TIMES}
        self.open = 0
        self.most_per_user = 0
        self._handed = Counts()
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def took(self, name: str, seconds: float) -> None:
        """Record one duration."""
        self.times[name].record_value(min(HIGHEST, max(1, int(seconds * MICROSECONDS))))

    def took_late(self, name: str, seconds: float, every: float) -> None:
        """
        Record how late something is that is due *every* so many seconds.

        One that holds up its successors counts for them, too: else a process that stood
        still for 5 s would be late once, and a percentile would not show it.
        """
        value = min(HIGHEST, max(1, int(seconds * MICROSECONDS)))
        self.times[name].record_corrected_value(value, max(1, int(every * MICROSECONDS)))

    def hand_over(self) -> dict[str, Any]:
        """Return what is new since the last call, as plain data, and begin anew."""
        wall, cpu = time.monotonic(), time.process_time()
        counts = {
            name: getattr(self.counts, name) - getattr(self._handed, name) for name in Counts.__dataclass_fields__
        }
        report = {
            "at": time.time(),
            "seconds": wall - self._wall,
            "cpu_percent": 100 * (cpu - self._cpu) / max(1e-9, wall - self._wall),
            "open": self.open,
            "most_per_user": self.most_per_user,
            "counts": counts,
            "tally": dict(self.tally),
            "times": {name: values.encode().decode() for name, values in self.times.items() if values.total_count},
            "extremes": {
                name: [values.min_value, values.max_value] for name, values in self.times.items() if values.total_count
            },
        }
        self._handed = Counts(**{name: getattr(self.counts, name) for name in Counts.__dataclass_fields__})
        self.tally.clear()
        # A new one is 30 times faster than `reset`, which walks over all buckets.
        self.times = {name: histogram() if values.total_count else values for name, values in self.times.items()}
        self._wall, self._cpu = wall, cpu
        return report


class Second:
    """What all processes reported for one second."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.delivery = histogram()
        self.first_token: HdrHistogram | None = None
        self.tally: Counter[str] = Counter()
        self.open: dict[str, int] = {}
        self.cpu: dict[str, float] = {}
        self.lag_us = 0

    def point(self, workers_open: dict[str, int]) -> dict[str, Any]:
        """Return the second as a point of the charts."""
        return {
            "at": self.at,
            "open": sum((workers_open | self.open).values()),
            # Not those in the histogram: of some there is no latency.
            "deliveries": self.tally["deliveries"],
            "p50_ms": milliseconds(self.delivery, 50),
            "p99_ms": milliseconds(self.delivery, 99),
            "max_ms": milliseconds(self.delivery, 100),
            "first_token_p99_ms": milliseconds(self.first_token, 99) if self.first_token else None,
            "connects": self.tally["connects"],
            "opened": self.tally["opened"],
            "reconnects": self.tally["reconnects"],
            "lag_ms": round(self.lag_us / 1000, 3),
            "cpu_percent": round(max(self.cpu.values(), default=0), 1),
        }


class Collected:
    """
    The figures of all processes, merged.

    Attributes:
        timeline: One point per second, oldest first.
        most_per_second: Most connects and deliveries in one second.
    """

    # A report may be late by this much before its second is closed.
    LATE_SECONDS = 4

    def __init__(self) -> None:
        self.counts = Counts()
        self.tally: Counter[str] = Counter()
        self.times = {name: histogram() for name in TIMES}
        self.timeline: list[dict[str, Any]] = []
        self.most_open = 0
        self.most_per_user = 0
        self.open_by_worker: dict[str, int] = {}
        self.cpu_by_worker: dict[str, list[float]] = {}
        self._seconds: dict[int, Second] = {}
        self._closed_until = 0
        self.most_per_second = {"connects": 0, "deliveries": 0}
        self._rates: dict[str, dict[str, float]] = {name: {} for name in self.most_per_second}
        self._reports_before: dict[str, int] = {}
        self._per_user: dict[str, int] = {}
        self._open_then: dict[str, int] = {}
        self._step: tuple[HdrHistogram, HdrHistogram] | None = None

    @property
    def open(self) -> int:
        """Streams that are open now."""
        return sum(self.open_by_worker.values())

    def add(self, worker: str, report: dict[str, Any]) -> None:
        """Merge what one process handed over."""
        for name, count in report["counts"].items():
            setattr(self.counts, name, getattr(self.counts, name) + count)
        self.tally.update(report["tally"])
        self.open_by_worker[worker] = report["open"]
        self.most_open = max(self.most_open, self.open)
        self._per_user[worker] = report["most_per_user"]
        # One user's streams are in one process, but for a user that all of them share.
        one = sum(self._per_user.values()) if report.get("shared_user") else report["most_per_user"]
        self.most_per_user = max(self.most_per_user, one)
        # Bits of time at the end of a run say nothing of the load.
        if report["seconds"] > 0.5:
            self.cpu_by_worker.setdefault(worker, []).append(report["cpu_percent"])
        self._spread(report)
        for name, rates in self._rates.items():
            # Not from the seconds of the timeline: a burst is in one report of each process, but perhaps in two seconds.
            rates[worker] = report["tally"].get(name, 0) / max(1.0, report["seconds"])
            self.most_per_second[name] = max(self.most_per_second[name], round(sum(rates.values())))
        second = self._second(int(report["at"]))
        second.open[worker] = report["open"]
        second.cpu[worker] = max(second.cpu.get(worker, 0), report["cpu_percent"])
        for name, encoded in report["times"].items():
            values = HdrHistogram.decode(encoded)
            # Decoding knows the buckets only; the extremes are kept exactly.
            values.min_value, values.max_value = report["extremes"][name]
            merge(self.times[name], values)
            if name == "delivery":
                merge(second.delivery, values)
            if name == "first_token":
                second.first_token = second.first_token or histogram()
                merge(second.first_token, values)
            if name == "lag":
                second.lag_us = max(second.lag_us, values.max_value)
            if self._step and name in ("delivery", "lag"):
                merge(self._step[name == "lag"], values)
        self._close(int(report["at"]) - self.LATE_SECONDS)

    def _spread(self, report: dict[str, Any]) -> None:
        """Give each second its share of what was counted: a report is of more or less than one, and not of whole ones."""
        end = report["at"]
        begin = min(end - report["seconds"], end - 1e-6)
        given: Counter[str] = Counter()
        for at in range(int(begin), int(end) + 1):
            share = (min(end, at + 1) - begin) / (end - begin)
            until = {name: round(count * share) for name, count in report["tally"].items()}
            self._second(at).tally.update({name: count - given[name] for name, count in until.items()})
            given.update({name: count - given[name] for name, count in until.items()})

    def begin_step(self) -> None:
        """Begin to keep delivery and lag apart, for a step of `breakpoint`."""
        self._step = (histogram(), histogram())
        self._reports_before = {worker: len(percents) for worker, percents in self.cpu_by_worker.items()}

    def step(self) -> dict[str, float | None]:
        """Return p99 of delivery and lag, and the CPU of the busiest generator process, since `begin_step`."""
        delivery, lag = self._step or (histogram(), histogram())
        since = [percents[self._reports_before.get(worker, 0) :] for worker, percents in self.cpu_by_worker.items()]
        return {
            "delivery_p99_ms": milliseconds(delivery, 99),
            "lag_p99_ms": milliseconds(lag, 99),
            "cpu_percent": round(max((sum(some) / len(some) for some in since if some), default=0.0), 1),
        }

    def end(self) -> None:
        """Close all seconds."""
        self._close(2**62)

    def latest(self) -> dict[str, Any]:
        """Return the newest second that several reports can be in, for a line of progress."""
        if not self._seconds:
            return self.timeline[-1] if self.timeline else Second(0).point({})
        whole = sorted(self._seconds)[-2:][0]
        return self._seconds[whole].point(self.open_by_worker)

    def _second(self, at: int) -> Second:
        at = max(at, self._closed_until)
        if at not in self._seconds:
            self._seconds[at] = Second(at)
        return self._seconds[at]

    def _close(self, until: int) -> None:
        for at in sorted(at for at in self._seconds if at < until):
            second = self._seconds.pop(at)
            # A process that reported shortly before and shortly after it has streams in it, too.
            self._open_then |= second.open
            self.timeline.append(second.point(self._open_then))
            self._closed_until = at + 1
