"""
Both backends of the log keep the same promises: in memory, and in a real Redis.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.event import Draft, Entry
from app.log import ORIGIN, Batch, IdempotencyConflict, Log, Notice, Position, fingerprint, read_id
from app.memory_log import MemoryLog
from app.redis_log import RedisLog
from app.stack import Redis
from tests.live import Site, becomes

_names = itertools.count(1)

type Make = Callable[..., Log]


@pytest.fixture(scope="module")
def server(require: Callable[..., str]) -> Iterator[Redis]:
    require("redis-server", "valkey-server")
    with Site() as site:
        yield site.redis("--appendonly", "no")


@pytest.fixture(params=["memory", "redis"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    made: list[Log] = []

    def make(*, history_seconds: float = 60, max_events: int = 1_000_000, **more: float) -> Log:
        if request.param == "memory":
            log: Log = MemoryLog(history_seconds=history_seconds, max_events=max_events, **more)
        else:
            server = request.getfixturevalue("server")
            log = RedisLog(
                server.url,
                prefix=f"contract-{next(_names)}",
                history_seconds=history_seconds,
                max_events=max_events,
                **more,
            )
        made.append(log)
        return log

    yield make
    for log in made:
        await log.close()


@pytest.fixture
async def log(make: Make) -> Log:
    log = make()
    await log.open()
    return log


def draft(data: str = "x", *topics: str, event: str = "", retry: int | None = None) -> Draft:
    return Draft(topics or ("t",), data, event, retry)


async def put(log: Log, *data: str) -> list[str]:
    return await log.publish(Batch.of([draft(text) for text in data]))


async def everything(log: Log, epoch: str = "e") -> list[Entry]:
    return await log.read(epoch, ORIGIN, 100_000, 0)


def place(id: str) -> Position:
    parsed = read_id(id)
    assert parsed is not None
    return parsed[1]


class TestPublish:
    async def test_ids_are_those_of_the_entries(self, log):
        """
        What publish returns is what every reader sees, in one ascending order.
        """
        ids = [id for _ in range(20) for id in await put(log, "a", "b", "c")]
        epoch = (await log.state(ORIGIN)).epoch
        entries = await everything(log, epoch)

        assert ids == [entry.id for entry in entries]
        assert [place(id) for id in ids] == sorted({place(id) for id in ids})
        assert {epoch} == {id.partition(":")[0] for id in ids}

    async def test_fields_come_back_as_they_were_given(self, log):
        """
        The log changes nothing in an event.
        """
        drafts = [
            draft(""),
            draft(" leading and trailing "),
            draft("one\ntwo\r\nthree\rfour\n"),
            draft("nul \0 and 4-byte 𝄞 and 漢字"),
            draft("named", event="order.created"),
            draft("slower", retry=0),
            draft("slowest", retry=86_400_000),
            draft("several", "a", "b/c", "user:%C3%A9", "~._:/@-%"),
        ]
        await log.publish(Batch.of(drafts))

        assert drafts == [Draft(entry.topics, entry.data, entry.event, entry.retry) for entry in await everything(log)]

    async def test_batches_of_several_publishers(self, log):
        """
        A batch stands together, in its own order, whoever else publishes.
        """
        await asyncio.gather(*(put(log, *(f"{who}-{n}" for n in range(40))) for who in range(12)))
        data = [entry.data for entry in await everything(log)]

        assert 12 * 40 == len(data)
        for start in range(0, len(data), 40):
            who = data[start].partition("-")[0]
            assert [f"{who}-{n}" for n in range(40)] == data[start : start + 40]

    async def test_key_with_the_same_events(self, log):
        """
        A publish that is repeated under its key returns the first ids and adds nothing.
        """
        batch = Batch.of([draft("a"), draft("b")], "key")
        first = await log.publish(batch)
        await put(log, "between")

        assert first == await log.publish(Batch.of([draft("a"), draft("b")], "key"))
        assert ["a", "b", "between"] == [entry.data for entry in await everything(log)]

    async def test_key_at_the_same_time(self, log):
        """
        Ten attempts at once under one key are one publish.
        """
        answers = await asyncio.gather(*(log.publish(Batch.of([draft("a")], "key")) for _ in range(10)))

        assert [answers[0]] * 10 == answers
        assert 1 == len(await everything(log))

    @pytest.mark.parametrize(
        "other",
        [
            [draft("b")],
            [draft("a"), draft("a")],
            [draft("a", "other")],
            [draft("a", event="named")],
            [draft("a", retry=1)],
        ],
    )
    async def test_key_with_other_events(self, log, other):
        """
        A key that is used for something else is a conflict, and adds nothing.
        """
        await log.publish(Batch.of([draft("a")], "key"))

        with pytest.raises(IdempotencyConflict):
            await log.publish(Batch.of(other, "key"))
        assert 1 == len(await everything(log))

    @pytest.mark.parametrize(
        "others",
        [
            [draft("a", "x"), draft("b", "y z")],
            [draft("a", "x")],
            [draft("b", "y"), draft("a", "x")],
            [draft("a", "x"), draft("b", "y", event="e")],
            [draft("a", "x"), draft("b", "y", retry=0)],
            [draft("ab", "x"), draft("", "y")],
            [draft("a", "x", event="data"), draft("b", "y")],
            [draft("a,1:b", "x"), draft("b", "y")],
        ],
        ids=lambda drafts: f"{len(drafts)} {drafts[0].data!a}",
    )
    async def test_any_difference(self, log, others):
        """
        Whatever differs in an event, in their number or in their order, it is another publish.
        """
        await log.publish(Batch.of([draft("a", "x"), draft("b", "y")], "key"))

        with pytest.raises(IdempotencyConflict):
            await log.publish(Batch.of(others, "key"))

    async def test_no_key(self, log):
        """
        Equal events without a key are different publishes.
        """
        assert await put(log, "a") != await put(log, "a")
        assert 2 == len(await everything(log))

    async def test_key_is_forgotten(self, make):
        """
        A key is remembered for SSE_IDEMPOTENCY_SECONDS, and not for ever.
        """
        log = make(idempotency_seconds=0.15)
        first = await log.publish(Batch.of([draft("a")], "key"))

        async def anew() -> bool:
            return await log.publish(Batch.of([draft("a")], "key")) != first

        await becomes(anew, "a second publish")


class TestRead:
    async def test_after_is_not_included(self, log):
        """
        Reading from each entry's position gives the ones after it, no more and no less.
        """
        ids = await put(log, "a", "b", "c")

        for number, id in enumerate(ids):
            rest = await log.read("e", place(id), 10, 0)
            assert [place(later) for later in ids[number + 1 :]] == [entry.position for entry in rest]

    async def test_position_between_entries(self, log):
        """
        A position need not be an entry's: what is after it counts.
        """
        [first, second] = await put(log, "a", "b")
        before = Position(place(first).ms - 1, 5)

        assert ["a", "b"] == [entry.data for entry in await log.read("e", before, 10, 0)]
        assert [] == await log.read("e", Position(place(second).ms, place(second).seq + 7), 10, 0)

    async def test_count(self, log):
        """
        No more than asked for, and the oldest first.
        """
        await put(log, "a", "b", "c")

        assert ["a", "b"] == [entry.data for entry in await log.read("e", ORIGIN, 2, 0)]

    async def test_ids_carry_the_given_epoch(self, log):
        """
        The reader names the history that it reads; the log does not look it up.
        """
        await put(log, "a")

        assert {"mine"} == {entry.id.partition(":")[0] for entry in await log.read("mine", ORIGIN, 9, 0)}

    async def test_nothing_new(self, log):
        """
        A read returns empty-handed after the time that it was given, not earlier and not much later.
        """
        [id] = await put(log, "a")
        began = time.monotonic()

        assert [] == await log.read("e", place(id), 10, 0.2)
        assert 0.19 < time.monotonic() - began < 15

    async def test_no_wait(self, log):
        """
        With no time to wait a read answers at once.
        """
        assert [] == await log.read("e", ORIGIN, 10, 0)

    async def test_entry_arrives_while_waiting(self, log):
        """
        A waiting read returns when something comes, with all of it.
        """
        waiting = asyncio.create_task(log.read("e", ORIGIN, 10, 0.9))
        await asyncio.sleep(0)
        await put(log, "a", "b")

        # In Redis the read may have come after the publish: then it did not wait.
        assert ["a", "b"] == [entry.data for entry in await waiting]


class TestState:
    async def test_new_log(self, log):
        """
        A log without entries says so.
        """
        state = await log.state(ORIGIN)

        assert (None, ORIGIN, 0, 0, False) == (
            state.first, state.last, state.added, state.length, state.has_cursor,
        )  # fmt: skip
        assert abs(state.now_ms - time.time() * 1000) < 5_000

    async def test_after_publishing(self, log):
        """
        The state counts what was added and knows its ends.
        """
        ids = await put(log, "a", "b", "c")
        state = await log.state(place(ids[1]))

        assert (place(ids[0]), place(ids[2]), 3, 3, True) == (
            state.first, state.last, state.added, state.length, state.has_cursor,
        )  # fmt: skip
        assert state.epoch == ids[0].partition(":")[0]

    async def test_cursor_that_is_no_entry(self, log):
        """
        Only an entry that is there counts as there.
        """
        [id] = await put(log, "a")
        near = [Position(place(id).ms, place(id).seq + 1), Position(place(id).ms + 1, 0), ORIGIN]

        assert [False] * 3 == [(await log.state(position)).has_cursor for position in near]
        assert [False] * 3 == [await log.has(position) for position in near]
        assert await log.has(place(id))

    async def test_after_a_trim(self, make):
        """
        A trim moves the first entry and the length; what was ever added and the newest id stay.
        """
        log = make(max_events=2)
        await log.open()
        ids = await put(log, "a", "b", "c", "d")
        await log.trim()
        state = await log.state(place(ids[1]))

        assert (place(ids[2]), place(ids[3]), 4, 2, False) == (
            state.first, state.last, state.added, state.length, state.has_cursor,
        )  # fmt: skip
        assert [False, False, True, True] == [await log.has(place(id)) for id in ids]


class TestTrim:
    async def test_empty_log(self, log):
        """
        Nothing to trim is not an error.
        """
        await log.trim()

        assert [] == await everything(log)

    async def test_young_entries(self, log):
        """
        What is younger than the history stays.
        """
        await put(log, "a", "b")
        await log.trim()

        assert 2 == len(await everything(log))

    async def test_old_entries(self, make):
        """
        Of what is older than the history only the newest stays: the trim boundary.

        It is the position of every client that has seen all before the next entry.
        """
        log = make(history_seconds=1)
        await log.open()
        ids = await put(log, "a", "b", "c")

        async def trimmed() -> bool:
            await log.trim()
            return (await log.state(ORIGIN)).length < 3

        await becomes(trimmed)
        assert ["c"] == [entry.data for entry in await everything(log)]
        assert (await log.state(ORIGIN)).first == place(ids[2])

        await put(log, "d")
        await log.trim()
        assert ["c", "d"] == [entry.data for entry in await everything(log)]

    async def test_longest_log(self, make):
        """
        The length is a limit too, whatever the age.
        """
        log = make(max_events=10)
        await put(log, *map(str, range(37)))
        await log.trim()

        assert list(map(str, range(27, 37))) == [entry.data for entry in await everything(log)]


class TestRenewEpoch:
    async def test_as_expected(self, log):
        """
        Whoever knows the epoch can replace it.
        """
        await put(log, "a")
        old = (await log.state(ORIGIN)).epoch
        new = await log.renew_epoch(old)

        assert old != new
        assert new == (await log.state(ORIGIN)).epoch

    async def test_somebody_was_faster(self, log):
        """
        Of several processes that notice one loss, one renews; the others get its epoch.
        """
        await put(log, "a")
        old = (await log.state(ORIGIN)).epoch
        answers = await asyncio.gather(*(log.renew_epoch(old) for _ in range(8)))

        assert {(await log.state(ORIGIN)).epoch} == set(answers)
        assert old not in answers

    async def test_none_expected(self, log):
        """
        An epoch that is there is not replaced by one who saw none.
        """
        await put(log, "a")
        old = (await log.state(ORIGIN)).epoch

        assert old == await log.renew_epoch(None)

    async def test_entries_stay(self, log):
        """
        A new epoch renames the history; it does not shorten it.
        """
        await put(log, "a", "b")
        await log.renew_epoch((await log.state(ORIGIN)).epoch)
        [id] = await put(log, "c")
        state = await log.state(ORIGIN)

        assert (3, state.epoch) == (state.length, id.partition(":")[0])

    async def test_epochs_fit_into_ids(self, log):
        """
        Every epoch can be read back out of an id.
        """
        epoch: str | None = None
        for _ in range(5):
            epoch = await log.renew_epoch(epoch)
            [id] = await put(log, "a")
            parsed = read_id(id)

            assert parsed is not None
            assert epoch == parsed[0]


class TestPing:
    async def test_log_that_answers(self, log):
        """
        A log that answers says so.
        """
        assert await log.ping()


def evict(n: int) -> Notice:
    return Notice("evict", {"stream": f"a-{n}", "text": "ü ="})


class TestNotices:
    """The control log: what processes tell each other beside the events."""

    async def test_notices_come_with_the_next_read(self, log):
        """
        Once, in order, and beside the entries, which they do not count among.
        """
        await put(log, "1")
        for n in range(3):
            await log.notify(evict(n))
        assert ["1"] == [entry.data for entry in await everything(log)]
        assert [evict(0), evict(1), evict(2)] == list(log.notices)
        log.notices.clear()
        await everything(log)
        assert not log.notices
        assert 1 == (await log.state(ORIGIN)).added

    async def test_a_notice_ends_the_wait_for_an_entry(self, make):
        log = make()
        if isinstance(log, RedisLog):
            log = make(timeout_seconds=60)  # by itself a read ends after half of that
        await log.open()
        await everything(log)
        reading = asyncio.create_task(log.read("e", ORIGIN, 10, 60))
        await asyncio.sleep(0)
        await log.notify(evict(1))
        assert [] == await asyncio.wait_for(reading, 20)
        assert [evict(1)] == list(log.notices)

    async def test_a_notice_before_the_read_ends_it_at_once(self, log):
        await log.notify(evict(1))
        assert [] == await asyncio.wait_for(log.read("e", ORIGIN, 10, 30), 10)
        assert [evict(1)] == list(log.notices)


# Texts that look like the recipe itself.
_texts = st.text(alphabet="1;:,ad", max_size=12)
_drafts = st.builds(
    Draft,
    topics=st.lists(st.sampled_from(["a", "b", "data"]), min_size=1, max_size=2).map(tuple),
    data=_texts,
    event=_texts,
    retry=st.none() | st.integers(0, 3),
)


class TestFingerprint:
    """What Redis keeps beside an `Idempotency-Key`, and other versions of the kit compare."""

    @pytest.mark.parametrize(
        ("drafts", "known"),
        [
            ([Draft(("news",), "hello")], "19a8ded725f52ed923cc9043051399bc"),
            ([Draft(("a", "b"), "é\n\U0001f600", "order.created", 0), Draft(("c",), "")], "1335478a4f6c204a2ce6bf25fa23fede"),
        ],
        ids=["least", "all fields"],
    )
    def test_known_values(self, drafts, known):
        """
        They are the same in every process and every version: during a rollout two versions answer one client.

        If this fails, events have got another fingerprint: then a client that repeats a publish
        through a process of the other version reads 422. See `app.log.fingerprint`.
        """
        assert known == fingerprint(drafts)

    @example([Draft(("t",), "c", "a,data,b")], [Draft(("t",), "b,data,c", "a")])
    @example([Draft(("t",), "c", "a,4:data,1:b")], [Draft(("t",), "b,4:data,1:c", "a")])
    @example([Draft(("t",), "a")] * 2, [Draft(("t",), "a,4;6:topics,1:t,4:data,1:a")])
    @given(st.lists(_drafts, min_size=1, max_size=3), st.lists(_drafts, min_size=1, max_size=3))
    def test_tells_events_apart(self, drafts, others):
        """
        No text in an event makes two batches alike, and all have the form that Redis keeps.
        """
        assert (drafts == others) == (fingerprint(drafts) == fingerprint(others))
        assert 32 == len(fingerprint(drafts))
        assert fingerprint(drafts).startswith("1")
