"""
Ask for runs and take the time to their first token; the upstream is the same for all servers.

One run after another, each on a connection of its own, as a browser's fetch. The whole
answer is read and compared: a server that is fast with the wrong text is faulty.
"""

import json
import socket
import sys
import time
from pathlib import Path
from statistics import median, quantiles

from app.parser import Parser

from .client import SATURATED
from .process import Server, answers, free_port

# The first one is looked for in raw bytes: nothing else looks like it.
TOKENS = ("first-token", *(f" token-{number}" for number in range(1, 10)))
PAUSE_MS = 5
# What the upstream itself is asked.
DIRECT = ("/v1/chat/completions", {"model": "any", "stream": True, "messages": [{"role": "user", "content": "Hello"}]})
SECONDS = 10.0


class Upstream:
    """
    The model's server behind all servers.
    """

    def __init__(self, folder: Path) -> None:
        port = free_port()
        program = Path(__file__).parent / "peers" / "programs" / "upstream.py"
        command = [sys.executable, str(program), str(port), str(PAUSE_MS), *TOKENS]
        self.address = ("127.0.0.1", port)
        self.url = f"http://127.0.0.1:{port}/v1"
        self._server = Server("upstream", command, log=folder / "upstream.log")
        self._server.wait_until(answers(port))

    def cpu(self) -> float:
        """
        Return its CPU seconds.
        """
        return self._server.cpu()

    def end(self) -> None:
        """
        End it.
        """
        self._server.end()


class Asked:
    """
    What some runs took, in ms, and what was wrong with them.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.faults: list[str] = []
        self.void: str | None = None

    @property
    def median(self) -> float:
        """
        The median of the times.
        """
        return median(self.times) if self.times else 0.0

    @property
    def p99(self) -> float:
        """
        The 99th percentile of the times.
        """
        return quantiles(self.times, n=100, method="inclusive")[98] if len(self.times) > 1 else self.median


def ask(address: tuple[str, int], path: str, body: object, runs: int, upstream: Upstream | None = None) -> Asked:
    """
    Ask for so many runs, one after another.

    The figures are void where this process or the *upstream* was too busy to vouch for them.
    """
    asked = Asked()
    content = json.dumps(body).encode()
    request = (
        f"POST {path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nAccept: text/event-stream\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    ).encode() + content
    began, cpu, upstream_cpu = time.monotonic(), time.process_time(), upstream.cpu() if upstream else 0.0
    for _ in range(runs):
        try:
            seconds, answer = _ask_once(address, request)
        except OSError as error:
            asked.faults.append(f"a run broke: {error}")
            continue
        text = text_of(answer)
        if seconds is None or text != "".join(TOKENS):
            status = answer.split(b"\r\n", 1)[0].decode("latin-1")
            asked.faults.append(f"a run's text must be the upstream's, got {text[:60]!r} ({status})")
        else:
            asked.times.append(seconds * 1000)
    wall = max(1e-9, time.monotonic() - began)
    for who, spent in (
        ("client", time.process_time() - cpu),
        ("upstream", upstream.cpu() - upstream_cpu if upstream else 0.0),
    ):
        if spent / wall > SATURATED:
            asked.void = f"the {who} was busy {spent / wall:.0%} of the time, limit {SATURATED:.0%}"
    return asked


def _ask_once(address: tuple[str, int], request: bytes) -> tuple[float | None, bytes]:
    first = TOKENS[0].encode()
    found = None
    answer = b""
    began = time.perf_counter()
    with socket.create_connection(address, SECONDS) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.sendall(request)
        while piece := link.recv(65_536):
            answer += piece
            if found is None and first in answer:
                found = time.perf_counter() - began
    return found, answer


def text_of(answer: bytes) -> str:
    """
    Return the text of a whole answer, as the kit, the recipe and OpenAI's API tell it; "" of one that was cut.
    """
    head, _, body = answer.partition(b"\r\n\r\n")
    whole = True
    if b"transfer-encoding: chunked" in head.lower():
        body, whole = _unchunk(body)
    texts, ended = [], False
    for event in Parser().feed(body):
        if event.event == "run.done" or event.data == "[DONE]":
            ended = True
        elif event.event in ("run.token", "message"):
            data = json.loads(event.data)
            if "choices" in data:
                texts.append(data["choices"][0]["delta"].get("content", ""))
            else:
                texts.append(data["text"])
    return "".join(texts) if ended and whole else ""


def _unchunk(body: bytes) -> tuple[bytes, bool]:
    pieces = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size or b"0", 16)
        if length == 0:
            return b"".join(pieces), True
        pieces.append(rest[:length])
        body = rest[length + 2 :]
    return b"".join(pieces), False
