"""
Every promise about one stream, on both paths and both event loops.

`handoff`: the connection was taken over from Hypercorn. `generator`: the same
stream as the body of an ordinary response (`SSE_HANDOFF=off`).
"""

import json
import random
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

import pytest

from tests.wire import Process, Reader, Wire, get, log_lines, metric, publish, request, wait_until

PATHS = [(path, loop) for path in ("handoff", "generator") for loop in ("uvloop", "asyncio")]
HEARTBEAT = 0.4
HISTORY = 4.0
SLOW = 2.0
# What two busy cores may add to any moment.
LATE = 0.35


def environment(path: str, loop: str, **more: object) -> dict[str, object]:
    return {
        "SSE_HANDOFF": "auto" if path == "handoff" else "off",
        "SSE_LOOP": loop,
        "SSE_HEARTBEAT_SECONDS": HEARTBEAT,
        "SSE_HISTORY_SECONDS": HISTORY,
        "SSE_SLOW_CONSUMER_SECONDS": SLOW,
    } | more


@pytest.fixture(scope="module", params=PATHS, ids="-".join)
def variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Which path serves the streams, and which event loop."""
    return request.param


@pytest.fixture(scope="module")
def process(variant: tuple[str, str]) -> Iterator[Process]:
    """One process that all tests of a variant share."""
    with Process(environment(*variant)) as process:
        yield process
        assert process.complaints() == []


@pytest.fixture
def port(process: Process) -> int:
    return process.port


@pytest.fixture
def topic() -> str:
    """A topic that no other test uses."""
    return f"t{random.randrange(1 << 48):x}"


class TestOpening:
    def test_the_path_is_the_one_that_is_tested(self, process: Process, variant: tuple[str, str], topic: str):
        """Start-up says which path is on, every stream says which one it took, and they agree."""
        path, loop = variant
        with Reader.open(process.port, topic) as reader:
            reader.until_open()
        (starting,) = log_lines(process.log(), "starting")
        opened = log_lines(process.log(), "stream_opened")

        assert starting["handoff"] == ("on" if path == "handoff" else "off: SSE_HANDOFF=off")
        assert starting["loop"] == loop
        assert {line["path"] for line in opened} == {path}

    def test_the_head_comes_before_any_event_is_published(self, port: int, topic: str):
        """A client that only waits knows at once that it is connected."""
        with Reader.open(port, topic) as reader:
            assert reader.status == 200
            assert reader.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert reader.headers["cache-control"] == "no-store"
            assert reader.headers["x-accel-buffering"] == "no"
            assert reader.headers["connection"] == "close"
            assert reader.headers["transfer-encoding"] == "chunked"
            assert "content-length" not in reader.headers
            assert reader.headers["x-content-type-options"] == "nosniff"
            assert "GMT" in reader.headers["date"]

    def test_the_first_event_is_stream_open_with_the_resume_point(self, port: int, topic: str):
        """A new client stands at the log's head, whoever's event that is."""
        (head,) = publish(port, {"topics": [f"{topic}-other"], "data": "not yours"})
        with Reader.open(port, topic) as reader:
            reader.until_open()
            first = reader.events[0]

            assert first.event == "stream.open"
            assert first.id == head
            assert reader.opened["topics"] == [topic, "broadcast"]
            assert reader.opened["heartbeat_seconds"] == HEARTBEAT

    def test_a_resumed_stream_opens_where_it_was_not_where_the_log_is(self, port: int, topic: str):
        """The id of stream.open must not skip what is about to be replayed."""
        ids = publish(port, *({"topics": [topic], "data": str(number)} for number in range(5)))
        with Reader.open(port, topic, resume=ids[1]) as reader:
            assert reader.until_data(3) == ["2", "3", "4"]
            assert reader.events[0].id == ids[1]
            assert [event.id for event in reader.events[1:4]] == ids[2:]

    def test_retry_is_jittered(self, port: int, topic: str):
        """Clients that were cut together do not come back together."""
        values = []
        for _ in range(16):
            with Reader.open(port, topic) as reader:
                values.append(reader.until_open().retry_ms)

        assert all(value is not None and 1_000 <= value <= 2_000 for value in values)
        assert len(set(values)) > 8

    def test_head_takes_no_stream(self, process: Process, topic: str):
        """HEAD answers with the same head, and leaves nothing open."""
        opened = metric(process.metrics_port, "sse_streams_opened_total")
        with Wire(process.port) as wire:
            wire.send(request(f"/events?topic={topic}", {"Connection": "close"}, method="HEAD"))
            head = wire.until(b"\r\n\r\n")
            assert b" 200 " in head
            assert b"text/event-stream" in head
            assert wire.ends() == "closed"

        assert metric(process.metrics_port, "sse_streams_opened_total") == opened


class TestSilence:
    def test_silent_streams_hear_heartbeats_and_positions_busy_ones_do_not(self, port: int, topic: str):
        """
        No silence is longer than SSE_HEARTBEAT_SECONDS; no stream with events hears one.

        Once in a while the heartbeat is `stream.position`: the id moves with the
        log, several times per SSE_HISTORY_SECONDS, though no event was for this stream.
        """
        seconds = 2.2
        busy = Reader.open(port, topic)
        silent = Reader.open(port, f"{topic}-silent").until_open()
        stop = threading.Event()
        last: list[str] = []

        def keep_busy() -> None:
            while not stop.wait(HEARTBEAT / 8):
                last[:] = publish(port, {"topics": [topic], "data": "x"})

        publisher = threading.Thread(target=keep_busy)
        publisher.start()
        reading = threading.Thread(target=busy.during, args=(seconds,))
        reading.start()
        try:
            silent.during(seconds)
            silent.until(lambda r: r.names.count("stream.position") >= 2)
        finally:
            stop.set()
            publisher.join()
            reading.join()
        with busy, silent:
            gaps = [b.at - a.at for a, b in pairwise(silent.pieces)]
            positions = [event for event in silent.events if event.event == "stream.position"]

            # One moment of a busy machine says nothing, half of them do.
            assert median(gaps) < HEARTBEAT + LATE
            assert 4 <= len(gaps)
            assert median(gaps) > 0.4 * HEARTBEAT
            assert silent.data == []
            assert all(event.data == "" for event in positions)
            assert len({event.id for event in positions}) == len(positions)
            assert positions[-1].id > silent.events[0].id
            # Where the publisher was held up, the stream was silent.
            beats = [b for a, b in pairwise(busy.pieces) if b.text[:1] == b":" and b.at - a.at < 0.4 * HEARTBEAT]
            assert len(beats) <= 1
            assert busy.names.count("stream.position") <= 1
            assert len(busy.data) > 5
            assert last

    def test_a_position_can_be_resumed_from(self, port: int, topic: str):
        """What `stream.position` says is a place in the log like any other."""
        publish(port, {"topics": ["elsewhere"], "data": "x"})
        with Reader.open(port, topic) as reader:
            reader.until(lambda r: "stream.position" in r.names)
            position = reader.last_event_id
        publish(port, {"topics": [topic], "data": "after"})
        with Reader.open(port, topic, resume=position) as reader:
            assert reader.until_data(1) == ["after"]
            assert "stream.reset" not in reader.names


class TestEvents:
    def test_a_burst_is_one_write(self, port: int, topic: str):
        """All that a stream is owed in one tick comes in one chunk."""
        with Reader.open(port, topic) as reader:
            reader.until_open()
            publish(port, *({"topics": [topic], "data": str(number)} for number in range(10)))
            assert reader.until_data(10) == [str(number) for number in range(10)]

        holding = [piece for piece in reader.pieces if b"data: " in piece.text and b"stream." not in piece.text]
        assert len(holding) == 1

    def test_a_large_event_is_whole(self, port: int, topic: str):
        """One event of a megabyte, with line ends and four-byte characters."""
        data = ("\N{GRINNING FACE}" + "x" * 70 + "\n") * 13_000
        with Reader.open(port, topic) as reader:
            reader.until_open()
            publish(port, {"topics": [topic], "data": data})
            publish(port, {"topics": [topic], "data": "next"})
            received = reader.until_data(2)

        assert received == [data, "next"]

    def test_earliest_is_all_that_is_kept(self, port: int, topic: str):
        """`last_event_id=earliest` begins at the window's first entry."""
        publish(port, *({"topics": [topic], "data": str(number)} for number in range(50)))
        with Reader.open(port, topic, query="last_event_id=earliest") as reader:
            assert reader.until_data(50) == [str(number) for number in range(50)]
            publish(port, {"topics": [topic], "data": "live"})
            assert reader.until_data(51)[-1] == "live"

    def test_reconnects_get_exactly_what_was_missed_while_publishing_goes_on(self, port: int, topic: str):
        """In order, no event missing, none twice at the join of replay and live."""
        count, batch = 3_000, 5
        done = threading.Event()

        def publish_hard() -> None:
            for start in range(0, count, batch):
                publish(port, *({"topics": [topic], "data": str(n)} for n in range(start, start + batch)))
            done.set()

        with Reader.open(port, topic) as reader:
            reader.until_open()
            publisher = threading.Thread(target=publish_hard)
            publisher.start()
            reader.until_data(20)
        received, position = reader.data, reader.last_event_id
        reconnects = 0
        while len(received) < count or reconnects < 3:
            # Away for a while, back for a while; cut wherever that happens to be.
            if not done.is_set():
                time.sleep(random.uniform(0, 0.04))
            with Reader.open(port, topic, resume=position) as reader:
                reader.until_open()
                if done.is_set():
                    reader.until_data(count - len(received))
                else:
                    reader.during(random.uniform(0, 0.12))
            assert "stream.reset" not in reader.names
            received += reader.data
            position = reader.last_event_id
            reconnects += 1
        publisher.join()

        assert received == [str(number) for number in range(count)]

    def test_a_foreign_position_is_told_in_band(self, port: int, topic: str):
        """An id that was never ours gets `stream.reset`, then live events; never silence."""
        with Reader.open(port, topic, resume="zzzzzzzz:1-0") as reader:
            reader.until(lambda r: "stream.reset" in r.names)
            publish(port, {"topics": [topic], "data": "live"})
            assert reader.until_data(1) == ["live"]
            reset = next(event for event in reader.events if event.event == "stream.reset")

        assert json.loads(reset.data)["reason"] == "epoch_changed"


