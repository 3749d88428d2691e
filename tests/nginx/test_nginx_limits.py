"""Limits per user and per address, and what the refused are told."""

import asyncio
import json
import re
from contextlib import AsyncExitStack
from typing import ClassVar

import pytest

from app import cors
from app.stack import ROOT
from tests import live
from tests.nginx.conftest import NATIVE, logged, may_be_read, reload
from tests.nginx.ways import way

API: dict[str, str] = {}
COUNTED = {"exempt.conf": ""}
# What the tests of open streams need not wait for.
NO_CONNECT_LIMIT = {
    "limit_req zone=sse_connects_of_user": "burst=9999 nodelay",
    "limit_req zone=sse_connects_of_address": "burst=9999 nodelay",
}


def limits(user: int = 9999, address: int = 9999, **more: str) -> dict[str, str]:
    return NO_CONNECT_LIMIT | {
        "limit_conn sse_streams_of_user": str(user),
        "limit_conn sse_streams_of_address": str(address),
    } | more


class TestStreams:
    @pytest.mark.parametrize(
        ("path", "headers"),
        [
            ("/events?user=alice", API),
            ("/events?ticket=alice.{}", API),
            ("/events", {"Cookie": "session=alice"}),
            ("/events", {"Authorization": "Bearer " + "x" * 40}),
            ("/events", API),
            ("/runs/7/events?user=alice", API),
            ("/events?user=" + "x" * 300, API),
            ("/events?ticket=" + "x" * 300 + ".{}", API),
        ],
        ids=["user", "ticket", "cookie", "bearer", "nobody", "run", "long user", "long ticket"],
    )
    async def test_of_a_user(self, nginx, toys, way_name, path, headers):
        """A user has so many streams, whatever names it, and over HTTP/2 each counts; one that ends makes room."""
        (toy,) = await toys()
        front = nginx([toy.server], way=way_name, files=COUNTED, directives=limits(user=3))
        async with way(way_name, front.port) as client:
            answers = [await client.ask(path.format(number), headers) for number in range(5)]
            other = await client.ask("/events?user=bob")

            assert [200, 200, 200, 429, 429] == [answer.status for answer in answers]
            assert 200 == other.status

            answers[0].close()

            async def room() -> bool:
                return (await client.ask(path.format(9), headers)).status == 200

            await live.becomes(room, "room for a stream")

    async def test_of_an_address(self, nginx, toys, way_name):
        """Invented users do not help: the address counts, too. Another address is free."""
        (toy,) = await toys()
        front = nginx([toy.server], way=way_name, files=COUNTED, directives=limits(address=4))
        async with way(way_name, front.port) as client:
            mine = [await client.ask(f"/events?user=u{number}") for number in range(6)]
            other = await client.ask("/events?user=u1", source="127.0.0.9")

        assert [200] * 4 + [429] * 2 == [answer.status for answer in mine]
        assert 200 == other.status

    @pytest.mark.parametrize("total", [20, 9999], ids=["limited", "unlimited"])
    async def test_of_all(self, nginx, toys, way_name, total):
        """
        All streams together leave connections for publishers, also those of the exempt.

        Without the limit they take all, and a publish is cut: the proof beside it.
        """
        (toy,) = await toys()
        # One worker of 64: a stream takes two, nginx itself a few.
        directives = limits() | {
            "limit_conn sse_streams_of_nginx": str(total),
            "worker_processes": "1",
            "worker_connections": "64",
        }
        front = nginx([toy.server], way=way_name, files={"exempt.conf": "127.0.0.0/8 1;\n"}, directives=directives)

        async def asked(path: str, method: str = "GET") -> int:
            """Return the status; 0 where the connection was cut."""
            try:
                client = await opened.enter_async_context(way(way_name, front.port))
                return (await client.ask(path, method=method, body=b"{}" if method == "POST" else b"")).status
            except (OSError, EOFError, AssertionError, StopIteration):
                return 0

        async with AsyncExitStack() as opened:
            streams = [await asked(f"/events?user={number}") for number in range(40)]
            publish = await asked("/publish", "POST")

        if total == 20:
            assert [200] * 20 + [429] * 20 == streams
            assert 200 == publish
        else:
            assert streams.count(200) > 20
            assert 429 not in streams
            assert publish in (0, 500)

    async def test_an_ipv6_household(self, nginx, toys):
        """All addresses of a /64 are one; and an IPv4 address written as IPv6 is its own."""
        (toy,) = await toys()
        files = COUNTED | {"trusted.conf": "set_real_ip_from 127.0.0.1;"}
        front = nginx([toy.server], files=files, directives=limits(address=2))

        async with way("plain", front.port) as client:

            async def status(address: str) -> int:
                answer = await client.ask(f"/events?user={address}", {"X-Forwarded-For": address})
                return answer.status

            household = [await status(f"2001:db8:0:7:{number}::{number}") for number in (1, 2, 3)]
            assert [200, 200, 429] == household
            assert 200 == await status("2001:db8:0:8::1")
            assert [200, 200, 429] == [await status("::ffff:192.0.2.1") for _ in range(3)]
            assert 200 == await status("::ffff:192.0.2.2")

    async def test_nobody_is_believed_untold(self, nginx, toys):
        """Without trusted proxies, X-Forwarded-For is what a client says of itself: nothing."""
        (toy,) = await toys()
        front = nginx([toy.server], files=COUNTED, directives=limits(address=2))
        async with way("plain", front.port) as client:
            answers = [
                await client.ask(f"/events?user={number}", {"X-Forwarded-For": f"192.0.2.{number}"})
                for number in range(3)
            ]

        assert [200, 200, 429] == [answer.status for answer in answers]

    async def test_the_exempt(self, nginx, toys):
        """Named addresses are not counted, as generators of load are; others are."""
        (toy,) = await toys()
        files = {"exempt.conf": "127.0.0.9 1;\n"}
        front = nginx([toy.server], files=files, directives=limits(user=1, address=1))
        async with way("plain", front.port) as client:
            exempt = [await client.ask("/events?user=a", source="127.0.0.9") for _ in range(5)]
            others = [await client.ask("/events?user=a") for _ in range(2)]

        assert [200] * 5 == [answer.status for answer in exempt]
        assert [200, 429] == [answer.status for answer in others]

    async def test_as_shipped(self, nginx, toys):
        """Twenty streams of one user pass as the files are, and the API is not limited at all."""
        (toy,) = await toys()
        front = nginx([toy.server], files=COUNTED)
        async with way("plain", front.port) as client:
            answers = [await client.ask("/events?user=a") for _ in range(21)]
            posts = [await client.ask("/publish?user=a", method="POST", body=b"{}") for _ in range(60)]

        assert [200] * 20 + [429] == [answer.status for answer in answers]
        assert {200} == {post.status for post in posts}


