"""
nginx.conf by real requests, in front of toy applications that do as they are told.

`NGINX_BINARY=/path/to/nginx make test TESTS=tests/test_nginx.py` tests another version.
"""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.stack import ROOT, Nginx
from tests import live

NATIVE = {"Accept": "text/event-stream"}
# The application also sends X-Accel-Buffering; here nginx must do without.
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
PROBLEM = b'{"title": "the application\'s own words"}'


@dataclass
class Toy:
    """One toy application; `answer` is what it does with every request."""

    port: int = 0
    # A status to answer with, or one of: stream, silent, cut, hang up, mute.
    answer: int | str = 200
    requests: list[str] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)

    @property
    def names(self) -> dict[str, str]:
        """Headers of the last request, by name in lower case."""
        lines = self.requests[-1].split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (more := connection.recv(65536)):
                    return
                head += more
            head, _, body = head.partition(b"\r\n\r\n")
            self.requests.append(head.decode())
            if length := re.search(rb"(?i)content-length: (\d+)", head):
                while len(body) < int(length[1]):
                    body += connection.recv(65536)
            match self.answer:
                case "stream":
                    connection.sendall(STREAM)
                    self.go_on.wait(10)
                    connection.sendall(b"data: one\n\n")
                    connection.settimeout(10)
                    connection.recv(1)
                    self.gone.set()
                case "silent":
                    connection.sendall(STREAM)
                    self.go_on.wait(10)
                case "cut":
                    connection.sendall(STREAM + b"data: half")
                case "mute":
                    self.go_on.wait(10)
                case "hang up":
                    pass
                case int(status):
                    connection.sendall(
                        b"HTTP/1.1 %d Status\r\nContent-Type: application/problem+json\r\nRetry-After: 7\r\n"
                        b"X-Accel-Buffering: no\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(PROBLEM), PROBLEM)
                    )


@dataclass
class Front:
    """nginx and the toys behind it."""

    nginx: Nginx
    toys: list[Toy]

    def ask(
        self, path: str, headers: dict[str, str] | None = None, method: str = "GET", body: bytes | None = None
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.nginx.port, timeout=10)
        connection.request(method, path, body=body, headers=headers or {})
        return connection.getresponse()

    def asked(self, toy: Toy) -> list[str]:
        """Requests that *toy* got, without the ones that looked whether nginx is up."""
        return [request for request in toy.requests if "GET /healthz" not in request]

    def log(self) -> list[dict]:
        """The access log, without these."""
        lines = [json.loads(line) for line in self.nginx.access_log_path.read_text().splitlines()]
        return [line for line in lines if line["path"] != "/healthz"]

    def wait_log(self, count: int) -> list[dict]:
        deadline = time.monotonic() + 20
        while len(self.log()) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.log()


@pytest.fixture
def front(require, tmp_path: Path) -> Iterator[Front]:
    """Start nginx as it is shipped, with two toys."""
    yield from _front(require, tmp_path)


@pytest.fixture
def hasty_front(require, tmp_path: Path) -> Iterator[Front]:
    """The same with timeouts scaled down."""
    yield from _front(require, tmp_path, proxy_read_timeout="300ms", worker_shutdown_timeout="100ms")


def _front(require, folder: Path, **directives: str) -> Iterator[Front]:
    require("nginx")
    toys, listeners = [Toy(), Toy()], []
    for toy in toys:
        listeners.append(socket.create_server(("127.0.0.1", 0)))
        toy.port = listeners[-1].getsockname()[1]
        threading.Thread(target=toy.serve, args=(listeners[-1],), daemon=True).start()
    nginx = Nginx(folder, [f"127.0.0.1:{toy.port}" for toy in toys], directives=directives)
    nginx.start()
    try:
        nginx.wait_ready()
        yield Front(nginx, toys)
    finally:
        nginx.close()
        for listener in listeners:
            listener.close()
        for toy in toys:
            toy.go_on.set()


def answer(front: Front, what: int | str) -> None:
    for toy in front.toys:
        toy.answer = what


