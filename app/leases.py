"""
How many streams a user may have over all processes: who has a place, and who waits for one.

A *lease* is one stream's place among its user's. `Places` are the rules, in
memory; `app.redis_leases` keeps the same rules for all processes. `Leases` is
one process's side: it asks for its streams, tells what has ended, shows that it
lives, and counts alone while Redis is away.

Where all places are taken, `reject` refuses. `evict` goes in two phases: the
oldest stream is marked as leaving, and still counted; its process hears a
notice, ends it, and gives its place to the one that waits, which hears another.
So there is never one too many.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple, Protocol

import structlog

from app.log import Notice

# Longest wait for an evicted stream's place.
EVICT_SECONDS = 1.0
# Ends of a crowd go to Redis in batches of this many, one after the other.
BATCH = 100
# What a crowd asks within this time goes to Redis in one script: a round trip
# costs as much as ten asks. Who comes alone does not wait.
GATHER_SECONDS = 0.005
# What a member begins with: the form of the rest, for two versions side by side.
FORMAT = "1"

# granted: it has a place. waiting: it gets the place of one that is leaving.
# full: nobody can be asked to leave. lapsed: this process counts as dead.
Verdict = Literal["granted", "waiting", "full", "lapsed"]


class LeasesUnavailable(Exception):
    """The leases of other processes could not be asked for."""


def write_member(process: str, stream: str) -> str:
    """Return the name of a stream's lease among its user's."""
    return f"{FORMAT}/{process}/{stream}"


@dataclass(frozen=True, slots=True)
class Lease:
    """One stream's place among its user's."""

    user: str
    process: str
    stream: str
    topics: tuple[str, ...] = ()
    opened_ms: int = 0

    @property
    def member(self) -> str:
        """The lease's name among its user's."""
        return write_member(self.process, self.stream)


@dataclass(frozen=True, slots=True)
class Held:
    """A lease as a list of them shows it."""

    stream: str
    process: str
    seconds: float
    topics: tuple[str, ...]
    leaving: bool


class Ask(NamedTuple):
    """
    A wish for a place.

    Attributes:
        evict: another stream may have to leave for it.
        instead: the member whose place it is to have, which is being ended anyway.
    """

    lease: Lease
    evict: bool
    instead: str = ""


class Store(Protocol):
    """The leases of all processes. Every method raises LeasesUnavailable when it cannot be reached."""

    async def work(self, gone: Sequence[Lease], asks: Sequence[Ask]) -> list[Verdict]:
        """Take *gone* out, waiting ones too, then answer *asks*."""

    async def renew(self) -> bool:
        """Show that this process lives; False if it had counted as dead before."""

    async def restore(self, leases: Sequence[Lease]) -> list[Lease]:
        """Take *leases* in again, each user's in the order given; return those that find no place."""

    async def held(self, user: str) -> list[Held]:
        """Return the leases of *user*, the oldest first."""

    async def revoke(self, user: str) -> int:
        """Tell all processes to end the streams of *user*; return how many there are."""

    async def leave(self) -> None:
        """Count as dead from now on."""

    async def close(self) -> None:
        """Let go of all connections."""


