"""
The auditing clients: thousands of streams in one process of their own.

    python -m tests.faults.audience       reads commands, one JSON object a line

Each seat behaves as a browser's EventSource: it comes back after `retry`, with
its last id, for ever. It knows which sequence number of its topic comes next,
across all its connections, and counts every one that is lost, comes twice or
out of order. A connect that does not lead to `stream.open` is a client error,
soft fails included. After `stream.reset` the count begins anew: that loss was
announced.

Data of an event is ``TOPIC N T``: the topic's number, the event's in it, and when
it was published, in ns of CLOCK_MONOTONIC.
"""

import asyncio
import ctypes
import itertools
import json
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any

import httpx2
import uvloop

from app.client import listen
from app.parser import Parser
from loadtest.bench.histogram import Histogram
from tests.wire import Chunks, request


class Account:
    """What one stream was owed, and what it got; across all of its connections."""

    __slots__ = ("at", "disorder", "duplicate", "events", "lost", "missing", "next", "resets", "topic")

    def __init__(self, topic: int) -> None:
        self.topic = topic
        self.next: int | None = 1
        self.missing: set[int] = set()
        self.at = 0.0  # arrival of the last event
        self.events = self.lost = self.duplicate = self.disorder = self.resets = 0

    def reset(self) -> None:
        self.resets += 1
        self.next = None
        # It was told, also of what went before: a trim between two checks of the
        # log is noticed up to a second after the first event behind the gap.
        self.lost -= len(self.missing)
        self.missing.clear()

    def take(self, n: int) -> None:
        self.events += 1
        if self.next is None or n == self.next:
            self.next = n + 1
        elif n > self.next:
            self.missing.update(range(self.next, n))
            self.lost += n - self.next
            self.next = n + 1
        elif n in self.missing:
            self.missing.remove(n)
            self.lost -= 1
            self.disorder += 1
        else:
            self.duplicate += 1


