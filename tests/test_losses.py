"""
History that was lost is announced, to whoever is connected and to whoever was away, and streams go on.

Two real processes, each behind a proxy of its own, and a real Redis that loses things.
"""

import asyncio
import contextlib
import re
import shlex
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from app.event import Draft
from app.hub import Hub, Pace
from app.log import ORIGIN, Batch, LogState, LogUnavailable, Position
from app.memory_log import MemoryLog
from app.reader import Checked, Reader, loss
from app.stack import ROOT, App
from app.window import Window
from tests.live import (
    LOG,
    Pair,
    Subscriber,
    becomes,
    connect,
    event,
    eventually,
    frozen,
    logged,
    order,
    publish,
    replace,
    shared,
    subscribed,
)


@pytest.fixture(scope="module")
def pair(require: Callable[..., str]) -> Pair:
    require("redis-server", "valkey-server")
    return shared.pair


@pytest.fixture
def hands(pair: Pair) -> Iterator[Any]:
    """Our own hands on the log, as a publisher's or an operator's."""
    with connect(pair.server) as client:
        yield client


@dataclass
class Watch:
    """A stream on each process, and the positions of clients that went away."""

    pair: Pair
    a: Subscriber
    b: Subscriber
    away: list[str]
    gaps: tuple[float, float]

    @property
    def streams(self) -> tuple[Subscriber, Subscriber]:
        return self.a, self.b

    async def goes_on(self, text: str = "after") -> None:
        """Assert that an event published through either process reaches both streams."""
        for app, data in ((self.pair.a, f"{text}-1"), (self.pair.b, f"{text}-2")):
            await publish(app, event(data))
            for stream in self.streams:
                await stream.until_data(data)
        for stream in self.streams:
            since = [e for e in stream.everything if e.event == "stream.reset" or e.data.startswith(text)]
            assert [f"{text}-1", f"{text}-2"] == [e.data for e in since[-2:]]
            assert order(since[-2].id) < order(since[-1].id)

    async def is_announced(self, *reasons: str) -> None:
        """Assert one reset on each stream, for one of *reasons*, and one for all who were away."""
        for stream in self.streams:
            await stream.until(lambda s: s.resets)
        await self.goes_on()
        for stream in self.streams:
            assert 1 == len(stream.resets), stream.everything
            assert stream.resets[0]["reason"] in reasons
            assert stream.told("stream.reset")[0].id
        assert (self.gaps[0] + 1, self.gaps[1] + 1) == await self.pair.gaps()
        for app in (self.pair.a, self.pair.b):
            assert logged(app, "log_gap")[-1]["reason"] in reasons
        await asyncio.gather(*(self._was_away(app, id) for app in (self.pair.a, self.pair.b) for id in self.away))
        for app in (self.pair.a, self.pair.b):
            # Positions of the new history are good on both processes.
            async with subscribed(app, "t", last_event_id=self.a.ids[-1]) as stream:
                await publish(app, event("for all"))
                await stream.until_data("for all")
                assert [] == stream.resets

    async def _was_away(self, app: App, position: str) -> None:
        """Assert that who comes back with *position* is told, gets nothing old, and is live."""
        topic = f"{app.name}/{position}"
        async with subscribed(app, "t", topic, last_event_id=position) as stream:
            await stream.until(lambda s: s.resets)
            assert "epoch_changed" == stream.resets[0]["reason"]
            await publish(app, event("back", topic))
            await stream.until_data("back")
            assert ["back"] == stream.data


@contextlib.asynccontextmanager
async def watching(pair: Pair) -> AsyncIterator[Watch]:
    before = await pair.gaps()
    async with subscribed(pair.a, "t") as a, subscribed(pair.b, "t") as b:
        ids = await publish(pair.a, *(event(f"before-{n}") for n in range(4)))
        await a.until_data("before-3")
        await b.until_data("before-3")
        yield Watch(pair, a, b, [ids[0], ids[-1], b.told("stream.open")[0].id], before)