class TestStream:
    @pytest.mark.parametrize("headers", [NATIVE, {}], ids=["native", "api"])
    def test_head_arrives_before_the_first_event(self, front: Front, headers):
        """An EventSource is open when the server says so, not when something happens."""
        answer(front, "stream")

        response = front.ask("/events?topic=a", headers)
        head = dict(response.getheaders())
        for toy in front.toys:
            toy.go_on.set()

        assert 200 == response.status
        assert "text/event-stream" == head["Content-Type"]
        assert b"data: one\n" == response.readline()

    @pytest.mark.parametrize("headers", [NATIVE, {}], ids=["native", "api"])
    def test_a_proxy_in_front(self, front: Front, headers):
        """It learns, too, that it must not buffer: nginx would keep that to itself."""
        assert "no" == front.ask("/events", headers).getheader("X-Accel-Buffering")

    def test_client_gone(self, front: Front):
        """A client's end reaches the application at once."""
        answer(front, "stream")
        for toy in front.toys:
            toy.go_on.set()
        with socket.create_connection(("127.0.0.1", front.nginx.port), 10) as connection:
            connection.sendall(b"GET /events HTTP/1.1\r\nHost: kit\r\n\r\n")
            while not connection.recv(65536).endswith(b"data: one\n\n\r\n"):
                pass
        toy = next(toy for toy in front.toys if front.asked(toy))

        assert toy.gone.wait(20)

    def test_silence_longer_than_the_read_timeout(self, hasty_front: Front):
        """A silent application is given up, and the client's connection is cut."""
        answer(hasty_front, "silent")
        began = time.monotonic()

        response = hasty_front.ask("/events", NATIVE)
        with contextlib.suppress(http.client.IncompleteRead):
            response.read()

        assert 0.3 <= time.monotonic() - began < 20

    def test_headers_towards_the_application(self, front: Front):
        """The application learns who asked, and nothing that it could be fooled with."""
        front.ask(
            "/events?topic=a",
            {
                "Host": "kit.example:8443",
                "Connection": "Upgrade",
                "Upgrade": "h2c",
                "X-Forwarded-For": "6.6.6.6",
                "X-Request-Id": "mine",
                "X-Sse-Soft-Fail": "mine",
            },
        )
        names = next(toy for toy in front.toys if front.asked(toy)).names

        assert "GET /events?topic=a HTTP/1.1" in str([toy.requests for toy in front.toys])
        assert "kit.example:8443" == names["host"]
        assert "kit.example:8443" == names["x-forwarded-host"]
        assert "127.0.0.1" == names["x-forwarded-for"]
        assert "http" == names["x-forwarded-proto"]
        assert re.fullmatch("[0-9a-f]{32}", names["x-request-id"])
        assert not {"upgrade", "connection", "x-sse-soft-fail"} & set(names)


class TestStickiness:
    @pytest.mark.parametrize(
        ("path", "headers"),
        [
            ("/events?user=u{}", {}),
            ("/events", {"Cookie": "session=s{}"}),
            ("/events", {"Authorization": "Bearer {}"}),
            ("/events?ticket=owner{}.%random", {}),
        ],
        ids=["user", "cookie", "bearer", "ticket"],
    )
    def test_one_key_one_process(self, front: Front, path, headers):
        """A user's streams reach the same process each time, and users are spread."""
        places = []
        for number in range(20):
            place = set()
            for turn in range(3):
                before = [len(toy.requests) for toy in front.toys]
                filled = {name: value.format(number) for name, value in headers.items()}
                front.ask(path.format(number).replace("%random", f"r{turn}"), filled).read()
                place.add(tuple(len(toy.requests) - was for toy, was in zip(front.toys, before, strict=True)))
            assert 1 == len(place)
            places.append(place.pop())

        assert 2 == len(set(places))

    def test_api_is_not_sticky(self, front: Front):
        """Publishing is spread over all processes."""
        for _ in range(4):
            front.ask("/publish?user=u", method="POST", body=b"{}").read()

        assert [2, 2] == [sum("/publish" in request for request in toy.requests) for toy in front.toys]


