"""
The kinds of users that Locust starts, one greenlet each.

A reader of runs (time to the first token, and between tokens) belongs here, too, as soon
as the application has runs: it is a `Reader` whose stream overrides `take`.
"""

import json
import random
import time
import uuid
from typing import Any, ClassVar

import gevent
from locust import User

from loadtest.generator import Generator, Stream
from loadtest.sequence import MICROSECONDS, Published, stamp
from loadtest.sse_client import Poster, ProtocolError

# Events that are due within this time go in one publish.
PUBLISH_SECONDS = 0.01
BATCH_EVENTS = 200
# A publish that gets no answer is repeated with its key for so long.
REPEAT_SECONDS = 30.0
# The kit's default of SSE_LIMIT_STREAMS_PER_USER.
LIMIT_PER_USER = 10

# Set by the conductor when a run begins in this process.
current: Generator | None = None


class Reader(User):
    """A user who holds one stream."""

    abstract = True
    kind: ClassVar[str]

    def run(self) -> None:
        """Hold the stream for as long as Locust lets the user live."""
        assert current is not None
        generator = current
        ordinal = generator.ordinal(self.kind)
        stream = None
        try:
            # Locust starts a second's users at once; people come one by one.
            gevent.sleep(random.random())
            stream = self.make(generator, ordinal)
            self.hold(stream)
            # It gave up for ever, as a browser does: its user sees nothing any more.
            gevent.sleep(10**8)
        finally:
            if stream is not None:
                stream.leave()
            generator.give_back(self.kind, ordinal)

    def make(self, generator: Generator, ordinal: int) -> Stream:
        """Return the user's stream."""
        return Stream(generator, ordinal)

    def hold(self, stream: Stream) -> None:
        """Read until the stream gives up."""
        stream.run()


class Subscriber(Reader):
    """Reads its topic, what goes to all, and what goes to its user."""

    kind = "subscriber"


class SlowStream(Stream):
    """A stream that takes a little at a time, out of a small buffer."""

    __slots__ = ()

    receive_bytes = 4096
    PAUSE_SECONDS = 2.0

    def take(self, events: list[Any]) -> None:
        super().take(events)
        gevent.sleep(self.PAUSE_SECONDS)


class SlowReader(Reader):
    """Reads slower than it is sent to: a phone in a tunnel."""

    kind = "slow"

    def make(self, generator: Generator, ordinal: int) -> Stream:
        stream = SlowStream(generator, ordinal)
        stream.judged = False
        return stream


class LimitBreaker(Reader):
    """Shares its user with others, so that together they open more streams than one may."""

    kind = "limit"
    BESIDE_LIMIT = 3

    def make(self, generator: Generator, ordinal: int) -> Stream:
        together = (generator.options.user_limit or LIMIT_PER_USER) + self.BESIDE_LIMIT
        # All streams of one user are in one process, which can count them.
        group = ordinal // generator.workers // together
        stream = Stream(generator, ordinal, user=f"lt-{generator.run}-over-{generator.index}-{group}")
        # An evicted or refused stream is not owed anything.
        stream.judged = False
        return stream


class Churner(Reader):
    """Opens streams for a few seconds each, as people do who look at one page after another."""

    kind = "churner"
    SECONDS = (1.0, 5.0)

    def hold(self, stream: Stream) -> None:
        # Each is a new page: it resumes nothing and owes nothing to the one before.
        generator, ordinal = stream.generator, stream.number
        stream.leave()
        while True:
            page = self.make(generator, ordinal)
            page.judged = False
            try:
                with gevent.Timeout(random.uniform(*self.SECONDS), False):
                    page.once()
                    gevent.sleep(page.retry_seconds)
            finally:
                page.leave()
            generator.measures.tally["pages"] += 1


class Publisher(User):
    """
    Publishes to this process's share of the topics, at a fixed rate, whatever the answers take.

    One per process. An event says when it was really sent; how late that was is measured
    apart (`publish_delay`).
    """

    kind = "publisher"

    def run(self) -> None:
        assert current is not None
        generator = current
        ordinal = generator.ordinal(self.kind)
        try:
            # A second one of the same process would publish everything twice.
            if ordinal < generator.workers:
                Publishing(generator).run()
            gevent.sleep(10**8)
        finally:
            generator.give_back(self.kind, ordinal)


