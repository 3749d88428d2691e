"""
The load test's client reads whatever HTTP may look like, and behaves as a browser's EventSource.
"""

import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import gevent
import pytest
from gevent.event import Event

from app.parser import ServerSentEvent
from loadtest.generator import Generator, Ordinals, Stream, as_expected
from loadtest.measures import Collected
from loadtest.options import OPTIONS, source_addresses
from loadtest.publishing import Publishing
from loadtest.scenario import load_scenarios
from loadtest.sse_client import Answer, EventSource, Poster, ProtocolError, Target
from loadtest.tokens import Tokens

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
OPEN = b"id: 7\nevent: stream.open\nretry: 10\ndata: {}\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Server:
    """
    Writes to the n-th connection the n-th answer, the last one again and again.

    A number in an answer is a pause, `None` a reset, "hold" silence until the client leaves.
    """

    def __init__(self, *answers: list, wrap: ssl.SSLContext | None = None) -> None:
        self.answers = answers
        self.requests: list[bytes] = []
        self.peers: list[str] = []
        self._wrap = wrap
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if wrap else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, (peer, _) = self._listener.accept()
                self.peers.append(peer)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self._wrap:
                connection = self._wrap.wrap_socket(connection, server_side=True)
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            self.requests.append(request)
            for piece in self.answers[min(len(self.requests), len(self.answers)) - 1]:
                if isinstance(piece, float):
                    time.sleep(piece)
                elif piece is None:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                elif piece == "hold":
                    connection.recv(1)
                else:
                    connection.sendall(piece)
            connection.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*answers: list, **more) -> Server:
        servers.append(Server(*answers, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class Heard(EventSource):
    """Writes down what happens."""

    def __init__(self, target: Target, path: str = "/events") -> None:
        super().__init__(target, path)
        self.story: list = []
        self.events: list = []

    def opened(self, seconds, data):
        self.story.append("opened")

    def take(self, events):
        self.events += [(event.event, event.data) for event in events]

    def soft_failed(self):
        self.story.append("soft-failed")

    def refused(self, status, body):
        self.story.append(f"refused {status}")

    def broken(self, error):
        self.story.append("broken")

    def ended(self, clean):
        self.story.append("clean" if clean else "cut")


def heard(server: Server, times: int = 1) -> Heard:
    stream = Heard(Target(server.url))
    with gevent.Timeout(20):
        for _ in range(times):
            stream.once()
    return stream


class TestAnswer:
    BODY = OPEN + "data: größer\n\n".encode() + b"data: x\n\n"
    EVENTS = (("stream.open", "{}"), ("message", "größer"), ("message", "x"))

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
    def test_chunked_however_cut(self, size):
        """Chunks of every size, delivered in pieces of every size, make the same body."""
        for pieces in (1, 2, 5, 1000):
            cut = [self.BODY[at : at + size] for at in range(0, len(self.BODY), size)]
            wire = CHUNKED + b"".join(chunk(each) for each in cut) + b"0\r\n\r\n"
            here, there = gevent.socket.socketpair()

            def write(wire=wire, pieces=pieces, there=there):
                for at in range(0, len(wire), pieces):
                    there.sendall(wire[at : at + pieces])
                    gevent.sleep(0)

            gevent.spawn(write)
            answer, body = Answer(here), b""
            with gevent.Timeout(20):
                while piece := answer.read():
                    body += piece

            assert self.BODY == body
            assert answer.clean
            here.close()
            there.close()

    def test_chunk_extensions(self, serve):
        wire = CHUNKED + b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(self.BODY), self.BODY)

        assert [*self.EVENTS] == heard(serve([wire])).events

    def test_until_the_connection_ends(self, serve):
        """Without any framing, as nginx passes HTTP/1.0 on."""
        stream = heard(serve([HEAD + b"\r\n" + self.BODY]))

        assert ([*self.EVENTS], ["opened", "clean"]) == (stream.events, stream.story)

    def test_content_length(self, serve):
        """As a soft fail of nginx comes; the connection stays open behind it."""
        wire = HEAD + b"Content-Length: %d\r\n\r\n" % len(self.BODY) + self.BODY

        assert [*self.EVENTS] == heard(serve([wire, "hold"])).events

    def test_events_are_given_at_once(self, serve):
        """An event that is there is not kept until a buffer is full."""
        server = serve([CHUNKED + chunk(OPEN), 0.05, chunk(b"data: now\n\n"), "hold"])
        stream = Heard(Target(server.url))
        reader = gevent.spawn(stream.once)

        with gevent.Timeout(20):
            while len(stream.events) < 2:
                gevent.sleep(0.01)

        reader.kill()
        assert ("message", "now") == stream.events[-1]

    @pytest.mark.parametrize(
        "wire", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000]
    )
    def test_no_http(self, serve, wire):
        connection = Target(serve([wire, "hold"]).url).connect()
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")

        with pytest.raises(ProtocolError):
            Answer(connection)

    def test_broken_chunks(self, serve):
        stream = heard(serve([CHUNKED + chunk(OPEN) + b"zz\r\n"]))

        assert ["opened", "cut"] == stream.story


