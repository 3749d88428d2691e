"""
The log in Redis 7 or Valkey: one Redis Stream.

Publishing is one `XADD`, so any service can publish (fields: `app.log.to_fields`).
Publishers never trim. All keys share one hash tag, so that a Cluster can hold them.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import Any, cast

import structlog
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from app import redis_client
from app.event import Entry
from app.log import (
    ORIGIN,
    Batch,
    IdempotencyConflict,
    LogState,
    LogUnavailable,
    Notice,
    Position,
    from_fields,
    from_notice_fields,
    to_fields,
    to_notice_fields,
)

# KEYS: log, epoch, idempotency key. ARGV: new epoch, fingerprint, seconds to
# remember (ms), whether replicas are waited for (0 or 1), number of events, then
# for each the number of its fields and the fields. One script, so that a batch
# is all or nothing, in one order, and a repeated publish is recognised in the
# same step that would double it.
# A repetition writes, where replicas are waited for: WAIT is about what its own
# connection wrote, and the first one may have been another.
_PUBLISH = """
local known = redis.call('GET', KEYS[3])
if known then
  if string.sub(known, 1, 32) ~= ARGV[2] then return {0} end
  if ARGV[4] == '1' then redis.call('PEXPIRE', KEYS[3], ARGV[3]) end
  return {1, string.sub(known, 33)}
end
redis.call('SET', KEYS[2], ARGV[1], 'NX')
local ids = {redis.call('GET', KEYS[2])}
local at = 6
for _ = 1, tonumber(ARGV[5]) do
  local count = tonumber(ARGV[at])
  ids[#ids + 1] = redis.call('XADD', KEYS[1], '*', unpack(ARGV, at + 1, at + count))
  at = at + 1 + count
end
local text = table.concat(ids, ' ')
redis.call('SET', KEYS[3], ARGV[2] .. text, 'PX', ARGV[3])
return {1, text}
"""

# KEYS: epoch. ARGV: expected ('' for none), new.
_RENEW = """
local now = redis.call('GET', KEYS[1])
if not now or now == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2])
  return ARGV[2]
end
return now
"""

# KEYS: log. ARGV: history in ms, most entries. By Redis's clock, which made the
# ids. The newest entry past the history stays: it is the trim boundary.
_TRIM = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local horizon = string.format('%.0f', math.max(0, now - tonumber(ARGV[1])))
local old = redis.call('XREVRANGE', KEYS[1], horizon, '-', 'COUNT', 1)
local gone = 0
if old[1] then gone = redis.call('XTRIM', KEYS[1], 'MINID', old[1][1]) end
return gone + redis.call('XTRIM', KEYS[1], 'MAXLEN', ARGV[2])
"""


# KEYS: log, epoch. ARGV: cursor. One instant, and one connection: a pipeline of
# the client library would take another one than the reader's. It also answers
# where memory is full, which a transaction does not, and leaves the first and
# the last entry's data where they are.
_STATE = """
local time = redis.call('TIME')
local now = string.format('%.0f', tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000))
local epoch = redis.call('GET', KEYS[2])
if redis.call('EXISTS', KEYS[1]) == 0 then return {epoch, now} end
local facts = {}
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for at = 1, #info, 2 do facts[info[at]] = info[at + 1] end
if not facts['entries-added'] then
  return redis.error_reply('ERR the log must be in Redis 7 or Valkey; this server does not count entries')
end
local found = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1], 'COUNT', 1)
local first = facts['first-entry']
return {
  epoch, now, facts['last-generated-id'], facts['entries-added'], facts['length'], #found, first and first[1]
}
"""


