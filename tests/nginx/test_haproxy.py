"""haproxy.cfg by the same promises as nginx's files, on Debian's HAProxy."""

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
from typing import Any, ClassVar

import pytest

from app.stack import ROOT, Part, reserve_port
from tests.crowd import becomes
from tests.live import becomes as comes
from tests.nginx.conftest import NATIVE, certificate, may_be_read, only_its_users_move
from tests.nginx.test_run_streams import told_step_by_step
from tests.nginx.ways import WAYS, serves, way

SOURCE = ROOT / "nginx/haproxy"


class Haproxy(Part):
    """haproxy.cfg with other `bind` and `server` lines, what a test replaces, and lists with its lines."""

    def __init__(
        self, folder: Path, binary: str, servers: list[str], replaced: dict[str, str], lists: dict[str, str]
    ) -> None:
        super().__init__("haproxy", folder)
        self.tls_port = self._reserve()
        self.binary = binary
        text = (SOURCE / "haproxy.cfg").read_text()
        for old, new in replaced.items():
            assert old in text, old
            text = text.replace(old, new)
        text = text.replace("bind 127.0.0.1:8080", f"bind 127.0.0.1:{self.port}")
        text = text.replace("# bind 127.0.0.1:8443", f"bind 127.0.0.1:{self.tls_port}")
        lines = [line for line in text.splitlines() if not line.startswith("    server app-2")]
        generated: list[str] = []
        for line in lines:
            if found := re.match(r"(    server )app-1 127.0.0.1:8001(.*)", line):
                generated += [
                    f"{found[1]}app-{number} {server}{found[2].replace('app-1', f'app-{number}')}"
                    for number, server in enumerate(servers, 1)
                ]
            else:
                generated.append(line)
        certificate(folder)
        (folder / "site.pem").write_bytes((folder / "tls.crt").read_bytes() + (folder / "tls.key").read_bytes())
        for name in ("later.http", "exempt.lst", "origins.lst"):
            (folder / name).write_text((SOURCE / name).read_text() + lists.get(name, ""))
        (folder / "haproxy.cfg").write_text("\n".join(generated) + "\n")

    def command(self) -> list[str]:
        # In the foreground, without a master: one process to end.
        return [self.binary, "-db", "-f", str(self.directory / "haproxy.cfg")]

    def probe(self) -> bool:
        return serves(self.port) and serves(self.tls_port)

    def port_of(self, name: str) -> int:
        return self.port if name == "plain" else self.tls_port

    def lines(self) -> list[dict[str, Any]]:
        """Return the access log."""
        found = (re.search(r"\{.*\}$", line) for line in self.log().splitlines())
        return [json.loads(each[0]) for each in found if each]


@pytest.fixture
def haproxy(require) -> Iterator[Callable[..., Any]]:
    """Start HAProxy in front of servers, and wait until its checks have found them."""
    binary = require("haproxy")
    started: list[Haproxy] = []
    folder = Path(tempfile.mkdtemp(prefix="sse-haproxy-"))

    async def start(
        servers: list[str], replaced: dict[str, str] | None = None, lists: dict[str, str] | None = None
    ) -> Haproxy:
        own = folder / str(len(started))
        own.mkdir()
        started.append(Haproxy(own, binary, servers, replaced or {}, lists or {}))
        started[-1].start()
        await asyncio.to_thread(started[-1].wait_ready)
        return started[-1]

    yield start
    for each in started:
        each.close()
    shutil.rmtree(folder, ignore_errors=True)


async def front(
    haproxy, toys, count: int = 1, lists: dict[str, str] | None = None, **replaced: str
) -> tuple[Haproxy, list]:
    found = await toys(count)
    return await haproxy([toy.server for toy in found], replaced, lists), found


def test_as_shipped(require):
    """The files are valid as they stand, before anything is put in."""
    command = [require("haproxy"), "-c", "-f", str(SOURCE / "haproxy.cfg")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)

    assert 0 == run.returncode, run.stderr
    assert "" == run.stderr


