"""
A user's streams stay within the limit over four processes, whoever races, dies or freezes.

Three witnesses: what the processes logged, what Redis holds, and what the clients see.
"""

import asyncio
import json
import os
import random
import socket
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from itertools import count
from typing import Any
from urllib.parse import quote

import pytest
import redis.asyncio as async_redis

from app.stack import App, Redis
from tests.live import Site, Subscriber, ask, becomes, frozen, logged, metrics, post, shared, subscribed
from tests.signing import SECRET, bearer, token
from tests.wire import request

LIMIT = 5
LEASE_SECONDS = 3
_names = count(1)


@pytest.fixture(scope="module")
def site(require: Callable[..., str]) -> Iterator[Site]:
    require("redis-server", "valkey-server")
    with Site() as site:
        yield site


@pytest.fixture(scope="module")
def server(site: Site) -> Redis:
    return site.redis("--appendonly", "no")


type Start = Callable[..., list[App]]


@pytest.fixture
def start(site: Site, server: Redis) -> Iterator[Start]:
    """Start processes, every second one without the hand-off; they end with the test."""
    started: list[App] = []

    def start(number: int = 4, **settings: Any) -> list[App]:
        settings = {
            "key_prefix": f"limits-{next(_names)}",
            "limit_streams_per_user": LIMIT,
            "lease_seconds": LEASE_SECONDS,
            "heartbeat_seconds": 5,
            "limit_connects_per_user": 0,
        } | settings
        apps = [
            site.app(server, ready=False, handoff="off" if n % 2 else "auto", **settings) for n in range(number)
        ]
        started.extend(apps)
        for app in apps:
            app.wait_ready()
        return apps

    yield start
    for app in started:
        app.kill()


class Tab(asyncio.Protocol):
    """One connect of one user; `open` from `stream.open` to the end of the body."""

    def __init__(self, ring: "Ring", user: str) -> None:
        self.user = user
        self.open = False
        self.ended = False
        self.evicted = False
        self.position = ""
        self.retry = 0
        self.settled = asyncio.get_running_loop().create_future()
        self._ring = ring
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self.open and not self.ended and b"event: stream.open\n" in self._data:
            # Another's end may be here already, and be read after this.
            self._ring.look_for_ends(self.user)
            self.open = True
            self._ring.opened(self)
            self._settle()
        if b"event: stream.evicted\n" in self._data:
            self.evicted = True
            self.position = self._data.rpartition(b"id: ")[2].partition(b"\n")[0].decode()
        head, complete, _ = self._data.partition(b"\r\n\r\n")
        refused = complete and b"content-length:" in head.lower()
        if refused or self._data.endswith(b"\r\n0\r\n\r\n"):
            self.end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end()

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            if self.open:
                self._ring.closed(self)
        self._settle()

    def _settle(self) -> None:
        if not self.settled.done():
            self.settled.set_result(None)

    def has_ended_unread(self) -> bool:
        """Tell whether the end lies in the socket, where this has not read it yet."""
        with socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno())) as sock:
            try:
                data = sock.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError:
                return True
        return not data or data.endswith(b"\r\n0\r\n\r\n")

    def leave(self) -> None:
        """Close, as a tab that is closed."""
        self.transport.abort()
        self.end()


class Ring:
    """All tabs of all users, and how many of each are open at most."""

    def __init__(self) -> None:
        self.open: dict[str, set[Tab]] = defaultdict(set)
        self.most: Counter[str] = Counter()
        self.connects = 0

    def opened(self, tab: Tab) -> None:
        self.open[tab.user].add(tab)
        self.most[tab.user] = max(self.most[tab.user], len(self.open[tab.user]))

    def closed(self, tab: Tab) -> None:
        self.open[tab.user].discard(tab)

    def look_for_ends(self, user: str) -> None:
        for tab in list(self.open[user]):
            if tab.transport.is_closing() or tab.has_ended_unread():
                tab.end()

    async def connect(self, app: App, user: str, position: str = "") -> Tab:
        """Connect once; return when the stream is open, or refused."""
        self.connects += 1
        loop = asyncio.get_running_loop()
        _, tab = await loop.create_connection(lambda: Tab(self, user), "127.0.0.1", app.port)
        headers = {"Last-Event-ID": position} if position else {}
        tab.transport.write(request(f"/events?topic=t&user={quote(user)}", headers))
        async with asyncio.timeout(60):
            await tab.settled
        return tab

    def leave(self) -> None:
        for tabs in list(self.open.values()):
            for tab in list(tabs):
                tab.leave()