# KEYS: control log. ARGV: how long it keeps notices in ms, most of them, fields.
# Trimmed by who writes: nothing is written where nobody has anything to tell.
_NOTIFY = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local horizon = string.format('%.0f', math.max(0, now - tonumber(ARGV[1])))
redis.call('XADD', KEYS[1], 'MINID', '~', horizon, '*', unpack(ARGV, 3))
redis.call('XTRIM', KEYS[1], 'MAXLEN', '~', ARGV[2])
"""

# Commands of publishers that Redis is given at once; the others wait for their turn.
_CONNECTIONS = 64
# Of these, for what must not stand behind a crowd of publishes, each of which may
# wait a second for its replicas: notices end streams, and clients come with positions.
_OTHERS = 16
# A crowd that evicts itself writes thousands a second; this many are some 10 MB.
_MOST_NOTICES = 100_000


class RedisLog:
    """
    See `app.log.Log`. The control log is a second Redis Stream, read in the same `XREAD`.

    The reader has one connection of its own, without retries: after a
    connection was lost it must check the log before it reads on, so nothing
    may reconnect behind its back. Publishers share a pool.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "sse",
        history_seconds: float,
        max_events: int,
        timeout_seconds: float = 2.0,
        publish_timeout_seconds: float = 3.0,
        wait_replicas: int = 0,
        idempotency_seconds: float = 600,
        control_seconds: float = 600,
        max_topics: int = 50,
        max_event_bytes: int = 1_048_576,
        logger: structlog.typing.FilteringBoundLogger | None = None,
    ) -> None:
        self.log_key = f"{{{prefix}}}:log"
        self.epoch_key = f"{{{prefix}}}:epoch"
        self.control_key = f"{{{prefix}}}:control"
        self._control_name = self.control_key.encode()
        self.notices: deque[Notice] = deque()
        # The last notice that was read; None before the first look.
        self._control: Position | None = None
        # The epoch of the last read; another one means to look where the control log ends.
        self._control_epoch = ""
        self._idempotency_prefix = f"{{{prefix}}}:idempotency:"
        self._history_ms = int(history_seconds * 1000)
        self._max_events = max_events
        self._timeout = timeout_seconds
        self._publish_timeout = publish_timeout_seconds
        self._wait_replicas = wait_replicas
        self._idempotency_ms = int(idempotency_seconds * 1000)
        self._control_ms = int(control_seconds * 1000)
        self._own_key_ms = int(publish_timeout_seconds * 2000) + 1000
        self._max_topics = max_topics
        self._max_event_bytes = max_event_bytes
        self._logger = logger or structlog.get_logger()
        self._opened = False

        self._reader = redis_client.client(url, timeout_seconds=timeout_seconds, single_connection_client=True)
        self._publisher = redis_client.client(url, timeout_seconds=timeout_seconds, max_connections=_CONNECTIONS)
        self._publish_turns = redis_client.Turns(_CONNECTIONS - _OTHERS, timeout_seconds)
        self._turns = redis_client.Turns(_OTHERS, timeout_seconds)
        self._publish = self._publisher.register_script(_PUBLISH)
        self._notify = self._publisher.register_script(_NOTIFY)
        self._renew = self._reader.register_script(_RENEW)
        self._trim = self._reader.register_script(_TRIM)
        self._state = self._reader.register_script(_STATE)

    async def open(self) -> None:
        # A fresh connection for the reader: an old one may hold half a reply.
        # Over TLS even closing waits for an answer; it is closed all the same.
        await redis_client.close(self._reader)
        await _told(self._reader.ping())
        await self._check_policy()
        await self._find_control()

    async def publish(self, batch: Batch) -> list[str]:
        args: list[str | int] = [
            secrets.token_hex(4),
            batch.fingerprint,
            self._own_key_ms if batch.own_key else self._idempotency_ms,
            int(self._wait_replicas > 0),
            len(batch.drafts),
        ]
        for draft in batch.drafts:
            fields = to_fields(draft)
            args.append(len(fields))
            args += fields
        keys = [self.log_key, self.epoch_key, self._idempotency_prefix + batch.key]
        # The key makes a repeated attempt harmless, so an answer that was lost
        # is asked for again, as long as the caller can be expected to wait.
        deadline = asyncio.get_running_loop().time() + self._publish_timeout
        delay = 0.02
        why = "the log did not answer in time"
        while True:
            left = deadline - asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(left):
                    answer = await _told(self._publish_turns.run(self._append(keys, args, left)))
                break
            except (LogUnavailable, TimeoutError) as error:
                if isinstance(error.__cause__, ReadOnlyError):
                    # A master that has become a replica keeps its connections:
                    # find the new one, as the reader does.
                    await self._publisher.connection_pool.disconnect(inuse_connections=False)
                why = str(error) or why
                if asyncio.get_running_loop().time() + delay >= deadline:
                    raise LogUnavailable(why) from None
                await asyncio.sleep(delay)
                delay *= 2
        if answer[0] == 0:
            raise IdempotencyConflict(batch.key)
        epoch, *ids = answer[1].decode().split(" ")
        return [f"{epoch}:{id}" for id in ids]

    async def _append(self, keys: list[str], args: list[str | int], left_seconds: float) -> Any:
        """Run the script that publishes; where replicas are waited for, until they have it."""
        if not self._wait_replicas:
            return await self._publish(keys=keys, args=args)
        # One connection for both: WAIT is about what that wrote. Its answer must
        # come before the socket's timeout does.
        wait_ms = max(1, int(min(left_seconds, self._timeout) * 500))
        both = self._publisher.pipeline(transaction=False)
        both.execute_command("EVALSHA", self._publish.sha, len(keys), *keys, *args)
        both.execute_command("WAIT", self._wait_replicas, wait_ms)
        answer, reached = await both.execute(raise_on_error=False)
        if isinstance(answer, NoScriptError):
            await self._publisher.script_load(_PUBLISH)
        for each in (answer, reached):
            if isinstance(each, Exception):
                raise each
        if reached < self._wait_replicas:
            raise LogUnavailable(
                f"replicas that have the events must be {self._wait_replicas} (SSE_PUBLISH_WAIT_REPLICAS), got {reached}"
            )
        return answer

    async def state(self, cursor: Position) -> LogState:
        epoch, now_ms, *facts = await _told(self._state(keys=[self.log_key, self.epoch_key], args=[_text(cursor)]))
        name = _str(epoch) if epoch is not None else None
        if not facts:
            return LogState(name, None, ORIGIN, 0, 0, False, int(now_ms))
        last, added, length, found, first = facts
        return LogState(
            epoch=name,
            first=_position(first) if first else None,
            last=_position(last),
            added=added,
            length=length,
            has_cursor=bool(found),
            now_ms=int(now_ms),
        )

    async def read(self, epoch: str, after: Position, count: int, block_seconds: float) -> list[Entry]:
        if epoch != self._control_epoch:
            await self._find_control()
            self._control_epoch = epoch
        command: list[str | int] = ["XREAD", "COUNT", count]
        if block_seconds > 0:
            # Shorter than the socket's timeout, so that an unanswered read is a dead
            # Redis. An idle one wakes waiting clients only ten times a second. As
            # shipped it reaches to the next check, so that no second one is asked.
            block = min(block_seconds, max(self._timeout / 2 - 0.1, self._timeout - 1))
            command += ["BLOCK", max(1, int(block * 1000))]
        control = self._control or ORIGIN
        command += ["STREAMS", self.log_key, self.control_key, _text(after), _text(control)]
        answer = await _told(self._ask(command))
        entries: list[Entry] = []
        # RESP3 (`?protocol=3`) has a map here.
        found = answer.items() if isinstance(answer, dict) else answer or ()
        for key, rows in found:
            if key == self._control_name:
                self._take_notices(rows)
            else:
                entries = [
                    from_fields(epoch, _position(id), _pairs(fields), self._max_topics, self._max_event_bytes)
                    for id, fields in rows
                ]
        return entries

    async def notify(self, notice: Notice) -> None:
        args: list[str | int] = [self._control_ms, _MOST_NOTICES, *to_notice_fields(notice)]
        await _told(self._turns.run(self._notify(keys=[self.control_key], args=args)))

    async def _ask(self, command: Sequence[str | int]) -> Any:
        """
        Have the reader's connection carry out *command*, without the client around it.

        Half the steps: on a cold cache that is a fifth of what one event costs
        besides its deliveries.
        """
        client: Any = self._reader
        if client.connection is None:
            await client.initialize()
        await client.connection.send_command(*command)
        return await client.connection.read_response()

    async def renew_epoch(self, expected: str | None) -> str:
        answer = await _told(self._renew(keys=[self.epoch_key], args=[expected or "", secrets.token_hex(4)]))
        return cast(bytes, answer).decode()

    async def has(self, position: Position) -> bool:
        command = cast(Any, self._publisher).execute_command("XRANGE", self.log_key, _text(position), _text(position))
        return bool(await _told(self._turns.run(command)))

    async def trim(self) -> None:
        try:
            await _told(self._trim(keys=[self.log_key], args=[self._history_ms, self._max_events]))
        except LogUnavailable as error:
            # Reading goes on where only writing is refused for lack of room or
            # replicas; a read-only server is the wrong one and must be left.
            if not str(error).startswith(("OOM", "NOREPLICAS", "MISCONF")):
                raise
            self._logger.warning("trim_refused", error=str(error))

    async def ping(self) -> bool:
        try:
            await _told(self._turns.run(cast(Any, self._publisher).execute_command("PING")))
        except LogUnavailable:
            return False
        return True

    async def close(self) -> None:
        await redis_client.close(self._reader)
        await redis_client.close(self._publisher)

    async def _find_control(self) -> None:
        """
        Begin at the control log's end; afterwards go back only where the log itself did.

        After FLUSHALL or a failover to a replica whose clock is behind, new
        notices can have ids before the last one that was read.
        """
        rows = await _told(cast(Any, self._reader).execute_command("XREVRANGE", self.control_key, "+", "-", "COUNT", 1))
        last = _position(rows[0][0]) if rows else ORIGIN
        if self._control is None or last < self._control:
            self._control = last

    def _take_notices(self, rows: Any) -> None:
        for id, fields in rows:
            self._control = _position(id)
            notice = from_notice_fields(_pairs(fields))
            if notice is not None:
                self.notices.append(notice)

    async def _check_policy(self) -> None:
        """Refuse a Redis that may evict the log to make room."""
        try:
            facts = await _told(self._reader.config_get("maxmemory*"))
        except LogUnavailable as error:
            if not self._opened:
                self._logger.warning(
                    "maxmemory_policy_unknown",
                    error=str(error),
                    cure="Make sure yourself that maxmemory-policy is noeviction.",
                )
            self._opened = True
            return
        self._opened = True
        named = {_str(key): _str(value) for key, value in facts.items()}
        policy = named.get("maxmemory-policy", "noeviction")
        if policy != "noeviction" and named.get("maxmemory", "0") != "0":
            raise LogUnavailable(
                f"maxmemory-policy must be noeviction, got {policy!r}. "
                "Redis would throw the log away to make room; set it and this process goes on."
            )


async def _told(answer: Awaitable[Any] | Any) -> Any:
    """Await *answer*; every way in which Redis is away becomes LogUnavailable."""
    try:
        return await answer
    except ResponseError as error:
        raise LogUnavailable(str(error)) from error
    except (RedisError, OSError, TimeoutError) as error:
        raise LogUnavailable(f"{type(error).__name__}: {error}") from error


def _text(position: Position) -> str:
    return f"{position.ms}-{position.seq}"


def _position(id: bytes | str) -> Position:
    ms, _, seq = (id.decode() if isinstance(id, bytes) else id).partition("-")
    return Position(int(ms), int(seq))


def _pairs(fields: list[bytes]) -> dict[bytes, bytes]:
    flat = iter(fields)
    return dict(zip(flat, flat, strict=True))


def _str(text: bytes | str) -> str:
    return text if isinstance(text, str) else text.decode()
