"""
A slow consumer harms only itself: what it costs, when it ends, what the others notice.
"""

import asyncio
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.crowd import Member, becomes, crowd
from tests.wire import Process, Reader, metric, publish, wait_until

SLOW = 1.5
HEARTBEAT = 0.4
SEND_BUFFER = 65_536
PATHS = [("auto", "uvloop"), ("auto", "asyncio"), ("off", "uvloop"), ("off", "asyncio")]


@pytest.fixture(
    scope="module", params=PATHS, ids=["handoff-uvloop", "handoff-asyncio", "generator-uvloop", "generator-asyncio"]
)
def process(request: pytest.FixtureRequest) -> Iterator[Process]:
    handoff, loop = request.param
    env = {
        "SSE_HANDOFF": handoff,
        "SSE_LOOP": loop,
        "SSE_HEARTBEAT_SECONDS": HEARTBEAT,
        "SSE_SLOW_CONSUMER_SECONDS": SLOW,
        "SSE_SEND_BUFFER_BYTES": SEND_BUFFER,
    }
    with Process(env) as process:
        yield process
        assert process.complaints() == []


@pytest.fixture(autouse=True)
def _no_streams_left(process: Process) -> Iterator[None]:
    yield
    wait_until(lambda: process.streams() == 0, "all streams' end")


def ended(process: Process, reason: str) -> int:
    return int(metric(process.metrics_port, "sse_streams_ended_total", reason=reason))


async def send(process: Process, *drafts: Mapping[str, Any]) -> None:
    await asyncio.to_thread(publish, process.port, *drafts)


async def timed(process: Process, topic: str, seconds: float) -> int:
    """Publish ten events a second that say when; return how many."""
    count = round(10 * seconds)
    for _ in range(count):
        await send(process, {"topics": [topic], "data": repr(time.monotonic())})
        await asyncio.sleep(0.1)
    return count


def latencies(members: list[Member], since: float) -> list[float]:
    return [
        at - float(event.data)
        for member in members
        for at, event in member.events
        if at >= since and not event.event.startswith("stream.")
    ]