class TestLostHistory:
    async def test_flushall(self, pair, hands):
        """
        FLUSHALL is announced to all, and the log goes on under a new name.
        """
        async with watching(pair) as watch:
            hands.flushall()
            await watch.is_announced("epoch_changed")

    async def test_flushall_and_new_events_at_once(self, pair, hands):
        """
        A publisher that goes on after FLUSHALL, before anybody noticed, hides nothing.
        """
        async with watching(pair) as watch:
            with hands.pipeline() as pipe:
                pipe.flushall()
                for n in range(50):
                    pipe.xadd(LOG, {"v": "1", "topics": "t", "data": f"new-{n}"})
                pipe.execute()
            await watch.is_announced("epoch_changed")

    async def test_deleted_log(self, pair, hands):
        """
        A log that is gone while its name stayed has gone back.
        """
        async with watching(pair) as watch:
            hands.delete(LOG)
            await watch.is_announced("log_went_back", "epoch_changed")

    async def test_replaced_redis(self, pair):
        """
        Another Redis on the same address, empty.
        """
        async with watching(pair) as watch:
            await asyncio.to_thread(replace, pair.server)
            await watch.is_announced("epoch_changed")

    async def test_clock_behind(self, pair, hands):
        """
        A log of the same name that begins again, with ids that look old.
        """
        async with watching(pair) as watch:
            with hands.pipeline() as pipe:
                pipe.delete(LOG)
                for n in range(1, 60):
                    pipe.xadd(LOG, {"v": "1", "topics": "t", "data": f"old-{n}"}, id=f"1000-{n}")
                pipe.execute()
            await watch.is_announced("log_went_back", "epoch_changed")

    @pytest.mark.parametrize("entries", [3, 500], ids=["fewer", "more"])
    async def test_another_log(self, pair, hands, entries):
        """
        A log of the same name with other entries, some older and some newer than what was read.
        """
        async with watching(pair) as watch:
            ms, _ = order(watch.a.ids[-1])
            with hands.pipeline() as pipe:
                pipe.delete(LOG)
                pipe.xadd(LOG, {"v": "1", "topics": "t", "data": "older"}, id="1000-1")
                for n in range(entries):
                    pipe.xadd(LOG, {"v": "1", "topics": "t", "data": "newer"}, id=f"{ms + 1}-{n}")
                pipe.execute()
            await watch.is_announced("log_replaced", "epoch_changed")

    @pytest.mark.parametrize("went_on", [False, True], ids=["silent", "went on"])
    async def test_promoted_replica_without_the_tail(self, pair, went_on):
        """
        A failover to a replica that had not received the last entries.

        *went on*: it takes new events, newer than the lost ones, before anybody looks.
        """
        async with watching(pair) as watch:
            replica, master = pair.replica(), pair.server
            with connect(replica) as new:
                new.replicaof("NO", "ONE")
                watch.away = await publish(pair.a, event("tail-1"), event("tail-2"))
                for stream in watch.streams:
                    await stream.until_data("tail-2")
                if went_on:
                    for n in range(3):
                        new.xadd(LOG, {"v": "1", "topics": "t", "data": f"other-{n}"})
            pair.turn_to(replica)
            master.kill()
            await watch.is_announced("log_went_back", "log_replaced", "epoch_changed")

    async def test_trimmed_past_one_reader(self, pair, hands):
        """
        A process that slept while the log was cut tells its own streams; the others lost nothing.
        """
        async with watching(pair) as watch:
            epoch = watch.a.ids[-1].partition(":")[0]
            with frozen(pair.a):
                # Nothing may be on its way to it already.
                pair.proxies[0].cut()
                ids = await publish(pair.b, *(event(f"cut-{n}") for n in range(20)))
                await watch.b.until_data("cut-19")
                hands.xtrim(LOG, maxlen=3, approximate=False)
            await watch.a.until(lambda s: s.resets)
            await watch.goes_on()

            assert (["trimmed"], []) == ([r["reason"] for r in watch.a.resets], watch.b.resets)
            assert (watch.gaps[0] + 1, watch.gaps[1]) == await pair.gaps()
            assert [f"cut-{n}" for n in range(20)] == [d for d in watch.b.data if d.startswith("cut")]
            assert {epoch} == {id.partition(":")[0] for id in watch.a.ids + watch.b.ids}
            for app in (pair.a, pair.b):
                async with subscribed(app, "t", last_event_id=ids[-1]) as stream:
                    await stream.until_data("after-1", "after-2")
                    assert [] == stream.resets
            # What was cut out of the log is lost on the process that never had it.
            async with subscribed(pair.a, "t", last_event_id=ids[3]) as stream:
                await stream.until(lambda s: s.resets)
                assert "history_lost" == stream.resets[0]["reason"]

    async def test_emptied_log(self, pair, hands):
        """
        A log that was trimmed to nothing while a process slept is announced there.
        """
        async with watching(pair) as watch:
            with frozen(pair.a):
                pair.proxies[0].cut()
                await publish(pair.b, event("cut-1"), event("cut-2"))
                await watch.b.until_data("cut-2")
                hands.xtrim(LOG, maxlen=0, approximate=False)
            await watch.a.until(lambda s: s.resets)
            await watch.goes_on()

            assert (["trimmed"], []) == ([r["reason"] for r in watch.a.resets], watch.b.resets)


