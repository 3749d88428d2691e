"""
A whole service in one thread and in no time: a log's server, processes, clients.

The application's own log rules, reader, window, hub, pulse and stream routes run
here, on an event loop whose time stands still until somebody moves it. Simulated
are only the edges: the server behind the log, and the connections of clients.
Nothing is random but what a seed decides.

`Ledger` is the model: it knows every event that was ever published, and judges
what was written to a stream and what a client has read.
"""

import asyncio
import heapq
import json
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

from app import hub as hub_module
from app import opening as opening_module
from app import reader as reader_module
from app import routes as routes_module
from app import window as window_module
from app.control import Control
from app.event import Entry, Piece, encode, matches
from app.hub import Hub, Pace
from app.log import ORIGIN, Batch, LogState, LogUnavailable, Notice, Position, from_fields, read_id
from app.metrics import Tally
from app.parser import Parser, ServerSentEvent
from app.problem import Problem
from app.pulse import Pulse
from app.reader import Reader
from app.settings import Settings
from app.stream import BEHIND, ENDED, LIVE, REASONS, Stream
from app.window import Window

_BEGAN_MS = 1_700_000_000_000


class Quiet:
    """A logger that says nothing."""

    def info(self, *args: Any, **facts: Any) -> None: ...

    warning = error = critical = info


class _NoSelector:
    def select(self, timeout: float | None) -> list[Any]:
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop that runs one turn when told, and whose clock is moved by hand."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _NoSelector()
        self.now = 1_000.0
        self.failures: list[BaseException] = []
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        return self.now

    def _process_events(self, events: list[Any]) -> None: ...

    def _failed(self, loop: object, context: dict[str, Any]) -> None:
        self.failures.append(context.get("exception") or AssertionError(context["message"]))

    def busy(self) -> bool:
        """Tell whether something can run without time passing."""
        return bool(self._ready)

    def next_timer(self) -> float | None:
        """Return when the next timer is due."""
        while self._scheduled and self._scheduled[0]._cancelled:
            self._timer_cancelled_count -= 1
            heapq.heappop(self._scheduled)._scheduled = False
        return self._scheduled[0]._when if self._scheduled else None

    def turn(self) -> None:
        """Run what is ready now, once."""
        asyncio.events._set_running_loop(self)
        try:
            self._run_once()
        finally:
            asyncio.events._set_running_loop(None)
        if self.failures:
            raise self.failures[0]


# --- the server behind the log -----------------------------------------------


@dataclass(eq=False, slots=True)
class Record:
    """One event that was published, and what became of it in the log."""

    n: int
    position: Position
    fields: dict[bytes, bytes]
    topics: tuple[str, ...]
    history: int
    gone: str = ""  # "trimmed", "cut" (before its time), "flushed", "lost", "deleted"

    def __repr__(self) -> str:
        return f"<{self.n} at {self.position.ms}-{self.position.seq} to {self.topics} {self.gone}>"

    @property
    def owed(self) -> bool:
        """
        Whether a client must get it, or be told that it is gone.

        What FLUSHALL took is told by the epoch, which `World.come_to_rest` compares.
        """
        return bool(self.topics) and self.gone in ("", "trimmed")