class Places:
    """
    The rules, for one process: with the log in memory, and while Redis is away.

    Args:
        limit: most streams of one user; 0: no limit.
        tell: hears `evict` and `granted`, as all processes do from Redis.
    """

    def __init__(self, limit: int, tell: Callable[[Notice], None]) -> None:
        self._limit = limit
        self._tell = tell
        self._users: dict[str, dict[str, Lease]] = {}
        # Members that are asked to leave, and who waits for their place.
        self._leaving: dict[str, Lease | None] = {}
        self.count = 0

    def of(self, user: str) -> list[Lease]:
        """Return the leases of *user*, the oldest first."""
        return list(self._users.get(user, {}).values())

    def leaving(self, lease: Lease) -> bool:
        """Tell whether *lease* was asked to leave."""
        return lease.member in self._leaving

    def put(self, lease: Lease) -> None:
        """Give *lease* a place whatever the limit is: it was given elsewhere."""
        members = self._users.setdefault(lease.user, {})
        self.count += lease.member not in members
        members[lease.member] = lease

    def take(self, ask: Ask) -> Verdict:
        """Answer *ask*; see `Verdict`."""
        lease = ask.lease
        members = self._users.get(lease.user, {})
        if not self._limit or len(members) < self._limit:
            self.put(lease)
            return "granted"
        if ask.instead in members:
            free = [ask.instead]
        elif ask.evict:
            free = list(members)
        else:
            return "full"
        # One that was asked already, for somebody who gave up, goes first.
        free = [member for member in free if self._leaving.get(member) is None]
        oldest = next((m for m in free if m in self._leaving), free[0] if free else None)
        if oldest is None:
            return "full"
        self._leaving[oldest] = lease
        self._tell(evict(lease.user, oldest))
        return "waiting"

    def drop(self, lease: Lease) -> None:
        """Take *lease* out, and give its place to who waits for it; it may itself be waiting."""
        member = lease.member
        for leaving, heir in self._leaving.items():
            if heir is not None and heir.member == member:
                self._leaving[leaving] = None
                break
        members = self._users.get(lease.user)
        if members is None or members.pop(member, None) is None:
            return
        self.count -= 1
        heir = self._leaving.pop(member, None)
        if heir is not None:
            self.put(heir)
            self._tell(granted(heir.member))
        if not members:
            del self._users[lease.user]


def evict(user: str, member: str) -> Notice:
    """Return the notice that *member* has to leave."""
    return Notice("evict", {"user": user, "member": member})


def granted(member: str) -> Notice:
    """Return the notice that *member*, who waited, has its place."""
    return Notice("granted", {"member": member})


def revoke(user: str) -> Notice:
    """Return the notice that all streams of *user* end, and nothing made before lets them in again."""
    return Notice("revoke", {"user": user})


@dataclass(slots=True)
class _Own:
    """A lease of this process."""

    lease: Lease
    placed: bool = False
    known: bool = True  # the store may have it
    granted: "asyncio.Future[None] | None" = None


