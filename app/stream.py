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
from math import inf
from typing import Protocol

from app.event import Piece

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
    """A stream's connection. It calls the hub's `writable` and `gone`."""

    def write(self, piece: Piece, sent: int = 0) -> bool:
        """
        Send *piece*, but for the first *sent* bytes of its chunk, which have gone.

        Never raises; a connection that turns out to be gone calls `Hub.gone`.

        Returns:
            False where part of it waits: do not write until `Hub.writable`.
        """

    def close(self, piece: Piece | None) -> None:
        """Send what waits and *piece*, end the response cleanly; bounded in time."""

    def abort(self) -> None:
        """Cut the connection at once."""

    def unsent(self) -> int:
        """Return the bytes that the client has not taken, kernel's included."""


# Room for a terabyte in the lower half of `Stream.sent`.
_BYTES_BITS = 40
_BYTES_MASK = (1 << _BYTES_BITS) - 1


def packed(events: int, size: int) -> int:
    """Return both in one number, so that a delivery counts with one addition."""
    return (events << _BYTES_BITS) + size


def send_nothing(chunk: bytes) -> int:
    """Stand where a sink has no short way for live events: all goes by `Sink.write`."""
    return 0


class _Hot:
    """What each delivery touches, side by side: on a cold cache that is 2 % of it."""

    __slots__ = ("cursor", "event_at", "send", "sent", "state")


class Stream(_Hot):
    """
    One client. Made by a route, given to the hub, ended once.

    `send` is the short way for live events, without a call of ours in between:
    it gives a chunk to the kernel and returns how many bytes were taken, or
    raises OSError. What it did not take, `sink` sends.

    `cursor` counts while the stream is behind; a live stream's position is the
    later one of its cursor and what the hub has settled.
    """

    __slots__ = (
        "__weakref__",
        "beat_at",
        "blocked_at",
        "deadline",
        "due",
        "end_at",
        "expires_at",
        "head",
        "id",
        "of_run",
        "on_end",
        "opened_at",
        "owned",
        "pending",
        "queued",
        "reason",
        "replayed",
        "request_id",
        "resumed_from",
        "sink",
        "ticket",
        "topics",
        "unsent",
        "user",
        "waiting",
        "warned",
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
        expires_at: float = inf,
        ticket: str | None = None,
        on_end: Callable[["Stream"], None] | None = None,
        of_run: bool = False,
        owned: bool = False,
    ) -> None:
        self.id = id
        self.topics = topics
        self.cursor = cursor
        self.user = user
        self.resumed_from = resumed_from
        self.request_id = request_id
        self.expires_at = expires_at  # when its rights end, by the hub's clock
        self.ticket = ticket  # the hash of the ticket that it was opened with
        self.on_end = on_end
        self.of_run = of_run  # ends with its one topic, a run
        self.owned = owned  # its user made what it reads, and needs no other right to it
        self.sink: Sink = None  # type: ignore[assignment]
        self.send: Callable[[bytes], int] = send_nothing
        self.state = BEHIND
        # Set before it has begun where it is to end as soon as it has.
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
        self.deadline = 0.0  # the next of: its age, its expiry, the warning of that
        self.warned = False  # `stream.expiring` is out
        self.due = 0  # the hub's tick that looks at it next
        # Events and bytes so far, `packed`, without what the hub has counted for
        # all streams of a subscription: it adds that when the stream ends.
        self.sent = 0
        self.replayed = 0

    @property
    def events(self) -> int:
        """Events written, those of the kit not counted. True when the stream has ended."""
        return self.sent >> _BYTES_BITS

    @property
    def bytes(self) -> int:
        """Bytes of text/event-stream written. True when the stream has ended."""
        return self.sent & _BYTES_MASK
