"""
How a process ends: no client sees an error, nothing is lost, and it does end.
"""

import asyncio
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from app.stack import Redis
from tests.crowd import Member, becomes, crowd
from tests.wire import (
    PATIENCE_SECONDS,
    Process,
    Reader,
    Wire,
    get,
    log_lines,
    metric,
    post,
    publish,
    request,
    wait_until,
)

DRAIN = 1.5
LEAD = 0.3
# For a test that must be over before the drain is.
LONG = 60
PATHS = [("auto", "uvloop"), ("auto", "asyncio"), ("off", "uvloop"), ("off", "asyncio")]
IDS = ["handoff-uvloop", "handoff-asyncio", "generator-uvloop", "generator-asyncio"]


def environment(path: tuple[str, str], **more: object) -> dict[str, object]:
    return {
        "SSE_HANDOFF": path[0],
        "SSE_LOOP": path[1],
        "SSE_DRAIN_SECONDS": DRAIN,
        "SSE_DRAIN_LEAD_SECONDS": LEAD,
        "SSE_HEARTBEAT_SECONDS": 0.5,
    } | more


@pytest.fixture(params=PATHS, ids=IDS)
def path(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def process(path: tuple[str, str]) -> Iterator[Process]:
    with Process(environment(path)) as process:
        yield process


def exit_code(process: Process) -> int:
    """Return the process's exit status; fails if it does not end."""
    assert process.process is not None
    return process.process.wait(PATIENCE_SECONDS)


class TestADrain:
    async def test_ends_streams_evenly_and_cleanly_and_serves_publishers_meanwhile(self, path: tuple[str, str]):
        """
        Three hundred streams: told first, then ended one by one, each with a short `retry:`.

        From the first moment the process is not ready and opens no stream.
        """
        count, drain, lead = 300, 3.0, 0.6
        env = environment(path, SSE_DRAIN_SECONDS=drain, SSE_DRAIN_LEAD_SECONDS=lead)
        with Process(env) as process:
            async with crowd(count, process.port, "/events?topic=t") as members:
                process.kill(signal.SIGTERM)
                told = time.monotonic()
                await becomes(lambda: log_lines(process.log(), "draining"), "the drain")

                status, _ = await asyncio.to_thread(post, process.port, {"topics": ["t"], "data": "while draining"})
                assert status == 201
                status, _, body = await asyncio.to_thread(get, process.port, "/readyz")
                assert (status, json.loads(body)["reason"]) == (503, "draining")
                status, headers, body = await asyncio.to_thread(get, process.port, "/events?topic=t")
                assert status == 503
                assert json.loads(body)["name"] == "process"
                accept = {"Accept": "text/event-stream"}
                status, headers, body = await asyncio.to_thread(get, process.port, "/events?topic=t", accept)
                assert (status, headers["x-sse-fallback"]) == (200, "503")
                assert body.startswith(b"retry: ")
                status, headers, _ = await asyncio.to_thread(get, process.port, "/healthz")
                # nginx gives up its idle connections one by one: no POST meets one that has just closed.
                assert (status, headers["connection"]) == (200, "close")

                await becomes(lambda: all(member.ended_at for member in members), "all ends")
            assert exit_code(process) == 0
            assert len(process.ended("draining")) == count
            [line] = log_lines(process.log(), "drained")
            assert (line["streams"], line["events_in_flight"]) == (count, 0)
            assert line["seconds"] > 0.9 * drain
            assert process.complaints() == []
        ends = sorted(member.ended_at - told for member in members)

        assert all("stream.draining" in member.names for member in members)
        assert all(member.clean for member in members)
        assert all(member.parser.retry_ms is not None and member.parser.retry_ms <= 250 for member in members)
        assert len({member.parser.retry_ms for member in members}) > 50
        assert any(member.data == ["while draining"] for member in members)
        # Told before its own end: a client may open its successor first. Not all at
        # once: the successors come as evenly as the ends.
        warned = [
            (at, member.ended_at)
            for member in members
            for at, event in member.events
            if event.event == "stream.draining"
        ]
        leads = sorted(end - at for at, end in warned)
        # A client on a busy machine may read the word late, and many at once:
        # so single ones say little, and a half much.
        assert leads[0] > 0
        assert 0.5 * lead < leads[count // 2] < lead + 1
        assert ends[0] > lead - 0.05
        for times in (ends, [at - told for at, _ in warned]):
            tenths = Counter(int(at / (drain - lead) * 10) for at in times)
            assert max(tenths.values()) <= count / 2, tenths
            assert max(times) > 0.8 * (drain - lead)

    def test_cuts_a_peer_that_reads_nothing(self, process: Process):
        """It costs the process two seconds, not its end."""
        with Reader.open(process.port, "t", receive_buffer=4_096) as reader:
            reader.until_open()
            publish(process.port, *({"topics": ["t"], "data": "x" * 500_000} for _ in range(3)))
            time.sleep(0.1)
            process.kill(signal.SIGTERM)

            assert exit_code(process) == 0
            assert not reader.until_over().clean

    def test_waits_for_a_peer_that_still_reads(self, process: Process):
        """What is under way when the last stream ends arrives, to the last chunk."""
        with Reader.open(process.port, "t", receive_buffer=16_384) as reader:
            reader.until_open()
            publish(process.port, {"topics": ["t"], "data": "x" * 900_000})
            process.kill(signal.SIGTERM)
            wait_until(lambda: process.ended("draining"), "the stream's end")
            time.sleep(0.3)  # two seconds, and it is cut
            reader.until_over()

            assert reader.clean
            assert reader.data == ["x" * 900_000]
        assert exit_code(process) == 0

    def test_ends_streams_that_slip_in(self, process: Process):
        """Between the check at the door and the end; whatever happens to them, the process ends."""
        outcomes: Counter[str] = Counter()
        seen = Reader.open(process.port, "t").until_open()
        process.kill(signal.SIGTERM)
        with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
            while True:
                with Wire(process.port) as wire:
                    wire.send(request("/events?topic=t&last_event_id=earliest", {"Connection": "close"}))
                    answer = b""
                    while data := wire.receive():
                        answer += data
                if not answer:
                    break
                outcomes[answer.split()[1].decode()] += 1
                # An answer that was begun is finished.
                assert answer.endswith((b"0\r\n\r\n", b"}\n", b"}"))
        seen.until_over()

        assert seen.clean
        assert set(outcomes) <= {"200", "503"}
        assert exit_code(process) == 0
        assert process.complaints() == []
        seen.close()


BOTH = pytest.mark.parametrize("path", [PATHS[0], PATHS[3]], ids=[IDS[0], IDS[3]], indirect=True)


@BOTH
class TestTheEnd:
    @pytest.fixture
    def process(self, path: tuple[str, str]) -> Iterator[Process]:
        """Its drain takes longer than any of these tests, if it has streams."""
        with Process(environment(path, SSE_DRAIN_SECONDS=LONG, SSE_DRAIN_LEAD_SECONDS=LONG)) as process:
            yield process

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
    def test_comes_at_once_without_streams(self, process: Process, number: signal.Signals):
        """Idle keep-alive connections do not delay it."""
        with Wire(process.port) as idle, Wire(process.port) as begun:
            idle.send(request("/healthz"))
            idle.until(b"}")
            begun.send(b"GET /events HT")
            process.kill(number)

            assert exit_code(process) == 0
        assert process.complaints() == []

    def test_comes_with_the_last_stream(self, path: tuple[str, str]):
        """Where few streams were open, nothing is waited for behind them."""
        with Process(environment(path, SSE_DRAIN_SECONDS=10)) as process, Reader.open(process.port, "t") as reader:
            reader.until_open()
            process.kill(signal.SIGTERM)

            assert exit_code(process) == 0
            assert log_lines(process.log(), "drained")[0]["seconds"] < 8

    def test_comes_at_once_at_the_second_signal(self, process: Process):
        """Who cannot wait for the drain need not."""
        with Reader.open(process.port, "t") as reader:
            reader.until_open()
            process.kill(signal.SIGTERM)
            reader.until(lambda r: "stream.draining" in r.names)
            process.kill(signal.SIGTERM)

            assert exit_code(process) == 1
            assert log_lines(process.log(), "stopped_at_once")[0]["streams"] == 1

    def test_does_not_wait_for_a_request_that_never_ends(self, process: Process):
        """Half a publish: three seconds, then it is cut."""
        with Wire(process.port) as wire:
            wire.send(b"POST /publish HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n")
            wire.send(b"Content-Length: 1000\r\n\r\n[")
            time.sleep(0.05)
            process.kill(signal.SIGTERM)

            assert exit_code(process) == 0


class TestNothingIsLost:
    @BOTH
    async def test_by_clients_that_go_on_at_another_process(self, path: tuple[str, str], module_redis_server: Redis):
        """
        A hundred streams, three hundred events a second, and their process is drained.

        Each comes back elsewhere with its last id, and has every event once, in order.
        """
        env = environment(path, SSE_REDIS_URL=module_redis_server.url, SSE_KEY_PREFIX=f"drain-{path[1]}")
        with Process(env) as leaving, Process(env) as staying:
            published = 0
            stop = asyncio.Event()

            async def keep_publishing() -> None:
                nonlocal published
                while not stop.is_set():
                    drafts = [{"topics": ["t"], "data": str(published + n)} for n in range(15)]
                    await asyncio.to_thread(publish, staying.port, *drafts)
                    published += len(drafts)
                    await asyncio.sleep(0.05)

            async with crowd(100, leaving.port, "/events?topic=t") as members:
                publishing = asyncio.create_task(keep_publishing())
                await becomes(lambda: all(member.data for member in members), "first events")
                leaving.kill(signal.SIGTERM)
                both = await asyncio.gather(*(go_on(member, staying.port) for member in members))
                code = await asyncio.to_thread(exit_code, leaving)
                await asyncio.sleep(0.2)
                stop.set()
                await publishing
                wanted = [str(number) for number in range(published)]
                await becomes(lambda: all(second.data[-1:] == wanted[-1:] for _, second in both), "the last event")

                assert code == 0
                assert published > 60
                for first, second in both:
                    assert first.clean
                    assert first.data + second.data == wanted
                assert metric(staying.metrics_port, "sse_resets_total") == 0
                for _, second in both:
                    second.close()


async def go_on(member: Member, port: int) -> tuple[Member, Member]:
    """Do what EventSource does: wait for the end, wait for `retry`, come back with the last id."""
    await becomes(lambda: member.ended_at, "the end")
    assert member.parser.retry_ms is not None
    await asyncio.sleep(member.parser.retry_ms / 1_000)
    headers = {"Last-Event-ID": member.parser.last_event_id}
    return member, await Member.open(port, "/events?topic=t", headers)
