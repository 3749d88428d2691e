"""
An HTTP server that says exactly the bytes a test wrote for it, one answer per request.

No framework: a client must also cope with what no correct server would send.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

TEST_DEADLINE_SECONDS = 45


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What a publish carries, one event or several."""
        return self.json if isinstance(self.json, list) else [self.json]


@dataclass
class Exchange:
    """One request, and where its answer goes."""

    request: Request
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


# Returns whether the connection may serve another request.
type Answer = Callable[[Exchange], Awaitable[bool]]


@dataclass
class Server:
    """*answers* are given in turn, the last one again and again."""

    url: str
    answers: list[Answer] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    # Set when a client ended its connection.
    left: asyncio.Event = field(default_factory=asyncio.Event)
    gone: int = 0  # how many connections have ended

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await read_request(reader):
                self.requests.append(request)
                at = min(len(self.requests), len(self.answers)) - 1
                if not await self.answers[at](Exchange(request, reader, writer)):
                    break
        except ConnectionError:
            pass
        finally:
            self.left.set()
            self.gone += 1
            writer.close()


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head[:-4].split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    url = urlsplit(target)
    return Request(method, url.path, parse_qs(url.query), headers, body)


@asynccontextmanager
async def serving(
    *answers: Answer, port: int = 0, seconds: float = TEST_DEADLINE_SECONDS
) -> AsyncGenerator[Server]:
    """Serve *answers* on a free port; a test that hangs fails."""
    server = Server("", list(answers))
    listener = await asyncio.start_server(server.serve, "127.0.0.1", port)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        async with asyncio.timeout(seconds):
            yield server
    finally:
        listener.close()
        listener.close_clients()


# --- Answers ---


def stream(*chunks: bytes | float, then: str = "end", head: str = "", kind: str = "text/event-stream") -> Answer:
    """
    A text/event-stream. A number among *chunks* is a pause in seconds.

    *then*: ``end`` is a clean end, ``cut`` one in the middle, ``hold`` stays silent.
    """

    async def answer(exchange: Exchange) -> bool:
        writer = exchange.writer
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: " + kind.encode() + b"; charset=utf-8\r\n"
            b"Connection: close\r\nTransfer-Encoding: chunked\r\n" + head.encode() + b"\r\n"
        )
        for chunk in chunks:
            if isinstance(chunk, float):
                await writer.drain()
                await asyncio.sleep(chunk)
            else:
                writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        if then == "end":
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        if then == "hold":
            await silent(exchange)
        return False

    return answer


def status(code: int, *headers: str, body: object = None, kind: str = "application/json") -> Answer:
    """A complete answer with a JSON body."""

    async def answer(exchange: Exchange) -> bool:
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {code} Status {code}", *headers, f"Content-Length: {len(content)}"]
        lines += [f"Content-Type: {kind}"] if body is not None else []
        exchange.writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        await exchange.writer.drain()
        return True

    return answer


async def dropped(exchange: Exchange) -> bool:
    """The request was read, and its answer is lost."""
    exchange.writer.transport.abort()
    return False


async def silent(exchange: Exchange) -> bool:
    """No byte until the client leaves."""
    await exchange.reader.read()
    return False


async def accepted(exchange: Exchange) -> bool:
    """The answer to a publish: one id for each event."""
    count = len(exchange.request.events)
    return await status(201, body={"ids": [f"e:{number}" for number in range(1, count + 1)]})(exchange)
