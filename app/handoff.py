"""
Take a stream's connection over from Hypercorn, or serve it where that cannot be.

Quart decides (rights, topics, position, head); then a stream that stays in the
framework costs four tasks, a generator and a copy per event. So when Quart
hands over the head, `take_over` gives the connection's transport a small
protocol of ours and lets the request end: an idle stream is one `Stream` and
one `Connection`. The head goes out with the first events, in one write.

How it reaches the transport, in Hypercorn 0.18.0, each step checked by type:
the ASGI `send` is a method of `HTTPStream`, whose `send` is a method of
`H11Protocol`, whose `send` is a method of `TCPServer`, which holds the
`StreamWriter` with the transport. Then

* the transport gets our protocol: what the client sends or closes comes to us;
* `H11Protocol` and `TCPServer` lose their way to the socket, so that neither
  what the request still says nor `_close` reaches it;
* `H11Protocol` loses its parser: bytes after the request would have it wait,
  for ever, until they may be looked at;
* the `StreamWriter` loses its transport, which its `__del__` would close;
* the reader forgets what a client sent after its request, and gets EOF, which
  ends the connection's task in the ordinary way.

Chunk framing is ours from then on. Every head carries ``Connection: close``:
without it nginx reuses connections that are no longer Hypercorn's.

Where anything is not as expected (HTTP/2, HTTP/1.0, TLS straight into
Hypercorn, another server), `Pulled` serves the same stream as a generator.
"""

import array
import asyncio
import fcntl
import socket
import termios
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import h11
from h2.exceptions import ProtocolError
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import EventWrapper
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream

from app.event import Piece
from app.hub import Hub
from app.stream import Stream, send_nothing

# A peer that takes nothing never finishes closing; then the connection is cut.
CLOSE_SECONDS = 2.0
# A generator may hold this much that its server has not taken yet, and gives it
# in pieces of this size: progress of a slow client is seen piece by piece.
_PULLED_BYTES = 65_536
_PULLED_PIECE = 16_384
_LAST_CHUNK = b"0\r\n\r\n"
# So that Python's own socket never waits. macOS takes it from the descriptor alone.
_NONBLOCK: int = getattr(socket, "SOCK_NONBLOCK", 0)


class _Closed:
    """Stands where a StreamWriter had its transport."""

    def is_closing(self) -> bool:
        return True

    def abort(self) -> None:
        pass


_CLOSED = _Closed()


class _Deaf:
    """Stands where `H11Protocol` had its parser: nothing came, and nothing will."""

    they_are_waiting_for_100_continue = False
    our_state = their_state = h11.MUST_CLOSE

    def receive_data(self, data: bytes) -> None:
        pass

    def next_event(self) -> Any:
        return h11.NEED_DATA


_DEAF: Any = _Deaf()


