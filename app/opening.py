"""
Begin one stream: where it stands, and on which connection.

A route decides that a stream may be, and answers with an `Opening`. When Quart
hands over the response's head, the opening takes the connection over from the
server and sends head, `stream.open` and what the stream is owed in one write.
Where the connection cannot be taken over, the server sends the head, and the
stream is the response's body, a generator.
"""

import json
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from wsgiref.handlers import format_date_time

from app.event import RETRY_MAX_MS, encode
from app.handoff import Pulled, take_over
from app.kit import Kit
from app.stream import Stream

# Why a position is none, in the words of a `stream.reset`.
LOST = {
    "unknown_position": "is not an id of this log",
    "epoch_changed": "is of a history that was lost",
    "history_lost": "is older than SSE_HISTORY_SECONDS, or than what fits",
}


# What a client asks for that wants all that is kept.
EARLIEST = "earliest"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream begins. The cursor holds as long as the window was not reset."""

    asked: str = ""
    cursor: int | None = None  # None: at the window's end or begin, wherever that is by then
    resets: int = 0
    lost: str = ""  # why the position that was asked for is none; a key of LOST


class Opening:
    """One stream between the decision that it may be and its first byte."""

    __slots__ = ("_done", "_kit", "_place", "_scope", "_send", "_stream", "_taken", "_turn")

    def __init__(self, kit: Kit, stream: Stream, place: Place, scope: Any) -> None:
        self._kit = kit
        self._stream = stream
        self._place = place
        self._scope = scope
        self._send = scope["extensions"]["sse.send"]
        self._turn = scope["extensions"].get("sse.turn")
        self._done = False
        self._taken = False

    def take(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """
        Take the connection over from the server, which has the head and has not sent it.

        Returns:
            False where the server has to go on by itself, with `body`.
        """
        kit, stream = self._kit, self._stream
        if status != 200 or kit.settings.handoff != "auto":
            return False
        taken = take_over(self._scope, self._send, stream, kit.hub, kit.settings.send_buffer_bytes)
        self._done = taken is not False
        self._taken = bool(taken)
        if not taken:
            # Where the client is gone the server must hear an answer, though an
            # empty one: else the request would never end.
            return False
        stream.head = b"HTTP/1.1 200 OK\r\n%bDate: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % (
            b"".join([b"%b: %b\r\n" % header for header in headers]),
            format_date_time(time.time()).encode(),
        )
        if stream.user is not None:
            stream.on_end = kit.ended_here
        kit.tally.handed_off += 1
        self._begin("handoff")
        return True

    async def body(self) -> AsyncGenerator[bytes]:
        """Yield the stream's bytes, unless its connection was taken over or its client is gone."""
        if self._done:
            return
        kit = self._kit
        pulled = Pulled(self._stream, kit.hub, self._send, kit.settings.send_buffer_bytes)
        self._stream.sink = pulled
        self._begin("generator")
        async with aclosing(pulled.body()) as body:
            async for data in body:
                yield data

    def close(self) -> None:
        """Take note that the request is over; a stream that was not taken over is, too, to its last byte."""
        if not self._taken and self._stream.user is not None:
            self._kit.ended_here(self._stream)

    def _begin(self, path: str) -> None:
        kit, stream = self._kit, self._stream
        kit.logger.info(
            "stream_opened",
            stream=stream.id,
            user=stream.user,
            topics=list(stream.topics),
            resumed_from=stream.resumed_from,
            path=path,
        )
        kit.opening.discard(self._turn)
        kit.tally.resumed += bool(stream.resumed_from)
        kit.hub.add(stream, self._preamble())
        kit.control.begun(stream)
        if kit.draining:
            # The door was passed before the drain began, and the drain is over
            # or has not seen this stream.
            kit.hub.end(stream, "draining", kit.hub.farewell())

    def _preamble(self) -> bytes:
        """Set the stream's cursor; return `stream.open`, and `stream.reset` if it must be."""
        kit, stream, place = self._kit, self._stream, self._place
        hub, window = kit.hub, kit.window
        lost = place.lost
        stream.cursor = window.first if place.asked == EARLIEST else window.end
        if place.cursor is not None:
            # Some turns of the event loop have passed since it was found.
            if place.resets != window.resets:
                lost = "epoch_changed"
            elif place.cursor < window.first:
                lost = "history_lost"
            else:
                stream.cursor = place.cursor
        retry = kit.settings.retry_ms
        preamble = encode(
            # Where history was lost, only the reset may move the client's position:
            # one that is cut off between the two must hear of the loss again.
            id="" if lost else window.id_at(stream.cursor),
            event="stream.open",
            data=json.dumps(
                {
                    "stream": stream.id,
                    "process": kit.process,
                    "topics": stream.topics,
                    "heartbeat_seconds": kit.settings.heartbeat_seconds,
                }
            ),
            retry=min(RETRY_MAX_MS, int(hub.random.uniform(retry, 2 * retry))),
        )
        if lost:
            preamble += hub.reset_block(
                lost,
                name="Last-Event-ID",
                rule=LOST[lost],
                value=place.asked,
                cure="Fetch your state again; this stream goes on from now.",
            )
        return preamble
