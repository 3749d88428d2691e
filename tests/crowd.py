"""
Hundreds of readers in one event loop, each of which may stop reading.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Self

from app.parser import Parser, ServerSentEvent
from tests.wire import PATIENCE_SECONDS, Chunks, request


async def becomes(met: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Return when *met* is true; fail after *seconds*."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        await asyncio.sleep(0.01)


@dataclass(eq=False)
class Member(asyncio.Protocol):
    """
    One stream.

    Attributes:
        events: all events with the time of their arrival.
        bytes: body read so far; with `parse` off nothing else is known of it.
        ended_at: when the connection ended; 0 while it is open.
        clean: it ended as HTTP says, and was not cut.
    """

    parse: bool = True
    status: int = 0
    events: list[tuple[float, ServerSentEvent]] = field(default_factory=list)
    bytes: int = 0
    ended_at: float = 0.0
    clean: bool = False
    tail: bytes = b""

    def __post_init__(self) -> None:
        self.parser = Parser()
        self._chunks = Chunks()
        self._head = b""

    @classmethod
    async def open(
        cls, port: int, path: str, headers: dict[str, str] | None = None, *, parse: bool = True, receive_buffer: int = 0
    ) -> Self:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", port))
        _, member = await loop.create_connection(lambda: cls(parse), sock=sock)
        member.transport.write(request(path, {"Accept": "text/event-stream"} | (headers or {})))
        return member

    @property
    def data(self) -> list[str]:
        """Data of all events but the kit's own."""
        return [event.data for _, event in self.events if not event.event.startswith("stream.")]

    @property
    def names(self) -> list[str]:
        return [event.event for _, event in self.events]

    def stall(self) -> None:
        """Read nothing more."""
        self.transport.pause_reading()

    def close(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.status:
            head, mark, data = (self._head + data).partition(b"\r\n\r\n")
            if not mark:
                self._head = head
                return
            self.status = int(head.split()[1])
        self.bytes += len(data)
        self.tail = (self.tail + data)[-200:]
        if self.parse:
            now = time.monotonic()
            for text in self._chunks.feed(data):
                self.events += [(now, event) for event in self.parser.feed(text)]
            self.clean = self._chunks.ended
        else:
            self.clean = self.tail.endswith(b"\r\n0\r\n\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended_at = time.monotonic()


@contextlib.asynccontextmanager
async def crowd(count: int, port: int, path: str, **options: Any) -> AsyncIterator[list[Member]]:
    """Give *count* members that have all read something; they leave with the block."""
    members: list[Member] = []
    try:
        for _ in range(count):
            members.append(await Member.open(port, path, **options))  # noqa: PERF401
        await becomes(lambda: all(member.bytes for member in members), "all streams open")
        yield members
    finally:
        for member in members:
            member.close()
