"""
The log in memory, on a clock that tests move.

What it shares with the log in Redis is in test_log_contract.py.
"""

import asyncio

import pytest

from app.event import Draft
from app.log import ORIGIN, Batch, IdempotencyConflict, Position, read_id
from app.memory_log import MemoryLog


class Clock:
    def __init__(self) -> None:
        self.ms = 1_000_000

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(clock):
    return MemoryLog(history_seconds=10, max_events=100, idempotency_seconds=60, now_ms=clock)


def draft(data: str = "x", *topics: str) -> Draft:
    return Draft(topics=topics or ("a",), data=data)


async def put(log: MemoryLog, *data: str) -> list[Position]:
    ids = await log.publish(Batch.of([draft(each) for each in data]))
    return [parsed[1] for id in ids if (parsed := read_id(id))]


async def kept(log: MemoryLog) -> list[str]:
    return [entry.data for entry in await log.read("e", ORIGIN, 1000, 0)]


class TestPositions:
    async def test_time(self, log, clock):
        """
        A position is the time of its entry, and a number within the millisecond.
        """
        first = await put(log, "1", "2")
        clock.ms += 5
        second = await put(log, "3")

        assert [(1_000_000, 0), (1_000_000, 1), (1_000_005, 0)] == first + second

    async def test_clock_that_goes_back(self, log, clock):
        """
        Positions ascend, whatever the clock does.
        """
        before = await put(log, "1")
        clock.ms -= 60_000
        after = await put(log, "2", "3")
        clock.ms += 120_000
        later = await put(log, "4")

        assert sorted({*before, *after, *later}) == before + after + later

    async def test_epochs_of_two_logs(self, clock):
        """
        Every log has an epoch of its own: nothing outlives the process, and clients are told.
        """
        states = [await MemoryLog(history_seconds=10, max_events=10, now_ms=clock).state(ORIGIN) for _ in range(2)]

        assert states[0].epoch != states[1].epoch


class TestTrim:
    async def test_history(self, log, clock):
        """
        What is older than the history goes, but for the newest of it: the trim boundary.
        """
        for data in "123456":
            await put(log, data)
            clock.ms += 2_000
        clock.ms -= 1
        await log.trim()
        assert list("123456") == await kept(log)
        clock.ms += 1_001
        await log.trim()

        assert list("23456") == await kept(log)

    async def test_quiet_log(self, log, clock):
        """
        The newest entry stays for ever: it is everybody's position.
        """
        [_, last] = await put(log, "1", "2")
        clock.ms += 1_000_000
        await log.trim()

        assert ["2"] == await kept(log)
        assert (await log.state(last)).has_cursor

    async def test_clock_that_goes_back(self, log, clock):
        """
        A clock that went back trims nothing.
        """
        await put(log, "1", "2")
        clock.ms -= 60_000
        await log.trim()

        assert ["1", "2"] == await kept(log)

    async def test_length(self, log):
        """
        A log that is too long loses its oldest entries, however young they are.
        """
        await put(log, *map(str, range(150)))
        await log.trim()

        assert [str(n) for n in range(50, 150)] == await kept(log)

    async def test_counts(self, log, clock):
        """
        What was ever added is counted, and what is kept: the difference is how losses are noticed.
        """
        await put(log, *map(str, range(150)))
        await log.trim()
        state = await log.state(ORIGIN)

        assert (150, 100) == (state.added, state.length)
        assert clock.ms == state.now_ms


class TestIdempotency:
    async def test_time(self, log, clock):
        """
        A key is remembered for its time, and then free again.
        """
        batch = Batch.of([draft()], "key")
        first = await log.publish(batch)
        clock.ms += 59_999
        assert first == await log.publish(batch)
        clock.ms += 1

        assert first != await log.publish(batch)

    async def test_memory(self, log, clock):
        """
        Keys whose time is over are let go.
        """
        for number in range(100):
            await log.publish(Batch.of([draft()], f"{number}"))
            clock.ms += 10_000

        assert len(log._keys) <= 7

    async def test_conflict(self, log):
        """
        A key with other events publishes nothing.
        """
        await log.publish(Batch.of([draft("1")], "key"))
        with pytest.raises(IdempotencyConflict):
            await log.publish(Batch.of([draft("2")], "key"))

        assert ["1"] == await kept(log)


class TestRead:
    async def test_entry_that_arrives(self, log):
        """
        A waiting reader gets what arrives, at once.
        """
        reading = asyncio.create_task(log.read("e", ORIGIN, 10, 30))
        await asyncio.sleep(0)
        await put(log, "1", "2")

        assert ["1", "2"] == [entry.data for entry in await asyncio.wait_for(reading, 5)]

    async def test_waiting_for_later(self, log):
        """
        What was there before does not end the waiting.
        """
        [position] = await put(log, "1")

        assert [] == await log.read("e", position, 10, 0.01)

    async def test_after_a_trimmed_position(self, log):
        """
        Reading goes on after a position that is gone.
        """
        positions = await put(log, *map(str, range(150)))
        await log.trim()

        assert ["50", "51"] == [entry.data for entry in await log.read("e", positions[3], 2, 0)]

    async def test_has(self, log):
        """
        The log knows which positions are entries that it keeps.
        """
        positions = await put(log, *map(str, range(150)))
        await log.trim()

        assert [False, True, False] == [
            await log.has(each) for each in (positions[0], positions[50], Position(positions[-1].ms + 1, 0))
        ]