class Server:
    """What Redis is to the log: one list of entries, its counters and its clock."""

    def __init__(
        self, loop: VirtualLoop, retention_seconds: float, max_events: int, tell: Callable[[str], None]
    ) -> None:
        self._loop = loop
        self.tell = tell
        self._retention_ms = retention_seconds * 1000
        self._max_events = max_events
        self.records: list[Record] = []
        self.entries: list[Record] = []
        self.added: list[Record] = []
        self.epoch: str | None = None
        self.history = 0
        self.offset_ms = 0
        self.renewed = 0
        # Histories that began with all connections broken: nobody may read on
        # without having compared itself with them.
        self.abrupt: set[int] = set()
        # Something other than age can trim entries that nobody has read yet.
        self.cut_short = max_events < 1_000
        self.waiters: list[tuple[Position, int, asyncio.Future[list[Record]]]] = []
        self._used: set[Position] = set()

    @property
    def last(self) -> Position:
        return self.added[-1].position if self.added else ORIGIN

    def now_ms(self) -> int:
        return _BEGAN_MS + int(self._loop.now * 1000) + self.offset_ms

    def publish(self, topics: tuple[str, ...], padding: int, count: int, *, bare: bool, broken: bool) -> None:
        if self.epoch is None and not bare:
            self.epoch = self._new_epoch()
        for _ in range(count):
            n = len(self.records)
            position = Position(self.now_ms(), 0)
            if position <= self.last:
                position = Position(self.last.ms, self.last.seq + 1)
            # Two histories that make the same id cannot be told apart by ids,
            # so a promoted replica never repeats one here.
            while position in self._used:
                position = Position(position.ms + 1, 0)
            self._used.add(position)
            self.tell(f"published {n} at {position.ms}-{position.seq} to {topics}")
            fields = {
                b"v": b"2" if broken else b"1",
                b"topics": " ".join(topics).encode(),
                b"data": f"{n}:".encode() + b"x" * padding,
            }
            record = Record(n, position, fields, () if broken else topics, self.history)
            self.records.append(record)
            self.entries.append(record)
            self.added.append(record)
        for waiter in self.waiters[:]:
            after, most, future = waiter
            found = self.after(after, most)
            if found and not future.done():
                future.set_result(found)
                self.waiters.remove(waiter)

    def after(self, position: Position, count: int) -> list[Record]:
        at = bisect_right(self.entries, position, key=_position)
        return self.entries[at : at + count]

    def at(self, position: Position) -> Record | None:
        at = bisect_left(self.entries, position, key=_position)
        found = self.entries[at : at + 1]
        return found[0] if found and found[0].position == position else None

    def state(self, cursor: Position) -> LogState:
        return LogState(
            epoch=self.epoch,
            first=self.entries[0].position if self.entries else None,
            last=self.last,
            added=len(self.added),
            length=len(self.entries),
            has_cursor=self.at(cursor) is not None,
            now_ms=self.now_ms(),
        )

    def renew_epoch(self, expected: str | None) -> str:
        if self.epoch is None or self.epoch == expected:
            self.epoch = self._new_epoch()
        return self.epoch

    def trim(self) -> None:
        horizon = Position(int(self.now_ms() - self._retention_ms), 1 << 60)
        drop = max(bisect_right(self.entries, horizon, key=_position) - 1, len(self.entries) - self._max_events, 0)
        if drop:
            self.tell(f"trimmed {[record.n for record in self.entries[:drop]]}, horizon {horizon.ms}")
        for record in self.entries[:drop]:
            record.gone = "cut" if self.cut_short else "trimmed"
        del self.entries[:drop]

    def delete(self, index: int) -> None:
        record = self.entries.pop(index)
        record.gone = "deleted"
        self.tell(f"deleted {record.n}")

    def flush(self, *, abrupt: bool = False) -> None:
        """Everything is gone, the epoch too; *abrupt*: it is another server."""
        self.tell("FLUSHALL")
        for record in self.records:
            record.gone = "flushed"
        self.entries, self.added = [], []
        self.epoch = None
        self._begin(abrupt)

    def lose(self, count: int, offset_ms: int) -> list[Record]:
        """Be a promoted replica: the newest *count* entries never came over."""
        lost = self.added[len(self.added) - count :]
        for record in lost:
            record.gone = "lost"
        del self.added[len(self.added) - count :]
        self.tell(f"failover lost {[record.n for record in lost]}")
        gone = set(lost)
        self.entries = [record for record in self.entries if record not in gone]
        self.jump(offset_ms)
        self._begin(abrupt=True)
        return lost

    def jump(self, offset_ms: int) -> None:
        """Set the server's clock."""
        self.offset_ms += offset_ms
        self.cut_short = self.cut_short or offset_ms > 0

    def _begin(self, abrupt: bool) -> None:
        self.history += 1
        if abrupt:
            self.abrupt.add(self.history)

    def _new_epoch(self) -> str:
        self.renewed += 1
        return f"e{self.renewed}"


def _position(record: Record) -> Position:
    return record.position


class ServerLog:
    """See `app.log.Log`: one process's connections to the `Server`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.away = False  # cut off from the server
        self.delay = 0.0  # between the server's answer and its arrival
        self.connected = False
        self.told_history = -1  # which history the last state was of
        self._waiter: asyncio.Future[list[Record]] | None = None
        self.notices: deque[Notice] = deque()

    def break_off(self) -> None:
        """Lose the reader's connection."""
        self.connected = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(LogUnavailable("connection lost"))

    async def open(self) -> None:
        await asyncio.sleep(0.01)
        if self.away:
            raise LogUnavailable("no route")
        self.connected = True

    async def publish(self, batch: Batch) -> list[str]:
        raise NotImplementedError

    async def state(self, cursor: Position) -> LogState:
        history = self._server.history
        state: LogState = await self._ask(lambda: self._server.state(cursor))
        self.told_history = history
        return state

    async def read(self, epoch: str, after: Position, count: int, block_seconds: float) -> list[Entry]:
        records: list[Record] = await self._ask(lambda: self._server.after(after, count), slow=False)
        if not records and block_seconds > 0:
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            place = (after, count, waiter)
            self._server.waiters.append(place)
            try:
                records = await asyncio.wait_for(waiter, min(block_seconds, 1.0))
            except TimeoutError:
                return []
            finally:
                if place in self._server.waiters:
                    self._server.waiters.remove(place)
                self._waiter = None
        if self.delay:
            await asyncio.sleep(self.delay)
        self._reach()
        return [from_fields(epoch, record.position, record.fields, 50, 1 << 20) for record in records]

    async def renew_epoch(self, expected: str | None) -> str:
        return await self._ask(lambda: self._server.renew_epoch(expected))  # type: ignore[no-any-return]

    async def has(self, position: Position) -> bool:
        await asyncio.sleep(0)
        if self.away:
            raise LogUnavailable("no route")
        return self._server.at(position) is not None

    async def notify(self, notice: Notice) -> None:
        raise NotImplementedError

    async def trim(self) -> None:
        await self._ask(self._server.trim)

    async def ping(self) -> bool:
        return not self.away

    async def close(self) -> None: ...

    async def _ask(self, answer: Callable[[], Any], *, slow: bool = True) -> Any:
        await asyncio.sleep(0)
        self._reach()
        result = answer()
        if slow and self.delay:
            await asyncio.sleep(self.delay)
            self._reach()
        return result

    def _reach(self) -> None:
        if self.away or not self.connected:
            self.connected = False
            raise LogUnavailable("connection lost")


