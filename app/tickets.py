"""
Tickets: how an `EventSource`, which can send no header, says who it is.

A ticket stands in the URL, where proxies and browsers write it down. So it only
opens streams, must be used soon for the first time, serves one stream at a
time, ends with the token it was made with, and can be revoked. It is kept as a
hash: who reads the store learns none.

Written KEY.RANDOM: the key is the same for all tickets of a user, tells nothing
of their name, and is what nginx sends one user to one process by.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from app.access import Caller

# 16 bytes of key, 32 of what nobody can guess.
_TICKET = re.compile(r"[0-9a-f]{32}\.[A-Za-z0-9_-]{43}")


class Ticket(NamedTuple):
    """A ticket as its owner gets it, once."""

    text: str
    expires_at: float


class Tickets(Protocol):
    """All tickets. Every method raises LogUnavailable where the store cannot be reached."""

    async def make(self, caller: Caller) -> Ticket:
        """Return a new ticket with the rights that *caller* has to streams."""

    async def find(self, text: str) -> Caller | None:
        """
        Return whom the ticket *text* stands for, None if it is none (any more).

        The first time it is asked for opens its session; that must happen
        within SSE_TICKET_USE_SECONDS.
        """

    async def hold(self, ticket: str, stream: str, user: str | None) -> str | None:
        """
        Let *stream* be the one that *ticket* (its hash) of *user* serves.

        Returns:
            The stream before, "" where there was none; None where the ticket is over.
        """

    async def serves(self, ticket: str) -> str | None:
        """Return the stream that *ticket* (its hash) serves, or has served last."""

    async def renew(self, ticket: str, caller: Caller) -> None:
        """Give the rights and the end of *caller* to *ticket* (its hash), if it is alive."""

    async def revoke(self, text: str) -> str | None:
        """End the ticket *text*; return the stream it serves, if any."""

    async def revoke_all(self, user: str) -> None:
        """End every ticket of *user* that was made before now."""

    async def close(self) -> None:
        """Let go of all connections."""


def write_ticket(salt: bytes, user: str | None) -> str:
    """Return a new ticket of *user*."""
    return f"{user_key(salt, user)}.{secrets.token_urlsafe(32)}"


def user_key(salt: bytes, user: str | None) -> str:
    """Return what stands for *user* in their tickets."""
    # None has a key too, and it is no other user's.
    name = b"" if user is None else b"user:" + user.encode()
    return hmac.digest(salt, name, hashlib.sha256)[:16].hex()


def read_ticket(text: str) -> tuple[str, str] | None:
    """Return the user's key and the ticket's hash, None where *text* was never a ticket."""
    if not _TICKET.fullmatch(text):
        return None
    return text.partition(".")[0], hashlib.sha256(text.encode()).hexdigest()


def holder(caller: Caller, expires_at: float, ticket: str) -> Caller:
    """Return what is left of *caller* in a ticket: the right to streams, and no other."""
    return replace(caller, publish=(), admin=False, expires_at=expires_at, carrier="ticket", ticket=ticket)


@dataclass(slots=True)
class _Kept:
    caller: Caller
    key: str
    number: int
    use_until: float  # 0 when it has been used
    stream: str | None = None


class MemoryTickets:
    """The tickets of one process, which end with it."""

    def __init__(self, use_seconds: float, max_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._use = use_seconds
        self._max = max_seconds
        self._clock = clock
        self._salt = secrets.token_bytes(16)
        self._kept: dict[str, _Kept] = {}
        self._number = 0
        # Tickets up to this number are revoked, by user's key.
        self._revoked: dict[str, int] = {}
        self._sweep_at = 0.0

    async def make(self, caller: Caller) -> Ticket:
        self._sweep()
        text = write_ticket(self._salt, caller.user)
        key, digest = _read(text)
        ends = self._end(caller)
        self._number += 1
        self._kept[digest] = _Kept(holder(caller, ends, digest), key, self._number, self._clock() + self._use)
        return Ticket(text, ends)

    async def find(self, text: str) -> Caller | None:
        read = read_ticket(text)
        kept = None if read is None else self._alive(read[1])
        if kept is None:
            return None
        kept.use_until = 0
        return kept.caller

    async def hold(self, ticket: str, stream: str, user: str | None) -> str | None:
        kept = self._alive(ticket)
        if kept is None:
            return None
        before, kept.stream = kept.stream or "", stream
        return before

    async def serves(self, ticket: str) -> str | None:
        kept = self._alive(ticket)
        return None if kept is None else kept.stream

    async def renew(self, ticket: str, caller: Caller) -> None:
        kept = self._alive(ticket)
        if kept is not None:
            kept.caller = holder(caller, self._end(caller), ticket)

    async def revoke(self, text: str) -> str | None:
        read = read_ticket(text)
        kept = None if read is None else self._alive(read[1])
        if read is None or kept is None:
            return None
        del self._kept[read[1]]
        return kept.stream

    async def revoke_all(self, user: str) -> None:
        self._revoked[user_key(self._salt, user)] = self._number

    async def close(self) -> None:
        pass

    def _end(self, caller: Caller) -> float:
        longest = self._clock() + self._max
        return longest if caller.expires_at is None else min(caller.expires_at, longest)

    def _alive(self, digest: str) -> _Kept | None:
        kept = self._kept.get(digest)
        if kept is not None and self._over(kept):
            del self._kept[digest]
            return None
        return kept

    def _over(self, kept: _Kept) -> bool:
        now = self._clock()
        return (
            now >= (kept.caller.expires_at or 0)
            or 0 < kept.use_until <= now
            or kept.number <= self._revoked.get(kept.key, 0)
        )

    def _sweep(self) -> None:
        """Forget, now and then, what is over and was never asked for again."""
        if self._clock() >= self._sweep_at:
            self._sweep_at = self._clock() + self._use
            for digest in [digest for digest, kept in self._kept.items() if self._over(kept)]:
                del self._kept[digest]


def _read(text: str) -> tuple[str, str]:
    read: Any = read_ticket(text)
    return read  # type: ignore[no-any-return]
