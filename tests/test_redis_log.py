"""
What only the log in Redis can get wrong: connections, foreign entries, refusals, lost answers.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from app.event import Draft
from app.log import ORIGIN, Batch, IdempotencyConflict, LogUnavailable, Notice, read_id
from app.redis_log import RedisLog
from app.settings import rules
from app.stack import Redis
from tests.live import Proxy, Site, becomes, connect, eventually, frozen, run

_names = itertools.count(1)

type Make = Callable[..., RedisLog]


@pytest.fixture(scope="module")
def site(require: Callable[..., str]) -> Iterator[Site]:
    require("redis-server", "valkey-server")
    with Site() as site:
        yield site


@pytest.fixture(scope="module")
def server(site: Site) -> Redis:
    return site.redis("--appendonly", "no")


@pytest.fixture(scope="module")
def proxy(site: Site, server: Redis) -> Proxy:
    return site.proxy(server)


@pytest.fixture
async def make(server: Redis) -> AsyncIterator[Make]:
    made: list[RedisLog] = []

    def make(url: str = "", **options: Any) -> RedisLog:
        options = {
            "prefix": f"log-{next(_names)}",
            "history_seconds": 60,
            "max_events": 1000,
            "timeout_seconds": 2.0,
        } | options
        log = RedisLog(url or server.url, **options)
        made.append(log)
        return log

    yield make
    for log in made:
        await log.close()


@pytest.fixture
def hands(server: Redis) -> Iterator[Any]:
    with connect(server) as client:
        yield client


def batch(*data: str, key: str | None = None) -> Batch:
    return Batch.of([Draft(("t",), text) for text in data], key)


async def everything(log: RedisLog) -> list[str]:
    return [entry.data for entry in await log.read("e", ORIGIN, 100_000, 0)]


class TestBareXadd:
    """An event that any service wrote with one XADD, without asking this kit."""

    async def test_documented_fields(self, make, server, require):
        """
        The fields as documented, typed into redis-cli, are an event like any other.
        """
        log = make()
        await run(
            require("redis-cli", "valkey-cli"), "-p", str(server.port), "XADD", log.log_key, "*",
            "v", "1", "topics", "a b/c", "event", "greeting", "data", "hällo\nthere", "retry", "250",
        )  # fmt: skip
        [entry] = await log.read("e", ORIGIN, 10, 0)

        assert (("a", "b/c"), "greeting", "hällo\nthere", 250) == (
            entry.topics, entry.event, entry.data, entry.retry,
        )  # fmt: skip

    @pytest.mark.parametrize(
        "fields",
        [
            {"v": "1", "topics": "a", "data": "x"},
            {"data": "x", "topics": "a", "v": "1"},
            {"v": "1", "topics": "a", "data": "x", "event": ""},
            {"v": "1", "topics": "a a", "data": "x"},
        ],
        ids=["least", "other order", "empty event", "topic twice"],
    )
    async def test_least_fields(self, make, hands, fields):
        """
        Event and retry may be left out, and the order of fields means nothing.
        """
        log = make()
        hands.xadd(log.log_key, fields)
        [entry] = await log.read("e", ORIGIN, 10, 0)

        assert (("a",), "", "x", None) == (entry.topics, entry.event, entry.data, entry.retry)

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"topics": "a", "data": "x"}, "v must be 1"),
            ({"v": "2", "topics": "a", "data": "x"}, "v must be 1, got b'2'"),
            ({"v": "", "topics": "a", "data": "x"}, "v must be 1"),
            ({"v": "1", "data": "x"}, "topic must be"),
            ({"v": "1", "topics": "", "data": "x"}, "topic must be"),
            ({"v": "1", "topics": " a", "data": "x"}, "topic must be"),
            ({"v": "1", "topics": "a  b", "data": "x"}, "topic must be"),
            ({"v": "1", "topics": "a,b", "data": "x"}, "topic must be"),
            ({"v": "1", "topics": "a*", "data": "x"}, "topic must be"),
            ({"v": "1", "topics": "ä", "data": "x"}, "topic must be"),
            ({"v": "1", "topics": "a\n", "data": "x"}, "topic must be"),
            ({"v": "1", "topics": "a" * 256, "data": "x"}, "topic must be"),
            ({"v": "1", "topics": b"\xff", "data": "x"}, "utf-8"),
            ({"v": "1", "topics": " ".join(map(str, range(6))), "data": "x"}, "topics must be at most 5"),
            ({"v": "1", "topics": "a"}, "data must be there"),
            ({"v": "1", "topics": "a", "data": b"caf\xe9"}, "utf-8"),
            ({"v": "1", "topics": "a", "data": b"\xed\xa0\x80"}, "utf-8"),
            ({"v": "1", "topics": "a", "data": "x" * 1001}, "data must have at most 1000 bytes"),
            ({"v": "1", "topics": "a", "data": "ä" * 501}, "data must have at most 1000 bytes"),
            ({"v": "1", "topics": "a", "data": "x", "event": "stream.reset"}, "must not begin with `stream.`"),
            ({"v": "1", "topics": "a", "data": "x", "event": "run.done"}, "must not begin with"),
            ({"v": "1", "topics": "a", "data": "x", "event": "a\ndata: forged"}, "must not contain CR, LF or NUL"),
            ({"v": "1", "topics": "a", "data": "x", "event": "a\rb"}, "must not contain CR, LF or NUL"),
            ({"v": "1", "topics": "a", "data": "x", "event": "a\0b"}, "must not contain CR, LF or NUL"),
            ({"v": "1", "topics": "a", "data": "x", "event": b"\xff"}, "utf-8"),
            ({"v": "1", "topics": "a", "data": "x", "event": "n" * 256}, "event must have at most 255"),
            ({"v": "1", "topics": "a", "data": "x", "retry": ""}, "retry must be"),
            ({"v": "1", "topics": "a", "data": "x", "retry": "soon"}, "retry must be"),
            ({"v": "1", "topics": "a", "data": "x", "retry": "-1"}, "retry must be"),
            ({"v": "1", "topics": "a", "data": "x", "retry": "1.5"}, "retry must be"),
            ({"v": "1", "topics": "a", "data": "x", "retry": "1_000"}, "retry must be"),
            ({"v": "1", "topics": "a", "data": "x", "retry": " 5"}, "retry must be"),
            ({"v": "1", "topics": "a", "data": "x", "retry": "+5"}, "retry must be"),
            ({"v": "1", "topics": "a", "data": "x", "retry": "86400001"}, "retry must be"),
            ({"v": "1", "topics": "a", "data": "x", "retry": "9" * 5000}, "retry must be"),
            ({"v": "1", "topics": "a", "data": "x", "id": "7"}, "must be one of v, topics, event, data, retry"),
            ({"v": "1", "topics": "a", "data": "x", b"\xff\xfe": "7"}, "must be one of"),
            ({"v": "1", "topics": "a", "data": "x", "Event": "x"}, "must be one of"),
        ],
    )  # fmt: skip
    async def test_broken_fields(self, make, hands, fields, named):
        """
        A broken entry reaches nobody, keeps its place, and says in one sentence what is wrong.
        """
        log = make(max_topics=5, max_event_bytes=1000)
        id = hands.xadd(log.log_key, fields)
        hands.xadd(log.log_key, {"v": "1", "topics": "a", "data": "next"})
        broken, next = await log.read("e", ORIGIN, 10, 0)

        assert () == broken.topics
        assert f"e:{id}" == broken.id
        assert named in broken.data
        assert len(broken.data) < 500
        assert "next" == next.data

    async def test_largest_event(self, make, hands):
        """
        The limit is on bytes, and what just fits is an event.
        """
        log = make(max_event_bytes=1000)
        hands.xadd(log.log_key, {"v": "1", "topics": "a", "data": "ä" * 500})
        [entry] = await log.read("e", ORIGIN, 10, 0)

        assert ("a",) == entry.topics

    async def test_largest_ids(self, make, hands):
        """
        Whatever id Redis can give, it can be read back out of the event.
        """
        log = make()
        ids = ["1-18446744073709551615", "18446744073709551614-3", "18446744073709551615-18446744073709551615"]
        for id in ids:
            hands.xadd(log.log_key, {"v": "1", "topics": "a", "data": "x"}, id=id)
        entries = await log.read("e", ORIGIN, 10, 0)

        assert [("e", entry.position) for entry in entries] == [read_id(entry.id) for entry in entries]
        assert all([await log.has(entry.position) for entry in entries])

    def test_ids_that_redis_cannot_give(self):
        """
        A number that is too large for Redis was never a position; Redis is not asked about it.
        """
        assert None is read_id("e:18446744073709551616-0")
        assert None is read_id("e:0-18446744073709551616")
        assert None is read_id("e:99999999999999999999-0")


class TestConnections:
    async def test_reader_has_one_connection(self, make, hands):
        """
        All that the reader asks goes over one connection.

        With two, one could be renewed and speak with a new master while the
        other still waits for news from the old one.
        """
        before = {client["id"] for client in hands.client_list()}
        log = make()
        for _ in range(3):
            await log.open()
            await log.trim()
            await log.state(ORIGIN)
            await log.read("e", ORIGIN, 10, 0.01)
            await log.renew_epoch(None)

        assert 1 == len({client["id"] for client in hands.client_list()} - before)

    async def test_lost_connection_is_told(self, make, proxy):
        """
        A connection that was lost is an error, never a silent reconnect.
        """
        log = make(proxy.url)
        for lost in (log.trim, lambda: log.state(ORIGIN), lambda: log.read("e", ORIGIN, 1, 0.1)):
            await log.open()
            await lost()
            proxy.cut()

            with pytest.raises(LogUnavailable):
                await lost()

    async def test_silent_server_is_noticed(self, make, proxy):
        """
        No answer within SSE_REDIS_TIMEOUT_SECONDS is a Redis that is away, also in a waiting read.
        """
        log = make(proxy.url, timeout_seconds=0.3)
        await log.open()
        with proxy.hold():
            began = time.monotonic()
            with pytest.raises(LogUnavailable):
                await log.read("e", ORIGIN, 1, 60)
            assert 0.25 < time.monotonic() - began < 15

            assert not await log.ping()
            with pytest.raises(LogUnavailable):
                await log.open()
        await log.open()

    async def test_long_waits_are_no_silence(self, make):
        """
        A read that waits longer than the timeout is cut into waits that a live Redis answers.
        """
        log = make(timeout_seconds=1)
        await log.open()

        for _ in range(3):
            assert [] == await log.read("e", ORIGIN, 1, 60)

    async def test_shortest_timeout(self, make, hands):
        """
        With the least SSE_REDIS_TIMEOUT_SECONDS an idle reader still waits, and does not ask all the time.
        """
        log = make(timeout_seconds=dict(rules())["redis_timeout_seconds"].low)
        await log.open()
        await log.read("e", ORIGIN, 1, 60)
        before = hands.info("commandstats")["cmdstat_xread"]["calls"]
        began = time.monotonic()
        while time.monotonic() - began < 0.5:
            try:
                assert [] == await log.read("e", ORIGIN, 1, 60)
            except LogUnavailable:
                await log.open()  # on a busy machine 0.3 s are soon over

        # 50 ms each, and what Redis needs to notice that they are over.
        assert hands.info("commandstats")["cmdstat_xread"]["calls"] - before <= 12

    async def test_server_that_forgot_the_scripts(self, make, hands):
        """
        A restarted Redis knows no scripts; they are sent again.
        """
        log = make()
        await log.open()
        await log.publish(batch("a"))
        hands.script_flush()
        await log.publish(batch("b"))
        hands.script_flush()
        await log.trim()
        hands.script_flush()
        state = await log.state(ORIGIN)
        hands.script_flush()

        assert await log.renew_epoch(state.epoch)
        assert ["a", "b"] == await everything(log)

    async def test_more_publishers_than_connections(self, make, hands):
        """
        Hundreds of publishes at once wait their turn; none fails for want of a connection.
        """
        log = make(publish_timeout_seconds=15)
        ids = await asyncio.gather(*(log.publish(batch(str(n))) for n in range(400)))

        assert 400 == len({id for [id] in ids})
        assert 400 == hands.xlen(log.log_key)
        assert len(hands.client_list()) < 80

    async def test_closing_with_a_silent_server_over_tls(self, site, make, require):
        """
        TLS says good-bye before it closes; a server that does not answer is left all the same.

        The error of a connection that would not close must not end the reader.
        """
        key, cert = site.directory / "key.pem", site.directory / "cert.pem"
        await run(
            require("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(cert),
        )  # fmt: skip
        server = site.redis(
            "--tls-port", "0", "--tls-cert-file", str(cert), "--tls-key-file", str(key),
            "--tls-auth-clients", "no", start=False,
        )  # fmt: skip
        server.arguments += ["--port", "0", "--tls-port", str(server.port)]
        server.start()
        url = f"rediss://127.0.0.1:{server.port}/0?ssl_cert_reqs=none&ssl_check_hostname=false"
        log = make(url, timeout_seconds=0.5)
        await _until_opened(log)
        await log.state(ORIGIN)
        with frozen(server):
            for _ in range(3):
                with pytest.raises(LogUnavailable):
                    await log.open()
        await _until_opened(log)
        assert await log.publish(batch("a"))


async def _until_opened(log: RedisLog) -> None:
    async def opened() -> bool:
        try:
            await log.open()
        except LogUnavailable:
            return False
        return True

    await becomes(opened)


class TestLostAnswer:
    """The event is in the log, but nobody was told."""

    @pytest.fixture(autouse=True)
    def _quiet(self, proxy: Proxy) -> Iterator[None]:
        yield
        proxy.swallow = None

    async def test_own_retry(self, make, proxy):
        """
        A publish whose answer was lost is repeated by itself, and is in the log once.
        """
        log = make(proxy.url, publish_timeout_seconds=5)
        before = proxy.swallowed
        publishing = asyncio.create_task(log.publish(batch("a", "b")))
        proxy.swallow = b"EVALSHA"
        await asyncio.to_thread(eventually, lambda: proxy.swallowed - before >= 2)
        proxy.swallow = None

        ids = await publishing
        assert ["a", "b"] == await everything(log)
        assert 2 == len(ids)

    async def test_retry_through_another_process(self, make, proxy, server):
        """
        A publish that failed for its client is repeated elsewhere under its key: once in the log.
        """
        first = make(proxy.url, publish_timeout_seconds=1)
        second = make()
        second.log_key, second.epoch_key = first.log_key, first.epoch_key
        second._idempotency_prefix = first._idempotency_prefix
        before = proxy.swallowed
        proxy.swallow = b"EVALSHA"
        with pytest.raises(LogUnavailable):
            await first.publish(batch("a", key="key"))
        assert proxy.swallowed > before

        [id] = await second.publish(batch("a", key="key"))
        assert ["a"] == await everything(second)
        assert [id] == [entry.id for entry in await second.read(id.partition(":")[0], ORIGIN, 9, 0)]
        with pytest.raises(IdempotencyConflict):
            await second.publish(batch("b", key="key"))


class TestRefusals:
    @pytest.fixture
    def setting(self, hands) -> Iterator[Callable[[str, str], None]]:
        """Change the server's configuration for the time of one test."""
        before: dict[str, str] = {}

        def set(name: str, value: str) -> None:
            before.setdefault(name, hands.config_get(name)[name])
            hands.config_set(name, value)

        yield set
        for name, value in before.items():
            hands.config_set(name, value)

    async def test_eviction_policy(self, make, setting):
        """
        A Redis that may throw the log away to make room is refused, with the reason and the cure.
        """
        log = make()
        setting("maxmemory", "100mb")
        setting("maxmemory-policy", "allkeys-lru")

        with pytest.raises(LogUnavailable, match="must be noeviction, got 'allkeys-lru'"):
            await log.open()

    @pytest.mark.parametrize(("maxmemory", "policy"), [("0", "allkeys-lru"), ("100mb", "noeviction")])
    async def test_harmless_policy(self, make, setting, maxmemory, policy):
        """
        Without a limit nothing is evicted, and with `noeviction` neither.
        """
        setting("maxmemory", maxmemory)
        setting("maxmemory-policy", policy)

        await make().open()

    async def test_configuration_that_may_not_be_read(self, make, server, hands):
        """
        Managed services forbid CONFIG: the log opens, and says what it could not check.
        """
        hands.acl_setuser("careful", enabled=True, nopass=True, keys="*", commands=["+@all", "-config"])
        log = make(f"redis://careful:x@127.0.0.1:{server.port}/0")

        await log.open()
        assert await log.publish(batch("a"))

    async def test_full_server(self, make, hands, setting):
        """
        A Redis without room refuses the whole batch, and reading goes on.
        """
        log = make(publish_timeout_seconds=1)
        await log.open()
        await log.publish(batch("a"))
        setting("maxmemory", "1")
        with pytest.raises(LogUnavailable):
            await log.publish(batch("b", "c"))
        await log.trim()
        await log.state(ORIGIN)
        assert ["a"] == await everything(log)

    async def test_too_few_replicas(self, make, setting):
        """
        Where a master may not write for want of replicas, reading goes on, trims included.
        """
        log = make(publish_timeout_seconds=1)
        await log.open()
        await log.publish(batch("a"))
        setting("min-replicas-to-write", "1")
        with pytest.raises(LogUnavailable):
            await log.publish(batch("b"))
        await log.trim()
        await log.state(ORIGIN)
        assert ["a"] == await everything(log)

    async def test_replica(self, site, make, server):
        """
        A read-only server is the wrong one: an open log would never see a new event.
        """
        replica = site.redis("--replicaof", "127.0.0.1", str(server.port))
        log = make(replica.url)
        await log.open()

        with pytest.raises(LogUnavailable):
            await log.trim()

    async def test_key_of_another_type(self, make, hands):
        """
        A key that is no Redis Stream is an error that says so, in every method.
        """
        log = make(publish_timeout_seconds=0.1)
        await log.open()
        hands.set(log.log_key, "somebody else's")
        with pytest.raises(LogUnavailable):
            await log.publish(batch("a"))
        for refused in (
            lambda: log.state(ORIGIN),
            lambda: log.read("e", ORIGIN, 1, 0),
            log.trim,
        ):
            with pytest.raises(LogUnavailable, match="WRONGTYPE"):
                await refused()

    async def test_password_stays_out_of_errors(self, make, server):
        """
        What is wrong with a connection is told without its password.
        """
        log = make(f"redis://somebody:secret@127.0.0.1:{server.port}/0")

        with pytest.raises(LogUnavailable) as caught:
            await log.open()
        assert "secret" not in str(caught.value)


