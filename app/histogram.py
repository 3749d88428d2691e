"""
Count observations in buckets, for a metric. Plain integers, no library.
"""

from bisect import bisect_left


class Histogram:
    """
    How often a value was at most each of *bounds*, and their sum.

    `observe` is two additions and a binary search: for what happens once per
    batch, tick or stream, not once per delivery.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count *value*."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Return each bound, as Prometheus writes it, with the number of values up to it."""
        total, rows = 0, []
        for bound, count in zip((*map(repr, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows
