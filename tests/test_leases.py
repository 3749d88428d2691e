"""
A user has at most so many streams: the rules, in memory and in a real Redis, and one process's side of them.
"""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from app import leases
from app.leases import Ask, Lease, Leases, Places, Verdict
from app.log import ORIGIN, Log, Notice
from app.redis_leases import RedisLeases
from app.redis_log import RedisLog
from app.stack import Redis
from tests.live import Proxy, Site, becomes, connect, frozen
from tests.simulated import Quiet

_names = itertools.count(1)


@pytest.fixture(scope="module")
def site(require: Callable[..., str]) -> Iterator[Site]:
    require("redis-server", "valkey-server")
    with Site() as site:
        yield site


@pytest.fixture(scope="module")
def server(site: Site) -> Redis:
    return site.redis("--appendonly", "no")


@pytest.fixture
def hands(server: Redis) -> Iterator[Any]:
    with connect(server) as client:
        yield client


def lease(stream: str, user: str = "u", process: str = "a") -> Lease:
    return Lease(user, process, stream, ("t", "broadcast"), 1)


class Rules:
    """Either form of the rules, asked one step at a time; `told` is what all processes hear."""

    async def take(self, stream: str, *, evict: bool = True, process: str = "a", instead: str = "") -> Verdict:
        raise NotImplementedError

    async def drop(self, stream: str, process: str = "a") -> None:
        raise NotImplementedError

    async def told(self) -> list[tuple[str, str]]:
        raise NotImplementedError

    async def held(self) -> list[tuple[str, bool]]:
        """Return the streams of the user with whether they have to leave, the oldest first."""
        raise NotImplementedError


class InMemory(Rules):
    def __init__(self, limit: int) -> None:
        self._told: list[Notice] = []
        self._places = Places(limit, self._told.append)

    async def take(self, stream: str, *, evict: bool = True, process: str = "a", instead: str = "") -> Verdict:
        return self._places.take(Ask(lease(stream, process=process), evict, instead))

    async def drop(self, stream: str, process: str = "a") -> None:
        self._places.drop(lease(stream, process=process))

    async def told(self) -> list[tuple[str, str]]:
        told = [(notice.kind, notice.fields["member"]) for notice in self._told]
        self._told.clear()
        return told

    async def held(self) -> list[tuple[str, bool]]:
        return [(each.stream, self._places.leaving(each)) for each in self._places.of("u")]


class InRedis(Rules):
    def __init__(self, server: Redis, limit: int) -> None:
        self.prefix = f"leases-{next(_names)}"
        self._server = server
        self._limit = limit
        self._log = RedisLog(server.url, prefix=self.prefix, history_seconds=60, max_events=100)
        self.stores: dict[str, RedisLeases] = {}

    async def open(self) -> "InRedis":
        await self._log.open()
        for process in "ab":
            await self.join(process)
        return self

    async def join(self, process: str, seconds: float = 60) -> RedisLeases:
        store = self.stores[process] = RedisLeases(
            self._server.url,
            process,
            prefix=self.prefix,
            limit=self._limit,
            lease_seconds=seconds,
            max_age_seconds=10,
        )
        await store.renew()
        return store

    async def close(self) -> None:
        for store in self.stores.values():
            await store.close()
        await self._log.close()

    async def take(self, stream: str, *, evict: bool = True, process: str = "a", instead: str = "") -> Verdict:
        # A millisecond apart, so that there is an oldest one.
        await asyncio.sleep(0.002)
        [verdict] = await self.stores[process].work([], [Ask(lease(stream, process=process), evict, instead)])
        return verdict

    async def drop(self, stream: str, process: str = "a") -> None:
        await self.stores[process].work([lease(stream, process=process)], [])

    async def told(self) -> list[tuple[str, str]]:
        await self._log.read("e", ORIGIN, 1000, 0)
        told = [(notice.kind, notice.fields["member"]) for notice in self._log.notices]
        self._log.notices.clear()
        return told

    async def held(self) -> list[tuple[str, bool]]:
        return [(each.stream, each.leaving) for each in await self.stores["a"].held("u")]


@pytest.fixture(params=["memory", "redis"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[int], Any]]:
    made: list[InRedis] = []

    async def make(limit: int) -> Rules:
        if request.param == "memory":
            return InMemory(limit)
        made.append(await InRedis(request.getfixturevalue("server"), limit).open())
        return made[-1]

    yield make
    for each in made:
        await each.close()


def member(stream: str, process: str = "a") -> str:
    return f"1/{process}/{stream}"


class TestRules:
    async def test_reject(self, make):
        """
        As many as the limit have a place; one that ends gives it to the next who asks.
        """
        rules = await make(2)
        assert ["granted", "granted", "full"] == [await rules.take(s, evict=False) for s in ("1", "2", "3")]
        await rules.drop("1")
        assert "granted" == await rules.take("4", evict=False)
        assert "full" == await rules.take("5", evict=False)
        assert [("2", False), ("4", False)] == await rules.held()
        assert [] == await rules.told()

    async def test_no_limit(self, make):
        rules = await make(0)
        assert {"granted"} == {await rules.take(str(n)) for n in range(20)}
        assert 20 == len(await rules.held())

    async def test_evict_in_two_phases(self, make):
        """
        The oldest is asked to leave and counted until it has; then who waits has its place, and nobody else.
        """
        rules = await make(2)
        await rules.take("1")
        await rules.take("2", process="b")
        assert "waiting" == await rules.take("3", process="b")
        assert [("evict", member("1"))] == await rules.told()
        assert [("1", True), ("2", False)] == await rules.held()
        await rules.drop("1")
        assert [("granted", member("3", "b"))] == await rules.told()
        assert [("2", False), ("3", False)] == await rules.held()
        assert "full" == await rules.take("4", evict=False)

    async def test_each_waits_for_another_one(self, make):
        """
        Who finds that all have to leave for others already is refused.
        """
        rules = await make(2)
        verdicts = [await rules.take(str(n)) for n in range(1, 6)]
        assert ["granted", "granted", "waiting", "waiting", "full"] == verdicts
        assert [("evict", member("1")), ("evict", member("2"))] == await rules.told()
        await rules.drop("2")
        assert [("granted", member("4"))] == await rules.told()
        # An end of its own accord serves as well.
        await rules.drop("1")
        assert [("granted", member("3"))] == await rules.told()
        assert [("4", False), ("3", False)] == await rules.held()

    async def test_who_waits_may_give_up(self, make):
        """
        Then the place becomes free; until then the next who asks waits for the same one.
        """
        rules = await make(2)
        for stream in ("1", "2", "3"):
            await rules.take(stream)
        await rules.drop("3")
        assert "waiting" == await rules.take("4")
        assert [("evict", member("1"))] * 2 == await rules.told()
        await rules.drop("4")
        await rules.drop("1")
        assert [] == await rules.told()
        assert [("2", False)] == await rules.held()
        assert "granted" == await rules.take("5")

    async def test_the_place_of_one_that_is_ended_anyway(self, make):
        """
        A successor waits for its own predecessor, with either policy, and for nobody else.
        """
        rules = await make(2)
        await rules.take("1", evict=False)
        await rules.take("2", evict=False)
        assert "waiting" == await rules.take("3", evict=False, instead=member("2"))
        assert [("evict", member("2"))] == await rules.told()
        assert "full" == await rules.take("4", evict=False, instead=member("7"))
        await rules.drop("2")
        assert [("1", False), ("3", False)] == await rules.held()

    async def test_what_was_given_back_before(self, make):
        """
        Giving back twice, or what was never there, changes nothing.
        """
        rules = await make(1)
        await rules.take("1")
        for stream in ("1", "1", "9"):
            await rules.drop(stream)
        assert [] == await rules.held()
        assert ["granted", "waiting"] == [await rules.take("2"), await rules.take("3")]
        await rules.drop("1")
        assert [("2", True)] == await rules.held()

    @pytest.mark.parametrize("seed", range(8))
    async def test_both_forms_agree(self, seed, server):
        """
        Whatever happens in whatever order: the same verdicts and notices, and never one too many.
        """
        rng = random.Random(seed)
        limit = rng.randint(1, 4)
        here, there = InMemory(limit), await InRedis(server, limit).open()
        try:
            streams = [str(n) for n in range(9)]
            alive: set[str] = set()
            for _ in range(60):
                stream = rng.choice(streams)
                if stream in alive:
                    alive.discard(stream)
                    steps = [await rules.drop(stream) for rules in (here, there)]
                else:
                    evict = rng.random() < 0.7
                    steps = [await rules.take(stream, evict=evict) for rules in (here, there)]
                    if steps[0] != "full":
                        alive.add(stream)
                assert steps[0] == steps[1]
                assert await here.told() == await there.told()
                held = await here.held()
                assert sorted(held) == sorted(await there.held())
                assert len(held) <= limit
        finally:
            await there.close()