# --- the model -----------------------------------------------------------------


class Ledger:
    """
    What one reader of bytes was told, judged against all that was published.

    Used twice: for the bytes written to a stream, at once; and for the events a
    client has read, across all of its connections.
    """

    def __init__(self, server: Server, topics: tuple[str, ...], who: str, *, cut_too: bool) -> None:
        self._server = server
        # A log that is cut before its time can have a gap that is told within a
        # second. A client that leaves in between may never hear of it.
        self._cut_too = cut_too
        self.topics = topics
        self.who = who
        self.epoch = ""
        self.at: Position | None = None
        self.floor: Position | None = None
        self.seen: set[int] = set()
        self.gap: set[int] = set()
        self.resets = 0
        self.reasons: list[str] = []
        self._asked: str | None = None
        self._must_reset = False

    def begin(self, asked: str) -> None:
        """A connection begins that asks for *asked*; `stream.open` must come first."""
        self._asked = asked
        self._must_reset = False

    def take(self, event: ServerSentEvent, certain: Callable[[Record], bool] | None = None) -> None:
        """Judge one event. *certain* tells which missing record is an error at once."""
        self._server.tell(f"{self.who}: {event.event} {event.data[:24]!r} {event.id}")
        if event.event == "stream.open":
            self._open(event)
            return
        assert self._asked is None, f"{self.who}: {event.event} came before stream.open"
        if event.event == "stream.draining":
            return
        parsed = read_id(event.id)
        if event.event == "stream.reset":
            assert parsed is not None, f"{self.who}: a reset without a position: {event!r}"
            self.epoch, self.at = parsed
            self.floor = self.at
            self.seen.clear()
            self.gap.clear()
            self.resets += 1
            self.reasons.append(event.data)
            self._must_reset = False
            return
        assert not self._must_reset, f"{self.who}: {event!r} came where a reset had to"
        assert parsed is not None, f"{self.who}: {event!r} has no position"
        epoch, position = parsed
        assert self.at is not None
        assert epoch == self.epoch, f"{self.who}: the history changed without a reset: {event!r}"
        if event.event == "stream.position":
            assert event.data == ""
            assert position >= self.at, f"{self.who}: went back from {self.at} to {event!r}"
            self._owe(position, None, certain)
            return
        n = int(event.data.partition(":")[0])
        record = self._server.records[n]
        assert event.data.encode() == record.fields[b"data"], f"{self.who}: altered {n}"
        assert position == record.position, f"{self.who}: {n} has the id {event.id}"
        assert self.wants(record), f"{self.who}: {n} is for {record.topics}, not {self.topics}"
        assert n not in self.seen, f"{self.who}: {n} came twice"
        assert position > self.at, f"{self.who}: {n} came out of order, after {self.at}"
        self.seen.add(n)
        self._owe(position, record, certain)

    def wants(self, record: Record) -> bool:
        return any(matches(wanted, topic) for topic in record.topics for wanted in self.topics)

    def owed(self, after: Position, to: Position) -> Iterator[Record]:
        """Yield what has to be known after *after* up to *to*."""
        for record in self._server.records:
            owed = record.owed or (self._cut_too and bool(record.topics) and record.gone == "cut")
            if owed and after < record.position <= to and record.n not in self.seen and self.wants(record):
                yield record

    def _open(self, event: ServerSentEvent) -> None:
        asked, self._asked = self._asked, None
        assert asked is not None, f"{self.who}: a second stream.open"
        if asked in ("", "earliest"):
            parsed = read_id(event.id)
            assert parsed is not None, f"{self.who}: stream.open says no position"
            self.epoch, self.at = parsed
            self.floor = self.at
            self.seen.clear()
            self.gap.clear()
            return
        # The client's position must not move before it has read of the loss.
        assert event.id == asked, f"{self.who}: asked for {asked}, stream.open says {event.id}"
        parsed = read_id(asked)
        if parsed is None:
            self._must_reset = True
        else:
            self.epoch, self.at = parsed

    def _owe(self, position: Position, record: Record | None, certain: Callable[[Record], bool] | None) -> None:
        assert self.at is not None
        for missing in self.owed(self.at, position):
            assert certain is None or not certain(missing), (
                f"{self.who}: {missing} is missing before {position} (from {self.at}, {record})"
            )
            self.gap.add(missing.n)
        self.at = position