class Leases:
    """
    The leases of this process.

    `end` is called with a stream's id and a reason when it has to end, or, where
    it has not begun yet, as soon as it has; `end_coming` with a user and a reason,
    for those that have not even asked for a place. Nothing here is awaited by a
    delivery; a connect awaits `take`.

    Attributes:
        away: Redis does not answer; this process counts alone.
        errors: times that Redis went away, or refused.
    """

    def __init__(
        self,
        process: str,
        *,
        limit: int,
        evicts: bool,
        store: Store | None = None,
        lease_seconds: float = 10.0,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        logger: structlog.typing.FilteringBoundLogger | None = None,
    ) -> None:
        self.end: Callable[[str, str], object] = lambda stream, reason: None
        self.end_coming: Callable[[str, str], object] = lambda user, reason: None
        self.away = False
        self.errors = 0
        self._process = process
        self._evicts = evicts
        self._store = store
        self._lease_seconds = lease_seconds
        self._random = random or Random()
        self._clock = clock
        self._logger = logger or structlog.get_logger()
        self._places = Places(limit, self._heard)
        self._own: dict[str, _Own] = {}
        self._asks: deque[tuple[_Own, Ask, asyncio.Future[Verdict]]] = deque()
        self._gone: deque[Lease] = deque()
        self._work = asyncio.Event()
        self._renew_at = 0.0
        self._served_at = 0.0
        # Places were given while Redis was away, or it may not know all of them.
        self._unsure = False

    def __len__(self) -> int:
        return self._places.count

    # --- a stream's life -----------------------------------------------------

    async def take(
        self, user: str, stream: str, topics: Iterable[str], *, evict: bool = True, instead: str = ""
    ) -> bool:
        """
        Ask for a place for *stream*; return whether it has one.

        With the policy `evict` another stream of *user* may leave for it, unless
        *evict* is false; that can take `EVICT_SECONDS`. It gets the place of the
        stream *instead*, which somebody ends, with either policy. Whoever got a
        place calls `release` in any case.
        """
        lease = Lease(user, self._process, stream, tuple(topics), time.time_ns() // 1_000_000)
        own = self._own[stream] = _Own(lease)
        verdict: Verdict | None = None
        try:
            process = instead.rpartition("-")[0]
            ask = Ask(lease, evict and self._evicts, write_member(process, instead) if instead else "")
            if self._store is None or self.away:
                own.known = False
                verdict = self._take_here(own, ask)
            else:
                answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
                self._asks.append((own, ask, answer))
                self._work.set()
                verdict = await answer
            if verdict == "waiting" and not own.placed:
                own.granted = asyncio.get_running_loop().create_future()
                with suppress(TimeoutError):
                    await asyncio.wait_for(own.granted, EVICT_SECONDS)
        except BaseException:
            # The client has gone: perhaps in the very turn in which it got its
            # place, and then nobody else knows that it has one.
            self.release(stream)
            raise
        if not own.placed:
            if verdict == "full":
                self._own.pop(stream, None)  # nothing to give back
            else:
                self.release(stream)
        return own.placed

    def release(self, stream: str) -> None:
        """Give the place of *stream* back; it has none, or one only once. Returns at once."""
        own = self._own.pop(stream, None)
        if own is None:
            return
        self._places.drop(own.lease)
        if self._store is not None and own.known:
            self._gone.append(own.lease)
            self._work.set()

    # --- what processes tell each other --------------------------------------

    def heed_evict(self, fields: dict[str, str]) -> None:
        """End the stream that has to leave, if it is one of this process."""
        member = fields.get("member", "")
        stream = self._mine(member)
        if stream is None:
            return
        own = self._own.get(stream)
        if own is None:
            # It ended meanwhile, or its place was given when nobody listened any more.
            if self._store is not None:
                self._gone.append(Lease(fields.get("user", ""), self._process, stream))
                self._work.set()
            return
        self.end(stream, "evicted")

    def heed_granted(self, fields: dict[str, str]) -> None:
        """Let the stream begin that waited for a place."""
        stream = self._mine(fields.get("member", ""))
        own = None if stream is None else self._own.get(stream)
        if own is not None:
            self._place(own)

    def heed_revoke(self, fields: dict[str, str]) -> None:
        """End all streams of the user."""
        user = fields.get("user", "")
        # Also those that wait for a place: they would get that of one which ends now.
        for lease in [own.lease for own in self._own.values() if own.lease.user == user]:
            self.end(lease.stream, "revoked")
        # And those whose ticket was found good a moment ago.
        self.end_coming(user, "revoked")

    # --- for administrators --------------------------------------------------

    async def held(self, user: str) -> list[Held]:
        """Return the streams of *user* on all processes. Raises LeasesUnavailable."""
        if self._store is not None:
            return await self._store.held(user)
        now = time.time_ns() // 1_000_000
        return [
            Held(each.stream, each.process, (now - each.opened_ms) / 1000, each.topics, self._places.leaving(each))
            for each in self._places.of(user)
        ]

    async def revoke(self, user: str) -> int:
        """End the streams of *user* on all processes; return how many. Raises LeasesUnavailable."""
        if self._store is not None:
            return await self._store.revoke(user)
        count = len(self._places.of(user))
        self._heard(revoke(user))
        return count

    # --- the process's life --------------------------------------------------

    async def run(self) -> None:
        """Serve what is asked, and show that this process lives; for ever."""
        while self._store is not None:
            try:
                if self._clock() >= self._renew_at:
                    await self._renew(self._store)
                await self._gather()
                await self._serve(self._store)
            except LeasesUnavailable as error:
                self._lost(error)
            if self._asks or (self._gone and not self.away):
                continue
            with suppress(TimeoutError):
                await asyncio.wait_for(self._worth_working(), max(0.0, self._renew_at - self._clock()))

    async def stop(self) -> None:
        """Give back what is left, and count as dead."""
        for stream in list(self._own):
            self.release(stream)
        if self._store is None:
            return
        with suppress(LeasesUnavailable):
            if not self.away:
                while self._gone:
                    await self._serve(self._store)
                await self._store.leave()
        await self._store.close()

    # --- inside --------------------------------------------------------------

    async def _worth_working(self) -> None:
        if self.away:
            # Nothing can be told to Redis; asks are answered here.
            await asyncio.get_running_loop().create_future()
        await self._work.wait()

    async def _gather(self) -> None:
        """Let a crowd become one batch: return when the one before began long enough ago."""
        waiting = len(self._asks) + len(self._gone)
        if not waiting:
            return
        loop = asyncio.get_running_loop()
        pause = self._served_at + GATHER_SECONDS - loop.time()
        if pause > 0 and waiting < BATCH:
            await asyncio.sleep(pause)
        self._served_at = loop.time()

    async def _serve(self, store: Store) -> None:
        self._work.clear()
        gone = [self._gone.popleft() for _ in range(min(len(self._gone), BATCH))]
        asks = [self._asks.popleft() for _ in range(min(len(self._asks), BATCH))]
        # Who has gone meanwhile needs no answer.
        asks = [each for each in asks if not each[2].done()]
        if not gone and not asks:
            return
        try:
            verdicts = await store.work(gone, [ask for _, ask, _ in asks])
            lapsed = [each for each, verdict in zip(asks, verdicts, strict=True) if verdict == "lapsed"]
            for each, verdict in zip(asks, verdicts, strict=True):
                if verdict != "lapsed":
                    self._answer(*each, verdict)
            asks = lapsed
            if lapsed:
                gone = []
                await self._renew(store)
                # Lapsed again within a moment: whoever counts is not to be relied on.
                verdicts = await store.work([], [ask for _, ask, _ in lapsed])
                if "lapsed" in verdicts:
                    raise LeasesUnavailable("this process counts as dead at once; is SSE_LEASE_SECONDS too short?")
                for each, verdict in zip(lapsed, verdicts, strict=True):
                    self._answer(*each, verdict)
                asks = []
        except BaseException:
            self._gone.extendleft(reversed(gone))
            self._asks.extendleft(reversed(asks))
            # Redis may have heard what it did not answer.
            self._unsure = True
            raise

    def _answer(self, own: _Own, ask: Ask, answer: "asyncio.Future[Verdict]", verdict: Verdict) -> None:
        if verdict == "granted" and own.lease.stream in self._own:
            self._place(own)
        if not answer.done():
            answer.set_result(verdict)

    def _take_here(self, own: _Own, ask: Ask) -> Verdict:
        verdict = self._places.take(ask)
        if verdict == "granted":
            self._place(own)
        self._unsure = True
        return verdict

    def _place(self, own: _Own) -> None:
        own.placed = True
        self._places.put(own.lease)
        if own.granted is not None and not own.granted.done():
            own.granted.set_result(None)

    def _heard(self, notice: Notice) -> None:
        """Heed what another process would hear from Redis."""
        {"evict": self.heed_evict, "granted": self.heed_granted, "revoke": self.heed_revoke}[notice.kind](notice.fields)

    def _mine(self, member: str) -> str | None:
        form, _, rest = member.partition("/")
        process, _, stream = rest.partition("/")
        return stream if form == FORMAT and process == self._process else None

    async def _renew(self, store: Store) -> None:
        alive = await store.renew()
        back = self.away
        if back:
            self._logger.info("leases_connected", leases=len(self))
        if not alive or back or self._unsure:
            while self._gone:
                # First: what has ended would take the place of what has not.
                gone = [self._gone.popleft() for _ in range(min(len(self._gone), BATCH))]
                try:
                    await store.work(gone, [])
                except BaseException:
                    self._gone.extendleft(reversed(gone))
                    raise
            self._unsure = False
            # The newest first: as in every eviction, the oldest has to leave.
            placed = [own for own in reversed(self._own.values()) if own.placed]
            for own in placed:
                own.known = True
            mine = [own.lease for own in placed]
            if mine and not alive:
                self._logger.warning("leases_lapsed", leases=len(mine))
            try:
                over = await store.restore(mine)
            except BaseException:
                self._unsure = True
                raise
            for lease in over:
                if lease.stream in self._own:
                    self.end(lease.stream, "evicted")
        self.away = False
        # Places that were given here during the last step are told at once.
        pause = 0.0 if self._unsure else self._lease_seconds / 3 * self._random.uniform(0.8, 1.0)
        self._renew_at = self._clock() + pause

    def _lost(self, error: LeasesUnavailable) -> None:
        self.errors += 1
        if not self.away:
            self._logger.warning(
                "leases_unavailable",
                error=str(error),
                leases=len(self),
                note="Until Redis answers, this process holds the limit for its own streams alone.",
            )
        self.away = True
        self._renew_at = self._clock() + min(1.0, self._lease_seconds / 3) * self._random.uniform(0.5, 1.0)
        while self._asks:
            own, ask, answer = self._asks.popleft()
            if not answer.done():
                answer.set_result(self._take_here(own, ask))
