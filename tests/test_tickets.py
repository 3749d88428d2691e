"""Tickets in memory and in Redis: the same promises for both."""

import asyncio
import time
from itertools import count

import pytest

from app.access import Caller
from app.redis_tickets import RedisTickets
from app.tickets import MemoryTickets, Tickets, read_ticket, user_key
from tests.live import connect

ALICE = Caller("alice", ("orders/*",), ("chat",), admin=True, carrier="bearer")
_prefixes = count()


@pytest.fixture(params=["memory", "redis"])
async def make(request):
    """Return a function that makes a store; with Redis, several are the same one seen by several processes."""
    made: list[Tickets] = []
    prefix = f"tickets-{next(_prefixes)}"

    def store(*, use_seconds: float = 30, max_seconds: float = 3600) -> Tickets:
        if request.param == "memory":
            if not made:
                made.append(MemoryTickets(use_seconds, max_seconds))
            return made[0]
        url = request.getfixturevalue("module_redis_server").url
        # Patient: what is asked again after others had their turn is another turn.
        lasting = {"use_seconds": use_seconds, "max_seconds": max_seconds}
        made.append(RedisTickets(url, prefix=prefix, timeout_seconds=30, **lasting))
        return made[-1]

    yield store
    for each in made:
        await each.close()


class TestRights:
    async def test_of_a_ticket(self, make):
        """It carries what its owner may read, and no other right."""
        ticket = await make().make(ALICE)
        caller = await make().find(ticket.text)

        assert ("alice", ("orders/*",), (), False) == (caller.user, caller.subscribe, caller.publish, caller.admin)
        assert ("ticket", read_ticket(ticket.text)[1]) == (caller.carrier, caller.ticket)
        assert ticket.expires_at == pytest.approx(caller.expires_at)

    async def test_of_nobody(self, make):
        """Without authentication nobody has tickets too."""
        caller = await make().find((await make().make(Caller(None, ("*",)))).text)

        assert (None, ("*",)) == (caller.user, caller.subscribe)

    @pytest.mark.parametrize("text", ["", "x", "0" * 32 + "." + "A" * 43, "0" * 32 + "." + "A" * 42 + "é"])
    async def test_none(self, make, text):
        """What was never given out is none, whatever it looks like."""
        assert await make().find(text) is None
        assert await make().revoke(text) is None

    async def test_each_is_another(self, make):
        """The user's key is the same in all, in every process; the rest nobody can guess."""
        one, two, other = [(await make().make(Caller(user))).text for user in ("alice", "alice", "bob")]

        assert one.split(".")[0] == two.split(".")[0] != other.split(".")[0]
        assert one.split(".")[1] != two.split(".")[1]
        assert "alice" not in one

    def test_key_of_nobody(self):
        """Nobody's key is nobody else's."""
        assert 4 == len({user_key(b"salt", user) for user in (None, "", "None", "user:")})


class TestTime:
    async def test_first_use(self, make):
        """The first use must come soon; then it lives on."""
        store = make(use_seconds=1)
        used, unused = await store.make(ALICE), await store.make(ALICE)
        assert await store.find(used.text)
        await asyncio.sleep(1.1)

        assert await store.find(used.text)
        assert await store.find(unused.text) is None

    async def test_end_of_the_token(self, make):
        """It ends with the token it was made with."""
        until = time.time() + 1
        store = make()
        ticket = await store.make(Caller("alice", expires_at=until))
        assert ticket.expires_at == pytest.approx(until, abs=0.01)
        assert await store.find(ticket.text)
        await asyncio.sleep(1.1)

        assert await store.find(ticket.text) is None
        assert await store.hold(read_ticket(ticket.text)[1], "s-1", "alice") is None

    async def test_longest(self, make):
        """It ends at SSE_TICKET_MAX_SECONDS where the token lives longer, or for ever."""
        for caller in (Caller("a"), Caller("a", expires_at=time.time() + 9_999)):
            ticket = await make(max_seconds=60).make(caller)

            assert ticket.expires_at == pytest.approx(time.time() + 60, abs=5)

    async def test_renewed(self, make):
        """New rights and a new end, for one that is in use."""
        store = make()
        ticket = await store.make(Caller("alice", ("a",), expires_at=time.time() + 10))
        await store.find(ticket.text)
        later = time.time() + 100
        await store.renew(read_ticket(ticket.text)[1], Caller("alice", ("b",), ("c",), expires_at=later))
        caller = await store.find(ticket.text)

        assert (("b",), ()) == (caller.subscribe, caller.publish)
        assert later == pytest.approx(caller.expires_at, abs=0.01)

    async def test_renewed_when_it_is_over(self, make):
        """What is over stays over."""
        store = make()
        ticket = await store.make(ALICE)
        await store.find(ticket.text)
        await store.revoke(ticket.text)
        await store.renew(read_ticket(ticket.text)[1], ALICE)

        assert await store.find(ticket.text) is None


