"""
Take a stream's connection over from Hypercorn, or serve it where that cannot be.

Quart decides (rights, topics, position, head); then a stream that stays in the
framework costs four tasks, a generator and a copy per event. So after the head
is out, `take_over` gives the connection's transport a small protocol of ours
and lets the request end: an idle stream is one `Stream` and one `Connection`.

How it reaches the transport, in Hypercorn 0.18.0, each step checked by type:
the ASGI `send` is a method of `HTTPStream`, whose `send` is a method of
`H11Protocol`, whose `send` is a method of `TCPServer`, which holds the
`StreamWriter` with the transport. Then

* the transport gets our protocol: what the client sends or closes comes to us;
* `H11Protocol` and `TCPServer` lose their way to the socket, so that neither
  the last chunk of the request that ends nor `_close` reaches it;
* the `StreamWriter` loses its transport, which its `__del__` would close;
* the reader gets EOF, which ends the connection's task in the ordinary way.

Chunk framing is ours from then on. Every head carries ``Connection: close``:
without it nginx reuses connections that are no longer Hypercorn's.

Where anything is not as expected (HTTP/2, HTTP/1.0, TLS straight into
Hypercorn, another server), `Pulled` serves the same stream as a generator.
"""

import array
import asyncio
import fcntl
import os
import socket
import termios
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream

from app.event import Piece
from app.hub import Hub
from app.stream import Stream

# A peer that takes nothing never finishes closing; then the connection is cut.
CLOSE_SECONDS = 2.0
# A generator may hold this much that its server has not taken yet.
_PULLED_BYTES = 65_536
_LAST_CHUNK = b"0\r\n\r\n"


class _Closed:
    """Stands where a StreamWriter had its transport."""

    def is_closing(self) -> bool:
        return True


_CLOSED = _Closed()


class Connection(asyncio.Protocol):
    """A sink on a transport that was Hypercorn's. See `app.stream.Sink`."""

    __slots__ = ("_fd", "_hub", "_stream", "_timer", "_transport")

    def __init__(self, transport: asyncio.Transport, fd: int, stream: Stream, hub: Hub) -> None:
        self._transport = transport
        self._fd = fd
        self._stream = stream
        self._hub = hub
        self._timer: asyncio.TimerHandle | None = None

    def write(self, piece: Piece) -> bool:
        chunk = piece.chunk
        try:
            sent = os.write(self._fd, chunk)
        except BlockingIOError:
            sent = 0
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

    def abort(self) -> None:
        self._transport.abort()

    def unsent(self) -> int:
        buffer = array.array("i", [0])
        try:
            # What the kernel holds and the peer has not acknowledged: a client
            # that reads slowly makes progress here long before a write fits.
            fcntl.ioctl(self._fd, termios.TIOCOUTQ, buffer)
        except OSError:
            return 0
        return buffer[0] + self._transport.get_write_buffer_size()

    # --- asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        """Drop what a client sends after its request: pipelined bytes and garbage."""

    def eof_received(self) -> bool:
        # A half-closed client counts as gone, as in Hypercorn.
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
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


class Pulled:
    """
    A sink whose bytes a generator yields to whatever server there is.

    See `app.stream.Sink`. Holds at most one buffer; a stream that fills it is
    behind until the server has taken it.
    """

    __slots__ = ("_buffer", "_ended", "_hub", "_stream", "_wanted")

    def __init__(self, stream: Stream, hub: Hub) -> None:
        self._stream = stream
        self._hub = hub
        self._buffer = bytearray()
        self._ended = False
        self._wanted: asyncio.Future[None] | None = None

    def write(self, piece: Piece) -> bool:
        self._buffer += piece.raw
        self._wake()
        return len(self._buffer) < _PULLED_BYTES

    def close(self, piece: Piece | None) -> None:
        if piece is not None:
            self._buffer += piece.raw
        self._ended = True
        self._wake()

    def abort(self) -> None:
        self._buffer.clear()
        self._ended = True
        self._wake()

    def unsent(self) -> int:
        return len(self._buffer)

    async def body(self) -> AsyncIterator[bytes]:
        """Yield what the stream writes, until it ends."""
        try:
            while True:
                if self._buffer:
                    data = bytes(self._buffer)
                    self._buffer.clear()
                    yield data
                    self._hub.writable(self._stream)
                elif self._ended:
                    return
                else:
                    self._wanted = asyncio.get_running_loop().create_future()
                    await self._wanted
        finally:
            self._hub.gone(self._stream)

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)