class TestKeptHistory:
    """What looks like a loss and is none is not announced: a false alarm makes every client fetch its state."""

    async def test_restart_with_persistence(self, pair):
        """
        A Redis that comes back with its data: nothing is lost, and nobody is told otherwise.
        """
        async with watching(pair) as watch:
            for n, number in enumerate((signal.SIGTERM, signal.SIGKILL)):
                await asyncio.to_thread(pair.server.restart, number)
                await pair.connected()
                await watch.goes_on(f"again-{n}")

            assert ([], [], watch.gaps) == (watch.a.resets, watch.b.resets, await pair.gaps())
            assert watch.a.data == watch.b.data
            for app in (pair.a, pair.b):
                async with subscribed(app, "t", last_event_id=watch.away[0]) as stream:
                    await stream.until_data("again-1-1", "again-1-2")
                    assert (watch.a.data[1:], []) == (stream.data, stream.resets)

    async def test_promoted_replica_with_everything(self, pair):
        """
        A failover that lost nothing is not announced.
        """
        async with watching(pair) as watch:
            replica, master = pair.replica(), pair.server
            with connect(replica) as new:
                new.replicaof("NO", "ONE")
            pair.turn_to(replica)
            master.kill()
            await pair.connected()
            await watch.goes_on()

            assert ([], [], watch.gaps) == (watch.a.resets, watch.b.resets, await pair.gaps())

    async def test_master_that_becomes_a_replica(self, pair):
        """
        A master that was demoted lives on and keeps its connections: readers and publishers leave it.
        """
        async with watching(pair) as watch:
            replica, master = pair.replica(), pair.server
            with connect(master) as old, connect(replica) as new:
                new.replicaof("NO", "ONE")
                old.replicaof("127.0.0.1", str(replica.port))
            pair.turn_to(replica, cut=False)
            await watch.goes_on()

            assert ([], [], watch.gaps) == (watch.a.resets, watch.b.resets, await pair.gaps())
            master.kill()

    async def test_cut_connections(self, pair):
        """
        Connections that were cut, again and again, lose and double nothing.
        """
        async with watching(pair) as watch:
            for n in range(6):
                for proxy in pair.proxies:
                    proxy.cut()
                await publish(pair.b if n % 2 else pair.a, event(f"cut-{n}"))
            await watch.goes_on()

            assert [f"cut-{n}" for n in range(6)] == watch.a.data[4:-2]
            assert watch.a.ids == watch.b.ids
            assert ([], [], watch.gaps) == (watch.a.resets, watch.b.resets, await pair.gaps())

    async def test_ids_ahead_of_the_clock(self, pair, hands):
        """
        An id from the future is alarmed on; order holds, because the next ids follow it.
        """
        async with watching(pair) as watch:
            ms, _ = order(watch.a.ids[-1])
            hands.xadd(LOG, {"v": "1", "topics": "t", "data": "future"}, id=f"{ms + 3_600_000}-7")
            await watch.goes_on()

            assert (["future", "after-1", "after-2"], [], []) == (
                watch.a.data[4:], watch.a.resets, watch.b.resets,
            )  # fmt: skip
            assert (ms + 3_600_000, 8) == order(watch.a.ids[-2])
            for app in (pair.a, pair.b):
                [line, *_] = await asyncio.to_thread(eventually, lambda app=app: logged(app, "log_ahead_of_clock"))
                assert 3_500 < line["seconds"] < 3_700
                assert "error" == line["level"]
        # Leave a log with a clock behind us, by the way that the README tells.
        [command] = re.findall(r"redis-cli -p PORT DEL (.*)", (ROOT / "README.md").read_text())
        async with watching(pair) as watch:
            hands.delete(*shlex.split(command))
            await watch.is_announced("epoch_changed")
            for stream in watch.streams:
                assert abs(order(stream.ids[-1])[0] / 1000 - time.time()) < 600