# --- processes -----------------------------------------------------------------


class Process:
    """One process of the application."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        # Half of the processes have streams that take events without their sink.
        self.short_way = int(name[1:]) % 2 == 0
        self.alive = True
        self.log = ServerLog(world.server)
        self.window = Window(world.window_bytes)
        self.hub = Hub(self.window, world.pace, world.clock, Random(world.random.random()))
        self.hub.ended = self._ended
        self.reader = Reader(
            self.log,
            self.window,
            self.hub,
            check_seconds=min(1.0, world.pace.history / 4),
            clock=world.loop.time,
            random=Random(world.random.random()),
            logger=Quiet(),  # type: ignore[arg-type]
        )
        self.reader._count = world.read_count
        # Which history of the server this process has last compared itself with.
        self.history = -1
        self.must_announce = False  # it has read what the log lost
        self._check = self.reader._check
        self.reader._check = self._checked  # type: ignore[method-assign]
        self.pulse = Pulse(self.hub)
        self.ends: Counter[str] = Counter()
        self.wires: dict[str, Wire] = {}
        self.streams = 0
        self.kit: Any = SimpleNamespace(
            hub=self.hub,
            window=self.window,
            reader=self.reader,
            settings=world.settings,
            tally=Tally(),
            process=name,
            logger=Quiet(),
            draining=False,
            opening=set(),
            control=Control(name, self.hub, self.log, {}),  # type: ignore[arg-type]
        )
        self.tasks = [world.task(self.reader.run()), world.task(self.pulse.run())]

    def open_for_streams(self) -> bool:
        return self.alive and self.reader.loaded and not self.kit.draining

    def certain(self, missing: Record) -> bool:
        """Tell whether nothing excuses that *missing* was passed over."""
        server = self.world.server
        return missing.owed and self.history == missing.history == server.history

    def may_write(self, record: Record) -> bool:
        """Tell whether this process has compared itself with the log that it read *record* from."""
        return not any(self.history < each <= record.history for each in self.world.server.abrupt)

    def kill(self) -> None:
        """End without a word: all connections break."""
        self.world.tell(f"{self.name} killed")
        self.alive = False
        for task in self.tasks:
            task.cancel()
        for wire in list(self.wires.values()):
            wire.broken_by_server()

    async def drain(self, lead: float, seconds: float) -> None:
        """As `app.drain`, one stream after the other."""
        self.kit.draining = True
        streams = list(self.hub.streams.values())
        for stream in streams:
            self.hub.tell(stream, encode(event="stream.draining", data="{}"))
        await asyncio.sleep(lead)
        for stream in streams:
            await asyncio.sleep(seconds / len(streams))
            self.hub.end(stream, "draining", self.hub.farewell())
        for stream in list(self.hub.streams.values()):
            self.hub.end(stream, "draining", self.hub.farewell())

    async def _checked(self) -> None:
        gaps = self.reader.gaps
        await self._check()
        self.history = self.log.told_history
        if self.must_announce:
            assert self.reader.gaps > gaps, f"{self.name} did not notice that the log lost what it had read"
            self.must_announce = False
        if self.reader.gaps > gaps:
            self.world.tell(f"{self.name} announced a loss, window {self.window.newest()} {self.window.epoch}")

    def _ended(self, stream: Stream) -> None:
        world, wire = self.world, self.wires.pop(stream.id)
        self.ends[stream.id] += 1
        world.tell(f"{stream.id} ended: {stream.reason}")
        world.reasons[stream.reason] += 1
        assert self.ends[stream.id] == 1, f"{stream.id} ended twice"
        assert stream.reason in REASONS
        assert stream.state is ENDED
        now, pace = world.loop.now, world.pace
        if stream.reason == "slow_consumer":
            stalled = now - wire.progress_at >= pace.slow_consumer - 1e-6 and bool(wire.buffered)
            assert stalled, f"{stream.id} took what it was given and was called slow"
        if stream.reason == "max_age":
            age = now - stream.opened_at
            assert age >= 0.8 * pace.max_age - 1e-6, f"{stream.id} ended after {age}"
        if stream.reason == "client_gone":
            assert wire.closed_by_client, f"{stream.id} was called gone, its client was there"

    # --- invariants

    def check(self) -> None:
        for task in self.tasks:
            if task.done() and not task.cancelled():
                error = task.exception()
                raise error if error is not None else AssertionError(f"{task} ended")
        self._check_window()
        self._check_hub()

    def _check_window(self) -> None:
        window = self.window
        entries = window._entries[window._start :]
        assert window.end - window.first == len(entries) == len(window)
        assert window.bytes == sum(entry.size for entry in entries)
        assert window.bytes <= window.max_bytes or len(window) == 1
        lines: dict[str, list[int]] = {}
        before = window._boundary
        for ordinal, entry in enumerate(entries, window.first):
            assert entry.position > before, "positions must ascend"
            before = entry.position
            for topic in entry.topics:
                lines.setdefault(topic, []).append(ordinal)
        assert lines == {topic: line.ordinals[line.start :] for topic, line in window._lines.items()}
        for (topics, cursor, most), known in list(window._memo.items()):
            window._memo.clear()
            fresh = window.pull(topics, cursor, most)
            assert fresh == known, f"the memo of {topics} from {cursor} is stale"
        window._memo.clear()

    def _check_hub(self) -> None:
        hub = self.hub
        wheel = Counter(stream for slot in hub._wheel.values() for stream in slot)
        lines: dict[str, set[Stream]] = {topic: set(line.streams) for topic, line in hub._topics.items()}
        for prefixes in hub._prefixes.values():
            assert prefixes
            lines |= {prefix + "*": set(line.streams) for prefix, line in prefixes.items()}
        expected: dict[str, set[Stream]] = {}
        for stream in hub.streams.values():
            assert stream.state in (LIVE, BEHIND)
            assert stream.id in self.wires
            for topic in stream.topics:
                expected.setdefault(topic, set()).add(stream)
            assert wheel[stream] == 1, f"{stream.id} stands {wheel[stream]} times on the wheel"
            assert stream in hub._wheel[stream.due]
            assert stream.queued == (list(hub._behind).count(stream) == 1)
            assert stream.queued or stream.waiting or stream.state is LIVE, f"nobody serves {stream.id}"
            assert not (stream.queued and stream.waiting)
            assert not (stream.waiting and stream.state is LIVE)
            assert stream.waiting == bool(self.wires[stream.id].buffered or self.wires[stream.id].told_soon)
            assert hub.position(stream) <= self.window.end
        assert expected == lines, "the index is not that of the open streams"
        assert set(wheel) == set(hub.streams.values()), "the wheel holds streams that have ended"
        assert all(due >= hub._tick for due in hub._wheel), "the wheel leaks"
        if hub._behind:
            assert self.pulse._pumping, "streams wait and nobody was woken"
        else:
            assert not self.pulse._pumping or self.world.loop.busy()
        assert {stream for stream in hub._behind if stream.state is not ENDED} <= set(hub.streams.values())
        assert hub.settled <= self.window.end

    def check_silence(self, now: float) -> None:
        """See that every stream that can be written to was, when nothing happens until *now*."""
        pace, slack = self.world.pace, 1e-6
        for stream in self.hub.streams.values():
            if stream.state is not LIVE:
                continue
            wire = self.wires[stream.id]
            silent = now - max(wire.wrote_at, wire.progress_at)
            assert silent <= pace.heartbeat + slack, f"{stream.id} was silent for {silent}"
            old = now - max(wire.id_at, wire.progress_at if wire.waits else 0.0)
            assert old <= pace.renewal + pace.heartbeat + slack, f"{stream.id} got no position for {old}"
            age = now - stream.opened_at
            assert age <= pace.max_age + slack, f"{stream.id} is {age} old"


class Wire:
    """A stream's connection (see `app.stream.Sink`) and the network behind it."""

    def __init__(self, process: Process, client: "Client", stream: Stream, asked: str, room: int) -> None:
        self.process = process
        self.client = client
        self.stream = stream
        self.room = room  # of the kernel's buffer
        self.kernel = bytearray()
        self.buffered = bytearray()  # what the kernel had no room for
        self.told_soon = False  # `writable` is on its way
        self.vanished = False  # the client is gone, and only a write will show it
        self.closed_by_client = False
        self.ended = ""  # "closed" or "cut" by the hub
        self.headed = False
        self.waits = 0
        now = process.world.loop.now
        self.progress_at = self.wrote_at = self.id_at = now
        self.parser = Parser(last_event_id=asked)
        self.ledger = Ledger(process.world.server, client.topics, f"written to {stream.id}", cut_too=True)
        self.ledger.begin(asked)

    # --- the hub's side

    def write(self, piece: Piece, sent: int = 0) -> bool:
        assert not self.ended, f"{self.stream.id} was written to after its end"
        assert not self.buffered, f"{self.stream.id} was written to while it waits"
        assert not self.told_soon
        if self.vanished:
            self.closed_by_client = True
            self.process.hub.gone(self.stream)
            return True
        self._headed(piece)
        self._record(piece.raw)
        fit = max(0, self.room - len(self.kernel))
        self.kernel += piece.raw[:fit]
        self.buffered += piece.raw[fit:]
        if self.buffered:
            self.waits += 1
            self.process.world.happened["writes taken in part"] += 1
            self.progress_at = self.process.world.loop.now
            return False
        return True

    def send(self, chunk: bytes) -> int:
        """The short way, as `socket.send`: all or, where that has no room, nothing."""
        if self.vanished:
            raise BrokenPipeError
        raw = chunk[chunk.index(b"\r\n") + 2 : -2]
        if len(self.kernel) + len(raw) > self.room:
            return 0
        assert self.write(Piece(raw))
        self.process.world.happened["writes by the short way"] += 1
        return len(chunk)

    def close(self, piece: Piece | None) -> None:
        assert not self.ended
        self.ended = "closed"
        if piece is not None:
            self._headed(piece)
            self._record(piece.raw)
            self.buffered += piece.raw
        assert self.headed, f"{self.stream.id} ended without a head"
        # A client that reads gets the rest; one that does not is cut off by a timer.
        self.process.world.loop.call_later(2.0, self._closed_at_last)

    def abort(self) -> None:
        assert not self.ended
        self.ended = "cut"
        self.client.lost(self)

    def unsent(self) -> int:
        return len(self.kernel) + len(self.buffered)

    # --- the network's side

    def deliver(self, count: int) -> None:
        """Let the client read up to *count* bytes."""
        data = bytes(self.kernel[:count])
        if data:
            del self.kernel[:count]
            self.progress_at = self.process.world.loop.now
            self.client.read(data)
        if self.buffered:
            fit = self.room - len(self.kernel)
            self.kernel += self.buffered[:fit]
            del self.buffered[:fit]
            if not self.buffered and not self.ended:
                self.told_soon = True
                self.process.world.loop.call_soon(self._writable)
        if self.ended == "closed" and not self.kernel and not self.buffered:
            self.client.lost(self)

    def broken_by_server(self) -> None:
        self.ended = self.ended or "cut"
        self.client.lost(self)

    def close_by_client(self) -> None:
        """The client closes; the process hears of it in the next turn."""
        self.closed_by_client = True
        if self.process.alive:
            self.process.world.loop.call_soon(self.process.hub.gone, self.stream)

    def _headed(self, piece: Piece) -> None:
        assert self.headed != piece.chunk.startswith(b"HTTP/1.1 200"), (
            f"{self.stream.id}: the head must come once, first"
        )
        self.headed = True

    def _record(self, raw: bytes) -> None:
        now = self.process.world.loop.now
        self.wrote_at = now
        if b"id: " in raw:
            self.id_at = now
        for event in self.parser.feed(raw):
            self.process.world.happened["written " + event.event] += 1
            if not event.event.startswith("stream."):
                record = self.process.world.server.records[int(event.data.partition(":")[0])]
                assert self.process.may_write(record), f"{self.process.name} read on without comparing: {record}"
            self.ledger.take(event, self.process.certain)
            if event.event == "stream.reset":
                self.process.world.happened["reset " + json.loads(event.data)["reason"]] += 1

    def _writable(self) -> None:
        self.told_soon = False
        if self.process.alive:
            self.process.hub.writable(self.stream)

    def _closed_at_last(self) -> None:
        if self.client.wire is self:
            self.client.lost(self)