def leave(reader: Reader, how: str) -> None:
    {"fin": reader.close, "rst": reader.wire.reset, "half-close": reader.wire.half_close}[how]()


class TestLeaving:
    @pytest.mark.parametrize("how", ["fin", "rst", "half-close"])
    def test_a_client_that_leaves_is_noticed_within_a_second(self, process: Process, topic: str, how: str):
        """Stream, descriptor and count are given back, and the log says `client_gone`."""
        wait_until(lambda: process.streams() == 0, "streams of other tests")
        descriptors = process.descriptors()
        readers = [Reader.open(process.port, topic).until_open() for _ in range(5)]
        ids = {reader.opened["stream"] for reader in readers}
        assert process.streams() == 5
        for reader in readers:
            leave(reader, how)

        wait_until(lambda: process.streams() == 0, "the streams' end")
        wait_until(lambda: process.descriptors() <= descriptors, "the descriptors")
        lines = {line["stream"]: line for line in process.ended("client_gone")}
        assert ids <= set(lines)
        for reader in readers:
            reader.close()

    def test_a_client_that_leaves_with_bytes_unsent_is_noticed_too(self, process: Process, topic: str):
        """Half-closed and full: nothing waits for it to take what it will never take."""
        wait_until(lambda: process.streams() == 0, "streams of other tests")
        reader = Reader.open(process.port, topic, receive_buffer=4_096).until_open()
        publish(process.port, *({"topics": [topic], "data": "x" * 300_000} for _ in range(3)))
        time.sleep(0.1)
        reader.wire.half_close()

        wait_until(lambda: process.streams() == 0, "the stream's end")
        assert process.ended()[-1]["reason"] == "client_gone"
        reader.close()

    def test_the_log_has_one_line_at_each_end(self, process: Process, topic: str):
        """Opening and end name the same stream, with what it was given."""
        ids = publish(process.port, *({"topics": [topic], "data": str(n)} for n in range(3)))
        with Reader.open(process.port, topic, resume=ids[0]) as reader:
            reader.until_data(2)
            publish(process.port, {"topics": [topic], "data": "live"})
            reader.until_data(3)
            name = reader.opened["stream"]
            received = sum(len(piece.text) for piece in reader.pieces)
        wait_until(lambda: [line for line in process.ended() if line["stream"] == name], "the line")
        (opened,) = (line for line in log_lines(process.log(), "stream_opened") if line["stream"] == name)
        (ended,) = (line for line in process.ended() if line["stream"] == name)

        assert opened["topics"] == [topic, "broadcast"]
        assert opened["resumed_from"] == ids[0]
        assert ended["events"] == 3
        assert ended["replayed"] == 2
        assert ended["bytes"] == received
        assert 0 <= ended["seconds"] < 20


