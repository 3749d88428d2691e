"""
`python -m loadtest cost`: what one stream and one event cost the generator.

Real Locust users on real sockets, against a server that only writes. Events come one by
one, so that every one costs its own wake-up and its own read: the dearest way.
"""

import argparse
import contextlib
import os
import random
import selectors
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

from loadtest.parts import memory
from loadtest.scenario import load_scenarios
from loadtest.sequence import MICROSECONDS, stamp

KB_PER_STREAM = 20.0
US_PER_EVENT = 30.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def main(arguments: list[str]) -> int:
    """Measure, print, and return 0 if both figures keep their bounds."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest cost", description=(__doc__ or "").strip().splitlines()[0]
    )
    parser.add_argument("--streams", type=int, default=2000, help="streams to hold (default: 2000)")
    parser.add_argument("--events", type=int, default=20, help="events to each stream (default: 20)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return 0
    kilobytes, microseconds = measure(options.streams, options.events)
    print(f"{kilobytes:.1f} KB a stream (at most {KB_PER_STREAM:g}), {options.streams:,} streams")
    print(f"{microseconds:.1f} µs an event (at most {US_PER_EVENT:g}), {options.streams * options.events:,} events")
    return 0 if kilobytes <= KB_PER_STREAM and microseconds <= US_PER_EVENT else 1


def measure(streams: int, events: int) -> tuple[float, float]:
    """
    Return KB of memory per stream and µs of CPU per event, of a generator process.

    Raises:
        RuntimeError: not all streams opened, or not all events came.
    """
    # Locust turns the process into one of gevent's, so not before it is needed.
    import gevent
    from locust.env import Environment

    from loadtest import users
    from loadtest.generator import Generator
    from loadtest.sse_client import Target

    with subprocess.Popen(
        [sys.executable, "-m", "loadtest", "cost", "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdin
        assert server.stdout
        try:
            port = int(server.stdout.readline())
            options = SimpleNamespace(token="", secret="", claims="", user_limit=0)
            generator = users.current = Generator(
                load_scenarios()["fan-out"], options, Target(f"http://127.0.0.1:{port}"), streams=streams, run="cost"
            )
            generator.start()
            runner = Environment(user_classes=[users.Subscriber]).create_local_runner()

            def open_streams(count: int) -> None:
                runner.spawn_users({"Subscriber": count - generator.measures.open})
                deadline = time.monotonic() + 60
                while generator.measures.open < count:
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"{generator.measures.open} of {count} streams opened")
                    gevent.sleep(0.05)

            # What the first ones load and allocate for all is not theirs.
            open_streams(100)
            before = memory(os.getpid())
            open_streams(100 + streams)
            gevent.sleep(0.5)
            kilobytes = (memory(os.getpid()) - before) / 1000 / streams

            generator.stop()
            cpu, deadline = time.process_time(), time.monotonic() + 120
            for round_ in range(1, events + 1):
                server.stdin.write(b"event\n")
                server.stdin.flush()
                while generator.measures.tally["deliveries"] < round_ * (100 + streams):
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"{generator.measures.tally['deliveries']} events came")
                    gevent.sleep(0.005)
            microseconds = (time.process_time() - cpu) * MICROSECONDS / events / (100 + streams)
            if generator.measures.counts.lost or generator.measures.counts.duplicate:
                raise RuntimeError(f"the server was not read right: {generator.measures.counts}")
            runner.quit()
            return kilobytes, microseconds
        finally:
            server.kill()


def serve() -> None:
    """Accept streams; write one event to each for every line on standard input."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(listener.getsockname()[1], flush=True)
    listener.setblocking(False)
    chosen = selectors.DefaultSelector()
    chosen.register(listener, selectors.EVENT_READ)
    chosen.register(sys.stdin, selectors.EVENT_READ)
    streams: list[socket.socket] = []
    first = previous = number = 0
    opening = _chunk(b"id: 1\nevent: stream.open\ndata: {}\n\n")
    while True:
        for key, _ in chosen.select():
            if key.fileobj is listener:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        connection, _ = listener.accept()
                        connection.setblocking(True)
                        connection.sendall(HEAD + opening)
                        streams.append(connection)
            else:
                if not sys.stdin.readline():
                    return
                now = int(time.time() * MICROSECONDS)
                number, previous, first = number + 1, previous or now, first or now
                data = stamp("cost.0.0/loadtest/0", number, now, previous, first, "elsewhere", 200)
                event = _chunk(f"id: {number}\ndata: {data}\n\n".encode())
                previous = now
                random.shuffle(streams)
                for connection in streams:
                    connection.sendall(event)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
