"""
Turn one event into the bytes of a text/event-stream, and say what an event may be.

Pure functions and values: no sockets, no clock, no log.
Rule: what would break the framing is refused, never repaired.
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import re
from dataclasses import dataclass
from sys import getsizeof

TOPIC_MAX_CHARACTERS = 255
NAME_MAX_CHARACTERS = 255
# Larger values overflow the timers of some clients, which then reconnect in a
# tight loop: one made 1,114 connects in two seconds with 2**31.
RETRY_MAX_MS = 86_400_000
# Names that only the kit itself may use; a subscriber must be able to trust them.
RESERVED_NAMES = ("stream.", "run.")
# What only one user reads.
USER_TOPICS = "user:"
# A run is a topic with an end. Only the kit writes to these topics.
RUN_TOPICS = "run:"
RUN_NAMES = ("run.token", "run.progress", "run.done", "run.failed")
RUN_ENDS = frozenset({"run.done", "run.failed"})

_TOPIC = re.compile(r"[A-Za-z0-9._~:/@%-]{1,255}")
_LINE_ENDS = re.compile(r"\r\n|\r|\n")


class EventError(ValueError):
    """
    An event, a topic or an id was given that the wire format cannot carry.

    Attributes:
        name: what was wrong, in the words of the caller ("topic", "event").
        rule: the rule that it broke.
        value: what was given.
        cure: what to do instead.
    """

    def __init__(self, name: str, rule: str, value: object, cure: str) -> None:
        self.name = name
        self.rule = rule
        self.value = value
        self.cure = cure
        super().__init__(f"{name} {rule}, got {_shown(value)}. {cure}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:100] + "…" + text[-10:]


@dataclass(frozen=True, slots=True)
class Draft:
    """An event as its publisher gave it: valid, but without a place in the log."""

    topics: tuple[str, ...]
    data: str
    event: str = ""
    retry: int | None = None


class Entry:
    """
    One entry of the log: an event that has its place.

    `position` is opaque here and only compared; nothing but the log knows what
    is in it. An entry without topics reaches nobody, but keeps its place.
    """

    __slots__ = ("_block", "data", "event", "id", "position", "retry", "size", "topics")

    def __init__(
        self,
        position: object,
        id: str,
        topics: tuple[str, ...],
        data: str,
        event: str = "",
        retry: int | None = None,
    ) -> None:
        self.position = position
        self.id = id
        self.topics = topics
        self.data = data
        self.event = event
        self.retry = retry
        # What keeping the entry costs in memory, rather more than less: its text
        # (an emoji makes every character four bytes wide), the block made from it
        # (every line costs six more), and the window's lines of its topics.
        self.size = (
            600
            + getsizeof(data)
            + (len(data) if data.isascii() else len(data.encode("utf-8", "surrogatepass")))
            + 6 * (data.count("\n") + data.count("\r"))
            + sum([400 + len(topic) for topic in topics])
        )
        self._block: bytes | None = None

    @property
    def block(self) -> bytes:
        """The event as text/event-stream; made on first use in this process, then kept."""
        block = self._block
        if block is None:
            block = self._block = encode(id=self.id, event=self.event, data=self.data, retry=self.retry)
        return block


class Piece:
    """
    Bytes that many streams share, framed once as one HTTP/1.1 chunk.

    `chunk` is what a taken-over connection writes; `raw` is the same without
    the framing, for connections whose server does that itself. The first piece
    of one stream can carry the response's head in front.
    """

    __slots__ = ("chunk", "size")

    def __init__(self, raw: bytes, head: bytes = b"") -> None:
        self.chunk = b"%b%x\r\n%b\r\n" % (head, len(raw), raw)
        self.size = len(raw)

    @property
    def raw(self) -> bytes:
        return self.chunk[-2 - self.size : -2]


def encode(*, id: str = "", event: str = "", data: str = "", retry: int | None = None) -> bytes:
    """
    Return one block of text/event-stream, closed by its blank line.

    Lines of *data* end at CR, LF or CRLF; a client reads them all as LF. Empty
    data is written as one empty ``data:`` line, which is an event with empty
    data: a block without any moves the id in Chromium, but not in Firefox.

    Raises:
        EventError: *id* or *event* holds CR, LF or NUL.
    """
    block = ""
    if id:
        check_field("id", id)
        block = f"id: {id}\n"
    if event and event != "message":
        check_field("event", event)
        block += f"event: {event}\n"
    if "\n" in data or "\r" in data:
        for line in _LINE_ENDS.split(data):
            block += f"data: {line}\n" if line else "data:\n"
    else:
        block += f"data: {data}\n" if data else "data:\n"
    if retry is not None:
        block += f"retry: {retry}\n"
    return (block + "\n").encode()


def check_field(name: str, value: str) -> None:
    """Raise EventError where *value* would end its line and forge another field."""
    if "\n" in value or "\r" in value or "\0" in value:
        raise EventError(name, "must not contain CR, LF or NUL", value, "Send line ends in `data` only.")


def check_topic(topic: object) -> str:
    """Return *topic* if it is one; raise EventError where it is not."""
    if not isinstance(topic, str) or not _TOPIC.fullmatch(topic):
        raise EventError(
            "topic",
            f"must be 1 to {TOPIC_MAX_CHARACTERS} characters of A-Z a-z 0-9 . _ ~ : / @ - %",
            topic,
            "Percent-encode other characters.",
        )
    return topic


def check_subscription(topic: object) -> str:
    """Return *topic* if one can subscribe to it: a topic, or a prefix that ends in ``*``."""
    if isinstance(topic, str) and topic.endswith("*"):
        if topic != "*":
            check_topic(topic[:-1])
        return topic
    return check_topic(topic)


def check_open_topic(topic: object) -> str:
    """Return *topic* if others than the kit may publish to it."""
    name = check_topic(topic)
    if name.startswith(RUN_TOPICS):
        raise EventError(
            "topic",
            f"must not begin with `{RUN_TOPICS}`",
            topic,
            "These topics are the events of runs; start one by POST /runs.",
        )
    return name


def check_name(event: object) -> str:
    """Return *event* if a publisher may use it as an event name."""
    if not isinstance(event, str):
        raise EventError("event", "must be a string", event, "Leave it out for `message`.")
    check_field("event", event)
    if len(event) > NAME_MAX_CHARACTERS:
        raise EventError("event", f"must have at most {NAME_MAX_CHARACTERS} characters", event, "Shorten it.")
    if event.startswith(RESERVED_NAMES):
        raise EventError(
            "event",
            "must not begin with `stream.` or `run.`",
            event,
            "These names are the kit's own; choose another.",
        )
    return event


def check_retry(retry: object) -> int:
    """Return *retry* (milliseconds) if it is one that clients can wait for."""
    if isinstance(retry, bool) or not isinstance(retry, int) or not 0 <= retry <= RETRY_MAX_MS:
        raise EventError(
            "retry",
            f"must be a whole number of milliseconds from 0 to {RETRY_MAX_MS}",
            retry,
            "Larger values overflow the timers of some clients.",
        )
    return retry


def matches(subscription: str, topic: str) -> bool:
    """
    Tell whether *subscription* covers *topic*.

    A prefix never reaches a private topic unless it names it, see `private_length`.
    """
    if not subscription.endswith("*"):
        return subscription == topic
    prefix = subscription[:-1]
    return topic.startswith(prefix) and len(prefix) >= private_length(topic)


def private_length(topic: str) -> int:
    """
    Return how many characters a prefix needs at least to reach *topic*: 0 for most.

    A user's own events, and what somebody asked a model for, are private: ``*`` and
    ``u*`` are not enough, ``user:*`` and ``run:*`` are.
    """
    if topic.startswith(USER_TOPICS):
        return len(USER_TOPICS)
    if topic.startswith(RUN_TOPICS):
        return len(RUN_TOPICS)
    return 0


def covers(pattern: str, subscription: str) -> bool:
    """
    Tell whether *pattern* contains all that *subscription* stands for.

    So what reaches a stream by a subscription that was granted needs no second
    look: ``orders/*`` covers ``orders/eu/*``, but not ``order*`` or ``*``.
    """
    if not subscription.endswith("*"):
        return matches(pattern, subscription)
    # As a topic, the prefix is held to the same rule for private topics.
    return pattern.endswith("*") and matches(pattern, subscription[:-1])


# A comment; wakes nothing in the client and keeps proxies from closing.
HEARTBEAT = Piece(b":\n\n")