class TestStreams:
    async def test_head_then_each_event(self, haproxy, toys, way_name):
        """The head comes before any event, and each event before the next one is made."""
        proxy, (toy,) = await front(haproxy, toys)
        async with way(way_name, proxy.port_of(way_name)) as client:
            for headers in (NATIVE, {}):
                stream = await client.ask("/events?topic=a", headers)
                assert 200 == stream.status
                for number in range(5):
                    toy.say(b"data: %d\n\n" % number)
                    await stream.until(lambda s, n=number: s.data and s.data[-1] == str(n))

    async def test_silence_and_a_frozen_application(self, haproxy, site):
        """Heartbeats outlive the read timeout; a frozen process is noticed within it (scaled)."""
        app = site.app("", heartbeat_seconds=0.2)
        # The checks are not what this is about: they would take the frozen process away.
        scaled = {"timeout server 75s": "timeout server 2s", "timeout client 30s": "timeout client 2s"}
        proxy = await haproxy([f"127.0.0.1:{app.port}"], replaced=scaled)
        clients = [way(name, proxy.port_of(name)) for name in WAYS]
        async with clients[0] as plain, clients[1] as tls, clients[2] as h2:
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

        # Over HTTP/2, HAProxy 2.6 ends the stream as if it were complete; an EventSource
        # comes back either way.
        assert ["cut", "cut"] == [stream.ended for stream in streams[:2]]

    async def test_headers_towards_the_application(self, haproxy, toys):
        """The application learns who asked, and nothing that it could be fooled with."""
        proxy, (toy,) = await front(haproxy, toys)
        lies = {"X-Forwarded-For": "6.6.6.6", "X-Sse-Soft-Fail": "mine", "X-Forwarded-Proto": "gopher"}
        async with way("tls", proxy.tls_port) as client:
            await client.ask("/events?topic=a", lies)
        head = next(head for head in toy.heads if "/events" in head).lower()

        assert "x-forwarded-for: 127.0.0.1\r\n" in head
        assert "x-forwarded-proto: https\r\n" in head
        assert "x-sse-soft-fail" not in head


class TestRuns:
    async def test_first_tokens(self, haproxy, site, model_port):
        """The answer to POST /runs is a stream: its head and each token come as they are made."""
        app = site.app("", llm_base_url=f"http://127.0.0.1:{model_port}/v1")
        proxy = await haproxy([f"127.0.0.1:{app.port}"])
        for name in WAYS:
            async with way(name, proxy.port_of(name)) as client:
                await told_step_by_step(client, model_port)


class TestStickiness:
    async def test_only_its_users_move(self, haproxy, toys):
        """The same user meets the same process; without one, only its users move, and come back with it."""
        # Asking until the checks notice is more than one address may: who asks is exempt.
        proxy, four = await front(haproxy, toys, 4, lists={"exempt.lst": "127.0.0.1\n"})
        async with way("plain", proxy.port) as client:
            await only_its_users_move(four, lambda user: client.ask(f"/events?user={user}"))


class TestSoftFail:
    @pytest.mark.parametrize("status", [429, 502, 503, 504])
    async def test_native_and_api(self, haproxy, toys, way_name, status):
        """An EventSource is told to come back; an API client gets the application's own words."""
        proxy, (toy,) = await front(haproxy, toys)
        async with way(way_name, proxy.port_of(way_name)) as client:
            toy.answer = status
            native = await client.ask("/events", NATIVE)
            body = (await native.whole()).decode()
            api = await client.ask("/events", NATIVE | {"Authorization": "Bearer t"})

            assert (200, str(status)) == (native.status, native.headers["x-sse-fallback"])
            assert re.fullmatch(rf"retry: \d{{3,4}}\n: {status}, come back later\n\n", body)
            assert (status, "7") == (api.status, api.headers["retry-after"])
            assert toy.status_body == await api.whole()

    async def test_told_for_how_long(self, haproxy, toys):
        """A process that names a longer time is believed, a short one is spread."""
        proxy, (toy,) = await front(haproxy, toys)
        toy.answer = 429
        retries = []
        async with way("plain", proxy.port_of("plain")) as client:
            for toy.retry_after in ("57", "9"):
                retries.append(int((await (await client.ask("/events", NATIVE)).whole()).split()[1]))

        assert 57_000 == retries[0]
        assert 2_000 <= retries[1] <= 8_000

    async def test_no_process_at_all(self, haproxy, toys, way_name):
        """A dead application is no reason to give up for ever, neither before nor after it was noticed."""
        port, holder = reserve_port()
        proxy = await haproxy([f"127.0.0.1:{port}"])
        async with way(way_name, proxy.port_of(way_name)) as client:
            for _ in range(20):
                answer = await client.ask("/events", NATIVE)
                assert (200, "503") == (answer.status, answer.headers["x-sse-fallback"])
                assert b"retry: " in await answer.whole()
                await asyncio.sleep(0.05)
            api = await client.ask("/events")
            problem = json.loads(await api.whole())
        if holder:
            holder.close()

        assert (503, 503, "1") == (api.status, problem["status"], api.headers["retry-after"])
        assert "application/problem+json" == api.headers["content-type"]
        assert {"type", "title", "status", "detail", "name", "rule", "value", "cure"} == set(problem)

    async def test_before_the_checks_notice(self, haproxy, toys):
        """Also where the checks still take a dead process for a living one."""
        (checked,) = await toys()
        port, holder = reserve_port()
        elsewhere = {"default-server check": f"default-server check port {checked.port}"}
        proxy = await haproxy([f"127.0.0.1:{port}"], replaced=elsewhere)
        async with way("plain", proxy.port) as client:
            native, api = await client.send("/events", NATIVE), await client.send("/events")
            body = await native.whole()
            await api.whole()
        if holder:
            holder.close()

        assert (200, "503", 503) == (native.status, native.headers["x-sse-fallback"], api.status)
        assert body.startswith(b"retry: ")

    async def test_another_process(self, haproxy, toys):
        """One that drains or hangs up is passed over; 429 is not taken elsewhere, a POST not repeated."""
        proxy, two = await front(haproxy, toys, 2)
        two[0].answer = 503
        async with way("plain", proxy.port) as client:
            statuses = [(await client.ask(f"/events?user={user}", NATIVE)).headers.get("x-sse-fallback") for user in range(12)]
            for toy in two:
                toy.answer = 429
                toy.heads.clear()
            await client.ask("/events?user=1")
            for toy in two:
                toy.answer = 503
            posted = await client.ask("/publish", method="POST", body=b"{}")
            asked = [head.split()[0] for toy in two for head in toy.heads if "/readyz" not in head]

        assert {None} == set(statuses)
        assert 503 == posted.status
        assert ["GET", "POST"] == sorted(asked)