class TestStreams:
    async def test_one_at_a_time(self, make):
        """Who takes it learns whom it served before, in whatever process."""
        ticket = await make().make(ALICE)
        await make().find(ticket.text)
        held = read_ticket(ticket.text)[1]

        assert await make().serves(held) is None
        assert ["", "s-1", "s-2"] == [await make().hold(held, stream, "alice") for stream in ("s-1", "s-2", "s-3")]
        assert "s-3" == await make().serves(held)

    async def test_asked_again(self, module_redis_server):
        """Who asks again, because an answer was lost, gets the same one."""
        store = RedisTickets(module_redis_server.url, prefix="again", use_seconds=30, max_seconds=60)
        ticket = await store.make(ALICE)
        held = read_ticket(ticket.text)[1]

        names = ("s-1", "s-1", "s-2", "s-2")
        assert ["", "", "s-1", "s-1"] == [await store.hold(held, name, "alice") for name in names]
        await store.close()

    async def test_race(self, make):
        """However many take it at once, each stream but one is somebody's predecessor."""
        stores = [make() for _ in range(4)]
        ticket = await stores[0].make(ALICE)
        await stores[0].find(ticket.text)
        held = read_ticket(ticket.text)[1]
        names = [f"s-{number}" for number in range(40)]
        before = await asyncio.gather(*(stores[n % 4].hold(held, name, "alice") for n, name in enumerate(names)))

        assert 40 == len(set(before))
        assert 39 == len(set(before) & set(names))


class TestRevocation:
    async def test_one(self, make):
        """A revoked ticket is none, everywhere; the stream it served is named."""
        ticket, other = await make().make(ALICE), await make().make(ALICE)
        await make().find(ticket.text)
        await make().hold(read_ticket(ticket.text)[1], "s-1", "alice")

        assert "s-1" == await make().revoke(ticket.text)
        assert await make().revoke(ticket.text) is None
        assert await make().find(ticket.text) is None
        assert await make().find(other.text)

    async def test_all_of_a_user(self, make):
        """Used and unused ones end; those made later, and other users', live."""
        before = [await make().make(ALICE) for _ in range(2)]
        bob = await make().make(Caller("bob"))
        await make().find(before[0].text)
        await make().revoke_all("alice")
        await asyncio.sleep(0.002)  # Redis counts in milliseconds
        after = await make().make(ALICE)

        assert [None, None] == [await make().find(ticket.text) for ticket in before]
        assert await make().find(after.text)
        assert await make().find(bob.text)

    @pytest.mark.parametrize("how", ["one", "all"])
    async def test_on_the_way(self, make, how):
        """Who was let in by a ticket that is revoked before its stream begins gets none."""
        ticket, bob = await make().make(ALICE), await make().make(Caller("bob"))
        for each in (ticket, bob):
            assert await make().find(each.text)
        await (make().revoke(ticket.text) if how == "one" else make().revoke_all("alice"))

        assert await make().hold(read_ticket(ticket.text)[1], "s-1", "alice") is None
        assert "" == await make().hold(read_ticket(bob.text)[1], "s-2", "bob")


class TestStore:
    async def test_nothing_to_steal(self, module_redis_server):
        """Whoever reads Redis learns no ticket; and all of it goes by itself."""
        store = RedisTickets(module_redis_server.url, prefix="steal", use_seconds=30, max_seconds=60)
        ticket = await store.make(ALICE)
        await store.find(ticket.text)
        await store.revoke_all("bob")
        await store.close()
        with connect(module_redis_server) as client:
            keys = [key for key in client.keys("{steal}:*") if not key.endswith("-salt")]
            held = [*keys, *(str(client.hgetall(key)) for key in keys if client.type(key) == "hash")]

            assert 2 == len(keys)
            assert not [text for text in held if ticket.text in text or ticket.text.split(".")[1] in text]
            assert all(0 < client.pttl(key) <= 61_000 for key in keys)

    async def test_forgotten(self):
        """In memory, too, what is over takes no room."""
        store = MemoryTickets(0.01, 0.02)
        for _ in range(100):
            await store.make(ALICE)
        await asyncio.sleep(0.03)
        await store.make(ALICE)

        assert 1 == len(store._kept)
