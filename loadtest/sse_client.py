"""
Hold event streams open on gevent sockets, and behave as a browser's EventSource does.

Bytes go from `recv` straight into the application's parser: a read returns what is
there, never waits for a full buffer, so the time of an event is the time it arrived.
What happens is told by overriding methods of `EventSource`; nothing is counted here.
https://html.spec.whatwg.org/multipage/server-sent-events.html#processing-model
"""

import errno
import random
import socket as plain_socket
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import gevent
from gevent import socket
from gevent.ssl import SSLContext

from app.parser import Parser, ServerSentEvent

CONNECT_SECONDS = 10.0
# For a first look at which kind of address answers.
PROBE_SECONDS = 2.0
# From the request to the answer's head. nginx gives an upstream 60 s by default.
HEAD_SECONDS = 60.0
HEAD_MAX_BYTES = 65_536
READ_BYTES = 65_536
GREEDY_BYTES = 16_384
# What a client waits when the server sent no `retry:`; Chromium's value.
RETRY_SECONDS = 3.0
# Clients that lost their stream together must not come back together.
RETRY_JITTER = 0.1
# Linux' IP_BIND_ADDRESS_NO_PORT: bind an address only, so that the kernel may use
# one source port for several destinations. Python 3.13 has no name for it.
_BIND_ADDRESS_NO_PORT = 24


class ProtocolError(Exception):
    """The server's answer is not HTTP/1.1 that can be read."""


