"""
One process that generates load: what its users share, and the streams it holds.

It also measures itself. A generator that is late reads events late, and then its figures
are its own: `lag` is how late a timer fires, which is the time one turn over all ready
sockets takes.
"""

import argparse
import errno
import heapq
import math
import random
import ssl
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gevent
from gevent.event import Event

from app.parser import ServerSentEvent
from loadtest.measures import Measures
from loadtest.scenario import Scenario
from loadtest.sequence import MARK, MICROSECONDS, Published, Sequences
from loadtest.sse_client import EventSource, Target
from loadtest.tokens import Tokens

REPORT_SECONDS = 1.0
LAG_SECONDS = 0.02
# Four of the kit's heartbeats: a stream that is silent for longer is dead.
SILENT_SECONDS = 60.0
SETTLED_SECONDS = 0.5
# By this much clocks of two machines may differ, in µs, without a loss being made up.
OTHER_CLOCK = MICROSECONDS
# The server's word for the end of a stream, told in band before it.
FAREWELLS = {
    "stream.draining": "draining",
    "stream.evicted": "evicted",
    "stream.expired": "token_expired",
    "stream.revoked": "revoked",
}
# What a generator itself has run out of; the server is not to blame.
OUT_OF = {errno.EMFILE: "descriptors", errno.ENFILE: "descriptors", errno.EADDRNOTAVAIL: "ports"}


