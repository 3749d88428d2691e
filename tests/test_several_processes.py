"""
Several processes are one service: whoever publishes where, every stream gets its events once, in one order.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from app.event import matches
from app.stack import App
from tests.live import (
    LOG,
    Pair,
    Site,
    Subscriber,
    ask,
    becomes,
    connect,
    event,
    eventually,
    frozen,
    logged,
    metrics,
    order,
    post,
    publish,
    readiness,
    run,
    shared,
    subscribed,
)


@pytest.fixture(scope="module", autouse=True)
def _tools(require: Callable[..., str]) -> None:
    require("redis-server", "valkey-server")


@pytest.fixture(scope="module")
def pair() -> Pair:
    return shared.pair


@pytest.fixture
def hands(pair: Pair) -> Iterator[Any]:
    with connect(pair.server) as client:
        yield client


@contextlib.asynccontextmanager
async def both(pair: Pair, *topics: str, **more: Any) -> AsyncIterator[tuple[Subscriber, Subscriber]]:
    """Open a stream on each process."""
    async with subscribed(pair.a, *topics, **more) as a, subscribed(pair.b, *topics, **more) as b:
        yield a, b


class TestFanOut:
    async def test_two_hundred_streams_and_two_thousand_events(self, pair, hands):
        """
        Every stream gets exactly its events, in the order of the log, from whatever process they came.
        """
        rng = random.Random(7)
        topics = [f"fan/{n}" for n in range(10)]
        wishes = [tuple(rng.sample(topics, rng.randint(1, 4))) for _ in range(190)]
        wishes += [("fan/*",), ("fan/1*", "fan/2"), ("fan/*", "fan/3"), ("fan/nobody",), ("fan/5", "fan/5*")] * 2
        [start] = await publish(pair.a, event("start"))
        async with contextlib.AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(subscribed((pair.a, pair.b)[n % 2], *wish))
                for n, wish in enumerate(wishes)
            ]

            async def publisher(app: App, count: int) -> list[str]:
                ids: list[str] = []
                while len(ids) < count:
                    batch = [
                        event(f"{app.name}-{len(ids) + n}", *rng.sample(topics, rng.choice((1, 1, 1, 2, 3))))
                        for n in range(min(rng.choice((1, 2, 5, 40)), count - len(ids)))
                    ]
                    ids += await publish(app, *batch)
                return ids

            published = await asyncio.gather(*(publisher(app, 500) for app in (pair.a, pair.b, pair.a, pair.b)))
            rows = hands.xrange(LOG, f"({start.partition(':')[2]}")
            epoch = published[0][0].partition(":")[0]
            log = [(f"{epoch}:{id}", fields["data"], fields["topics"].split(" ")) for id, fields in rows]

            assert 2000 == len(log)
            assert {id for ids in published for id in ids} == {id for id, _, _ in log}
            for stream, wish in zip(streams, wishes, strict=True):
                owed = [
                    (id, data)
                    for id, data, names in log
                    if any(matches(wanted, name) for wanted in wish for name in names)
                ]
                await stream.until(lambda s, owed=owed: len(s.everything) > len(owed))
                assert owed == [(e.id, e.data) for e in stream.events], wish
                assert sorted(stream.ids, key=order) == stream.ids
            # Nothing more comes after what was owed.
            await publish(pair.a, event("end", "broadcast"))
            for stream in streams:
                await stream.until(lambda s: s.everything[-1].data == "end")
                assert 1 == stream.data.count("end")
                assert len(set(stream.ids)) == len(stream.ids)

    async def test_event_on_two_topics(self, pair):
        """
        An event on several of a stream's topics arrives once, live and replayed.
        """
        for topics in (("two/a", "two/b"), ("two/a", "two/*", "*")):
            async with both(pair, *topics) as streams:
                [start, *_] = await publish(
                    pair.b,
                    event("start", "two/b", "two/a"),
                    event("once", "two/a", "two/b", "broadcast"),
                    event("end", "two/a"),
                )
                for stream in streams:
                    await stream.until_data("end")
                    assert ["start", "once", "end"] == stream.data
            async with both(pair, *topics, last_event_id=start) as streams:
                for stream in streams:
                    await stream.until_data("end")
                    assert ["once", "end"] == stream.data

    async def test_prefix(self, pair):
        """
        A prefix reaches what begins with it, and no user's own topic.
        """
        events = [
            event(topic, topic)
            for topic in ("orders", "orders/1", "orders/2/x", "order", "user:bob", "use", "user", "users/1")
        ]
        wanted = {
            "orders/*": ["orders/1", "orders/2/x"],
            "orders*": ["orders", "orders/1", "orders/2/x"],
            "user*": ["user", "users/1"],
            "u*": ["use", "user", "users/1"],
            "*": ["orders", "orders/1", "orders/2/x", "order", "use", "user", "users/1"],
        }
        async with contextlib.AsyncExitStack() as stack:
            streams = {prefix: await stack.enter_async_context(both(pair, prefix)) for prefix in wanted}
            ids = await publish(pair.a, *events, event("end", "broadcast"))
            for prefix, pair_of in streams.items():
                for stream in pair_of:
                    await stream.until_data("end")
                    assert [*wanted[prefix], "end"] == stream.data, prefix
            # The same from the window: what was live is what is replayed.
            before = f"{ids[0].rpartition('-')[0]}-{order(ids[0])[1]}"
            for prefix, data in wanted.items():
                async with subscribed(pair.b, prefix, last_event_id=before) as stream:
                    await stream.until_data("end")
                    assert [d for d in data if d != "orders"] + ["end"] == stream.data, prefix

    async def test_own_topic(self, pair):
        """
        Every stream carries `broadcast`, and its user's own topic; nobody else's.
        """
        async with both(pair, query={"user": "zoë b"}) as streams, both(pair, "x", query={"user": "bob"}) as others:
            await publish(pair.a, event("zoë's", "user:zo%C3%AB%20b"), event("bob's", "user:bob"))
            await publish(pair.b, event("all", "broadcast"))
            for stream in streams:
                await stream.until_data("all")
                assert ["zoë's", "all"] == stream.data
            for stream in others:
                await stream.until_data("all")
                assert ["bob's", "all"] == stream.data


class TestBareXadd:
    async def test_documented_fields(self, pair, require):
        """
        What redis-cli adds with the documented fields arrives like any other event, on every process.
        """
        cli = [require("redis-cli", "valkey-cli"), "-p", str(pair.server.port), "XADD", LOG, "*"]
        async with both(pair, "bare/1", "bare/2") as streams:
            id = await run(
                *cli, "v", "1", "topics", "bare/1 bare/2", "event", "greeting", "data", "hällo\nthere", "retry", "321"
            )
            await publish(pair.a, event("next", "bare/1"))
            for stream in streams:
                await stream.until_data("hällo\nthere", "next")
                assert ("greeting", 321) == (stream.events[0].event, stream.parser.retry_ms)
                assert id.strip() == stream.ids[0].partition(":")[2]
                assert stream.ids[0].partition(":")[0] == stream.ids[1].partition(":")[0]

    async def test_broken_fields(self, pair, hands):
        """
        A broken entry is skipped, counted and logged; what is around it arrives, and positions stay true.
        """
        broken: list[dict[Any, Any]] = [
            {"v": "2", "topics": "broken", "data": "x"},
            {"v": "1", "topics": "broken bad!topic", "data": "x"},
            {"v": "1", "topics": "broken", "data": "x", "event": "stream.reset"},
            {"v": "1", "topics": "broken", "data": "x", "event": "a\ndata: forged"},
            {"v": "1", "topics": "broken", "data": b"\xff\xfe"},
            {"v": "1", "topics": "broken"},
            {"v": "1", "topics": "broken", "data": "x" * 1_048_577},
            {"v": "1", "topics": "broken", "data": "x", "surprise": "y"},
            {"v": "1", "topics": "broken", "data": "x", "retry": "soon"},
            {b"\xff": b"\x00"},
        ]
        before = [await metrics(app) for app in (pair.a, pair.b)]
        async with both(pair, "broken", "*") as streams:
            [first] = await publish(pair.a, event("first", "broken"))
            ids = [hands.xadd(LOG, fields) for fields in broken]
            await publish(pair.b, event("last", "broken"))
            for stream in streams:
                await stream.until_data("first", "last")
                assert ["first", "last"] == stream.data
                assert [] == stream.resets
        epoch = first.partition(":")[0]
        for app, counted in zip((pair.a, pair.b), before, strict=True):
            after = await metrics(app)
            name = "sse_log_entries_broken_total"
            assert len(broken) == after[name] - counted[name]
            assert after["sse_log_gap_total"] == counted["sse_log_gap_total"]
            for id in ids:  # fewer than what is told one by one, see journal
                [line] = logged(app, "entry_broken", id=f"{epoch}:{id}")
                assert line["error"]
                assert len(json.dumps(line)) < 1000
            # A client that stands on a broken entry stands somewhere.
            for id in ids:
                async with subscribed(app, "broken", last_event_id=f"{epoch}:{id}") as stream:
                    await stream.until_data("last")
                    assert (["last"], []) == (stream.data, stream.resets)


class TestBehind:
    """A client that changes to a process that has not read as far as the one before."""

    async def test_reader_that_waits_for_redis(self, pair):
        """
        The stream begins when the reader has caught up, and misses nothing.
        """
        async with subscribed(pair.a, "behind") as first:
            with pair.proxies[1].hold():
                await publish(pair.a, event("1", "behind"), event("2", "behind"))
                await first.until_data("1", "2")
                opening = asyncio.create_task(Subscriber(pair.b.port, ("behind",), first.ids[0]).open())
                done, _ = await asyncio.wait({opening}, timeout=0.3)
                assert not done, "it must wait for the reader"
            second = await opening
            await publish(pair.b, event("3", "behind"))
            await second.until_data("2", "3")
            assert (["2", "3"], []) == (second.data, second.resets)
            assert first.ids[0] == second.told("stream.open")[0].id
            second.leave()

    async def test_process_that_was_frozen(self, pair):
        """
        A process that comes back to life serves a client that is ahead of it.
        """
        async with subscribed(pair.a, "frozen") as first:
            with frozen(pair.b):
                await publish(pair.a, event("1", "frozen"), event("2", "frozen"))
                await first.until_data("1", "2")
                opening = [
                    asyncio.create_task(Subscriber(pair.b.port, ("frozen",), id).open())
                    for id in (first.ids[0], first.ids[1])
                ]
                await asyncio.sleep(0)
            streams = [await task for task in opening]
            await publish(pair.b, event("3", "frozen"))
            for stream, data in zip(streams, (["2", "3"], ["3"]), strict=True):
                await stream.until_data("3")
                assert (data, []) == (stream.data, stream.resets)
                stream.leave()

    async def test_new_epoch_seen_by_another_process_first(self, pair, hands):
        """
        An id of an epoch that this process has not seen yet is not foreign: it looks before it judges.
        """
        async with subscribed(pair.a, "epoch") as first:
            with frozen(pair.b):
                hands.flushall()
                await first.until(lambda s: s.resets)
                await publish(pair.a, event("1", "epoch"), event("2", "epoch"))
                await first.until_data("1", "2")
                positions = first.told("stream.reset")[0].id, first.ids[0]
                opening = [asyncio.create_task(Subscriber(pair.b.port, ("epoch",), id).open()) for id in positions]
                await asyncio.sleep(0)
            for task, data in zip(opening, (["1", "2"], ["2"]), strict=True):
                stream = await task
                await stream.until_data(*data)
                assert (data, []) == (stream.data, stream.resets)
                stream.leave()


class TestLostAnswer:
    async def test_retry_through_another_process(self, pair, hands):
        """
        An XADD whose answer was lost, repeated by the client through another process, delivers once.
        """
        async with both(pair, "lost") as streams:
            proxy, lost = pair.proxies[0], pair.proxies[0].swallowed
            proxy.swallow = b"EVALSHA"
            try:
                failed = await post(pair.a, event("once", "lost"), key="lost-answer")
            finally:
                proxy.swallow = None
            assert (503, "1") == (failed.status, failed.headers["retry-after"])
            assert proxy.swallowed > lost
            repeated = await post(pair.b, event("once", "lost"), key="lost-answer")
            await pair.connected()
            again = await post(pair.a, event("once", "lost"), key="lost-answer")

            assert [201, 201] == [repeated.status, again.status]
            assert repeated.json == again.json
            await publish(pair.b, event("end", "lost"))
            for stream in streams:
                await stream.until_data("end")
                assert (["once", "end"], []) == (stream.data, stream.resets), logged(pair.a, "log_gap") + logged(
                    pair.b, "log_gap"
                )
                assert repeated.json["ids"] == stream.ids[:1]
        assert 1 == sum((f.get("topics"), f.get("data")) == ("lost", "once") for _, f in hands.xrange(LOG))

    async def test_own_retry(self, pair):
        """
        A process that has lost an answer asks again by itself: the client sees 201, the streams one event.
        """
        async with both(pair, "own") as streams:
            proxy, lost = pair.proxies[0], pair.proxies[0].swallowed
            proxy.swallow = b"own retry"
            answering = asyncio.create_task(post(pair.a, event("own retry", "own")))
            await becomes(lambda: asyncio.to_thread(lambda: proxy.swallowed > lost))
            proxy.swallow = None
            answer = await answering

            assert 201 == answer.status
            await publish(pair.b, event("end", "own"))
            for stream in streams:
                await stream.until_data("end")
                assert ["own retry", "end"] == stream.data
                assert answer.json["ids"] == stream.ids[:1]


class TestRedisAway:
    async def test_while_streams_are_open(self, pair, hands):
        """
        Streams stay, with heartbeats; publishing says when to try again; afterwards nothing is missing.
        """
        async with both(pair, "away") as streams:
            [before] = await publish(pair.a, event("before", "away"))
            for stream in streams:
                await stream.until_data("before")
            with pair.proxies[0].refuse(), pair.proxies[1].refuse():
                for app in (pair.a, pair.b):
                    await becomes(lambda app=app: _disconnected(app))
                    assert 200 == (await readiness(app)).status
                began = time.monotonic()
                refused = await post(pair.a, event("refused", "away"))
                assert (503, "1") == (refused.status, refused.headers["retry-after"])
                assert "application/problem+json" == refused.headers["content-type"]
                assert time.monotonic() - began < 15
                beats = [stream.raw.count(b":\n\n") for stream in streams]
                for stream, count in zip(streams, beats, strict=True):
                    await stream.until(lambda s, count=count: s.raw.count(b":\n\n") >= count + 3)
                # New streams begin, and resume from what is in memory.
                async with subscribed(pair.a, "away") as fresh, subscribed(pair.b, "away", last_event_id=before) as old:
                    # Another service reaches Redis all the same.
                    hands.xadd(LOG, {"v": "1", "topics": "away", "data": "meanwhile"})
                    # What only Redis could tell is a matter of "later".
                    await asyncio.gather(
                        *(_told_later(app, position, accept)
                          for app, position in ((pair.a, "0123abcd:1-0"), (pair.b, _ahead(before)))
                          for accept in ("", "text/event-stream"))
                    )  # fmt: skip
                    pair.proxies[0].refusing = pair.proxies[1].refusing = False
                    await pair.connected()
                    await publish(pair.b, event("after", "away"))
                    for stream in (*streams, fresh, old):
                        await stream.until_data("meanwhile", "after")
                        assert [] == stream.resets
                        assert "refused" not in stream.data
        for app in (pair.a, pair.b):
            assert logged(app, "log_unavailable")
            assert logged(app, "log_connected")

    async def test_frozen(self, pair):
        """
        A Redis that is silent is noticed as one that is away, within SSE_REDIS_TIMEOUT_SECONDS.
        """
        async with both(pair, "ice") as streams:
            with frozen(pair.server):
                began = time.monotonic()
                refused = await post(pair.a, event("ice", "ice"), key="ice")
                assert 503 == refused.status
                assert time.monotonic() - began < 15
                for app in (pair.a, pair.b):
                    await becomes(lambda app=app: _disconnected(app))
                    assert 200 == (await readiness(app)).status
                for stream in streams:
                    beats = stream.raw.count(b":\n\n")
                    await stream.until(lambda s, beats=beats: s.raw.count(b":\n\n") > beats)
            await pair.connected()
            # The frozen Redis may have had the publish: the key makes the repetition harmless.
            assert 201 == (await post(pair.b, event("ice", "ice"), key="ice")).status
            await publish(pair.a, event("end", "ice"))
            for stream in streams:
                await stream.until_data("ice", "end")
                assert (["ice", "end"], []) == (stream.data, stream.resets)

    async def test_that_refuses_to_write(self, pair, hands):
        """
        A master without replicas to write to: reading goes on, publishing waits for better times.
        """
        async with both(pair, "quorum") as streams:
            hands.config_set("min-replicas-to-write", 1)
            try:
                assert 503 == (await post(pair.a, event("refused", "quorum"))).status
                for stream in streams:
                    beats = stream.raw.count(b":\n\n")
                    await stream.until(lambda s, beats=beats: s.raw.count(b":\n\n") >= beats + 3)
                assert [1, 1] == [(await metrics(app))["sse_log_connected"] for app in (pair.a, pair.b)]
            finally:
                hands.config_set("min-replicas-to-write", 0)
            await publish(pair.a, event("end", "quorum"))
            for stream in streams:
                await stream.until_data("end")
                assert (["end"], []) == (stream.data, stream.resets)

    async def test_full(self, pair, hands):
        """
        A Redis without memory takes no events; reading, resuming and readiness do not suffer.
        """
        async with both(pair, "full") as streams:
            [id] = await publish(pair.a, event("before", "full"))
            hands.config_set("maxmemory", 1)
            try:
                assert 503 == (await post(pair.a, event("refused", "full"))).status
                for app in (pair.a, pair.b):
                    async with subscribed(app, "full", last_event_id=id) as stream:
                        assert [] == stream.resets
                    # A foreign position can only be judged by asking Redis.
                    async with subscribed(app, "full", last_event_id="0123abcd:1-0") as stream:
                        await stream.until(lambda s: s.resets)
                    assert 1 == (await metrics(app))["sse_log_connected"]
            finally:
                hands.config_set("maxmemory", 0)
            await publish(pair.b, event("end", "full"))
            for stream in streams:
                await stream.until_data("before", "end")
                assert [] == stream.resets

    async def test_at_the_start(self):
        """
        A process whose Redis is away waits, says so, is not ready, and recovers by itself.

        So it does for a Redis that would evict the log, and says what to set.
        """
        with Site() as site:
            server = site.redis("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru", start=False)
            app = site.app(server, ready=False)
            await asyncio.to_thread(eventually, lambda: logged(app, "log_unavailable"))
            assert 200 == (await ask(app.port, "GET", "/healthz")).status
            ready = await readiness(app)
            assert (503, "waiting for the log") == (ready.status, ready.json["reason"])

            server.start()
            await asyncio.to_thread(
                eventually, lambda: [x for x in logged(app, "log_unavailable") if "noeviction" in x["error"]]
            )
            [line] = [x for x in logged(app, "log_unavailable") if "noeviction" in x["error"]]
            assert "maxmemory-policy must be noeviction, got 'allkeys-lru'" in line["error"]
            assert 503 == (await readiness(app)).status
            assert 503 == (await ask(app.port, "GET", "/events?topic=t")).status

            with connect(server) as hands:
                hands.config_set("maxmemory-policy", "noeviction")
            await becomes(lambda: _ready(app))
            async with subscribed(app, "t") as stream:
                await publish(app, event("x"))
                await stream.until_data("x")
            assert logged(app, "log_connected")
            assert app.alive


async def _disconnected(app: App) -> bool:
    return (await metrics(app))["sse_log_connected"] == 0


async def _window_of(app: App, most: int) -> bool:
    return (await metrics(app))["sse_window_events"] <= most


async def _ready(app: App) -> bool:
    return (await readiness(app)).status == 200


def _ahead(id: str) -> str:
    epoch = id.partition(":")[0]
    ms, seq = order(id)
    return f"{epoch}:{ms + 1_000}-{seq}"


async def _told_later(app: App, position: str, accept: str) -> None:
    headers = {"Last-Event-ID": position, "Accept": accept or "*/*"}
    answer = await ask(app.port, "GET", "/events?topic=away", headers=headers)
    if accept:
        assert (200, "503") == (answer.status, answer.headers["x-sse-fallback"])
        assert answer.body.startswith(b"retry: ")
    else:
        assert (503, "1") == (answer.status, answer.headers["retry-after"])
        assert "position" == answer.json["name"]


class TestTrim:
    """A short history, and a process that is started when it has passed."""

    async def test_late_process(self):
        """
        The trim keeps one entry past the history, so that a quiet client may stand there.

        Then the caps: a log of few events, a window of few bytes.
        """
        with Site() as site:
            server = site.redis()
            early = await asyncio.to_thread(site.app, server, history_seconds=2, heartbeat_seconds=0.2)
            with connect(server) as hands:
                await self._quiet_clients(site, server, early, hands)

    async def _quiet_clients(self, site: Site, server: Any, early: App, hands: Any) -> None:
        async with subscribed(early, "quiet") as quiet:
            ids = await publish(early, event("1", "old"), event("2", "old"))

            async def only_the_boundary() -> bool:
                return hands.xlen(LOG) == 1

            await becomes(only_the_boundary, "a log trimmed to its boundary")
            assert ids[1].partition(":")[2] == hands.xrange(LOG)[0][0]
            late = await asyncio.to_thread(
                site.app, server, history_seconds=30, heartbeat_seconds=0.2, log_max_events=20, window_max_bytes=65_536
            )
            # A stream that was silent all the time has been moved along.
            await quiet.until(lambda s: s.told("stream.position") or s.position == ids[1])
            assert ids[1] == quiet.position
            for app in (early, late):
                async with subscribed(app, "quiet", "old", last_event_id=quiet.position) as stream:
                    await publish(early, event("3", "quiet"))
                    await stream.until_data("3")
                    assert (["3"], []) == (stream.data, stream.resets)
                await quiet.until_data("3")
            async with subscribed(late, "quiet", last_event_id=ids[0]) as stream:
                await stream.until(lambda s: s.resets)
                assert "history_lost" == stream.resets[0]["reason"]
        await self._caps(early, late, hands)

    async def _caps(self, early: App, late: App, hands: Any) -> None:
        async with subscribed(early, "cap") as a, subscribed(late, "cap") as b:
            ids = []
            for n in range(12):
                ids += await publish(early, *(event(f"{n}-{m}", "cap") for m in range(5)))
                for stream in (a, b):
                    await stream.until(lambda s, n=n: s.data[-1:] == [f"{n}-4"])
            await becomes(lambda: asyncio.to_thread(lambda: hands.xlen(LOG) <= 20), "a log of at most 20 events")
            for stream in (a, b):
                assert (ids, []) == (stream.ids, stream.resets)
        await becomes(lambda: _window_of(late, 20), "a window of at most 20 events")
        async with subscribed(late, "cap", last_event_id=ids[10]) as stream:
            await stream.until(lambda s: s.resets)
            assert "history_lost" == stream.resets[0]["reason"]
        big = "x" * 10_000
        async with subscribed(late, "large") as stream:
            large = [id for n in range(10) for id in await publish(early, event(f"{n} {big}", "large"))]
            await stream.until(lambda s: s.ids == large)
        async with subscribed(late, "large", last_event_id="earliest") as stream:
            await stream.until(lambda s: s.ids[-1:] == large[-1:])
            kept = len(stream.ids)
            assert 1 <= kept < 10
            assert large[-kept:] == stream.ids
        async with subscribed(late, "large", last_event_id=large[0]) as stream:
            await stream.until(lambda s: s.resets)
            assert "history_lost" == stream.resets[0]["reason"]
        counted = await metrics(late)
        assert counted["sse_window_bytes"] <= 65_536
        assert counted["sse_window_events"] <= kept  # time goes on
        assert counted["sse_window_seconds"] < 30
