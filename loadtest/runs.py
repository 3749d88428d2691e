"""
Runs as a reader sees them: when the first token came, how far apart they came, and which never did.

A run is started by `POST /runs` and read to `run.done` or `run.failed`, by its id where
the connection broke. The kit's offline generator repeats the prompt, whose words are
numbered; of another model's answer only the end and events that come twice are judged.
"""

import json
import random
import time
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import gevent

from app.parser import ServerSentEvent
from loadtest.generator import Stream
from loadtest.sequence import Published, Words, prompt
from loadtest.sse_client import RETRY_JITTER, RETRY_SECONDS

if TYPE_CHECKING:
    from loadtest.generator import Generator

# What the offline generator calls itself in `run.done`.
OFFLINE = "offline generator"
# The kit promises an end within five seconds, also of a run whose process was killed.
QUIET_SECONDS = 6.0
# These pass: the same is asked again. The others will not change.
LATER = (408, 425, 429, 500, 502, 503, 504)


class RunStream(Stream):
    """
    One run, from its start to its end.

    Args:
        due: When it was to be started, on the monotonic clock: the first token counts from there.

    Attributes:
        over: Its last event was read.
        gave_up: It was refused for a reason that stays.
    """

    __slots__ = (
        "asked", "due", "gave_up", "heard_at", "ids", "key", "over", "pause", "reading", "run_id", "token_at", "words",
    )  # fmt: skip

    def __init__(self, generator: "Generator", ordinal: int, *, due: float) -> None:
        super().__init__(generator, ordinal, topics=())
        self.asked = generator.scenario.run_words
        self.due = due
        # Whoever gets no answer asks again with the same key, and starts no second run.
        self.key = uuid.uuid4().hex
        self.run_id = ""
        self.words = Words()
        self.ids: set[str] = set()
        # When the last token came on this connection, and when anything of the run was heard.
        self.token_at: float | None = None
        self.heard_at = time.monotonic()
        self.over = self.gave_up = self.reading = False
        self.pause: float | None = None

    def run(self) -> None:
        """Start the run and read it to its end, or until it is refused."""
        self.reading = True
        while self.once() or self.pause is not None:
            if self.over:
                return
            pause = self.retry_seconds if self.pause is None else self.pause
            self.pause = None
            gevent.sleep(pause * (1 + RETRY_JITTER * random.random()))
        self.reading = False
        if self.run_id and not self.over:
            self.generator.measures.tally["runs_unended"] += 1

    def request(self) -> tuple[str, str, dict[str, str], bytes]:
        user = "" if self.generator.tokens.named else f"?user={quote(self.user, safe='')}"
        if self.run_id:
            return "GET", f"/runs/{self.run_id}/events{user}", {}, b""
        body = json.dumps({"kind": "chat", "prompt": prompt(self.asked)}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Idempotency-Key": self.key}
        return "POST", f"/runs{user}", headers, body

    def cut(self, why: str) -> None:
        """Break the connection, unless only its end is still to be read."""
        if not self.over:
            super().cut(why)

    # --- What is heard

    def opened(self, seconds: float, data: str) -> None:
        super().opened(seconds, data)
        self.heard_at = time.monotonic()
        if not self.run_id:
            self.generator.measures.tally["runs"] += 1
            self.run_id = _run_of(data)

    def take(self, events: list[ServerSentEvent]) -> None:
        generator = self.generator
        if generator.closed or self.over:
            return
        now = time.monotonic()
        measures = generator.measures
        tally = measures.tally
        for event in events:
            if event.event == "run.token":
                # What is no token has no words: those that it should have had are missed.
                words = str(_object(event.data).get("text", "")).split()
                tally["deliveries"] += 1
                tally["tokens"] += len(words)
                if self.token_at is not None:
                    measures.took("between_tokens", now - self.token_at)
                elif not self.ids:
                    measures.took("first_token", now - self.due)
                self.token_at = self.heard_at = now
                if event.id in self.ids:
                    tally["tokens_duplicate"] += len(words)
                    continue
                self.ids.add(event.id)
                for word in words:
                    self.words.see(tally, word)
            elif event.event in ("run.done", "run.failed"):
                self._end(event.event, _object(event.data))
        super().take([event for event in events if event.event.startswith("stream.")])

    def _end(self, event: str, data: dict[str, Any]) -> None:
        tally = self.generator.measures.tally
        self.over = True
        self.farewell = "run_ended"
        if event == "run.failed":
            tally["runs_failed"] += 1
            tally[f"run_failed:{data.get('reason')}"] += 1
            return
        tally["runs_done"] += 1
        if data.get("model") == OFFLINE and isinstance(told := data.get("tokens"), int):
            self.words.end(tally, self.asked, told)
        else:
            tally["runs_unjudged"] += 1

    def ended(self, clean: bool) -> None:
        super().ended(clean)
        self.token_at = None

    def refused(self, status: int, body: bytes) -> None:
        tally = self.generator.measures.tally
        tally[f"refused:{status}"] += 1
        if self.run_id:
            # It began, so its reader wants it; 204 and 410 say that there is nothing more.
            self.pause = RETRY_SECONDS if status in LATER else None
            return
        tally["runs_refused"] += 1
        self.gave_up = status not in LATER
        tally["gave_up"] += self.gave_up

    # --- The end of the load test

    def behind(self, expected: dict[str, list[tuple[str, Published]]]) -> int:
        """Return whether its end is still to come, or even an answer to its start."""
        return int(self.reading and not self.over)

    def miss(self, expected: dict[str, list[tuple[str, Published]]]) -> None:
        """Count it as without an end, unless it still goes on: a model may take minutes."""
        if time.monotonic() - self.heard_at > QUIET_SECONDS:
            self.generator.measures.tally["runs_unended"] += 1


def _object(data: str) -> dict[str, Any]:
    """Return the object that an event's data is; an empty one of other data."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _run_of(data: str) -> str:
    """Return the run's id, which is in the topic that `stream.open` tells."""
    topics = _object(data).get("topics")
    return str(topics[0]).partition("run:")[2] if isinstance(topics, list) and topics else ""
