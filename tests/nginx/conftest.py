"""
nginx in all its forms in front of toys and of the real application.

`make nginx-check` runs this folder. nginx 1.30 comes from .make/nginx.sh; the
system's own is Debian 12's 1.22, or whatever NGINX_BINARY names.
"""

import asyncio
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.stack import ROOT, Nginx, nginx_version, reserve_port
from tests.crowd import becomes
from tests.live import Site
from tests.live import becomes as comes
from tests.nginx.ways import WAYS, Answer

NATIVE = {"Accept": "text/event-stream"}
# The application also sends X-Accel-Buffering; here nginx must do without.
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def current(require: Callable[..., str]) -> str:
    """Return nginx 1.30 or later, or skip the test."""
    chosen = os.environ.get("NGINX_130_BINARY") or str(ROOT / ".cache/nginx/nginx")
    if not Path(chosen).exists():
        with contextlib.suppress(Exception):
            if nginx_version(require("nginx")) >= (1, 30):
                return require("nginx")
        pytest.skip("nginx 1.30 is not in .cache/nginx: run .make/nginx.sh")
    return chosen


@pytest.fixture(scope="session")
def binaries(require) -> Callable[[str], str]:
    """Find nginx by `1.30` or `system`."""
    return lambda name: current(require) if name == "1.30" else require("nginx")


def replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of the old one, as Kubernetes and certbot do."""
    # Since 1.27.4 a reload keeps a certificate whose file has the same inode and
    # the same second of change.
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.rename(path)


def certificate(folder: Path, name: str = "kit.test") -> int:
    """Write tls.crt and tls.key for *name* into *folder*; return the serial number."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    replace(folder / "tls.crt", made.public_bytes(serialization.Encoding.PEM))
    replace(folder / "tls.key", private)
    return made.serial_number


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate."""
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder)
    return folder


@pytest.fixture
def nginx(binaries, tls: Path) -> Iterator[Callable[..., Nginx]]:
    """
    Start nginx with keywords of its class, ready and closed at the end of the test.

    `way` (plain, tls or h2) chooses the listener, `version` (1.30 or system) the binary.
    """
    started: list[Nginx] = []
    folder = Path(tempfile.mkdtemp(prefix="sse-nginx-"))

    def start(servers: list[str], *, way: str = "plain", version: str = "1.30", **options: Any) -> Nginx:
        own = folder / str(len(started))
        own.mkdir()
        options.setdefault("tls", None if way == "plain" else tls)
        started.append(Nginx(own, servers, binary=binaries(version), **options))
        started[-1].start()
        started[-1].wait_ready()
        return started[-1]

    yield start
    for each in started:
        each.close()
    shutil.rmtree(folder, ignore_errors=True)


def workers(nginx: Nginx) -> set[int]:
    """Return the ids of the workers, old ones that still have streams included."""
    return {int(pid) for pid in Path(f"/proc/{nginx.pid}/task/{nginx.pid}/children").read_text().split()}


async def reload(nginx: Nginx, *, wait: bool = True) -> set[int]:
    """Let nginx take its files anew; return the old workers, which are gone if *wait*."""
    old = workers(nginx)
    nginx.kill(signal.SIGHUP)
    await becomes(lambda: workers(nginx) - old and not (wait and old & workers(nginx)), "new workers alone")
    return old


async def logged(nginx: Nginx, count: int) -> list[dict[str, Any]]:
    """Return the lines of the access log once there are *count*."""
    await becomes(lambda: len(nginx.access_log_path.read_text().splitlines()) >= count, f"{count} lines")
    return [json.loads(line) for line in nginx.access_log_path.read_text().splitlines()]


# --- A toy application


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class Toy:
    """
    An application that does as it is told, in the test's own loop.

    Attributes:
        answer: what it does with every request: a status, or one of `stream`
            (head, then what `say` gives), `flood` (bytes without end), `hang up`.
        heads: all requests, as they came.
        written: bytes that a flood could write.
        gone: streams that have ended.
        draining: not ready, as health checks see it.
    """

    address: str = "127.0.0.1"
    answer: int | str = "stream"
    status_body: bytes = b'{"title": "the application\'s own words"}'
    headers: str = ""
    retry_after: str = "7"
    heads: list[str] = field(default_factory=list)
    written: int = 0
    gone: int = 0
    draining: bool = False
    port: int = 0
    _streams: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def server(self) -> str:
        return f"{self.address}:{self.port}"

    def say(self, data: bytes) -> None:
        """Write to all streams."""
        for writer in self._streams:
            writer.write(chunk(data))

    def cut(self) -> None:
        """End all streams without a proper end, as a process that is killed."""
        for writer in self._streams:
            writer.close()

    @property
    def open(self) -> int:
        """Streams that are open now."""
        return len(self._streams)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # As the application does; else the kernel keeps megabytes between it and nginx.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                if length := re.search(r"(?i)content-length: (\d+)", head):
                    await reader.readexactly(int(length[1]))
                answer = 200 if head.startswith("POST") and not isinstance(self.answer, int) else self.answer
                if head.startswith("GET /readyz"):
                    answer = 503 if self.draining else 200
                if isinstance(answer, int):
                    writer.write(
                        f"HTTP/1.1 {answer} Status\r\nContent-Type: application/problem+json\r\n"
                        f"Retry-After: {self.retry_after}\r\n{self.headers}Content-Length: {len(self.status_body)}\r\n\r\n".encode() + self.status_body
                    )
                    continue
                if answer == "hang up":
                    break
                writer.write(STREAM)
                self._streams.append(writer)
                try:
                    if answer == "flood":
                        while True:
                            writer.write(chunk(b": " + b"x" * 8_000 + b"\n\n"))
                            await writer.drain()
                            self.written += 8_004
                    await reader.read(1)
                finally:
                    self._streams.remove(writer)
                    self.gone += 1
                break
        writer.close()


@pytest.fixture
async def toys() -> AsyncIterator[Callable[..., Any]]:
    """Start as many toys as asked for, on ports or addresses of their own."""
    servers: list[asyncio.Server] = []

    async def start(count: int = 1, addresses: tuple[str, ...] = (), port: int = 0) -> list[Toy]:
        found = []
        for number in range(len(addresses) or count):
            toy = Toy(address=addresses[number] if addresses else "127.0.0.1")
            server = await asyncio.start_server(toy.serve, toy.address, port, limit=1 << 20)
            servers.append(server)
            toy.port = server.sockets[0].getsockname()[1]
            found.append(toy)
        return found

    yield start
    for server in servers:
        server.close()
        server.close_clients()


async def only_its_users_move(four: list[Toy], ask: Callable[[int], Awaitable[Answer]]) -> None:
    """
    Take one of *four* processes away, as its health check sees it, and back.

    Its users move and return; all others stay. *ask*: a stream of this user.
    """
    for number, toy in enumerate(four):
        toy.answer, toy.status_body = 200, str(number).encode()

    async def places() -> list[str]:
        found = []
        for user in range(120):
            answer = await ask(user)
            found.append((await answer.whole()).decode())
            answer.close()
        return found

    async def until_gone(gone: bool) -> list[str]:
        async def done() -> list[str]:
            return [] if ("2" in (found := await places())) == gone else found

        return await comes(done, "the check notices")

    before = await places()
    assert before == await places()
    four[2].draining = True
    without = await until_gone(True)
    four[2].draining = False
    back = await until_gone(False)
    async with asyncio.timeout(20):
        while back != before:  # streams and API may have checks of their own
            back = await places()

    assert {"0", "1", "2", "3"} == set(before)
    assert all(was == now for was, now in zip(before, without, strict=True) if was != "2")


def may_be_read(good: Answer, *others: Answer) -> None:
    """Check that pages of https://app.example.com may read *good*, with cookies, and no page *others*."""
    assert 200 == good.status
    assert "https://app.example.com" == good.headers["access-control-allow-origin"]
    assert "true" == good.headers["access-control-allow-credentials"]
    # Also on answers for nobody: a cache could give them to such a page.
    assert {"Origin"} == {each.headers["vary"] for each in (good, *others)}
    for other in others:
        assert not [name for name in other.headers if name.startswith("access-control")]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Real application processes, kept for one file's tests."""
    with Site() as site:
        yield site


@pytest.fixture
def model_port() -> Iterator[int]:
    """Where a model will be."""
    port, holder = reserve_port()
    yield port
    if holder:
        holder.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`way` and `version` of a test: every way to 1.30, and to the system's own."""
    if "version" in metafunc.fixturenames and "way_name" in metafunc.fixturenames:
        pairs = [(way, version) for version in ("1.30", "system") for way in WAYS]
        metafunc.parametrize(("way_name", "version"), pairs)
    elif "way_name" in metafunc.fixturenames:
        metafunc.parametrize("way_name", WAYS)
