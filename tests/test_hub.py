"""Who gets what, when, and how a stream ends. The clock stands still until a test moves it."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from random import Random

import pytest

from app import hub as hub_module
from app.event import HEARTBEAT, Entry, Piece, encode
from app.hub import Hub, Pace
from app.parser import Parser, ServerSentEvent
from app.stream import BEHIND, ENDED, LIVE, Stream
from app.window import Window

PACE = Pace(heartbeat=16.0, history=120.0, slow_consumer=8.0, max_age=1_000.0)


class Taken(Piece):
    """A chunk that went the short way, to be looked at like the piece that it was."""

    def __init__(self, chunk: bytes) -> None:
        super().__init__(chunk[chunk.index(b"\r\n") + 2 : -2])
        self.chunk = chunk


# Kept, so that what is equal here went out as one object.
_taken: dict[int, Taken] = {}


class Sink:
    """A connection that takes everything, until `room` says how many bytes are left."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.room: int | None = None
        self.rest = 0
        self.closed: list[bytes] = []
        self.aborted = 0
        self.on_write = lambda: None

    def send(self, chunk: bytes) -> int:
        """The short way, as `socket.send`: all, or nothing where it is not known that all fits."""
        assert not self.closed
        assert not self.aborted
        assert not self.rest, "sent to while it waits"
        if self.room is not None:
            return 0
        self.pieces.append(_taken.setdefault(id(chunk), Taken(chunk)))
        self.on_write()
        return len(chunk)

    def write(self, piece: Piece, sent: int = 0) -> bool:
        assert not self.closed
        assert not self.aborted
        assert not self.rest, "written to while it waits"
        self.pieces.append(piece)
        self.on_write()
        if self.room is None:
            return True
        self.rest = max(0, piece.size - self.room)
        self.room = max(0, self.room - piece.size)
        return self.rest == 0

    def close(self, piece: Piece | None) -> None:
        self.closed.append(b"" if piece is None else piece.raw)
        if piece is not None:
            self.pieces.append(piece)

    def abort(self) -> None:
        self.aborted += 1

    def unsent(self) -> int:
        return self.rest

    @property
    def raw(self) -> bytes:
        return b"".join(piece.raw for piece in self.pieces)

    @property
    def told(self) -> list[ServerSentEvent]:
        return Parser().feed(self.raw)

    @property
    def data(self) -> list[str]:
        """What ordinary events said."""
        return [event.data for event in self.told if not event.event.startswith("stream.")]

    @property
    def names(self) -> list[str]:
        return [event.event for event in self.told]


