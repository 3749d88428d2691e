"""
Publish at a fixed rate, whatever the answers take; every event says its number and time.
"""

import json
import random
import time
import uuid

import gevent

from loadtest.generator import Generator
from loadtest.sequence import MICROSECONDS, Published, stamp
from loadtest.sse_client import Poster, ProtocolError

# Events that are due within this time go in one publish.
PUBLISH_SECONDS = 0.01
BATCH_EVENTS = 200
# A publish that gets no answer is repeated with its key for so long.
REPEAT_SECONDS = 30.0


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
            for at, (rate, topics) in enumerate(self._rates):
                due = min(int(elapsed * rate) + 1 - sent[at], BATCH_EVENTS - len(batch))
                if due > 0:
                    for number in range(sent[at], sent[at] + due):
                        self._generator.measures.took("publish_delay", max(0.0, elapsed - number / rate))
                    batch += [topics[number % len(topics)] for number in range(sent[at], sent[at] + due)]
                    sent[at] += due
            if not batch:
                soonest = min(number / rate for number, (rate, _) in zip(sent, self._rates, strict=True))
                gevent.sleep(max(PUBLISH_SECONDS, began + soonest - time.monotonic()))
                continue
            self._generator.between_publishes.clear()
            try:
                if not self.publish(batch):
                    return
            finally:
                self._generator.between_publishes.set()
        # What a server held up until the end was due, and was not even sent.
        elapsed = self._generator.publishing_ended - began
        for (rate, _), first in zip(self._rates, sent, strict=True):
            for number in range(first, int(elapsed * rate) + 1):
                self._generator.measures.took("publish_delay", elapsed - number / rate)

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
            except (OSError, ProtocolError) as error:
                generator.short_of(error)
                status, answer = 0, b""
                tally[f"publish_refused:{type(error).__name__}"] += 1
            if status == 201:
                generator.measures.took("publish", time.monotonic() - began)
                tally["published"] += len(events)
                generator.published.update(next_of)
                return True
            if status in (400, 401, 403, 404, 413, 415, 422):
                tally["publish_failed"] += len(events)
                tally[f"publish_refused:{status} {_reason(answer)}".strip()] += 1
                return False
            if status:
                tally[f"publish_refused:{status} {_reason(answer)}".strip()] += 1
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
