"""
One stream: one client's position in the window, and its one state machine.

    live    every event is written at once; the stream has no position of its own
    behind  it pulls bounded pieces from the window as its connection takes them
    ended   for exactly one reason

That one rule is the replay and its join with live events, the order, the slow
consumer and the admission of replays: there is no queue and no task per stream.
No sockets here: the connection is a `Sink`.
"""

from collections.abc import Callable
from typing import Protocol

from app.event import Entry, Piece

LIVE = "live"
BEHIND = "behind"
ENDED = "ended"

# Every way in which a stream can end; the same words in logs, metrics, tests and docs.
REASONS = (
    "client_gone",
    "slow_consumer",
    "max_age",
    "token_expired",
    "revoked",
    "evicted",
    "run_ended",
    "draining",
    "server_error",
)


class Sink(Protocol):
    """A stream's connection. It calls the stream's `writable` and `gone`."""

    def write(self, piece: Piece) -> bool:
        """
        Send *piece*. False: part of it waits, do not write until `Stream.writable`.

        Never raises; a connection that turns out to be gone calls `Stream.gone`.
        """

    def close(self, piece: Piece | None) -> None:
        """Send what waits and *piece*, end the response cleanly; bounded in time."""

    def abort(self) -> None:
        """Cut the connection at once."""

    def unsent(self) -> int:
        """Return the bytes that the client has not taken, kernel's included."""


class Stream:
    """
    One client. Made by a route, given to the hub, ended once.

    `cursor` counts while the stream is behind; a live stream's position is the
    later one of its cursor and what the hub has settled.
    """

    __slots__ = (
        "allowed",
        "beat_at",
        "blocked_at",
        "bytes",
        "cursor",
        "due",
        "end_at",
        "event_at",
        "events",
        "head",
        "id",
        "on_end",
        "opened_at",
        "pending",
        "queued",
        "reason",
        "replayed",
        "request_id",
        "resumed_from",
        "sink",
        "state",
        "topics",
        "unsent",
        "user",
        "waiting",
    )

    def __init__(
        self,
        id: str,
        topics: tuple[str, ...],
        cursor: int = 0,
        *,
        user: str | None = None,
        resumed_from: str = "",
        request_id: str = "",
        allowed: Callable[[Entry], bool] | None = None,
        on_end: Callable[["Stream"], None] | None = None,
    ) -> None:
        self.id = id
        self.topics = topics
        self.cursor = cursor
        self.user = user
        self.resumed_from = resumed_from
        self.request_id = request_id
        self.allowed = allowed
        self.on_end = on_end
        self.sink: Sink = None  # type: ignore[assignment]
        self.state = BEHIND
        self.reason = ""
        # Blocks that go out before anything else: `stream.open`, `stream.reset`.
        self.pending = b""
        # The response's head, where the sink has to send it: with the first piece.
        self.head = b""
        self.queued = False  # stands in the hub's queue of streams that may pull
        self.waiting = False  # the sink holds bytes; `writable` will come
        self.blocked_at = 0.0  # when the client last took something while waiting
        self.unsent = 0  # what it had not taken then
        self.opened_at = 0.0
        self.event_at = 0.0  # last write that carried an id
        self.beat_at = 0.0  # last comment
        self.end_at = 0.0  # when its age ends it
        self.due = 0  # the hub's tick that looks at it next
        self.events = 0
        self.bytes = 0
        self.replayed = 0
