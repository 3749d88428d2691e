"""
Streams read from a bare socket: what a test sees is what was on the wire.

No HTTP library, because the tests are about the bytes that those hide: where a
chunk begins, whether the last one came, what the kernel still holds.
"""

import contextlib
import http.client
import json
import re
import select
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from app.parser import Parser, ServerSentEvent
from app.stack import App

# Longest wait of one step. Two busy cores make single steps slow; nothing that
# works takes this long.
PATIENCE_SECONDS = 20.0


def wait_until[T](met: Callable[[], T], what: str, seconds: float = PATIENCE_SECONDS, every: float = 0.01) -> T:
    """
    Return what *met* returns as soon as that is true; fail after *seconds*.
    """
    deadline = time.monotonic() + seconds
    while not (value := met()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s, got {value!r}")
        time.sleep(every)
    return value


class Chunks:
    """
    Take chunked framing off, whatever way the bytes were cut.

    Attributes:
        ended: the last chunk was read, to its end.
    """

    def __init__(self) -> None:
        self.ended = False
        self._buffer = b""
        self._left = -1  # of the chunk that is being read, with its line end

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payload of each chunk that is complete now."""
        found = []
        self._buffer += data
        while not self.ended:
            if self._left < 0:
                line, mark, rest = self._buffer.partition(b"\r\n")
                if not mark:
                    break
                self._left = int(line, 16)
                self._buffer = rest
            if len(self._buffer) < self._left + 2:
                break
            payload, end = self._buffer[: self._left], self._buffer[self._left : self._left + 2]
            assert end == b"\r\n", f"a chunk must end with CRLF, got {end!r}"
            self._buffer = self._buffer[self._left + 2 :]
            self.ended = self._left == 0
            self._left = -1
            if payload:
                found.append(payload)
        assert not (self.ended and self._buffer), f"bytes after the last chunk: {self._buffer[:80]!r}"
        return found


def request(path: str, headers: Mapping[str, str] | None = None, *, version: str = "1.1", method: str = "GET") -> bytes:
    """Return the bytes of a request without a body."""
    lines = [f"{method} {path} HTTP/{version}", "Host: test"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Wire:
    """
    One TCP connection that reads only when it is told to.

    Args:
        receive_buffer: bytes of the kernel's buffer; small ones make a client
            that reads slowly or not at all felt at once.
        segment: largest segment. Loopback's is 64 KB, and there a receiver
            with a full buffer says nothing until all of it was read; on a real
            network it is 1,460.
    """

    def __init__(self, port: int, *, receive_buffer: int = 0, segment: int = 0, host: str = "127.0.0.1") -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if segment:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, size: int = 65_536) -> bytes:
        """Return what is there, waiting for it; b"" at the end. Raises ConnectionResetError."""
        if self._rest:
            data, self._rest = self._rest, b""
            return data
        return self.socket.recv(size)

    def waits(self, seconds: float) -> bool:
        """Return whether there is something to receive within *seconds*."""
        return bool(self._rest) or bool(select.select([self.socket], [], [], max(0.0, seconds))[0])

    def until(self, mark: bytes, seconds: float = PATIENCE_SECONDS) -> bytes:
        """Return all up to and including *mark*; what came behind it is received next."""
        deadline = time.monotonic() + seconds
        data = b""
        while mark not in data:
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {mark!r}; it said {data[-200:]!r}"
            piece = self.receive()
            assert piece, f"the connection ended before {mark!r}; it said {data[-200:]!r}"
            data += piece
        end = data.index(mark) + len(mark)
        self._rest = data[end:]
        return data[:end]

    def ends(self, seconds: float = PATIENCE_SECONDS) -> str:
        """Read on to the end, at most *seconds*; return "closed" or "reset"."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self.waits(left):
                try:
                    if not self.receive():
                        return "closed"
                except ConnectionResetError:
                    return "reset"
        raise AssertionError(f"the connection must end within {seconds:g} s, but is open")

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Leave without a goodbye: the peer gets RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Piece:
    """What came in one chunk (over HTTP/1.0: in one read)."""

    at: float
    text: bytes


@dataclass
class Reader:
    """
    A stream on a `Wire` of its own.

    Attributes:
        pieces: each chunk, with the time when it was complete.
        events: all events so far, the kit's own included.
        clean: the response was ended as HTTP says, not cut.
        over: the connection has ended.
    """

    wire: Wire
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    head_at: float = 0.0
    pieces: list[Piece] = field(default_factory=list)
    events: list[ServerSentEvent] = field(default_factory=list)
    over: bool = False

    def __post_init__(self) -> None:
        self._parser = Parser()
        self._chunks: Chunks | None = None

    @classmethod
    def open(
        cls,
        port: int,
        *topics: str,
        resume: str = "",
        query: str = "",
        headers: Mapping[str, str] | None = None,
        version: str = "1.1",
        after: bytes = b"",
        **options: Any,
    ) -> Self:
        """
        Ask for *topics* and read the head; *after* is sent in the same segment.
        """
        path = "/events?" + "&".join([f"topic={topic}" for topic in topics] + ([query] if query else []))
        given = {"Accept": "text/event-stream"} | ({"Last-Event-ID": resume} if resume else {}) | dict(headers or {})
        wire = Wire(port, **options)
        wire.send(request(path, given, version=version) + after)
        reader = cls(wire)
        reader.read_head()
        return reader

    @property
    def clean(self) -> bool:
        return self._chunks is not None and self._chunks.ended

    @property
    def retry_ms(self) -> int | None:
        return self._parser.retry_ms

    @property
    def last_event_id(self) -> str:
        return self._parser.last_event_id

    @property
    def opened(self) -> dict[str, Any]:
        """What `stream.open` says."""
        return json.loads(next(event for event in self.events if event.event == "stream.open").data)

    @property
    def data(self) -> list[str]:
        """Data of all events but the kit's own."""
        return [event.data for event in self.events if not event.event.startswith("stream.")]

    @property
    def names(self) -> list[str]:
        return [event.event for event in self.events]

    def read_head(self) -> None:
        head = self.wire.until(b"\r\n\r\n")[:-4]
        self.head_at = time.monotonic()
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if self.headers.get("transfer-encoding") == "chunked":
            self._chunks = Chunks()

    def read(self, seconds: float = PATIENCE_SECONDS, size: int = 65_536) -> bool:
        """Read once, waiting at most *seconds*; False if nothing came or the end did."""
        if self.over or not self.wire.waits(seconds):
            return False
        try:
            data = self.wire.receive(size)
        except ConnectionResetError:
            data = b""
        if not data:
            self.over = True
            return False
        self._take(data)
        return True

    def until(self, met: Callable[[Self], Any], seconds: float = PATIENCE_SECONDS) -> Self:
        """Read until *met* is true; fails at the end of the stream and after *seconds*."""
        deadline = time.monotonic() + seconds
        while not met(self):
            self.read(deadline - time.monotonic())
            if met(self):
                break
            left = deadline - time.monotonic()
            assert not self.over, f"the stream ended too early, with {self.names[-5:]} {self.data[-3:]}"
            assert left > 0, (
                f"not within {seconds:g} s; {len(self.events)} events, last {self.names[-5:]} {self.data[-3:]}"
            )
        return self

    def until_open(self) -> Self:
        return self.until(lambda reader: "stream.open" in reader.names)

    def until_data(self, count: int, seconds: float = PATIENCE_SECONDS) -> list[str]:
        """Read until *count* events (the kit's own not counted) are there; return their data."""
        return self.until(lambda reader: len(reader.data) >= count, seconds).data

    def until_over(self, seconds: float = PATIENCE_SECONDS) -> Self:
        return self.until(lambda reader: reader.over, seconds)

    def during(self, seconds: float) -> Self:
        """Read for *seconds*, whatever comes."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self.over:
            self.read(left)
        return self

    def close(self) -> None:
        self.wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, data: bytes) -> None:
        now = time.monotonic()
        for text in self._chunks.feed(data) if self._chunks else [data]:
            self.pieces.append(Piece(now, text))
            self.events += self._parser.feed(text)


def publish(port: int, *drafts: Mapping[str, Any]) -> list[str]:
    """Publish all *drafts* in one piece; return their ids."""
    status, answer = post(port, list(drafts))
    assert status == 201, (status, answer)
    return json.loads(answer)["ids"]


def post(port: int, body: Any, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request("POST", "/publish", json.dumps(body), {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read()


def get(port: int, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def metric(port: int, name: str, **labels: str) -> float:
    """Return one value of /metrics; 0 where it is absent."""
    _, _, text = get(port, "/metrics")
    label = "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else ""
    found = re.search(rf"(?m)^{re.escape(name + label)} (\S+)$", text.decode())
    return float(found[1]) if found else 0.0


def log_lines(text: str, event: str) -> list[dict[str, Any]]:
    """Return the JSON lines of a process's log that are about *event*."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            parsed = json.loads(line)
            if isinstance(parsed, dict) and parsed.get("event") == event:
                found.append(parsed)
    return found


# --- Processes


class Process(App):
    """
    One `python -m app` with a folder of its own; the log in memory unless told otherwise.

    `launcher` is Python code that runs instead of `-m app`: to break something first.
    """

    def __init__(self, env: Mapping[str, object], launcher: str = "") -> None:
        self.launcher = launcher
        directory = Path(tempfile.mkdtemp(prefix="sse-process-"))
        super().__init__("app", directory, {"SSE_LOG_FORMAT": "json"} | {k: str(v) for k, v in env.items()})

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.launcher] if self.launcher else super().command()

    def ended(self, reason: str = "") -> list[dict[str, Any]]:
        """Return the log's lines about ended streams, of one *reason* or of all."""
        return [line for line in log_lines(self.log(), "stream_ended") if reason in ("", line["reason"])]

    def complaints(self) -> list[str]:
        """Return the log's lines above `info`, without the two about a development set-up."""
        return [
            line
            for line in self.log().splitlines()
            if '"level":"info"' not in line and '"log_in_memory"' not in line and '"auth_none"' not in line
        ]

    def streams(self) -> int:
        return int(metric(self.metrics_port, "sse_streams_open"))

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)