# --- clients ---------------------------------------------------------------------


@dataclass
class Asked:
    """What `app.routes` sees of a request."""

    args: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


_ASKED: ContextVar[Asked] = ContextVar("asked")


class _Request:
    def __getattr__(self, name: str) -> Any:
        return getattr(_ASKED.get(), name)


class Client:
    """One subscriber with a memory: it comes back with the last id that it has read."""

    def __init__(self, world: "World", name: str, topics: tuple[str, ...]) -> None:
        self.world = world
        self.name = name
        self.topics = topics
        self.reading = True
        self.wire: Wire | None = None
        self.last_id = ""
        self.first_ask = ""
        self.ledger = Ledger(world.server, topics, f"read by {name}", cut_too=False)
        self.parser = Parser()
        self.task: asyncio.Task[None] | None = None
        self.current_at: float | None = None  # when it last had read all that there was
        self.honest = True  # asks for what it has read

    @property
    def away(self) -> bool:
        return self.wire is None and self.task is None

    def connect(self, process: Process, *, turns: int, room: int, ask: str | None = None) -> None:
        """Ask *process* for a stream, from the last id on. *turns* pass before the head is out."""
        assert self.away
        asked = self.last_id or self.first_ask if ask is None else ask
        self.honest = ask is None and (self.honest or not self.last_id)
        self.task = self.world.task(self._open(process, asked, turns, room))

    def give_up(self) -> None:
        """Close the connection, or the request for one."""
        if self.task is not None:
            self.task.cancel()
            self.task = None
        if self.wire is not None:
            wire, self.wire = self.wire, None
            wire.close_by_client()

    def vanish(self) -> None:
        """Be gone without a word."""
        if self.wire is not None:
            self.wire.vanished = True
            self.wire = None

    def lost(self, wire: Wire) -> None:
        """The connection has ended; what had not arrived will not."""
        if self.wire is wire:
            self.wire = None

    def read(self, data: bytes) -> None:
        for event in self.parser.feed(data):
            resets = self.ledger.resets
            self.ledger.take(event)
            if self.ledger.resets > resets:
                self.world.told_of_loss(self, event)
                self.honest = True
        self.last_id = self.parser.last_event_id

    def settle(self) -> None:
        """Read what there is, if it reads at all."""
        if self.wire is None or not self.reading:
            return
        wire = self.wire
        while self.wire is wire and (wire.kernel or wire.buffered):
            wire.deliver(1 << 30)
        if self.wire is not None and wire.stream.state is LIVE:
            self.current_at = self.world.loop.now

    async def _open(self, process: Process, asked: str, turns: int, room: int) -> None:
        try:
            if asked == "earliest":
                _ASKED.set(Asked(args={"last_event_id": asked}))
            else:
                _ASKED.set(Asked(headers={"Last-Event-ID": asked} if asked else {}))
            try:
                place = await routes_module.place_of(process.kit)
            except Problem as problem:
                if problem.status != 503:
                    raise
                return
            for _ in range(turns):
                await asyncio.sleep(0)
            if not process.alive:
                return
            process.streams += 1
            stream = Stream(f"{process.name}.{process.streams}", self.topics, resumed_from=place.asked)

            def take_over(stream: Stream, hub: Hub) -> bool:
                wire = Wire(process, self, stream, "" if asked == "earliest" else asked, room)
                wire.ledger.begin(asked)
                self.world.tell(f"{self.name} is {stream.id}, asked {asked!r}")
                process.wires[stream.id] = wire
                self.parser = Parser(last_event_id="" if asked == "earliest" else asked)
                self.ledger.begin(asked)
                self.wire = stream.sink = wire
                if process.short_way:
                    stream.send = wire.send
                return True

            scope = {"extensions": {"sse.send": None}, "take_over": take_over}
            assert opening_module.Opening(process.kit, stream, place, scope).take(200, ())
        finally:
            if self.task is asyncio.current_task():
                self.task = None