class Audience:
    """All seats, and what they saw since the last `mark`."""

    def __init__(self) -> None:
        self.accounts: list[Account] = []
        self.seats: list[Seat] = []
        self.listeners: list[asyncio.Task[None]] = []
        self.churning: asyncio.Task[None] | None = None
        self.churned = 0
        self.mark()

    def mark(self) -> None:
        self.began = time.monotonic()
        self.latency = Histogram()
        self.opening = Histogram()
        self.errors: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.opened: list[float] = []
        self.longest_gap = 0.0
        self.foreign = 0
        for account in self.accounts:
            account.at = self.began
            account.missing.clear()
            account.events = account.lost = account.duplicate = account.disorder = account.resets = 0

    def take(self, account: Account, data: str) -> None:
        topic, n, at = data.split()[:3]
        now = time.monotonic_ns()
        self.latency.record((now - int(at)) // 1_000)
        gap = now / 1e9 - account.at
        if account.at and gap > self.longest_gap:
            self.longest_gap = gap
        account.at = now / 1e9
        if int(topic) != account.topic:
            self.foreign += 1
        account.take(int(n))

    def behind(self, last: list[int]) -> int:
        """Return how many events the streams still lack up to *last* of each topic."""
        return sum(
            max(0, last[a.topic] + 1 - a.next) if a.next is not None else int(last[a.topic] > 0) for a in self.accounts
        )

    def report(self) -> dict[str, Any]:
        def total(name: str) -> int:
            return sum(getattr(account, name) for account in self.accounts)

        return {
            "streams": len(self.accounts),
            "open": sum(seat.state == OPEN for seat in self.seats) + sum(not task.done() for task in self.listeners),
            "events": total("events"),
            "lost": total("lost"),
            "duplicate": total("duplicate"),
            "disorder": total("disorder"),
            "resets": total("resets"),
            "reset_streams": sum(account.resets > 0 for account in self.accounts),
            "foreign": self.foreign,
            "longest_gap": self.longest_gap,
            "errors": self.errors,
            "ends": self.ends,
            "opened": [round(at - self.began, 3) for at in self.opened],
            "latency": self.latency.as_report(),
            "opening": self.opening.as_report(),
            "churned": self.churned,
            "cpu": time.process_time(),
        }


CLOSED, ASKED, READING, OPEN = "closed", "asked", "reading", "open"


class Seat(asyncio.Protocol):
    """One EventSource. `account` None: it only comes and goes."""

    def __init__(self, audience: Audience, port: int, path: str, account: Account | None) -> None:
        self.audience = audience
        self.port = port
        self.path = path
        self.account = account
        self.state = CLOSED
        self.stalled = False
        self.leaving = False
        self.last_event_id = ""
        self.retry_seconds = 1.0
        self.transport: Any = None
        self.on_open: Callable[[], None] = lambda: None

    def connect(self) -> None:
        self.state = ASKED
        self.began = time.monotonic()
        self.parser = Parser(last_event_id=self.last_event_id)
        self.head = b""
        self.clean = False
        task = asyncio.get_running_loop().create_task(self._connect())
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self.port)
        except OSError as error:
            self._over(type(error).__name__)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self.last_event_id:
            headers["Last-Event-ID"] = self.last_event_id
        transport.write(request(self.path, headers))

    def data_received(self, data: bytes) -> None:
        if self.state == ASKED:
            head, mark, data = (self.head + data).partition(b"\r\n\r\n")
            if not mark:
                self.head = head
                return
            self.state = READING
            self._judge(head.decode("latin-1").lower())
            if self.state != READING:
                return
        if self.chunks is None:
            return
        for text in self.chunks.feed(data):
            for event in self.parser.feed(text):
                self._take(event.event, event.data)
        self.last_event_id = self.parser.last_event_id
        if self.parser.retry_ms is not None:
            self.retry_seconds = self.parser.retry_ms / 1_000
        if self.chunks.ended:
            # nginx keeps the connection; an EventSource has no use for it.
            self.clean = True
            self._end()

    def _judge(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        headers = dict(line.partition(": ")[::2] for line in lines)
        self.chunks = Chunks() if headers.get("transfer-encoding") == "chunked" else None
        status = first.split()[1]
        if fallback := headers.get("x-sse-fallback"):
            self._fail(f"soft fail {fallback}")
        elif status != "200":
            self._fail(f"status {status}")

    def _take(self, name: str, data: str) -> None:
        if name == "stream.open":
            self.state = OPEN
            audience = self.audience
            now = time.monotonic()
            audience.opening.record(round((now - self.began) * 1e6))
            if self.account is not None:
                audience.opened.append(now)
            self.on_open()
        elif self.account is None:
            return
        elif name == "stream.reset":
            self.account.reset()
        elif not name.startswith("stream."):
            self.audience.take(self.account, data)

    def _fail(self, why: str) -> None:
        self.state = CLOSED
        self._end()
        self._over(why)

    def _end(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.state in (ASKED, READING):
            self._over("ended before the head" if self.state == ASKED else "ended before stream.open")
        elif self.state == OPEN:
            self.audience.ends["clean" if self.clean else "cut"] += not self.leaving
            self._over("")

    def _over(self, error: str) -> None:
        self.state = CLOSED
        self.transport = None
        if self.leaving:
            return
        if error:
            self.audience.errors[error] += 1
        asyncio.get_running_loop().call_later(self.retry_seconds, self._again)

    def _again(self) -> None:
        if not self.leaving and self.state == CLOSED:
            self.connect()

    def leave(self) -> None:
        self.leaving = True
        self._end()

    def stall(self) -> None:
        """Read nothing more; what it misses is its own business."""
        self.stalled = True
        if self.transport is not None:
            self.transport.pause_reading()


async def follow(audience: Audience, port: int, topic: str, account: Account, opened: asyncio.Event) -> None:
    """Be a client of the kit: `app.client.listen`, which makes before it breaks."""

    def on_open(_: dict[str, Any]) -> None:
        audience.opened.append(time.monotonic())
        opened.set()

    def on_wait(cause: str, _: float) -> None:
        audience.ends[f"listen: {cause}"] += 1

    async with httpx2.AsyncClient() as client:
        stream = listen(f"http://127.0.0.1:{port}", topic, on_open=on_open, on_wait=on_wait, client=client)
        async with aclosing(stream) as events:
            async for event in events:
                if event.event == "stream.reset":
                    account.reset()
                else:
                    audience.take(account, event.data)


async def obey(audience: Audience, command: dict[str, Any]) -> dict[str, Any]:
    """Carry out one command; return the answer."""
    match command["do"]:
        case "open":
            return await _open(audience, **{k: v for k, v in command.items() if k != "do"})
        case "listen":
            waits = []
            for number in range(command["count"]):
                account = Account(number % command["topics"])
                audience.accounts.append(account)
                opened = asyncio.Event()
                topic = f"{command['prefix']}{account.topic}"
                task = asyncio.create_task(follow(audience, command["port"], topic, account, opened))
                audience.listeners.append(task)
                waits.append(opened.wait())
            async with asyncio.timeout(command["seconds"]):
                await asyncio.gather(*waits)
        case "stall":
            for seat in audience.seats[: command["count"]]:
                seat.stall()
                # What it was not given it did not ask for.
                audience.accounts.remove(seat.account)
        case "churn":
            audience.churning = asyncio.create_task(_churn(audience, command["port"], command["at_once"]))
        case "calm":
            if audience.churning is not None:
                audience.churning.cancel()
        case "mark":
            audience.mark()
        case "final":
            until = time.monotonic() + command["seconds"]
            while (behind := audience.behind(command["last"])) and time.monotonic() < until:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            return {"behind": behind}
        case "report":
            return audience.report()
        case other:
            raise ValueError(f"unknown command {other!r}")
    return {}


async def _open(
    audience: Audience, count: int, topics: int, port: int, prefix: str, at_once: int, seconds: float, heavy: int = 0
) -> dict[str, Any]:
    """Open *count* streams; the first *heavy* of them hear the topic `heavy` too."""
    began = time.monotonic()
    room = asyncio.Semaphore(at_once)
    left = count
    done = asyncio.Event()

    def opened() -> None:
        nonlocal left
        room.release()
        left -= 1
        if not left:
            done.set()

    async with asyncio.timeout(seconds):
        for number in range(count):
            account = Account(number % topics)
            path = f"/events?topic={prefix}{account.topic}&user=u{len(audience.seats)}"
            seat = Seat(audience, port, path + "&topic=heavy" * (number < heavy), account)
            audience.accounts.append(account)
            audience.seats.append(seat)
            await room.acquire()
            seat.on_open = opened
            seat.connect()
        await done.wait()
    for seat in audience.seats[-count:]:
        seat.on_open = lambda: None
    return {"seconds": time.monotonic() - began}


async def _churn(audience: Audience, port: int, at_once: int) -> None:
    """Open and leave streams for ever, *at_once* at a time."""

    async def visitor(number: int) -> None:
        for visit in itertools.count():
            # Another user each time: one who connects in a loop is slowed down.
            seat = Seat(audience, port, f"/events?topic=churn&user=v{number}-{visit}", None)
            opened = asyncio.Event()
            seat.on_open = opened.set
            seat.connect()
            with suppress(TimeoutError):
                async with asyncio.timeout(30):
                    await opened.wait()
            seat.leave()
            audience.churned += 1
            await asyncio.sleep(0.05)

    await asyncio.gather(*(visitor(number) for number in range(at_once)))


_tasks: set[asyncio.Task[None]] = set()


async def main() -> None:
    """Answer each line of standard input with one line."""
    audience = Audience()
    reader = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        try:
            answer = await obey(audience, json.loads(line))
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}", "errors": audience.errors}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with whoever started it
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    uvloop.run(main())
