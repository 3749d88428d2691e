"""
Bound how often one caller may do one thing: a token bucket for each, in this process.

A bucket starts full, and each use takes out of it; it fills at a steady rate.
A use that is larger than a bucket needs a full one, and what was missing has to
be made up for before the next: no use is too large for ever.
"""

import time
from collections.abc import Callable

# Full buckets are forgotten when there are this many, and at each doubling.
_SWEEP = 1_024


class Buckets:
    """
    One bucket per key.

    Args:
        rate: what comes back per second; 0: no bound at all.
        burst: what a full bucket holds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        # When each bucket will be full again: one number says it all.
        self._full_at: dict[str, float] = {}
        self._sweep_at = _SWEEP

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, key: str, count: float = 1) -> float:
        """Take *count* out of the bucket of *key*; return 0, or the seconds to wait until it would be allowed."""
        if not self._rate:
            return 0.0
        now = self._clock()
        full_at = max(now, self._full_at.get(key, 0.0))
        # What is missing, in seconds; a full bucket misses none.
        most = self._burst / self._rate
        wait = full_at - now + min(count, self._burst) / self._rate - most
        if wait > 1e-9:
            return wait
        self._full_at[key] = full_at + count / self._rate
        if len(self._full_at) >= self._sweep_at:
            self._full_at = {key: at for key, at in self._full_at.items() if at > now}
            self._sweep_at = max(_SWEEP, 2 * len(self._full_at))
        return 0.0
