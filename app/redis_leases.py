"""
The leases of all processes in Redis, by one Lua script for each step.

Three keys beside the log, all under its hash tag:

    {sse}:streams:USER  hash: FORMAT/PROCESS/STREAM -> when it was opened (ms), topics
    {sse}:leaving:USER  hash: member that has to leave -> who waits for its place, or nothing
    {sse}:processes     sorted set: process -> until when it counts as alive (ms of Redis's clock)

A process shows that it lives by one entry for all of its leases. Members of
processes that are dead are dropped by the next script that finds no place.
"""

from collections.abc import Awaitable, Sequence
from itertools import groupby
from typing import Any, cast

from redis.exceptions import NoScriptError, RedisError, ResponseError

from app import redis_client
from app.leases import BATCH, Ask, Held, Lease, LeasesUnavailable, Verdict

# Longest list of topics that a lease keeps, in bytes: it is for people to look at.
_TOPICS_BYTES = 500
_CONNECTIONS = 4

# KEYS of each script: processes, control log, then streams and leaving of each user.
# ARGV of each: limit, how long the keys live (ms), how long notices do (ms), then its own.
_COMMON = """
local processes, control, streams, leaving = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local limit = tonumber(ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local now_text = string.format('%.0f', now)

local known = {}
local function alive(process)
  if known[process] == nil then
    local until_ms = redis.call('ZSCORE', processes, process)
    known[process] = until_ms ~= false and tonumber(until_ms) > now
  end
  return known[process]
end

local function tell(...)
  local horizon = string.format('%.0f', math.max(0, now - tonumber(ARGV[3])))
  redis.call('XADD', control, 'MINID', '~', horizon, '*', 'v', '1', ...)
end

local function keep(key)
  if redis.call('PTTL', key) < tonumber(ARGV[2]) then redis.call('PEXPIRE', key, ARGV[2]) end
end

local function place(member, value)
  redis.call('HSET', streams, member, value)
  keep(streams)
end

-- Its place goes to who waits for it, in the same step: nobody comes between.
local function drop(member)
  if redis.call('HDEL', streams, member) == 0 then return end
  local heir = redis.call('HGET', leaving, member)
  if not heir then return end
  redis.call('HDEL', leaving, member)
  if heir ~= '' then
    local space = string.find(heir, ' ', 1, true)
    local name = string.sub(heir, 1, space - 1)
    place(name, now_text .. string.sub(heir, space))
    tell('kind', 'granted', 'member', name)
  end
end

local function drop_dead()
  for _, member in ipairs(redis.call('HKEYS', streams)) do
    local process = string.match(member, '^[^/]*/([^/]*)/')
    if process and not alive(process) then drop(member) end
  end
end

local function full()
  if limit == 0 or redis.call('HLEN', streams) < limit then return false end
  drop_dead()
  return redis.call('HLEN', streams) >= limit
end
"""

# What has gone and what is asked for, of many users in one script: a command of
# its own for each would cost this process several times as much.
# ARGV from 4: process, how many have gone, their members, then for each who
# asks: member, topics, '1' if another may have to leave, user, the member whose
# place it is to have (or nothing). Returns a verdict for each who asks.
_WORK = (
    _COMMON
    + """
local process, gone = ARGV[4], tonumber(ARGV[5])

local function give_back(member)
  local waits = redis.call('HGETALL', leaving)
  for at = 1, #waits, 2 do
    if string.sub(waits[at + 1], 1, #member + 1) == member .. ' ' then redis.call('HSET', leaving, waits[at], '') end
  end
  drop(member)
end

local function take(member, topics, evict, user, instead)
  if not alive(process) then return 'lapsed' end
  if not full() then
    place(member, now_text .. ' ' .. topics)
    return 'granted'
  end
  local oldest, opened
  local all = redis.call('HGETALL', streams)
  if redis.call('HEXISTS', streams, instead) == 1 then
    all = {instead, redis.call('HGET', streams, instead)}
  elseif evict ~= '1' then
    return 'full'
  end
  for at = 1, #all, 2 do
    local heir = redis.call('HGET', leaving, all[at])
    -- One that was asked already, for somebody who gave up, goes first.
    local since = heir == '' and -1 or tonumber(string.match(all[at + 1], '^%d+')) or 0
    if (not heir or heir == '') and (not opened or since < opened) then oldest, opened = all[at], since end
  end
  if not oldest then return 'full' end
  redis.call('HSET', leaving, oldest, member .. ' ' .. topics)
  keep(leaving)
  tell('kind', 'evict', 'user', user, 'member', oldest)
  return 'waiting'
end

local verdicts = {}
local arg = 6
for key = 3, #KEYS, 2 do
  streams, leaving = KEYS[key], KEYS[key + 1]
  if gone > 0 then
    gone = gone - 1
    give_back(ARGV[arg])
    arg = arg + 1
  else
    verdicts[#verdicts + 1] = take(unpack(ARGV, arg, arg + 4))
    arg = arg + 5
  end
end
return verdicts
"""
)