class TestDeadProcesses:
    @pytest.fixture
    async def rules(self, server: Redis) -> AsyncIterator[InRedis]:
        rules = await InRedis(server, 2).open()
        yield rules
        await rules.close()

    async def test_places_of_a_dead_process_are_free(self, rules):
        """
        Also where one had to leave, and its place goes to who waits.
        """
        dead = await rules.join("dead", seconds=0.3)
        await rules.take("1", process="dead")
        await rules.take("2", process="dead")
        assert "waiting" == await rules.take("3")
        assert "full" == await rules.take("4", evict=False)

        async def free() -> bool:
            return await rules.take("4", evict=False) == "granted"

        await becomes(free, "a dead process's place")
        assert ("granted", member("3")) in await rules.told()
        assert {"3", "4"} == {stream for stream, _ in await rules.held()}
        assert not await dead.renew()

    async def test_who_counts_as_dead_gets_nothing(self, rules, server):
        rules.stores["late"] = late = RedisLeases(
            server.url, "late", prefix=rules.prefix, limit=2, lease_seconds=60, max_age_seconds=10
        )
        assert "lapsed" == await rules.take("1", process="late")
        assert not await late.renew()
        assert "granted" == await rules.take("1", process="late")
        assert await late.renew()
        await late.leave()
        assert "lapsed" == await rules.take("2", process="late")

    async def test_who_comes_back_keeps_what_fits(self, rules):
        """
        In the order given; what was never dropped keeps its place.
        """
        for stream in ("1", "2"):
            await rules.take(stream)
        assert [] == await rules.stores["a"].restore([lease("1"), lease("2")])
        await rules.drop("1")
        await rules.take("7", process="b")
        assert [lease("1")] == await rules.stores["a"].restore([lease("2"), lease("1")])
        assert {"2", "7"} == {stream for stream, _ in await rules.held()}

    async def test_keys(self, rules, hands):
        """
        All under the one hash tag, and none outlives the streams by much.
        """
        await rules.take("1")
        await rules.take("2")
        await rules.take("3")
        keys = set(hands.keys(f"*{rules.prefix}*"))
        tag = f"{{{rules.prefix}}}:"
        assert {tag + "streams:u", tag + "leaving:u", tag + "processes", tag + "control"} <= keys
        assert all(key.startswith(tag) for key in keys)
        for name in ("streams:u", "leaving:u", "processes"):
            assert 0 < hands.ttl(tag + name) <= 131
        for stream in ("1", "2", "3"):
            await rules.drop(stream)
        assert not hands.exists(tag + "streams:u")
        assert not hands.exists(tag + "leaving:u")

    async def test_members_of_another_version_count(self, rules, hands):
        """
        Two versions side by side: the form of a member says whose it is, whatever else it says.
        """
        hands.hset(f"{{{rules.prefix}}}:streams:u", mapping={"2/b/x/y": "whatever", "2/gone/z": "5 t"})
        assert "granted" == await rules.take("1")
        assert "full" == await rules.take("2", evict=False)

    async def test_long_topics(self, rules):
        """
        A list shows the topics of a stream, as far as they are worth keeping.
        """
        long = Lease("u", "a", "1", tuple(f"{n}" + "x" * 60 for n in range(50)), 1)
        await rules.stores["a"].work([], [Ask(long, True)])
        [held] = await rules.stores["b"].held("u")
        assert long.topics[:8] == held.topics[:8]
        assert "…" == held.topics[-1]
        assert len(held.topics) < 12
        assert 0 <= held.seconds < 60

    async def test_server_that_forgot_the_scripts(self, rules, hands):
        hands.script_flush()
        [verdict] = await rules.stores["a"].work([lease("9")], [Ask(lease("1"), True)])
        assert "granted" == verdict