class Publishing:
    """The topics of one process, and what was published to them."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._poster = Poster(generator.target)
        self._life = 0
        scenario = generator.scenario
        own = range(generator.index, generator.topic_count, generator.workers)
        # (events per second, topics that they go to in turn)
        self._rates = [(scenario.rate * len(own), [generator.topic(number) for number in own])]
        if generator.index == 0:
            self._rates.append((scenario.broadcast_rate, ["broadcast"]))
        self._rates = [(rate, topics) for rate, topics in self._rates if rate and topics]

    def run(self) -> None:
        """Publish until the run has no more need of it."""
        if not self._rates:
            return
        self._generator.may_publish.wait()
        began = time.monotonic()
        sent = [0] * len(self._rates)
        while self._generator.publishing:
            elapsed = time.monotonic() - began
            batch: list[str] = []
            oldest = elapsed
            for at, (rate, topics) in enumerate(self._rates):
                due = min(int(elapsed * rate) + 1 - sent[at], BATCH_EVENTS - len(batch))
                if due > 0:
                    oldest = min(oldest, sent[at] / rate)
                    batch += [topics[number % len(topics)] for number in range(sent[at], sent[at] + due)]
                    sent[at] += due
            if not batch:
                soonest = min(number / rate for number, (rate, _) in zip(sent, self._rates, strict=True))
                gevent.sleep(max(PUBLISH_SECONDS, began + soonest - time.monotonic()))
                continue
            self._generator.measures.took("publish_delay", elapsed - oldest)
            if not self.publish(batch):
                return

    def publish(self, topics: list[str]) -> bool:
        """Publish one event to each of *topics*; return whether to go on."""
        generator = self._generator
        tally = generator.measures.tally
        now = int(time.time() * MICROSECONDS)
        # Over what was published before it, so that a refusal changes nothing.
        next_of: dict[str, tuple[str, Published]] = {}
        events = []
        for topic in topics:
            key = f"{generator.run}.{generator.index}.{self._life}/{topic}"
            before = (next_of.get(key) or generator.published.get(key) or ("", Published(0, now, now)))[1]
            number = before.number + 1
            data = stamp(key, number, now, before.last, before.first, generator.machine, generator.scenario.event_bytes)
            events.append({"topics": [topic], "data": data})
            next_of[key] = (topic, Published(number, before.first, now))
        body = json.dumps(events).encode()
        headers = {"Idempotency-Key": uuid.uuid4().hex} | generator.tokens.headers(
            f"lt-{generator.run}-publisher-{generator.index}"
        )
        began = time.monotonic()
        pause = 0.1
        while True:
            try:
                status, answer = self._poster.post("/publish", body, headers)
            except (OSError, ProtocolError):
                status, answer = 0, b""
            if status == 201:
                generator.measures.took("publish", time.monotonic() - began)
                tally["published"] += len(events)
                generator.published.update(next_of)
                return True
            if status in (400, 401, 403, 404, 413, 415, 422):
                tally["publish_failed"] += len(events)
                tally[f"publish_refused:{status} {_reason(answer)}"] += 1
                return False
            if time.monotonic() - began > REPEAT_SECONDS or not generator.publishing:
                # Whether it was served is not known, so these numbers prove nothing:
                # whatever comes next counts from 1 under another key.
                tally["publish_failed"] += len(events)
                self._life += 1
                return True
            tally["publish_repeated"] += 1
            gevent.sleep(pause * (1 + random.random()))
            pause = min(2.0, pause * 2)


def _reason(answer: bytes) -> str:
    """Return what a problem document says, shortly."""
    try:
        return str(json.loads(answer).get("detail", ""))[:200]
    except (ValueError, AttributeError):
        return ""


KINDS: dict[str, type[Reader]] = {cls.kind: cls for cls in (Subscriber, SlowReader, LimitBreaker, Churner)}
