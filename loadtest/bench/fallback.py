"""
The load client in Python, for machines without a C compiler.

It takes the commands of client.c and gives the same answers, at about ten times
the CPU, so several of these share the streams of one server. Two differences: the
client's lag is not sampled (busy time alone voids a phase), and there is no nap
between turns. Run as a program of its own; standard library only.
"""

import json
import os
import re
import resource
import select
import socket
import sys
import time
from pathlib import Path

# It runs as a script, without the package around it.
sys.path.insert(0, str(Path(__file__).parent))
from histogram import Histogram

CLOSED, CONNECTING, HEAD, OPENING, OPEN = range(5)
DATA = re.compile(rb"k=(\d+) n=(\d+) t=(\d+) .*\$", re.DOTALL)
LINE_END = re.compile(rb"\r?\n")
# No server measured here writes a bare CR.
BLOCK_END = re.compile(rb"\r?\n\r?\n")


class Pair:
    """
    What one stream has read of one topic.
    """

    __slots__ = ("key", "next", "skipped")

    def __init__(self, key: int) -> None:
        self.key = key
        self.next = 0
        self.skipped: set[int] = set()


class Stream:
    """
    One stream and its counts.
    """

    __slots__ = (
        "began", "chunk_left", "churned", "dup", "events", "framing", "id", "known", "link",
        "lost", "missing", "order", "pairs", "path", "rest", "state", "target", "wire",
    )  # fmt: skip

    def __init__(self, target: int, path: str, keys: list[int], *, churned: bool = False) -> None:
        self.target = target
        self.path = path
        self.pairs = {key: Pair(key) for key in keys}
        self.churned = churned
        self.link: socket.socket | None = None
        self.state = CLOSED
        self.known = False
        self.id = b""
        self.events = self.missing = self.dup = self.order = self.lost = 0
        self.began = 0
        self.reset()

    def reset(self) -> None:
        """
        Forget the bytes of the last connection.
        """
        self.wire = b""
        self.rest = b""
        self.framing = "raw"
        self.chunk_left = 0

    def see(self, pair: Pair, number: int) -> None:
        """
        Count what reading sequence number *number* says.
        """
        if number == pair.next:
            pair.next += 1
        elif number > pair.next:
            pair.skipped.update(range(pair.next, number))
            self.missing += number - pair.next
            pair.next = number + 1
        elif number in pair.skipped:
            pair.skipped.remove(number)
            self.missing -= 1
            self.order += 1
        else:
            self.dup += 1


