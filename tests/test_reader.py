"""
What the reader believes of the log, and what it tells a client that comes back.

Driven on virtual time, on the simulated server of `tests.simulated`.
"""

import time
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import reader as reader_module
from app.event import Draft, Entry
from app.hub import Hub, Pace
from app.log import ORIGIN, Batch, LogUnavailable, Notice, Position, write_id
from app.memory_log import MemoryLog
from app.reader import Checked, Reader, loss
from app.window import Window
from tests.simulated import Client, Process, Quiet, Server, VirtualLoop, World, fine_grained


@pytest.fixture
def world():
    with fine_grained():
        world = World()
        yield world
        world.check()
        world.close()


def publish(world: World, *topics: str, count: int = 1, broken: bool = False) -> None:
    world.server.publish(topics, 0, count, bare=False, broken=broken)


def subscribe(world: World, process: Process, *topics: str) -> Client:
    client = world.client(*topics)
    client.connect(process, turns=1, room=100_000)
    world.run(0.05)
    return client


def result(world: World, work: Any, seconds: float = 30.0) -> Any:
    """Run *work* to its end on the world's time."""
    task = world.task(work)
    for _ in range(int(seconds * 20)):
        if task.done():
            break
        world.run(0.05)
    return task.result()


def located(process: Process, position: Position, epoch: str | None = None) -> Any:
    id = write_id(epoch or process.window.epoch, position)
    return result(process.world, process.reader.located(id))


class TestLoss:
    @given(st.data())
    def test_nothing_lost(self, data):
        """
        However the log grows, is trimmed and read, nothing is called lost that was read or can be.
        """
        loop = VirtualLoop()
        server = Server(loop, 1_000, 1_000_000, lambda what: None)
        server.renew_epoch(None)
        read = Checked(server.epoch or "")
        for _ in range(data.draw(st.integers(1, 30))):
            loop.now += 0.01
            step = data.draw(st.sampled_from(["publish", "read", "trim", "delete"]))
            if step == "publish":
                server.publish(("a",), 0, data.draw(st.integers(1, 5)), bare=False, broken=False)
            elif step == "read":
                for record in server.after(read.cursor, data.draw(st.integers(1, 5))):
                    read.cursor, read.ordinal = record.position, read.ordinal + 1
            elif step == "trim":
                behind = [record for record in server.entries if record.position <= read.cursor]
                del server.entries[: data.draw(st.integers(0, len(behind)))]
            else:
                # Somebody deletes what everybody has read, but not the newest of that.
                behind = [record for record in server.entries if record.position < read.cursor]
                if behind:
                    server.delete(data.draw(st.integers(0, len(behind) - 1)))

            assert loss(read, server.state(read.cursor)) is None
        loop.close()

    @given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20))
    def test_trimmed_past_the_cursor(self, published, read_count, trimmed):
        """
        What was trimmed before it was read is a loss, and nothing else is.
        """
        loop = VirtualLoop()
        server = Server(loop, 1_000, 1_000_000, lambda what: None)
        server.publish(("a",), 0, published, bare=False, broken=False)
        read = Checked(server.epoch or "")
        for record in server.after(ORIGIN, read_count):
            read.cursor, read.ordinal = record.position, read.ordinal + 1
        del server.entries[:trimmed]

        reason = loss(read, server.state(read.cursor))

        assert ("trimmed" if min(trimmed, published) > read.ordinal else None) == reason
        loop.close()


    @given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 40), st.integers(0, 3))
    def test_promoted_replica(self, published, lost, went_on, trimmed):
        """
        A log that lost what was read, and went on, is another one, however far it went.
        """
        loop = VirtualLoop()
        server = Server(loop, 1_000, 1_000_000, lambda what: None)
        server.publish(("a",), 0, published, bare=False, broken=False)
        read = Checked(server.epoch or "", server.last, published)
        del server.entries[:trimmed]
        server.lose(min(lost, published), 0)
        loop.now += 1
        server.publish(("a",), 0, went_on, bare=False, broken=False)

        assert loss(read, server.state(read.cursor)) in ("log_went_back", "log_replaced")
        loop.close()


