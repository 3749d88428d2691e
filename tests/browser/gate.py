"""
The door between a browser without a driver and the stack under test.

Serves the probe page, hands it commands, takes its reports; everything else it
passes to nginx byte by byte, one connection for each request. So the page and
`/events` have one origin, and a test can see each request's Last-Event-ID, cut
a stream as a lost network does, and hold one half-way.
"""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PAGES = {
    "/gate/": ("probe.html", "text/html; charset=utf-8"),
    "/gate/probe.js": ("probe.js", "text/javascript; charset=utf-8"),
}

# Small, so that what a held stream leaves unread fills few kernel buffers and
# the server behind it really stops writing.
RECEIVE_BUFFER_BYTES = 16 * 1024

# How long the page's question for a command stays open, in seconds.
POLL_SECONDS = 20


@dataclass(eq=False)
class Stream:
    """One request for `/events` that passed the gate."""

    target: str
    last_event_id: str | None
    upstream: socket.socket
    downstream: asyncio.StreamWriter
    received_bytes: int = 0
    ended: bool = False


@dataclass(eq=False)
class Gate:
    """
    A server on a free port of this machine, in a thread of its own.

    Attributes:
        target: host and port that requests outside `/gate/` go to.
        streams: each request for `/events`, oldest first.
    """

    target: tuple[str, int] = ("127.0.0.1", 9)
    streams: list[Stream] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self._reports: list[dict[str, Any]] = []
        self._commands: list[dict[str, Any]] = []
        self._hold_after_bytes: int | None = None
        self._loop = asyncio.new_event_loop()
        self._released = asyncio.Event()
        self._commanded = asyncio.Event()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End every connection and the thread."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def command(self, **command: Any) -> int:
        """Have the page do something; returns the command's number."""

        def add() -> int:
            self._commands.append(command)
            command["number"] = len(self._commands)
            self._commanded.set()
            return command["number"]

        return self._call(add)

    def reports(self) -> list[dict[str, Any]]:
        """Everything the page said so far."""
        with self.changed:
            return list(self._reports)

    def hold_after(self, size: int) -> None:
        """Stop passing the next streams' bytes after *size* of each."""
        self._call(lambda: (self._released.clear(), setattr(self, "_hold_after_bytes", size)))

    def release(self) -> None:
        """Pass on what was held."""
        self._call(lambda: (setattr(self, "_hold_after_bytes", None), self._released.set()))

    def cut(self) -> None:
        """Break every open stream without an end, as a lost network does."""

        def abort() -> None:
            for stream in self.streams:
                if not stream.ended:
                    stream.downstream.transport.abort()
                    with contextlib.suppress(OSError):
                        stream.upstream.shutdown(socket.SHUT_RDWR)

        self._call(abort)

    def _call[T](self, do: Callable[[], T]) -> T:
        async def run() -> T:
            return do()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def _serve(self, started: threading.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main(started))

    async def _main(self, started: threading.Event) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            # A browser opens connections ahead of need: these end unused.
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            if path.startswith("/gate/"):
                await self._answer(path, head, reader, writer)
            else:
                await self._forward(path, head, reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, path: str, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        name = urlsplit(path).path
        content_type, body = "application/json", b"null"
        if name in PAGES:
            page, content_type = PAGES[name]
            body = (Path(__file__).parent / page).read_bytes()
        elif name == "/gate/next":
            body = json.dumps(await self._next_command(int(urlsplit(path).query))).encode()
        elif name == "/gate/report":
            body = await reader.readexactly(int(_header(head, "content-length") or "0"))
            with self.changed:
                self._reports.extend(json.loads(body))
                self.changed.notify_all()
            body = b"null"
        writer.write(
            b"HTTP/1.1 200 OK\r\nconnection: close\r\ncache-control: no-store\r\n"
            + f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await writer.drain()

    async def _next_command(self, after: int) -> dict[str, Any] | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                while len(self._commands) <= after:
                    self._commanded.clear()
                    await self._commanded.wait()
        return self._commands[after] if len(self._commands) > after else None

    async def _forward(
        self, path: str, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        upstream = socket.socket()
        upstream.setblocking(False)
        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        stream = Stream(path, _header(head, "last-event-id"), upstream, writer)
        if path.startswith("/events"):
            with self.changed:
                self.streams.append(stream)
                self.changed.notify_all()
        gone = asyncio.create_task(self._watch(reader, upstream))
        try:
            await loop.sock_connect(upstream, self.target)
            await loop.sock_sendall(upstream, _without_keep_alive(head))
            while chunk := await loop.sock_recv(upstream, RECEIVE_BUFFER_BYTES):
                stream.received_bytes += len(chunk)
                writer.write(chunk)
                await writer.drain()
                limit = self._hold_after_bytes
                if limit is not None and stream.received_bytes >= limit:
                    with self.changed:
                        self.changed.notify_all()
                    await self._released.wait()
        finally:
            gone.cancel()
            upstream.close()
            with self.changed:
                stream.ended = True
                self.changed.notify_all()

    async def _watch(self, reader: asyncio.StreamReader, upstream: socket.socket) -> None:
        """Pass the request's body on, and the news that the browser went away."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while chunk := await reader.read(RECEIVE_BUFFER_BYTES):
                await loop.sock_sendall(upstream, chunk)
        with contextlib.suppress(OSError):
            upstream.shutdown(socket.SHUT_RDWR)


def _header(head: bytes, name: str) -> str | None:
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name:
            return value.strip()
    return None


def _without_keep_alive(head: bytes) -> bytes:
    # The next request on a kept connection might be one for the gate itself.
    request, *headers = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    kept = [line for line in headers if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([request, *kept, b"Connection: close", b"", b""])