class Side:
    """One process's leases on a real Redis, with the control log that it reads."""

    def __init__(
        self, server: Redis, prefix: str, process: str, *, limit: int = 2, evicts: bool = True, seconds: float = 30
    ) -> None:
        store = RedisLeases(
            server.url,
            process,
            prefix=prefix,
            limit=limit,
            lease_seconds=seconds,
            max_age_seconds=30,
            timeout_seconds=0.5,
        )
        self.process = process
        self.leases = Leases(
            process,
            limit=limit,
            evicts=evicts,
            store=store,
            lease_seconds=seconds,
            random=random.Random(1),
            logger=Quiet(),  # type: ignore[arg-type]
        )
        self.leases.end = self._end
        self.log: Log = RedisLog(server.url, prefix=prefix, history_seconds=60, max_events=100, logger=Quiet())  # type: ignore[arg-type]
        self.open: dict[str, str] = {}  # what was opened here, and why it ended
        self.doomed: dict[str, str] = {}  # what has to end as soon as it has begun
        self._numbers = itertools.count(1)
        self.stubborn = False  # its streams do not end

    def _end(self, stream: str, reason: str) -> None:
        if stream not in self.open:
            self.doomed[stream] = reason
        elif not self.stubborn and not self.open[stream]:
            self.open[stream] = reason
            self.leases.release(stream)

    async def connect(self, user: str = "u", **options: Any) -> str | None:
        stream = f"{self.process}-{next(self._numbers)}"
        if not await self.leases.take(user, stream, ("t",), **options):
            return None
        self.open[stream] = ""
        if stream in self.doomed:
            self._end(stream, self.doomed[stream])
        return stream

    async def heed(self) -> None:
        heed = {
            "evict": self.leases.heed_evict,
            "granted": self.leases.heed_granted,
            "revoke": self.leases.heed_revoke,
        }
        while True:
            try:
                await self.log.open()
                while True:
                    await self.log.read("e", ORIGIN, 10, 0.1)
                    while self.log.notices:
                        notice = self.log.notices.popleft()
                        heed[notice.kind](notice.fields)
            except Exception:
                await asyncio.sleep(0.05)

    @property
    def streams(self) -> list[str]:
        return [stream for stream, reason in self.open.items() if not reason]


type Sides = Callable[..., Any]


@pytest.fixture
async def sides(server: Redis) -> AsyncIterator[Sides]:
    made: list[Side] = []
    tasks: list[asyncio.Task[None]] = []

    async def make(*names: str, url: Redis | Proxy | None = None, **options: Any) -> list[Side]:
        prefix = options.pop("prefix", f"side-{next(_names)}")
        some = [Side(url or server, prefix, name, **options) for name in names]  # type: ignore[arg-type]
        made.extend(some)
        for side in some:
            await side.log.open()
            tasks.extend([asyncio.create_task(side.leases.run()), asyncio.create_task(side.heed())])
        return some

    yield make
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for side in made:
        await side.leases.stop()
        await side.log.close()
    assert all(isinstance(result, asyncio.CancelledError) for result in results), results


async def holds(side: Side, user: str = "u") -> list[str]:
    return [held.stream for held in await side.leases.held(user)]