class TestLoad:
    """The window after a start is what the log keeps, behind its trim boundary."""

    def test_whole_log(self, world):
        """
        A log that was never trimmed is loaded from its beginning.
        """
        publish(world, "a", count=5)
        process = world.start()
        world.run(0.1)

        assert 5 == len(process.window)
        assert process.window.first == located(process, ORIGIN)

    def test_trimmed_log(self, world):
        """
        The oldest entry of a trimmed log is the boundary: it is not owed, and a valid position.
        """
        publish(world, "a", count=5)
        del world.server.entries[:2]
        process = world.start()
        world.run(0.1)
        records = world.server.records

        assert 2 == len(process.window)
        assert process.window.first == located(process, records[2].position)
        assert "history_lost" == located(process, records[1].position)
        assert "history_lost" == located(process, ORIGIN)

    def test_emptied_log(self, world):
        """
        Of a log without entries the last position is the boundary, and nothing is lost behind it.
        """
        publish(world, "a", count=5)
        last = world.server.last
        world.server.entries.clear()
        process = world.start()
        world.run(0.1)

        assert 0 == len(process.window)
        assert process.window.end == located(process, last)

    def test_newest_entry_deleted(self, world):
        """
        A deleted newest entry does not keep the load from ending.
        """
        publish(world, "a", count=5)
        world.server.delete(4)
        process = world.start()
        world.run(0.1)
        publish(world, "a")
        world.run(0.1)

        assert process.reader.loaded
        assert world.server.last == process.window.newest()
        assert 0 == process.reader.gaps

    def test_many_replies(self, world):
        """
        A log is loaded in replies of bounded size, all into one window.
        """
        publish(world, "a", count=700)
        process = world.start()
        world.run(0.1)

        assert 700 == len(process.window)

    def test_entries_that_come_while_loading(self, world):
        """
        What is published during the load is counted: the next check finds nothing amiss.
        """
        publish(world, "a", count=300)
        process = world.start()
        process.log.delay = 0.01
        for _ in range(60):
            world.run(0.005)
            publish(world, "a")
        world.run(3.0)

        assert 0 == process.reader.gaps
        assert 360 == len(process.window)

    def test_broken_entry(self, world):
        """
        A broken entry is counted, reaches nobody, and keeps its place.
        """
        process = world.start()
        world.run(0.1)
        client = subscribe(world, process, "*")
        publish(world, "a")
        publish(world, "a", broken=True)
        publish(world, "a")
        world.run(3.0)

        assert 1 == process.reader.broken
        assert {0, 2} == client.ledger.seen
        assert 0 == process.reader.gaps

    def test_flushall_while_loading(self, world):
        """
        A log that is emptied during the load is noticed by the next check.
        """
        publish(world, "a", count=300)
        process = world.start()
        process.log.delay = 0.05
        world.run(0.12)
        world.server.flush()
        publish(world, "a", count=2)
        world.run(5.0)

        assert world.server.epoch == process.window.epoch
        assert 2 == len(process.window)


class TestBroken:
    """`sse_log_entries_broken_total` counts entries, not how often they were read."""

    def test_read_again(self, world):
        """
        A load that reads a broken entry again neither counts nor tells it again, but does so with new ones.
        """
        process = world.start()
        world.run(0.1)
        told: list[str] = []
        process.reader._logger.warning = lambda name, **facts: told.append(facts["id"])  # type: ignore[method-assign]
        publish(world, "a", count=2, broken=True)
        world.run(1.5)
        assert 2 == process.reader.broken
        world.server.renew_epoch(world.server.epoch)
        publish(world, "a", broken=True)
        world.run(3.0)

        assert 1 == process.reader.gaps
        assert 3 == process.reader.broken
        assert 3 == len({id.partition(":")[2] for id in told}) == len(told)
        assert 3 == len(process.window)

    def test_other_log(self, world):
        """
        Those of another log are others.
        """
        process = world.start()
        world.run(0.1)
        publish(world, "a", count=2, broken=True)
        world.run(1.5)
        world.server.flush()
        publish(world, "a", count=3, broken=True)
        world.run(3.0)

        assert 1 == process.reader.gaps
        assert 5 == process.reader.broken

    def test_memory(self, world, monkeypatch):
        """
        However many there are, no more are remembered than a load can bring again soon.
        """
        monkeypatch.setattr(reader_module, "_BROKEN_ENTRIES", 10)
        process = world.start()
        world.run(0.1)
        publish(world, "a", count=50, broken=True)
        world.run(1.5)

        assert 50 == process.reader.broken
        assert 10 == len(process.reader._broken)


