"""
Real processes for tests, and raw clients that see every byte they send.

Processes come from `app.stack` and die with the tests. Clients speak HTTP/1.1
over plain sockets and read streams with `app.parser`: no client library repairs
or hides what the server does. Nothing waits a fixed time; everything waits for
a condition, with a deadline.
"""

import asyncio
import atexit
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import redis as sync_redis

from app.parser import Parser, ServerSentEvent
from app.stack import App, Redis

# Longest wait for anything; reached only when a promise is broken.
DEADLINE = 20.0

LOG, EPOCH = "{sse}:log", "{sse}:epoch"

# The ladder scaled down: what the kit does in minutes happens in fractions of a second.
SCALED = {
    "SSE_LOG_FORMAT": "json",
    "SSE_HEARTBEAT_SECONDS": "0.2",
    "SSE_HISTORY_SECONDS": "120",
    "SSE_MAX_AGE_SECONDS": "120",
    "SSE_REDIS_TIMEOUT_SECONDS": "2",
    "SSE_PUBLISH_TIMEOUT_SECONDS": "3",
    "SSE_DRAIN_SECONDS": "0.2",
    "SSE_DRAIN_LEAD_SECONDS": "0",
    "SSE_RETRY_MS": "20",
}


def eventually(condition: Callable[[], Any], what: str = "", seconds: float = DEADLINE) -> Any:
    """Return the first true result of *condition*; fail after *seconds*."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what or condition} did not come true in {seconds:g} s"
        time.sleep(0.02)


async def becomes(condition: Callable[[], Awaitable[Any]], what: str = "", seconds: float = DEADLINE) -> Any:
    """Return the first true result of the coroutine function *condition*; fail after *seconds*."""
    deadline = time.monotonic() + seconds
    while True:
        result = await condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what or condition} did not come true in {seconds:g} s"
        await asyncio.sleep(0.02)


async def run(*command: str) -> str:
    """Run *command* to its end and return what it wrote; fail if it failed."""
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=STDOUT)
    output = (await process.communicate())[0].decode(errors="replace")
    assert process.returncode == 0, output
    return output


# --- Processes


class Site:
    """Redis servers, application processes and proxies in one folder of their own."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="sse-live-"))
        self._closing: list[Callable[[], None]] = []
        self._numbers = itertools.count(1)

    def redis(self, *arguments: str, start: bool = True) -> Redis:
        """Return a Redis with persistence; *start* it and wait until it answers."""
        server = Redis(self.directory, *arguments, name=f"redis-{next(self._numbers)}")
        self._closing.append(server.close)
        if start:
            server.start()
            server.wait_ready()
        return server

    def app(self, log: "Redis | Proxy | str", *, ready: bool = True, **settings: object) -> App:
        """Return a started `python -m app`; `heartbeat_seconds=1` sets SSE_HEARTBEAT_SECONDS."""
        env = {f"SSE_{name.upper()}": str(value) for name, value in settings.items()}
        url = log if isinstance(log, str) else log.url
        app = App(f"app-{next(self._numbers)}", self.directory, SCALED | {"SSE_REDIS_URL": url} | env)
        self._closing.append(app.close)
        app.start()
        if ready:
            app.wait_ready()
        return app

    @staticmethod
    def listens(app: App) -> bool:
        """Tell whether *app* takes connections, ready or not."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", app.port), 1):
            return True
        return False

    def proxy(self, target: Redis) -> "Proxy":
        """Return a TCP proxy in front of *target*."""
        proxy = Proxy(target.port)
        self._closing.append(proxy.close)
        return proxy

    def close(self) -> None:
        """End everything, the newest first."""
        while self._closing:
            self._closing.pop()()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass
class Pair:
    """Two processes on one log, each behind a proxy of its own."""

    site: Site
    server: Redis
    proxies: "tuple[Proxy, Proxy]"
    a: App
    b: App

    async def gaps(self) -> tuple[float, float]:
        """Return how many losses each process has announced."""
        return (await metrics(self.a))["sse_log_gap_total"], (await metrics(self.b))["sse_log_gap_total"]

    async def connected(self) -> None:
        """Wait until both processes reach the log."""
        for app in (self.a, self.b):
            await becomes(lambda app=app: _connected(app), f"{app.name} connected")

    def replica(self) -> Redis:
        """Return a replica of the server that has received everything so far."""
        with connect(self.server) as old:
            # A master waits five seconds for more replicas before it sends anything.
            old.config_set("repl-diskless-sync-delay", 0)
        replica = self.site.redis("--replicaof", "127.0.0.1", str(self.server.port))
        with connect(self.server) as old, connect(replica) as new:
            wanted = old.xinfo_stream(LOG)["last-generated-id"]
            eventually(lambda: new.exists(LOG) and new.xinfo_stream(LOG)["last-generated-id"] == wanted)
            assert old.get(EPOCH) == new.get(EPOCH)
        # Restarted later, it is still the master that it was promoted to.
        replica.arguments.clear()
        return replica

    def turn_to(self, server: Redis, *, cut: bool = True) -> None:
        """Let both processes find *server* where the old one was; *cut* their connections to that one."""
        self.server = server
        for proxy in self.proxies:
            proxy.target = server.port
            if cut:
                proxy.cut()


async def _connected(app: App) -> bool:
    return (await metrics(app))["sse_log_connected"] == 1


class Shared:
    """
    Processes that several files' tests use, each started when the first one asks.

    They end with the test run. Whoever uses them leaves them as they were, and
    looks only at topics, users and keys of its own.
    """

    # Small, so that tests reach them with small requests.
    LIMITS: Mapping[str, int] = {
        "max_body_bytes": 20_000,
        "max_event_bytes": 5_000,
        "max_batch_events": 10,
        "max_topics": 6,
    }

    def __init__(self) -> None:
        self.site = Site()
        atexit.register(self.site.close)

    @cached_property
    def server(self) -> Redis:
        """The Redis of both processes."""
        return self.site.redis("--appendonly", "no")

    @cached_property
    def app(self) -> App:
        """A process as it is shipped, with small limits."""
        return self.site.app(self.server, **self.LIMITS)

    @cached_property
    def plain(self) -> App:
        """The same without the hand-off and without uvloop, and with users' names hashed."""
        return self.site.app(self.server, handoff="off", loop="asyncio", log_hash_users="on", **self.LIMITS)

    @cached_property
    def pair(self) -> Pair:
        """Two processes on a log of their own, which tests may ill-treat."""
        server = self.site.redis()
        proxies = self.site.proxy(server), self.site.proxy(server)
        apps = [self.site.app(proxy, ready=False) for proxy in proxies]
        for app in apps:
            app.wait_ready()
        return Pair(self.site, server, proxies, *apps)


