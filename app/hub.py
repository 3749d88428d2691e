"""
Which streams want which topic, and every write to them. No sockets, no clock of its own.

Order: entries are added to the window first, then flushed to the live streams.
`settled` is the ordinal up to which every live stream has had what it is owed.
A stream that catches up in the middle of a flush stands past the batch already,
and is passed over. So nothing is sent twice, and nothing is left out.

Where all streams of a subscription are live, a delivery is one call of `send`
and touches nothing else of the stream: its line keeps what all have in common.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from app.event import HEARTBEAT, RUN_ENDS, Entry, Piece, encode, private_length
from app.stream import BEHIND, ENDED, LIVE, Stream, packed, send_nothing
from app.window import Window

# A stream that is behind is given this much at a time, so that one long replay
# is neither a long hold of the loop nor much memory in front of a slow client.
PIECE_BYTES = 65_536
# Between two looks at the clock in a long loop.
_STRIDE = 32


@dataclass(frozen=True, slots=True)
class Pace:
    """The hub's times, in seconds."""

    heartbeat: float
    history: float
    slow_consumer: float
    max_age: float
    expiring: float = 60.0
    slice: float = 0.005

    @property
    def tick(self) -> float:
        """How finely deadlines are kept."""
        return max(0.005, min(0.25, self.heartbeat / 8, self.slow_consumer / 4, self.max_age / 16))

    @property
    def renewal(self) -> float:
        """How long a caught-up stream keeps an id; the next heartbeat brings another."""
        return self.history / 6

    @property
    def retention(self) -> float:
        """
        How long the log keeps what is published.

        Longer than the history: the id with which a client comes back was that
        old already when it left.
        """
        return self.history + self.renewal + self.heartbeat + self.late

    @property
    def late(self) -> float:
        """How late a deadline is met at most: one tick by rounding, one by waiting for it."""
        return 2 * self.tick


@dataclass(slots=True)
class Counts:
    """Figures since the start, read by the metrics."""

    opened: int = 0
    deliveries: int = 0
    bytes: int = 0
    replayed: int = 0
    heartbeats: int = 0
    positions: int = 0
    resets: int = 0
    flushes: int = 0


class _Line:
    """
    The streams of one subscription, and what was written to all of them together.

    Kept once for all: what is in each stream is in nobody's cache, and costs a
    delivery 2 % for each number.

    Attributes:
        sent: events and bytes, `packed`.
        event_at: when the last event went to all of them.
    """

    __slots__ = ("_even", "event_at", "sent", "streams")

    def __init__(self) -> None:
        self.streams: dict[Stream, None] = {}
        self.sent = 0
        self.event_at = 0.0
        self._even: _Even | None = None

    def even(self, end: int) -> "_Even | None":
        """
        Return all streams, with their `send`, if all are live, have one, and were not given what ends at *end*.

        The same object until one of them changes.
        """
        if self._even is None and all(
            stream.state is LIVE and stream.cursor < end and stream.send is not send_nothing for stream in self.streams
        ):
            streams = list(self.streams)
            self._even = streams, [stream.send for stream in streams]
        return self._even

    def changed(self) -> None:
        """Take note that a stream came, went, or is live no more."""
        self._even = None

    def sends(self, streams: Sequence[Stream]) -> list[Callable[[bytes], int]] | None:
        """Return the `send` of each of *streams*, if `even` returned them and nothing has changed since."""
        return self._even[1] if self._even is not None and self._even[0] is streams else None


_Even = tuple[list[Stream], list[Callable[[bytes], int]]]


# What one flush owes some streams: the piece, how many events, which streams,
# and their line, if they are all of it.
_Part = tuple[Piece, int, Sequence[Stream], _Line | None]


