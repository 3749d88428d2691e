"""
Publish measured events, over HTTP or straight into a Redis Stream.

Blocking sockets and ready-made bytes: the publisher shares two cores with the
server, so it must cost little.
"""

import json
import select
import socket
import time
from collections.abc import Callable

# Bytes of one event's data. With "id: " and "data: " lines the block has about 120.
DATA_SIZE = 80


def make_data(key: int, sequence: int, *, size: int = DATA_SIZE) -> str:
    """
    Return the data of event *sequence* of topic *key*, stamped with this moment.
    """
    text = f"k={key} n={sequence} t={time.monotonic_ns()} "
    return text.ljust(size - 1, ".") + "$"


class PublishError(RuntimeError):
    """
    A server refused an event.
    """


class HttpPublisher:
    """
    One keep-alive connection that posts, and reads the answers afterwards.

    *render* turns the data of a burst into (path, headers, body) of one or more posts.
    """

    def __init__(self, port: int, render: Callable[[list[str]], list[tuple[str, dict[str, str], bytes]]]) -> None:
        self._render = render
        self._port = port
        self._link: socket.socket | None = None
        self._input = b""

    def publish(self, burst: list[str]) -> None:
        """
        Publish the events of one burst, in order; return when all were accepted.
        """
        self._connect()
        assert self._link is not None
        posts = self._render(burst)
        text = bytearray()
        for path, headers, body in posts:
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            text += (f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{lines}Content-Length: {len(body)}\r\n\r\n").encode()
            text += body
        self._link.sendall(text)
        for _ in posts:
            self._read_answer()

    def _connect(self) -> None:
        # A keep-alive connection that was idle, while other peers had their turn,
        # may have been closed by the server: then it is readable, and empty.
        if self._link is not None and select.select([self._link], [], [], 0)[0]:
            self.end()
        if self._link is None:
            self._input = b""
            self._link = socket.create_connection(("127.0.0.1", self._port), 30)
            self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _read_answer(self) -> None:
        while b"\r\n\r\n" not in self._input:
            self._more()
        head, _, self._input = self._input.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").lower().split("\r\n")
        status = lines[0].split()[1]
        fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        if "content-length" in fields:
            size = int(fields["content-length"])
            while len(self._input) < size:
                self._more()
            body, self._input = self._input[:size], self._input[size:]
        elif fields.get("transfer-encoding") == "chunked":
            while b"0\r\n\r\n" not in self._input:
                self._more()
            body, _, self._input = self._input.partition(b"0\r\n\r\n")
        else:
            body = b""
        if fields.get("connection") == "close":
            self.end()
        if status[0] != "2":
            raise PublishError(f"publish must be answered 2xx, got {status}: {body[:300]!r}")

    def _more(self) -> None:
        assert self._link is not None
        piece = self._link.recv(65536)
        if not piece:
            raise PublishError("publish must be answered, the server closed the connection")
        self._input += piece

    def end(self) -> None:
        """
        Close the connection.
        """
        if self._link is not None:
            self._link.close()
            self._link = None


class RedisPublisher:
    """
    XADD to the kit's log: what a service in any language does.

    A burst is one MULTI/EXEC, so that readers see it whole.
    """

    def __init__(self, port: int, key: str, topic: str) -> None:
        self._link = socket.create_connection(("127.0.0.1", port), 30)
        self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._fields = [key, "*", "v", "1", "topics", topic, "event", "message", "data"]
        self._file = self._link.makefile("rb")

    def publish(self, burst: list[str]) -> None:
        """
        Append the events of one burst, in order; return when Redis has them.
        """
        commands = [["XADD", *self._fields, data] for data in burst]
        if len(commands) > 1:
            commands = [["MULTI"], *commands, ["EXEC"]]
        self._link.sendall(b"".join(map(_request, commands)))
        for _ in commands:
            answer = self._read()
            if isinstance(answer, PublishError):
                raise answer

    def command(self, *words: str) -> object:
        """
        Send one command and return its answer.
        """
        self._link.sendall(_request(list(words)))
        return self._read()

    def _read(self) -> object:
        line = self._file.readline()
        if not line:
            raise PublishError("Redis must answer, it closed the connection")
        kind, text = line[:1], line[1:-2]
        if kind == b"-":
            return PublishError(f"Redis must accept XADD, it said {text.decode()!r}")
        if kind == b"$":
            size = int(text)
            return None if size < 0 else self._file.read(size + 2)[:-2]
        if kind == b"*":
            return [self._read() for _ in range(int(text))]
        return text

    def end(self) -> None:
        """
        Close the connection.
        """
        self._file.close()
        self._link.close()


def _request(words: list[str]) -> bytes:
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts)


def json_body(value: object) -> bytes:
    """
    Return *value* as compact JSON.
    """
    return json.dumps(value, separators=(",", ":")).encode()