class Client:
    """
    All streams of this process, and the commands.
    """

    def __init__(self) -> None:
        self.poller = select.epoll()
        self.by_descriptor: dict[int, Stream] = {}
        self.targets: list[tuple[str, int]] = []
        self.streams: list[Stream] = []
        self.base: dict[int, int] = {}
        self.final: dict[int, int] = {}
        self.opened = self.lost = self.foreign = self.corrupt = self.others = 0
        self.open_count = 0
        self.sources = 1
        self.turn = 0
        self.failures: dict[str, int] = {}
        self.mark()

    # --- Streams

    def mark(self) -> None:
        """
        Begin a measured phase.
        """
        self.events = self.bytes = self.reads = 0
        self.latency, self.connects = Histogram(), Histogram()
        self.began = time.monotonic_ns()
        self.cpu = time.process_time()
        self.rested = 0

    def fail(self, why: str) -> None:
        """
        Count a connect that failed.
        """
        self.failures[why] = self.failures.get(why, 0) + 1

    def start(self, stream: Stream) -> None:
        """
        Begin to connect.
        """
        stream.began = time.monotonic_ns()
        stream.reset()
        link = socket.socket()
        link.setblocking(False)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.link = link
        stream.state = CONNECTING
        self.by_descriptor[link.fileno()] = stream
        try:
            if self.sources > 1:
                self.turn += 1
                link.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
                link.bind((f"127.0.0.{1 + self.turn % self.sources}", 0))
            link.connect(self.targets[stream.target])
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(os.strerror(error.errno or 0))
            self.close(stream, ours=True)
            return
        self.poller.register(link.fileno(), select.EPOLLOUT)

    def close(self, stream: Stream, *, ours: bool) -> None:
        """
        End a stream, by our wish or the server's.
        """
        if stream.link is None:
            return
        del self.by_descriptor[stream.link.fileno()]
        stream.link.close()
        stream.link = None
        if stream.state == OPEN and not stream.churned:
            self.open_count -= 1
            if not ours:
                self.lost += 1
                stream.lost = 1
        stream.state = CLOSED

    def request(self, stream: Stream) -> None:
        """
        Send the request of a stream that is connected.
        """
        assert stream.link is not None
        if error := stream.link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.fail(os.strerror(error))
            self.close(stream, ours=True)
            return
        resume = b"Last-Event-ID: " + stream.id + b"\r\n" if stream.id else b""
        # What a path has behind a '#' is no part of the request's target: a token.
        path, _, token = stream.path.partition("#")
        if token:
            resume += f"Authorization: Bearer {token}\r\n".encode()
        try:
            stream.link.send(
                b"GET %b HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
                b"Cache-Control: no-store\r\n%b\r\n" % (path.encode(), resume)
            )
        except OSError:
            self.fail("request not sent")
            self.close(stream, ours=True)
            return
        stream.state = HEAD
        self.poller.modify(stream.link.fileno(), select.EPOLLIN)

    def read(self, stream: Stream) -> None:
        """
        Take what the kernel has.
        """
        assert stream.link is not None
        try:
            piece = stream.link.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            piece, why = b"", os.strerror(error.errno or 0)
        else:
            why = "closed before it opened"
        if not piece:
            if stream.state < OPEN:
                self.fail(why)
            self.close(stream, ours=False)
            return
        at = time.monotonic_ns()
        self.bytes += len(piece)
        self.reads += 1
        if stream.state == HEAD:
            stream.wire += piece
            head, found, piece = stream.wire.partition(b"\r\n\r\n")
            if not found:
                return
            stream.wire = b""
            if not self.take_head(stream, head.lower()):
                return
        self.take_body(stream, piece, at)
        if stream.framing == "ended" and stream.link is not None:
            if stream.state < OPEN:
                self.fail("ended before it opened")
            self.close(stream, ours=False)
        if stream.churned and stream.state == OPEN:
            self.close(stream, ours=True)

    def take_head(self, stream: Stream, head: bytes) -> bool:
        """
        Judge the head; return whether a body follows.
        """
        status = head[9:12]
        if status != b"200" or b"\r\ncontent-type: text/event-stream" not in head:
            self.fail(f"status {status.decode()}" if status != b"200" else "not text/event-stream")
            self.close(stream, ours=True)
            return False
        stream.framing = "size" if b"\r\ntransfer-encoding: chunked" in head else "raw"
        stream.state = OPENING
        if not stream.known:
            for pair in stream.pairs.values():
                pair.next = self.base.get(pair.key, 0) + 1
        return True

    def take_body(self, stream: Stream, piece: bytes, at: int) -> None:
        """
        Take the chunk framing off, then parse.
        """
        if stream.framing == "raw":
            body = piece
        else:
            parts = []
            piece = stream.wire + piece
            while piece and stream.framing != "ended":
                if stream.framing == "size":
                    line, found, after = piece.partition(b"\n")
                    if not found:
                        break
                    piece = after
                    stream.chunk_left = int(line.strip() or b"0", 16)
                    stream.framing = "data" if stream.chunk_left else "ended"
                elif stream.framing == "data":
                    part = piece[: stream.chunk_left]
                    parts.append(part)
                    piece = piece[len(part) :]
                    stream.chunk_left -= len(part)
                    if not stream.chunk_left:
                        stream.framing = "end"
                else:
                    _, found, after = piece.partition(b"\n")
                    if not found:
                        break
                    piece = after
                    stream.framing = "size"
            stream.wire = piece
            body = b"".join(parts)
        *blocks, stream.rest = BLOCK_END.split(stream.rest + body)
        for block in blocks:
            self.take_block(stream, block, at)

    def take_block(self, stream: Stream, block: bytes, at: int) -> None:
        """
        Take one event or comment.
        """
        if stream.state == OPENING:
            stream.state = OPEN
            self.connects.record((at - stream.began) // 1000)
            if not stream.churned:
                stream.known = True
                self.open_count += 1
                self.opened += 1
        data = None
        for line in LINE_END.split(block):
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data" and data is None:
                data = value
            elif name == b"id":
                stream.id = value
        if data is None or stream.churned:
            return
        if not data.startswith(b"k="):
            self.others += 1
            return
        found = DATA.fullmatch(data)
        if not found or found[2] == b"0":
            self.corrupt += 1
            return
        key, number, sent = map(int, found.groups())
        pair = stream.pairs.get(key)
        if pair is None:
            self.foreign += 1
            return
        stream.events += 1
        self.events += 1
        self.latency.record((at - sent) // 1000)
        stream.see(pair, number)

    def poll(self, seconds: float) -> bool:
        """
        Serve one turn; return whether standard input has something.
        """
        before = time.monotonic_ns()
        ready = self.poller.poll(seconds, 512)
        self.rested += time.monotonic_ns() - before
        commanded = False
        for descriptor, _ in ready:
            if descriptor == 0:
                commanded = True
                continue
            stream = self.by_descriptor.get(descriptor)
            if stream is None:
                continue
            if stream.state == CONNECTING:
                self.request(stream)
            else:
                self.read(stream)
        return commanded

    # --- Commands

    def connect(self, concurrency: int, milliseconds: int) -> dict:
        """
        Open every closed stream.
        """
        began = time.monotonic()
        deadline = began + milliseconds / 1000
        self.failures = {}
        waiting = [stream for stream in self.streams if stream.state == CLOSED]
        waiting.reverse()
        under_way: list[Stream] = []
        while waiting or under_way:
            if time.monotonic() > deadline:
                for stream in under_way:
                    self.fail("timeout")
                    self.close(stream, ours=True)
                break
            while waiting and len(under_way) < concurrency:
                stream = waiting.pop()
                stream.lost = 0
                self.start(stream)
                under_way.append(stream)
            self.poll(0.02)
            under_way = [stream for stream in under_way if CLOSED < stream.state < OPEN]
        return {
            "open": self.open_count,
            "seconds": time.monotonic() - began,
            "failed": sum(self.failures.values()),
            "why": self.failures,
        }

    def behind(self) -> int:
        """
        Count the pairs of open streams that have not read up to the last event.
        """
        return sum(
            pair.next <= self.final.get(pair.key, 0)
            for stream in self.streams
            if stream.state == OPEN
            for pair in stream.pairs.values()
        )

    def wait(self, milliseconds: int) -> dict:
        """
        Wait until nothing is behind.
        """
        deadline = time.monotonic() + milliseconds / 1000
        while (behind := self.behind()) and time.monotonic() < deadline:
            self.poll(0.02)
        return {"behind": behind, "at": time.monotonic_ns()}

    def churn(self, count: int, concurrency: int, target: int, path: str, milliseconds: int) -> dict:
        """
        Open and close *count* streams.
        """
        began = time.monotonic()
        deadline = began + milliseconds / 1000
        self.failures = {}
        left, under_way = count, []
        while left or under_way:
            if time.monotonic() > deadline:
                for stream in under_way:
                    self.fail("timeout")
                    self.close(stream, ours=True)
                break
            while left and len(under_way) < concurrency:
                left -= 1
                stream = Stream(target, path, [], churned=True)
                self.start(stream)
                under_way.append(stream)
            self.poll(0.02)
            under_way = [stream for stream in under_way if stream.link is not None]
        failed = sum(self.failures.values())
        seconds = time.monotonic() - began
        return {"done": count - left - failed, "seconds": seconds, "failed": failed, "why": self.failures}

    def probe(self, target: int, path: str, every: int, milliseconds: int) -> dict:
        """
        Ask for *path* again and again on one connection.
        """
        times, bad = Histogram(), 0
        deadline = time.monotonic() + milliseconds / 1000
        with socket.create_connection(self.targets[target], 10) as link:
            while time.monotonic() < deadline:
                began = time.monotonic_ns()
                try:
                    link.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                    # The last answer's body may come in a packet of its own.
                    while b"HTTP/1.1 " not in (answer := link.recv(4096)):
                        if not answer:
                            raise ConnectionError
                    answer = answer[answer.index(b"HTTP/1.1 ") :]
                except OSError:
                    bad += 1
                    break
                bad += answer[9:12] not in (b"200", b"204")
                times.record((time.monotonic_ns() - began) // 1000)
                time.sleep(every / 1000)
        return {"bad": bad, "times": times.as_report()}

    def report(self) -> dict:
        """
        Return what this phase measured, and all faults.
        """
        wall = time.monotonic_ns() - self.began
        faulty = 0
        sums = {"missing": 0, "dup": 0, "order": 0}
        for stream in self.streams:
            missing = stream.missing + self.tail(stream)
            sums["missing"] += missing
            sums["dup"] += stream.dup
            sums["order"] += stream.order
            faulty += bool(missing or stream.dup or stream.order or stream.lost)
        return sums | {
            "streams": len(self.streams), "open": self.open_count, "opened": self.opened,
            "lost": self.lost, "events": self.events, "bytes": self.bytes, "reads": self.reads,
            "others": self.others, "foreign": self.foreign, "corrupt": self.corrupt, "faulty": faulty,
            "wall": wall / 1e9, "cpu": time.process_time() - self.cpu,
            "busy": (wall - self.rested) / 1e9, "lag_first_us": 0, "lag_last_us": 0,
            "latency": self.latency.as_report(), "connects": self.connects.as_report(),
            "lag": Histogram().as_report(),
        }  # fmt: skip

    def tail(self, stream: Stream) -> int:
        """
        Count the events up to the last that a stream has not read.
        """
        if not stream.known:
            return 0
        return sum(max(0, self.final.get(pair.key, 0) - pair.next + 1) for pair in stream.pairs.values())

    def list_streams(self) -> list[dict]:
        """
        Return the faults of each stream.
        """
        return [
            {
                "open": stream.state == OPEN, "events": stream.events,
                "missing": stream.missing + self.tail(stream), "dup": stream.dup,
                "order": stream.order, "lost": stream.lost, "id": stream.id.decode("utf-8", "replace"),
            }
            for stream in self.streams
        ]  # fmt: skip

    def clear(self) -> None:
        """
        Forget all faults.
        """
        self.lost = self.foreign = self.corrupt = 0
        for stream in self.streams:
            stream.missing = stream.dup = stream.order = stream.lost = 0
            for pair in stream.pairs.values():
                pair.skipped.clear()

    def obey(self, line: str) -> dict | list:
        """
        Carry out one command and return its answer.
        """
        match line.split():
            case ["target", host, port]:
                self.targets.append((host, int(port)))
            case ["add", count, target, path, keys]:
                numbers = [int(key) for key in keys.split(",")]
                self.streams += [Stream(int(target), path, numbers) for _ in range(int(count))]
            case ["base", key, number]:
                self.base[int(key)] = int(number)
            case ["final", key, number]:
                self.final[int(key)] = int(number)
            case ["connect", concurrency, milliseconds]:
                return self.connect(int(concurrency), int(milliseconds))
            case ["wait", milliseconds]:
                return self.wait(int(milliseconds))
            case ["churn", count, concurrency, target, path, milliseconds]:
                return self.churn(int(count), int(concurrency), int(target), path, int(milliseconds))
            case ["probe", target, path, every, milliseconds]:
                return self.probe(int(target), path, int(every), int(milliseconds))
            case ["sources", count]:
                self.sources = int(count)
            case ["nap", _]:
                pass
            case ["clear"]:
                self.clear()
            case ["mark"]:
                self.mark()
            case ["report"]:
                return self.report()
            case ["streams"]:
                return self.list_streams()
            case ["close"]:
                for stream in self.streams:
                    self.close(stream, ours=True)
            case ["quit"]:
                sys.exit(0)
            case _:
                sys.exit(f"client: unknown command {line!r}")
        return {}

    def run(self) -> None:
        """
        Obey standard input until it ends.
        """
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.poller.register(0, select.EPOLLIN)
        text = b""
        while True:
            if not self.poll(-1):
                continue
            piece = os.read(0, 65536)
            if not piece:
                return
            *lines, text = (text + piece).split(b"\n")
            for line in lines:
                # Whoever waits in `connect` or `wait` must not wake for input.
                self.poller.unregister(0)
                print(json.dumps(self.obey(line.decode())), flush=True)
                self.poller.register(0, select.EPOLLIN)


if __name__ == "__main__":
    Client().run()