class Bench:
    """A hub over a window that begins behind position 0, and its clock."""

    def __init__(self, pace: Pace = PACE, max_bytes: int = 1 << 30, *, short_way: bool = False) -> None:
        self.short_way = short_way
        self.now = 100.0
        self.cost = 0.0
        self.window = Window(max_bytes)
        self.window.reset("e", (0, 0), "e:0-0")
        self.hub = Hub(self.window, pace, self.clock, Random(1))
        self.wakes = 0
        self.hub.wake = self._woken
        self.ended: list[Stream] = []
        self.hub.ended = self.ended.append
        self.number = 0
        self.streams = 0

    def clock(self) -> float:
        self.now += self.cost
        return self.now

    def _woken(self) -> None:
        self.wakes += 1

    def open(self, *topics: str, at: int | None = None, **more: object) -> tuple[Stream, Sink]:
        self.streams += 1
        stream = Stream(f"s{self.streams}", topics, **more)
        sink = stream.sink = Sink()
        if self.short_way:
            stream.send = sink.send
        stream.cursor = self.window.end if at is None else at
        self.hub.add(stream, b"event: stream.open\ndata:\n\n")
        return stream, sink

    def read(self, *rows: tuple[str, ...], data: str = "") -> list[Entry]:
        """Let the window have one more entry for each of *rows*; its data is its number."""
        entries = []
        for topics in rows:
            self.number += 1
            entry = Entry((self.number, 0), f"e:{self.number}-0", topics, f"{self.number}{data}")
            self.window.append(entry)
            entries.append(entry)
        return entries

    def publish(self, *rows: tuple[str, ...], data: str = "") -> None:
        for _ in self.hub.flush(self.read(*rows, data=data)):
            pass

    def pump(self) -> None:
        while self.hub.pump():
            pass

    def taken(self, stream: Stream, sink: Sink) -> None:
        """The client takes all that waits."""
        sink.rest, sink.room = 0, None
        self.hub.writable(stream)

    def wait(self, seconds: float, step: float | None = None) -> None:
        """Let time pass as the pulse does: a tick at a time."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + (step or self.hub.pace.tick))
            for _ in self.hub.tick():
                pass

    def structures(self) -> list[object]:
        """Everything in which the hub holds a stream."""
        hub = self.hub
        return [
            *hub.streams.values(),
            *(s for line in hub._topics.values() for s in line),
            *(s for prefixes in hub._prefixes.values() for line in prefixes.values() for s in line),
            *(s for slot in hub._wheel.values() for s in slot),
            *hub._behind,
        ]


@pytest.fixture(params=["short way", "by the sink"])
def bench(request):
    return Bench(short_way=request.param == "short way")


class TestAdd:
    def test_at_the_head(self, bench):
        """
        A stream that begins at the head is live at once, and has its preamble.
        """
        stream, sink = bench.open("a")

        assert LIVE == stream.state
        assert ["stream.open"] == sink.names
        assert 0 == bench.wakes

    def test_replay_then_live(self, bench):
        """
        A stream with something to replay reads the preamble, what it missed, then live events.
        """
        bench.publish(("a",), ("b",), ("a",))
        stream, sink = bench.open("a", at=bench.window.first)
        assert BEHIND == stream.state
        assert [] == sink.pieces
        bench.pump()
        bench.publish(("a",))

        assert LIVE == stream.state
        assert "stream.open" == sink.names[0]
        assert ["1", "3", "4"] == sink.data

    def test_head(self, bench):
        """
        The response's head goes out once, before the preamble, in the same piece.
        """
        bench.publish(("a",))
        stream, sink = Stream("s", ("a",)), Sink()
        stream.sink, stream.head, stream.cursor = sink, b"HTTP/1.1 200 OK\r\n\r\n", bench.window.first
        bench.hub.add(stream, b"event: stream.open\ndata:\n\n")
        bench.pump()
        bench.publish(("a",))

        assert [True, False] == [piece.chunk.startswith(b"HTTP/1.1 200 OK\r\n\r\n") for piece in sink.pieces]

    def test_client_that_is_gone_already(self, bench):
        """
        A connection that breaks at the first write ends the stream, and nothing holds it.
        """
        stream, sink = Stream("s", ("a",)), Sink()
        stream.sink, stream.cursor = sink, bench.window.end
        sink.on_write = lambda: bench.hub.gone(stream)
        bench.hub.add(stream, b":\n\n")

        assert (ENDED, "client_gone") == (stream.state, stream.reason)
        assert [] == bench.structures()


class TestFlush:
    def test_order_over_topics(self, bench):
        """
        Events of several topics arrive in the order of the log.
        """
        _, sink = bench.open("a", "b")
        bench.publish(("b",), ("a",), ("c",), ("b",), ("a",))

        assert ["1", "2", "4", "5"] == sink.data

    def test_event_on_two_topics(self, bench):
        """
        One event on two of a stream's topics arrives once; so it does for a topic and a prefix.
        """
        _, both = bench.open("a", "b")
        _, prefix = bench.open("a", "*")
        bench.publish(("a", "b"))
        bench.publish(("b",), ("a", "b"), ("a",))

        assert ["1", "2", "3", "4"] == both.data
        assert ["1", "2", "3", "4"] == prefix.data

    def test_other_topics(self, bench):
        """
        Nothing of another topic reaches a stream.
        """
        _, sink = bench.open("a", "deep/*")
        bench.publish(("b",), ("ab",), ("deep",), ("deep/x",), ("de", "ep"))

        assert ["4"] == sink.data

    def test_user_topics(self, bench):
        """
        A prefix reaches a user's own topic only where it begins with `user:`.
        """
        streams = {topic: bench.open(topic)[1] for topic in ("*", "us*", "user*", "user:*", "user:a*", "user:ann")}
        bench.publish(("user:ann",))
        bench.publish(("user:ben",), ("user:ann", "x"))

        assert {
            "*": ["3"],
            "us*": [],
            "user*": [],
            "user:*": ["1", "2", "3"],
            "user:a*": ["1", "3"],
            "user:ann": ["1", "3"],
        } == {topic: sink.data for topic, sink in streams.items()}

    def test_one_write_for_all_that_is_owed(self, bench):
        """
        A batch is one write per stream, and none for a stream that is owed nothing.
        """
        _, a = bench.open("a")
        _, both = bench.open("a", "b")
        _, none = bench.open("c")
        bench.publish(("a",), ("b",), ("a",), ("b",))

        assert [2, 2, 1] == [len(sink.pieces) for sink in (a, both, none)]
        assert [["1", "3"], ["1", "2", "3", "4"]] == [a.data, both.data]

    def test_shared_bytes(self, bench):
        """
        Streams that are owed the same get the same object: framed once, written many times.
        """
        sinks = [bench.open("a", "b")[1] for _ in range(3)] + [bench.open("b", "c", "a")[1]]
        bench.publish(("a",), ("b",), ("a",))

        assert 1 == len({id(sink.pieces[-1]) for sink in sinks})

    def test_broken_entries(self, bench):
        """
        An entry without topics reaches nobody, and its neighbours arrive.
        """
        _, sink = bench.open("*")
        bench.publish((), ("a",), (), ("b",), ())
        bench.publish(())

        assert ["2", "4"] == sink.data

    def test_cost_of_mixed_batches(self, bench):
        """
        What a flush costs grows with streams and kinds of events, not with how they alternate.
        """
        looks = 0
        wanted = bench.hub._wanted

        def counting(topics):
            nonlocal looks
            looks += 1
            return wanted(topics)

        bench.hub._wanted = counting
        _, sink = bench.open("a", "b")
        bench.publish(*[("a",), ("b",)] * 500)

        assert 2 == looks
        assert [str(n) for n in range(1, 1001)] == sink.data

    def test_long_flush(self, bench):
        """
        A flush pauses when its slice of time is used up, however little it has written.
        """
        for number in range(100):
            bench.open(*(f"t{number * k % 97}" for k in range(1, 8)))
        entries = bench.read(*[(f"t{number}",) for number in range(97)])
        bench.cost = 0.002
        began, pauses = bench.now, 0
        longest = 0.0
        for _ in bench.hub.flush(entries):
            longest, began = max(longest, bench.now - began), bench.now
            pauses += 1

        assert pauses > 10
        assert longest <= bench.hub.pace.slice + 3 * bench.cost

    def test_stream_added_in_the_middle(self, bench, monkeypatch):
        """
        A stream that begins during a flush, at the head or before, reads each event once.
        """
        monkeypatch.setattr(hub_module, "_STRIDE", 1)
        first = bench.window.end
        for _ in range(5):
            bench.open("a")
        flush = self.begin(bench, ("a",), ("a",))
        _, fresh = bench.open("a")
        _, replaying = bench.open("a", at=first)
        _, half = bench.open("a", at=first + 1)
        bench.hub.pump()
        self.finish(bench, flush)
        bench.publish(("a",))
        bench.pump()

        assert ["3"] == fresh.data
        assert ["1", "2", "3"] == replaying.data
        assert ["2", "3"] == half.data

    def test_stream_that_ends_in_the_middle(self, bench, monkeypatch):
        """
        Nothing is written to a stream that ended while its turn was still to come.
        """
        monkeypatch.setattr(hub_module, "_STRIDE", 1)
        streams = [bench.open("a") for _ in range(6)]
        flush = self.begin(bench, ("a",))
        for stream, _ in streams:
            bench.hub.end(stream, "evicted", b"retry: 1\n\n")
        self.finish(bench, flush)

        assert {"evicted"} == {stream.reason for stream, _ in streams}
        assert any(not sink.data for _, sink in streams)

    def test_stream_that_is_held_in_the_middle(self, bench, monkeypatch):
        """
        A stream that is held before its turn, by something told that did not fit, gets the batch later.
        """
        streams, flush = self.held(bench, monkeypatch)
        stream, sink = streams[-1]
        assert stream.waiting
        self.finish(bench, flush)
        assert [] == sink.data
        bench.taken(stream, sink)
        bench.pump()
        bench.publish(("a",))

        assert ["1", "2"] == sink.data

    def test_stream_that_is_held_and_catches_up_in_the_middle(self, bench, monkeypatch):
        """
        A stream that was held before its turn, and has caught up by then, has had the batch already.
        """
        streams, flush = self.held(bench, monkeypatch)
        stream, sink = streams[-1]
        bench.taken(stream, sink)
        bench.pump()
        assert (["1"], LIVE) == (sink.data, stream.state)
        self.finish(bench, flush)
        bench.publish(("a",))

        assert [["1", "2"]] * 6 == [each.data for _, each in streams]

    def test_stream_that_is_held_after_its_turn(self, bench, monkeypatch):
        """
        A stream that has had the batch, and is held before the flush is over, does not get it again.
        """
        monkeypatch.setattr(hub_module, "_STRIDE", 1)
        streams = [bench.open("a") for _ in range(6)]
        stream, sink = streams[0]
        flush = self.begin(bench, ("a",))
        assert ["1"] == sink.data
        assert bench.window.end == bench.hub.position(stream)
        sink.room = 1
        bench.hub.tell(stream, b"event: stream.draining\ndata:\n\n")
        assert stream.waiting
        self.finish(bench, flush)
        bench.taken(stream, sink)
        bench.pump()
        bench.publish(("a",))

        assert [["1", "2"]] * 6 == [each.data for _, each in streams]

    def test_one_that_takes_nothing_among_many(self, bench):
        """
        The others get each event once: those before it, and those behind it.
        """
        streams = [bench.open("a") for _ in range(40)]
        held, sink = streams[17]
        sink.room = 0
        bench.publish(("a",))
        bench.publish(("a",))
        assert held.waiting
        bench.taken(held, sink)
        bench.pump()
        bench.publish(("a",))

        assert [["1", "2", "3"]] * 40 == [each.data for _, each in streams]

    def test_one_that_comes_later(self, bench):
        """
        Who joins a topic that others have had events of gets the next ones.
        """
        _, first = bench.open("a")
        bench.publish(("a",))
        _, second = bench.open("a")
        bench.publish(("a",))

        assert [["1", "2"], ["2"]] == [first.data, second.data]

    def test_one_that_comes_before_the_flush(self, bench):
        """
        Who begins when the window has the batch already, and nobody has had it, begins behind it.
        """
        _, first = bench.open("a")
        entries = bench.read(("a",))
        _, second = bench.open("a")
        self.finish(bench, bench.hub.flush(entries))
        bench.publish(("a",))

        assert [["1", "2"], ["2"]] == [first.data, second.data]

    def test_short_way_of_an_ended_stream(self, bench):
        """
        What went with a stream is not called again: its descriptor may be another client's by then.
        """
        streams = [bench.open("a") for _ in range(3)]
        bench.publish(("a",))
        bench.hub.gone(streams[1][0])
        streams[1][1].aborted = 1  # whoever writes to it fails this test
        bench.publish(("a",))

        assert [["1", "2"], ["1"], ["1", "2"]] == [sink.data for _, sink in streams]

    def test_stream_that_begins_while_a_batch_is_planned(self, bench):
        """
        A stream that begins between two topics of a batch begins behind all of it.
        """
        bench.cost = 0.01  # every look at the clock ends the slice
        bench.open("a")
        flush = bench.hub.flush(bench.read(("a",), ("b",)))
        next(flush)
        _, fresh = bench.open("b")
        self.finish(bench, flush)
        bench.publish(("b",))

        assert ["3"] == fresh.data

    def test_quiet_stream_that_is_held(self, bench):
        """
        A live stream stands where the hub has settled, also where its own topics were quiet for long: what
        the window let go of meanwhile was not owed to it.
        """
        stream, sink = bench.open("quiet")
        for _ in range(3):
            bench.publish(("a",), ("a",))
        bench.window.trim_before(bench.window.newest())
        bench.now += 14
        sink.room = 1
        bench.hub._visit(stream, bench.now)
        assert stream.waiting
        bench.taken(stream, sink)
        bench.publish(("quiet",))
        bench.pump()

        assert ["7"] == sink.data
        assert "stream.reset" not in sink.names

    def test_stream_that_takes_only_a_part(self, bench):
        """
        A stream whose connection is full is behind from there, gets nothing, and misses nothing.
        """
        stream, sink = bench.open("a")
        sink.room = 5
        bench.publish(("a",))
        bench.publish(("a",), ("a",))
        assert (BEHIND, True) == (stream.state, stream.waiting)
        assert 2 == len(sink.pieces)
        bench.taken(stream, sink)
        bench.pump()

        assert LIVE == stream.state
        assert ["1", "2", "3"] == sink.data

    def test_slow_stream_harms_nobody(self, bench):
        """
        Others are served as ever while one takes nothing.
        """
        _, slow = bench.open("a")
        _, other = bench.open("a")
        slow.room = 0
        for _ in range(20):
            bench.publish(("a",))

        assert [str(n) for n in range(1, 21)] == other.data

    def test_connection_that_breaks_in_the_middle(self, bench):
        """
        A connection that is found broken ends its stream, and the flush goes on.
        """
        stream, sink = bench.open("a")
        sink.on_write = lambda: bench.hub.gone(stream)
        _, other = bench.open("a")
        bench.publish(("a",), ("a",))

        assert ["1", "2"] == other.data
        assert ["client_gone"] == [ended.reason for ended in bench.ended]

    @staticmethod
    def begin(bench: Bench, *rows: tuple[str, ...]) -> Iterator[None]:
        """Start a flush that pauses after each write, and stop it at its first pause."""
        bench.cost = bench.hub.pace.slice
        flush = bench.hub.flush(bench.read(*rows))
        next(flush)
        bench.cost = 0.0
        return flush

    def held(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[Stream, Sink]], Iterator[None]]:
        """Start a flush to six streams; the last is held before its turn, by something told that did not fit."""
        monkeypatch.setattr(hub_module, "_STRIDE", 1)
        streams = [bench.open("a") for _ in range(6)]
        stream, sink = streams[-1]
        flush = self.begin(bench, ("a",))
        sink.room = 1
        bench.hub.tell(stream, b"event: stream.draining\ndata:\n\n")
        return streams, flush

    @staticmethod
    def finish(bench: Bench, flush: Iterator[None]) -> None:
        bench.cost = bench.hub.pace.slice
        for _ in flush:
            pass
        bench.cost = 0.0


class TestPositions:
    """Every id written to a stream is that stream's own position."""

    def test_behind_events_of_others(self, bench):
        """
        A replay that ends past events of others says so: its last event's id may soon be lost.
        """
        bench.publish(("a",), ("b",))
        _, sink = bench.open("a", at=bench.window.first)
        bench.pump()

        assert ["stream.open", "message", "stream.position"] == sink.names
        assert "e:2-0" == sink.told[-1].id

    def test_replay_that_ends_with_its_own(self, bench):
        """
        Where the last event says it already, there is no position beside it.
        """
        bench.publish(("b",), ("a",))
        _, sink = bench.open("a", at=bench.window.first)
        bench.pump()

        assert ["stream.open", "message"] == sink.names

    def test_in_the_middle_of_a_flush(self, bench, monkeypatch):
        """
        A quiet stream that is renewed during a flush stands before the batch.

        Part of the batch may be owed to it, and is still to come.
        """
        monkeypatch.setattr(hub_module, "_STRIDE", 1)
        bench.publish(("b",))
        streams = [bench.open("a") for _ in range(6)]
        bench.now += 30
        flush = TestFlush.begin(bench, ("a",), ("b",))
        stream, sink = streams[-1]
        bench.hub._visit(stream, bench.now)
        TestFlush.finish(bench, flush)

        assert ["stream.open", "stream.position", "message"] == sink.names
        assert ["", "e:1-0", "e:2-0"] == [event.id for event in sink.told]

    def test_window_that_let_go_in_the_middle_of_a_flush(self, monkeypatch):
        """
        A stream whose next event has left the window already gets a heartbeat instead of a lie.
        """
        monkeypatch.setattr(hub_module, "_STRIDE", 1)
        bench = Bench(max_bytes=700)
        bench.publish(("b",))
        streams = [bench.open("a") for _ in range(6)]
        bench.now += 30
        flush = TestFlush.begin(bench, ("a",), ("a",), ("a",))
        stream, sink = streams[-1]
        bench.hub._visit(stream, bench.now)
        TestFlush.finish(bench, flush)

        assert ["2", "3", "4"] == sink.data
        assert "stream.position" not in sink.names
        assert HEARTBEAT.raw in sink.raw

    def test_position_after_a_reset(self, bench):
        """
        A position that was made before a reset is not used after it.
        """
        bench.publish(("b",))
        _, sink = bench.open("a")
        bench.wait(40)
        assert "e:1-0" == sink.told[-1].id
        bench.window.reset("f", (9, 0), "f:9-0")
        bench.hub.reset("epoch_changed")
        bench.pump()
        bench.wait(40)

        assert "stream.position" == sink.names[-1]
        assert {"f:9-0"} == {event.id for event in sink.told[sink.names.index("stream.reset") :]}

    def test_quiet_stream(self, bench):
        """
        A quiet stream's id is renewed several times per history.
        """
        _, sink = bench.open("a")
        for _ in range(12):
            bench.publish(("b",))
            bench.wait(10)

        ids = [event.id for event in sink.told if event.event == "stream.position"]
        assert len(ids) >= 3
        assert len(set(ids)) == len(ids)

    def test_position_of_a_live_stream(self, bench):
        """
        A live stream stands where the last flush ended, though nothing was written to it.
        """
        stream, _ = bench.open("a")
        bench.publish(("b",), ("b",))

        assert bench.window.end == bench.hub.position(stream)