class TestOneProcess:
    async def test_the_oldest_leaves_wherever_it_is(self, sides):
        """
        Over two processes the newest of a user's streams stay; each end gives one place.
        """
        a, b = await sides("a", "b")
        for side in (a, b, a, b, b):
            assert await side.connect()
        assert {"a-1": "evicted", "a-2": "evicted"} == a.open
        assert {"b-1": "evicted", "b-2": "", "b-3": ""} == b.open
        assert {"b-2", "b-3"} == set(await holds(a))
        assert (0, 2) == (len(a.leases), len(b.leases))

    async def test_a_mark_never_evicts(self, sides):
        """
        Who was evicted before takes a free place or none.
        """
        [a] = await sides("a")
        assert [await a.connect() for _ in range(2)] == ["a-1", "a-2"]
        assert await a.connect(evict=False) is None
        assert ["a-1", "a-2"] == a.streams
        a.leases.release("a-1")
        assert await a.connect(evict=False)

    async def test_nobody_answers(self, sides):
        """
        Who waits for a process that does not end its stream gives up, and nobody is one too many.
        """
        a, b = await sides("a", "b", limit=1)
        await a.connect()
        a.stubborn = True
        assert await b.connect() is None
        assert ["a-1"] == await holds(b)
        a.stubborn = False
        assert await b.connect()
        assert ["b-2"] == await holds(b)
        assert [] == a.streams

    async def test_who_leaves_while_waiting(self, sides):
        """
        A client that goes away while it waits takes no place, and loses nobody theirs for long.
        """
        a, b = await sides("a", "b", limit=1)
        await a.connect()
        a.stubborn = True
        waiting = asyncio.create_task(b.connect())
        await becomes(lambda: _leaving(a), "one that has to leave")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        a.stubborn = False
        a.leases.end("a-1", "client_gone")
        await becomes(lambda: _holds_none(a), "no place left")

    async def test_who_leaves_in_the_turn_in_which_it_gets_its_place(self, sides):
        """
        A client whose request ends when its place was just given gives that back: nobody else knows of it.
        """
        [a] = await sides("a", limit=1)
        work = a.leases._store.work

        async def given(gone: Any, asks: Any) -> Any:
            verdicts = await work(gone, asks)
            if asks:
                # Before whoever asked has its turn.
                asyncio.get_running_loop().call_soon(leaving.cancel)
            return verdicts

        a.leases._store.work = given
        leaving = asyncio.create_task(a.connect())
        assert isinstance((await asyncio.gather(leaving, return_exceptions=True))[0], asyncio.CancelledError)

        assert 0 == len(a.leases)
        await becomes(lambda: _holds_none(a), "no place left")

    async def test_evicted_on_its_way(self, sides):
        """
        A stream that has to leave before it has begun ends as soon as it has.
        """
        [a] = await sides("a", limit=1)
        assert await a.leases.take("u", "a-100", ("t",))
        second = asyncio.create_task(a.connect())
        await becomes(lambda: _leaving(a), "one that has to leave")
        await becomes(lambda: _is(lambda: "a-100" in a.doomed), "it is to end")
        a.open["a-100"] = ""
        a._end("a-100", a.doomed["a-100"])
        assert await second
        assert "evicted" == a.open["a-100"]

    async def test_a_place_that_nobody_holds(self, sides):
        """
        What was given when nobody listened any more is found and given back.
        """
        [a] = await sides("a", limit=1)
        await a.connect()
        await a.leases._store.work([a.leases._own["a-1"].lease], [Ask(lease("a-9"), True)])  # type: ignore[union-attr]
        assert ["a-9"] == await holds(a)
        assert await a.connect()
        assert ["a-2"] == await holds(a)

    async def test_ten_thousand_ends_come_in_batches(self, sides, server):
        """
        None of them waits, and Redis hears them a hundred at a time.
        """
        [a] = await sides("a", limit=0)
        streams = [f"a-{n}" for n in range(1000, 1600)]
        taken = await asyncio.gather(*(a.leases.take(f"user-{n % 60}", s, ("t",)) for n, s in enumerate(streams)))
        assert all(taken)
        sizes: list[int] = []
        work = a.leases._store.work  # type: ignore[union-attr]

        async def counted(gone: Any, asks: Any) -> Any:
            sizes.append(len(gone))
            return await work(gone, asks)

        a.leases._store.work = counted  # type: ignore[method-assign, union-attr]
        for stream in streams:
            a.leases.release(stream)
        assert 0 == len(a.leases)

        async def all_told() -> bool:
            return sum(sizes) == 600

        await becomes(all_told, "all ends told")
        assert 100 == max(sizes)
        assert len(sizes) <= 8
        with connect(server) as hands:
            assert not hands.keys("*side*streams:user-*")

    async def test_a_crowd_asks_together(self, sides, monkeypatch):
        """
        Who comes alone asks at once; who comes soon after it asks with all who do.
        """
        monkeypatch.setattr(leases, "GATHER_SECONDS", 1.0)
        [a] = await sides("a", limit=0)
        sizes: list[int] = []
        work = a.leases._store.work  # type: ignore[union-attr]

        async def counted(gone: Any, asks: Any) -> Any:
            sizes.append(len(asks))
            return await work(gone, asks)

        a.leases._store.work = counted  # type: ignore[method-assign, union-attr]
        assert await a.connect()
        assert [1] == sizes
        crowd = []
        for _ in range(20):
            crowd.append(asyncio.create_task(a.connect()))
            await asyncio.sleep(0.001)

        assert all(await asyncio.gather(*crowd))
        assert [1, 20] == sizes

    async def test_lapsed(self, sides, server):
        """
        A process that counts as dead comes back, and ends what is over: its oldest.
        """
        a, b = await sides("a", "b", prefix="lapsed")
        await a.connect()
        await a.connect()
        with connect(server) as hands:
            hands.zrem("{lapsed}:processes", "a")
        assert await b.connect(evict=False)  # the dead process's places are free
        a.leases._renew_at = 0.0
        a.leases._work.set()
        await becomes(lambda: _is(lambda: a.streams == ["a-2"]), "the oldest ended")
        assert "evicted" == a.open["a-1"]
        assert {"a-2", "b-1"} == set(await holds(b))

    async def test_an_ask_shows_that_it_lapsed(self, sides, server):
        """
        Whoever counts as dead is alive again before it gets a place, with all that it had.
        """
        a, b = await sides("a", "b", prefix="flushed")
        for side in (a, b):
            await side.connect()
        with connect(server) as hands:
            hands.delete("{flushed}:processes", "{flushed}:streams:u")
        assert await a.connect(evict=False)
        assert await b.connect(evict=False) is None
        await becomes(lambda: _is(lambda: b.streams == []), "what is over has ended")
        assert {"a-1", "a-2"} == set(await holds(b))

    async def test_revoked(self, sides):
        """
        All streams of one user end on every process, and nobody else's.
        """
        a, b = await sides("a", "b")
        await a.connect()
        await b.connect()
        await b.connect("other")
        assert 2 == await a.leases.revoke("u")
        await becomes(lambda: _is(lambda: (a.streams, b.streams) == ([], ["b-2"])), "ended everywhere")
        assert "revoked" == a.open["a-1"]
        assert "revoked" == b.open["b-1"]
        await becomes(lambda: _holds_none(a), "no place left")
        assert 0 == await a.leases.revoke("u")

    async def test_revoked_while_waiting(self, sides, monkeypatch):
        """
        A stream that waits for the place of one that is ended is ended, too.
        """
        monkeypatch.setattr(leases, "EVICT_SECONDS", 20.0)
        a, b = await sides("a", "b", limit=1)
        await a.connect()
        a.stubborn = True
        waiting = asyncio.create_task(b.connect())
        await becomes(lambda: _leaving(a), "one that has to leave")
        a.stubborn = False
        await a.leases.revoke("u")
        await becomes(lambda: _is(lambda: "b-1" in b.doomed), "it is to end")
        await waiting
        assert [] == b.streams
        await becomes(lambda: _holds_none(a), "no place left")

    async def test_other_processes_and_other_words(self, sides):
        """
        A notice for somebody else, or in another form, is passed over.
        """
        [a] = await sides("a")
        await a.connect()
        for name in ("1/b/a-1", "2/a/a-1", "a-1", "1/a", ""):
            a.leases.heed_evict({"user": "u", "member": name})
            a.leases.heed_granted({"member": name})
        a.leases.heed_evict({})
        a.leases.heed_revoke({})
        assert ["a-1"] == a.streams