class TestProxyProtocol:
    async def test_the_address_that_it_names(self, nginx, toys):
        """
        A load balancer's word about the client counts for limits, log and application; not
        that of others, and who does not speak the protocol is refused.
        """
        (toy,) = await toys()
        snippets = ROOT / "nginx/snippets"
        files = COUNTED | {
            "snippets/sse-real-ip.conf": (snippets / "sse-proxy-protocol.conf").read_text(),
            "trusted.conf": "set_real_ip_from 127.0.0.1;",
        }
        front = nginx([toy.server], files=files, directives=limits(address=1))
        listen = front.prefix / "listen.conf"
        listen.write_text(listen.read_text().replace(" backlog", " proxy_protocol backlog"))
        await reload(front)

        async def asked(client: str, source: str = "127.0.0.1") -> tuple[str, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port, local_addr=(source, 0))
            named = f"PROXY TCP4 {client} 127.0.0.1 1111 8080\r\n" if client else ""
            writer.write(f"{named}GET /events?user={client} HTTP/1.1\r\nHost: kit\r\n\r\n".encode())
            return (await reader.readline()).decode(), writer

        answers = [
            await asked(*each)
            for each in (("192.0.2.7",), ("192.0.2.7",), ("192.0.2.8",), ("192.0.2.9", "127.0.0.9"), ("192.0.2.9", "127.0.0.9"))
        ]
        unspoken, writer = await asked("")
        for each in (writer, *(writer for _, writer in answers)):
            each.close()
        lines = await logged(front, 5)

        assert ["200", "429", "200", "200", "429"] == [line.split()[1] for line, _ in answers]
        assert not unspoken.startswith("HTTP/1.1 200")
        heads = [re.search(r"X-Forwarded-For: (\S+)", head)[1] for head in toy.heads]
        assert ["192.0.2.7", "192.0.2.8", "127.0.0.9"] == heads
        assert {"192.0.2.7", "192.0.2.8", "127.0.0.9"} <= {line["client"] for line in lines}