class TestPump:
    def test_long_replay_in_pieces(self, bench):
        """
        A replay goes out in bounded pieces, in order, and nothing of it twice.
        """
        bench.publish(*[("a",)] * 300, data="x" * 1000)
        _, sink = bench.open("a", at=bench.window.first)
        bench.pump()

        assert [f"{n}" + "x" * 1000 for n in range(1, 301)] == sink.data
        assert max(piece.size for piece in sink.pieces) < hub_module.PIECE_BYTES + 2000
        assert len(sink.pieces) >= 4

    def test_turns(self, bench, monkeypatch):
        """
        Streams that are behind take turns: a long replay does not keep a short one waiting.
        """
        monkeypatch.setattr(hub_module, "PIECE_BYTES", 100)
        bench.publish(*[("long",)] * 100, ("short",))
        _, long = bench.open("long", at=bench.window.first)
        _, short = bench.open("short", at=bench.window.first)
        bench.cost = 0.001
        while not short.data:
            assert bench.hub.pump()

        assert len(long.data) < 20

    def test_slice(self, bench, monkeypatch):
        """
        A pump ends with its slice of time, and says that there is more.
        """
        monkeypatch.setattr(hub_module, "PIECE_BYTES", 1)
        bench.publish(*[("a",)] * 50)
        bench.open("a", at=bench.window.first)
        bench.cost = 0.001
        began = bench.now

        assert bench.hub.pump()
        assert bench.now - began <= 2 * bench.hub.pace.slice

    def test_events_during_a_replay(self, bench, monkeypatch):
        """
        What is published during a replay comes once, behind it.
        """
        monkeypatch.setattr(hub_module, "PIECE_BYTES", 1)
        bench.publish(*[("a",)] * 5)
        stream, sink = bench.open("a", at=bench.window.first)
        bench.cost = bench.hub.pace.slice
        while stream.state is BEHIND:
            bench.hub.pump()
            if bench.number < 8:
                bench.publish(("a",))
        bench.publish(("a",))

        assert [str(n) for n in range(1, bench.number + 1)] == sink.data

    def test_wake(self, bench):
        """
        Whenever somebody has to be served and nobody was, the pulse is woken, once.
        """
        bench.publish(("a",))
        bench.open("a", at=bench.window.first)
        bench.open("a", at=bench.window.first)
        assert 1 == bench.wakes
        bench.pump()
        bench.open("a", at=bench.window.first)

        assert 2 == bench.wakes

    def test_wake_when_a_connection_has_room(self, bench):
        """
        So it is when a connection has taken all.
        """
        stream, sink = bench.open("a")
        sink.room = 0
        bench.publish(("a",))
        assert 0 == bench.wakes
        bench.taken(stream, sink)

        assert 1 == bench.wakes

    def test_full_connection_is_not_served(self, bench):
        """
        A stream whose connection is full waits for it, and costs no turn.
        """
        stream, sink = bench.open("a")
        sink.room = 0
        bench.publish(("a",))
        bench.hub.reset("epoch_changed")

        assert not bench.hub.pump()
        assert not stream.queued

    def test_room_that_nobody_waited_for(self, bench):
        """
        A connection that says it has room, and was never full, changes nothing.
        """
        stream, _ = bench.open("a")
        bench.hub.writable(stream)

        assert LIVE == stream.state
        assert 0 == bench.wakes

    def test_stream_that_fell_out_of_the_window(self, bench):
        """
        A stream that takes what it is given is told of the loss, never cut as slow.
        """
        bench.publish(*[("a",)] * 5)
        stream, sink = bench.open("a", at=bench.window.first + 1)
        bench.window.trim_before((4, 0))
        bench.pump()
        bench.publish(("a",))

        assert ["stream.open", "stream.reset", "message"] == sink.names
        assert '{"reason": "history_lost"}' == sink.told[1].data
        assert ["e:5-0", "e:6-0"] == [event.id for event in sink.told[1:]]
        assert LIVE == stream.state

    def test_at_the_boundary(self, bench):
        """
        A stream that stands at the window's beginning has missed nothing.
        """
        bench.publish(*[("a",)] * 5)
        _, sink = bench.open("a", at=bench.window.first + 3)
        bench.window.trim_before((4, 0))
        bench.pump()

        assert ["4", "5"] == sink.data
        assert "stream.reset" not in sink.names