class Connection(asyncio.Protocol):
    """A sink on a transport that was Hypercorn's. See `app.stream.Sink`."""

    __slots__ = ("_hub", "_socket", "_stream", "_timer", "_transport")

    def __init__(self, transport: asyncio.Transport, fd: int, stream: Stream, hub: Hub) -> None:
        self._transport = transport
        # The transport's descriptor, lent until `connection_lost`. Its `send` is
        # send(2), which takes a shorter way through the kernel than write(2).
        self._socket = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM | _NONBLOCK, 0, fd)
        self._stream = stream
        self._hub = hub
        self._timer: asyncio.TimerHandle | None = None
        stream.send = self._socket.send

    def write(self, piece: Piece, sent: int = 0) -> bool:
        chunk = piece.chunk
        if not sent:
            try:
                sent = self._socket.send(chunk)
            except BlockingIOError:
                pass
            except OSError:
                self.abort()
                self._hub.gone(self._stream)
                return True
        if sent == len(chunk):
            return True
        self._put(memoryview(chunk)[sent:])
        # The client may have made room since: then the transport sent the rest
        # at once, never paused, and no `resume_writing` would ever come.
        return self._transport.get_write_buffer_size() == 0

    def close(self, piece: Piece | None) -> None:
        self._put(_LAST_CHUNK if piece is None else piece.chunk + _LAST_CHUNK)
        if not self._transport.is_closing():
            self._transport.close()
        self._timer = asyncio.get_running_loop().call_later(CLOSE_SECONDS, self.abort)
        _closing.add(self)

    def abort(self) -> None:
        # `close` first: asyncio's transport then forgets its own methods, which
        # would keep it in memory until the cyclic collector comes by.
        self._transport.close()
        self._transport.abort()

    def unsent(self) -> int:
        return self._transport.get_write_buffer_size() + _unacknowledged(self._socket.fileno())

    # --- asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        """Drop what a client sends after its request: pipelined bytes and garbage."""

    def eof_received(self) -> bool:
        # A half-closed client counts as gone, as in Hypercorn. To close alone
        # would wait for it to take what is still unsent.
        self._hub.gone(self._stream)
        self.abort()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        # The transport closes the descriptor after this: let go of it, or this
        # object would close somebody else's one day.
        self._stream.send = send_nothing
        self._socket.detach()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            _closing.discard(self)
        self._hub.gone(self._stream)

    def pause_writing(self) -> None:
        """Nothing to do: the stream waits since `write` said False."""

    def resume_writing(self) -> None:
        self._hub.writable(self._stream)

    def _put(self, data: bytes | memoryview) -> None:
        # uvloop raises on a closed transport; unguarded, one stream would stop
        # the fan-out to all.
        if not self._transport.is_closing():
            with suppress(RuntimeError, OSError):
                self._transport.write(data)


# Connections whose stream has ended and whose client has not yet taken the end.
_closing: set[Connection] = set()