class TestLoss:
    """The comparison itself, case by case."""

    @staticmethod
    def state(**changes: Any) -> LogState:
        """Ten entries were added, 5-0 to 14-0; six are kept; all were read."""
        same = {
            "epoch": "e", "first": Position(9, 0), "last": Position(14, 0), "added": 10, "length": 6,
            "has_cursor": True, "now_ms": 20,
        }  # fmt: skip
        return LogState(**(same | changes))

    READ = Checked("e", Position(14, 0), 10)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({}, None),
            ({"last": Position(16, 0), "added": 12, "length": 8}, None),
            ({"first": Position(14, 0), "length": 1}, None),
            ({"first": None, "length": 0, "has_cursor": False}, None),
            ({"first": Position(15, 0), "last": Position(16, 0), "added": 12, "length": 2, "has_cursor": False}, None),
            ({"epoch": "f"}, "epoch_changed"),
            ({"epoch": None}, "epoch_changed"),
            ({"last": Position(13, 9)}, "log_went_back"),
            ({"last": ORIGIN, "first": None, "added": 0, "length": 0, "has_cursor": False}, "log_went_back"),
            ({"last": Position(16, 0), "first": Position(16, 0), "added": 12, "length": 1, "has_cursor": False}, "trimmed"),
            ({"last": Position(16, 0), "first": None, "added": 12, "length": 0, "has_cursor": False}, "trimmed"),
            ({"added": 11}, "log_replaced"),
            ({"added": 9, "length": 5}, "log_replaced"),
            ({"last": Position(16, 0), "length": 6}, "log_replaced"),
            ({"last": Position(16, 0), "added": 12, "length": 8, "has_cursor": False}, "log_replaced"),
        ],
    )  # fmt: skip
    def test_reason(self, changes, reason):
        """
        Whatever proves that entries cannot be had has its word, and nothing else has one.
        """
        assert reason == loss(self.READ, self.state(**changes))


class Workbench:
    """A reader on a log in memory, driven step by step."""

    def __init__(self, check_seconds: float = 1e9) -> None:
        self.log = MemoryLog(history_seconds=600, max_events=1_000_000)
        self.window = Window(1 << 30)
        pace = Pace(heartbeat=15, history=600, slow_consumer=10, max_age=480)
        self.hub = Hub(self.window, pace, time.monotonic, Random(1))
        self.reader = Reader(self.log, self.window, self.hub, check_seconds=check_seconds)

    async def put(self, *data: str) -> list[str]:
        return await self.log.publish(Batch.of([Draft(("t",), text) for text in data]))

    def cut(self, keep: int) -> None:
        """Trim the log as a careless publisher would: XADD with MAXLEN."""
        drop = len(self.log._positions) - keep
        del self.log._positions[:drop]
        del self.log._drafts[:drop]

    async def check(self) -> None:
        await self.reader._check()

    async def read(self) -> None:
        await self.reader._pass_on(0.001)


async def _raising(*arguments: object) -> Any:
    raise LogUnavailable("the connection was lost")


