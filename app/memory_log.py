"""
The log in this process's memory: for development and tests, one process only.

Same rules as the one in Redis, down to ids, trims and idempotency.
"""

import asyncio
import secrets
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable

from app.event import Draft, Entry
from app.log import ORIGIN, Batch, IdempotencyConflict, LogState, Notice, Position, write_id


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class MemoryLog:
    """See `app.log.Log`."""

    def __init__(
        self,
        *,
        history_seconds: float,
        max_events: int,
        idempotency_seconds: float = 600,
        now_ms: Callable[[], int] = _now_ms,
    ) -> None:
        self._history_ms = history_seconds * 1000
        self._max_events = max_events
        self._idempotency_ms = idempotency_seconds * 1000
        self._now_ms = now_ms
        self._epoch: str = secrets.token_hex(4)
        self._positions: list[Position] = []
        self._drafts: list[Draft] = []
        self._last = ORIGIN
        self._added = 0
        self._keys: OrderedDict[str, tuple[int, str, list[str]]] = OrderedDict()
        self._grown = asyncio.Event()
        self.notices: deque[Notice] = deque()

    async def open(self) -> None:
        pass

    async def publish(self, batch: Batch) -> list[str]:
        now = self._now_ms()
        while self._keys and next(iter(self._keys.values()))[0] <= now:
            self._keys.popitem(last=False)
        known = self._keys.get(batch.key)
        if known is not None:
            if known[1] != batch.fingerprint:
                raise IdempotencyConflict(batch.key)
            return known[2]
        ids = []
        for draft in batch.drafts:
            self._last = Position(now, 0) if now > self._last.ms else Position(self._last.ms, self._last.seq + 1)
            self._positions.append(self._last)
            self._drafts.append(draft)
            ids.append(write_id(self._epoch, self._last))
        self._added += len(ids)
        if not batch.own_key:  # nothing gets lost on the way to this log: nobody asks again
            self._keys[batch.key] = (int(now + self._idempotency_ms), batch.fingerprint, ids)
        self._grown.set()
        return ids

    async def state(self, cursor: Position) -> LogState:
        return LogState(
            epoch=self._epoch,
            first=self._positions[0] if self._positions else None,
            last=self._last,
            added=self._added,
            length=len(self._positions),
            has_cursor=self._has_entry(cursor),
            now_ms=self._now_ms(),
        )

    async def read(self, epoch: str, after: Position, count: int, block_seconds: float) -> list[Entry]:
        start = bisect_right(self._positions, after)
        if start == len(self._positions) and block_seconds > 0 and not self.notices:
            self._grown.clear()
            try:
                await asyncio.wait_for(self._grown.wait(), block_seconds)
            except TimeoutError:
                return []
            start = bisect_right(self._positions, after)
        return [
            Entry(position, write_id(epoch, position), draft.topics, draft.data, draft.event, draft.retry)
            for position, draft in zip(
                self._positions[start : start + count], self._drafts[start : start + count], strict=True
            )
        ]

    async def notify(self, notice: Notice) -> None:
        self.notices.append(notice)
        self._grown.set()

    async def renew_epoch(self, expected: str | None) -> str:
        if self._epoch == expected:
            self._epoch = secrets.token_hex(4)
        return self._epoch

    async def has(self, position: Position) -> bool:
        return self._has_entry(position)

    async def trim(self) -> None:
        # The newest entry past the history stays: it is the trim boundary, and
        # the position of every client that has seen all before the next one.
        horizon = Position(int(self._now_ms() - self._history_ms), 0)
        drop = max(bisect_right(self._positions, horizon) - 1, len(self._positions) - self._max_events, 0)
        if drop:
            del self._positions[:drop]
            del self._drafts[:drop]

    async def ping(self) -> bool:
        return True

    async def close(self) -> None:
        pass

    def _has_entry(self, position: Position) -> bool:
        at = bisect_left(self._positions, position)
        return at < len(self._positions) and self._positions[at] == position