async def all_closed() -> None:
    """
    Return when all connections of ended streams are closed; `CLOSE_SECONDS` at most.

    Hypercorn does not know of them: without this the process would end, and cut
    what slow clients have not taken.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + CLOSE_SECONDS
    while _closing and loop.time() < until:  # noqa: ASYNC110  once in a process's life
        await asyncio.sleep(0.01)


class Pulled:
    """
    A sink whose bytes a generator yields to whatever server there is.

    See `app.stream.Sink`. A stream for which much is held here is behind until
    the server has taken it. A server's `send` waits for ever for a
    client that reads nothing, so where the connection below can be seen, it is
    used to see progress and to cut.
    """

    __slots__ = ("_below", "_cut", "_ended", "_held", "_hub", "_pieces", "_stream", "_wanted")

    def __init__(self, stream: Stream, hub: Hub, send: Any, send_buffer: int) -> None:
        self._stream = stream
        self._hub = hub
        # Views of bytes that all streams share, and how long they are together.
        self._pieces: deque[memoryview] = deque()
        self._held = 0
        self._ended = False
        self._cut = False
        self._wanted: asyncio.Future[None] | None = None
        self._below = below = _below(send)
        if below.transport is not None and not below.transport.is_closing():
            _tune(below.transport.get_extra_info("socket"), send_buffer)
            if below.frames is None:
                # `send` returns when the kernel has all: nothing hides in between.
                # Not 0: over TLS that is reached by an empty buffer, for ever.
                below.transport.set_write_buffer_limits(high=1)

    def write(self, piece: Piece, sent: int = 0) -> bool:
        self._pieces.append(memoryview(piece.chunk)[-2 - piece.size : -2])
        self._held += piece.size
        self._wake()
        return self._held < _PULLED_BYTES

    def close(self, piece: Piece | None) -> None:
        if piece is not None:
            self.write(piece)
        self._ended = True
        self._wake()
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, self.abort)

    def abort(self) -> None:
        self._pieces.clear()
        self._held = 0
        self._ended = self._cut = True
        self._wake()
        below = self._below
        if below.transport is None:
            return
        # Over HTTP/2 the transport is not this stream's alone. It goes only where
        # there is room in the stream's window: then the client reads none of them.
        if below.frames is None or (below.frames.buffer and below.room() > 0):
            below.transport.abort()

    def unsent(self) -> int:
        unsent = self._held
        below = self._below
        if below.frames is not None:
            return unsent + len(below.frames.buffer)
        if below.transport is not None:
            unsent += below.transport.get_write_buffer_size()
            sock = below.transport.get_extra_info("socket")
            unsent += 0 if sock is None else _unacknowledged(sock.fileno())
        return unsent

    async def body(self) -> AsyncGenerator[bytes]:
        """Yield what the stream writes, until it ends."""
        try:
            while True:
                if self._left():
                    return
                if self._pieces:
                    yield self._next()
                    await self._framed()
                    if not self._pieces:
                        self._hub.writable(self._stream)
                elif self._ended:
                    return
                else:
                    await self._woken()
        finally:
            self._hub.gone(self._stream)

    def _next(self) -> bytes:
        taken = []
        room = _PULLED_PIECE
        while self._pieces and room:
            piece = self._pieces.popleft()
            if len(piece) > room:
                self._pieces.appendleft(piece[room:])
                piece = piece[:room]
            taken.append(piece)
            room -= len(piece)
        self._held -= _PULLED_PIECE - room
        return b"".join(taken)

    def _left(self) -> bool:
        """
        Tell whether the client is gone.

        The server cancels the request then; but not at once while it waits with
        bytes that came after the request, as Hypercorn does.
        """
        reader, transport = self._below.reader, self._below.transport
        return (reader is not None and reader._eof) or (transport is not None and transport.is_closing())

    async def _framed(self) -> None:
        """
        Wait until HTTP/2's flow control has let out what was yielded.

        Hypercorn's `send` does not: it would take the whole log for a client
        that reads nothing.
        """
        frames = self._below.frames
        if frames is None:
            return
        while frames.buffer and not self._cut:
            drained = asyncio.ensure_future(frames.drain())
            drained.add_done_callback(self._wake)
            try:
                await self._woken()
            finally:
                drained.cancel()
        if self._cut:
            await frames.close()

    async def _woken(self) -> None:
        self._wanted = asyncio.get_running_loop().create_future()
        await self._wanted

    def _wake(self, _: object = None) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)


def transport_types() -> tuple[type, ...]:
    """Return the plain-text TCP transports whose descriptor may be written to."""
    from asyncio.selector_events import _SelectorSocketTransport  # type: ignore[attr-defined]

    types: tuple[type, ...] = (_SelectorSocketTransport,)
    with suppress(ImportError):
        from uvloop.loop import TCPTransport, UnixTransport  # type: ignore[attr-defined]

        types += (TCPTransport, UnixTransport)
    return types


_TRANSPORTS = transport_types()


def self_check() -> str | None:
    """Return why no connection can be taken over in this installation, or None."""
    server = f"hypercorn {version('hypercorn')}"
    has: tuple[tuple[type, tuple[str, ...]], ...] = (
        (TCPServer, ("protocol_send", "_close", "_read_data")),
        (HTTPStream, ("app_send",)),
        (H11Protocol, ("stream_send",)),
    )
    for owner, names in has:
        for name in names:
            if not hasattr(owner, name):
                return f"{server}: {owner.__name__} has no {name}"
    sets: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (TCPServer, ("reader", "writer")),
        (HTTPStream, ("send", "state")),
        (H11Protocol, ("send", "connection", "can_read")),
        (EventWrapper, ("_event",)),
        (asyncio.StreamWriter, ("_transport",)),
        (asyncio.StreamReader, ("_transport", "_buffer", "_eof", "_paused")),
    )
    for made, names in sets:
        for name in names:
            if name not in made.__init__.__code__.co_names:
                return f"{server}: {made.__name__} sets no {name}"
    return None


# Looked at once, so that what start-up says is what every stream gets.
UNFIT = self_check()


def take_over(scope: Any, send: Any, stream: Stream, hub: Hub, send_buffer: int) -> bool | None:
    """
    Take the connection of a request that has no answer yet; make it *stream*'s sink.

    The head is the stream's to send from here on. Call it from the request
    itself, and let that end right after, with nothing sent to *send*, which is
    the server's own ASGI callable.

    Returns:
        True when the stream has its sink; False where this connection cannot
        be taken over; None where the client is gone already.
    """
    if UNFIT is not None or scope.get("http_version") != "1.1" or scope.get("scheme") != "http":
        return False
    http, protocol, server = _owners(send)
    if type(http) is not HTTPStream or type(protocol) is not H11Protocol or not isinstance(server, TCPServer):
        return False
    writer, reader = server.writer, server.reader
    transport: Any = writer.transport
    if type(transport) not in _TRANSPORTS or writer.get_extra_info("sslcontext") is not None:
        return False
    # Not `at_eof()`: that is False while bytes stand before the end.
    if transport.is_closing() or reader._eof or reader.exception() is not None:  # type: ignore[attr-defined]
        return None
    if transport.get_write_buffer_size():
        # An answer before this one waits for the client: keep their order.
        return False
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return None
    _tune(sock, send_buffer)
    # With a high-water mark of 0, `resume_writing` comes when all has gone out.
    transport.set_write_buffer_limits(high=0)
    connection = Connection(transport, sock.fileno(), stream, hub)
    transport.set_protocol(connection)
    protocol.send = nowhere
    protocol.connection = _DEAF
    protocol.can_read._event.set()  # type: ignore[attr-defined]
    server.protocol_send = nowhere  # type: ignore[method-assign]
    server._close = _nothing  # type: ignore[method-assign]
    http.state = ASGIHTTPState.CLOSED
    writer._transport = _CLOSED  # type: ignore[attr-defined]
    # The reader of a client that sent more than its request had paused the
    # transport, and would resume it when Hypercorn reads on: that is ours now.
    reader._transport = None  # type: ignore[attr-defined]
    reader._paused = False  # type: ignore[attr-defined]
    reader._buffer.clear()  # type: ignore[attr-defined]
    reader.feed_eof()
    transport.resume_reading()
    stream.sink = connection
    return True


def gone(send: Any) -> bool:
    """Tell whether the client of a request has left, as far as the server below lets it be seen."""
    below = _below(send)
    return (below.reader is not None and below.reader._eof) or (
        below.transport is not None and below.transport.is_closing()
    )


def _owners(send: Any) -> tuple[Any, Any, Any]:
    """Return the objects whose method *send* is, one below the other."""
    http = getattr(send, "__self__", None)
    protocol = getattr(getattr(http, "send", None), "__self__", None)
    server = getattr(getattr(protocol, "send", None), "__self__", None)
    return http, protocol, server


@dataclass(frozen=True, slots=True)
class _Below:
    """
    What is below a generator, as far as server and middleware let it be seen.

    Attributes:
        frames: Hypercorn's buffer of one HTTP/2 stream.
        room: bytes that this stream's client is willing to take now, over HTTP/2.
    """

    transport: Any = None
    reader: Any = None
    frames: StreamBuffer | None = None
    room: Callable[[], int] = int


def _below(send: Any) -> _Below:
    http, protocol, server = _owners(send)
    if isinstance(protocol, H11Protocol) and isinstance(server, TCPServer):
        return _Below(server.writer.transport, server.reader)
    if isinstance(protocol, H2Protocol) and isinstance(server, TCPServer):

        def room() -> int:
            try:
                return protocol.connection.local_flow_control_window(http.stream_id)
            except ProtocolError:
                return 0

        return _Below(server.writer.transport, None, protocol.stream_buffers.get(http.stream_id), room)
    transport = getattr(http, "transport", None)  # uvicorn
    return _Below(transport if hasattr(transport, "abort") else None)


def _tune(sock: Any, send_buffer: int) -> None:
    with suppress(OSError, AttributeError):
        # What a stalled client can hold in the kernel; without it, megabytes.
        # No TCP_USER_TIMEOUT: with one, Linux ends clients with small windows
        # that read all the time. A client that vanished goes at its stream's age.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _unacknowledged(fd: int) -> int:
    """
    Return the bytes that the kernel holds and the peer has not acknowledged.

    A client that reads slowly makes progress here long before a write fits.
    """
    buffer = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.TIOCOUTQ, buffer)
    except (OSError, ValueError):
        return 0
    return buffer[0]


async def nowhere(event: object) -> None:
    """Stand where one of Hypercorn's objects had its way to the socket."""


async def _nothing() -> None:
    pass