class TestLimits:
    async def test_the_exempt_and_other_spellings(self, haproxy, toys):
        """Addresses of exempt.lst are not counted; another spelling of a path, as the application reads it, is."""
        replaced = {"sc_conn_cur(0) gt 20": "sc_conn_cur(0) gt 1"}
        proxy, _ = await front(haproxy, toys, lists={"exempt.lst": "127.0.0.9\n"}, **replaced)
        async with way("plain", proxy.port) as client:
            exempt = [await client.ask("/events?user=a", source="127.0.0.9") for _ in range(3)]
            paths = ("/events?user=b", "//events?user=b", "/%65vents?user=b", "/runs/7/events?user=b")
            others = [await client.ask(path) for path in paths]
            run = await client.ask("/runs?user=b", NATIVE, method="POST", body=b"{}")

        assert [200] * 3 == [answer.status for answer in exempt]
        assert [200, 429, 429, 429] == [answer.status for answer in others]
        assert 429 == run.status

    async def test_of_a_user_and_an_address(self, haproxy, toys, way_name):
        """Streams are counted per user and per address; one that ends makes room."""
        replaced = {"sc_conn_cur(0) gt 20": "sc_conn_cur(0) gt 3", "sc_conn_cur(1) gt 400": "sc_conn_cur(1) gt 5"}
        proxy, _ = await front(haproxy, toys, **replaced)
        async with way(way_name, proxy.port_of(way_name)) as client:
            one = [await client.ask("/events?user=a") for _ in range(4)]
            many = [await client.ask(f"/events?user=b{number}") for number in range(3)]
            native = await client.ask("/events?user=a", NATIVE)
            other = await client.ask("/events?user=c", source="127.0.0.9")
            problem = json.loads(await one[3].whole())

            assert [200, 200, 200, 429] == [answer.status for answer in one]
            assert [200, 200, 429] == [answer.status for answer in many]
            assert (200, "429") == (native.status, native.headers["x-sse-fallback"])
            assert 200 == other.status
            assert ("urn:sse-kit:nginx-limit", "5") == (problem["type"], one[3].headers["retry-after"])

            for answer in one[:3]:
                answer.close()

            async def room() -> bool:
                return (await client.ask("/events?user=a")).status == 200

            await comes(room, "room for a stream")

    async def test_of_all(self, haproxy, toys):
        """All streams together leave connections for publishers, also those of the exempt."""
        replaced = {"fe_conn gt 9000": "fe_conn gt 10", "maxconn 9500": "maxconn 40"}
        proxy, _ = await front(haproxy, toys, lists={"exempt.lst": "127.0.0.1\n"}, **replaced)
        async with way("plain", proxy.port) as client:
            streams = [(await client.ask(f"/events?user={number}")).status for number in range(14)]
            publish = await client.ask("/publish", method="POST", body=b"{}")

        assert [200] * 10 + [429] * 4 == streams
        assert 200 == publish.status

    async def test_long_tokens_are_users_of_their_own(self, haproxy, toys):
        """Tokens begin alike: two that differ at the end do not share a limit."""
        replaced = {"sc_conn_cur(0) gt 20": "sc_conn_cur(0) gt 1"}
        proxy, _ = await front(haproxy, toys, **replaced)
        async with way("plain", proxy.port) as client:
            for carrier, value in (("Authorization", "Bearer {}"), ("Cookie", "session={}")):
                tokens = [value.format("head." * 100 + end) for end in ("a", "b", "a")]
                statuses = [(await client.ask("/events", {carrier: token})).status for token in tokens]
                assert [200, 200, 429] == statuses

    async def test_a_body_that_is_too_large(self, haproxy, toys):
        """413 is the proxy's own, as a problem document."""
        proxy, _ = await front(haproxy, toys)
        async with way("plain", proxy.port) as client:
            size = {"Content-Length": "2097153"}
            answer = await client.ask("/publish", size, method="POST", body=b"x")

        assert 413 == answer.status


