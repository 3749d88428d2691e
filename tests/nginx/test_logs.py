"""Tickets and tokens appear in no log, whatever happens to a request."""

import asyncio
import json
import socket

import pytest

from app.stack import reserve_port
from tests.crowd import becomes
from tests.nginx.conftest import NATIVE, logged
from tests.nginx.ways import trusting, way

SECRET = "s3cr3t"
QUERY = f"topic=a&ticket=alice.{SECRET}&user=u&last_event_id={SECRET}"
TOKEN = {"Authorization": f"Bearer {SECRET}", "Cookie": f"session={SECRET}", "Referer": f"https://a/?{SECRET}"}


class TestSecrets:
    async def test_in_no_log(self, nginx, toys, way_name, version):
        """
        Streams that open, are cut, time out, meet a dead process, a wrong answer, a limit; a ticket
        that is given back; and bodies and heads that are too large.
        """
        (toy,) = await toys()
        port, holder = reserve_port()
        dead = f"127.0.0.1:{port}"
        scaled = {"proxy_read_timeout": "100ms", "limit_conn sse_streams_of_user": "2"}
        for servers in ([toy.server], [dead], [dead, toy.server]):
            front = nginx(servers, way=way_name, version=version, files={"exempt.conf": ""}, directives=scaled)
            count = 0
            async with way(way_name, front.port) as client:
                for answer in ("stream", 200, 429, 502, 503, 302, "hang up"):
                    toy.answer = answer
                    for headers in (NATIVE, TOKEN, NATIVE | TOKEN):
                        await (await client.send(f"/events?{QUERY}", headers)).until(lambda a: a.ended or a.events)
                        count += 1
                    given_back = await client.send(f"/tickets?{QUERY}", TOKEN, method="DELETE")
                    await given_back.until(lambda a: a.ended or a.events)
                    count += 1
                toy.answer = "stream"
                many = (NATIVE, NATIVE, NATIVE, TOKEN, TOKEN, TOKEN)  # over the limit, and silent
                for answer in [await client.send(f"/events?{QUERY}", headers) for headers in many]:
                    await answer.until(lambda a: a.ended or a.status)  # else nginx may never have read it
                    count += 1
            async with way(way_name, front.port) as client:
                size = {"Content-Length": "2200000", "Authorization": TOKEN["Authorization"]}
                large = await client.send(f"/publish?{QUERY}", size, method="POST", body=b"x" * 60_000)
                await large.until(lambda a: a.status or a.ended)
            head = await self._too_large(way_name, front.port)
            assert head.status in (400, 431) or head.ended == "cut"

            assert SECRET not in json.dumps(await logged(front, count))
            assert SECRET not in front.log()
        if holder:
            holder.close()

    async def _too_large(self, name: str, port: int):
        async with way(name, port) as client:
            answer = await client.send(f"/events?{QUERY}", {f"x-{number}": SECRET * 1200 for number in range(6)})
            return await answer.until(lambda a: a.ended or a.status)


class TestFloods:
    async def test_headers(self, nginx, toys, way_name):
        """A head over the configured size is refused, with a problem document over HTTP/1.1, and never passed on."""
        (toy,) = await toys()
        front = nginx([toy.server], way=way_name)
        async with way(way_name, front.port) as client:
            answer = await client.send("/events", {f"x-{number}": "y" * 7_000 for number in range(12)})
            await answer.until(lambda a: a.ended)

            assert [] == toy.heads
            if way_name == "h2":  # nginx ends the connection
                assert (0, "cut") == (answer.status, answer.ended)
            else:
                assert 431 == answer.status
                assert 431 == json.loads(bytes(answer.body))["status"]

    async def test_many_headers(self, nginx, toys, way_name):
        """A thousand small headers are as much as 1.30 takes."""
        (toy,) = await toys()
        front = nginx([toy.server], way=way_name)
        async with way(way_name, front.port) as client:
            answer = await client.send("/events", {f"x-{number}": "" for number in range(1_500)})
            await answer.until(lambda a: a.ended)

            assert [] == toy.heads
            assert answer.status in (400, 431) or answer.ended == "cut"

    async def test_a_line_that_is_no_request(self, nginx, toys):
        """What is no HTTP gets 400 as a problem document, and a line of JSON in the log."""
        (toy,) = await toys()
        front = nginx([toy.server])
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(b"GET /events HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()

        assert head.startswith(b"HTTP/1.1 400")
        assert "request" == json.loads(body)["name"]
        assert 400 == (await logged(front, 1))[0]["status"]

    async def test_a_head_that_never_ends(self, nginx, toys, way_name):
        """Who drips a request is closed after client_header_timeout (scaled)."""
        (toy,) = await toys()
        front = nginx([toy.server], directives={"client_header_timeout": "500ms"})
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write(b"GET /events HTTP/1.1\r\nHost: kit\r\nX-Slow: ")
        async with asyncio.timeout(20):
            await reader.read()
        writer.close()

        assert 0.3 < loop.time() - began

    async def test_a_body_that_is_too_large(self, nginx, toys, way_name):
        """413 is nginx's own, and as exact as the application's: never 502, whatever the length says."""
        (toy,) = await toys()
        front = nginx([toy.server], way=way_name)
        async with way(way_name, front.port) as client:
            fits = await client.ask("/publish", method="POST", body=b"x" * 60_000)
            refused = await client.ask("/publish", {"Content-Length": "2097153"}, method="POST", body=b"x" * 60_000)
            problem = json.loads(await refused.whole())

        assert 200 == fits.status
        assert (413, "urn:sse-kit:too-large", "2097153") == (refused.status, problem["type"], problem["value"])


class TestSlowClients:
    @pytest.mark.parametrize("name", ["plain", "tls"])
    async def test_bounded_and_ended(self, nginx, toys, name):
        """
        A client that reads nothing costs a bounded amount in kernel and nginx, the application
        is stopped, not read ahead of; after send_timeout (scaled) it is closed.
        """
        (toy,) = await toys()
        toy.answer = "flood"
        front = nginx([toy.server], way=name, directives={"send_timeout": "2s"})
        sock = await asyncio.to_thread(self._asked, front.port, name)

        await becomes(lambda: toy.open, "a stream")
        await becomes(lambda: toy.gone, "its end")
        sock.close()

        # What the client's kernel took (128 KB), sndbuf twice (128 KB), and what the
        # kernel holds between the toy and nginx. Without sndbuf it is MB more.
        assert 100_000 < toy.written < 2_500_000, toy.written

    @staticmethod
    def _asked(port: int, name: str) -> socket.socket:
        """Return a connection that has asked for a stream, and will read nothing of it."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", port))
        if name == "tls":
            sock = trusting("http/1.1").wrap_socket(sock)
        sock.sendall(b"GET /events HTTP/1.1\r\nHost: kit\r\n\r\n")
        return sock