def send_queues(port: int) -> list[int]:
    """Return what the kernel holds of memory for each connection to send from *port*."""
    command = ["ss", "-tmnH", "state", "connected", f"sport = :{port}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(found) for found in re.findall(r"skmem:\(.*?,w(\d+),", text)]


def resident_bytes(process: Process) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4_096


class TestStalledReaders:
    async def test_harm_nobody_else_and_cost_a_bounded_amount(self, process: Process, require: Callable[..., str]):
        """
        Fifty of five hundred stop reading; the others' latency and the memory do not notice.

        Compared within one run: the same events to the same readers, without stalled ones and with.
        """
        require("ss")
        slow_before, gone_before = ended(process, "slow_consumer"), ended(process, "client_gone")
        async with crowd(450, process.port, "/events?topic=t") as healthy:
            began = time.monotonic()
            count = await timed(process, "t", 1.0)
            await becomes(lambda: all(len(member.data) == count for member in healthy), "all events")
            before = median(latencies(healthy, began))
            options = {"receive_buffer": 4_096}
            async with crowd(50, process.port, "/events?topic=t&topic=bulk", **options) as stalled:
                for member in stalled:
                    member.stall()
                memory = resident_bytes(process)
                began = time.monotonic()
                # More than all buffers hold: 20 MB for each of them, a gigabyte in all.
                for _ in range(20):
                    await send(process, {"topics": ["bulk"], "data": "x" * 1_000_000})
                count += await timed(process, "t", 0.4 * SLOW)
                queues = send_queues(process.port)
                grown = resident_bytes(process) - memory
                count += await timed(process, "t", SLOW)
                await becomes(lambda: all(len(member.data) == count for member in healthy), "all events")
                after = median(latencies(healthy, began))
                await becomes(lambda: ended(process, "slow_consumer") - slow_before == 50, "their end")

            assert len(queues) >= 500
            assert max(queues) < 4 * SEND_BUFFER  # the kernel doubles it, and adds its own
            assert sum(queues) < 50 * 3 * SEND_BUFFER + 450 * 5_000
            # The window holds each event twice, as text and as bytes, and publishing
            # takes some; a copy for each stalled stream would be a gigabyte.
            assert grown < 2 * 20_000_000 + 60_000_000
            # To wait for a stalled one would take SLOW; one moment of a busy machine is no harm.
            assert after < 4 * before + 0.25 * SLOW, (before, after)
            assert ended(process, "client_gone") == gone_before
            assert not any(member.ended_at for member in healthy)
            assert all(line["seconds"] >= SLOW for line in process.ended("slow_consumer")[-50:])

    async def test_end_only_after_the_time_without_progress(self, process: Process):
        """Not when they fall silent."""
        before = ended(process, "slow_consumer")
        async with crowd(1, process.port, "/events?topic=bulk", receive_buffer=4_096) as (member,):
            member.stall()
            await send(process, {"topics": ["bulk"], "data": "x" * 1_000_000})
            began = time.monotonic()
            await becomes(lambda: ended(process, "slow_consumer") == before + 1, "the end")

            assert time.monotonic() - began >= 0.9 * SLOW


class TestHealthyReaders:
    def test_that_read_slowly_are_not_slow(self, process: Process):
        """
        Two kilobytes a second in a long replay is progress: 20 KB in ten seconds, here in two.

        It takes twice the time after which silence would end it, and then all the rest.
        """
        before = ended(process, "slow_consumer")
        publish(process.port, *({"topics": ["long"], "data": f"{n} " + "x" * 20_000} for n in range(50)))
        # A small buffer: with a large one a client's kernel says only once for
        # many kilobytes that some were read.
        options = {"receive_buffer": 4_096, "segment": 1_460}
        with Reader.open(process.port, "long", query="last_event_id=earliest", **options) as reader:
            until = time.monotonic() + 2 * SLOW
            while time.monotonic() < until:
                reader.read(0, 1_000)
                assert not reader.over, process.ended()[-1]
                time.sleep(0.05 * SLOW)
            assert len(reader.data) < 40
            reader.until_data(50)

            assert [data.split()[0] for data in reader.data] == [str(n) for n in range(50)]
        assert ended(process, "slow_consumer") == before

    def test_that_pause_for_less_than_the_time_are_not_slow(self, process: Process):
        """Each pause begins anew when something was taken."""
        before = ended(process, "slow_consumer")
        publish(process.port, *({"topics": ["pause"], "data": "x" * 100_000} for _ in range(20)))
        with Reader.open(process.port, "pause", query="last_event_id=earliest", receive_buffer=8_192) as reader:
            for _ in range(4):
                time.sleep(0.4 * SLOW)
                taken = sum(len(piece.text) for piece in reader.pieces) + 300_000
                reader.until(lambda r, taken=taken: sum(len(piece.text) for piece in r.pieces) >= taken)
            reader.until_data(20)
        assert ended(process, "slow_consumer") == before

    async def test_of_one_large_event_are_not_slow(self, process: Process):
        """A megabyte to sixty at once is more than their buffers: no reason to end any."""
        before = ended(process, "slow_consumer")
        async with crowd(60, process.port, "/events?topic=large") as readers:
            await send(process, {"topics": ["large"], "data": "x" * 1_000_000})
            await send(process, {"topics": ["large"], "data": "after"})
            await becomes(lambda: all(member.data[-1:] == ["after"] for member in readers), "both events")

            assert all(len(member.data[0]) == 1_000_000 for member in readers)
            assert ended(process, "slow_consumer") == before

    async def test_of_a_long_replay_are_not_slow_and_delay_nobody(self, process: Process):
        """Twenty megabytes at full speed to each of four, beside fifty that hear live events."""
        before = ended(process, "slow_consumer")
        async with crowd(50, process.port, "/events?topic=live") as live:
            began = time.monotonic()
            count = await timed(process, "live", 1.0)
            await becomes(lambda: all(len(member.data) == count for member in live), "all events")
            alone = median(latencies(live, began))
            for _ in range(20):
                await send(process, *({"topics": ["replay"], "data": "x" * 100_000} for _ in range(10)))
            await send(process, {"topics": ["replay"], "data": "the last one"})

            began = time.monotonic()
            path = "/events?topic=replay&last_event_id=earliest"
            async with crowd(4, process.port, path, parse=False) as replays:
                count += await timed(process, "live", 1.0)
                await becomes(lambda: all(b"the last one" in member.tail for member in replays), "the replays")
                await becomes(lambda: all(len(member.data) == count for member in live), "all events")
                beside = median(latencies(live, began))

                assert all(member.bytes > 20_000_000 for member in replays)
                assert ended(process, "slow_consumer") == before
                # This process reads 80 MB meanwhile, in the same event loop: part of it is its own.
                assert beside < 4 * alone + 0.25, (alone, beside)