class TestNextProcess:
    @pytest.mark.parametrize("refusal", [503, 502, "hang up"])
    def test_a_process_that_drains_or_died(self, front: Front, refusal):
        """Another process is asked, and the client notices nothing."""
        front.toys[0].answer = refusal

        for user in range(10):
            response = front.ask(f"/events?user={user}", NATIVE)
            assert 200 == response.status
            assert response.getheader("X-Sse-Fallback") is None

    def test_a_limit_holds_everywhere(self, front: Front):
        """429 is never taken to another process."""
        answer(front, 429)

        front.ask("/events").read()

        assert 1 == sum(len(front.asked(toy)) for toy in front.toys)

    def test_refusals_do_not_take_a_process_out(self, front: Front):
        """However often streams are refused, the API works, and streams do as soon as they may."""
        answer(front, 503)
        for user in range(30):
            front.ask(f"/events?user={user}").read()
        answer(front, 200)

        assert {200} == {front.ask("/publish", method="POST", body=b"{}").status for _ in range(4)}
        assert {200} == {front.ask(f"/events?user={user}").status for user in range(10)}

    def test_a_publish_is_not_repeated(self, front: Front):
        """A POST whose answer was lost may have been carried out: nginx leaves it to the client."""
        answer(front, "hang up")

        response = front.ask("/publish", method="POST", body=b"{}")

        assert 502 == response.status
        assert 1 == sum(len(front.asked(toy)) for toy in front.toys)


class TestSoftFail:
    @pytest.mark.parametrize("status", [429, 502, 503, 504])
    def test_native(self, front: Front, status):
        """What means "later" reaches an EventSource as 200, a `retry:` and a clean end."""
        answer(front, status)

        response = front.ask("/events?topic=a", NATIVE)
        body = response.read().decode()

        assert 200 == response.status
        assert "text/event-stream" == response.getheader("Content-Type")
        assert "no-store" == response.getheader("Cache-Control")
        assert str(status) == response.getheader("X-Sse-Fallback")
        assert re.fullmatch(rf"retry: [0-9]{{3,4}}\n: {status}, come back later\n\n", body)
        assert str(status) == front.wait_log(1)[-1]["fallback"]

    def test_told_to_the_application(self, front: Front):
        """The application may answer with the true status: nginx softens it."""
        front.ask("/events", NATIVE).read()

        asked = next(toy for toy in front.toys if front.asked(toy))
        assert "nginx" == asked.names["x-sse-soft-fail"]

    def test_no_application_at_all(self, front: Front):
        """A dead application is no reason to give up for ever."""
        answer(front, "hang up")

        response = front.ask("/events", NATIVE)

        assert 200 == response.status
        assert "502" == response.getheader("X-Sse-Fallback")

    def test_jitter(self, front: Front):
        """Those who were sent away together do not come back together."""
        answer(front, 429)

        retries = {front.ask("/events", NATIVE).readline() for _ in range(40)}

        assert 8 < len(retries)

    @pytest.mark.parametrize("status", [401, 403, 404, 204])
    def test_final_answers(self, front: Front, status):
        """What will not pass by itself keeps its status: an EventSource must give up."""
        answer(front, status)

        assert status == front.ask("/events", NATIVE).status

    @pytest.mark.parametrize(
        "headers",
        [{}, {"Accept": "*/*"}, NATIVE | {"Authorization": "Bearer t"}],
        ids=["no accept", "any", "authorization"],
    )
    @pytest.mark.parametrize("status", [429, 503, 502])
    def test_api_clients(self, front: Front, status, headers):
        """They get the true status, and the application's own body and headers."""
        answer(front, status)

        response = front.ask("/events", headers)

        assert status == response.status
        assert PROBLEM == response.read()
        assert "7" == response.getheader("Retry-After")
        assert response.getheader("X-Sse-Fallback") is None

    @pytest.mark.parametrize("path", ["/events", "/publish"])
    def test_api_clients_without_application(self, front: Front, path):
        """nginx's own answer is a problem document too."""
        answer(front, "hang up")

        response = front.ask(path)
        problem = json.loads(response.read())

        assert 502 == response.status == problem["status"]
        assert "application/problem+json" == response.getheader("Content-Type")
        assert {"type", "title", "status", "detail", "name", "rule", "value", "cure"} == set(problem)

    def test_after_the_head(self, front: Front):
        """A stream that is cut in the middle stays a network error: nothing is put behind it."""
        answer(front, "cut")

        assert b"data: half" == front.ask("/events", NATIVE).read()