class TestCors:
    LISTS: ClassVar[dict[str, str]] = {"origins.lst": "https://app.example.com\n"}
    GOOD: ClassVar[dict[str, str]] = {"Origin": "https://app.example.com"}
    BAD: ClassVar[dict[str, str]] = {"Origin": "https://app.example.com.evil.example"}

    @pytest.mark.parametrize("answer", ["stream", 503, "hang up"])
    async def test_an_allowed_origin(self, haproxy, toys, way_name, answer):
        """Its pages may read streams, with cookies, and the soft fail: else an EventSource would give up."""
        proxy, (toy,) = await front(haproxy, toys, lists=self.LISTS)
        toy.answer = answer
        async with way(way_name, proxy.port_of(way_name)) as client:
            if (way_name, answer) == ("h2", "hang up"):
                # Here HAProxy asks the browser to repeat the request (REFUSED_STREAM): a network
                # error, after which an EventSource comes back.
                refused = await client.send("/events", NATIVE | self.GOOD)
                await refused.until(lambda a: a.ended)
                assert (0, "cut") == (refused.status, refused.ended)
                return
            good = await client.ask("/events", NATIVE | self.GOOD)
            bad = await client.ask("/events", NATIVE | self.BAD)
            none = await client.ask("/events", NATIVE)

        may_be_read(good, bad, none)

    async def test_a_preflight(self, haproxy, toys):
        """The question before a request with a token is answered for these origins alone."""
        proxy, (toy,) = await front(haproxy, toys, lists=self.LISTS)
        toy.answer = 404
        asks = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization,last-event-id"}
        async with way("plain", proxy.port) as client:
            good = await client.ask("/events", self.GOOD | asks, method="OPTIONS")
            bad = await client.ask("/events", self.BAD | asks, method="OPTIONS")

        assert 204 == good.status
        assert "https://app.example.com" == good.headers["access-control-allow-origin"]
        assert {"Authorization", "Last-Event-ID"} <= set(good.headers["access-control-allow-headers"].split(", "))
        assert 404 == bad.status
        assert "access-control-allow-origin" not in bad.headers

    @pytest.mark.parametrize("lists", [LISTS, {}], ids=["listed", "as shipped"])
    async def test_where_the_application_answers(self, haproxy, toys, lists):
        """Its own headers stand once, also on the soft fail that hides its 503."""
        proxy, (toy,) = await front(haproxy, toys, lists=lists)
        toy.answer, toy.headers = 503, "Access-Control-Allow-Origin: https://other.example\r\nVary: Accept, Origin\r\n"
        async with way("plain", proxy.port) as client:
            api = await client.send("/events", self.GOOD)
            await api.whole()
            native = await client.ask("/events", NATIVE | self.GOOD)

        assert "https://other.example" == api.headers["access-control-allow-origin"]
        assert "https://other.example" == native.headers["access-control-allow-origin"]
        assert "Accept, Origin" == api.headers["vary"]


class TestLog:
    async def test_no_query_string(self, haproxy, toys):
        """Tickets stay out of the log, and every line is JSON."""
        proxy, (toy,) = await front(haproxy, toys)
        async with way("plain", proxy.port) as client:
            for answer in ("stream", 503, "hang up"):
                toy.answer = answer
                for headers in (NATIVE, {"Authorization": "Bearer s3cr3t"}):
                    await client.ask("/events?ticket=alice.s3cr3t", headers)
        await becomes(lambda: len(proxy.lines()) >= 6, "six lines")

        assert {"/events"} == {line["path"] for line in proxy.lines()}
        assert "503" in {line["fallback"] for line in proxy.lines()}
        assert "s3cr3t" not in proxy.log()


class TestReload:
    async def test_streams_outlive_it(self, haproxy, toys):
        """The old process keeps its streams to their end when a new one takes its place."""
        proxy, (toy,) = await front(haproxy, toys)
        async with way("plain", proxy.port) as client:
            stream = await client.ask("/events", NATIVE)
            proxy.kill(signal.SIGUSR1)  # what a reload sends to the old process
            await becomes(lambda: not serves(proxy.port), "the port closed")
            toy.say(b"data: still here\n\n")
            await stream.until(lambda s: s.data == ["still here"])
            assert not stream.ended