class TestConnects:
    async def test_a_loop(self, nginx, toys, way_name):
        """A client that connects in a loop is stopped, by user and by address, and others are not."""
        (toy,) = await toys()
        toy.answer = 204
        toy.status_body = b""
        rates = limits() | {
            "limit_req zone=sse_connects_of_user": "burst=4 nodelay",
            "limit_req zone=sse_connects_of_address": "burst=9 nodelay",
            "limit_req_zone $sse_limit_user": "zone=sse_connects_of_user:10m rate=1r/m",
            "limit_req_zone $sse_limit_address": "zone=sse_connects_of_address:10m rate=1r/m",
        }
        front = nginx([toy.server], way=way_name, files=COUNTED, directives=rates)
        async with way(way_name, front.port) as client:
            one = [(await client.ask("/events?user=a")).status for _ in range(7)]
            many = [(await client.ask(f"/events?user=b{number}")).status for number in range(7)]
            other = await client.ask("/events?user=a", source="127.0.0.9")

        assert [204] * 5 + [429] * 2 == one
        assert [204] * 5 + [429] * 2 == many  # 10 in all from this address
        assert 429 == other.status  # the user's own bucket is empty everywhere

    async def test_trying_out(self, nginx, toys):
        """`limit_conn_dry_run on` refuses nobody, and the log says whom it would have."""
        (toy,) = await toys()
        directives = limits(user=1) | {"limit_conn_dry_run": "on"}
        front = nginx([toy.server], files=COUNTED, directives=directives)
        async with way("plain", front.port) as client:
            answers = [await client.ask("/events?user=a", NATIVE) for _ in range(2)]

        assert [200, 200] == [answer.status for answer in answers]
        assert all("x-sse-fallback" not in answer.headers for answer in answers)
        assert {"PASSED PASSED", "REJECTED_DRY_RUN PASSED"} == {line["limit"] for line in await logged(front, 2)}


class TestRefusal:
    async def test_an_api_client(self, nginx, toys, way_name):
        """nginx's own 429 is a problem document that says when to come back."""
        (toy,) = await toys()
        front = nginx([toy.server], way=way_name, files=COUNTED, directives=limits(user=1))
        async with way(way_name, front.port) as client:
            await client.ask("/events?user=a")
            refused = await client.ask("/events?user=a")
            problem = json.loads(await refused.whole())

        assert (429, "5") == (refused.status, refused.headers["retry-after"])
        assert "application/problem+json" == refused.headers["content-type"]
        assert (429, "urn:sse-kit:nginx-limit") == (problem["status"], problem["type"])
        assert {"type", "title", "status", "detail", "name", "rule", "value", "cure"} == set(problem)

    async def test_a_native_client(self, nginx, toys, way_name):
        """An EventSource is told to come back, and the log says why."""
        (toy,) = await toys()
        front = nginx([toy.server], way=way_name, files=COUNTED, directives=limits(user=1))
        async with way(way_name, front.port) as client:
            await client.ask("/events?user=a", NATIVE)
            refused = await client.ask("/events?user=a", NATIVE)
            body = (await refused.whole()).decode()

        assert (200, "429") == (refused.status, refused.headers["x-sse-fallback"])
        assert 2000 <= int(body.split()[1]) <= 8000
        # The two may come in either order: workers write for themselves.
        fallen = [(line["fallback"], line["limit"]) for line in await logged(front, 2) if line["fallback"]]
        assert [("429", "REJECTED PASSED")] == fallen

    async def test_the_applications_own(self, nginx, toys, way_name, version):
        """With `Authorization`, the application's 429 passes with its body and its Retry-After."""
        (toy,) = await toys()
        toy.answer = 429
        front = nginx([toy.server], way=way_name, version=version)
        async with way(way_name, front.port) as client:
            answer = await client.ask("/events", NATIVE | {"Authorization": "Bearer t"})

            assert (429, "7") == (answer.status, answer.headers["retry-after"])
            assert toy.status_body == await answer.whole()

    async def test_told_for_how_long(self, nginx, toys):
        """A process that names a longer time is believed by the soft fail, a short or odd one is spread."""
        (toy,) = await toys()
        toy.answer = 429
        front = nginx([toy.server])
        retries = {}
        async with way("plain", front.port) as client:
            for told in ("57", "9", "soon", "99999"):
                toy.retry_after = told
                retries[told] = int((await (await client.ask("/events", NATIVE)).whole()).split()[1])

        assert 57_000 == retries.pop("57")
        assert all(2_000 <= retry <= 8_000 for retry in retries.values())

    @pytest.mark.parametrize("status", [429, 503])
    async def test_the_api_goes_on(self, nginx, toys, way_name, status):
        """A hundred refused streams leave every publish working."""
        two = await toys(2)
        for toy in two:
            toy.answer = status
        front = nginx([toy.server for toy in two], way=way_name)
        async with way(way_name, front.port) as client:
            refused = [(await client.ask(f"/events?user={number}")).status for number in range(100)]
            for toy in two:
                toy.answer = "stream"
            posts = [(await client.ask("/publish", method="POST", body=b"{}")).status for _ in range(20)]
            streams = [(await client.ask(f"/events?user={number}")).status for number in range(20)]

        assert {status} == set(refused)
        assert {200} == set(posts) == set(streams)