class Sized:
    """A log that holds entries of given sizes and notes what its replies weigh."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = list(sizes)
        self.replies: list[int] = []
        self.counts: list[int] = []

    def entries(self) -> list[Entry]:
        """Return everything, as the reader would have it."""
        texts = {size: "x" * size for size in set(self.sizes)}
        return [Entry(Position(1, n), f"e:1-{n}", ("t",), texts[size]) for n, size in enumerate(self.sizes, 1)]

    def read_all(self, reader: Reader) -> None:
        """Let *reader* adapt to reply after reply, as a loaded log answers it."""
        entries = self.entries()
        while entries:
            reply, entries = entries[: reader._count], entries[reader._count :]
            self.counts.append(reader._count)
            self.replies.append(sum(len(entry.data) for entry in reply))
            reader._adapt(reply)


@pytest.fixture
def reader() -> Reader:
    window = Window(1 << 40)
    hub = Hub(window, Pace(heartbeat=15, history=600, slow_consumer=10, max_age=480), lambda: 0.0, Random(1))
    return Reader(MemoryLog(history_seconds=600, max_events=10**6), window, hub)


class TestReplies:
    """A reply stays near a megabyte: larger ones hold the event loop, and many processes' memory."""

    def test_small_entries(self, reader):
        """
        Small entries come many at a time, soon.
        """
        log = Sized(*[100] * 10_000)
        log.read_all(reader)

        assert [100, 200, 400, 800, 1000, 1000] == log.counts[:6]

    @pytest.mark.parametrize("size", [5_000, 50_000, 500_000, 2_000_000])
    def test_large_entries(self, reader, size):
        """
        Large ones come few at a time: after the first reply none is much over a megabyte, or it is one entry.
        """
        log = Sized(*[size] * 300)
        log.read_all(reader)

        assert all(reply <= max(1_000_000, size) for reply in log.replies[1:])
        assert log.counts[1] * size > 400_000

    def test_large_entries_that_came_one_by_one(self, reader):
        """
        A process that stands still while large events go on coming does not ask for a hundred of them.
        """
        for entry in Sized(*[900_000] * 5).entries():
            reader._adapt([entry])
        log = Sized(*[900_000] * 50)
        log.read_all(reader)

        assert max(log.replies) <= 1_000_000

    def test_one_large_entry(self, reader):
        """
        One large entry does not slow the reader down for long.
        """
        Sized(*[100] * 10_000).read_all(reader)
        reader._adapt(Sized(1_000_000).entries())
        log = Sized(*[100] * 10_000)
        log.read_all(reader)

        assert 1 == log.counts[0]
        assert 1000 in log.counts
        assert sum(count < 100 for count in log.counts) < 40

    def test_mixed(self, reader):
        """
        Where one in a hundred is large, replies are near a megabyte, in the mean and at most a few.
        """
        random = Random(7)
        log = Sized(*(500_000 if random.random() < 0.01 else 200 for _ in range(20_000)))
        log.read_all(reader)

        assert max(log.replies) <= 6_000_000
        assert sum(log.replies) / len(log.replies) > 200_000

    def test_after_a_time_in_which_nothing_was_read(self, world, monkeypatch):
        """
        What gathered while a process stood still is asked for a hundred at a time at first: nobody knows what it weighs.
        """
        monkeypatch.setattr(reader_module, "_REPLY_BYTES", 1_000_000)
        monkeypatch.setattr(reader_module, "_FIRST_COUNT", 100)
        process = world.start()
        world.run(0.1)
        for _ in range(30):
            publish(world, "a", count=1000)
            world.run(0.2)
        busy = process.reader._count
        counts: list[int] = []
        read = process.log.read

        async def noting(epoch: str, after: Position, count: int, block_seconds: float) -> Any:
            counts.append(count)
            return await read(epoch, after, count, block_seconds)

        process.log.read = noting
        publish(world, "a", count=3000)
        world.loop.now += 3
        world.run(1.0)

        assert 1000 == busy
        assert min(counts[:3]) == 100
        assert [100, 200, 400] == counts[counts.index(100) :][:3]