class TestReader:
    async def test_cut_past_a_reader_that_never_rests(self):
        """
        A log that is cut just in front of the reader, between two checks and under load, is announced.

        The reader is never at the log's end when it looks, so it can't compare the counts there.
        """
        bench = Workbench()
        await bench.put("a")
        await bench.check()
        await bench.put(*"bcdefgh")
        bench.cut(5)
        await bench.read()
        for _ in range(3):
            await bench.put("more")
            await bench.check()
            await bench.put("more")
            await bench.read()

        assert 1 == bench.reader.gaps

    async def test_busy_log_without_a_loss(self):
        """
        A reader that never rests, and loses nothing, announces nothing.
        """
        bench = Workbench()
        await bench.check()
        for n in range(30):
            await bench.put(*map(str, range(n)))
            await bench.check()
            await bench.put(*map(str, range(n % 3)))
            await bench.read()
            bench.cut(10)
        await bench.check()

        assert 0 == bench.reader.gaps

    async def test_cut_while_loading(self):
        """
        A log that is cut between two reads of a load leaves no hole in the window.

        A client that stands before the hole would go on behind it, and hear nothing.
        """
        bench = Workbench()
        ids = await bench.put(*map(str, range(1000)))
        whole = bench.log.read

        async def read(epoch: str, after: Position, count: int, block_seconds: float) -> list[Any]:
            entries = await whole(epoch, after, count, block_seconds)
            if after == ORIGIN:
                bench.cut(300)
            return entries

        bench.log.read = read  # type: ignore[method-assign]
        await bench.check()
        await bench.check()
        found = {id: await bench.reader.located(id) for id in ids[:750]}

        kept = bench.window.end - bench.window.first
        assert 299 <= kept <= 300
        assert {"history_lost"} == {found[id] for id in ids[:699]}
        assert isinstance(found[ids[720]], int)

    async def test_epoch_that_another_process_saw_first(self):
        """
        A position of an epoch that is not the reader's makes it look at the log before it judges.
        """
        bench = Workbench(check_seconds=0.5)
        await bench.put("a")
        await bench.check()
        running = asyncio.create_task(bench.reader.run())
        try:
            await becomes(lambda: asyncio.sleep(0, bench.reader.connected))
            await bench.log.renew_epoch(bench.window.epoch)
            [id] = await bench.put("b")
            foreign = "0000000" + id[id.index(":") :]
            found = await asyncio.gather(*(bench.reader.located(each) for each in (id, id, foreign)))

            assert [bench.window.end, bench.window.end, "epoch_changed"] == found
            assert 1 == bench.reader.gaps
        finally:
            running.cancel()

    async def test_reconnect(self):
        """
        After a lost connection the log is checked before it is read on: nobody gets an event behind a gap.
        """
        bench = Workbench()
        await bench.put("a")
        running = asyncio.create_task(bench.reader.run())
        try:
            await becomes(lambda: asyncio.sleep(0, bench.reader.connected))
            whole, bench.log.read = bench.log.read, _raising  # type: ignore[method-assign]
            await bench.put("b")
            await becomes(lambda: asyncio.sleep(0, not bench.reader.connected))
            await bench.put("c", "d")
            bench.cut(1)
            bench.log.read = whole  # type: ignore[method-assign]
            await becomes(lambda: asyncio.sleep(0, bench.reader.connected))

            assert 1 == bench.reader.gaps
        finally:
            running.cancel()

    async def test_replies_that_take_too_long(self):
        """
        A reply that does not arrive in time is asked for in smaller pieces, not again and again.
        """
        bench = Workbench(check_seconds=0.5)
        await bench.put(*["x" * 100_000] * 60)
        whole, asked = bench.log.read, []

        async def read(epoch: str, after: Position, count: int, block_seconds: float) -> list[Any]:
            asked.append(count)
            if count > 20:
                raise LogUnavailable("it took too long")
            return await whole(epoch, after, count, block_seconds)

        bench.log.read = read  # type: ignore[method-assign]
        running = asyncio.create_task(bench.reader.run())
        try:
            await becomes(lambda: asyncio.sleep(0, bench.reader.loaded))
            assert 60 == len(bench.window)
            assert [100, 25, 6] == asked[:3]
        finally:
            running.cancel()