def machine() -> str:
    """Return a name of this machine's clock; containers of one host share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return f"{uuid.getnode():x}"


class Ordinals:
    """Give each user of a kind the lowest number that is free, so that topics stay evenly filled."""

    def __init__(self) -> None:
        self._next = 0
        self._free: list[int] = []

    def take(self) -> int:
        """Return a number that nobody has."""
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def give_back(self, number: int) -> None:
        """Let another have *number*."""
        heapq.heappush(self._free, number)


class Generator:
    """
    This process's part of a run.

    Attributes:
        workers: How many processes there are; index: which of them this is.
        run: Names the run; events of other runs on the same topics are not judged.
    """

    def __init__(
        self,
        scenario: Scenario,
        options: argparse.Namespace,
        target: Target,
        *,
        streams: int,
        run: str,
        workers: int = 1,
        index: int = 0,
        tick: float = LAG_SECONDS,
    ) -> None:
        self.scenario = scenario
        self.options = options
        self.target = target
        self.run = run
        self.workers = workers
        self.index = index % workers
        self.topic_count = scenario.topics(streams)
        self.machine = machine()
        self.measures = Measures()
        self.tokens = Tokens(options.token, options.secret, options.claims)
        self.streams: set[Stream] = set()
        self.ordinals: dict[str, Ordinals] = {}
        self.publishing = True
        self.publishing_ended = math.inf
        self.may_publish = Event()
        self.between_publishes = Event()
        self.between_publishes.set()
        if not scenario.publish_when_open:
            self.may_publish.set()
        self.closed = False
        self.published: dict[str, tuple[str, Published]] = {}
        # What was acknowledged so long ago that a stream which leaves now must have it.
        self.owed: dict[str, list[tuple[str, Published]]] = {}
        self._tick = tick
        self._greenlets: list[gevent.Greenlet] = []

    def start(self, report: Callable[[], None] | None = None, every: float = REPORT_SECONDS) -> None:
        """Begin to measure this process itself; call *report* each second."""
        self._greenlets = [gevent.spawn(self._measure_lag), gevent.spawn(self._watch_silence)]
        if report is not None:
            self._greenlets.append(gevent.spawn(self._report, report, every))

    def stop(self) -> None:
        """End what `start` began."""
        gevent.killall(self._greenlets, block=False)

    def _measure_lag(self) -> None:
        while True:
            due = time.monotonic() + self._tick
            gevent.sleep(self._tick)
            self.measures.took_late("lag", max(0.0, time.monotonic() - due), self._tick)

    def _watch_silence(self) -> None:
        while True:
            gevent.sleep(SILENT_SECONDS / 12)
            since = time.monotonic() - SILENT_SECONDS
            for stream in list(self.streams):
                if stream.is_open and stream.last_read < since:
                    stream.cut("silent")

    def _report(self, report: Callable[[], None], every: float) -> None:
        while True:
            gevent.sleep(every)
            report()

    def hand_over(self) -> dict[str, Any]:
        """Return what was measured since the last call."""
        # An evicted stream's end may be read after its successor's head: the two come on two
        # connections. So a stream counts for its user when it has been open for a while.
        since = time.monotonic() - SETTLED_SECONDS
        shared = self.tokens.shared
        users = Counter(
            "" if shared else stream.user for stream in self.streams if stream.is_open and stream.opened_at < since
        )
        self.measures.most_per_user = max(users.values(), default=0)
        return self.measures.hand_over() | {"shared_user": shared}

    # --- Who reads what

    def ordinal(self, kind: str) -> int:
        """Return a number for a user of *kind*, unique over all processes."""
        return self.ordinals.setdefault(kind, Ordinals()).take() * self.workers + self.index

    def give_back(self, kind: str, ordinal: int) -> None:
        """Let another user have *ordinal*."""
        self.ordinals[kind].give_back(ordinal // self.workers)

    def topic(self, number: int) -> str:
        """Return the topic of that number."""
        if self.scenario.own_topic:
            return "user:" + quote(self.user(number), safe="")
        return f"loadtest/{number}"

    def user(self, ordinal: int) -> str:
        """Return the id of the user of that number."""
        return f"lt-{self.run}-{ordinal}"

    def topics_of(self, ordinal: int) -> tuple[str, ...]:
        """Return the topics of ours that reach the stream of that number."""
        return (self.topic(ordinal % self.topic_count), "broadcast")

    def path(self, user: str, topics: tuple[str, ...]) -> str:
        """Return the path of a stream."""
        query = [f"topic={quote(topic, safe='')}" for topic in topics if topic != "broadcast"]
        if not self.tokens.named:
            query.append(f"user={quote(user, safe='')}")
        return f"/events?{'&'.join(query)}"

    # --- The end

    def stop_publishing(self) -> None:
        """Nothing is due any more; a publish in flight goes on."""
        self.publishing = False
        self.publishing_ended = time.monotonic()

    def as_told(self) -> dict[str, Any]:
        """Return what was published and acknowledged, as plain data for `as_expected`."""
        return {
            key: [topic, each.number, each.first, each.last, self.machine]
            for key, (topic, each) in self.published.items()
        }

    def cut(self, share: float) -> None:
        """Break this share of the open streams in this moment."""
        streams = [stream for stream in self.streams if stream.is_open]
        for stream in random.sample(streams, round(len(streams) * share)):
            stream.cut("disconnected")

    def finish(self, expected: dict[str, list[tuple[str, Published]]], seconds: float) -> None:
        """
        Wait until all streams have what was published, then count what never came.

        *expected* holds, by topic, each key and what was acknowledged of it.
        """
        judged = [stream for stream in self.streams if stream.judged]
        deadline = time.monotonic() + seconds
        waiting = judged
        while waiting := [stream for stream in waiting if stream.behind(expected)]:
            if time.monotonic() > deadline:
                break
            gevent.sleep(0.2)
        for stream in waiting:
            stream.miss(expected)
        self.closed = True

    def slack(self, machine: str) -> int:
        """Return by how many µs the clock of *machine* may differ from this one's."""
        return 0 if machine == self.machine else OTHER_CLOCK

    @contextmanager
    def own_faults(self) -> Iterator[None]:
        """Let no fault of the load test's own pass for a user who left: the run is void."""
        try:
            yield
        except Exception:
            self.measures.tally["generator_errors"] += 1
            raise

    def short_of(self, error: Exception) -> bool:
        """Tell whether a connection failed because this process has run out of something, and count that."""
        what = OUT_OF.get(getattr(error, "errno", None) or 0)
        if what is None:
            return False
        self.measures.tally["generator_errors"] += 1
        self.measures.tally[f"broken:no {what} left"] += 1
        return True