class TestCors:
    FILES: ClassVar[dict[str, str]] = {"origins.conf": "https://app.example.com $http_origin;\n"}
    GOOD: ClassVar[dict[str, str]] = {"Origin": "https://app.example.com"}
    BAD: ClassVar[dict[str, str]] = {"Origin": "https://app.example.com.evil.example"}

    @pytest.mark.parametrize("answer", ["stream", 503, "hang up"])
    async def test_an_allowed_origin(self, nginx, toys, way_name, answer):
        """Its pages may read streams, with cookies, and the soft fail: else an EventSource would give up."""
        (toy,) = await toys()
        toy.answer = answer
        front = nginx([toy.server], way=way_name, files=self.FILES)
        async with way(way_name, front.port) as client:
            good = await client.ask("/events", NATIVE | self.GOOD)
            bad = await client.ask("/events", NATIVE | self.BAD)
            none = await client.ask("/events", NATIVE)

        may_be_read(good, bad, none)

    async def test_a_preflight(self, nginx, toys):
        """The question before a request with a token is answered for these origins alone."""
        (toy,) = await toys()
        toy.answer = 404
        front = nginx([toy.server], files=self.FILES)
        asks = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization,last-event-id"}
        async with way("plain", front.port) as client:
            good = await client.ask("/events", self.GOOD | asks, method="OPTIONS")
            bad = await client.ask("/events", self.BAD | asks, method="OPTIONS")

        assert 204 == good.status
        assert {"Authorization", "Last-Event-ID"} <= set(good.headers["access-control-allow-headers"].split(", "))
        assert 404 == bad.status
        assert "access-control-allow-origin" not in bad.headers

    async def test_where_the_application_answers(self, nginx, toys):
        """Its own headers stand once, also on the soft fail that hides its 503."""
        (toy,) = await toys()
        toy.answer, toy.headers = 503, "Access-Control-Allow-Origin: https://other.example\r\nVary: Accept, Origin\r\n"
        front = nginx([toy.server], files=self.FILES)
        async with way("plain", front.port) as client:
            api = await client.send("/events", self.GOOD)
            await api.whole()
            native = await client.ask("/events", NATIVE | self.GOOD)

        assert "https://other.example" == api.headers["access-control-allow-origin"]
        assert "https://other.example" == native.headers["access-control-allow-origin"]
        assert "Accept, Origin" == api.headers["vary"]

    def test_the_same_as_the_application(self):
        """nginx and HAProxy name the headers and methods that the application names."""
        for file in ("snippets/sse-cors.http.conf", "haproxy/haproxy.cfg"):
            text = (ROOT / "nginx" / file).read_text()
            for said in (cors._METHODS, cors._REQUEST_HEADERS, cors._ANSWER_HEADERS):
                assert f'"{said.decode()}"' in text, (file, said)