class TestReset:
    def test_everybody_is_told(self, bench):
        """
        Live, replaying and waiting streams all read of the loss, and then what is new.
        """
        bench.publish(*[("a",)] * 3)
        _, live = bench.open("a")
        _, replaying = bench.open("a", at=bench.window.first)
        waiting, full = bench.open("a")
        full.room = 0
        bench.publish(("a",))
        bench.window.reset("f", (9, 0), "f:9-0")
        bench.hub.reset("epoch_changed")
        bench.number = 9
        bench.taken(waiting, full)
        bench.publish(("a",))
        bench.pump()

        for sink in (live, replaying, full):
            assert "stream.reset" == sink.names[-2]
            assert '{"reason": "epoch_changed"}' == sink.told[-2].data
            assert "f:9-0" == sink.told[-2].id
            assert "10" == sink.data[-1]

    def test_replay_of_before(self, bench):
        """
        A replay that was under way ends: what is left of it is not owed any more.
        """
        bench.publish(*[("a",)] * 3)
        _, sink = bench.open("a", at=bench.window.first)
        bench.window.reset("f", (9, 0), "f:9-0")
        bench.number = 9
        bench.read(("a",), ("a",))
        bench.hub.reset("trimmed")
        bench.pump()

        assert ["stream.open", "stream.reset"] == sink.names
        assert "e:11-0" == sink.told[-1].id

    def test_twice(self, bench):
        """
        Two losses before a stream could be told are two announcements, in order.
        """
        _, sink = bench.open("a")
        for epoch in ("f", "g"):
            bench.window.reset(epoch, (9, 0), f"{epoch}:9-0")
            bench.hub.reset("epoch_changed")
        bench.pump()

        assert ["f:9-0", "g:9-0"] == [event.id for event in sink.told[1:]]

    def test_reset_of_one_stream(self, bench):
        """
        A stream that begins with a loss reads why, with the position to go on from.
        """
        bench.publish(("a",))
        block = bench.hub.reset_block("history_lost", name="Last-Event-ID")
        [event] = Parser().feed(block)

        assert ("stream.reset", '{"reason": "history_lost", "name": "Last-Event-ID"}', "e:1-0") == (
            event.event,
            event.data,
            event.id,
        )
        assert 1 == bench.hub.counts.resets


