"""
Turn the bytes of a text/event-stream back into events, whatever way they were cut.

Follows the WHATWG text to the letter: a byte order mark, three kinds of line end,
sticky ids, U+FFFD for broken UTF-8.
Pure: no sockets, no clock, standard library only.
Time is linear in the bytes fed, also for one huge event that arrives in tiny pieces.
https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from dataclasses import dataclass

__all__ = ["EventTooLong", "Parser", "ServerSentEvent"]

_BOM = b"\xef\xbb\xbf"
_CR, _LF = 13, 10

# Python refuses to convert thousands of digits; nobody waits for 30,000 years anyway.
_LONGEST_RETRY_MS = 10**15


@dataclass(slots=True)
class ServerSentEvent:
    """
    One dispatched event.

    *event* is ``message`` when the server named none.
    *id* is the stream's last event id at dispatch, so an event without an ``id:`` of
    its own carries the one before.
    """

    event: str
    data: str
    id: str


class EventTooLong(ValueError):
    """
    The server sent more bytes for one event than the parser may hold.

    *events* are those that the same `Parser.feed` call had completed before.
    The parser takes no more bytes.
    """

    name = "event"
    cure = "Raise max_event_bytes, or make the server send less."

    def __init__(self, limit: int, held: int, events: list[ServerSentEvent]) -> None:
        self.rule = f"must fit into {limit:,} bytes"
        self.value = f"{held:,} bytes so far"
        self.events = events
        super().__init__(f"{self.name} {self.rule}, got {self.value}. {self.cure}")


class Parser:
    """
    Bytes in, events out, for one response body.

    Args:
        last_event_id: The id to begin with. A client that reconnects gives the one it
            resumes from, so that events without an id go on carrying it.
        max_event_bytes: Longest line plus the data held before it; None for no limit.

    The end of the body needs no call: the standard drops a block that its blank line did not end.
    """

    __slots__ = (
        "_after_cr",
        "_cut",
        "_cut_bytes",
        "_data",
        "_data_bytes",
        "_event",
        "_failure",
        "_id",
        "_limit",
        "_start",
        "last_event_id",
        "retry_ms",
    )

    def __init__(self, *, last_event_id: str = "", max_event_bytes: int | None = None) -> None:
        self.last_event_id = last_event_id
        self.retry_ms: int | None = None
        self._limit = max_event_bytes
        self._id = last_event_id
        self._event = b""
        self._data: list[bytes] = []
        self._data_bytes = 0
        # The line that the end of the last feed cut, in pieces: joining them once keeps
        # the time linear.
        self._cut: list[bytes] = []
        self._cut_bytes = 0
        # The last feed ended in CR: its line was taken at once, and an LF that comes
        # next belongs to it.
        self._after_cr = False
        # First bytes of the body while they may become a byte order mark; then None.
        self._start: bytes | None = b""
        self._failure: EventTooLong | None = None

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """
        Take the next bytes, cut anywhere, and return the events they complete.

        Raises:
            EventTooLong: One event exceeded *max_event_bytes*; so does every later call.
        """
        if self._failure is not None:
            raise self._failure
        if self._start is not None:
            data = self._skip_bom(data)
        if not data:
            return []
        if self._after_cr:
            self._after_cr = False
            if data[0] == _LF:
                data = data[1:]
                if not data:
                    return []

        # On bytes, splitlines() knows CR, LF and CRLF and nothing else, and none of them
        # occurs within a UTF-8 sequence: so lines are split first, then values decoded.
        lines = data.splitlines()
        ended = data[-1]
        if ended == _CR:
            self._after_cr = True
        if self._cut:
            self._cut.append(lines[0])
            if len(lines) == 1 and ended != _LF and ended != _CR:
                return self._hold(len(data), [])
            lines[0] = b"".join(self._cut)
            self._cut.clear()
            self._cut_bytes = 0
        if ended != _LF and ended != _CR:
            piece = lines.pop()
            events = self._take(lines)
            self._cut.append(piece)
            return self._hold(len(piece), events)
        return self._take(lines)

    def _take(self, lines: list[bytes]) -> list[ServerSentEvent]:
        """Interpret complete lines."""
        events: list[ServerSentEvent] = []
        for line in lines:
            if not line:
                # The id counts even when the block has no data and so makes no event.
                self.last_event_id = self._id
                if self._data:
                    events.append(
                        ServerSentEvent(
                            self._event.decode("utf-8", "replace") or "message",
                            b"\n".join(self._data).decode("utf-8", "replace"),
                            self._id,
                        )
                    )
                    self._data.clear()
                    self._data_bytes = 0
                self._event = b""
                continue
            if self._limit is not None and len(line) + self._data_bytes > self._limit:
                self._fail(len(line) + self._data_bytes, events)
            # A comment has an empty name and so falls through every branch.
            name, _, value = line.partition(b":")
            if value[:1] == b" ":
                value = value[1:]
            if name == b"data":
                self._data.append(value)
                # One more for its LF, so that a flood of empty lines has a weight too.
                self._data_bytes += len(value) + 1
            elif name == b"id":
                if b"\0" not in value:
                    self._id = value.decode("utf-8", "replace")
            elif name == b"event":
                self._event = value
            elif name == b"retry" and value.isdigit():
                digits = value.lstrip(b"0") or b"0"
                self.retry_ms = int(digits) if len(digits) <= 15 else _LONGEST_RETRY_MS
        return events

    def _hold(self, count: int, events: list[ServerSentEvent]) -> list[ServerSentEvent]:
        """Count *count* bytes more of the cut line; return *events* if they may be held."""
        self._cut_bytes += count
        if self._limit is not None and self._cut_bytes + self._data_bytes > self._limit:
            self._fail(self._cut_bytes + self._data_bytes, events)
        return events

    def _fail(self, held: int, events: list[ServerSentEvent]) -> None:
        assert self._limit is not None
        self._cut.clear()
        self._data.clear()
        self._failure = EventTooLong(self._limit, held, [])
        raise EventTooLong(self._limit, held, events)

    def _skip_bom(self, data: bytes) -> bytes:
        """Drop one byte order mark at the very start; delay only what may become one."""
        assert self._start is not None
        data = self._start + data
        if len(data) < len(_BOM) and _BOM.startswith(data):
            self._start = data
            return b""
        self._start = None
        return data.removeprefix(_BOM)