class TestKeys:
    async def test_prefix_and_hash_tag(self, make, hands):
        """
        Every key begins with the prefix as one hash tag, so that a Cluster can hold them together.
        """
        before = set(hands.keys())
        log = make()
        await log.open()
        await log.publish(batch("a", key="key"))
        await log.publish(batch("b"))
        await log.trim()
        await log.notify(Notice("evict", {"n": "1"}))
        tag = log.log_key.partition(":")[0]

        assert {f"{tag}:log", f"{tag}:epoch", f"{tag}:control"} < set(hands.keys()) - before
        assert all(key.startswith(tag + ":") for key in set(hands.keys()) - before)

    async def test_two_environments(self, make):
        """
        Two prefixes on one Redis are two logs, also for idempotency keys.
        """
        one, two = make(), make()
        await one.publish(batch("one", key="same"))
        await two.publish(batch("two", key="same"))

        assert (["one"], ["two"]) == (await everything(one), await everything(two))

    async def test_keys_of_own_retries_are_short_lived(self, make, hands):
        """
        A key that was made here is kept for as long as a retry can come, not for SSE_IDEMPOTENCY_SECONDS.
        """
        log = make(publish_timeout_seconds=2, idempotency_seconds=600)
        before = set(hands.keys())
        await log.publish(batch("a"))
        [key] = [key for key in set(hands.keys()) - before if "idempotency" in key]

        assert 2_000 < hands.pttl(key) <= 10_000