@pytest.fixture
async def ring() -> AsyncIterator[Ring]:
    ring = Ring()
    yield ring
    ring.leave()


class Watch:
    """Ask Redis again and again how many places each user has."""

    def __init__(self, server: Redis, prefix: str, users: tuple[str, ...]) -> None:
        self.most = 0
        self.looks = 0
        self._keys = [f"{{{prefix}}}:streams:{user}" for user in users]
        self._server = server

    async def __aenter__(self) -> "Watch":
        self._task = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        async with async_redis.Redis(port=self._server.port) as hands:
            while True:
                async with hands.pipeline(transaction=False) as batch:
                    for key in self._keys:
                        batch.hlen(key)
                    self.most = max(self.most, *await batch.execute())
                self.looks += 1
                await asyncio.sleep(0.005)


def most_at_once(apps: list[App], *, died: dict[str, float] | None = None) -> dict[str, int]:
    """
    Return the most streams that each user had open at one instant, by what the processes logged.

    A stream's end is logged before its place is given back, and an open after
    the place was got: so the order of these lines, over all processes, counts.
    A process that was killed logged no ends; *died* says when it was.
    """
    changes: list[tuple[float, int, str]] = []
    for app in apps:
        open_streams: dict[str, str] = {}
        for line in logged(app, "stream_opened"):
            open_streams[line["stream"]] = line["user"]
            changes.append((_when(line), 1, line["user"]))
        for line in logged(app, "stream_ended"):
            del open_streams[line["stream"]]
            changes.append((_when(line), -1, line["user"]))
        changes += [(at, -1, user) for at in [(died or {}).get(app.name)] if at for user in open_streams.values()]
    now: Counter[str] = Counter()
    most: dict[str, int] = {}
    for _, change, user in sorted(changes):
        now[user] += change
        most[user] = max(most.get(user, 0), now[user])
    return most


def _when(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["timestamp"]).timestamp()


async def held(app: App, user: str) -> list[dict[str, Any]]:
    answer = await ask(app.port, "GET", f"/users/{user}/streams")
    assert 200 == answer.status, answer.body
    return answer.json["streams"]


