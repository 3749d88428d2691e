"""
Times in buckets: exact below 64 µs, 3 % wide above.

The load clients count in these buckets (client.c, `record`), so that the reports
of several clients can be added before a percentile is taken.
"""

from collections import Counter

# Values below are their own bucket; above, each power of two has 32 buckets.
EXACT = 64
PER_DOUBLING = 32


def bucket_of(value: int) -> int:
    """
    Return the bucket of *value* (µs).
    """
    if value < EXACT:
        return max(0, value)
    high = value.bit_length() - 1
    return EXACT + (high - 6) * PER_DOUBLING + ((value >> (high - 5)) & 31)


def middle_of(bucket: int) -> float:
    """
    Return the value in the middle of *bucket*.
    """
    if bucket < EXACT:
        return float(bucket)
    doubling, part = divmod(bucket - EXACT, PER_DOUBLING)
    width = 1 << (doubling + 1)
    return float((32 + part) * width + width / 2)


class Histogram:
    """
    A sum of clients' histograms.
    """

    __slots__ = ("buckets", "max")

    def __init__(self) -> None:
        self.buckets: Counter[int] = Counter()
        self.max = 0

    def record(self, value: int) -> None:
        """
        Count one *value* (µs).
        """
        self.buckets[bucket_of(value)] += 1
        self.max = max(self.max, value)

    def add(self, reported: dict) -> None:
        """
        Add a histogram as a client reports it.
        """
        self.buckets.update({int(bucket): n for bucket, n in reported["buckets"].items()})
        self.max = max(self.max, reported["max"])

    @property
    def count(self) -> int:
        """
        How many values were counted.
        """
        return self.buckets.total()

    def percentile(self, percent: float) -> float:
        """
        Return the value that *percent* of all values do not exceed; 0 without values.
        """
        wanted = self.count * percent / 100
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted:
                return min(middle_of(bucket), float(self.max))
        return 0.0

    def as_report(self) -> dict:
        """
        Return what `add` takes.
        """
        buckets = {str(bucket): n for bucket, n in sorted(self.buckets.items())}
        return {"count": self.count, "max": self.max, "buckets": buckets}