class TestEventSource:
    def test_comes_back_with_the_last_id(self, serve):
        """After `retry:`, with the id of the last event; a cut and a clean end alike."""
        later = chunk(b"id: 8\ndata: x\n\n")
        server = serve(
            [CHUNKED + chunk(OPEN) + later, None],
            [CHUNKED + chunk(b"event: stream.open\ndata: {}\n\n") + b"0\r\n\r\n"],
            [b"HTTP/1.1 204 No Content\r\n\r\n"],
        )
        stream = Heard(Target(server.url))

        with gevent.Timeout(20):
            stream.run()

        assert ["opened", "cut", "opened", "clean", "refused 204"] == stream.story
        assert b"Last-Event-ID" not in server.requests[0]
        assert [b"Last-Event-ID: 8" in request for request in server.requests[1:]] == [True, True]
        assert 0.01 == stream.retry_seconds

    @pytest.mark.parametrize("status", [b"204 No Content", b"401 Unauthorized", b"429 Too Many", b"503 Unavailable"])
    def test_gives_up_for_ever(self, serve, status):
        server = serve([b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status])
        stream = Heard(Target(server.url))

        with gevent.Timeout(20):
            stream.run()

        assert [f"refused {status[:3].decode()}"] == stream.story

    def test_gives_up_on_another_type(self, serve):
        server = serve([b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi"])

        assert ["refused 200"] == heard(server).story

    @pytest.mark.parametrize(
        "wire",
        [
            CHUNKED + chunk(b"retry: 700\n\n") + b"0\r\n\r\n",
            CHUNKED + chunk(b":\n\n"),
            HEAD + b"X-Sse-Fallback: 429\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(OPEN) + b"0\r\n\r\n",
        ],
    )
    def test_soft_failed(self, serve, wire):
        """A 200 without `stream.open`, or one that says so, is no open."""
        assert ["soft-failed"] == heard(serve([wire])).story

    def test_nobody_there(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        stream = Heard(Target(f"http://127.0.0.1:{port}"))

        assert stream.once()
        assert ["broken"] == stream.story

    def test_close_wakes_the_reader(self, serve):
        """A stream that is cut from outside ends at once, and comes back as after any loss."""
        stream = Heard(Target(serve([CHUNKED + chunk(OPEN), "hold"]).url))
        reader = gevent.spawn(stream.once)
        with gevent.Timeout(20):
            while not stream.is_open:
                gevent.sleep(0.01)
            stream.close()
            assert reader.get() is True

        assert ["opened", "cut"] == stream.story

    def test_a_flood_leaves_room(self, serve):
        """A stream that always has more to read does not keep the others from reading."""
        flood = serve([CHUNKED + chunk(OPEN), *[chunk(b"data: .\n\n" * 20_000)] * 60, "hold"])
        stream = Heard(Target(flood.url))
        reader = gevent.spawn(stream.once)
        turns = 0
        with gevent.Timeout(60):
            while len(stream.events) < 60 * 20_000:
                gevent.sleep(0)
                turns += bool(stream.events)
        reader.kill()

        assert turns > 20


def certificate(folder: Path) -> ssl.SSLContext:
    """Return a server's context, with a certificate that nobody trusts."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(folder / "key"), "-out", str(folder / "crt")],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "crt", folder / "key")
    return context


class TestTarget:
    def test_source_addresses(self, serve):
        """Streams are spread over the addresses, which is how more than 28,000 go to one port."""
        server = serve([HEAD + b"\r\n"])
        target = Target(server.url, sources=["127.0.0.5", "127.0.0.6"])

        for number in range(4):
            target.connect(number).close()

        with gevent.Timeout(20):
            while len(server.peers) < 4:
                gevent.sleep(0.01)
        assert ["127.0.0.5", "127.0.0.6"] * 2 == server.peers

    def test_sources_of_a_local_target(self):
        options = SimpleNamespace(sources="auto")

        assert 64 == len(set(source_addresses(options, "http://127.0.0.1:8080")))
        assert [] == source_addresses(options, "https://staging.example.com")
        assert ["a", "b"] == source_addresses(SimpleNamespace(sources="a, b"), "https://staging.example.com")

    def test_tls(self, serve, tmp_path: Path):
        """Checked by default; `insecure` takes any."""
        server = serve([CHUNKED + chunk(OPEN) + b"0\r\n\r\n"], wrap=certificate(tmp_path))
        stream, strict = Heard(Target(server.url, insecure=True)), Heard(Target(server.url))

        with gevent.Timeout(20):
            strict.once()
            stream.once()

        assert (["broken"], ["opened", "clean"]) == (strict.story, stream.story)

    def test_tls_is_cut(self, serve, tmp_path: Path):
        """A stream that is cut in the moment that it could read on ends as any other, and is no fault of the generator's."""
        server = serve([CHUNKED + chunk(OPEN), 0.2, chunk(b"data: x\n\n"), "hold"], wrap=certificate(tmp_path))
        stream = Heard(Target(server.url, insecure=True))
        reader = gevent.spawn(stream.once)
        with gevent.Timeout(20):
            while not stream.story:
                gevent.sleep(0.005)
        gevent.spawn_later(0.05, stream.close)
        gevent.sleep(0)
        time.sleep(0.6)  # of the whole thread: afterwards both are due at once

        assert reader.get(timeout=20)
        assert ["opened", "cut"] == stream.story

    @pytest.mark.parametrize("first", ["::1", "127.0.0.1"])
    def test_name_with_two_kinds_of_addresses(self, serve, monkeypatch, first):
        """Only one of them can be reached from here: all streams take that one."""
        server = serve([CHUNKED + chunk(OPEN) + b"0\r\n\r\n"])
        found = [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", server.port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port)),
        ]
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: sorted(found, key=lambda each: each[4][0] != first))

        target = Target(f"http://staging.test:{server.port}")
        streams = [Heard(target) for _ in range(2)]
        for number, stream in enumerate(streams):
            stream.number = number
            with gevent.Timeout(20):
                stream.once()

        assert [["opened", "clean"]] * 2 == [stream.story for stream in streams]


class TestPoster:
    def test_keeps_its_connection(self, serve):
        wire = b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n{}"
        server = serve([wire, 0.05, wire, "hold"])
        poster = Poster(Target(server.url))

        with gevent.Timeout(20):
            answers = [poster.post("/publish", b"[]", {}) for _ in range(2)]

        assert [(201, b"{}")] * 2 == answers
        assert 1 == len(server.peers)


def options(**more) -> SimpleNamespace:
    values = {option.flag.removeprefix("--").replace("-", "_"): option.default for option in OPTIONS}
    return SimpleNamespace(**(values | more))


class TestGenerator:
    def make(self, url: str = "http://127.0.0.1:1", **more) -> Generator:
        return Generator(load_scenarios()["average-load"], options(), Target(url), streams=100, run="r", **more)  # type: ignore[arg-type]

    def test_numbers_over_all_processes(self):
        """Two processes fill all topics evenly, without asking each other."""
        generators = [self.make(workers=2, index=index) for index in (0, 1)]
        topics = [
            generator.topics_of(generator.ordinal("subscriber"))[0] for generator in generators for _ in range(50)
        ]

        assert {"loadtest/0": 50, "loadtest/1": 50} == {topic: topics.count(topic) for topic in topics}

    def test_a_number_that_is_free_is_taken_again(self):
        ordinals = Ordinals()
        assert [0, 1, 2] == [ordinals.take() for _ in range(3)]
        ordinals.give_back(1)

        assert [1, 3] == [ordinals.take() for _ in range(2)]

    def test_generator_out_of_descriptors(self):
        """What the generator itself ran out of is no fault of the server's."""
        generator = self.make()
        stream = Stream(generator, 0)

        stream.broken(OSError(24, "Too many open files"))
        stream.broken(OSError(99, "Cannot assign requested address"))
        stream.broken(ConnectionRefusedError(111, "refused"))

        assert 2 == generator.measures.tally["generator_errors"]
        assert {"broken:no descriptors left", "broken:no ports left", "broken:ECONNREFUSED", "generator_errors"} == set(
            generator.measures.tally
        )

    def test_unfinished(self, serve):
        """A stream that is not back at the end is no loss, but it is told."""
        generator = self.make(serve([CHUNKED + chunk(OPEN)]).url)
        stream = Stream(generator, 0)
        with gevent.Timeout(20):
            stream.once()
            later = int(time.time() * 1e6) + 10**6
            generator.finish(as_expected({"k": ["loadtest/0", 3, later, later]}), 0.3)

        assert (0, 1) == (generator.measures.counts.lost, generator.measures.tally["unfinished"])

    def test_error_of_tls(self):
        """OpenSSL numbers its errors by itself: 1 is not EPERM."""
        generator = self.make()

        Stream(generator, 0).broken(ssl.SSLCertVerificationError(1, "self-signed certificate"))

        assert ["broken:SSLCertVerificationError"] == list(generator.measures.tally)

    def test_who_leaves(self, serve):
        """What a stream owes when its user leaves is lost, as at the end of the run."""
        generator = self.make(serve([CHUNKED + chunk(OPEN), "hold"]).url)
        later = int(time.time() * 1e6) + 10**7
        stays, leaves = Stream(generator, 0), Stream(generator, 1)
        readers = [gevent.spawn(stream.once) for stream in (stays, leaves)]
        with gevent.Timeout(20):
            while generator.measures.open < 2:
                gevent.sleep(0.005)

        generator.owed = as_expected(
            {"k": ["loadtest/1", 3, later, later], "of others": ["loadtest/9", 5, later, later]}
        )
        leaves.leave()

        assert (3, 1) == (generator.measures.counts.lost, generator.measures.open)
        gevent.killall(readers)

    def test_one_token_is_one_user(self):
        """To the server all streams with one token are one user's, in all processes together."""
        collected = Collected()
        for index in range(2):
            generator = self.make(workers=2, index=index)
            generator.tokens = Tokens("a token")
            for ordinal in range(7):
                Stream(generator, ordinal).is_open = True
            collected.add(str(index), generator.hand_over())

        assert 14 == collected.most_per_user

    def test_lag_is_measured(self):
        """A process that is kept busy says so."""
        generator = self.make(tick=0.005)
        generator.start()
        gevent.sleep(0.02)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass
        gevent.sleep(0.02)
        generator.stop()

        assert generator.measures.times["lag"].max_value > 250_000

    def test_stalled_publishes(self, monkeypatch):
        """A server that stalls delays every event that was due meanwhile, not only the one that it held."""
        calls, held = [], Event()

        def post(self, path, body, headers):
            calls.append(body)
            held.wait(30)
            return 201, b"{}"

        def until(condition) -> None:
            with gevent.Timeout(30):
                while not condition():
                    gevent.sleep(0.01)

        monkeypatch.setattr("loadtest.publishing.Poster.post", post)
        # 100 topics, one event a second each.
        generator = Generator(
            load_scenarios()["average-load"], options(), Target("http://127.0.0.1:1"), streams=5000, run="r"
        )  # type: ignore[arg-type]
        publishing = gevent.spawn(Publishing(generator).run)
        until(lambda: calls)
        assert not generator.between_publishes.is_set()
        gevent.sleep(1.0)
        held.set()
        until(lambda: len(calls) > 1)
        generator.stop_publishing()

        assert generator.between_publishes.wait(10)
        publishing.join(10)
        late = generator.measures.times["publish_delay"]
        # One, and all that were due while it was held.
        assert late.total_count >= generator.measures.tally["published"] >= 100
        assert late.get_value_at_percentile(50) > 400_000

    def test_stalled_until_the_end(self, monkeypatch):
        """What was due while a server stalled is late, too, where the run ends before it could be published."""
        held = Event()
        monkeypatch.setattr("loadtest.publishing.Poster.post", lambda *_: (held.wait(30), (201, b"{}"))[1])
        generator = self.make()  # 2 topics, one event a second each
        publishing = gevent.spawn(Publishing(generator).run)
        with gevent.Timeout(30):
            while generator.between_publishes.is_set():
                gevent.sleep(0.005)
        gevent.sleep(1.1)
        generator.stop_publishing()
        held.set()
        publishing.join(10)

        # Due at 0, 0.5 and 1 s; the first was published.
        assert 1 == generator.measures.tally["published"]
        late = generator.measures.times["publish_delay"]
        assert 3 == late.total_count
        assert 500_000 < late.max_value < 5_000_000

    def test_refused_publishes(self, monkeypatch):
        """Why publishes were repeated is in the report."""
        answers = [(429, b'{"detail": "too many"}'), (201, b"{}")]
        monkeypatch.setattr("loadtest.publishing.Poster.post", lambda *_: answers.pop(0))
        generator = self.make()

        assert Publishing(generator).publish(["loadtest/0"])

        assert {"publish_refused:429 too many": 1, "publish_repeated": 1, "published": 1} == generator.measures.tally

    def test_what_is_not_ours(self):
        """Data of somebody else that begins as ours does is passed over."""
        generator = self.make()
        stream = Stream(generator, 0)

        stream.take([ServerSentEvent(event="message", data=data, id="1") for data in ("sse1", "sse1 a b", "sse1" * 99)])

        assert 0 == generator.measures.tally["deliveries"]

    def test_fault_of_its_own(self):
        """A user that our own fault ended makes the run void: what it would have missed is not seen."""
        generator = self.make()

        with pytest.raises(ZeroDivisionError), generator.own_faults():
            1 / 0  # noqa: B018
        with pytest.raises(gevent.GreenletExit), generator.own_faults():
            raise gevent.GreenletExit  # Locust ends a user so

        assert 1 == generator.measures.tally["generator_errors"]

    def test_silence(self, serve, monkeypatch):
        """A stream without any byte for a minute is dead, whatever its connection says."""
        monkeypatch.setattr("loadtest.generator.SILENT_SECONDS", 0.3)
        generator = self.make(serve([CHUNKED + chunk(OPEN), "hold"]).url)
        stream = Stream(generator, 0)
        generator.start()
        with gevent.Timeout(20):
            stream.once()
        generator.stop()

        assert 1 == generator.measures.tally["ended:silent"]

    def test_reason_that_was_told(self, serve):
        """The end of a stream has the server's reason, where it told one."""
        generator = self.make(
            serve([CHUNKED + chunk(OPEN + b"event: stream.draining\ndata: {}\n\n") + b"0\r\n\r\n"]).url
        )
        with gevent.Timeout(20):
            Stream(generator, 0).once()

        assert 1 == generator.measures.tally["ended:draining"]
