"""
Make clients of Redis: explicit timeouts, no retries of their own, Sentinel.

The library's defaults differ by constructor (10 retries, or none) and would
repeat commands behind the kit's back. Whoever uses a client here decides what
to repeat, and when.
"""

import asyncio
import re
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

import redis.asyncio as redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

# scheme, user and password, Sentinels, master's name, database, options
_SENTINEL_URL = re.compile(
    r"(rediss?)\+sentinel://(?:([^@/?]*)@)?([^@/?,]+(?:,[^@/?,]+)*)/([^/?]+)(?:/(\d+))?/?(?:\?(.*))?"
)
_SENTINEL_PORT = 26_379


@dataclass(frozen=True, slots=True)
class SentinelAddress:
    """
    Who knows the master, and what it is called.

    Attributes:
        master_url: how to connect to it, with a placeholder for its address.
    """

    sentinels: tuple[tuple[str, int], ...]
    master: str
    master_url: str
    username: str | None
    password: str | None


def client(url: str, *, timeout_seconds: float, **options: Any) -> "redis.Redis":
    """
    Return a client of *url*: a Redis, or the master that Sentinels name.

    Connecting and every answer may take *timeout_seconds* each. Nothing is
    repeated. The master is looked up at every new connection.
    """
    patience: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
    }
    address = sentinel_address(url)
    if address is None:
        return redis.Redis.from_url(url, **patience, **options)
    known: dict[str, Any] = dict(parse_url(address.master_url))
    for name in ("host", "port"):
        known.pop(name, None)
    secure = known.pop("connection_class", None) is not None
    # Sentinels are asked over TLS where the master is.
    tls = {name: value for name, value in known.items() if name.startswith("ssl")} | ({"ssl": True} if secure else {})
    manager = Sentinel(  # type: ignore[no-untyped-call]
        address.sentinels,
        sentinel_kwargs=patience | tls | {"username": address.username, "password": address.password},
    )
    single = options.pop("single_connection_client", False)
    pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
        address.master,
        manager,
        connection_class=SentinelManagedSSLConnection if secure else SentinelManagedConnection,
        **known,
        **patience,
        **options,
    )
    return redis.Redis(connection_pool=pool, single_connection_client=single)


class Turns:
    """
    So many commands at once, and the others after them.

    A pool does not wait: one command more than it has connections fails at once,
    as if Redis were away.

    Args:
        most: the connections of the pool.
        seconds: longest wait for one; then TimeoutError.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._room = asyncio.Semaphore(most)
        self._seconds = seconds

    async def run(self, command: Coroutine[Any, Any, Any]) -> Any:
        """Return what *command* returns, when it is its turn."""
        try:
            if self._room.locked():
                async with asyncio.timeout(self._seconds):
                    await self._room.acquire()
            else:
                await self._room.acquire()
        except BaseException:
            command.close()
            raise
        try:
            return await command
        finally:
            self._room.release()


async def close(client: "redis.Redis") -> None:
    """End all connections of *client*, those to Sentinels too. One that was away leaves nothing to close."""
    manager = getattr(client.connection_pool, "sentinel_manager", None)
    for each in (client, *(manager.sentinels if manager else ())):
        with suppress(RedisError, OSError):
            await each.aclose(close_connection_pool=True)


def sentinel_address(url: str) -> SentinelAddress | None:
    """
    Read ``redis+sentinel://user:password@host:26379,host/master/0``; None where *url* is no such.

    ``sentinel_username`` and ``sentinel_password`` in the query are for the
    Sentinels, user and password in front for the master.
    """
    match = _SENTINEL_URL.fullmatch(url)
    if match is None:
        return None
    scheme, user, hosts, master, database, query = match.groups(default="")
    rest = parse_qsl(query, keep_blank_values=True)
    own = dict(rest)
    options = urlencode([(name, value) for name, value in rest if not name.startswith("sentinel_")])
    return SentinelAddress(
        sentinels=tuple(map(_host, hosts.split(","))),
        master=unquote(master),
        master_url=f"{scheme}://{user + '@' if user else ''}master/{database or 0}{'?' + options if options else ''}",
        username=own.get("sentinel_username"),
        password=own.get("sentinel_password"),
    )


def _host(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[(.+)\](?::(\d+))?|([^:]+)(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"a Sentinel's address must be host or host:port, got {text!r}")
    v6, v6_port, name, port = match.groups()
    return v6 or name, int(v6_port or port or _SENTINEL_PORT)
