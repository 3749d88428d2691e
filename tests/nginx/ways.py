"""
The ways to a proxy: plain HTTP/1.1, TLS with HTTP/1.1, TLS with HTTP/2.

Each is a raw client that reads a stream as its bytes come: lost buffering, a
head that waits, a cut in the middle are seen as they are.
"""

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events

from app.parser import Parser, ServerSentEvent

DEADLINE = 20.0
WAYS = ("plain", "tls", "h2")


@dataclass(eq=False)
class Answer:
    """
    One answer, as far as it has come.

    Attributes:
        ended: "clean" as the protocol says, "cut", or nothing while it is open.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    events: list[ServerSentEvent] = field(default_factory=list)
    ended: str = ""
    ended_at: float = 0.0
    close: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._parser = Parser()
        self._changed = asyncio.Event()

    def take(self, data: bytes) -> None:
        self.body += data
        self.events += self._parser.feed(data)
        self._changed.set()

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.headers = status, headers
        self._changed.set()

    def end(self, how: str) -> None:
        if not self.ended:
            self.ended, self.ended_at = how, asyncio.get_running_loop().time()
        self._changed.set()

    @property
    def data(self) -> list[str]:
        """Data of all events but the kit's own."""
        return [event.data for event in self.events if not event.event.startswith("stream.")]

    async def until(self, met: Callable[["Answer"], Any], seconds: float = DEADLINE) -> "Answer":
        """Return when *met* holds; fail after *seconds*."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not met(self) and not self.ended:
                    self._changed.clear()
                    await self._changed.wait()
        assert met(self), f"not within {seconds:g} s: {self.status} {self.headers} {bytes(self.body[-300:])!r} {self.ended}"
        return self

    async def whole(self) -> bytes:
        """Return the whole body of an answer that ends."""
        await self.until(lambda answer: answer.ended)
        assert self.ended == "clean", bytes(self.body)
        return bytes(self.body)


@functools.cache
def trusting(*protocols: str) -> ssl.SSLContext:
    """Return a client's context that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def _text(method: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = {"Host": "kit.test", **headers}
    if body or method == "POST":
        lines.setdefault("Content-Length", str(len(body)))
    return (f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode() + body


def _joined(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return headers by name; one that came twice has both values, as RFC 9110 reads it."""
    found: dict[str, str] = {}
    for name, value in headers:
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


async def _send1(
    port: int, method: str, path: str, headers: Mapping[str, str], body: bytes, tls: bool, source: str | None
) -> Answer:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=trusting("http/1.1") if tls else None, local_addr=(source, 0) if source else None
    )
    answer = Answer()
    writer.write(_text(method, path, headers, body))
    task = asyncio.create_task(_read1(reader, answer, method))

    def close() -> None:
        task.cancel()
        writer.transport.abort()

    answer.close = close
    return answer


async def _read1(reader: asyncio.StreamReader, answer: Answer, method: str) -> None:
    try:
        first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
        headers = _joined((line.partition(":")[0].lower(), line.partition(":")[2].strip()) for line in rest)
        answer.head(int(first.split(" ")[1]), headers)
        if headers.get("transfer-encoding") == "chunked":
            while size := int((await reader.readuntil(b"\r\n")).decode().strip(), 16):
                answer.take(await reader.readexactly(size))
                await reader.readexactly(2)
            await reader.readexactly(2)
        elif method != "HEAD" and answer.status not in (204, 304):
            answer.take(await reader.readexactly(int(headers["content-length"])))
        answer.end("clean")
    except (OSError, asyncio.IncompleteReadError):
        answer.end("cut")


class Http2:
    """One connection with many streams, as a browser has one to each site."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self._h2 = h2.connection.H2Connection(config)
        # After GOAWAY, open streams go on (RFC 9113, section 6.8); h2 would refuse to read them.
        states, inputs = h2.connection.ConnectionState, h2.connection.ConnectionInputs
        machine = self._h2.state_machine
        machine._transitions = machine._transitions | {
            (states.CLIENT_OPEN, inputs.RECV_GOAWAY): (None, states.CLIENT_OPEN)
        }
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(1 << 30)
        self.answers: dict[int, Answer] = {}
        self._flush()
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, port: int, source: str | None = None) -> "Http2":
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=trusting("h2"), local_addr=(source, 0) if source else None
        )
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
        return cls(reader, writer)

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        number = self._h2.get_next_available_stream_id()
        fields = [(":method", method), (":scheme", "https"), (":authority", "kit.test"), (":path", path)]
        fields += [(name.lower(), value) for name, value in headers.items()]
        self._h2.send_headers(number, fields, end_stream=not body)
        answer = self.answers[number] = Answer()
        answer.close = lambda: self._reset(number)
        rest = memoryview(body)
        while rest and (size := min(len(rest), self._h2.local_flow_control_window(number), 16_384)):
            self._h2.send_data(number, bytes(rest[:size]), end_stream=size == len(rest))
            rest = rest[size:]
        self._flush()
        return answer

    def close(self) -> None:
        self._task.cancel()
        self._writer.transport.abort()

    def _reset(self, number: int) -> None:
        if not self.answers[number].ended:
            with contextlib.suppress(Exception):
                self._h2.reset_stream(number)
                self._flush()

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(65_536):
                for event in self._h2.receive_data(data):
                    self._handle(event)
                self._flush()
        except (OSError, h2.exceptions.ProtocolError):
            pass
        finally:
            for answer in self.answers.values():
                answer.end("cut")

    def _handle(self, event: h2.events.Event) -> None:
        answer = self.answers.get(getattr(event, "stream_id", None) or 0)
        if answer is None:
            return
        match event:
            case h2.events.ResponseReceived():
                headers = _joined(event.headers)
                answer.head(int(headers.pop(":status")), headers)
            case h2.events.DataReceived():
                answer.take(event.data)
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.StreamEnded():
                answer.end("clean")
            case h2.events.StreamReset():
                answer.end("cut")


@dataclass
class Way:
    """
    One way to a proxy's port.

    Requests over h2 share a connection per source address, as a browser's do.
    """

    name: str
    port: int
    _connections: dict[str | None, Http2] = field(default_factory=dict)
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    _answers: list[Answer] = field(default_factory=list)

    async def send(
        self,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "GET",
        body: bytes = b"",
        source: str | None = None,
    ) -> Answer:
        """Send a request and return at once, before its head has come."""
        if self.name == "h2":
            async with self._opening:
                if source not in self._connections:
                    self._connections[source] = await Http2.open(self.port, source)
            connection = self._connections[source]
            return connection.send(method, path, headers or {}, body)
        answer = await _send1(self.port, method, path, headers or {}, body, self.name == "tls", source)
        self._answers.append(answer)
        return answer

    async def ask(self, path: str, headers: Mapping[str, str] | None = None, **options: Any) -> Answer:
        """Send a request and return with its head."""
        answer = await self.send(path, headers, **options)
        return await answer.until(lambda answer: answer.status)

    def close(self) -> None:
        for each in (*self._connections.values(), *self._answers):
            each.close()


@contextlib.asynccontextmanager
async def way(name: str, port: int) -> AsyncIterator[Way]:
    """Give a `Way`, and leave all its connections with the block."""
    each = Way(name, port)
    try:
        yield each
    finally:
        each.close()


def serves(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