class Hub:
    """
    All streams of this process.

    `wake` is called when `pump` has something to do. `ended` is called with
    each stream that has ended, once.
    """

    def __init__(
        self,
        window: Window,
        pace: Pace,
        clock: Callable[[], float],
        random: Random,
    ) -> None:
        self.window = window
        self.pace = pace
        self.clock = clock
        self.random = random
        self.settled = window.end
        self.counts = Counts()
        self.streams: dict[str, Stream] = {}
        self.wake: Callable[[], None] = lambda: None
        self.ended: Callable[[Stream], None] = lambda stream: None
        self._topics: dict[str, _Line] = {}
        # Subscriptions that are prefixes, by length: one look-up per length in
        # use tells who wants a topic.
        self._prefixes: dict[int, dict[str, _Line]] = {}
        self._behind: deque[Stream] = deque()
        self._wheel: dict[int, dict[Stream, None]] = {}
        self._tick = math.floor(clock() / pace.tick)
        self._position: tuple[int, str, Piece] | None = None
        # The flush under way: streams of an even line, how many of them have had
        # their piece, and where they stand since. Their own cursors lag.
        self._served: tuple[Sequence[Stream], int, int] | None = None
        self._served_of: object = None
        self._served_set: set[Stream] = set()
        # A flush that pauses: streams, from where on their turn is still to come, and
        # what their line has counted for them already.
        self._ahead: tuple[Sequence[Stream], int, int] | None = None
        self._ahead_set: set[Stream] = set()

    def __len__(self) -> int:
        return len(self.streams)

    # --- a stream's life -----------------------------------------------------

    def add(self, stream: Stream, preamble: bytes) -> None:
        """
        Begin *stream*, whose sink and cursor are set; *preamble* goes out first.

        A stream whose cursor is the head is live at once, others replay.
        """
        now = self.clock()
        stream.opened_at = stream.event_at = stream.beat_at = now
        stream.end_at = now + self.random.uniform(0.8 * self.pace.max_age, self.pace.max_age - self.pace.late)
        self._set_deadline(stream)
        self.streams[stream.id] = stream
        for topic in stream.topics:
            line = self._line(topic)
            line.streams.setdefault(stream)
            line.changed()
            stream.sent -= line.sent
        self.counts.opened += 1
        self._schedule(stream, now)
        if stream.cursor == self.window.end:
            stream.state = LIVE
            self._write(stream, _first(stream, preamble))
            self._end_if_over(stream)
        else:
            stream.pending = preamble
            self._queue(stream)

    def renew(self, stream: Stream, expires_at: float) -> None:
        """Let *stream* go on until *expires_at*, by the hub's clock; it is warned anew."""
        if stream.state is not ENDED:
            stream.expires_at = expires_at
            stream.warned = False
            self._set_deadline(stream)
            self._schedule(stream, self.clock())

    def end(self, stream: Stream, reason: str, farewell: bytes = b"") -> None:
        """End *stream* cleanly for *reason*; *farewell* is the last that it reads."""
        if self._forget(stream, reason):
            # What waits goes first: the head, without which an answer is an error, and
            # a `stream.reset`. Whoever left with the id of a later farewell and had
            # not read that would never hear of the loss.
            farewell = stream.pending + farewell
            stream.sink.close(_first(stream, farewell) if farewell else None)
            self._told(stream)

    def cut(self, stream: Stream, reason: str) -> None:
        """End *stream* by cutting its connection."""
        if self._forget(stream, reason):
            stream.sink.abort()
            self._told(stream)

    def gone(self, stream: Stream, reason: str = "client_gone") -> None:
        """Take note that *stream*'s connection has ended by itself."""
        if self._forget(stream, reason):
            self._told(stream)

    def writable(self, stream: Stream) -> None:
        """Take note that *stream*'s connection has taken all that waited."""
        if stream.state is ENDED or not stream.waiting:
            return
        stream.waiting = False
        self._queue(stream)

    # --- events --------------------------------------------------------------

    def flush(self, entries: Sequence[Entry]) -> Iterator[None]:
        """
        Write *entries*, the window's newest, to the live streams that want them.

        One write per stream with all that it is owed. Yields when a slice of
        time is used up; go on with the iterator after other work had its turn.
        """
        end = self.window.end
        clock = self.clock
        now = clock()
        until = now + self.pace.slice
        self.counts.flushes += 1
        for part in self._plan(entries):
            if part is not None:
                piece, events, streams, line = part
                if line is not None:
                    line.sent += packed(events, piece.size)
                at = 0
                while at < len(streams):
                    # Looked at again each time: other work may have had its turn.
                    if line is not None and (sends := line.sends(streams)) is not None:
                        line.event_at = now
                        at = self._fan_out_even(piece, events, streams, sends, at, end)
                    else:
                        self._fan_out(piece, events, streams[at : at + _STRIDE], line is not None, end)
                        at += _STRIDE
                    now = clock()
                    if now > until:
                        if line is not None:
                            self._ahead = streams, at, packed(events, piece.size)
                        yield
                        if line is not None:
                            self._ahead = None
                            self._ahead_set.clear()
                        now = clock()
                        until = now + self.pace.slice
            now = clock()
            if now > until:
                yield
                now = clock()
                until = now + self.pace.slice
        self.settled = end
        self._served = self._served_of = None
        self._served_set.clear()
        for entry in entries:
            if entry.event in RUN_ENDS:
                for stream in self._wanted(entry.topics)[0]:
                    self._end_if_over(stream)

    def _fan_out(self, piece: Piece, events: int, streams: Sequence[Stream], counted: bool, end: int) -> None:
        """
        Write *piece* to those of *streams* that are live and have not had it.

        *counted*: the streams' line has counted it, for those who do not get it too.
        """
        now = self.clock()
        chunk = piece.chunk
        length = len(chunk)
        more = packed(events, piece.size)
        count = 0
        for stream in streams:
            if stream.state is LIVE and stream.cursor < end:
                stream.cursor = end
                stream.event_at = now
                if not counted:
                    stream.sent += more
                count += 1
                try:
                    sent = stream.send(chunk)
                except OSError:
                    sent = 0  # the sink meets the same error, and knows what to do
                if sent != length and not stream.sink.write(piece, sent):
                    self._hold(stream)
            elif counted and stream.state is not ENDED:
                stream.sent -= more
        self.counts.deliveries += count * events
        self.counts.bytes += count * piece.size

    def _fan_out_even(
        self, piece: Piece, events: int, streams: Sequence[Stream], sends: list[Callable[[bytes], int]], at: int, end: int
    ) -> int:
        """
        Write *piece* to some of *streams* from index *at* on; return the index of the next.

        All are live and have not had it. The one loop of which every step
        counts: each takes 1 % of a delivery.
        """
        chunk = piece.chunk
        length = len(chunk)
        count = 0
        for count, send in enumerate(sends[at : at + _STRIDE], 1):  # noqa: B007  used behind the loop
            try:
                sent = send(chunk)
            except OSError:
                sent = 0  # the sink meets the same error, and knows what to do
            if sent != length:
                break
        else:
            sent = length
        self.counts.deliveries += count * events
        self.counts.bytes += count * piece.size
        at += count
        self._served = streams, at, end
        if sent != length:
            # The caller looks again whether the others are as they were.
            stream = streams[at - 1]
            if not stream.sink.write(piece, sent):
                self._hold(stream)
        return at

    def pump(self) -> bool:
        """
        Serve the streams that are behind, in turn, for one slice of time.

        Returns:
            Whether some are still to be served.
        """
        until = self.clock() + self.pace.slice
        while self._behind:
            stream = self._behind.popleft()
            stream.queued = False
            if stream.state is BEHIND and not stream.waiting:
                self._serve(stream)
            if self.clock() > until:
                break
        return bool(self._behind)

    def reset(self, reason: str) -> None:
        """
        Tell all streams that history was lost; they go on from the window's end.

        The client has to fetch its state again: what it missed is not known.
        """
        block = self._reset_block(reason)
        self.counts.resets += len(self.streams)
        self.settled = self.window.end
        for stream in self.streams.values():
            self._turn(stream, BEHIND)
            stream.cursor = self.window.end
            stream.pending += block
            self._queue(stream)

    def tell(self, stream: Stream, block: bytes) -> None:
        """Write *block*, which carries no id, to *stream*; behind what waits for it."""
        if stream.state is LIVE:
            self._write(stream, Piece(block))
        elif stream.state is not ENDED:
            stream.pending += block
            self._queue(stream)

    def reset_block(self, reason: str, **detail: object) -> bytes:
        """Return the `stream.reset` of one stream that is about to be added."""
        self.counts.resets += 1
        return self._reset_block(reason, **detail)

    # --- time ----------------------------------------------------------------

    def tick(self) -> Iterator[None]:
        """
        Look at the streams that are due: heartbeat, position, age, progress.

        Yields as `flush` does.
        """
        now = self.clock()
        until = now + self.pace.slice
        reached = math.floor(now / self.pace.tick)
        while self._tick < reached:
            self._tick += 1
            for count, stream in enumerate(list(self._wheel.get(self._tick, ()))):
                if stream.state is not ENDED and stream.due == self._tick:
                    self._visit(stream, now)
                if count % _STRIDE == 0 and self.clock() > until:
                    yield
                    now = self.clock()
                    until = now + self.pace.slice
            self._wheel.pop(self._tick, None)

    def position(self, stream: Stream) -> int:
        """Return the cursor of *stream*: everything before it has been written to it."""
        if stream.state is not LIVE:
            return stream.cursor
        if self._served is not None:
            streams, count, end = self._served
            if self._served_of is not self._served:
                self._served_of, self._served_set = self._served, set(streams[:count])
            if stream in self._served_set:
                return end
        return max(stream.cursor, self.settled)

    def owed(self, stream: Stream) -> int:
        """Return how many events of its topics *stream* has not been given yet."""
        return self.window.count(stream.topics, self.position(stream))

    # --- inside --------------------------------------------------------------

    def _plan(self, entries: Sequence[Entry]) -> Iterator[_Part | None]:
        """
        Group *entries* so that streams owed the same share one piece.

        Yields None between steps, too, where the caller may pause.
        """
        kinds: dict[tuple[str, ...], list[int]] = {}
        for number, entry in enumerate(entries):
            if entry.topics:
                kinds.setdefault(entry.topics, []).append(number)
        if len(kinds) == 1:
            [(topics, numbers)] = kinds.items()
            streams, line = self._wanted(topics)
            if streams:
                yield _piece([entries[number] for number in numbers]), len(numbers), streams, line
            return
        # What a stream is owed grows kind by kind. Equal growth leads to the same
        # node, so that the cost is one step per stream and kind, however many
        # entries of how many topics a batch mixes.
        nodes: list[tuple[int, list[int]]] = [(0, [])]
        owed: dict[Stream, int] = {}
        for topics, numbers in kinds.items():
            grown: dict[int, int] = {}
            for stream in self._wanted(topics)[0]:
                before = owed.get(stream, 0)
                node = grown.get(before)
                if node is None:
                    node = grown[before] = len(nodes)
                    nodes.append((before, numbers))
                owed[stream] = node
            yield None
        shared: dict[int, list[Stream]] = {}
        for stream, node in owed.items():
            shared.setdefault(node, []).append(stream)
        for leaf, streams in shared.items():
            members: list[int] = []
            node = leaf
            while node:
                node, numbers = nodes[node]
                members += numbers
            members.sort()
            yield _piece([entries[number] for number in members]), len(members), streams, None

    def _wanted(self, topics: tuple[str, ...]) -> tuple[Sequence[Stream], _Line | None]:
        """
        Return the streams of *topics*, each once, as a list that may be iterated slowly.

        With the line that they are, if they are of one.
        """
        found: list[_Line] = []
        for topic in topics:
            line = self._topics.get(topic)
            if line:
                found.append(line)
            for length, prefixes in self._prefixes.items():
                line = prefixes.get(topic[:length])
                if line and length >= private_length(topic):
                    found.append(line)
        if len(found) == 1:
            even = found[0].even(self.window.end)
            return even[0] if even else list(found[0].streams), found[0]
        return list({stream: None for line in found for stream in line.streams}), None

    def _serve(self, stream: Stream) -> None:
        """Give one piece to a stream that is behind; it becomes live when it has all."""
        if stream.cursor < self.window.first:
            # What it is owed next is no longer kept. It takes what it is given, so
            # it is told, and goes on: only a client that takes nothing is slow.
            stream.pending += self.reset_block("history_lost")
            stream.cursor = self.window.end
        data, cursor, events, last = self.window.pull(stream.topics, stream.cursor, PIECE_BYTES)
        caught_up = cursor == self.window.end
        if stream.pending:
            data = stream.pending + data
            stream.pending = b""
        if caught_up and stream.cursor < cursor and last < cursor:
            # Renew the id at once: the one it came with may be about to leave the window.
            data += self._position_piece(cursor).raw
        stream.cursor = cursor
        stream.sent += packed(events, 0)
        stream.replayed += events
        self.counts.deliveries += events
        self.counts.replayed += events
        if data:
            stream.event_at = self.clock()
            if caught_up:
                self._turn(stream, LIVE)
            self._write(stream, _first(stream, data))
            if stream.state is BEHIND and not stream.waiting:
                self._queue(stream)
        elif caught_up:
            self._turn(stream, LIVE)
        else:
            self._queue(stream)
        self._end_if_over(stream)

    def _end_if_over(self, stream: Stream) -> None:
        """End the reader of a run when it has been given the run's last event."""
        if stream.of_run and stream.state is LIVE and self.window.end_of(stream.topics[0]) is not None:
            self.end(stream, "run_ended")

    def _write(self, stream: Stream, piece: Piece) -> None:
        stream.sent += packed(0, piece.size)
        self.counts.bytes += piece.size
        if not stream.sink.write(piece):
            self._hold(stream)

    def _hold(self, stream: Stream) -> None:
        """Stop writing to *stream* until its connection has room; it is behind from here."""
        if stream.state is ENDED:
            return
        if stream.state is LIVE:
            stream.cursor = self.position(stream)
            self._turn(stream, BEHIND)
        stream.waiting = True
        stream.blocked_at = self.clock()
        stream.unsent = stream.sink.unsent()
        self._schedule(stream, stream.blocked_at)

    def _turn(self, stream: Stream, state: str) -> None:
        """Let *stream*, which has not ended, be live or behind from here."""
        stream.state = state
        for topic in stream.topics:
            self._line(topic).changed()

    def _queue(self, stream: Stream) -> None:
        if not stream.queued and not stream.waiting:
            stream.queued = True
            if not self._behind:
                self.wake()
            self._behind.append(stream)

    def _visit(self, stream: Stream, now: float) -> None:
        pace = self.pace
        if now >= stream.deadline and self._meet_deadline(stream, now):
            return
        if stream.waiting:
            unsent = stream.sink.unsent()
            if unsent < stream.unsent:
                stream.unsent = unsent
                stream.blocked_at = now
            elif now - stream.blocked_at >= pace.slow_consumer:
                self.cut(stream, "slow_consumer")
                return
        elif stream.state is LIVE and now - max(self._event_at(stream), stream.beat_at) >= pace.heartbeat / 2:
            position = self.position(stream)
            # In the middle of a flush the window may have let go of what this
            # stream is about to be given: no id can say where it stands.
            if now - stream.event_at >= pace.renewal and position >= self.window.first:
                stream.event_at = now
                self.counts.positions += 1
                self._write(stream, self._position_piece(position))
            else:
                stream.beat_at = now
                self.counts.heartbeats += 1
                self._write(stream, HEARTBEAT)
        self._schedule(stream, now)

    def _event_at(self, stream: Stream) -> float:
        """Return when *stream*, which is live, was last given an id: by itself or with its line."""
        stream.event_at = max([stream.event_at, *[self._line(topic).event_at for topic in stream.topics]])
        return stream.event_at

    def _set_deadline(self, stream: Stream) -> None:
        """Choose what the wheel compares with: one number, however many ends there are."""
        expiry = stream.expires_at if stream.warned else stream.expires_at - self.pace.expiring
        stream.deadline = min(stream.end_at, expiry)

    def _meet_deadline(self, stream: Stream, now: float) -> bool:
        """End *stream* or warn it, whichever is due; return whether it has ended."""
        if now >= stream.expires_at:
            self.end(stream, "token_expired", encode(event="stream.expired", data=json.dumps({"stream": stream.id})))
            return True
        if now >= stream.end_at:
            self.end(stream, "max_age", self.farewell())
            return True
        stream.warned = True
        self._set_deadline(stream)
        left = {"stream": stream.id, "seconds": round(stream.expires_at - now, 3)}
        self.tell(stream, encode(event="stream.expiring", data=json.dumps(left)))
        return False

    def _schedule(self, stream: Stream, now: float) -> None:
        """Put *stream* on the wheel at its next deadline."""
        if stream.state is ENDED:
            return
        pace = self.pace
        if stream.waiting:
            # A heartbeat is due soon after it has taken all.
            at = now + min(pace.slow_consumer / 4, pace.heartbeat / 2)
        else:
            # Drawn anew each time: one event to all streams must not line up
            # all their heartbeats for ever.
            longest = min(0.95 * pace.heartbeat, pace.heartbeat - pace.late)
            shortest = min(0.7 * pace.heartbeat, longest)
            at = max(stream.event_at, stream.beat_at) + self.random.uniform(shortest, longest)
        at = min(at, stream.deadline)
        due = max(math.ceil(at / pace.tick), self._tick + 1)
        if due != stream.due:
            slot = self._wheel.get(stream.due)
            if slot is not None:
                slot.pop(stream, None)
        stream.due = due
        slot = self._wheel.get(due)
        if slot is None:
            slot = self._wheel[due] = {}
        slot[stream] = None

    def farewell(self, low_ms: int = 0, high_ms: int = 250) -> bytes:
        """Return a block that asks the client to come back within a jittered time."""
        return b"retry: %d\n\n" % self.random.randint(low_ms, high_ms)

    def _position_piece(self, cursor: int) -> Piece:
        """Return `stream.position` of *cursor*, shared by all streams that stand there."""
        id = self.window.id_at(cursor)
        known = self._position
        if known is None or known[0] != cursor or known[1] != id:
            known = (cursor, id, Piece(encode(id=id, event="stream.position")))
            self._position = known
        return known[2]

    def _reset_block(self, reason: str, **detail: object) -> bytes:
        return encode(
            id=self.window.id_at(self.window.end),
            event="stream.reset",
            data=json.dumps({"reason": reason, **detail}),
        )

    def _line(self, topic: str) -> _Line:
        if topic.endswith("*"):
            prefix = topic[:-1]
            return self._prefixes.setdefault(len(prefix), {}).setdefault(prefix, _Line())
        line = self._topics.get(topic)
        if line is None:
            line = self._topics[topic] = _Line()
        return line

    def _forget(self, stream: Stream, reason: str) -> bool:
        """Take *stream* out of everything; False if it had ended before."""
        if stream.state is ENDED:
            return False
        stream.state = ENDED
        stream.reason = reason
        self.streams.pop(stream.id, None)
        for topic in stream.topics:
            line = self._line(topic)
            line.streams.pop(stream, None)
            line.changed()
            stream.sent += line.sent
            if not line.streams:
                self._drop_line(topic)
        if self._ahead is not None:
            streams, at, more = self._ahead
            if not self._ahead_set:
                self._ahead_set = set(streams[at:])
            if stream in self._ahead_set:
                stream.sent -= more
        slot = self._wheel.get(stream.due)
        if slot is not None:
            slot.pop(stream, None)
            if not slot:
                del self._wheel[stream.due]
        return True

    def _drop_line(self, topic: str) -> None:
        if not topic.endswith("*"):
            self._topics.pop(topic, None)
            return
        prefix = topic[:-1]
        prefixes = self._prefixes.get(len(prefix))
        if prefixes is not None:
            prefixes.pop(prefix, None)
            if not prefixes:
                del self._prefixes[len(prefix)]

    def _told(self, stream: Stream) -> None:
        if stream.on_end is not None:
            stream.on_end(stream)
        self.ended(stream)
        # The sink knows the stream: let go, so that both are freed at once and
        # not when the cyclic collector comes by.
        stream.sink = None  # type: ignore[assignment]
        stream.send = send_nothing


def _piece(entries: Sequence[Entry]) -> Piece:
    if len(entries) == 1:
        return Piece(entries[0].block)
    return Piece(b"".join([entry.block for entry in entries]))


def _first(stream: Stream, data: bytes) -> Piece:
    """Return *data* as a piece, behind the head if that is not out yet."""
    head, stream.head = stream.head, b""
    return Piece(data, head)