class TestRace:
    """2,000 connects for 50 users over four processes, two of them without the hand-off."""

    USERS = tuple(f"u{n}" for n in range(50))

    async def _race(self, ring: Ring, apps: list[App], rng: random.Random, connects: int) -> list[Tab]:
        """Connect that often, in any order; meanwhile some tabs close again."""
        users = list(self.USERS * (connects // len(self.USERS)))
        rng.shuffle(users)
        gate = asyncio.Semaphore(250)

        async def one(number: int, user: str) -> Tab:
            async with gate:
                tab = await ring.connect(apps[number % len(apps)], user)
            if tab.open and rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.2)
                tab.leave()
            return tab

        return await asyncio.gather(*(one(n, user) for n, user in enumerate(users)))

    @pytest.mark.parametrize("policy", ["reject", "evict"])
    async def test_never_one_too_many(self, start, server, ring, policy):
        """
        At no instant has a user more than five streams, and each of the five places is used.
        """
        prefix = f"race-{policy}"
        # Nobody dies here: a process that gets no turn for seconds counts as alive.
        alive = {"lease_seconds": 60, "redis_timeout_seconds": 20}
        apps = start(limit_policy=policy, key_prefix=prefix, evicted_retry_seconds=5, **alive)
        rng = random.Random(4)
        async with Watch(server, prefix, self.USERS) as watch:
            tabs = await self._race(ring, apps, rng, 1_700)
            # What the race has left free is free for all to see, and taken at once.
            for user in self.USERS:
                await becomes(lambda user=user: self._counted(ring, apps[0], user), f"the places of {user}")
                while len(ring.open[user]) < LIMIT:
                    tab = await ring.connect(rng.choice(apps), user)
                    assert tab.open
                    tabs.append(tab)
            await asyncio.gather(
                *(ring.connect(rng.choice(apps), rng.choice(self.USERS)) for _ in range(2_000 - ring.connects))
            )
            # Every place is used: what is open stays open where `reject` holds,
            # and whoever came last is in where `evict` does.
            for user in self.USERS:
                await becomes(lambda user=user: self._are(ring, user, LIMIT), f"five streams of {user}")
                assert LIMIT == len(await held(apps[0], user))

        assert 2_000 == ring.connects
        assert watch.looks > 20
        assert LIMIT == watch.most
        assert set(ring.most.values()) == {LIMIT}
        most = most_at_once(apps)
        assert set(self.USERS) == set(most)
        assert {LIMIT} == set(most.values())
        evicted = sum(len(logged(app, "stream_ended", reason="evicted")) for app in apps)
        refused = sum([(await metrics(app))['sse_limit_refused_total{limit="user-full"}'] for app in apps])
        if policy == "reject":
            assert evicted == 0
            assert refused > 500
        else:
            assert evicted > 500
            assert all(tab.position.endswith("~e") for tab in tabs if tab.evicted)
        for app in apps:
            assert 0 == (await metrics(app))["sse_lease_errors_total"]

    async def _counted(self, ring: Ring, app: App, user: str) -> bool:
        ring.look_for_ends(user)
        return len(await held(app, user)) == len(ring.open[user])

    async def _are(self, ring: Ring, user: str, number: int) -> bool:
        ring.look_for_ends(user)
        return len(ring.open[user]) == number


class TestLostProcesses:
    USERS = tuple(f"v{n}" for n in range(12))

    async def _fill(self, ring: Ring, apps: list[App]) -> None:
        for number in range(LIMIT):
            for user in self.USERS:
                assert (await ring.connect(apps[number % len(apps)], user)).open

    async def test_a_killed_process_gives_its_places_back(self, start, server, ring):
        """
        Within the liveness time, and nobody has one too many meanwhile.
        """
        apps = start(limit_policy="reject", key_prefix="killed")
        await self._fill(ring, apps)
        dead, *alive = apps
        async with async_redis.Redis(port=server.port) as hands:
            process = (await ask(dead.port, "GET", "/healthz")).json["process"]
            async with Watch(server, "killed", self.USERS) as watch:
                dead.kill()
                died = time.time()
                # By Redis's own clock: the promise, whatever this machine is busy with.
                lived_until = await hands.zscore("{killed}:processes", process)
                seconds, micros = await hands.time()
                assert lived_until - (seconds * 1000 + micros / 1000) <= LEASE_SECONDS * 1000

                async def full() -> bool:
                    for user in self.USERS:
                        if len(ring.open[user]) < LIMIT:
                            await ring.connect(random.choice(alive), user)
                    return all(len(ring.open[user]) == LIMIT for user in self.USERS)

                await becomes(full, "all places used again")
                seconds, micros = await hands.time()
                assert seconds * 1000 + micros / 1000 > lived_until
            assert LIMIT == watch.most
        assert {LIMIT} == set(ring.most.values()) == set(most_at_once(apps, died={dead.name: died}).values())
        for user in self.USERS:
            assert {True} == {stream["process"] != process for stream in await held(alive[0], user)}

    async def test_a_frozen_process_ends_what_is_over(self, start, server, ring):
        """
        Its places were given to others while it was frozen; it ends its streams when it thaws, and says so.
        """
        apps = start(limit_policy="reject", key_prefix="frozen")
        await self._fill(ring, apps)
        cold, *alive = apps
        before = {user: len(ring.open[user]) for user in self.USERS}
        with frozen(cold):
            fresh: list[Tab] = []

            async def others_have_them() -> bool:
                for user in self.USERS:
                    tab = await ring.connect(random.choice(alive), user)
                    fresh.extend([tab] if tab.open else [])
                return len(fresh) >= 2 * len(self.USERS)

            await becomes(others_have_them, "the places of the frozen process")
        assert {LIMIT} == set(before.values())

        async def within() -> bool:
            for user in self.USERS:
                ring.look_for_ends(user)
            return all(len(ring.open[user]) <= LIMIT for user in self.USERS)

        await becomes(within, "what is over has ended")
        assert logged(cold, "leases_lapsed")
        assert 2 * len(self.USERS) == len(logged(cold, "stream_ended", reason="evicted"))
        assert all(not tab.ended for tab in fresh)
        for user in self.USERS:
            assert LIMIT == len(await held(cold, user)) == len(ring.open[user])
        # It is one of them again.
        tab = next(iter(ring.open[self.USERS[0]]))
        tab.leave()
        await becomes(lambda: self._opens(ring, cold, tab.user), "a place on the thawed process")

    async def _opens(self, ring: Ring, app: App, user: str) -> bool:
        return (await ring.connect(app, user)).open

    async def test_an_end_of_any_kind_gives_its_place_back(self, start, ring):
        """
        The client leaves, its age ends it, its process drains: no place is lost.
        """
        apps = start(2, limit_policy="reject", limit_streams_per_user=1, max_age_seconds=1, drain_seconds=0, heartbeat_seconds=0.2)
        for app in apps:
            for _ in range(2):
                (await ring.connect(app, "w")).leave()
                await becomes(lambda app=app: self._free(app, "w"), "the place of who left")
            tab = await ring.connect(app, "w")
            await becomes(lambda tab=tab: self._over(tab), "its age")
            await becomes(lambda app=app: self._free(app, "w"), "the place of who was too old")
        assert (await ring.connect(apps[0], "w")).open
        await asyncio.to_thread(apps[0].stop)
        await becomes(lambda: self._free(apps[1], "w"), "the place of who was drained")
        assert (await ring.connect(apps[1], "w")).open

    async def _free(self, app: App, user: str) -> bool:
        return not await held(app, user)

    async def _over(self, tab: Tab) -> bool:
        return tab.ended


class TestMark:
    """An evicted client's last id says so, and nobody is harmed by it."""

    async def test_who_was_evicted_never_evicts(self, start, ring):
        """
        It is told to come back in about a minute; a free place is its own, and it has lost nothing.
        """
        apps = start(2, limit_streams_per_user=2, evicted_retry_seconds=60)
        first = await Subscriber(apps[0].port, ("t",), query={"user": "m"}).open()
        await first.until_open()
        await post(apps[0], {"topics": ["t"], "data": "1"})
        await first.until_data("1")
        others = [await ring.connect(apps[n], "m") for n in (0, 1)]
        await first.until(lambda s: s.ended)
        assert "clean" == first.ended
        assert {"reason": "evicted"} == json.loads(first.everything[-1].data)
        assert first.position == first.ids[-1] + "~e"
        assert 45_000 <= first.parser.retry_ms <= 75_000
        await post(apps[1], {"topics": ["t"], "data": "2"})
        for app in apps:
            for header in ({"Accept": "text/event-stream"}, {"Accept": "text/event-stream", "X-Sse-Soft-Fail": "1"}):
                back = await Subscriber(app.port, ("t",), first.position, {"user": "m"}, header).open()
                await back.until(lambda s: s.ended)
                assert (200, "429") == (back.status, back.head["x-sse-fallback"])
                assert 45_000 <= back.parser.retry_ms <= 75_000
            answer = await ask(
                app.port, "GET", "/events?topic=t&user=m", headers={"Last-Event-ID": first.position, "Accept": "*/*"}
            )
            assert (429, "urn:sse-kit:user-full") == (answer.status, answer.json["type"])
            assert 45 <= int(answer.headers["retry-after"]) <= 75
        assert not any(tab.ended for tab in others)
        others[0].leave()
        await becomes(lambda: self._one_left(apps[0]), "a free place")
        for app in apps:
            query = {"user": "m", "last_event_id": first.position}
            async with subscribed(app, "t", query=query) as stream:
                await stream.until_data("2")
                assert [] == stream.resets
                assert not stream.position.endswith("~e")
            await becomes(lambda: self._one_left(apps[0]), "a free place")

    async def _one_left(self, app: App) -> bool:
        return len(await held(app, "m")) == 1

    @pytest.mark.parametrize("handoff", ["auto", "off"])
    async def test_what_it_missed_is_told(self, start, handoff):
        """
        A mark is no excuse: a position that is lost is answered by a reset.
        """
        app = start(2)[("auto", "off").index(handoff)]
        for position in ("0123abcd:1-0~e", "~e", "x~e", "~e~e"):
            async with subscribed(app, "t", last_event_id=position, query={"user": "n"}) as stream:
                await stream.until(lambda s: s.resets)
                assert stream.resets[0]["reason"] in ("unknown_position", "epoch_changed")


class TestRates:
    async def test_a_client_in_a_loop(self, start, ring):
        """
        One user's connects are bounded, others' are not; an EventSource is told to wait.
        """
        [app] = start(1, limit_connects_per_user=1)
        answers = [await self._head(app, "looping")]
        while 429 not in answers and len(answers) < 200:
            answers.append(await self._head(app, "looping"))
        assert [200] * 20 == answers[:20]
        assert 429 == answers[-1]
        assert 200 == await self._head(app, "other")

        async def refused() -> Subscriber | None:
            headers = {"Accept": "text/event-stream"}
            stream = await Subscriber(app.port, ("t",), query={"user": "looping"}, headers=headers).open()
            if "x-sse-fallback" in stream.head:
                return stream
            stream.leave()  # one a second is let in
            return None

        back = await becomes(refused, "a refusal")
        await back.until(lambda s: s.ended)
        assert "429" == back.head["x-sse-fallback"]
        assert back.parser.retry_ms >= 2_000
        assert (await metrics(app))['sse_limit_refused_total{limit="user-rate"}'] >= 1

    async def _head(self, app: App, user: str) -> int:
        stream = await Subscriber(app.port, ("t",), query={"user": user}, headers={"Accept": "*/*"}).open()
        stream.leave()
        return stream.status

    async def test_who_publishes_too_much(self, start):
        """
        429 with the seconds to wait; the same publish goes through afterwards, once.
        """
        [app] = start(1, limit_publish_per_user=10, auth="jwt", jwt_secret=SECRET)
        rights = bearer(token(sub="p", publish=["*"], subscribe=["*"]))
        batch = [{"topics": ["t"], "data": str(n)} for n in range(100)]
        assert [201, 201, 429] == [(await post(app, batch, headers=rights)).status for _ in range(3)]
        answer = await post(app, batch, headers=rights, key="again")
        assert (429, "urn:sse-kit:publish-rate") == (answer.status, answer.json["type"])
        assert 1 <= int(answer.headers["retry-after"]) <= 10
        other = bearer(token(sub="q", publish=["*"]))
        assert 201 == (await post(app, batch, headers=other)).status

        async def accepted() -> bool:
            return (await post(app, batch[:1], headers=rights)).status == 201

        await becomes(accepted, "room for one")


class TestAdministration:
    async def test_list_and_end(self, start, ring):
        """
        An administrator sees and ends a user's streams on all processes, and nobody else's.
        """
        apps = start(2)
        for n in range(4):
            assert (await ring.connect(apps[n % 2], "a/b é")).open
        assert (await ring.connect(apps[0], "other")).open
        path = "/users/a%2Fb%20%C3%A9/streams"
        listed = (await ask(apps[1].port, "GET", path)).json
        assert "a/b é" == listed["user"]
        assert 2 == len({stream["process"] for stream in listed["streams"]})
        for stream in listed["streams"]:
            assert {"t", "broadcast", "user:a%2Fb%20%C3%A9"} == set(stream["topics"])
            assert 0 <= stream["seconds"] < 60
            assert stream["stream"].startswith(stream["process"] + "-")
            assert not stream["leaving"]
        ages = [stream["seconds"] for stream in listed["streams"]]
        assert ages == sorted(ages, reverse=True)

        assert {"user": "a/b é", "ended": 4} == (await ask(apps[0].port, "DELETE", path)).json
        await becomes(lambda: self._all_ended(ring, "a/b é"), "all streams ended")
        assert 1 == len(ring.open["other"])
        for app in apps:
            assert 2 == len(logged(app, "stream_ended", reason="revoked"))
            await becomes(lambda app=app: self._none(app, "a%2Fb%20%C3%A9"), "no place is left")
        assert {"user": "a/b é", "ended": 0} == (await ask(apps[0].port, "DELETE", path)).json

    async def _none(self, app: App, user: str) -> bool:
        return not await held(app, user)

    async def _all_ended(self, ring: Ring, user: str) -> bool:
        ring.look_for_ends(user)
        return not ring.open[user]

    async def test_only_with_the_claim(self, start):
        """
        Neither a token without it nor a ticket is enough; a revoked user's tickets open nothing.
        """
        [app] = start(1, auth="jwt", jwt_secret=SECRET)
        user, admin = bearer(token(sub="alice", subscribe=["*"])), bearer(token(sub="root", admin=True))
        for method in ("GET", "DELETE"):
            assert 401 == (await ask(app.port, method, "/users/alice/streams")).status
            assert 403 == (await ask(app.port, method, "/users/alice/streams", headers=user)).status
            assert 400 == (await ask(app.port, method, f"/users/{'x' * 65}/streams", headers=admin)).status
        ticket = (await ask(app.port, "POST", "/tickets", headers=user)).json["ticket"]
        async with subscribed(app, "t", query={"ticket": ticket}) as stream:
            answer = await ask(app.port, "DELETE", "/users/alice/streams", headers=admin)
            assert {"user": "alice", "ended": 1} == answer.json
            await stream.until(lambda s: s.ended)
            assert {"reason": "revoked"} == json.loads(stream.everything[-1].data)
        assert 401 == (await ask(app.port, "GET", f"/events?topic=t&ticket={ticket}")).status

    async def test_a_ticket_takes_its_own_place(self, start):
        """
        Its new stream has the place of the one before, also where all are taken and none may be evicted.
        """
        apps = start(2, auth="jwt", jwt_secret=SECRET, limit_policy="reject", limit_streams_per_user=1)
        user = bearer(token(sub="alice", subscribe=["*"]))
        ticket = (await ask(apps[0].port, "POST", "/tickets", headers=user)).json["ticket"]
        streams = []
        for n in range(4):
            stream = await Subscriber(apps[n % 2].port, ("t",), query={"ticket": ticket}).open()
            assert 200 == stream.status
            streams.append(await stream.until_open())
        for stream in streams[:-1]:
            await stream.until(lambda s: s.ended)
        assert not streams[-1].ended
        assert 429 == (await ask(apps[0].port, "GET", "/events?topic=t", headers=user)).status
        streams[-1].leave()


class TestRedisAway:
    async def test_each_process_holds_the_limit_alone(self, site, server):
        """
        A log line and a metric say so; open streams stay.
        """
        proxy = site.proxy(server)
        settings = {
            "key_prefix": "away",
            "limit_streams_per_user": 2,
            "limit_policy": "reject",
            "redis_timeout_seconds": 0.5,
            "lease_seconds": 60,
        }
        app = await asyncio.to_thread(site.app, proxy, **settings)
        try:
            ring = Ring()
            assert (await ring.connect(app, "x")).open
            with proxy.refuse():
                assert (await ring.connect(app, "x")).open
                assert not (await ring.connect(app, "x")).open
                assert 1 == (await metrics(app))["sse_leases_local"]
                assert 2 == (await metrics(app))["sse_leases"]
                assert 503 == (await ask(app.port, "GET", "/users/x/streams")).status
            await becomes(lambda: self._back(app), "Redis is back")
            assert 2 == len(await held(app, "x"))
            assert (await metrics(app))["sse_lease_errors_total"] >= 1
            [line] = logged(app, "leases_unavailable")
            assert 1 == line["leases"]
            ring.leave()
        finally:
            app.kill()

    async def _back(self, app: App) -> bool:
        return (await metrics(app))["sse_leases_local"] == 0

    async def test_callers_without_a_name_take_no_place(self):
        """
        Nobody knows whose they are.
        """
        before = (await metrics(shared.app))["sse_leases"]
        async with subscribed(shared.app, "t") as a, subscribed(shared.app, "t") as b:
            assert (a.status, b.status) == (200, 200)
            assert (await metrics(shared.app))["sse_leases"] <= before