class TestTell:
    def test_once_whatever_it_does(self, bench):
        """
        What a stream is told reaches it, also where it is behind, and moves nobody's id.
        """
        bench.publish(("a",), ("a",))
        _, live = bench.open("a")
        _, replaying = bench.open("a", at=bench.window.first)
        waiting, full = bench.open("a")
        full.room = 0
        bench.publish(("a",))
        for stream in list(bench.hub.streams.values()):
            bench.hub.tell(stream, b"event: stream.draining\ndata: {}\n\n")
        bench.taken(waiting, full)
        bench.pump()

        for sink in (live, replaying, full):
            assert 1 == sink.names.count("stream.draining")
            at = sink.names.index("stream.draining")
            assert sink.told[at].id == ("" if at == 0 else sink.told[at - 1].id)


class TestOwed:
    def test_counts_what_was_not_written(self, bench):
        """
        A live stream is owed nothing; one that is behind, the events of its own topics.
        """
        bench.publish(("a",), ("b",))
        live, _ = bench.open("a")
        behind, _ = bench.open("a", at=bench.window.first)
        prefix, _ = bench.open("*", at=bench.window.first)
        blocked, full = bench.open("b")
        full.room = 0
        bench.publish(("b",), ("a",), ("b",))
        bench.publish(("b",))

        assert [0, 2, 6] == [bench.hub.owed(stream) for stream in (live, behind, prefix)]
        # The flush that it could not take is with its connection.
        assert 1 == bench.hub.owed(blocked)


