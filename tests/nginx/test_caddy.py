"""The Caddyfile by the same promises as nginx's files, on Debian's Caddy."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.stack import ROOT, Part, reserve_port
from tests.crowd import becomes
from tests.nginx.conftest import NATIVE, Toy, certificate, only_its_users_move
from tests.nginx.test_run_streams import told_step_by_step
from tests.nginx.ways import WAYS, Answer, serves, way

SOURCE = ROOT / "nginx/caddy/Caddyfile"


class Caddy(Part):
    """The Caddyfile with another site and other processes, and what a test replaces."""

    def __init__(self, folder: Path, binary: str, servers: list[str], replaced: dict[str, str]) -> None:
        super().__init__("caddy", folder)
        self.tls_port, self.admin_port = self._reserve(), self._reserve()
        self.binary = binary
        text = SOURCE.read_text()
        here = {
            "\tgrace_period": f"\tadmin 127.0.0.1:{self.admin_port}\n\tdefault_sni kit.test\n\tauto_https off\n\tgrace_period",
            "to 127.0.0.1:8001 127.0.0.1:8002": f"to {' '.join(servers)}",
            "# tls site.crt site.key": "tls tls.crt tls.key",
            "\nsse.example.com {": f"\nhttp://:{self.port} {{\n\timport kit\n}}\nhttps://:{self.tls_port} {{",
        }
        for old, new in (replaced | here).items():
            assert old in text, old
            text = text.replace(old, new)
        certificate(folder)
        (folder / "Caddyfile").write_text(text)

    def command(self) -> list[str]:
        return [self.binary, "run", "--config", str(self.directory / "Caddyfile")]

    def environment(self) -> dict[str, str]:
        # Caddy keeps its certificates and its last configuration below these.
        return super().environment() | {name: str(self.directory) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}

    def probe(self) -> bool:
        return serves(self.port) and serves(self.tls_port)

    def port_of(self, name: str) -> int:
        return self.port if name == "plain" else self.tls_port

    def lines(self) -> list[dict[str, Any]]:
        """Return what it has logged, the access log among it."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def reload(self) -> None:
        """Take the Caddyfile anew, as `caddy reload` does."""
        command = [self.binary, "reload", "--force", "--config", "Caddyfile", "--address", f"127.0.0.1:{self.admin_port}"]
        subprocess.run(command, cwd=self.directory, env=self.environment(), capture_output=True, check=True, timeout=60)


@pytest.fixture
def caddy(require) -> Iterator[Callable[..., Any]]:
    """Start Caddy in front of servers."""
    binary = require("caddy")
    started: list[Caddy] = []
    folder = Path(tempfile.mkdtemp(prefix="sse-caddy-"))

    async def start(servers: list[str], **replaced: str) -> Caddy:
        own = folder / str(len(started))
        own.mkdir()
        started.append(Caddy(own, binary, servers, replaced))
        started[-1].start()
        await asyncio.to_thread(started[-1].wait_ready)
        return started[-1]

    yield start
    for each in started:
        each.close()
    shutil.rmtree(folder, ignore_errors=True)


async def front(caddy, toys, count: int = 1, **replaced: str) -> tuple[Caddy, list]:
    found = await toys(count)
    return await caddy([toy.server for toy in found], **replaced), found


