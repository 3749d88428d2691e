"""How the kit finds its Redis: timeouts, and the master that Sentinels name."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from app import redis_client
from app.access import Caller
from app.log import ORIGIN, Batch, Draft, LogUnavailable, Notice, Position
from app.redis_client import SentinelAddress, sentinel_address
from app.redis_leases import RedisLeases
from app.redis_log import RedisLog
from app.redis_register import RedisRegister
from app.redis_tickets import RedisTickets
from app.register import Record
from app.stack import Redis
from tests.faults.parts import Sentinel, connect, follow, sentinel_url
from tests.live import becomes, eventually, frozen


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sse-sentinel-") as name:
        yield Path(name)


@pytest.fixture
def watched(folder: Path, require) -> Iterator[tuple[Redis, Redis, Sentinel]]:
    """A master, its replica, and a Sentinel that knows both."""
    require("redis-server", "valkey-server")
    with contextlib.ExitStack() as closing:
        servers = []
        for name in ("one", "two"):
            server = Redis(folder, name=name)
            closing.callback(server.close)
            server.start()
            server.wait_ready()
            servers.append(server)
        follow(servers[1], servers[0])
        sentinel = Sentinel(folder, servers[0], down_seconds=0.5)
        closing.callback(sentinel.close)
        sentinel.start()
        sentinel.wait_ready()
        # Sentinels ask the master for its replicas every ten seconds.
        eventually(lambda: sentinel.replicas_known() == 1, "the Sentinel knows the replica", 30)
        yield servers[0], servers[1], sentinel


@contextlib.asynccontextmanager
async def opened(url: str, **options: object) -> AsyncIterator[RedisLog]:
    options = {"history_seconds": 600, "max_events": 1_000, "timeout_seconds": 1.0} | options
    log = RedisLog(url, **options)  # type: ignore[arg-type]
    try:
        await log.open()
        yield log
    finally:
        await log.close()


def batch(data: str, key: str | None = None) -> Batch:
    return Batch.of([Draft(("t",), data)], key)


class TestSentinelAddress:
    @pytest.mark.parametrize(
        ("url", "address"),
        [
            (
                "redis+sentinel://one:26379,two/main/3",
                SentinelAddress((("one", 26379), ("two", 26379)), "main", "redis://master/3", None, None),
            ),
            (
                "rediss+sentinel://ann:p%40ss@[::1]:7/m?sentinel_password=x&ssl_cert_reqs=none",
                SentinelAddress((("::1", 7),), "m", "rediss://ann:p%40ss@master/0?ssl_cert_reqs=none", None, "x"),
            ),
            ("redis://one:6379/0", None),
            ("unix:///tmp/redis", None),
        ],
    )
    def test_read(self, url: str, address: SentinelAddress | None):
        """User and password in front are the master's, `sentinel_…` in the query the Sentinels'."""
        assert address == sentinel_address(url)

    async def test_database_and_password_reach_the_master(self):
        """What the address says of the master is what connections to it are made with."""
        client = redis_client.client(
            "redis+sentinel://ann:p%40ss@127.0.0.1:7/m/3?sentinel_username=bob", timeout_seconds=1.5
        )
        known = client.connection_pool.connection_kwargs
        [sentinel] = client.connection_pool.sentinel_manager.sentinels

        assert (3, "ann", "p@ss") == (known["db"], known["username"], known["password"])
        assert 1.5 == known["socket_timeout"] == known["socket_connect_timeout"]
        assert "bob" == sentinel.connection_pool.connection_kwargs["username"]


class TestFailover:
    async def test_reader_and_publishers_find_the_new_master(self, watched: tuple[Redis, Redis, Sentinel]):
        """
        The master dies: both find the promoted replica by themselves, and no publish is doubled on the way.
        """
        master, replica, sentinel = watched
        async with opened(sentinel_url(sentinel)) as log:
            await log.publish(batch("before"))
            with connect(master) as old:
                assert 1 == old.wait(1, 5_000)
            master.kill()

            async def published() -> bool:
                with contextlib.suppress(LogUnavailable):
                    return bool(await log.publish(batch("after", "key")))
                return False

            async def opened_again() -> bool:
                with contextlib.suppress(LogUnavailable):
                    await log.open()
                    return True
                return False

            await becomes(published, "a publish after the failover", 60)
            # For a moment the Sentinel knows of no master that is well.
            await becomes(opened_again, "the new master", 60)
            state = await log.state(Position(0, 0))
            entries = await log.read(state.epoch or "", Position(0, 0), 10, 0)

            assert replica.port == sentinel.master_port()
            assert ["before", "after"] == [entry.data for entry in entries]

    async def test_frozen_master_is_left(self, watched: tuple[Redis, Redis, Sentinel]):
        """A master that says nothing is noticed by its silence, and replaced."""
        master, replica, sentinel = watched
        async with opened(sentinel_url(sentinel)) as log:
            with frozen(master):
                began = time.monotonic()
                with pytest.raises(LogUnavailable):
                    await log.read("", Position(0, 0), 10, 0.2)
                noticed = time.monotonic() - began
                await asyncio.to_thread(eventually, lambda: sentinel.master_port() == replica.port, "the failover", 60)

                async def found() -> bool:
                    with contextlib.suppress(LogUnavailable):
                        await log.open()
                        return bool(await log.publish(batch("after", "key")))
                    return False

                # For a moment the Sentinel knows of no master that is well.
                await becomes(found, "the new master", 60)
            assert noticed < 15

    async def test_no_sentinel_answers(self, watched: tuple[Redis, Redis, Sentinel]):
        """Without a Sentinel the log is away; an open connection serves on."""
        _, _, sentinel = watched
        async with opened(sentinel_url(sentinel)) as log:
            await log.publish(batch("one"))
            sentinel.kill()
            assert await log.publish(batch("two"))
            with pytest.raises(LogUnavailable, match="sse"):
                await log.open()


class TestWaitForReplicas:
    async def test_acknowledged_survives_the_masters_end(self, watched: tuple[Redis, Redis, Sentinel]):
        """
        SSE_PUBLISH_WAIT_REPLICAS=1: nothing is acknowledged that the replica has not got.

        The replica is frozen: no answer, though the master has the event. A
        repetition with the same key is one publish, acknowledged when it is there.
        """
        master, replica, sentinel = watched
        options = {"wait_replicas": 1, "publish_timeout_seconds": 2.0}
        async with opened(sentinel_url(sentinel), **options) as log, opened(sentinel_url(sentinel), **options) as other:
            await log.publish(batch("one"))
            with frozen(replica):
                with pytest.raises(LogUnavailable, match="SSE_PUBLISH_WAIT_REPLICAS"):
                    await log.publish(batch("two", "key"))
                # Another connection, which wrote nothing before.
                with pytest.raises(LogUnavailable, match="SSE_PUBLISH_WAIT_REPLICAS"):
                    await other.publish(batch("two", "key"))
                with connect(master) as hands:
                    assert 2 == hands.xlen("{sse}:log")
            ids = await other.publish(batch("two", "key"))
            master.kill()
            with connect(replica) as hands:
                kept = hands.xrange("{sse}:log")

            assert ["one", "two"] == [fields["data"] for _, fields in kept]
            assert ids == [f"{ids[0].partition(':')[0]}:{kept[-1][0]}"]

    async def test_script_that_redis_forgot(self, watched: tuple[Redis, Redis, Sentinel]):
        """A master that was restarted knows no scripts: it is given them again."""
        master, _, sentinel = watched
        async with opened(sentinel_url(sentinel), wait_replicas=1) as log:
            with connect(master) as hands:
                hands.script_flush()

            assert 1 == len(await log.publish(batch("one")))


class TestCrowd:
    """More commands at once than there are connections: they wait for each other, and none fails."""

    async def test_tickets(self, module_redis_server: Redis):
        """A storm of reconnects finds its tickets."""
        store = RedisTickets(module_redis_server.url, prefix="crowd", use_seconds=30, max_seconds=60, timeout_seconds=30)
        ticket = await store.make(Caller("alice"))
        found = await asyncio.gather(*(store.find(ticket.text) for _ in range(300)), return_exceptions=True)
        await store.close()

        assert ["alice"] * 300 == [getattr(each, "user", each) for each in found]

    async def test_runs(self, module_redis_server: Redis):
        """Many readers ask for their run."""
        register = RedisRegister(module_redis_server.url, "a", prefix="crowd", timeout_seconds=30)
        await register.start(Record("r", "chat", None, "a", "f"), 60)
        found = await asyncio.gather(*(register.get("r") for _ in range(300)), return_exceptions=True)
        await register.close()

        assert ["r"] * 300 == [getattr(each, "id", each) for each in found]

    async def test_publishers(self, module_redis_server: Redis):
        """Events and notices are written, and positions looked for, without a second attempt."""
        log = RedisLog(module_redis_server.url, prefix="crowd-log", history_seconds=60, max_events=1_000, timeout_seconds=30)
        batches = [Batch.of([Draft(("t",), str(number))]) for number in range(100)]
        asked = [log.publish(batch) for batch in batches] + [log.notify(Notice("watch", {})) for _ in range(100)]
        found = await asyncio.gather(*asked, *(log.has(Position(1, 1)) for _ in range(100)), return_exceptions=True)
        added = (await log.state(ORIGIN)).added
        await log.close()

        assert [None] * 100 + [False] * 100 == found[100:]
        assert 100 == added

    async def test_notices_and_positions(self, module_redis_server: Redis):
        """Publishers that wait for replicas hold up no notice, which ends a stream, and no client with a position."""
        log = RedisLog(module_redis_server.url, prefix="crowd-wait", history_seconds=60, max_events=1_000, wait_replicas=1)
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(log.publish(Batch.of([Draft(("t",), str(number))]))) for number in range(300)]
            await asyncio.sleep(0)  # all of them ask
            assert not await log.has(Position(1, 1))
            await log.notify(Notice("watch", {}))
            assert not any(publish.done() for publish in asked)
            for publish in asked:
                publish.cancel()
        await log.close()

    async def test_administrators(self, module_redis_server: Redis):
        """Administrators do not take the connection by which this process asks for places."""
        options = {"limit": 1, "lease_seconds": 60, "max_age_seconds": 60, "timeout_seconds": 30}
        store = RedisLeases(module_redis_server.url, "a", prefix="crowd", **options)  # type: ignore[arg-type]
        asked = [store.held("alice") for _ in range(100)] + [store.revoke("alice") for _ in range(100)]
        *looked, alive = await asyncio.gather(*asked, store.renew(), return_exceptions=True)
        await store.close()

        assert [[]] * 100 + [0] * 100 == looked
        assert alive is False

    async def test_nobody_is_served(self, module_redis_server: Redis):
        """Who finds no connection in time is told that Redis does not answer."""
        register = RedisRegister(module_redis_server.url, "a", prefix="crowd", timeout_seconds=0.3)
        with frozen(module_redis_server):
            found = await asyncio.gather(*(register.get("r") for _ in range(40)), return_exceptions=True)
        await register.close()

        assert {LogUnavailable} == {type(each) for each in found}