class TestEnds:
    @pytest.mark.parametrize("how", ["end", "cut", "gone"])
    @pytest.mark.parametrize("state", ["live", "behind", "waiting"])
    def test_nothing_holds_it(self, bench, how, state):
        """
        An ended stream is in no structure of the hub, whatever it was doing.
        """
        bench.publish(("a",))
        stream, sink = bench.open("a", "deep/*", "*", at=bench.window.first if state == "behind" else None)
        if state == "waiting":
            sink.room = 0
            bench.publish(("a",))
        getattr(bench.hub, how)(stream, "evicted")
        bench.pump()

        assert [] == bench.structures()
        assert {} == bench.hub._topics == bench.hub._prefixes
        assert ("evicted", ENDED, None) == (stream.reason, stream.state, stream.sink)

    def test_once_for_one_reason(self, bench):
        """
        The first reason holds, and everybody is told once.
        """
        told: list[Stream] = []
        stream, sink = bench.open("a", on_end=told.append)
        bench.hub.end(stream, "max_age", b"retry: 1\n\n")
        bench.hub.cut(stream, "slow_consumer")
        bench.hub.gone(stream)
        bench.hub.end(stream, "draining")

        assert "max_age" == stream.reason
        assert [stream] == told == bench.ended
        assert [b"retry: 1\n\n"] == sink.closed
        assert 0 == sink.aborted

    def test_room_after_the_end(self, bench):
        """
        A connection that has room after its stream's end wakes nobody.
        """
        stream, sink = bench.open("a")
        sink.room = 0
        bench.publish(("a",))
        bench.hub.cut(stream, "evicted")
        bench.hub.writable(stream)

        assert 0 == bench.wakes
        assert [] == bench.structures()

    def test_before_the_head_went_out(self, bench):
        """
        A stream that ends before its first piece gets its head and its preamble first.
        """
        bench.publish(("a",))
        stream, sink = Stream("s", ("a",)), Sink()
        stream.sink, stream.head, stream.cursor = sink, b"HTTP/1.1 200 OK\r\n\r\n", bench.window.first
        bench.hub.add(stream, b"event: stream.open\ndata:\n\n")
        bench.hub.end(stream, "draining", b"retry: 9\n\n")

        [piece] = sink.pieces
        assert piece.chunk.startswith(b"HTTP/1.1 200 OK\r\n\r\n")
        assert b"event: stream.open\ndata:\n\nretry: 9\n\n" == piece.raw

    @pytest.mark.parametrize("state", ["live", "waiting"])
    def test_before_a_loss_was_told(self, bench, state):
        """
        A stream that ends between a loss and its turn to hear of it reads the reset before its farewell.

        That may carry an id, and who comes back with it is told of no loss any more.
        """
        stream, sink = bench.open("a")
        if state == "waiting":
            sink.room = 0
            bench.publish(("a",))
            assert stream.waiting
        bench.window.reset("f", (9, 0), "f:9-0")
        bench.hub.reset("epoch_changed")
        farewell = encode(id=bench.window.id_at(bench.hub.position(stream)), event="stream.evicted")
        bench.hub.end(stream, "evicted", farewell)

        assert ["stream.reset", "stream.evicted"] == sink.names[-2:]
        assert ["f:9-0", "f:9-0"] == [event.id for event in sink.told[-2:]]

    def test_neighbours_stay(self, bench):
        """
        A topic goes on for the others.
        """
        stream, _ = bench.open("a", "b/*")
        _, other = bench.open("a", "b/*")
        bench.hub.gone(stream)
        bench.publish(("a",), ("b/x",))

        assert ["1", "2"] == other.data

    def test_many_lives(self, bench):
        """
        Thousands of streams that came and went leave nothing behind.
        """
        for number in range(3000):
            stream, _ = bench.open(f"t{number}", f"p{number}/*", "a")
            bench.hub.gone(stream)
        bench.wait(60)

        assert [] == bench.structures()
        assert {} == bench.hub._wheel == bench.hub._topics == bench.hub._prefixes


