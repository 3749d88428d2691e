"""
The tickets in Redis, for all processes. See `app.tickets`.

One hash per ticket, named by the ticket's own hash, which Redis itself lets go
of when its time is over; the time of revocation per user. Redis's clock counts.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Any

from app import redis_client
from app.access import Caller
from app.log import LogUnavailable
from app.redis_log import _told as told
from app.tickets import Ticket, holder, read_ticket, user_key, write_ticket

_CONNECTIONS = 64

_NOW = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
"""

# KEYS: ticket. ARGV: caller, end by its token (ms, '' for none), longest (ms),
# first use within (ms). Returns the end.
_MAKE = (
    _NOW
    + """
local ends = now + tonumber(ARGV[3])
if ARGV[2] ~= '' then ends = math.min(ends, tonumber(ARGV[2])) end
local made, till = string.format('%.0f', now), string.format('%.0f', ends)
redis.call('HSET', KEYS[1], 'caller', ARGV[1], 'made', made, 'ends', till)
redis.call('PEXPIREAT', KEYS[1], string.format('%.0f', math.min(ends, now + tonumber(ARGV[4]))))
return till
"""
)

# KEYS: ticket, when its user's were revoked. A ticket that was made in the same
# millisecond is revoked too.
_FIND = """
local found = redis.call('HMGET', KEYS[1], 'caller', 'made', 'ends', 'used')
if not found[1] then return nil end
local revoked = redis.call('GET', KEYS[2])
if revoked and tonumber(found[2]) <= tonumber(revoked) then
  redis.call('DEL', KEYS[1])
  return nil
end
if not found[4] then
  redis.call('HSET', KEYS[1], 'used', '1')
  redis.call('PEXPIREAT', KEYS[1], found[3])
end
return {found[1], found[3]}
"""

# KEYS: ticket, when its user's were revoked. ARGV: stream. When it runs again it says
# the same again. It may have ended since it was found: its client waited meanwhile.
_HOLD = """
local held = redis.call('HMGET', KEYS[1], 'stream', 'before', 'made')
if not held[3] then return nil end
local revoked = redis.call('GET', KEYS[2])
if revoked and tonumber(held[3]) <= tonumber(revoked) then return nil end
if held[1] == ARGV[1] then return held[2] or '' end
if held[1] then redis.call('HSET', KEYS[1], 'before', held[1]) end
redis.call('HSET', KEYS[1], 'stream', ARGV[1])
return held[1] or ''
"""

# KEYS, ARGV: as for making one.
_RENEW = (
    _NOW
    + """
if redis.call('HEXISTS', KEYS[1], 'used') == 0 then return nil end
local ends = now + tonumber(ARGV[3])
if ARGV[2] ~= '' then ends = math.min(ends, tonumber(ARGV[2])) end
local till = string.format('%.0f', ends)
redis.call('HSET', KEYS[1], 'caller', ARGV[1], 'ends', till)
redis.call('PEXPIREAT', KEYS[1], till)
return till
"""
)

# KEYS: ticket. Returns '' where it serves no stream.
_REVOKE = """
local stream = redis.call('HGET', KEYS[1], 'stream')
redis.call('DEL', KEYS[1])
return stream or ''
"""

# KEYS: when the user's were revoked. ARGV: how long that matters (ms).
_REVOKE_ALL = (
    _NOW
    + """
redis.call('SET', KEYS[1], string.format('%.0f', now), 'PX', ARGV[1])
"""
)


class RedisTickets:
    """See `app.tickets.Tickets`."""

    def __init__(
        self, url: str, *, prefix: str, use_seconds: float, max_seconds: float, timeout_seconds: float = 2.0
    ) -> None:
        self._prefix = f"{{{prefix}}}:ticket"
        self._use_ms = int(use_seconds * 1000)
        self._max_ms = int(max_seconds * 1000)
        self._salt = b""
        self._client: Any = redis_client.client(url, timeout_seconds=timeout_seconds, max_connections=_CONNECTIONS)
        self._turns = redis_client.Turns(_CONNECTIONS, timeout_seconds)
        script = self._client.register_script
        self._make, self._find, self._hold = script(_MAKE), script(_FIND), script(_HOLD)
        self._renew, self._revoke, self._revoke_all = script(_RENEW), script(_REVOKE), script(_REVOKE_ALL)

    async def make(self, caller: Caller) -> Ticket:
        text = write_ticket(await self._salted(), caller.user)
        _, digest = read_ticket(text) or ("", "")
        ends = await self._run(self._make, keys=[self._key(digest)], args=[*self._rights(caller), self._use_ms])
        return Ticket(text, int(ends) / 1000)

    async def find(self, text: str) -> Caller | None:
        read = read_ticket(text)
        if read is None:
            return None
        key, digest = read
        found = await self._run(self._find, keys=[self._key(digest), self._revoked_key(key)])
        if found is None:
            return None
        user, subscribe = json.loads(found[0])
        return holder(Caller(user, tuple(subscribe)), int(found[1]) / 1000, digest)

    async def hold(self, ticket: str, stream: str, user: str | None) -> str | None:
        key = user_key(await self._salted(), user)
        before = await self._run(self._hold, keys=[self._key(ticket), self._revoked_key(key)], args=[stream])
        return None if before is None else before.decode()

    async def serves(self, ticket: str) -> str | None:
        held = await self._told(self._client.hget(self._key(ticket), "stream"))
        return None if held is None else held.decode()

    async def renew(self, ticket: str, caller: Caller) -> None:
        await self._run(self._renew, keys=[self._key(ticket)], args=self._rights(caller))

    async def revoke(self, text: str) -> str | None:
        read = read_ticket(text)
        if read is None:
            return None
        stream = await self._run(self._revoke, keys=[self._key(read[1])])
        return stream.decode() or None

    async def revoke_all(self, user: str) -> None:
        key = user_key(await self._salted(), user)
        await self._run(self._revoke_all, keys=[self._revoked_key(key)], args=[self._max_ms + 1000])

    async def close(self) -> None:
        await redis_client.close(self._client)

    async def _run(self, script: Any, keys: list[str], args: Sequence[str | int] = ()) -> Any:
        try:
            return await self._told(script(keys=keys, args=args))
        except LogUnavailable:
            # Once more: the connection may be one that a restart has cut, and
            # every script here does the same when it runs again.
            return await self._told(script(keys=keys, args=args))

    async def _told(self, command: Any) -> Any:
        return await told(self._turns.run(command))

    def _rights(self, caller: Caller) -> list[str | int]:
        ends = "" if caller.expires_at is None else str(int(caller.expires_at * 1000))
        return [json.dumps([caller.user, caller.subscribe]), ends, self._max_ms]

    def _key(self, digest: str) -> str:
        return f"{self._prefix}:{digest}"

    def _revoked_key(self, key: str) -> str:
        return f"{self._prefix}-revoked:{key}"

    async def _salted(self) -> bytes:
        """Return what keeps users' keys from being guessed; the same in every process."""
        if not self._salt:
            name = f"{self._prefix}-salt"
            await self._told(self._client.set(name, secrets.token_hex(16), nx=True))
            self._salt = await self._told(self._client.get(name))
        return self._salt
