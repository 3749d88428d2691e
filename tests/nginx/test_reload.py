"""A reload and a renewed certificate cut no stream."""

import asyncio
import itertools
import signal
import socket
import ssl

import pytest
from cryptography import x509

from tests import live
from tests.crowd import becomes
from tests.nginx.conftest import NATIVE, certificate, reload, replace, workers
from tests.nginx.ways import way

# The ladder, scaled: 480 s and 540 s. A busy machine takes seconds to open the streams.
MAX_AGE, SHUTDOWN = 16.0, 24.0
# In all, over the three ways; an HTTP/2 connection carries 100.
STREAMS = {"plain": 800, "tls": 500, "h2": 700}


def serial(port: int) -> int:
    """Return the serial number of the certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), 10) as raw, context.wrap_socket(raw) as connection:
        return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True)).serial_number


class TestReload:
    @pytest.mark.timeout(180)
    async def test_two_thousand_streams(self, nginx, site, tls):
        """
        Streams that are open at a reload all reach their age and end properly, and the old
        workers are gone within worker_shutdown_timeout. Streams that come after it meet new workers.
        """
        app = site.app("", max_age_seconds=MAX_AGE, heartbeat_seconds=2, retry_ms=1000)
        options = {"directives": {"worker_shutdown_timeout": f"{SHUTDOWN:g}s"}}
        servers = [f"127.0.0.1:{app.port}"]
        plain, secure = nginx(servers, **options), nginx(servers, way="tls", **options)
        ports = {"plain": plain.port, "tls": secure.port, "h2": secure.port}
        loop = asyncio.get_running_loop()
        async with way("plain", ports["plain"]) as a, way("tls", ports["tls"]) as b, way("h2", ports["h2"]) as c:
            clients = {"plain": a, "tls": b, "h2": c}

            async def opened(name: str, number: int) -> tuple[float, object]:
                began = loop.time()
                # One HTTP/2 connection carries 128 streams at most.
                source = f"127.0.0.{2 + number // 100}" if name == "h2" else None
                return began, await clients[name].ask(f"/events?topic=t&user=u{number}", NATIVE, source=source)

            streams = []
            for name, count in STREAMS.items():
                for batch in itertools.batched(range(count), 50, strict=False):
                    streams += await asyncio.gather(*(opened(name, number) for number in batch))
            assert {200} == {stream.status for _, stream in streams}
            still = sum(not stream.ended for _, stream in streams)

            began = loop.time()
            old = [await reload(front, wait=False) for front in (plain, secure)]
            later = [await clients[name].ask("/events?topic=t", NATIVE) for name in ("plain", "tls")]
            for _, stream in streams:
                await stream.until(lambda s: s.ended, 90)
            for front, gone in zip((plain, secure), old, strict=True):
                await becomes(lambda f=front, g=gone: not workers(f) & g, "old workers gone")
            took = loop.time() - began

            assert {"clean"} == {stream.ended for _, stream in streams}
            ages = [stream.ended_at - opened_at for opened_at, stream in streams]
            assert still >= 1_000, still
            assert min(ages) >= 0.8 * MAX_AGE
            assert took < SHUTDOWN
            assert {200} == {stream.status for stream in later}

    async def test_a_stream_that_does_not_end(self, nginx, toys, way_name):
        """What is open longer than worker_shutdown_timeout is cut: so the application's age must be below it."""
        (toy,) = await toys()
        front = nginx([toy.server], way=way_name, directives={"worker_shutdown_timeout": "500ms"})
        async with way(way_name, front.port) as client:
            stream = await client.ask("/events", NATIVE)
            await reload(front)
            await stream.until(lambda s: s.ended)

        assert "cut" == stream.ended


class TestCertificate:
    @pytest.mark.parametrize("name", ["tls", "h2"])
    async def test_a_renewed_one(self, nginx, toys, tls, name):
        """New connections are shown the new certificate; open streams go on."""
        (toy,) = await toys()
        front = nginx([toy.server], way=name)
        before = serial(front.port)
        async with way(name, front.port) as client:
            streams = [await client.ask(f"/events?user={number}", NATIVE) for number in range(20)]

            new = certificate(front.prefix / "tls")
            await reload(front, wait=False)

            async def shown() -> bool:
                return await asyncio.to_thread(serial, front.port) == new

            await live.becomes(shown, "the new certificate")
            toy.say(b"data: still here\n\n")

            assert before != new
            for stream in streams:
                await stream.until(lambda s: s.data == ["still here"])
                assert not stream.ended

    async def test_half_a_renewal(self, nginx, toys, tls):
        """A key that does not fit its certificate is refused by the reload: the old one stays."""
        (toy,) = await toys()
        front = nginx([toy.server], way="tls")
        before, old = serial(front.port), workers(front)
        shipped = (front.prefix / "tls/tls.crt").read_bytes()
        certificate(front.prefix / "tls")
        replace(front.prefix / "tls/tls.crt", shipped)

        front.kill(signal.SIGHUP)
        await becomes(lambda: "[emerg]" in front.log(), "a refusal")

        assert "key values mismatch" in front.log()
        assert (before, old) == (serial(front.port), workers(front))