class TestControlLog:
    """Notices in Redis: heard by every process, none of before its start, none twice."""

    async def test_every_process_hears_what_came_after_its_start(self, make):
        early = make(prefix="control-start")
        await early.open()
        await early.notify(Notice("evict", {"n": "1"}))
        late = make(prefix="control-start")
        await late.open()
        await late.notify(Notice("evict", {"n": "2"}))
        for log, heard in ((early, ["1", "2"]), (late, ["2"])):
            await everything(log)
            assert heard == [notice.fields["n"] for notice in log.notices]

    async def test_a_lost_connection_misses_nothing(self, make, proxy):
        """
        What was told while the reader was cut off is read afterwards, once.
        """
        teller, log = make(prefix="control-cut"), make(proxy.url, prefix="control-cut")
        await log.open()
        await teller.notify(Notice("revoke", {"n": "1"}))
        await everything(log)
        proxy.cut()
        await teller.notify(Notice("revoke", {"n": "2"}))
        with pytest.raises(LogUnavailable):
            await everything(log)
        await log.open()
        await everything(log)
        assert ["1", "2"] == [notice.fields["n"] for notice in log.notices]

    async def test_after_the_clock_went_back(self, make, hands):
        """
        FLUSHALL, or a replica whose clock is behind: new notices can have smaller ids.
        """
        log = make()
        await log.open()
        await log.notify(Notice("evict", {"n": "1"}))
        await log.read("before", ORIGIN, 10, 0)
        hands.delete(log.control_key)
        await log.read("after", ORIGIN, 10, 0)
        hands.xadd(log.control_key, {"v": "1", "kind": "evict", "n": "2"}, id="5-0")
        await log.read("after", ORIGIN, 10, 0)
        assert ["1", "2"] == [notice.fields["n"] for notice in log.notices]

    @pytest.mark.parametrize(
        "fields", [{"v": "2", "kind": "evict"}, {"v": "1"}, {"kind": "evict"}, {"v": b"1", "kind": b"\xff"}]
    )
    async def test_what_another_version_wrote_is_passed_over(self, make, hands, fields):
        log = make()
        await log.open()
        hands.xadd(log.control_key, fields)
        await log.notify(Notice("evict", {"n": "1"}))
        await everything(log)
        assert [Notice("evict", {"n": "1"})] == list(log.notices)

    async def test_old_notices_are_dropped(self, make, hands):
        """
        By their age; Redis drops whole nodes of a hundred.
        """
        log = make(control_seconds=0.001)
        await log.open()
        for n in range(400):
            await log.notify(Notice("evict", {"n": str(n)}))
        assert hands.xlen(log.control_key) <= 200

    async def test_resp3(self, make, server):
        """
        `?protocol=3` in SSE_REDIS_URL changes the answers' form, not what is read.
        """
        log = make(server.url + "?protocol=3")
        await log.open()
        await log.publish(batch("1"))
        await log.notify(Notice("evict", {"n": "1"}))
        assert ["1"] == await everything(log)
        assert [Notice("evict", {"n": "1"})] == list(log.notices)