def transport_types() -> tuple[type, ...]:
    """Return the plain-text TCP transports whose descriptor may be written to."""
    from asyncio.selector_events import _SelectorSocketTransport  # type: ignore[attr-defined]

    types: tuple[type, ...] = (_SelectorSocketTransport,)
    with suppress(ImportError):
        from uvloop.loop import TCPTransport, UnixTransport

        types += (TCPTransport, UnixTransport)
    return types


_TRANSPORTS = transport_types()


def self_check() -> str | None:
    """Return why no connection can be taken over in this installation, or None."""
    import hypercorn

    for name in ("protocol_send", "_close", "_read_data"):
        if not hasattr(TCPServer, name):
            return f"hypercorn {hypercorn.__version__}: TCPServer has no {name}"  # type: ignore[attr-defined]
    for owner, names in ((HTTPStream, ("app_send",)), (H11Protocol, ("stream_send",))):
        for name in names:
            if not hasattr(owner, name):
                return f"{owner.__name__} has no {name}"
    if "_transport" not in asyncio.StreamWriter.__init__.__code__.co_names:
        return "asyncio.StreamWriter has no _transport"
    return None


def take_over(scope: Any, send: Any, stream: Stream, hub: Hub, send_buffer: int) -> bool | None:
    """
    Take the connection of a request whose head is out, and make it *stream*'s sink.

    Call it from the request itself, after `send` of the head has returned, and
    let the request end right after. *send* is the server's own ASGI callable.

    Returns:
        True when the stream has its sink; False where this connection cannot
        be taken over; None where the client is gone already.
    """
    if scope.get("http_version") != "1.1" or scope.get("scheme") != "http":
        return False
    http = getattr(send, "__self__", None)
    if type(http) is not HTTPStream:
        return False
    h11 = getattr(http.send, "__self__", None)
    if type(h11) is not H11Protocol:
        return False
    server = getattr(h11.send, "__self__", None)
    if type(server) is not TCPServer:
        return False
    writer, reader = server.writer, server.reader
    transport = writer.transport
    if type(transport) not in _TRANSPORTS or writer.get_extra_info("sslcontext") is not None:
        return False
    if transport.is_closing() or reader.at_eof() or reader.exception() is not None:
        return None
    if transport.get_write_buffer_size():
        # The head itself waits for the client: let the server send it.
        return False
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return None
    _tune(sock, send_buffer)
    # With a high-water mark of 0, `resume_writing` comes when all has gone out.
    transport.set_write_buffer_limits(high=0)
    connection = Connection(transport, sock.fileno(), stream, hub)
    transport.set_protocol(connection)
    h11.send = _nowhere
    server.protocol_send = _nowhere  # type: ignore[method-assign]
    server._close = _nothing  # type: ignore[method-assign]
    writer._transport = _CLOSED  # type: ignore[attr-defined]
    reader._transport = None  # type: ignore[attr-defined]
    # A reader with a full buffer had paused the transport: we would never see EOF.
    transport.resume_reading()
    reader.feed_eof()
    stream.sink = connection
    return True


def _tune(sock: Any, send_buffer: int) -> None:
    with suppress(OSError):
        # What a stalled client can hold in the kernel; without it, megabytes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


async def _nowhere(event: object) -> None:
    pass


async def _nothing() -> None:
    pass
