"""
The log: every event in one order, for all processes. Its interface and its words.

Two backends stand behind it: `redis_log` (several processes) and `memory_log`
(one process, for development and tests). Only they know what is in a position:
elsewhere a position is opaque and has an order.
"""

import hashlib
import re
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from app.event import (
    RUN_NAMES,
    RUN_TOPICS,
    Draft,
    Entry,
    EventError,
    check_name,
    check_open_topic,
    check_retry,
    check_topic,
)

FORMAT = "1"


class Position(NamedTuple):
    """A place in the log. Compare it; never look inside outside of the log."""

    ms: int
    seq: int


ORIGIN = Position(0, 0)

# What follows an id that an evicted stream ended with. Clients send it back as it is.
_MARK = "~e"
_ID = re.compile(r"([a-z0-9]{1,16}):([0-9]{1,20})-([0-9]{1,20})(?:" + _MARK + ")?")
# Redis counts both parts of its ids in 64 bits, and refuses larger ones.
_MOST = 2**64 - 1


class LogUnavailable(Exception):
    """The log did not answer, or refused for a reason that passes: try again later."""


class IdempotencyConflict(Exception):
    """An `Idempotency-Key` was used again with another body."""


@dataclass(frozen=True, slots=True)
class LogState:
    """
    What the log says about itself, all at one instant.

    Attributes:
        epoch: names this history of the log; None where it has none (any more).
        first: the oldest entry's position, None when the log is empty.
        last: the newest position ever given in this history.
        added: entries ever added.
        length: entries now kept.
        has_cursor: whether the entry that was asked for is still there.
        now_ms: the log's own clock.
    """

    epoch: str | None
    first: Position | None
    last: Position
    added: int
    length: int
    has_cursor: bool
    now_ms: int


@dataclass(frozen=True, slots=True)
class Notice:
    """
    What one process tells all of them, itself included, beside the log.

    Attributes:
        kind: what it is about; a process that does not know the kind ignores it,
            so that two versions can run side by side.
        fields: the rest, as the kind wants it.
    """

    kind: str
    fields: dict[str, str]


@dataclass(frozen=True, slots=True)
class Batch:
    """Drafts that are published together: all or none, in one order."""

    drafts: tuple[Draft, ...]
    key: str
    fingerprint: str
    # A key that this process made for its own retries is not worth keeping long.
    own_key: bool

    @classmethod
    def of(cls, drafts: Sequence[Draft], key: str | None = None) -> "Batch":
        """Return *drafts* as a batch under the client's *key*, or one made here."""
        own = key is None
        name = f"own:{secrets.token_hex(16)}" if own else f"client:{key}"
        return cls(tuple(drafts), name, fingerprint(drafts), own)


def fingerprint(drafts: Sequence[Draft]) -> str:
    """
    Return 32 characters that are the same for the same events, in every process.

    Redis keeps them beside an `Idempotency-Key` for minutes, and during a
    rollout another version of the kit compares them. So they are made from the
    log's documented fields, each with its length in characters, and begin with
    the version of this recipe: change it, and the new version has to recognise
    the old one too. A field that an event does not have adds nothing, so a new
    optional field changes no fingerprint of events without it.
    """
    parts = []
    for draft in drafts:
        fields = to_fields(draft)[2:]  # without the format's version: how it is stored
        parts.append(f"{len(fields)};" + "".join([f"{len(field)}:{field}," for field in fields]))
    return "1" + hashlib.sha256("".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:31]


class Log(Protocol):
    """
    One log. Every method raises LogUnavailable when it cannot be reached.

    Attributes:
        notices: what came with the reads so far, oldest first; whoever reads
            takes them out. None is of before this process's first `open`.
    """

    notices: deque[Notice]

    async def open(self) -> None:
        """Connect, give the log an epoch if it has none, and check its configuration."""

    async def publish(self, batch: Batch) -> list[str]:
        """
        Append *batch* and return the ids, or those of its first publication.

        Raises:
            IdempotencyConflict: the key came before with other events.
        """

    async def state(self, cursor: Position) -> LogState:
        """Return the log's state; `has_cursor` is about the entry at *cursor*."""

    async def read(self, epoch: str, after: Position, count: int, block_seconds: float) -> list[Entry]:
        """
        Return up to *count* entries after *after*; wait up to *block_seconds* for one.

        A notice ends the wait too; it is then in `notices`.
        """

    async def notify(self, notice: Notice) -> None:
        """Tell every process *notice*; it arrives with their next read, once."""

    async def renew_epoch(self, expected: str | None) -> str:
        """Replace the epoch if it still is *expected*; return the one that now holds."""

    async def has(self, position: Position) -> bool:
        """Tell whether the log has an entry at *position*."""

    async def trim(self) -> None:
        """Drop what is older than the history, by the log's own clock, then by length."""

    async def ping(self) -> bool:
        """Tell whether the log answers somebody else than the reader."""

    async def close(self) -> None:
        """Let go of all connections."""


