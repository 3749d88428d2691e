"""Streams pass through nginx as they are, on every way to it."""

import asyncio
import os
import signal

import pytest

from app.stack import App, nginx_version
from tests import live
from tests.crowd import becomes
from tests.nginx.conftest import NATIVE
from tests.nginx.ways import WAYS, way

# Longer than anything here takes that works; what must *not* come is given this.
NOT_WITHIN = 0.5


class TestBuffering:
    @pytest.mark.parametrize("headers", [NATIVE, {}], ids=["native", "api"])
    async def test_head_then_each_event(self, nginx, toys, way_name, version, headers):
        """
        The head comes before any event, and each event before the next one is made.

        nginx 1.22 keeps the head over HTTP/2 until the first byte after it, whatever its
        configuration says; so the application sends one with the head (README.md says so).
        """
        (toy,) = await toys()
        front = nginx([toy.server], way=way_name, version=version)
        async with way(way_name, front.port) as client:
            stream = await client.send("/events?topic=a", headers)
            await becomes(lambda: toy.open, "a stream")
            if way_name == "h2" and nginx_version(front.binary) < (1, 25):
                toy.say(b": here\n\n")
            await stream.until(lambda s: s.status)

            assert 200 == stream.status
            assert not stream.data
            for number in range(5):
                toy.say(b"data: %d\n\n" % number)
                await stream.until(lambda s, n=number: s.data and s.data[-1] == str(n))
            assert ["0", "1", "2", "3", "4"] == stream.data

    async def test_buffering_is_noticed(self, nginx, toys, way_name):
        """The same test sees `proxy_buffering on`: the head waits, and over TLS with HTTP/1.1 the events too."""
        (toy,) = await toys()
        front = nginx([toy.server], way=way_name, directives={"proxy_buffering": "on"})
        async with way(way_name, front.port) as client:
            stream = await client.send("/events?topic=a", NATIVE)
            await becomes(lambda: toy.open, "a stream")
            with pytest.raises(AssertionError, match="not within"):
                await stream.until(lambda s: s.status, NOT_WITHIN)

            toy.say(b"data: 0\n\n")

            if way_name == "tls":
                with pytest.raises(AssertionError, match="not within"):
                    await stream.until(lambda s: s.data, NOT_WITHIN)
            else:
                await stream.until(lambda s: s.data == ["0"])

    async def test_the_application_itself(self, nginx, site, way_name, version):
        """What is published through nginx is read through nginx, before the next one is published."""
        app = shared_app(site)
        front = nginx([f"127.0.0.1:{app.port}"], way=way_name, version=version)
        topic = f"t-{way_name}-{version}"
        async with way(way_name, front.port) as client:
            stream = await client.ask(f"/events?topic={topic}", NATIVE)
            await stream.until(lambda s: s.events and s.events[0].event == "stream.open")
            for number in range(10):
                body = b'{"topics": ["%b"], "data": "%d"}' % (topic.encode(), number)
                posted = await client.ask("/publish", {"Content-Type": "application/json"}, method="POST", body=body)
                assert 201 == posted.status
                await stream.until(lambda s, n=number: len(s.data) == n + 1)

            assert [str(number) for number in range(10)] == stream.data


class TestReadTimeout:
    async def test_silence_and_a_frozen_application(self, nginx, site):
        """
        A stream without events outlives the read timeout by its heartbeats; a process
        that froze is noticed within it. The ladder is scaled: 0.2 s and 2 s for 15 s and 75 s.
        """
        app = site.app("", heartbeat_seconds=0.2, handoff="auto")
        fronts = {
            name: nginx([f"127.0.0.1:{app.port}"], way=name, directives={"proxy_read_timeout": "2s"}) for name in WAYS
        }
        loop = asyncio.get_running_loop()
        clients = [way(name, front.port) for name, front in fronts.items()]
        async with clients[0] as plain, clients[1] as tls, clients[2] as h2:
            streams = [await client.ask("/events?topic=quiet", NATIVE) for client in (plain, tls, h2)]
            for stream in streams:
                await stream.until(lambda s: bytes(s.body).count(b"\n:") + bytes(s.body).startswith(b":") >= 22)
            assert ["", "", ""] == [stream.ended for stream in streams]

            began = loop.time()
            os.kill(app.pid, signal.SIGSTOP)
            try:
                for stream in streams:
                    await stream.until(lambda s: s.ended)
            finally:
                os.kill(app.pid, signal.SIGCONT)

            # At least the read timeout less one heartbeat; at most it, and a slow machine.
            for stream in streams:
                assert 1.7 <= stream.ended_at - began < 20
                assert "cut" == stream.ended


_apps: dict[int, App] = {}


def shared_app(site: live.Site) -> App:
    """Return one process for all tests of this file that leave it as it was."""
    if id(site) not in _apps:
        _apps[id(site)] = site.app("", heartbeat_seconds=0.2)
    return _apps[id(site)]