class TestLog:
    def test_no_query_string(self, front: Front):
        """Tickets and user names stay out of the log."""
        front.ask("/events?topic=a&ticket=secret.secret", {"User-Agent": 'quo"ted \u00e9'.encode().decode("latin-1")}).read()

        (line,) = front.wait_log(1)

        assert "secret" not in json.dumps(line)
        assert "/events" == line["path"]
        assert 200 == line["status"]
        assert line["upstream"].startswith("127.0.0.1:")
        assert re.fullmatch("[0-9a-f]{32}", line["request_id"])

    def test_no_http_at_all(self, front: Front):
        """Whatever comes in, a line is JSON."""
        for garbage in (b"GET /old\r\n", b"\x16\x03\x01 no\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", front.nginx.port), 5) as connection:
                connection.sendall(garbage)
                connection.settimeout(5)
                connection.recv(65536)

        assert 3 == len(front.wait_log(3))

    def test_no_answer_at_all(self, hasty_front: Front):
        """A request that a reload cuts before its answer has status 000, which is no JSON."""
        answer(hasty_front, "mute")
        with socket.create_connection(("127.0.0.1", hasty_front.nginx.port), 5) as connection:
            connection.sendall(b"POST /publish HTTP/1.1\r\nHost: kit\r\nContent-Length: 9\r\n\r\n{")
            live.eventually(lambda: read_by(hasty_front.nginx.port), "nginx has read it")
            hasty_front.nginx.kill(signal.SIGHUP)
            connection.recv(1)

        assert [0] == [line["status"] for line in hasty_front.wait_log(1)]


def read_by(port: int) -> bool:
    """Whether the program behind *port* has taken its one connection, and has read what came."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    mine = [row for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01"]
    return [(row[4].partition(":")[2], row[9] != "0") for row in mine] == [("00000000", True)]


class TestFiles:
    def test_bytes_as_shipped(self, front: Front):
        """What is tested are the files that people copy, but for those that differ from place to place."""
        generated = {"listen.conf", "listen-metrics.conf", "upstream.conf", "exempt.conf"}
        files = {path.relative_to(ROOT / "nginx") for path in (ROOT / "nginx").glob("**/*.conf")}
        files = {path for path in files if path.parts[0] not in generated | {"templates", "haproxy"}}

        assert 20 < len(files)
        for path in files:
            assert (ROOT / "nginx" / path).read_bytes() == (front.nginx.prefix / path).read_bytes()

    def test_listen_options_as_shipped(self, front: Front):
        """Only the address differs."""
        options = re.search(r"(?m)^listen 8080( .*;)$", (ROOT / "nginx/listen.conf").read_text())[1]

        assert f"listen 127.0.0.1:{front.nginx.port}{options}" in (front.nginx.prefix / "listen.conf").read_text()

    def test_example_files_are_complete(self, require, tmp_path: Path):
        """The folder works as it stands, before anything is generated."""
        command = [require("nginx"), "-t", "-p", f"{tmp_path}/", "-e", "stderr", "-c", str(ROOT / "nginx/nginx.conf")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)

        assert 0 == run.returncode, run.stderr
        assert "[warn]" not in run.stderr

    def test_nothing_in_the_error_log(self, front: Front):
        """A start is silent: no warning teaches people to ignore warnings."""
        front.ask("/events").read()

        assert "" == front.nginx.log()
