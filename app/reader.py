"""
Follow the log into the window and the hub, and notice every loss on the way.

One task per process. `XREAD` alone misses losses silently: entries trimmed past
the cursor, FLUSHALL, a promoted replica that lost the tail or whose clock is
behind. So before reading on after every (re)connect, and every second, the
reader compares what the log says about itself with what it has read.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import cast

import structlog

from app.event import Entry
from app.histogram import Histogram
from app.hub import Hub
from app.log import (
    ORIGIN,
    Log,
    LogState,
    LogUnavailable,
    Position,
    made_ms,
    read_id,
    write_id,
)
from app.window import AHEAD, LOST, Window

# Under load at most one read and one flush in this time: reading one entry at a
# time costs fifty times the CPU of reading a hundred together.
_BATCH_SECONDS = 0.005
# A reply should stay near this size: larger ones hold the loop.
_REPLY_BYTES = 1_000_000
_MAX_COUNT = 1_000
# What is asked for where nobody knows what has gathered: at the start, and after
# a time in which nothing was read.
_FIRST_COUNT = 100
# Broken entries are remembered, so that a load counts none of them again.
_BROKEN_ENTRIES = 10_000
# An id this far ahead of the log's clock means that the clock went back.
_AHEAD_MS = 60_000


@dataclass(slots=True)
class Checked:
    """What the reader has read of the log so far."""

    epoch: str = ""
    cursor: Position = ORIGIN
    # entries-added of the log when `cursor` was its newest entry.
    ordinal: int = 0


def loss(read: Checked, state: LogState) -> str | None:
    """
    Return why *state* proves that entries after *read* cannot be had, or None.

    The word is the `reason` of the `stream.reset` that follows.
    """
    if state.epoch != read.epoch:
        return "epoch_changed"
    if state.last < read.cursor:
        return "log_went_back"
    if state.added - state.length > read.ordinal:
        return "trimmed"
    if state.last == read.cursor:
        return None if state.added == read.ordinal else "log_replaced"
    if state.added <= read.ordinal:
        return "log_replaced"
    if state.first is None:
        return None
    # Still kept entries before the cursor, but not the one at it: this is
    # another log that went on from an earlier place.
    if state.first <= read.cursor and not state.has_cursor:
        return "log_replaced"
    # Nothing is kept of what was read, and not as much was ever removed.
    if state.first > read.cursor and state.added - state.length < read.ordinal:
        return "log_replaced"
    return None


class Reader:
    """
    The one task that reads the log in this process.

    Attributes:
        loaded: the window holds the retained log; never false again.
        connected: the last step reached the log.
        gaps: losses that were noticed and announced.
        broken: entries that could not be understood.
        lag_seconds: how much older than the log's newest entry this process's
            newest one was, at the last check.
        latency: seconds from the log's taking an entry to its being written to
            the streams; one observation per batch, of its oldest entry.

    `heed` says what to do with each kind of notice; other kinds are ignored.
    """

    def __init__(
        self,
        log: Log,
        window: Window,
        hub: Hub,
        *,
        check_seconds: float = 1.0,
        heed: Mapping[str, Callable[[dict[str, str]], None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
        logger: structlog.typing.FilteringBoundLogger | None = None,
    ) -> None:
        self.loaded = False
        self.connected = False
        self.gaps = 0
        self.broken = 0
        self.entries = 0
        self.errors = 0
        self.lag_seconds = 0.0
        self.latency = Histogram(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
        self.progress_at = clock()
        self._log = log
        self._window = window
        self._hub = hub
        self._heed = {} if heed is None else heed
        self._check_seconds = check_seconds
        self._clock = clock
        self._random = random or Random()
        self._logger = logger or structlog.get_logger()
        self._read = Checked()
        self._count = _FIRST_COUNT
        self._weight = 0.0  # bytes of an entry in a reply, by the latest ones
        self._broken: dict[object, None] = {}  # positions of broken entries that were counted
        self._clock_ms = (0, 0.0)
        self._check_at = 0.0
        self._checked_at = 0.0  # when the log was last asked about itself
        # The log's end and its entries-added at a check: when the cursor gets
        # there, as many must have been read.
        self._mark: tuple[Position, int] | None = None
        self._missed: str | None = None
        self._read_at = 0.0
        self._moved = asyncio.Event()
        self._asked: list[asyncio.Future[None]] = []

    async def run(self) -> None:
        """Read for ever; waits out a log that is away, with the streams left open."""
        delay = 0.05
        why = ""
        while True:
            try:
                await self._log.open()
                await self._check()
                if not self.connected:
                    self.connected = True
                    self._logger.info("log_connected", window_events=len(self._window))
                delay, why = 0.05, ""
                while True:
                    await self.step()
            except LogUnavailable as error:
                self.errors += 1
                # Events so large that a reply takes too long: ask for fewer.
                self._count = max(1, self._count // 4)
                # Once for each reason, not once a second.
                if str(error) != why:
                    why = str(error)
                    self._logger.warning("log_unavailable", error=why, streams=len(self._hub), ready=self.loaded)
                self.connected = False
                self.progress_at = self._clock()
                self._answer(error)
                await asyncio.sleep(delay * self._random.uniform(0.5, 1.0))
                delay = min(delay * 2, 1.0)

    async def step(self) -> None:
        """Check the log if that is due, else read once and flush what came."""
        now = self._clock()
        if now >= self._check_at or self._asked:
            await self._check()
        else:
            await self._pass_on(self._check_at - now)
        if self._log.notices:
            self._heed_notices()
        self.progress_at = self._clock()

    async def located(self, id: str, wait_seconds: float = 2.0) -> int | str:
        """
        Return the cursor of a client's position, or the reason why there is none.

        A position that another process has read further to is waited for;
        after *wait_seconds* the log itself is asked, again and again while it
        has the entry.

        Raises:
            LogUnavailable: it could not be told whether the position is valid.
        """
        parsed = read_id(id)
        if parsed is None:
            return "unknown_position"
        epoch, position = parsed
        if epoch != self._window.epoch:
            # Another process may have seen the change first.
            await self.check_now()
            if epoch != self._window.epoch:
                return "epoch_changed"
        for attempt in range(5):
            cursor = self._window.locate(position)
            if cursor == LOST:
                return "history_lost"
            if cursor != AHEAD:
                return cursor
            if attempt and not await self._log.has(position):
                return "unknown_position"
            await self._reached(position, wait_seconds)
            if epoch != self._window.epoch:
                return "epoch_changed"
        raise LogUnavailable("the reader did not reach the position in time")

    def window_seconds(self) -> float:
        """Return how far back the window reaches, in seconds of the log's clock."""
        oldest = self._window.oldest()
        if oldest is None or not self.loaded:
            return 0.0
        return max(0.0, self._now_ms() - made_ms(cast(Position, oldest.position))) / 1000

    async def check_now(self) -> None:
        """Have the log checked at once; callers at the same time share one check."""
        asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        try:
            await asyncio.wait_for(asked, 2 * self._check_seconds + 2)
        except TimeoutError:
            raise LogUnavailable("the log did not answer a check in time") from None

    # --- inside --------------------------------------------------------------

    async def _pass_on(self, block_seconds: float) -> None:
        pause = self._read_at + _BATCH_SECONDS - self._clock()
        if pause > 0:
            await asyncio.sleep(pause)
        entries = await self._log.read(self._read.epoch, self._read.cursor, self._count, max(0.001, block_seconds))
        if self._log.notices:
            # Before the events, whose flush can take a while.
            self._read_at = self._clock()
            self._heed_notices()
        if not entries:
            return
        self._read_at = self._clock()
        # A process that was frozen, or a request that lay on its way, reads a log
        # of later: what was trimmed meanwhile may be missing before these entries.
        if self._read_at - self._checked_at > 2 * self._check_seconds and await self._lost():
            return
        if self._mark is not None and entries[-1].position >= self._mark[0]:  # type: ignore[operator]
            self._pass_mark(entries, *self._mark)
            if self._missed is not None and await self._lost():
                return
        self._read.cursor = entries[-1].position  # type: ignore[assignment]
        self._read.ordinal += len(entries)
        self._adapt(entries)
        for entry in entries:
            self._window.append(entry)
        self._note(entries)
        self.entries += len(entries)
        await finish(self._hub.flush(entries))
        made = made_ms(cast(Position, entries[0].position))
        self.latency.observe(max(0.0, self._now_ms() - made) / 1000)
        self._moved.set()

    def _heed_notices(self) -> None:
        notices = self._log.notices
        while notices:
            notice = notices.popleft()
            heed = self._heed.get(notice.kind)
            if heed is None:
                continue  # another version of the kit runs beside this one
            try:
                heed(notice.fields)
            except Exception as error:
                # One that cannot be heeded must not stop all streams' events.
                self._logger.error("notice_failed", kind=notice.kind, exc_info=error)

    def _pass_mark(self, entries: list[Entry], end: Position, added: int) -> None:
        """
        Compare the counts where a check saw the log's end.

        A reader under load never stands at the end, and what is cut in front of
        it between two checks would stay unnoticed until it does.
        """
        self._mark = None
        read = self._read.ordinal + sum(1 for entry in entries if cast(Position, entry.position) <= end)
        if read != added:
            self._missed = "trimmed" if read < added else "log_replaced"

    async def _lost(self) -> bool:
        """
        Check the log before what was read is passed on.

        Nobody may get an event that has a gap before it: a client that leaves
        with its id, before the reset, would never hear of the gap.

        Returns:
            Whether something was lost; then the window has been loaded anew.
        """
        resets = self._window.resets
        await self._check()
        return self._window.resets != resets

    async def _check(self) -> None:
        if self._clock() - self._checked_at > 2 * self._check_seconds:
            # This process stood still, or the log was away. What has gathered may
            # weigh more than what came before: begin with replies that are not long.
            self._count = min(self._count, _FIRST_COUNT)
        while True:
            self._checked_at = self._clock()
            await self._log.trim()
            state = await self._log.state(self._read.cursor)
            reason = (loss(self._read, state) or self._missed) if self.loaded else "start"
            if reason is None or await self._load(state, reason):
                break
        if reason is None:
            if state.first is not None:
                self._window.trim_before(state.first)
            if self._mark is None and state.last > self._read.cursor:
                self._mark = (state.last, state.added)
        self._clock_ms = (state.now_ms, self._clock())
        behind = made_ms(state.last) - made_ms(self._read.cursor) if state.last > self._read.cursor else 0
        self.lag_seconds = max(0.0, behind / 1000)
        if made_ms(state.last) > state.now_ms + _AHEAD_MS:
            self._logger.error(
                "log_ahead_of_clock",
                seconds=(made_ms(state.last) - state.now_ms) / 1000,
                cure="New ids cannot be older than the newest; see README, When something is wrong.",
            )
        self._check_at = self._clock() + self._check_seconds * self._random.uniform(0.8, 1.0)
        self._answer(None)

    async def _load(self, state: LogState, reason: str) -> bool:
        """
        Fill the window anew; tell the streams where they had one before.

        Returns:
            Whether all is there that *state* told of. Where the log was trimmed
            past the load, the window would have a hole: load again.
        """
        epoch = state.epoch
        if self.loaded and (reason != "trimmed" or epoch is None):
            # Positions of before belong to another history. Being trimmed past
            # is this process's own loss: the others keep their positions.
            if epoch == self._read.epoch or epoch is None:
                epoch = await self._log.renew_epoch(epoch)
        elif epoch is None:
            epoch = await self._log.renew_epoch(None)
        cursor = ORIGIN if state.first is not None else state.last
        loaded: deque[Entry] = deque()
        oldest: Entry | None = None  # the newest that is not kept
        size = count = newer = 0
        while cursor < state.last:
            entries = await self._log.read(epoch, cursor, self._count, 0)
            if not entries:
                cursor = state.last  # the newest ones were deleted
                break
            if not count and entries[0].position != state.first:
                return False
            self._adapt(entries)
            loaded += entries
            cursor = entries[-1].position  # type: ignore[assignment]
            count += len(entries)
            newer += sum(1 for entry in entries if cast(Position, entry.position) > state.last)
            size += sum(entry.size for entry in entries)
            # The log may be larger than this process's memory.
            while size > self._window.max_bytes and len(loaded) > 1:
                oldest = loaded.popleft()
                size -= oldest.size
        if count - newer != state.length:
            return False
        self._note(loaded)
        # Every trim leaves one entry past the history: the trim boundary. A
        # client that stands there has missed nothing.
        if oldest is None and state.added > state.length and loaded:
            oldest = loaded.popleft()
        if state.first is None:
            boundary, boundary_id = state.last, write_id(epoch, state.last)
        elif oldest is not None:
            boundary, boundary_id = oldest.position, oldest.id  # type: ignore[assignment]
        else:
            boundary, boundary_id = ORIGIN, write_id(epoch, ORIGIN)
        # From here on without a pause: no stream may see a window half loaded.
        self._window.reset(epoch, boundary, boundary_id)
        for entry in loaded:
            self._window.append(entry)
        self._read = Checked(epoch, cursor, state.added + newer)
        self._mark = self._missed = None
        if self.loaded:
            self.gaps += 1
            self._logger.error("log_gap", reason=reason, epoch=epoch, streams=len(self._hub), window_events=len(loaded))
            self._hub.reset(reason)
        else:
            self._hub.settled = self._window.end
            self.loaded = True
            self._logger.info("window_loaded", epoch=epoch, window_events=len(loaded))
        self._moved.set()
        return True

    def _adapt(self, entries: list[Entry]) -> None:
        """
        Keep a reply near its size: large events are read few at a time.

        Also where they came one by one: if this process is frozen, many of them
        wait for it. Heavier entries count at once, lighter ones little by little.
        """
        size = sum(len(entry.data) for entry in entries) + 100 * len(entries)
        weight = size / len(entries)
        if weight < self._weight:
            weight = self._weight + (weight - self._weight) * min(1.0, len(entries) / 10)
        self._weight = weight
        # Only a full reply tells that more at a time would help.
        wanted = 2 * self._count if len(entries) == self._count else self._count
        self._count = max(1, min(_MAX_COUNT, wanted, int(_REPLY_BYTES / weight)))

    def _note(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if not entry.topics:
                if entry.position not in self._broken:
                    self._broken[entry.position] = None
                    if len(self._broken) > _BROKEN_ENTRIES:
                        del self._broken[next(iter(self._broken))]
                    self.broken += 1
                    self._logger.warning("entry_broken", id=entry.id, error=entry.data)
                entry.data = ""

    async def _reached(self, position: Position, seconds: float) -> None:
        """Wait until the window holds *position*, at most *seconds*."""
        until = self._clock() + seconds
        epoch = self._window.epoch
        while self._window.epoch == epoch and self._window.newest() < position:
            self._moved.clear()
            left = until - self._clock()
            if left <= 0:
                return
            try:
                await asyncio.wait_for(self._moved.wait(), left)
            except TimeoutError:
                return

    def _now_ms(self) -> float:
        """Return the log's clock, as of the last check and the time since."""
        then_ms, then = self._clock_ms
        return then_ms + (self._clock() - then) * 1000

    def _answer(self, error: LogUnavailable | None) -> None:
        asked, self._asked = self._asked, []
        for future in asked:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)


async def finish(slices: Iterator[None]) -> None:
    """Run an iterator of slices to its end, with the event loop's other work between them."""
    for _ in slices:
        await asyncio.sleep(0)