MAX_AGE = 3.0


@pytest.fixture
def brief(variant: tuple[str, str]) -> Iterator[Process]:
    """A process whose streams end soon, the slow ones well before the old ones."""
    more = {"SSE_MAX_AGE_SECONDS": MAX_AGE, "SSE_SLOW_CONSUMER_SECONDS": 0.5, "SSE_DRAIN_SECONDS": 0.3}
    with Process(environment(*variant, **more)) as process:
        yield process


class TestEnds:
    def test_every_reason_is_in_log_and_metrics(self, brief: Process, topic: str):
        """
        Each of the ways in which a stream ends today, and what its client sees of it.

        Old age is between 80 and 100 % of SSE_MAX_AGE_SECONDS and ends with a
        short `retry:` and a clean last chunk, and so does a drain; a slow consumer is cut.
        """
        slow = Reader.open(brief.port, f"{topic}-large", receive_buffer=4_096).until_open()
        old = [Reader.open(brief.port, topic).until_open() for _ in range(6)]
        Reader.open(brief.port, topic).until_open().close()
        publish(brief.port, *({"topics": [f"{topic}-large"], "data": "x" * 600_000} for _ in range(3)))
        for reader in old:
            reader.until_over()
            assert reader.clean
            assert reader.retry_ms is not None
            assert reader.retry_ms <= 250
        wait_until(lambda: brief.ended("slow_consumer"), "the slow consumer's end")
        ages = sorted(line["seconds"] for line in brief.ended("max_age"))
        assert 0.8 * MAX_AGE - 0.05 <= ages[0] <= MAX_AGE
        assert brief.ended("slow_consumer")[0]["seconds"] >= 0.5

        assert not slow.until_over().clean
        for reason, count in {"client_gone": 1, "max_age": 6, "slow_consumer": 1, "draining": 0}.items():
            assert metric(brief.metrics_port, "sse_streams_ended_total", reason=reason) == count
            assert len(brief.ended(reason)) == count
        assert len({line["stream"] for line in brief.ended()}) == len(brief.ended()) == 8
        assert metric(brief.metrics_port, "sse_streams_opened_total") == 8

        last = Reader.open(brief.port, topic).until_open()
        brief.kill(15)
        last.until_over()
        assert last.clean
        assert "stream.draining" in last.names
        assert last.retry_ms is not None
        assert last.retry_ms <= 250
        assert brief.process is not None
        assert brief.process.wait(10) == 0
        assert len(brief.ended("draining")) == 1
        assert brief.complaints() == []
        for reader in (slow, last, *old):
            reader.close()

    def test_refusals_are_answers_not_streams(self, process: Process, topic: str):
        """What is wrong with a request is said by status and leaves nothing behind."""
        opened = metric(process.metrics_port, "sse_streams_opened_total")
        for query in ("topic=not%20a%20topic", "topic=x&nonsense=1", "topic=x&last_event_id=%00"):
            status, headers, body = get(process.port, f"/events?{query}", {"Accept": "text/event-stream"})
            assert status == 400
            assert headers["content-type"] == "application/problem+json"
            assert {"name", "rule", "value", "cure"} <= set(json.loads(body))

        assert metric(process.metrics_port, "sse_streams_opened_total") == opened