class Stream(EventSource):
    """
    One event stream that is measured.

    *judged* is False for a reader that is late on purpose: its latency and its tail say
    nothing of the server, its gaps do.
    """

    __slots__ = ("farewell", "generator", "judged", "lost_at", "opened_at", "sequences", "topics", "user")

    def __init__(
        self, generator: Generator, ordinal: int, *, user: str | None = None, topics: tuple[str, ...] | None = None
    ) -> None:
        self.generator = generator
        self.topics = generator.topics_of(ordinal) if topics is None else topics
        self.user = user or generator.user(ordinal)
        self.sequences = Sequences()
        self.farewell = ""
        self.lost_at: float | None = None
        self.judged = True
        self.opened_at = 0.0
        super().__init__(generator.target, generator.path(self.user, self.topics), ordinal)
        generator.streams.add(self)

    def leave(self) -> None:
        """The user went away: the stream counts no more, but what it owes by now does."""
        owed = self.generator.owed
        if owed and self.judged and not self.generator.closed and self.behind(owed):
            self.miss(owed)
        self.generator.streams.discard(self)
        if self.is_open:
            self.is_open = False
            self._closed()
        self.close()

    def cut(self, why: str) -> None:
        """Break the connection; *why* is counted as the reason."""
        self.farewell = why
        self.close()

    def behind(self, expected: dict[str, list[tuple[str, Published]]]) -> int:
        """Return how many of the expected events have not come."""
        if not self.sequences.opened:
            return 0
        return sum(
            self.sequences.behind(key, published, self.generator.slack(published.machine))
            for topic in self.topics
            for key, published in expected.get(topic, ())
        )

    def miss(self, expected: dict[str, list[tuple[str, Published]]]) -> None:
        """Count what has not come, though there was time enough."""
        measures = self.generator.measures
        if self.is_open:
            measures.counts.lost += self.behind(expected)
        else:
            # What it missed, it could still resume: neither lost nor delivered.
            measures.tally["unfinished"] += 1

    # --- What is heard

    def headers(self) -> dict[str, str]:
        return self.generator.tokens.headers(self.user)

    def connecting(self) -> None:
        tally = self.generator.measures.tally
        tally["connects"] += 1
        if self.lost_at is not None:
            tally["reconnects"] += 1

    def headed(self, status: int, seconds: float) -> None:
        self.generator.measures.took("head", seconds)

    def opened(self, seconds: float, data: str) -> None:
        measures = self.generator.measures
        measures.open += 1
        measures.tally["opened"] += 1
        measures.took("open", seconds)
        self.opened_at = time.monotonic()
        if self.lost_at is not None:
            measures.took("resume", time.monotonic() - self.lost_at)
            self.lost_at = None
        self.farewell = ""
        if not self.sequences.opened:
            self.sequences.opened = int(time.time() * MICROSECONDS)

    def take(self, events: list[ServerSentEvent]) -> None:
        generator = self.generator
        if generator.closed:
            return
        now = int(time.time() * MICROSECONDS)
        measures = generator.measures
        for event in events:
            data = event.data
            if data.startswith(MARK):
                fields = data.split(" ", 7)
                # Somebody else's, or of another run.
                if len(fields) < 8 or not fields[1].startswith(generator.run):
                    continue
                _, key, number, sent, previous, first, machine, _ = fields
                measures.tally["deliveries"] += 1
                slack = generator.slack(machine)
                self.sequences.see(measures.counts, key, int(number), int(previous), int(first), slack)
                if self.judged:
                    if not slack:
                        measures.times["delivery"].record_value(max(1, now - int(sent)))
                    else:
                        measures.tally["other_clock"] += 1
            elif event.event.startswith("stream."):
                if event.event == "stream.reset":
                    measures.tally["resets"] += 1
                    self.sequences.reset()
                elif event.event in FAREWELLS:
                    self.farewell = FAREWELLS[event.event]

    def soft_failed(self) -> None:
        self.generator.measures.tally["soft_failed"] += 1

    def refused(self, status: int, body: bytes) -> None:
        tally = self.generator.measures.tally
        tally[f"refused:{status}"] += 1
        tally["gave_up"] += 1

    def broken(self, error: Exception) -> None:
        if not self.generator.short_of(error):
            # The number of a TLS error is OpenSSL's: EPERM, by the kernel's names.
            number = 0 if isinstance(error, ssl.SSLError) else getattr(error, "errno", None) or 0
            name = errno.errorcode.get(number, "") or type(error).__name__
            self.generator.measures.tally[f"broken:{name}"] += 1

    def ended(self, clean: bool) -> None:
        self.generator.measures.tally[f"ended:{self.farewell or ('clean' if clean else 'cut')}"] += 1
        self.lost_at = time.monotonic()
        self._closed()

    def _closed(self) -> None:
        self.generator.measures.open -= 1


def as_expected(published: dict[str, Any]) -> dict[str, list[tuple[str, Published]]]:
    """Return what all processes published, {key: [topic, number, first, last, machine]}, by topic."""
    expected: dict[str, list[tuple[str, Published]]] = {}
    for key, (topic, *fields) in published.items():
        expected.setdefault(topic, []).append((key, Published(*fields)))
    return expected