async def _leaving(side: Side) -> bool:
    return any(held.leaving for held in await side.leases.held("u"))


async def _holds_none(side: Side) -> bool:
    return not await holds(side)


async def _is(condition: Callable[[], bool]) -> bool:
    return condition()


class TestRedisAway:
    async def test_each_process_counts_alone(self, sides, site, server):
        """
        The limit holds in each process; afterwards all are told, and what is over ends.
        """
        proxy = site.proxy(server)
        a, b = await sides("a", "b", url=proxy, limit=2, seconds=3)
        await a.connect()
        with proxy.refuse():
            assert await a.connect()  # the first one notices
            assert (True, True) == (a.leases.away, a.leases.errors >= 1)
            assert await a.connect()
            assert ["a-2", "a-3"] == a.streams
            assert await a.connect(evict=False) is None
            assert await b.connect()
            assert await b.connect()
        await becomes(lambda: _is(lambda: not a.leases.away and not b.leases.away), "Redis is back")
        await becomes(lambda: _is(lambda: len(a.streams) + len(b.streams) == 2), "what is over has ended")
        await becomes(lambda: _held_are(a, {*a.streams, *b.streams}), "Redis knows them")

    async def test_ends_meanwhile_are_told_afterwards(self, sides, site, server):
        proxy = site.proxy(server)
        [a] = await sides("a", url=proxy)
        await a.connect()
        await a.connect()
        with proxy.refuse():
            await a.connect(evict=False)
            a.leases.release("a-1")
            assert a.leases.away
        await becomes(lambda: _held_are(a, {"a-2"}), "the end is told")

    async def test_who_come_and_go_meanwhile(self, sides, site, server):
        """
        What Redis never heard of is not kept for it: an outage may be long. What stays is told, and its end too.
        """
        proxy = site.proxy(server)
        [a] = await sides("a", url=proxy)
        with proxy.refuse():
            await a.connect()  # the first one notices
            assert a.leases.away
            assert await a.connect()  # stays, and Redis hears of it later
            kept = len(a.leases._gone)
            for number in range(100):
                assert await a.connect(f"user-{number}")
                a.leases.release(f"a-{number + 3}")
            assert kept == len(a.leases._gone)
        await becomes(lambda: _held_are(a, {"a-1", "a-2"}), "what stayed is told")
        for stream in ("a-1", "a-2"):
            a.leases.release(stream)
        await becomes(lambda: _holds_none(a), "their ends are told")

    async def test_a_silent_redis_is_waited_for_once(self, sides, server):
        """
        The next connects do not wait for it.
        """
        [a] = await sides("a")
        await a.connect()
        with frozen(server):
            assert await a.connect()
            loop = asyncio.get_running_loop()
            began = loop.time()
            for n in range(20):
                assert await a.connect(f"user-{n}")
            assert loop.time() - began < 8  # each would wait half a second
        await becomes(lambda: _is(lambda: not a.leases.away), "Redis is back")
        await becomes(lambda: _held_are(a, {"a-1", "a-2"}), "Redis knows them")


async def _held_are(side: Side, streams: set[str]) -> bool:
    try:
        return set(await holds(side)) == streams
    except Exception:
        return False


class TestWithoutRedis:
    async def test_all_rules_hold(self):
        """
        With the log in memory there is one process, and nothing to wait for.
        """
        leases = Leases("a", limit=2, evicts=True)
        ended: list[tuple[str, str]] = []

        def end(stream: str, reason: str) -> None:
            ended.append((stream, reason))
            leases.release(stream)

        leases.end = end
        for n in range(3):
            assert await leases.take("u", f"a-{n}", ("t",))
        assert [("a-0", "evicted")] == ended
        assert not await leases.take("u", "a-9", ("t",), evict=False)
        assert ["a-1", "a-2"] == [held.stream for held in await leases.held("u")]
        assert 2 == await leases.revoke("u")
        assert [("a-1", "revoked"), ("a-2", "revoked")] == ended[1:]
        assert 0 == len(leases)
        assert json.dumps([]) == json.dumps(await leases.held("u"))
        await leases.stop()
