"""
Drive load clients (client.c, or fallback.py), add up and judge what they report.
"""

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from .compiler import build
from .histogram import Histogram
from .process import die_with_parent

# A client that was busy for more than this share of a phase may have delayed what
# it measured.
SATURATED = 0.85
# The client's own lag (kernel's receipt to read) may not pass LAG_US and be
# LAG_GROWTH times what it was at the start.
LAG_US = 20_000
LAG_GROWTH = 3.0

# Streams of one client process: RLIMIT_NOFILE, less some for the rest.
MAX_STREAMS = 18_000
# Python parses about ten times slower than C, so the fallback takes more processes.
FALLBACK_PROCESSES = max(2, os.cpu_count() or 2)


# Fields of a report that add up over the clients.
_SUMMED = (
    "streams", "open", "opened", "lost", "events", "bytes", "reads", "others", "missing", "dup", "order",
    "foreign", "corrupt", "faulty", "cpu",
)  # fmt: skip


class ClientError(RuntimeError):
    """
    A load client ended or did not answer.
    """


@dataclass(slots=True)
class Report:
    """
    What all clients of one server counted: `events` to `lag` in the last phase, faults ever.
    """

    streams: int = 0
    open: int = 0
    opened: int = 0
    lost: int = 0
    events: int = 0
    bytes: int = 0
    reads: int = 0
    others: int = 0
    missing: int = 0
    dup: int = 0
    order: int = 0
    foreign: int = 0
    corrupt: int = 0
    faulty: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    # Greatest shares of the phase, over the clients.
    cpu_share: float = 0.0
    busy_share: float = 0.0
    lag_first_us: int = 0
    lag_last_us: int = 0
    latency: Histogram = field(default_factory=Histogram)
    connects: Histogram = field(default_factory=Histogram)
    lag: Histogram = field(default_factory=Histogram)

    def add(self, reported: dict) -> None:
        """
        Add one client's report.
        """
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + reported[name])
        wall = reported["wall"] or 1e-9
        self.wall = max(self.wall, wall)
        self.cpu_share = max(self.cpu_share, reported["cpu"] / wall)
        self.busy_share = max(self.busy_share, reported["busy"] / wall)
        self.lag_first_us = max(self.lag_first_us, reported["lag_first_us"])
        self.lag_last_us = max(self.lag_last_us, reported["lag_last_us"])
        for name in ("latency", "connects", "lag"):
            getattr(self, name).add(reported[name])

    def faults(self) -> list[str]:
        """
        Say what the streams did not get, or got wrongly; empty when all was right.
        """
        words = {
            "missing": "events missing",
            "dup": "events twice",
            "order": "events out of order",
            "foreign": "events of another topic",
            "corrupt": "events damaged",
            "lost": "streams ended by the server",
        }
        return [f"{getattr(self, name)} {text}" for name, text in words.items() if getattr(self, name)]

    def void_reason(self) -> str | None:
        """
        Say why the client cannot vouch for this phase, or None when it can.
        """
        # Busy time beside CPU time: a client that other work keeps from its core
        # never rests, though it used little CPU.
        share = max(self.cpu_share, self.busy_share)
        if share > SATURATED:
            return f"the client was busy {share:.0%} of the time, limit {SATURATED:.0%}"
        if self.lag_last_us > LAG_US and self.lag_last_us > LAG_GROWTH * self.lag_first_us:
            return f"the client's lag grew from {self.lag_first_us / 1000:.1f} to {self.lag_last_us / 1000:.1f} ms"
        return None


class _Client:
    """
    One client process.
    """

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - this program has one thread
        )
        self._input = b""

    def send(self, line: str) -> None:
        """
        Write one command.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ClientError(f"the load client has ended; it was told '{line}'") from None

    def read(self, seconds: float) -> dict | list:
        """
        Read one answer.
        """
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._input:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise ClientError(f"the load client must answer in {seconds:g} s, it did not")
            piece = os.read(descriptor, 1 << 20)
            if not piece:
                raise ClientError(f"the load client ended with code {self._process.wait()}")
            self._input += piece
        line, _, self._input = self._input.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        """
        End the process.
        """
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def client_command() -> tuple[list[str], str]:
    """
    Return the command of a load client and what it is: "C" or "Python".
    """
    program = build("client") if not os.environ.get("BENCH_FALLBACK") else None
    if program is not None:
        return [str(program)], "C"
    return [sys.executable, "-S", "-E", str(Path(__file__).with_name("fallback.py"))], "Python"


class Clients:
    """
    The load clients of one server: as many processes as its streams need.
    """

    def __init__(self, addresses: list[tuple[str, int]], *, streams: int = 0) -> None:
        command, self.kind = client_command()
        count = max(1, -(-streams // MAX_STREAMS))
        if self.kind == "Python":
            count = max(count, FALLBACK_PROCESSES)
        self.addresses = addresses
        self._clients = [_Client(command) for _ in range(count)]
        for host, port in addresses:
            self.ask(f"target {host} {port}")

    def ask(self, command: str, seconds: float = 30) -> list:
        """
        Send one command to every client and return the answers.
        """
        for client in self._clients:
            client.send(command)
        return [client.read(seconds) for client in self._clients]

    def send_one(self, command: str) -> None:
        """
        Send one command to the first client, without reading its answer.
        """
        self._clients[0].send(command)

    def read_one(self, seconds: float = 30) -> dict:
        """
        Read the first client's answer.
        """
        answer = self._clients[0].read(seconds)
        assert isinstance(answer, dict)
        return answer

    def ask_one(self, command: str, seconds: float = 30) -> dict:
        """
        Send one command to the first client and return its answer.
        """
        self.send_one(command)
        return self.read_one(seconds)

    def add(self, count: int, path: str, keys: list[int]) -> None:
        """
        Add *count* streams of *path*, spread evenly over addresses and clients.
        """
        seats = [(c, t) for c in self._clients for t in range(len(self.addresses))]
        for place, (client, target) in enumerate(seats):
            share = count // len(seats) + (place < count % len(seats))
            if share:
                client.send(f"add {share} {target} {path} {','.join(map(str, keys))}")
                client.read(30)

    def connect(self, *, concurrency: int = 128, seconds: float = 120) -> dict:
        """
        Open every closed stream, with its last event id where it has one.
        """
        each = max(1, concurrency // len(self._clients))
        answers = self.ask(f"connect {each} {int(seconds * 1000)}", seconds + 30)
        why: dict[str, int] = {}
        for answer in answers:
            for reason, count in answer["why"].items():
                why[reason] = why.get(reason, 0) + count
        return {
            "open": sum(a["open"] for a in answers),
            "failed": sum(a["failed"] for a in answers),
            "seconds": max(a["seconds"] for a in answers),
            "why": why,
        }

    def wait(self, key: int, sequence: int, seconds: float = 30) -> int:
        """
        Wait until every stream has read *sequence* of topic *key*; return how many have not.
        """
        self.ask(f"final {key} {sequence}")
        return sum(a["behind"] for a in self.ask(f"wait {int(seconds * 1000)}", seconds + 30))

    def report(self) -> Report:
        """
        Return the sum of all reports.
        """
        report = Report()
        for answer in self.ask("report", 60):
            report.add(answer)
        return report

    def streams(self) -> list[dict]:
        """
        Return the faults of each stream.
        """
        return [stream for answer in self.ask("streams", 60) for stream in answer]

    def end(self) -> None:
        """
        End all clients.
        """
        for client in self._clients:
            client.end()
