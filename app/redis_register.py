"""
The register of runs in Redis. See `app.register`.

Keys: `{…}:run:ID`, a hash per run; `{…}:runs:PROCESS`, the ids that a process has
in hand; `{…}:makers`, until when each of these processes is alive, by Redis's clock.
"""

from typing import Any, cast

from redis.exceptions import RedisError, ResponseError

from app import redis_client
from app.log import LogUnavailable
from app.register import LIVE_SECONDS, Record

_CONNECTIONS = 16

_NOW = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
"""

# KEYS: run, ids of the process, makers. ARGV: id, process, ms that a maker lives,
# ms that the record is kept, fields of the record.
_START = (
    _NOW
    + """
local known = redis.call('HGETALL', KEYS[1])
if #known > 0 then return known end
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[3], now + ARGV[3], ARGV[2])
return {}
"""
)

# KEYS: the same. ARGV: id, process, id of the last event, ms that the record is kept.
_END = """
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HSET', KEYS[1], 'ended', ARGV[3])
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
redis.call('SREM', KEYS[2], ARGV[1])
if redis.call('SCARD', KEYS[2]) == 0 then redis.call('ZREM', KEYS[3], ARGV[2]) end
"""

# KEYS: makers. ARGV: process, ms that a maker lives.
_RENEW = (
    _NOW
    + """
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
return 1
"""
)

# KEYS: makers, ids of this process. ARGV: process, ms that a maker lives, begin of
# the names of the other keys. One that dies before it has told of them leaves them
# to the next, as its own.
_ORPHANS = (
    _NOW
    + """
local dead = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 100)
local found = {}
for _, process in ipairs(dead) do
  if process ~= ARGV[1] then
    local theirs = ARGV[3] .. process
    for _, id in ipairs(redis.call('SMEMBERS', theirs)) do
      redis.call('SADD', KEYS[2], id)
      redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
      found[#found + 1] = id
    end
    redis.call('DEL', theirs)
    redis.call('ZREM', KEYS[1], process)
  end
end
return {redis.call('EXISTS', KEYS[1]), found}
"""
)


class RedisRegister:
    """See `app.register.Register`."""

    def __init__(self, url: str, process: str, *, prefix: str = "sse", timeout_seconds: float = 2.0) -> None:
        self._process = process
        self._run_prefix = f"{{{prefix}}}:run:"
        self._runs_prefix = f"{{{prefix}}}:runs:"
        self._makers_key = f"{{{prefix}}}:makers"
        self._client = redis_client.client(url, timeout_seconds=timeout_seconds, max_connections=_CONNECTIONS)
        self._turns = redis_client.Turns(_CONNECTIONS, timeout_seconds)
        self._live_ms = int(LIVE_SECONDS * 1000)
        self._start = self._client.register_script(_START)
        self._end = self._client.register_script(_END)
        self._renew = self._client.register_script(_RENEW)
        self._orphans = self._client.register_script(_ORPHANS)

    async def start(self, record: Record, keep_seconds: float) -> Record | None:
        fields: list[str | int] = ["kind", record.kind, "process", record.process, "fingerprint", record.fingerprint]
        if record.user is not None:
            fields += ["user", record.user]
        args = [record.id, self._process, self._live_ms, int(keep_seconds * 1000), *fields]
        answer = await self._told(self._start(keys=self._keys(record.id), args=args))
        return _record(record.id, dict(zip(answer[::2], answer[1::2], strict=True))) if answer else None

    async def get(self, id: str) -> Record | None:
        fields = await self._told(cast(Any, self._client).hgetall(self._run_prefix + id))
        return _record(id, fields) if fields else None

    async def end(self, record: Record, event_id: str, keep_seconds: float) -> None:
        args: list[str | int] = [record.id, self._process, event_id, int(keep_seconds * 1000)]
        await self._told(self._end(keys=self._keys(record.id), args=args))

    async def renew(self) -> bool:
        return bool(await self._told(self._renew(keys=[self._makers_key], args=[self._process, self._live_ms])))

    async def orphans(self) -> tuple[list[Record], bool]:
        makers, found = await self._told(
            self._orphans(
                keys=[self._makers_key, self._runs_prefix + self._process],
                args=[self._process, self._live_ms, self._runs_prefix],
            )
        )
        records = [await self.get(_text(id)) for id in found]
        return [record for record in records if record is not None], bool(makers)

    async def close(self) -> None:
        await redis_client.close(self._client)

    def _keys(self, id: str) -> list[str]:
        return [self._run_prefix + id, self._runs_prefix + self._process, self._makers_key]

    async def _told(self, answer: Any) -> Any:
        try:
            return await self._turns.run(answer)
        except ResponseError as error:
            raise LogUnavailable(str(error)) from error
        except (RedisError, OSError, TimeoutError) as error:
            raise LogUnavailable(f"{type(error).__name__}: {error}") from error


def _record(id: str, fields: dict[bytes, bytes]) -> Record:
    named = {_text(name): _text(value) for name, value in fields.items()}
    return Record(
        id,
        named.get("kind", ""),
        named.get("user"),
        named.get("process", ""),
        named.get("fingerprint", ""),
        named.get("ended", ""),
    )


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()
