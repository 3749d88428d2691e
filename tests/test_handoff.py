"""
What happens to a connection at and after the hand-off, however its client behaves.

Whatever a client does, nothing of it may stay: no transport, no task, no
descriptor. And where a connection cannot be taken over, the same streams are
served all the same.
"""

import asyncio
import contextlib
import ctypes
import errno
import functools
import gc
import json
import os
import random
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import h2.config
import h2.connection
import h2.events
import pytest

from app import handoff
from app.handoff import Connection
from app.stack import Nginx
from app.stream import Stream
from tests.inside import Inside
from tests.wire import (
    PATIENCE_SECONDS,
    Process,
    Reader,
    Wire,
    get,
    log_lines,
    metric,
    publish,
    request,
    wait_until,
)

make_request = request  # beside pytest's fixture of that name

LOOPS = ("uvloop", "asyncio")
HEARTBEAT = 0.3
SLOW = 0.6
BRIEF: dict[str, Any] = {"heartbeat_seconds": HEARTBEAT, "history_seconds": 10.0, "slow_consumer_seconds": SLOW}
MEGABYTES = 4


@pytest.fixture
def topic() -> str:
    return f"t{random.randrange(1 << 48):x}"


@pytest.fixture(autouse=True)
def _close_soon(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A quarter of the time that connections are kept for a peer that does not read."""
    if not any(words in request.node.name for words in ("two_seconds", "in_time")):
        monkeypatch.setattr(handoff, "CLOSE_SECONDS", handoff.CLOSE_SECONDS / 4)


@pytest.fixture(scope="module", params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["auto", "off"])
def inside(request: pytest.FixtureRequest, loop: str) -> Iterator[Inside]:
    """An application whose belongings can be counted, on either path."""
    with Inside(loop, handoff=request.param, **BRIEF) as inside:
        Reader.open(inside.port, "warm").until_open().close()
        yield inside


@pytest.fixture
def nothing_left(inside: Inside) -> Iterator[None]:
    """Afterwards there are no more tasks, descriptors and objects than before."""
    wait_until(lambda: not inside.streams(), "streams of other tests")
    time.sleep(0.05)
    held = inside.held()
    yield
    inside.wait_until_only(held)
    assert not inside.streams()


def flood(wire: Wire, megabytes: int = MEGABYTES, *, patience: float = PATIENCE_SECONDS) -> int:
    """Send garbage for as long as somebody takes it; return how much was taken."""
    wire.socket.settimeout(patience)
    sent = 0
    with contextlib.suppress(TimeoutError):
        for _ in range(megabytes * 16):
            sent += wire.socket.send(b"garbage." * 8_192)
    wire.socket.settimeout(PATIENCE_SECONDS)
    return sent


def thrice[**P](test: Callable[P, None]) -> Callable[P, None]:
    """Make the visit three times, so that what adds up is seen."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        for _ in range(3):
            test(*args, **kwargs)

    return run


@pytest.mark.usefixtures("nothing_left")
class TestNothingIsLeft:
    """Each visit three times over, on both paths and both loops."""

    @thrice
    def test_of_a_second_request_in_the_same_segment(self, inside: Inside, topic: str):
        """It gets no answer, because the first one's answer has no end; the stream works."""
        with Reader.open(inside.port, topic, after=request("/events?topic=other")) as reader:
            reader.until_open()
            inside.publish(topic, "works")
            assert reader.until_data(1) == ["works"]
            assert reader.names.count("stream.open") == 1

    @thrice
    def test_of_a_second_request_that_comes_later(self, inside: Inside, topic: str):
        """Dropped by us; Hypercorn itself ends a connection on which nothing more was to come."""
        with Reader.open(inside.port, topic) as reader:
            reader.until_open()
            reader.wire.send(request("/healthz"))
            inside.publish(topic, "works")
            if taken_over(inside):
                assert reader.until_data(1) == ["works"]
            else:
                reader.until(lambda r: r.over or r.data == ["works"])

    @thrice
    def test_of_megabytes_of_garbage_before_and_after_the_hand_off(self, inside: Inside, topic: str):
        with Wire(inside.port) as wire:
            wire.send(request(f"/events?topic={topic}") + b"g" * 1_000)
            # Hypercorn stops reading; we take and drop.
            patience = PATIENCE_SECONDS if taken_over(inside) else 0.05
            before = flood(wire, patience=patience)
            reader = Reader(wire)
            reader.read_head()
            reader.until_open()
            after = flood(wire, patience=patience)
            inside.publish(topic, "works")
            assert reader.until_data(1) == ["works"]

        if taken_over(inside):
            assert before == after == MEGABYTES << 20

    @pytest.mark.parametrize(
        ("headers", "start"),
        [({"Content-Length": "100000000"}, b""), ({"Transfer-Encoding": "chunked"}, b"fffffff\r\n")],
        ids=["with its length", "chunked"],
    )
    @thrice
    def test_of_a_body_that_goes_on_and_on(self, inside: Inside, topic: str, headers: dict[str, str], start: bytes):
        """Nobody reads it, and nobody keeps it."""
        with Wire(inside.port) as wire:
            wire.send(request(f"/events?topic={topic}", headers) + start)
            reader = Reader(wire)
            reader.read_head()
            reader.until_open()
            before = resident_bytes()
            assert flood(wire, 16) == 16 << 20
            assert resident_bytes() - before < 8 << 20
            inside.publish(topic, "works")
            assert reader.until_data(1) == ["works"]

    @thrice
    def test_of_a_client_that_waits_for_leave_to_send_a_body(self, inside: Inside, topic: str):
        with Wire(inside.port) as wire:
            wire.send(request(f"/events?topic={topic}", {"Content-Length": "10", "Expect": "100-continue"}))
            assert b"100" in wire.until(b"\r\n\r\n").partition(b"\r\n")[0]
            reader = Reader(wire)
            reader.read_head()
            reader.until_open()

    @thrice
    def test_of_a_half_close_in_the_segment_of_the_request(self, inside: Inside, topic: str):
        with Wire(inside.port) as wire:
            wire.send(request(f"/events?topic={topic}"))
            wire.half_close()
            assert wire.ends()

    @thrice
    def test_of_a_half_close_behind_a_second_request(self, inside: Inside, topic: str):
        """Gone before the hand-off, and yet bytes stand before its end."""
        with Wire(inside.port) as wire:
            wire.send(request(f"/events?topic={topic}") + request("/events?topic=other"))
            wire.half_close()
            assert wire.ends()

    def test_of_a_half_close_with_bytes_before_it_that_nobody_has_read(self, inside: Inside, topic: str):
        """While the route still asks where this client stands, and before the hand-off."""
        with Wire(inside.port) as wire:
            asked = request(f"/events?topic={topic}", {"Last-Event-ID": "zzzzzzzz:1-0"})
            wire.send(asked + request("/events?topic=other"))
            time.sleep(0.02)
            wire.send(b"more")
            wire.half_close()
            assert wire.ends()

    @thrice
    def test_of_a_half_close_after_a_second_request(self, inside: Inside, topic: str):
        with Reader.open(inside.port, topic, after=b"x" * 1_000) as reader:
            reader.until_open()
            reader.wire.half_close()
            wait_until(lambda: not inside.streams(), "the end")
            assert reader.wire.ends()

    @thrice
    def test_of_a_client_that_resets_at_once(self, inside: Inside, topic: str):
        """Between its request and the head, wherever the server happens to be."""
        for delay in (0, 0, 0.0003, 0.0006, 0.001, 0.002):
            wire = Wire(inside.port)
            wire.send(request(f"/events?topic={topic}", {"Last-Event-ID": "zzzzzzzz:1-0"}))
            time.sleep(delay)
            wire.reset()

    @thrice
    def test_of_a_client_that_leaves_in_the_middle_of_its_request(self, inside: Inside, topic: str):
        for leave in (Wire.reset, Wire.close, Wire.half_close):
            wire = Wire(inside.port)
            wire.send(request(f"/events?topic={topic}")[:-7])
            time.sleep(0.002)
            leave(wire)
            wire.close()

    @thrice
    def test_of_a_connection_that_was_used_before(self, inside: Inside, topic: str):
        """Answers before the stream do not keep it from being taken over."""
        with Wire(inside.port) as wire:
            for _ in range(3):
                wire.send(request("/healthz"))
                wire.until(b"}")
            wire.send(request("/healthz") + request(f"/events?topic={topic}"))
            wire.until(b"}")
            reader = Reader(wire)
            reader.read_head()
            reader.until_open()

    @thrice
    def test_of_http_1_0(self, inside: Inside, topic: str):
        """No chunks there; nginx without `proxy_http_version 1.1` is such a client."""
        with Reader.open(inside.port, topic, version="1.0") as reader:
            reader.until_open()
            inside.publish(topic, "works")
            assert reader.until_data(1) == ["works"]
            assert "transfer-encoding" not in reader.headers
            inside.end_all()
            assert reader.until_over().retry_ms is not None

    @thrice
    def test_of_a_client_that_leaves_with_a_large_event_under_way(self, inside: Inside, topic: str):
        for leave in (Wire.reset, Wire.close, Wire.half_close):
            reader = Reader.open(inside.port, topic, receive_buffer=4_096).until_open()
            inside.publish(topic, *["x" * 500_000] * 2)
            time.sleep(0.03)
            leave(reader.wire)
            wait_until(lambda: not inside.streams(), "the end")
            reader.close()


def taken_over(inside: Inside) -> bool:
    return inside.kit.settings.handoff == "auto"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.usefixtures("nothing_left")
class TestAPeerThatReadsNothing:
    def test_is_cut_when_it_is_slow(self, inside: Inside, topic: str):
        """Stream, transport and tasks go, though its connection cannot be finished."""
        with Reader.open(inside.port, topic, receive_buffer=4_096) as reader:
            reader.until_open()
            inside.publish(topic, *["x" * 500_000] * 3)
            wait_until(lambda: not inside.streams(), "the end")
            assert inside.kit.tally.ended["slow_consumer"] > 0
            wait_until(lambda: connections(inside.port) == 0, "the descriptor")


@pytest.mark.parametrize("path", ["auto", "off"])
def test_a_peer_gets_all_if_it_reads_on_in_time(loop: str, path: str, topic: str):
    """What waits when a stream ends is still delivered, to the last chunk."""
    with Inside(loop, handoff=path) as inside:
        held = inside.held()
        with Reader.open(inside.port, topic, receive_buffer=16_384) as reader:
            reader.until_open()
            inside.publish(topic, "x" * 700_000)
            time.sleep(0.1)
            inside.end_all()
            time.sleep(0.1)
            reader.until_over()
            assert reader.clean
            assert reader.data == ["x" * 700_000]
            assert reader.retry_ms is not None
        inside.wait_until_only(held)


@pytest.mark.parametrize("path", ["auto", "off"])
def test_a_peer_that_reads_nothing_is_cut_two_seconds_after_its_stream_has_ended(loop: str, path: str, topic: str):
    """`close` alone would wait for it for ever. Nothing else here would end it in time."""
    with Inside(loop, handoff=path) as inside:
        held = inside.held()
        with Reader.open(inside.port, topic, receive_buffer=4_096) as reader:
            reader.until_open()
            inside.publish(topic, *["x" * 500_000] * 3)
            time.sleep(0.2)
            inside.end_all()
            began = time.monotonic()
            wait_until(lambda: connections(inside.port) == 0, "the connection's end")
            assert time.monotonic() - began > handoff.CLOSE_SECONDS / 2
            assert not reader.until_over().clean
        inside.wait_until_only(held)


def connections(port: int) -> int:
    """Count the established connections that somebody holds on the server's side."""
    count = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, state, inode = fields[1], fields[3], fields[9]
        count += int(local.rpartition(":")[2], 16) == port and state != "0A" and inode != "0"
    return count


class TestMany:
    def test_connects_and_disconnects_leave_nothing(self, inside: Inside, topic: str):
        """Two thousand, in every way of coming and going."""
        wait_until(lambda: not inside.streams(), "streams of other tests")
        held = inside.held()
        ways: list[Callable[[Wire], None]] = [
            Wire.close,
            Wire.reset,
            lambda wire: (wire.send(request(f"/events?topic={topic}")), wire.close())[0],
            lambda wire: (wire.send(request(f"/events?topic={topic}")), wire.reset())[0],
            lambda wire: (wire.send(request(f"/events?topic={topic}")), wire.receive(), wire.close())[0],
            lambda wire: (wire.send(request(f"/events?topic={topic}")), wire.receive(), wire.reset())[0],
            lambda wire: (wire.send(request("/healthz")), wire.receive(), wire.close())[0],
            lambda wire: (wire.send(b"GET /ev"), wire.close())[0],
        ]
        for number in range(2_000):
            ways[number % len(ways)](Wire(inside.port))

        inside.wait_until_only(held)

    def test_a_closed_connection_is_not_kept_for_the_keep_alive_time(self, inside: Inside):
        """Probes and single requests cost a descriptor only while they last."""
        held = inside.held()
        for _ in range(50):
            Wire(inside.port).close()
            assert get(inside.port, "/healthz")[0] == 200

        inside.wait_until_only(held)


class TestMemory:
    @pytest.fixture
    def taken(self, loop: str) -> Iterator[Inside]:
        with Inside(loop, **BRIEF) as inside:
            Reader.open(inside.port, "warm").until_open().close()
            wait_until(lambda: not inside.streams(), "the first stream's end")
            gc.collect()
            gc.disable()
            yield inside
            gc.enable()

    def test_an_open_stream_keeps_nothing_of_the_framework(self, taken: Inside, topic: str):
        """Not even until the cyclic collector's next run, which streams outlive by minutes."""
        count = 20
        # What other tests have left in this process is not this test's matter.
        before = Counter(type(found).__name__ for found in taken.call(gc.get_objects))
        readers = [Reader.open(taken.port, topic).until_open() for _ in range(count)]
        wait_until(lambda: not [name for name in taken.tasks() if "server_callback" in name], "the requests' ends")
        names = Counter(type(found).__name__ for found in taken.call(gc.get_objects)) - before

        assert names["Stream"] >= count
        assert names["Connection"] >= count
        for name in ("_Connection", "H11Protocol", "HTTPStream", "StreamReader", "ASGIHTTPConnection", "Opening"):
            assert names[name] == 0, name
        for reader in readers:
            reader.close()

    def test_a_stream_that_has_ended_leaves_little_to_the_collector(self, taken: Inside, topic: str):
        """Measured: 8 objects, a closure of the router; 71 before the rings were opened."""
        count = 30
        for _ in range(count):
            Reader.open(taken.port, topic).until_open().close()
        wait_until(lambda: not taken.streams(), "the streams' ends")
        wait_until(lambda: connections(taken.port) == 0, "the connections' ends")
        found = taken.call(gc.collect)

        assert found / count < 15


# --- Clients that vanish


CLONE_NEWNET = 0x40000000


@pytest.fixture
def far_away(require: Callable[..., str]) -> Iterator[tuple[str, Callable[[], socket.socket], Callable[[], None]]]:
    """
    A network of its own behind a virtual cable.

    Gives the address of this end, a way to get a socket at the far end, and a
    way to lose everything that is sent from there.
    """
    require("ip")
    require("nft")
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root")

    def run(*command: str, check: bool = True) -> bool:
        return subprocess.run(command, check=check, capture_output=True).returncode == 0

    # Others test at this moment, too: a name stands for a subnet, and is given once.
    free = (n for n in random.sample(range(1 << 14), 20) if run("ip", "netns", "add", f"sse-{n:04x}", check=False))
    number = next(free, 0)
    space, near, far = f"sse-{number:04x}", f"sse{number:04x}a", f"sse{number:04x}b"
    net, first = f"10.198.{number >> 6}", (number & 63) * 4
    here, there = f"{net}.{first + 1}", f"{net}.{first + 2}"

    try:
        run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
        run("ip", "addr", "add", f"{here}/30", "dev", near)
        run("ip", "link", "set", near, "up")
        run("ip", "-n", space, "addr", "add", f"{there}/30", "dev", far)
        run("ip", "-n", space, "link", "set", far, "up")
    except subprocess.CalledProcessError as error:
        run("ip", "netns", "del", space, check=False)
        pytest.skip(f"no network namespace here: {error.stderr.decode().strip()}")

    def make() -> socket.socket:
        made: list[socket.socket] = []

        def work() -> None:
            with open(f"/run/netns/{space}") as file:  # noqa: PTH123
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(socket.socket())

        # A thread alone changes its network; a socket keeps the one it was made in.
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return made[0]

    def lose() -> None:
        rules = "add table inet lost; add chain inet lost out { type filter hook output priority 0; policy drop; }"
        run("ip", "netns", "exec", space, "nft", rules)

    yield here, make, lose
    run("ip", "link", "del", near, check=False)
    run("ip", "netns", "del", space, check=False)


class TestAClientThatVanishes:
    """No FIN, no RST, no answer: in TCP's eyes a slow network, for a quarter of an hour."""

    @pytest.fixture(params=["auto", "off"])
    def vanish(
        self,
        request: pytest.FixtureRequest,
        loop: str,
        far_away: tuple[str, Callable[[], socket.socket], Callable[[], None]],
    ) -> Iterator[tuple[Process, Callable[[str], None]]]:
        here, make, lose = far_away
        env = {
            "SSE_HOST": here,
            "SSE_HANDOFF": request.param,
            "SSE_LOOP": loop,
            "SSE_HEARTBEAT_SECONDS": HEARTBEAT,
            "SSE_SLOW_CONSUMER_SECONDS": SLOW,
            "SSE_MAX_AGE_SECONDS": 2.5 if "its_age" in request.node.name else 60,
        }
        process = Process(env)
        process.start()
        with contextlib.closing(process):
            wait_until(lambda: "window_loaded" in process.log(), "the start")
            clients = []

            def appear_and_vanish(topic: str) -> None:
                client = make()
                clients.append(client)
                client.settimeout(PATIENCE_SECONDS)
                wait_until(lambda: client.connect_ex((here, process.port)) in (0, errno.EISCONN), "the connection")
                client.sendall(make_request(f"/events?topic={topic}"))
                while b"stream.open" not in client.recv(4_096):
                    pass
                assert process.streams() == 1
                lose()

            yield process, appear_and_vanish
            wait_until(lambda: connections(process.port) == 0, "the descriptor")
            assert process.complaints() == []
            for client in clients:
                client.close()

    def test_costs_an_idle_stream_until_its_age(self, vanish: tuple[Process, Callable[[str], None]], topic: str):
        """Heartbeats go on into the void; then stream, transport and descriptor go."""
        process, appear_and_vanish = vanish
        appear_and_vanish(topic)
        wait_until(process.ended, "the stream's end")
        (line,) = process.ended()
        assert line["reason"] == "max_age"

    def test_is_a_slow_consumer_if_there_is_much_for_it(
        self, vanish: tuple[Process, Callable[[str], None]], topic: str
    ):
        """Then it would cost buffers."""
        process, appear_and_vanish = vanish
        appear_and_vanish(topic)
        body = json.dumps([{"topics": [topic], "data": "x" * 400_000}] * 3).encode()
        head = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        with Wire(process.port, host=process.env["SSE_HOST"]) as wire:
            wire.send(make_request("/publish", head, method="POST") + body)
            wire.until(b"201")
        wait_until(lambda: process.ended("slow_consumer"), "the stream's end")


# --- nginx


NGINX = """
worker_processes 1;
pid nginx.pid;
error_log stderr crit;
events { worker_connections 1024; }
http {
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    upstream one { server 127.0.0.1:%(app)d max_fails=0; keepalive 32; }
    server {
        listen 127.0.0.1:%(port)d;
        location / {
            proxy_pass http://one;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }
    }
}
"""

class PlainNginx(Nginx):
    """nginx with keep-alive to one upstream for streams and publishes alike."""

    def start(self) -> None:
        self.prefix.mkdir(parents=True, exist_ok=True)
        (self.prefix / "nginx.conf").write_text(NGINX % {"app": int(self.servers[0]), "port": self.port})
        super(Nginx, self).start()

    def probe(self) -> bool:
        with contextlib.suppress(OSError):
            return get(self.port, "/healthz")[0] == 200
        return False


async def publish_among_ending_streams(port: int, seconds: float) -> Counter[int]:
    """Count the statuses of POSTs, while streams on the same upstream come and end."""
    statuses: Counter[int] = Counter()
    stop = asyncio.Event()

    async def stream() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request("/events?topic=churn", {"Connection": "close"}))
                while await reader.read(65_536):
                    pass
                writer.close()

    async def post() -> None:
        body = b'{"topics": ["other"], "data": "x"}'
        head = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while not stop.is_set():
            writer.write(request("/publish", head, method="POST") + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            statuses[int(answer.split()[1])] += 1
            await reader.readexactly(int(answer.partition(b"content-length:")[2].split()[0]))
        writer.close()

    clients = [asyncio.create_task(stream()) for _ in range(100)] + [asyncio.create_task(post()) for _ in range(12)]
    await asyncio.sleep(seconds)
    stop.set()
    await asyncio.gather(*clients)
    return statuses


class TestBehindNginx:
    def test_no_post_meets_a_connection_that_was_a_streams(self, require: Callable[..., str], tmp_path: Path):
        """nginx keeps upstream connections; one that was taken over must not be among them."""
        require("nginx")
        env = {"SSE_MAX_AGE_SECONDS": 0.2, "SSE_HEARTBEAT_SECONDS": 0.1, "SSE_LOG_LEVEL": "warning"}
        with Process(env) as process:
            nginx = PlainNginx(tmp_path, [str(process.port)])
            nginx.start()
            with contextlib.closing(nginx):
                nginx.wait_ready()
                statuses = asyncio.run(publish_among_ending_streams(nginx.port, 2.5))

        assert statuses[201] > 50
        assert set(statuses) == {201}


# --- Other protocols, other servers


class H2:
    """An HTTP/2 client that gives the server room only when it is told to."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._h2.initiate_connection()
        self.data: dict[int, bytes] = {}
        self.heads: dict[int, dict[str, str]] = {}
        self.ended: set[int] = set()
        self._flush()

    def get(self, path: str) -> int:
        number = self._h2.get_next_available_stream_id()
        head = [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", "test")]
        self._h2.send_headers(number, head, end_stream=True)
        self.data[number] = b""
        self._flush()
        return number

    def reset(self, number: int) -> None:
        self._h2.reset_stream(number)
        self._flush()

    def widen(self, number: int) -> None:
        """Give a stream all the room there can be: then only the connection limits it."""
        self._h2.increment_flow_control_window(1 << 30)
        self._h2.increment_flow_control_window(1 << 30, number)
        self._flush()

    def until(self, met: Callable[[], Any], seconds: float = PATIENCE_SECONDS, *, room: bool = True) -> None:
        deadline = time.monotonic() + seconds
        self.wire.socket.settimeout(0.05)
        while not met():
            assert time.monotonic() < deadline, {number: len(data) for number, data in self.data.items()}
            try:
                data = self.wire.receive()
            except TimeoutError:
                continue
            assert data, "the connection ended"
            for event in self._h2.receive_data(data):
                match event:
                    case h2.events.DataReceived():
                        self.data[event.stream_id] += event.data
                        if room:
                            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    case h2.events.ResponseReceived():
                        self.heads[event.stream_id] = dict(event.headers)
                    case h2.events.StreamEnded():
                        self.ended.add(event.stream_id)
            self._flush()

    def _flush(self) -> None:
        self.wire.send(self._h2.data_to_send())


class TestHttp2:
    """Clear text with prior knowledge, straight into Hypercorn; TLS differs only below."""

    @pytest.fixture
    def inside(self, loop: str) -> Iterator[Inside]:
        with Inside(loop, **BRIEF) as inside:
            yield inside

    def test_serves_many_streams_on_one_connection(self, inside: Inside, topic: str):
        """Each with its own events, a large one too; a reset ends one alone."""
        held = inside.held()
        with Wire(inside.port) as wire:
            client = H2(wire)
            numbers = [client.get(f"/events?topic={topic}-{number}") for number in range(5)]
            client.until(lambda: all(b"stream.open" in client.data[number] for number in numbers))
            assert "connection" not in client.heads[numbers[0]]
            inside.publish(f"{topic}-0", "x" * 1_000_000)
            inside.publish(f"{topic}-1", "small")
            client.until(lambda: b"x\n\n" in client.data[numbers[0]] and b"small" in client.data[numbers[1]])
            assert b"small" not in client.data[numbers[2]]
            client.reset(numbers[2])
            wait_until(lambda: len(inside.streams()) == 4, "the end of one")
            inside.end_all()
            client.until(lambda: len(client.ended) == 4)
        inside.wait_until_only(held)

    def test_a_stream_that_is_given_no_room_ends_alone(self, inside: Inside, topic: str):
        """
        Nothing piles up for it, it ends as a slow consumer, and its neighbour goes on.

        Hypercorn's own `send` would take everything and let nobody wait.
        """
        with Wire(inside.port) as wire:
            client = H2(wire)
            blocked, neighbour = client.get(f"/events?topic={topic}"), client.get(f"/events?topic={topic}-other")
            client.until(lambda: all(b"stream.open" in client.data[number] for number in (blocked, neighbour)))
            for _ in range(8):
                inside.publish(topic, "x" * 500_000)
            client.until(lambda: len(inside.streams()) == 1, room=False)
            assert inside.kit.tally.ended["slow_consumer"] == 1
            assert len(client.data[blocked]) < 100_000
            client.until(lambda: blocked in client.ended, room=False)
            assert [stream.topics[0] for stream in inside.streams()] == [f"{topic}-other"]

    def test_a_connection_that_is_not_read_is_given_up(self, inside: Inside, topic: str):
        """Though the window is wide open; tasks and descriptor go, too."""
        held = inside.held()
        with Wire(inside.port, receive_buffer=4_096) as wire:
            client = H2(wire)
            number = client.get(f"/events?topic={topic}")
            client.until(lambda: b"stream.open" in client.data[number])
            client.widen(number)
            for _ in range(4):
                inside.publish(topic, "x" * 500_000)
            wait_until(lambda: not inside.streams(), "the stream's end")
            wait_until(lambda: connections(inside.port) == 0, "the descriptor")
        inside.wait_until_only(held)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory, require: Callable[..., str]) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = str(folder / "key"), str(folder / "certificate")
    command = [require("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


class TlsWire(Wire):
    """The same over TLS, HTTP/1.1."""

    def __init__(self, port: int, **options: Any) -> None:
        super().__init__(port, **options)
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["http/1.1"])
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost")


class TestOtherWays:
    """TLS straight into Hypercorn, and another ASGI server: the generator serves the same streams."""

    @pytest.fixture(params=["tls", "uvicorn"])
    def way(self, request: pytest.FixtureRequest, loop: str, certificate: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
        if request.param == "uvicorn":
            pytest.importorskip("uvicorn", reason="uvicorn is not installed")
        tls = {"config": {"certfile": certificate[0], "keyfile": certificate[1]}}
        options = tls if request.param == "tls" else {"server": "uvicorn", "config": {"http": "h11"}}
        with Inside(loop, **options, **BRIEF) as inside:
            yield inside, TlsWire if request.param == "tls" else Wire

    def test_serve_the_same_stream(self, way: tuple[Inside, type[Wire]], topic: str):
        """From stream.open to the clean end, resets and silent peers included."""
        inside, kind = way

        def opened(**options: Any) -> Wire:
            wire = kind(inside.port, **options)
            wire.send(request(f"/events?topic={topic}"))
            wire.until(b"stream.open")
            return wire

        opened().close()
        wait_until(lambda: not inside.streams(), "the first stream's end")
        wait_until(lambda: connections(inside.port) == 0, "its connection's end")
        held = inside.held()

        wire = opened()
        inside.publish(topic, "x" * 1_000_000, "last")
        wire.until(b"data: last")
        inside.end_all()
        wire.until(b"0\r\n\r\n")
        wire.close()
        for leave in (Wire.close, Wire.reset, lambda wire: wire.socket.shutdown(socket.SHUT_WR)):
            wire = opened()
            leave(wire)
            wait_until(lambda: not inside.streams(), "the end")
            wire.close()
        with opened(receive_buffer=4_096):
            inside.publish(topic, *["x" * 500_000] * 3)
            wait_until(lambda: not inside.streams(), "the slow consumer's end")
            assert inside.kit.tally.ended["slow_consumer"] == 1
        with opened(receive_buffer=4_096):
            inside.publish(topic, *["x" * 500_000] * 3)
            time.sleep(0.1)
            inside.end_all()
            wait_until(lambda: connections(inside.port) == 0, "the connection's end")
        inside.wait_until_only(held)
        assert inside.kit.tally.handed_off == 0


# --- The self-check


def test_a_descriptor_is_lent_and_given_back():
    """A connection that is forgotten closes no descriptor: its number may be another's by then."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = Stream("a-1", ("news",))
        connection = Connection(Mock(), ours.fileno(), stream, Mock())
        assert 3 == stream.send(b"one")

        connection.connection_lost(None)
        del connection

        assert 0 == stream.send(b"two")
        assert b"one" == theirs.recv(9)
        assert 5 == ours.send(b"three")


UNKNOWN_HYPERCORN = """
import sys
from hypercorn.protocol.h11 import H11Protocol
init = H11Protocol.__init__
def other(*arguments):
    init(*arguments)
H11Protocol.__init__ = other
from app.__main__ import main
sys.exit(main([]))
"""


class TestSelfCheck:
    def test_all_is_there_in_the_pinned_versions(self):
        """Else every process of this version would run on the slow path."""
        assert handoff.self_check() is None
        assert handoff.UNFIT is None

    def test_what_it_misses_turns_the_hand_off_off(self, topic: str):
        """Start-up says so, and the streams are served all the same."""
        with Process({}, UNKNOWN_HYPERCORN) as process:
            (starting,) = log_lines(process.log(), "starting")
            (warning,) = log_lines(process.log(), "handoff_off")
            with Reader.open(process.port, topic) as reader:
                reader.until_open()
                publish(process.port, {"topics": [topic], "data": "works"})
                assert reader.until_data(1) == ["works"]
            (opened,) = log_lines(process.log(), "stream_opened")

            assert "H11Protocol sets no send" in starting["handoff"]
            assert warning["level"] == "warning"
            assert opened["path"] == "generator"
            assert metric(process.metrics_port, "sse_streams_handed_off_total") == 0