shared = Shared()


def lines(app: App) -> list[dict[str, Any]]:
    """Return what *app* has logged, one dictionary per JSON line."""
    found = []
    # Not splitlines: JSON may hold U+2028, which is no line end to others.
    for line in app.log().split("\n"):
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def logged(app: App, event: str, **wanted: object) -> list[dict[str, Any]]:
    """Return the lines of *app* named *event* that hold what is *wanted*."""
    return [
        line
        for line in lines(app)
        if line.get("event") == event and all(line.get(key) == value for key, value in wanted.items())
    ]


@contextlib.contextmanager
def frozen(part: App | Redis) -> Iterator[None]:
    """Stop *part* with SIGSTOP for the time of the block."""
    os.kill(part.pid, signal.SIGSTOP)
    try:
        eventually(lambda: Path(f"/proc/{part.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        yield
    finally:
        os.kill(part.pid, signal.SIGCONT)


def connect(server: Redis) -> "sync_redis.Redis":
    """Return a client for the test's own hands on *server*."""
    return sync_redis.Redis(port=server.port, decode_responses=True)


def replace(server: Redis) -> None:
    """Kill *server* and start an empty one on the same port."""
    server.kill()
    shutil.rmtree(server.data)
    server.data.mkdir()
    server.start()
    server.wait_ready()


# --- HTTP, by hand


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def ask(
    port: int,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    chunks: list[bytes] | None = None,
    seconds: float = DEADLINE,
) -> Answer:
    """Send one request and read its whole answer; *chunks* are sent without a length."""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = {"Host": "test", "Connection": "close", **(headers or {})}
            if chunks is not None:
                head["Transfer-Encoding"] = "chunked"
            elif body or method == "POST":
                head.setdefault("Content-Length", str(len(body)))
            writer.write(_request(method, path, head) + body)
            for chunk in chunks or ():
                writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            if chunks is not None:
                writer.write(b"0\r\n\r\n")
            # A server that refuses a large body may close before it has it all.
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            status, answered = await _head(reader)
            if answered.get("content-type", "").startswith("text/event-stream") and "content-length" not in answered:
                content = b""  # a stream: it has no end to wait for
            elif answered.get("transfer-encoding") == "chunked" and method != "HEAD":
                content = b"".join([chunk async for chunk in _chunks(reader)])
            elif method == "HEAD":
                content = await reader.read()
            else:
                content = await reader.readexactly(int(answered.get("content-length", 0)))
            return Answer(status, answered, content)
        finally:
            writer.close()


async def post(app: App, events: object, *, key: str | None = None, **options: Any) -> Answer:
    """POST *events* as JSON to /publish."""
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    if key is not None:
        headers["Idempotency-Key"] = key
    return await ask(app.port, "POST", "/publish", headers=headers, body=json.dumps(events).encode(), **options)


async def publish(app: App, *events: Mapping[str, Any], key: str | None = None) -> list[str]:
    """Publish *events* as one batch, and return their ids."""
    answer = await post(app, list(events), key=key)
    assert answer.status == 201, answer.body
    return answer.json["ids"]


def event(data: object, *topics: str, **more: object) -> dict[str, Any]:
    """Return a publishable event."""
    return {"topics": list(topics) or ["t"], "data": data, **more}


async def readiness(app: App) -> Answer:
    return await ask(app.port, "GET", "/readyz")


async def metrics(app: App) -> dict[str, float]:
    """Return every sample of *app*, by its name with labels as Prometheus writes them."""
    answer = await ask(app.metrics_port, "GET", "/metrics", headers={"Accept": "text/plain"})
    samples = {}
    for line in answer.body.decode().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return samples


def _request(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
    return text.encode("latin-1")


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
    headers: dict[str, str] = {}
    for line in rest:
        name, _, value = line.partition(":")
        assert name.lower() not in headers, f"header twice: {line}"
        headers[name.lower()] = value.strip()
    return int(first.split(" ")[1]), headers


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield chunks; raise where the framing is wrong or the end is missing."""
    while True:
        size = int((await reader.readuntil(b"\r\n")).decode().strip(), 16)
        data = await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
        if not size:
            return
        yield data


# --- Streams


@dataclass
class Subscriber:
    """
    One stream, read as it comes.

    `events` are the publishers' own; the kit's (`stream.…`) are in `told`, and
    all in order in `everything`.
    """

    port: int
    topics: tuple[str, ...]
    last_event_id: str = ""
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 0
    head: dict[str, str] = field(default_factory=dict)
    raw: bytearray = field(default_factory=bytearray)
    everything: list[ServerSentEvent] = field(default_factory=list)
    ended: str = ""  # "clean", "cut"

    async def open(self) -> Self:
        """Connect and read the head; then read on in the background."""
        self._changed = asyncio.Event()
        reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
        pairs = [("topic", topic) for topic in self.topics] + list(self.query.items())
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in pairs)
        headers = {"Host": "test", "Accept": "text/event-stream", **self.headers}
        if self.last_event_id:
            headers["Last-Event-ID"] = self.last_event_id
        self._writer.write(_request("GET", f"/events?{query}", headers))
        self.status, self.head = await _head(reader)
        self.parser = Parser(last_event_id=self.last_event_id)
        self._task = asyncio.create_task(self._read(reader))
        return self

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            if self.head.get("transfer-encoding") != "chunked":
                self._take(await reader.readexactly(int(self.head.get("content-length", 0))))
            else:
                async for chunk in _chunks(reader):
                    self._take(chunk)
            self.ended = "clean"
        except (OSError, asyncio.IncompleteReadError):
            self.ended = "cut"
        finally:
            self._changed.set()

    def _take(self, data: bytes) -> None:
        self.raw += data
        self.everything += self.parser.feed(data)
        self._changed.set()

    @property
    def events(self) -> list[ServerSentEvent]:
        return [event for event in self.everything if not event.event.startswith("stream.")]

    @property
    def data(self) -> list[str]:
        return [event.data for event in self.events]

    @property
    def ids(self) -> list[str]:
        return [event.id for event in self.events]

    def told(self, name: str) -> list[ServerSentEvent]:
        return [event for event in self.everything if event.event == name]

    @property
    def resets(self) -> list[dict[str, Any]]:
        return [json.loads(event.data) for event in self.told("stream.reset")]

    @property
    def opened(self) -> dict[str, Any]:
        return json.loads(self.told("stream.open")[0].data)

    @property
    def position(self) -> str:
        return self.parser.last_event_id

    async def until(self, condition: Callable[[Self], Any], seconds: float = DEADLINE) -> Self:
        """Wait until *condition* of this stream holds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition(self) and not self.ended:
                    self._changed.clear()
                    await self._changed.wait()
        assert condition(self), (
            f"not within {seconds:g} s ({self.ended or 'still open'}), status {self.status}, "
            f"last events {self.everything[-5:]}"
        )
        return self

    async def until_data(self, *data: str) -> Self:
        """Wait until the last events carried *data*."""
        return await self.until(lambda s: s.data[-len(data) :] == list(data))

    async def until_open(self) -> Self:
        return await self.until(lambda s: s.told("stream.open"))

    def leave(self) -> None:
        """Cut the connection, as a browser that goes away."""
        self._task.cancel()
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def subscribed(app: App | int, *topics: str, last_event_id: str = "", **more: Any) -> AsyncIterator[Subscriber]:
    """Open a stream, and leave it with the block; returns when it is open."""
    port = app if isinstance(app, int) else app.port
    async with asyncio.timeout(DEADLINE):
        stream = await Subscriber(port, topics, last_event_id, **more).open()
    try:
        if stream.status == 200 and "x-sse-fallback" not in stream.head:
            await stream.until_open()
        yield stream
    finally:
        stream.leave()


def order(id: str) -> tuple[int, int]:
    """Return what an id's place in the log is; tests may look inside of it."""
    ms, _, seq = id.partition(":")[2].partition("-")
    return int(ms), int(seq)


# --- A proxy that misbehaves on command


class Proxy:
    """
    A TCP proxy in front of a Redis, in a thread of its own.

    `target` may be changed (a failover), `cut` ends all connections, `hold`
    lets nothing through, `swallow` loses the answer to a request and cuts.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.refusing = False
        # Requests that contain this are passed on; their answers never arrive.
        self.swallow: bytes | None = None
        self.swallowed = 0
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        started: threading.Event = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> None:
        """End all connections at once."""
        self._call(self._cut)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Let nothing through, in either direction, for the time of the block."""
        self._call(self._open.clear)
        try:
            yield
        finally:
            self._call(self._open.set)

    @contextlib.contextmanager
    def refuse(self) -> Iterator[None]:
        """End all connections, and every new one."""
        self.refusing = True
        self.cut()
        try:
            yield
        finally:
            self.refusing = False

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        self._cut()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    def _call(self, function: Callable[[], object]) -> None:
        done = threading.Event()

        def call() -> None:
            function()
            done.set()

        self._loop.call_soon_threadsafe(call)
        assert done.wait(DEADLINE)

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        if self.refusing:  # since a moment ago: `cut` did not know of this one
            writer.transport.abort()
            up_writer.transport.abort()
            return
        mine = {writer, up_writer}
        self._writers |= mine
        losing = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass(reader, up_writer, losing, True))
                both.create_task(self._pass(up_reader, writer, losing, False))
        except* OSError:
            pass  # either side ended: so does the other
        finally:
            for each in mine:
                each.transport.abort()
            self._writers -= mine

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, losing: asyncio.Event, request: bool
    ) -> None:
        while data := await source.read(65536):
            await self._open.wait()
            if request and self.swallow is not None and self.swallow in data:
                losing.set()
            if not request and losing.is_set():
                self.swallowed += 1
                break
            sink.write(data)
            await sink.drain()
        raise ConnectionResetError