def write_id(epoch: str, position: Position) -> str:
    """Return the event id of *position*: short, plain ASCII, opaque to clients."""
    return f"{epoch}:{position.ms}-{position.seq}"


def read_id(id: str) -> tuple[str, Position] | None:
    """Return epoch and position of an id, None where it never was one of ours."""
    match = _ID.fullmatch(id)
    if match is None:
        return None
    position = Position(int(match[2]), int(match[3]))
    return None if max(position) > _MOST else (match[1], position)


def mark_id(id: str) -> str:
    """
    Return *id* with a mark: the same position, held by a client that was evicted.

    It comes back with it by itself, and must not evict another in turn: two
    tabs would throw each other out for ever.
    """
    return id + _MARK


def is_marked(id: str) -> bool:
    """Tell whether *id* was given by `mark_id`."""
    return id.endswith(_MARK)


def made_ms(position: Position) -> int:
    """Return when the entry at *position* was made, in ms of the log's clock."""
    return position.ms


def to_fields(draft: Draft) -> list[str]:
    """
    Return *draft* as the log's documented fields, which any service may write.

    ``v 1 topics "a b" event NAME data TEXT retry MS``; event and retry are optional.
    """
    fields = ["v", FORMAT, "topics", " ".join(draft.topics)]
    if draft.event in RUN_NAMES:
        # The kit's own mark. Other services do not write it: they have no runs.
        fields += ["run", "1"]
    if draft.event:
        fields += ["event", draft.event]
    fields += ["data", draft.data]
    if draft.retry is not None:
        fields += ["retry", str(draft.retry)]
    return fields


def to_notice_fields(notice: Notice) -> list[str]:
    """Return *notice* as fields of the control log: ``v 1 kind KIND`` and its own."""
    fields = ["v", FORMAT, "kind", notice.kind]
    for name, value in notice.fields.items():
        fields += [name, value]
    return fields


def from_notice_fields(fields: dict[bytes, bytes]) -> Notice | None:
    """Return the notice of *fields*, None where another version of the kit means something else by them."""
    try:
        named = {name.decode(): value.decode() for name, value in fields.items()}
    except UnicodeDecodeError:
        return None
    if named.pop("v", None) != FORMAT:
        return None
    kind = named.pop("kind", "")
    return Notice(kind, named) if kind else None


def from_fields(
    epoch: str,
    position: Position,
    fields: dict[bytes, bytes],
    max_topics: int,
    max_event_bytes: int,
) -> Entry:
    """
    Return the entry of *fields*.

    Fields written by other services are checked as if they came by HTTP. A
    broken entry has no topics, and says in `data` what is wrong: it reaches
    nobody and keeps its place, so that positions and counts stay true.
    """
    id = write_id(epoch, position)
    try:
        version = fields.get(b"v")
        if version != FORMAT.encode():
            raise EventError("v", "must be 1", version, "This kit writes version 1.")
        of_run = b"run" in fields
        unknown = fields.keys() - {b"v", b"topics", b"event", b"data", b"retry", b"run"}
        if unknown:
            raise EventError("field", "must be one of v, topics, event, data, retry", min(unknown), "Leave it out.")
        topics = tuple(dict.fromkeys(fields.get(b"topics", b"").decode().split(" ")))
        for topic in topics:
            check_topic(topic) if of_run else check_open_topic(topic)
        if len(topics) > max_topics:
            raise EventError("topics", f"must be at most {max_topics}", len(topics), "Publish to fewer.")
        raw = fields.get(b"data")
        if raw is None:
            raise EventError("data", "must be there", None, "Write an empty one for an event without data.")
        if len(raw) > max_event_bytes:
            raise EventError(
                "data", f"must have at most {max_event_bytes} bytes", len(raw), "Send a link to it instead."
            )
        event = fields.get(b"event", b"").decode()
        if of_run:
            if event not in RUN_NAMES or len(topics) != 1 or not topics[0].startswith(RUN_TOPICS):
                raise EventError("run", "must mark one event of one run", event, "Leave it out; it is the kit's own.")
        else:
            check_name(event)
        retry = None
        given = fields.get(b"retry")
        if given is not None:
            # Digits alone: `int` would also take signs, spaces and underscores.
            retry = check_retry(int(given) if given.isdigit() and len(given) <= 8 else given)
        return Entry(position, id, topics, raw.decode(), event, retry)
    except ValueError as error:  # EventError and UnicodeDecodeError are ones
        return Entry(position, id, (), str(error))