# ARGV from 4: member, opened, topics, and so on. Returns the members without a place.
_RESTORE = (
    _COMMON
    + """
local over = {}
for at = 4, #ARGV, 3 do
  if redis.call('HEXISTS', streams, ARGV[at]) == 0 then
    if full() then
      over[#over + 1] = ARGV[at]
    else
      place(ARGV[at], ARGV[at + 1] .. ' ' .. ARGV[at + 2])
    end
  end
end
return over
"""
)

_HELD = (
    _COMMON
    + """
drop_dead()
return {now_text, redis.call('HGETALL', streams), redis.call('HKEYS', leaving)}
"""
)

# ARGV from 4: user.
_REVOKE = (
    _COMMON
    + """
drop_dead()
tell('kind', 'revoke', 'user', ARGV[4])
return redis.call('HLEN', streams)
"""
)

# KEYS: processes. ARGV: process, how long it lives (ms), how long the key does (ms).
_RENEW = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local until_ms = redis.call('ZSCORE', KEYS[1], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
redis.call('ZADD', KEYS[1], string.format('%.0f', now + tonumber(ARGV[2])), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return (until_ms and tonumber(until_ms) > now) and 1 or 0
"""


class RedisLeases:
    """See `app.leases.Store`. Used by one task, and by administrators."""

    def __init__(
        self,
        url: str,
        process: str,
        *,
        prefix: str = "sse",
        limit: int,
        lease_seconds: float,
        max_age_seconds: float,
        timeout_seconds: float = 2.0,
    ) -> None:
        self._tag = f"{{{prefix}}}:"
        self._process = process
        self._lease_ms = int(lease_seconds * 1000)
        # No stream is older; so nothing outlives a crowd of processes that died.
        keep_ms = int((max_age_seconds + lease_seconds) * 1000) + 60_000
        self._args: list[str | int] = [limit, keep_ms, keep_ms]
        self._redis = redis_client.client(url, timeout_seconds=timeout_seconds, max_connections=_CONNECTIONS)
        # One is always left for the task: without it this process would count alone.
        self._turns = redis_client.Turns(_CONNECTIONS - 1, timeout_seconds)
        self._scripts = {
            text: self._redis.register_script(text) for text in (_WORK, _RESTORE, _HELD, _REVOKE, _RENEW)
        }

    async def work(self, gone: Sequence[Lease], asks: Sequence[Ask]) -> list[Verdict]:
        keys = self._keys(*(lease.user for lease in gone), *(ask.lease.user for ask in asks))
        args: list[str | int] = [*self._args, self._process, len(gone), *(lease.member for lease in gone)]
        for lease, evict, instead in asks:
            args += (lease.member, _topics(lease), int(evict), lease.user, instead)
        [verdicts] = await self._run([(_WORK, keys, args)])
        return [cast(Verdict, verdict.decode()) for verdict in verdicts]

    async def renew(self) -> bool:
        keys = [self._tag + "processes"]
        [alive] = await self._run([(_RENEW, keys, [self._process, self._lease_ms, int(self._args[1])])])
        return bool(alive)

    async def restore(self, leases: Sequence[Lease]) -> list[Lease]:
        over: list[Lease] = []
        users = [list(group) for _, group in groupby(sorted(leases, key=_user), key=_user)]
        for start in range(0, len(users), BATCH):
            some = users[start : start + BATCH]
            answers = await self._run(
                [
                    self._call(
                        _RESTORE,
                        group[0].user,
                        *[word for lease in group for word in (lease.member, lease.opened_ms, _topics(lease))],
                    )
                    for group in some
                ]
            )
            for group, answer in zip(some, answers, strict=True):
                names = {name.decode() for name in answer}
                over += [lease for lease in group if lease.member in names]
        return over

    async def held(self, user: str) -> list[Held]:
        [(now, streams, leaving)] = await _told(self._turns.run(self._run([self._call(_HELD, user)])))
        found = []
        for member, value in zip(streams[::2], streams[1::2], strict=True):
            _, process, stream = member.decode().split("/", 2)
            opened, *topics = value.decode().split(" ")
            seconds = max(0, int(now) - int(opened)) / 1000
            found.append(Held(stream, process, seconds, tuple(topics), member in leaving))
        return sorted(found, key=lambda held: -held.seconds)

    async def revoke(self, user: str) -> int:
        [count] = await _told(self._turns.run(self._run([self._call(_REVOKE, user, user)])))
        return int(count)

    async def leave(self) -> None:
        await _told(self._redis.zrem(self._tag + "processes", self._process))

    async def close(self) -> None:
        await redis_client.close(self._redis)

    def _call(self, script: str, user: str, *args: str | int) -> tuple[str, list[str], list[str | int]]:
        return script, self._keys(user), [*self._args, *args]

    def _keys(self, *users: str) -> list[str]:
        tag = self._tag
        keys = [tag + "processes", tag + "control"]
        for user in users:
            keys += (f"{tag}streams:{user}", f"{tag}leaving:{user}")
        return keys

    async def _run(self, calls: Sequence[tuple[str, list[str], list[str | int]]]) -> list[Any]:
        """Run *calls* in one round trip; a server that forgot the scripts gets them again."""
        answers = await self._ask(calls)
        forgotten = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if forgotten:
            for script in {calls[at][0] for at in forgotten}:
                await _told(self._redis.script_load(script))
            for at, answer in zip(forgotten, await self._ask([calls[at] for at in forgotten]), strict=True):
                answers[at] = answer
        for answer in answers:
            if isinstance(answer, Exception):
                # A master that has become a replica keeps its connections: find the new one.
                await self._redis.connection_pool.disconnect(inuse_connections=False)
                raise LeasesUnavailable(f"{type(answer).__name__}: {answer}")
        return answers

    async def _ask(self, calls: Sequence[tuple[str, list[str], list[str | int]]]) -> list[Any]:
        if len(calls) == 1:
            [(script, keys, args)] = calls
            try:
                return [await _told(self._redis.evalsha(self._scripts[script].sha, len(keys), *keys, *args))]
            except LeasesUnavailable as error:
                if isinstance(error.__cause__, ResponseError):
                    return [error.__cause__]  # as the pipeline has it
                raise
        batch = self._redis.pipeline(transaction=False)
        for script, keys, args in calls:
            batch.execute_command("EVALSHA", self._scripts[script].sha, len(keys), *keys, *args)
        return await _told(batch.execute(raise_on_error=False))  # type: ignore[no-any-return]


async def _told(answer: Awaitable[Any] | Any) -> Any:
    """Await *answer*; every way in which Redis is away becomes LeasesUnavailable."""
    try:
        return await answer
    except (RedisError, OSError, TimeoutError) as error:
        raise LeasesUnavailable(f"{type(error).__name__}: {error}") from error


def _topics(lease: Lease) -> str:
    text = " ".join(lease.topics)
    return text if len(text) <= _TOPICS_BYTES else text[:_TOPICS_BYTES].rpartition(" ")[0] + " …"


def _user(lease: Lease) -> str:
    return lease.user