def test_as_shipped(require, tmp_path):
    """The file is valid as it stands, before anything is renamed."""
    environment = os.environ | {name: str(tmp_path) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
    command = [require("caddy"), "validate", "--config", str(SOURCE)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert 0 == run.returncode, run.stderr
    assert "Valid configuration" in run.stdout + run.stderr


class TestStreams:
    async def test_head_then_each_event(self, caddy, toys, way_name):
        """The head comes before any event, and each event before the next one is made."""
        proxy, (toy,) = await front(caddy, toys)
        async with way(way_name, proxy.port_of(way_name)) as client:
            for headers in (NATIVE, {}):
                stream = await client.ask("/events?topic=a", headers)
                assert 200 == stream.status
                for number in range(5):
                    toy.say(b"data: %d\n\n" % number)
                    await stream.until(lambda s, n=number: s.data and s.data[-1] == str(n))

    async def test_a_client_that_is_gone(self, caddy, toys, way_name):
        """The application learns at once that a client is gone, and not with the next heartbeat."""
        proxy, (toy,) = await front(caddy, toys)
        async with way(way_name, proxy.port_of(way_name)) as client:
            stream = await client.ask("/events", NATIVE)
            stream.close()
            await becomes(lambda: toy.gone, "the stream's end at the application")

    async def test_silence_and_a_frozen_application(self, caddy, site):
        """Heartbeats outlive the read timeout; a frozen process is noticed within it (scaled)."""
        app = site.app("", heartbeat_seconds=0.2)
        scaled = {"read_timeout 75s": "read_timeout 2s", "response_header_timeout 75s": "response_header_timeout 2s"}
        proxy = await caddy([f"127.0.0.1:{app.port}"], **scaled)
        clients = [way(name, proxy.port_of(name)) for name in WAYS]
        async with clients[0] as plain, clients[1] as tls, clients[2] as h2:
            assert 404 == (await plain.ask("/metrics")).status
            streams = [await client.ask("/events?topic=quiet", NATIVE) for client in (plain, tls, h2)]
            for stream in streams:
                await stream.until(lambda s: bytes(s.body).count(b"\n:") >= 22)
            assert ["", "", ""] == [stream.ended for stream in streams]
            os.kill(app.pid, signal.SIGSTOP)
            try:
                for stream in streams:
                    await stream.until(lambda s: s.ended)
            finally:
                os.kill(app.pid, signal.SIGCONT)

        # Caddy 2.6 ends them as if they were complete; an EventSource comes back either way.
        assert {"clean", "cut"} >= {stream.ended for stream in streams}

    async def test_headers_towards_the_application(self, caddy, toys):
        """The application learns who asked, and nothing that it could be fooled with."""
        proxy, (toy,) = await front(caddy, toys)
        lies = {"X-Forwarded-For": "6.6.6.6", "X-Sse-Soft-Fail": "mine", "X-Forwarded-Proto": "gopher", "X-Request-Id": "mine"}
        async with way("tls", proxy.tls_port) as client:
            await client.ask("/events?topic=a", lies)
        head = next(head for head in toy.heads if "/events" in head).lower()

        assert "x-forwarded-for: 127.0.0.1\r\n" in head
        assert "x-forwarded-proto: https\r\n" in head
        assert "host: kit.test\r\n" in head
        assert "x-sse-" not in head
        assert "mine" not in head


class TestRuns:
    async def test_first_tokens(self, caddy, site, model_port):
        """The answer to POST /runs is a stream: its head and each token come as they are made."""
        app = site.app("", llm_base_url=f"http://127.0.0.1:{model_port}/v1")
        proxy = await caddy([f"127.0.0.1:{app.port}"])
        for name in WAYS:
            async with way(name, proxy.port_of(name)) as client:
                await told_step_by_step(client, model_port)


class TestStickiness:
    async def test_only_its_users_move(self, caddy, toys):
        """
        The same user meets the same process, whatever names it; without one that drains, only its
        users move, and come back with it.
        """
        proxy, four = await front(caddy, toys, 4)
        carriers = (
            ("/events?user={}", {}),
            ("/events?ticket=owner{}.%random", {}),
            ("/events", {"Authorization": "Bearer {}"}),
            ("/events", {"Cookie": "a=b; session={}"}),
        )
        async with way("plain", proxy.port) as client:

            async def ask(user: int) -> Answer:
                path, headers = carriers[user % 4]
                filled = {name: value.format(user) for name, value in headers.items()}
                return await client.ask(path.format(user).replace("%random", os.urandom(4).hex()), filled)

            await only_its_users_move(four, ask)


class TestSoftFail:
    async def test_the_applications_own(self, caddy, toys, way_name):
        """What the application answers passes as it is: it makes the soft fail itself."""
        proxy, (toy,) = await front(caddy, toys)
        async with way(way_name, proxy.port_of(way_name)) as client:
            for toy.answer in (429, 503):
                for headers in (NATIVE, NATIVE | {"Authorization": "Bearer t"}):
                    answer = await client.ask("/events", headers)
                    assert (toy.answer, "7") == (answer.status, answer.headers["retry-after"])
                    assert toy.status_body == await answer.whole()

    async def test_no_process_at_all(self, caddy, way_name):
        """A dead application is no reason to give up for ever; an API client gets a problem document."""
        port, holder = reserve_port()
        proxy = await caddy([f"127.0.0.1:{port}"], **{"lb_try_duration 5s": "lb_try_duration 200ms"})
        async with way(way_name, proxy.port_of(way_name)) as client:
            retries = set()
            for _ in range(12):
                answer = await client.ask("/events", NATIVE)
                body = (await answer.whole()).decode()
                assert (200, "text/event-stream") == (answer.status, answer.headers["content-type"])
                assert answer.headers["x-sse-fallback"] in ("502", "503")
                retries.add(re.fullmatch(r"retry: (\d{3,4})\n: 50[23], come back later\n\n", body)[1])
            api = await client.ask("/events")
            problem = json.loads(await api.whole())
        if holder:
            holder.close()

        assert 1 < len(retries)
        assert api.status in (502, 503)
        assert (api.status, "application/problem+json") == (problem["status"], api.headers["content-type"])

    async def test_another_process(self, caddy, toys):
        """The users of a process that is gone move to another, and wait for it; 429 is not taken elsewhere."""
        (toy,) = await toys()
        other = Toy()
        server = await asyncio.start_server(other.serve, other.address, 0)
        other.port = server.sockets[0].getsockname()[1]
        proxy = await caddy([toy.server, other.server])
        async with way("plain", proxy.port) as client:

            async def fallbacks() -> set[str | None]:
                return {(await client.ask(f"/events?user={user}", NATIVE)).headers.get("x-sse-fallback") for user in range(12)}

            before = await fallbacks()
            spread = (toy.open > 0, other.open > 0)
            server.close()
            server.close_clients()
            after = await fallbacks()
            toy.answer = 429
            toy.heads.clear()
            await client.ask("/events?user=1")

        assert (True, True) == spread
        assert {None} == before == after
        assert 1 == len([head for head in toy.heads if "/events" in head])


class TestLog:
    async def test_no_query_string(self, caddy, toys):
        """Tickets and tokens stay out of the log, and every line is JSON."""
        proxy, (toy,) = await front(caddy, toys, **{"lb_try_duration 5s": "lb_try_duration 200ms"})
        secret = {"Authorization": "Bearer s3cr3t", "Cookie": "session=s3cr3t", "Referer": "https://a/?s3cr3t"}
        async with way("plain", proxy.port) as client:
            for answer in ("stream", 503, "hang up"):
                toy.answer = answer
                for headers in (NATIVE, secret):
                    await client.ask("/events?ticket=alice.s3cr3t", headers)
            await client.ask("/tickets?ticket=alice.s3cr3t", secret, method="DELETE")

        def asked() -> list[dict]:
            return [line["request"] for line in proxy.lines() if line.get("logger", "").startswith("http.log.access")]

        await becomes(lambda: len(asked()) >= 7, "seven lines")

        assert {"/events", "/tickets"} == {line["uri"] for line in asked()}
        assert "s3cr3t" not in proxy.log()


class TestReload:
    async def test_streams_outlive_it(self, caddy, toys, way_name):
        """Open streams go on to their end when the Caddyfile is taken anew."""
        proxy, (toy,) = await front(caddy, toys)
        async with way(way_name, proxy.port_of(way_name)) as client:
            stream = await client.ask("/events", NATIVE)
            await asyncio.to_thread(proxy.reload)
            async with way(way_name, proxy.port_of(way_name)) as other:
                later = await other.ask("/events", NATIVE)
                toy.say(b"data: still here\n\n")
                for each in (stream, later):
                    await each.until(lambda s: s.data == ["still here"])
                    assert not each.ended