class TestHeartbeat:
    @pytest.mark.parametrize("heartbeat", [0.02, 0.3, 1.0, 5.0, 16.0, 300.0])
    def test_silence(self, heartbeat):
        """
        No silence is longer than the heartbeat, however coarse the ticks are.
        """
        bench = Bench(Pace(heartbeat=heartbeat, history=86_400, slow_consumer=10, max_age=86_400))
        written: dict[int, list[float]] = {}
        for number in range(30):
            bench.wait(heartbeat / 37)
            _, sink = bench.open("a")
            times = written[number] = [bench.now]
            sink.on_write = lambda times=times: times.append(bench.now)
        bench.wait(10 * heartbeat)

        gaps = [b - a for times in written.values() for a, b in pairwise(times)]
        assert max(gaps) <= heartbeat + 1e-9
        assert min(gaps) >= heartbeat / 2

    def test_stream_without_topics(self, bench):
        """
        A stream that no event of the log reaches, as the operator's, hears them too.
        """
        bench.open()
        bench.wait(40)

        # One of them renews its position at the same time.
        assert bench.hub.counts.heartbeats + bench.hub.counts.positions >= 2

    def test_only_to_silent_streams(self, bench):
        """
        A stream that gets events gets no comments.
        """
        _, sink = bench.open("a")
        for _ in range(20):
            bench.wait(5)
            bench.publish(("a",))

        assert 0 == bench.hub.counts.heartbeats
        assert 20 == len(sink.data)

    def test_spread(self, bench):
        """
        One event to all streams does not line up all their heartbeats.
        """
        for _ in range(400):
            bench.open("a")
        bench.publish(("a",))
        ticks: Counter[float] = Counter()
        before = 0
        for _ in range(80):
            bench.wait(bench.hub.pace.tick)
            ticks[bench.now] = bench.hub.counts.heartbeats - before
            before = bench.hub.counts.heartbeats

        assert 400 == sum(ticks.values())
        assert max(ticks.values()) < 80

    def test_shared(self, bench):
        """
        A heartbeat is one object for all streams.
        """
        sinks = [bench.open("a")[1] for _ in range(3)]
        bench.wait(20)

        assert {id(HEARTBEAT)} == {id(sink.pieces[1]) for sink in sinks}

    @pytest.mark.parametrize("slow_consumer", [8.0, 600.0])
    def test_stream_that_was_full(self, slow_consumer):
        """
        A connection that has taken all hears from us within a heartbeat.
        """
        bench = Bench(Pace(heartbeat=16, history=1_000, slow_consumer=slow_consumer, max_age=2_000))
        stream, sink = bench.open("a")
        sink.room = 0
        bench.publish(("a",))
        bench.wait(7)
        bench.taken(stream, sink)
        bench.pump()
        since = bench.now
        pieces = len(sink.pieces)
        while len(sink.pieces) == pieces:
            bench.wait(bench.hub.pace.tick)

        assert bench.now - since <= 16

    def test_frozen_process(self, bench):
        """
        After a long freeze the wheel is caught up with, and every stream is looked at once.
        """
        sinks = [bench.open("a")[1] for _ in range(10)]
        bench.now += 300
        for _ in bench.hub.tick():
            pass

        assert [2] * 10 == [len(sink.pieces) for sink in sinks]
        assert all(due > bench.hub._tick for due in bench.hub._wheel)


class TestMaxAge:
    def test_jitter_only_shortens(self):
        """
        A stream ends at 80 to 100 % of the greatest age, with a time to come back.
        """
        bench = Bench(Pace(heartbeat=4, history=100, slow_consumer=8, max_age=40))
        for _ in range(200):
            bench.open("a")
        ages: list[float] = []
        bench.hub.ended = lambda stream: ages.append(bench.now - stream.opened_at)
        bench.wait(41)

        assert 200 == len(ages)
        assert {"max_age"} == {stream.reason for stream in bench.ended} or bench.ended == []
        assert min(ages) >= 0.8 * 40
        assert max(ages) <= 40 + 1e-9
        assert max(ages) - min(ages) > 4

    def test_farewell(self, bench):
        """
        The last that a stream reads is a jittered time to come back.
        """
        stream, sink = bench.open("a")
        bench.wait(1_000)

        assert "max_age" == stream.reason
        parser = Parser()
        parser.feed(sink.closed[0])
        assert 0 <= parser.retry_ms <= 250


