"""
The kinds of users that Locust starts, one greenlet each.
"""

import random
import time
from typing import Any, ClassVar

import gevent
from locust import User

from loadtest.generator import Generator, Stream
from loadtest.publishing import Publishing
from loadtest.runs import RunStream

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
            with generator.own_faults():
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


class RunReader(Reader):
    """
    Starts a run by plan, every `run_every` seconds, and reads it to its end.

    The plan does not wait for the server: a run that was due earlier has its first token
    later by that, and starts that a run before it did not leave time for are counted.
    """

    kind = "run"

    def make(self, generator: Generator, ordinal: int) -> RunStream:
        return RunStream(generator, ordinal, due=time.monotonic())

    def hold(self, stream: Stream) -> None:
        generator, ordinal = stream.generator, stream.number
        stream.leave()
        every = generator.scenario.run_every
        due = time.monotonic() + every * random.random()
        while generator.publishing:
            gevent.sleep(max(0.0, due - time.monotonic()))
            if not generator.publishing:
                break
            run = RunStream(generator, ordinal, due=due)
            try:
                run.run()
            finally:
                run.leave()
            if run.gave_up:
                return
            due += every
            if (late := time.monotonic() - due) > 0:
                skipped = int(late / every) + 1
                generator.measures.tally["runs_skipped"] += skipped
                due += skipped * every


class Publisher(User):
    """
    Publishes to this process's share of the topics, at a fixed rate, whatever the answers take.

    One per process. An event says when it was really sent; how late each was is measured
    apart (`publish_delay`): a server that stalls delays all that were due meanwhile.
    """

    kind = "publisher"

    def run(self) -> None:
        assert current is not None
        generator = current
        ordinal = generator.ordinal(self.kind)
        try:
            # A second one of the same process would publish everything twice.
            if ordinal < generator.workers:
                with generator.own_faults():
                    Publishing(generator).run()
            gevent.sleep(10**8)
        finally:
            generator.give_back(self.kind, ordinal)


KINDS: dict[str, type[Reader]] = {cls.kind: cls for cls in (Subscriber, SlowReader, LimitBreaker, Churner, RunReader)}