class TestLocated:
    @pytest.mark.parametrize(
        "id", ["", "garbage", "e1", "e1:", "e1:1", "E1:1-0", "e1:1-0 ", "e1:-1-0", "e1:1-x", "e1:1-0\n", "é:1-0"]
    )
    def test_no_id(self, world, id):
        """
        What never was an id of ours is no position.
        """
        process = world.start()
        world.run(0.1)

        assert "unknown_position" == result(world, process.reader.located(id))

    def test_entries(self, world):
        """
        Every entry of the window is a position, also one that is not on the client's topics.
        """
        publish(world, "a", count=3)
        process = world.start()
        world.run(0.1)

        found = [located(process, record.position) for record in world.server.records]

        assert [process.window.first + n for n in (1, 2, 3)] == found

    def test_another_epoch(self, world):
        """
        A position of another history is none, after the log was asked once more.
        """
        publish(world, "a")
        process = world.start()
        world.run(0.1)

        assert "epoch_changed" == located(process, world.server.last, "e99")

    def test_epoch_that_others_saw_first(self, world):
        """
        A position of a new history is believed as soon as the log confirms it.
        """
        publish(world, "a")
        process = world.start()
        world.run(0.1)
        epoch = world.server.renew_epoch(world.server.epoch)

        cursor = located(process, world.server.last, epoch)

        assert process.window.end == cursor

    def test_ahead(self, world):
        """
        A client that changes from a process that has read further is waited for.
        """
        process = world.start()
        world.run(0.1)
        process.log.delay = 1.0
        publish(world, "a")
        began = world.loop.now

        cursor = located(process, world.server.last)

        assert process.window.end == cursor
        assert world.loop.now - began >= 1.0

    def test_ahead_of_the_log(self, world):
        """
        A position that the log never had is not waited for longer than the log needs to say so.
        """
        publish(world, "a")
        process = world.start()
        world.run(0.1)
        began = world.loop.now
        position = Position(world.server.last.ms + 1, 0)

        assert "unknown_position" == located(process, position)
        assert world.loop.now - began <= 2.2

    def test_ahead_while_the_log_is_away(self, world):
        """
        What cannot be told is not guessed: neither a position nor a loss.
        """
        publish(world, "a")
        process = world.start()
        world.run(0.1)
        process.log.away = True
        process.log.break_off()
        publish(world, "a")

        with pytest.raises(LogUnavailable):
            located(process, world.server.last)

    def test_another_epoch_while_the_log_is_away(self, world):
        """
        The same holds for a position of an epoch that this process has not seen.
        """
        publish(world, "a")
        process = world.start()
        world.run(0.1)
        process.log.away = True
        process.log.break_off()

        with pytest.raises(LogUnavailable):
            located(process, world.server.last, "e99")

    def test_loss_while_waiting(self, world):
        """
        A history that is lost while a client waits for its position is lost for the client.
        """
        publish(world, "a")
        process = world.start()
        world.run(0.1)
        process.log.away = True
        process.log.break_off()
        publish(world, "a")
        position, epoch = world.server.last, process.window.epoch
        waiting = world.task(process.reader.located(write_id(epoch, position)))
        world.run(0.1)
        world.server.flush()
        publish(world, "a")
        process.log.away = False
        world.run(3.0)

        assert "epoch_changed" == waiting.result()

    def test_storm(self, world):
        """
        Clients that come at once with a foreign epoch share one look at the log.
        """
        publish(world, "a")
        process = world.start()
        world.run(0.1)
        asked: list[float] = []
        state = process.log.state

        async def counting(cursor: Position) -> Any:
            asked.append(world.loop.now)
            return await state(cursor)

        process.log.state = counting
        id = write_id("e99", world.server.last)
        tasks = [world.task(process.reader.located(id)) for _ in range(50)]
        world.run(1.5)

        assert {"epoch_changed"} == {task.result() for task in tasks}
        assert len(asked) <= 3