class TestSlowConsumer:
    def test_nothing_taken(self, bench):
        """
        A client that takes nothing is cut off, soon after the time is over.
        """
        stream, sink = bench.open("a")
        sink.room = 10
        bench.publish(("a",))
        bench.wait(7.9)
        assert BEHIND == stream.state
        bench.wait(4)

        assert ("slow_consumer", 1, []) == (stream.reason, sink.aborted, sink.closed)

    def test_progress(self, bench):
        """
        A client that takes a little now and then stays, however long it takes.
        """
        stream, sink = bench.open("a")
        sink.room = 0
        bench.publish(("a",), data="x" * 1000)
        for _ in range(100):
            bench.wait(6)
            sink.rest -= 10

        assert BEHIND == stream.state

    def test_progress_that_ends(self, bench):
        """
        The time counts from the last progress.
        """
        stream, sink = bench.open("a")
        sink.room = 0
        bench.publish(("a",), data="x" * 1000)
        bench.wait(7)
        sink.rest -= 10
        bench.wait(7)
        assert BEHIND == stream.state
        bench.wait(6)

        assert "slow_consumer" == stream.reason

    def test_large_event(self, bench):
        """
        One large event evicts no healthy reader: what counts is that it is taken.
        """
        streams = [bench.open("a") for _ in range(5)]
        for _, sink in streams:
            sink.room = 1000
        bench.publish(("a",), data="x" * 1_000_000)
        for _ in range(10):
            bench.wait(2)
            for _, sink in streams:
                sink.rest = max(1, sink.rest - 100_000)
        for stream, sink in streams:
            bench.taken(stream, sink)
        bench.pump()
        bench.publish(("a",))

        assert [LIVE] * 5 == [stream.state for stream, _ in streams]
        assert all("2" == sink.data[-1] for _, sink in streams)

    def test_frozen_process(self, bench):
        """
        A client that took something while this process was frozen is not slow.
        """
        stream, sink = bench.open("a")
        sink.room = 0
        bench.publish(("a",), data="x" * 1000)
        sink.rest -= 500
        bench.now += 60
        for _ in bench.hub.tick():
            pass

        assert BEHIND == stream.state

    def test_heartbeats(self, bench):
        """
        Nothing is written to a full connection, no heartbeat either.
        """
        stream, sink = bench.open("a")
        sink.room = 0
        bench.publish(("a",), data="x" * 1000)
        for _ in range(20):
            bench.wait(4)
            sink.rest -= 1

        assert 2 == len(sink.pieces)
        assert BEHIND == stream.state


class TestCounts:
    def test_figures(self, bench):
        """
        Deliveries, bytes and replays are counted for the hub and for each stream.
        """
        bench.publish(("a",), ("a",))
        stream, sink = bench.open("a", at=bench.window.first)
        bench.pump()
        bench.publish(("a",), ("b",))

        counts = bench.hub.counts
        bench.hub.gone(stream)
        assert (1, 3, 2, 2) == (counts.opened, counts.deliveries, counts.replayed, counts.flushes)
        assert (3, 2) == (stream.events, stream.replayed)
        assert len(sink.raw) == stream.bytes == counts.bytes

    def test_each_stream_its_own(self, bench):
        """
        Streams that share topics, come and go, wait, or get an event by two ways count what they were given.
        """
        early, early_sink = bench.open("a", "b")
        bench.publish(("a",))
        late, late_sink = bench.open("a", "b*", "b")
        slow, slow_sink = bench.open("a")
        slow_sink.room = 0
        bench.publish(("a",), data="x" * 1000)
        bench.publish(("a",))
        bench.publish(("a",), ("a", "b"))
        bench.publish(("b",))
        bench.hub.gone(late)
        slow_sink.room, slow_sink.rest = None, 0
        bench.hub.writable(slow)
        bench.pump()
        bench.publish(("a",))
        bench.publish(("a",), ("b",))
        for stream in (early, slow):
            bench.hub.gone(stream)

        for stream, sink in ((early, early_sink), (late, late_sink), (slow, slow_sink)):
            assert (len(sink.data), len(sink.raw)) == (stream.events, stream.bytes)
        assert (9, 5, 6) == (early.events, late.events, slow.events)

    @pytest.mark.parametrize("held", [False, True])
    def test_ends_in_the_middle_of_a_flush(self, bench, monkeypatch, held):
        """
        What a stream was given is true when it ends: also where its turn was still to come, or it is behind.
        """
        monkeypatch.setattr(hub_module, "_STRIDE", 1)
        streams = [bench.open("a") for _ in range(6)]
        streams[-1][1].room = 0 if held else None
        bench.publish(("a",))
        assert held == streams[-1][0].waiting
        given: dict[Stream, tuple[int, int]] = {}
        bench.hub.ended = lambda stream: given.update({stream: (stream.events, stream.bytes)})
        bench.cost = bench.hub.pace.slice
        flush = bench.hub.flush(bench.read(("a",)))
        next(flush)
        bench.cost = 0.0
        for stream, _ in streams:
            bench.hub.gone(stream)
        for _ in flush:
            pass

        assert {1, 2} == {events for events, _ in given.values()}
        assert [(len(sink.data), len(sink.raw)) for _, sink in streams] == [given[stream] for stream, _ in streams]


class TestPace:
    @pytest.mark.parametrize(
        "pace",
        [
            Pace(15, 600, 10, 480),
            Pace(0.02, 0.2, 0.1, 0.2),
            Pace(300, 86_400, 600, 86_400),
            Pace(1, 8, 600, 2),
        ],
    )
    def test_deadlines(self, pace):
        """
        Ticks are fine enough for every deadline, and the log keeps more than the history.
        """
        assert 0.005 <= pace.tick <= 0.25
        assert pace.late <= pace.heartbeat / 2
        assert pace.retention >= pace.history + pace.renewal + pace.heartbeat
        assert pace.renewal * 3 <= pace.history