class Target:
    """
    One server, and how this process reaches it.

    Args:
        url: `http://host:port` or `https://…`; a path is put in front of every request's.
        sources: Source addresses to take in turn; one address holds about 28,000 streams.
        insecure: Take any certificate.

    Raises:
        OSError: The host's name has no address.
    """

    def __init__(self, url: str, *, sources: Sequence[str] = (), insecure: bool = False) -> None:
        parts = urlsplit(url)
        self.tls = parts.scheme == "https"
        self.host = parts.hostname or ""
        port = parts.port or (443 if self.tls else 80)
        self.prefix = parts.path.rstrip("/")
        self.authority = parts.netloc.rpartition("@")[2]
        self.sources = tuple(sources)
        # Once, not once per connect: ten thousand look-ups are a load test of DNS.
        found = plain_socket.getaddrinfo(self.host, port, type=socket.SOCK_STREAM)
        self.addresses = self._reached([(family, address) for family, _, _, _, address in found])
        self._context: SSLContext | None = None
        if self.tls:
            self._context = SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._context.load_default_certs()
            self._context.set_alpn_protocols(["http/1.1"])
            if insecure:
                self._context.check_hostname = False
                self._context.verify_mode = ssl.CERT_NONE

    def _reached(self, found: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """
        Return the addresses of the first family that takes a connect, as browsers look for one; all if none does.

        A name often has IPv6 addresses that can't be reached from here: half of the streams would fail.
        """
        # Source addresses are IPv4, and would be of no use.
        families = sorted(
            dict.fromkeys(family for family, _ in found),
            key=lambda family: bool(self.sources) and family != socket.AF_INET,
        )
        for family in families if len(families) > 1 else ():
            own = [each for each in found if each[0] == family]
            with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.settimeout(PROBE_SECONDS)
                probe.connect(own[0][1])
                return own
        return found

    def connect(self, number: int = 0, *, receive_bytes: int | None = None) -> socket.socket:
        """
        Connect from the source address that *number* falls on.

        *receive_bytes* shrinks the kernel's buffer, for a client that reads slowly.

        Raises:
            OSError: refused, timed out, no descriptor (EMFILE) or no port (EADDRNOTAVAIL).
        """
        family, address = self.addresses[number % len(self.addresses)]
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            if receive_bytes is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            if self.sources and family == socket.AF_INET:
                connection.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
                connection.bind((self.sources[number % len(self.sources)], 0))
            connection.settimeout(CONNECT_SECONDS)
            connection.connect(address)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_hostname=self.host)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            connection.close()
            raise
        return connection

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """Return the bytes of a request's head."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.authority}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode()


class Answer:
    """
    The answer on *connection*: its status and headers, then its body in pieces.

    Attributes:
        clean: The body ended where HTTP says that it ends; False while it goes on.
    """

    __slots__ = ("_ended", "_held", "_left", "_skip", "_socket", "clean", "headers", "status")

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.clean = False
        self._ended = False
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            more = connection.recv(READ_BYTES)
            if not more:
                raise ConnectionResetError(errno.ECONNRESET, "closed before the head of an answer")
            data += more
            if len(data) > HEAD_MAX_BYTES:
                raise ProtocolError(f"an answer's head must fit into {HEAD_MAX_BYTES:,} bytes")
        first, *lines = data[:end].decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise ProtocolError(f"an answer must begin with HTTP/1.1 and a status, got {first[:80]!r}")
        self.status = int(words[1])
        self.headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        self._held = data[end + 4 :]
        # None: the body ends with the connection. -1: chunked, and no chunk is begun.
        self._left: int | None = None
        self._skip = 0
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._left = -1
        elif "content-length" in self.headers or self.status in (204, 304):
            # One chunk of this size, without any framing: nothing comes after it.
            self._left = int(self.headers.get("content-length", 0))
            self._skip = -1
            self._end(self._left == 0)

    def read(self) -> bytes:
        """
        Return the next piece of the body as soon as one is there, b"" at its end.

        Raises:
            OSError: the connection broke, or its time-out passed.
            ProtocolError: the framing is broken.
        """
        while not self._ended:
            data, self._held = self._held, b""
            # A chunk's head may be cut; its first half alone says nothing.
            if not data or (self._left == -1 and b"\r\n" not in data):
                more = self._socket.recv(READ_BYTES)
                if not more:
                    # Without any framing the end of the connection is the body's end.
                    self._ended = True
                    self.clean = self._left is None
                    return b""
                data += more
            body = data if self._left is None else self._unframe(data)
            if body:
                return body
        return b""

    def _unframe(self, data: bytes) -> bytes:
        """Return the body's bytes within *data*; keep a chunk's head that is cut."""
        pieces = []
        at, size = 0, len(data)
        while at < size and not self._ended:
            left = self._left
            assert left is not None
            if left > 0:
                piece = data[at : at + left]
                pieces.append(piece)
                at += len(piece)
                self._left = left - len(piece)
                if self._left == 0:
                    if self._skip < 0:  # Content-Length
                        self._end(True)
                    else:
                        self._left, self._skip = -1, 2
            elif self._skip:
                step = min(self._skip, size - at)
                at += step
                self._skip -= step
            else:
                end = data.find(b"\r\n", at)
                if end < 0:
                    self._held = data[at:]
                    break
                try:
                    self._left = int(data[at:end].partition(b";")[0], 16)
                except ValueError:
                    if pieces:  # what came before it is good
                        self._held = data[at:]
                        break
                    raise ProtocolError(f"a chunk must begin with its size, got {data[at : at + 40]!r}") from None
                at = end + 2
                if self._left == 0:
                    self._end(True)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _end(self, ended: bool) -> None:
        if ended:
            self._ended = self.clean = True


class EventSource:
    """
    One stream as a browser holds it: connects, reads, comes back, or gives up for ever.

    Comes back with the last event id after `retry:`, jittered; gives up on any status but
    200, on 204, and on another content type. An open counts when `stream.open` was read:
    a 200 that ends before, or one marked X-Sse-Fallback, is a soft-failed open.

    Subclasses override `request`, `connecting`, `headed`, `opened`, `take`, `soft_failed`, `refused`,
    `broken` and `ended`.
    """

    __slots__ = ("_connection", "is_open", "last_event_id", "last_read", "number", "path", "retry_seconds", "target")

    receive_bytes: int | None = None

    def __init__(self, target: Target, path: str, number: int = 0) -> None:
        self.target = target
        self.path = path
        self.number = number
        self.last_event_id = ""
        self.retry_seconds = RETRY_SECONDS
        self.is_open = False
        self.last_read = 0.0
        self._connection: socket.socket | None = None

    # --- What a subclass says

    def headers(self) -> dict[str, str]:
        """Return the request's own headers, a bearer for example; asked at each connect."""
        return {}

    def request(self) -> tuple[str, str, dict[str, str], bytes]:
        """Return the next request's method, path, further headers and body."""
        return "GET", self.path, {}, b""

    def connecting(self) -> None:
        """A connect begins."""

    def headed(self, status: int, seconds: float) -> None:
        """An answer's head was read, *seconds* after the connect began."""

    def opened(self, seconds: float, data: str) -> None:
        """`stream.open` was read, *seconds* after the connect began."""

    def take(self, events: list[ServerSentEvent]) -> None:
        """Events arrived, now."""

    def soft_failed(self) -> None:
        """A 200 that was no stream: come back later."""

    def refused(self, status: int, body: bytes) -> None:
        """The answer makes a browser give up for ever."""

    def broken(self, error: Exception) -> None:
        """No answer: the connect failed, or broke before the head."""

    def ended(self, clean: bool) -> None:
        """A stream that was open ended; *clean* tells whether as HTTP says."""

    # --- What it does

    def run(self) -> None:
        """Read until the server's answer makes a browser give up; `close` ends it, too."""
        while self.once():
            gevent.sleep(self.retry_seconds * (1 + RETRY_JITTER * random.random()))

    def close(self) -> None:
        """End the connection under the reader, as a network that breaks."""
        if self._connection is not None:
            # Wakes the greenlet that reads; a mere close would leave it waiting. Not TLS's own
            # `shutdown`: a reader that was about to read finds no TLS there, a ValueError.
            with suppress(OSError):
                socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def once(self) -> bool:
        """Connect and read one answer to its end; return whether to come back."""
        self.connecting()
        began = time.monotonic()
        try:
            self._connection = self.target.connect(self.number, receive_bytes=self.receive_bytes)
            own = {"Accept": "text/event-stream", "Cache-Control": "no-store", "Accept-Encoding": "identity"}
            if self.last_event_id:
                own["Last-Event-ID"] = self.last_event_id
            self._connection.settimeout(HEAD_SECONDS)
            method, path, more, body = self.request()
            self._connection.sendall(self.target.head(method, path, own | more | self.headers()) + body)
            answer = Answer(self._connection)
        except (OSError, ProtocolError) as error:
            self._release()
            self.broken(error)
            return True
        try:
            self.headed(answer.status, time.monotonic() - began)
            kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
            if answer.status != 200 or kind != "text/event-stream":
                self.refused(answer.status, self._rest(answer))
                return False
            fallback = "x-sse-fallback" in answer.headers
            answer.headers = {}  # held for as long as the stream, and read by nobody
            self._read(answer, began, fallback)
        finally:
            self._release()
        return True

    def _read(self, answer: Answer, began: float, fallback: bool) -> None:
        parser = Parser(last_event_id=self.last_event_id)
        connection = self._connection
        assert connection is not None
        # Silence is watched from outside: a timer for every read costs more than the read.
        connection.settimeout(None)
        self.last_read = began
        try:
            while data := answer.read():
                self.last_read = time.monotonic()
                events = parser.feed(data)
                if not self.is_open and not fallback:
                    for event in events:
                        if event.event == "stream.open":
                            self.is_open = True
                            # Before the event is taken, which may rest on it.
                            self.last_event_id = event.id
                            self.opened(time.monotonic() - began, event.data)
                            break
                if events:
                    self.take(events)
                self.last_event_id = parser.last_event_id
                if len(data) > GREEDY_BYTES:
                    # A socket that always has more would never let the others read.
                    gevent.sleep(0)
        except (OSError, ProtocolError):
            answer.clean = False
        if parser.retry_ms is not None:
            self.retry_seconds = parser.retry_ms / 1000
        if self.is_open:
            self.is_open = False
            self.ended(answer.clean)
        else:
            self.soft_failed()

    def _rest(self, answer: Answer) -> bytes:
        """Return the beginning of an error's body, for a sentence about it."""
        try:
            assert self._connection is not None
            self._connection.settimeout(CONNECT_SECONDS)
            return answer.read()[:2000]
        except (OSError, ProtocolError):
            return b""

    def _release(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Poster:
    """
    POSTs on one kept connection, which is opened anew when it broke.
    """

    def __init__(self, target: Target, number: int = 0) -> None:
        self._target = target
        self._number = number
        self._connection: socket.socket | None = None

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """
        Return status and body of the answer.

        Raises:
            OSError, ProtocolError: there was none; whether the request was served is not known.
        """
        own = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        try:
            if self._connection is None:
                self._connection = self._target.connect(self._number)
            self._connection.settimeout(CONNECT_SECONDS)
            self._connection.sendall(self._target.head("POST", path, own | dict(headers)) + body)
            answer = Answer(self._connection)
            content = b""
            while piece := answer.read():
                content += piece
        except BaseException:
            self.close()
            raise
        if "close" in answer.headers.get("connection", "").lower() or not answer.clean:
            self.close()
        return answer.status, content

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
