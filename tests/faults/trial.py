"""
One trial: a whole stack, a crowd that audits it, publishers that never give up.
"""

import asyncio
import itertools
import json
import re
import shutil
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx2

from app.client import publish
from app.stack import ROOT, App, Nginx, Part, Redis
from loadtest.bench.histogram import Histogram
from tests.faults.parts import DistantRedis, Network, Sentinel, connect, follow, sentinel_url
from tests.live import LOG, eventually

PREFIX = "k"

# The ladder scaled down: what takes minutes takes seconds.
SCALED = {
    "SSE_LOG_FORMAT": "json",
    "SSE_HEARTBEAT_SECONDS": "2",
    "SSE_HISTORY_SECONDS": "300",
    "SSE_REDIS_TIMEOUT_SECONDS": "1",
    "SSE_PUBLISH_TIMEOUT_SECONDS": "1.5",
    "SSE_DRAIN_SECONDS": "2",
    "SSE_DRAIN_LEAD_SECONDS": "0.4",
    "SSE_RETRY_MS": "200",
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything. `events` are published per second, over all topics."""

    streams: int = 60
    topics: int = 12
    events: int = 60
    calm_seconds: float = 1.0
    processes: int = 2
    behind_nginx: int = 0  # only the first so many; 0 for all
    listeners: int = 4
    freeze_seconds: float = 4.0
    heavy: int = 0  # so many streams hear the topic `heavy` too
    env: dict[str, str] = field(default_factory=lambda: dict(SCALED))


@dataclass(slots=True)
class Row:
    """What one fault did: a line of the table, and notes below it."""

    fault: str
    streams: int
    events: int
    lost: int
    duplicate: int
    disorder: int
    longest_gap: float
    errors: dict[str, int]
    resets: int
    reset_streams: int
    publish_failures: dict[str, int]
    ends: dict[str, int]
    opened: list[float]
    before: Histogram
    during: Histogram
    opening: Histogram
    notes: list[str] = field(default_factory=list)

    @property
    def client_errors(self) -> int:
        return sum(self.errors.values())

    @property
    def whole(self) -> bool:
        """Whether nothing was lost, doubled or out of order."""
        return not (self.lost or self.duplicate or self.disorder)


class Crowd:
    """The audience, from the side that gives commands."""

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.faults.audience", stdin=PIPE, stdout=PIPE, cwd=ROOT, limit=1 << 26
        )

    async def ask(self, do: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
        async with asyncio.timeout(more.get("seconds", 0) + 60):
            line = await self._process.stdout.readline()
        assert line, f"the audience ended at {do!r}"
        answer: dict[str, Any] = json.loads(line)
        assert "failed" not in answer, f"{do}: {answer}"
        return answer

    async def end(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


class Press:
    """
    Publishers that repeat under one key until they are answered.

    Each topic belongs to one of them, which has one batch under way at a time:
    so the order of a topic's numbers is the log's.
    """

    LANES = 4
    TICK_SECONDS = 0.05

    def __init__(self, url: str, topics: int, per_second: int) -> None:
        self.url = url
        self.last = [0] * topics
        self.acknowledged: set[str] = set()
        self.failures: Counter[str] = Counter()
        self._per_second = per_second
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    def start(self) -> None:
        lanes = min(self.LANES, len(self.last))
        self._stopping = False
        self._tasks = [asyncio.create_task(self._publish(range(lane, len(self.last), lanes))) for lane in range(lanes)]

    async def stop(self) -> None:
        """Publish no more; return when everything is acknowledged."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _publish(self, topics: range) -> None:
        share = self._per_second * len(topics) / len(self.last)
        turn = itertools.cycle(topics)
        owed = 0.0
        at = time.monotonic()
        async with httpx2.AsyncClient() as client:
            while not self._stopping:
                now = time.monotonic()
                owed = min(owed + (now - at) * share, 4 * share * self.TICK_SECONDS + 1)
                at = now
                events = []
                for _ in range(int(owed)):
                    topic = next(turn)
                    self.last[topic] += 1
                    data = f"{topic} {self.last[topic]} {time.monotonic_ns()}"
                    events.append({"topics": [f"{PREFIX}{topic}"], "data": data})
                owed -= len(events)
                if events:
                    await publish(self.url, events, client=client, on_wait=self._failed, timeout_seconds=300)
                    self.acknowledged.update(event["data"] for event in events)
                await asyncio.sleep(self.TICK_SECONDS)

    def _failed(self, cause: str, _: float) -> None:
        self.failures[re.sub(r"\d{4,}", "…", cause)] += 1


class Trial:
    """
    Everything for one fault, started and ended together.

    `log` is "redis", "sentinel" (a master, a replica, a Sentinel) or "distant"
    (in a network namespace).
    """

    def __init__(self, size: Size, *, log: str = "redis", **env: str) -> None:
        self.size = size
        self.directory = Path(tempfile.mkdtemp(prefix="sse-fault-"))
        self.network = Network() if log == "distant" else None
        self.replica: Redis | None = None
        self.sentinel: Sentinel | None = None
        if self.network:
            self.redis: Redis = DistantRedis(self.directory, self.network)
        else:
            self.redis = Redis(self.directory, name="redis")
        url = self.redis.url
        if log == "sentinel":
            self.replica = Redis(self.directory, name="replica")
            self.sentinel = Sentinel(self.directory, self.redis)
            url = sentinel_url(self.sentinel)
        env = size.env | {"SSE_REDIS_URL": url} | env
        self.apps = [App(f"app-{n}", self.directory, env) for n in range(1, size.processes + 1)]
        behind = self.apps[: size.behind_nginx] if size.behind_nginx else self.apps
        self.nginx = Nginx(self.directory, [f"127.0.0.1:{app.port}" for app in behind])
        self.crowd = Crowd()
        self.press = Press(self.nginx.url, size.topics, size.events)
        self.before = Histogram()

    @property
    def parts(self) -> list[Part]:
        return [part for part in (self.redis, self.replica, self.sentinel, *self.apps, self.nginx) if part]

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self._start)
            await self.crowd.start()
            size = self.size
            common = {"topics": size.topics, "port": self.nginx.port, "prefix": PREFIX, "seconds": 120}
            if size.streams:
                await self.crowd.ask("open", count=size.streams, at_once=64, heavy=size.heavy, **common)
            if size.listeners:
                await self.crowd.ask("listen", count=size.listeners, **common)
            self.press.start()
            # Before the fault: everybody is known to hear.
            await self.until(lambda report: report["events"] >= 3 * report["streams"], "all streams hear events")
            await self.calm()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self.press._stopping = True
        for task in self.press._tasks:
            task.cancel()
        if hasattr(self.crowd, "_process"):
            await self.crowd.end()
        for part in reversed(self.parts):
            part.close()
        if self.network:
            self.network.__exit__()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self) -> None:
        if self.network:
            self.network.__enter__()
        for part in (self.redis, self.replica):
            if part:
                part.start()
                part.wait_ready()
        if self.replica and self.sentinel:
            follow(self.replica, self.redis)
            sentinel = self.sentinel
            sentinel.start()
            sentinel.wait_ready()
            eventually(lambda: sentinel.replicas_known() == 1, "the Sentinel knows the replica", 30)
        for app in self.apps:
            app.start()
        for app in self.apps:
            app.wait_ready()
        self.nginx.start()
        self.nginx.wait_ready()

    async def calm(self) -> None:
        """Measure what is ordinary, then begin to count what the fault does."""
        await self.crowd.ask("mark")
        await asyncio.sleep(self.size.calm_seconds)
        self.before = Histogram()
        self.before.add((await self.crowd.ask("report"))["latency"])
        self.press.failures.clear()
        await self.crowd.ask("mark")

    async def result(
        self, fault: str, *, announced: bool = False, may_reset: bool = False, open_streams: int | None = None
    ) -> Row:
        """
        Let everything arrive, and count.

        *announced*: only when every stream was reset. *open_streams*: how many
        must be open, where not all.
        """
        await self.back(open_streams)
        if announced:
            await self.until(lambda report: report["reset_streams"] >= report["streams"], "every stream is told")
        elif may_reset:
            await asyncio.sleep(2.5)  # two checks of the log
        await self._until_all_topics_move()
        await self.press.stop()
        behind = (await self.crowd.ask("final", last=self.press.last, seconds=30))["behind"]
        report = await self.crowd.ask("report")
        during, opening = Histogram(), Histogram()
        during.add(report["latency"])
        opening.add(report["opening"])
        return Row(
            fault=fault,
            streams=report["streams"],
            events=report["events"],
            lost=report["lost"] + behind + report["foreign"],
            duplicate=report["duplicate"],
            disorder=report["disorder"],
            longest_gap=report["longest_gap"],
            errors=report["errors"],
            resets=report["resets"],
            reset_streams=report["reset_streams"],
            publish_failures=dict(self.press.failures),
            ends=report["ends"],
            opened=report["opened"],
            before=self.before,
            during=during,
            opening=opening,
        )

    async def back(self, count: int | None = None) -> None:
        """Return when every stream (or *count*) is open again, and publishers are served."""
        await self.until(lambda report: report["open"] >= (count or report["streams"]), "all streams are back")
        published = len(self.press.acknowledged)
        until = time.monotonic() + 60
        while len(self.press.acknowledged) == published:
            assert time.monotonic() < until, f"publishers must be served again: {self.press.failures}"
            await asyncio.sleep(0.05)

    async def _until_all_topics_move(self) -> None:
        # A stream that was reset is judged by what comes after.
        last = list(self.press.last)
        until = time.monotonic() + 60
        while any(now < before + 2 for now, before in zip(self.press.last, last, strict=True)):
            assert time.monotonic() < until, "every topic must go on"
            await asyncio.sleep(0.05)

    async def until(self, met: Callable[[dict[str, Any]], bool], what: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not met(report := await self.crowd.ask("report")):
            facts = {k: report[k] for k in ("streams", "open", "reset_streams", "events", "errors", "ends")}
            assert time.monotonic() < until, f"{what}: not within {seconds:g} s, {facts}"
            await asyncio.sleep(0.1)

    def kept(self, server: Redis) -> Counter[str]:
        """Return the data of all that *server*'s log holds, with how often."""
        with connect(server) as hands:
            return Counter(fields["data"] for _, fields in hands.xrange(LOG))

    def log_lines(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of all processes named *event*."""
        found = []
        for app in self.apps:
            for line in app.log().split("\n"):
                with suppress(ValueError):
                    if (entry := json.loads(line)).get("event") == event:
                        found.append(entry)
        return found