def _take_over(scope: Any, send: object, stream: Stream, hub: Hub, size: int) -> bool:
    return scope["take_over"](stream, hub)  # type: ignore[no-any-return]


@contextmanager
def fine_grained() -> Iterator[None]:
    """
    Make every bound of the core so small that a few events and streams reach it.

    And lead what `app.routes` takes from its server to the simulated connections.
    """
    changes: list[tuple[Any, str, Any]] = [
        (hub_module, "_STRIDE", 1),
        (hub_module, "PIECE_BYTES", 400),
        (window_module, "_SCAN_ENTRIES", 5),
        (window_module, "_SCAN_TOPICS", 8),
        (window_module, "_LINE_ENTRIES", 3),
        (reader_module, "_REPLY_BYTES", 3_000),
        (reader_module, "_FIRST_COUNT", 5),
        (routes_module, "request", _Request()),
        (opening_module, "take_over", _take_over),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class World:
    """
    All of it, and its time.

    Args:
        cost: Seconds that pass with each look of a hub at its clock: work takes time.
        calm: Nothing happens to the log; then no client that is back in time may
            ever hear of a loss.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        pace: Pace | None = None,
        retention_seconds: float | None = None,
        max_events: int = 1_000_000,
        window_bytes: int = 1 << 30,
        read_count: int = 100,
        cost: float = 0.0,
        calm: bool = False,
    ) -> None:
        self.loop = VirtualLoop()
        self.random = Random(seed)
        self.pace = pace or Pace(heartbeat=1.0, history=8.0, slow_consumer=2.0, max_age=60.0)
        self.settings = Settings(
            heartbeat_seconds=self.pace.heartbeat,
            history_seconds=self.pace.history,
            max_age_seconds=self.pace.max_age,
            slow_consumer_seconds=self.pace.slow_consumer,
        )
        self.server = Server(self.loop, retention_seconds or self.pace.retention, max_events, self.tell)
        self.window_bytes = window_bytes
        self.read_count = read_count
        self.cost = cost
        self.calm = calm
        self.late = 0.0
        self.reasons: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()
        self.processes: list[Process] = []
        self.clients: list[Client] = []
        self.trace: list[str] = []
        self._held_until = 0.0
        self._background: set[asyncio.Task[Any]] = set()

    def close(self) -> None:
        for _ in range(3):
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            while self.loop.busy():
                with suppress(BaseException):
                    self.loop.turn()
        self.loop.close()

    def tell(self, what: str) -> None:
        """Keep *what* for whoever has to understand a failure."""
        self.trace.append(f"{self.loop.now:10.4f} {what}")

    def clock(self) -> float:
        self.loop.now += self.cost
        return self.loop.now

    def task(self, work: Any) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def start(self) -> Process:
        process = Process(self, f"p{len(self.processes)}")
        self.processes.append(process)
        return process

    def client(self, *topics: str) -> Client:
        client = Client(self, f"c{len(self.clients)}", topics)
        self.clients.append(client)
        return client

    @property
    def alive(self) -> list[Process]:
        return [process for process in self.processes if process.alive]

    def told_of_loss(self, client: Client, event: ServerSentEvent) -> None:
        if self.calm and client.honest:
            behind = self.loop.now - (client.current_at or 0.0)
            assert behind > self.pace.history - self.late, (
                f"{client.name} had read all {behind} s ago and heard of a loss: {event!r}"
            )

    def promote(self, lost: int, offset_ms: int) -> None:
        """Another server takes over, which the newest *lost* entries never reached."""
        server = self.server
        before = server.history
        records = server.lose(lost, offset_ms)
        for process in self.alive:
            read = process.history == before and process.reader.loaded and bool(records)
            if read and process.reader._read.cursor >= records[0].position and not server.cut_short:
                process.must_announce = True
        self.break_all()

    def replace(self) -> None:
        """An empty server takes over."""
        self.server.flush(abrupt=True)
        self.break_all()

    def break_all(self) -> None:
        for process in self.processes:
            process.log.break_off()

    # --- time

    def turn(self) -> None:
        """One turn of the loop; then everybody who reads has read."""
        self.loop.turn()
        for client in self.clients:
            client.settle()

    def run(self, seconds: float) -> None:
        """Let *seconds* pass, with every timer at its time."""
        loop = self.loop
        end = loop.now + seconds
        turns = 0
        while True:
            while loop.busy():
                turns += 1
                assert turns < 100_000, "the loop never comes to rest"
                self.turn()
            due = loop.next_timer()
            if due is None or due > loop.now:
                self.check_silence(end if due is None else min(due, end))
            if due is None or due > end:
                break
            loop.now = max(loop.now, due)
            self.turn()
        loop.now = max(loop.now, end)
        self.turn()

    def hold(self, seconds: float) -> None:
        """Let *seconds* pass in which nobody has a turn."""
        self.loop.now += seconds
        self._held_until = self.loop.now + self.pace.tick

    def check(self) -> None:
        for process in self.alive:
            process.check()

    def check_silence(self, now: float) -> None:
        # Work that takes time makes everything late by as much.
        if self.loop.now > self._held_until and self.cost == 0:
            for process in self.alive:
                process.check_silence(now)

    # --- rest

    def come_to_rest(self) -> None:
        """
        Heal everything, let everybody come back, and see that nobody lacks anything.
        """
        if not any(process.alive and not process.kit.draining for process in self.processes):
            self.start()
        for process in self.alive:
            process.log.away = False
            process.log.delay = 0.0
        for client in self.clients:
            client.reading = True
        for _ in range(40):
            self.run(0.6)
            for client in self.clients:
                ready = [process for process in self.alive if process.open_for_streams()]
                if client.away and ready:
                    client.connect(self.random.choice(ready), turns=1, room=1_000)
            if not self._restless():
                break
        assert not (why := self._restless()), why
        self.check()

    def _restless(self) -> str:
        server = self.server
        for process in self.alive:
            if process.reader._read.epoch != server.epoch:
                return f"{process.name} does not know the epoch"
            for wire in process.wires.values():
                if wire.ledger.gap:
                    return f"{wire.stream.id} was never told of {wire.ledger.gap}"
        for client in self.clients:
            if client.wire is None:
                return f"{client.name} has no stream"
            ledger = client.ledger
            if ledger.epoch != server.epoch:
                return f"{client.name} was not told of {server.epoch}, has {client.last_id}"
            if ledger.gap:
                lacking = [self.server.records[n] for n in sorted(ledger.gap)]
                return f"{client.name} was never told that it lacks {lacking}"
            assert ledger.floor is not None
            for record in ledger.owed(ledger.floor, server.last):
                if not record.gone:
                    return f"{client.name} lacks {record}"
        return ""