class TestGaps:
    """Nobody gets an event with a gap before it, before the reset."""

    @staticmethod
    def behind(world: World, before_the_next_read: Callable[[], None]) -> tuple[Process, Client]:
        """Let something happen between a reader's check and its next read."""
        publish(world, "a", count=3)
        process = world.start()
        world.run(0.1)
        client = subscribe(world, process, "a")
        read, done = process.log.read, []

        async def later(*arguments: Any) -> Any:
            if not done:
                done.append(True)
                before_the_next_read()
            return await read(*arguments)

        publish(world, "a")
        world.run(0.1)
        process.log.read = later  # type: ignore[method-assign]
        world.run(5.0)
        assert done
        return process, client

    @staticmethod
    def order(world: World, client: Client) -> list[str]:
        """What *client* read since it knew record 3, by kind."""
        lines = [line for line in world.trace if f"read by {client.name}: " in line]
        known = max(n for n, line in enumerate(lines) if "'3:" in line)
        return [line.split(": ")[1].split(" ")[0] for line in lines[known + 1 :] if "stream.position" not in line]

    def test_frozen_process(self, world):
        """
        A process that was frozen before a read, while the log was trimmed, tells of it first.
        """

        def freeze() -> None:
            publish(world, "a", count=5)
            world.loop.now += 30
            publish(world, "a", count=2)
            world.server.trim()

        process, client = self.behind(world, freeze)

        assert 1 == process.reader.gaps
        assert "stream.reset" == self.order(world, client)[0]

    def test_frozen_process_that_lost_nothing(self, world):
        """
        A freeze in which nothing was trimmed is no loss.
        """

        def freeze() -> None:
            world.loop.now += 30
            publish(world, "a", count=2)

        process, client = self.behind(world, freeze)

        assert 0 == process.reader.gaps
        assert ["message", "message"] == self.order(world, client)

    def test_cut_in_front_of_a_busy_reader(self, world):
        """
        A cut between a check and a read is noticed where the counts meet, before anything is passed on.
        """
        process = world.start()
        world.run(0.1)
        client = subscribe(world, process, "a")
        publish(world, "a", count=4)
        world.run(0.1)
        reader = process.reader
        for task in process.tasks:
            task.cancel()
        world.run(0.1)
        publish(world, "a", count=10)
        result(world, reader._check())
        del world.server.entries[:9]
        result(world, reader._pass_on(0.001))
        process.hub.pump()
        client.settle()
        process.tasks.clear()

        assert 1 == reader.gaps
        assert ["stream.reset"] == self.order(world, client)


class TestNotices:
    """What processes tell each other comes with the reads, and never stops them."""

    async def test_each_kind_has_one_who_heeds_it(self):
        """
        A kind that this version does not know is ignored; one that cannot be heeded stops nothing.
        """
        heard: list[object] = []

        def fail(fields: dict[str, str]) -> None:
            raise ValueError(fields)

        log = MemoryLog(history_seconds=600, max_events=1_000)
        window = Window(1 << 30)
        hub = Hub(window, Pace(heartbeat=15, history=600, slow_consumer=10, max_age=480), time.monotonic, Random(1))
        heed = {"evict": heard.append, "broken": fail}
        reader = Reader(log, window, hub, heed=heed, logger=Quiet())  # type: ignore[arg-type]
        for kind in ("unknown", "broken", "evict"):
            await log.notify(Notice(kind, {"kind": kind}))
        await log.publish(Batch.of([Draft(("t",), "x")]))
        await reader.step()
        assert [{"kind": "evict"}] == heard
        await log.notify(Notice("evict", {"stream": "1"}))
        await reader.step()
        assert {"stream": "1"} == heard[-1]
        assert 1 == len(window)
