"""
What one process says about itself in numbers: named as Prometheus wants it, on a port of its own, and true.
"""

import asyncio
import contextlib
import re
import signal
import socket
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.stack import App
from app.stream import REASONS
from tests.live import Site, ask, becomes, event, metrics, publish, shared, subscribed

# https://prometheus.io/docs/practices/naming/#base-units
WRONG_UNITS = re.compile(r"_(ms|milliseconds|minutes|kb|kilobytes|megabytes|percent)(_|$)")


@pytest.fixture(scope="module")
def app(require: Callable[..., str]) -> App:
    require("redis-server", "valkey-server")
    return shared.app


class TestNames:
    async def test_ours(self, app):
        """
        Every metric of the kit has its prefix, its type's ending, base units and a line of help.
        """
        answer = await ask(app.metrics_port, "GET", "/metrics")
        families = [
            family for family in text_string_to_metric_families(answer.body.decode()) if family.name.startswith("sse_")
        ]

        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert len(families) > 20
        for family in families:
            assert re.fullmatch(r"sse(_[a-z]+)+", family.name), family.name
            assert not WRONG_UNITS.search(family.name), family.name
            assert family.documentation.endswith("."), family.name
            assert family.type in ("counter", "gauge", "histogram"), family.name
            for sample in family.samples:
                assert sample.name.endswith("_total") == (family.type == "counter"), sample.name

    async def test_reasons(self, app):
        """
        Every reason for which a stream can end is there from the start, so that its rate can be asked for.
        """
        samples = await metrics(app)

        assert {f'sse_streams_ended_total{{reason="{reason}"}}' for reason in REASONS} == {
            name for name in samples if name.startswith("sse_streams_ended_total")
        }

    async def test_process(self, app):
        """
        The process's own figures are there too.
        """
        samples = await metrics(app)

        assert {"process_resident_memory_bytes", "process_open_fds", "process_start_time_seconds"} <= samples.keys()


class TestPort:
    async def test_not_on_the_public_port(self, app):
        """
        Metrics are for those who run the kit: the public port has none.
        """
        assert 404 == (await ask(app.port, "GET", "/metrics")).status

    async def test_nothing_public_on_the_metrics_port(self, app):
        """
        Nobody publishes or subscribes past nginx's limits on the metrics port.
        """
        body = b'{"topics": ["t"], "data": "x"}'
        answers = [
            await ask(app.metrics_port, "POST", "/publish", headers={"Content-Type": "application/json"}, body=body),
            await ask(app.metrics_port, "GET", "/events?topic=t"),
        ]

        for answer in answers:
            assert b"ids" not in answer.body
            assert "text/event-stream" not in answer.headers.get("content-type", "")


class TestValues:
    async def test_one_stream(self, app):
        """
        A stream's life moves the counters by exactly what happened.
        """

        async def quiet() -> bool:
            return (await metrics(app))["sse_streams_open"] == 0

        await becomes(quiet, "the end of other tests' streams")
        await publish(app, event("before", "counted"))
        before = await metrics(app)
        ids = await publish(app, event("1", "counted"), event("2", "counted"))
        async with subscribed(app, "counted", last_event_id=ids[0]) as stream:
            await stream.until_data("2")
            await publish(app, event("3", "counted"))
            await stream.until_data("3")
            await stream.until(lambda s: b":\n\n" in s.raw)
            during = await metrics(app)

        async def gone() -> bool:
            return (await metrics(app))[ended] == before[ended] + 1

        ended = 'sse_streams_ended_total{reason="client_gone"}'
        await becomes(gone)
        after = await metrics(app)
        moved = {name: after[name] - before[name] for name in after if name in before and after[name] != before[name]}

        assert 1 == during["sse_streams_open"] - before["sse_streams_open"]
        assert 0 == after["sse_streams_open"] - before["sse_streams_open"]
        assert {
            "sse_streams_opened_total": 1,
            "sse_streams_resumed_total": 1,
            "sse_streams_handed_off_total": 1,
            "sse_deliveries_total": 2,
            "sse_replayed_total": 1,
            "sse_published_total": 3,
            "sse_log_entries_total": 3,
            ended: 1,
        } == {name: value for name, value in moved.items() if name in _COUNTED or name == ended}
        assert moved["sse_heartbeats_total"] >= 1
        assert moved["sse_delivered_bytes_total"] >= len(stream.raw) - 8 * stream.raw.count(b"\r\n")
        assert 1 == moved['sse_replay_events_bucket{le="1.0"}']
        assert 1 <= moved["sse_publish_to_write_seconds_count"] <= 3
        assert 0 <= after["sse_publish_to_write_seconds_sum"] < 20
        assert moved["sse_loop_lag_seconds_count"] >= 1
        assert 1 == after["sse_log_connected"]
        assert 1 == after["sse_handoff"]
        assert 15_000 == after["sse_streams_limit"]
        assert 0 <= after["sse_reader_lag_seconds"] < 20
        assert 0 == after["sse_log_gap_total"]

    async def test_resumed_but_refused(self, app):
        """
        A position that was sent with a connect that got no stream resumed none.
        """
        user = {"user": "resumer"}
        async with contextlib.AsyncExitStack() as open:
            for _ in range(10):
                await open.enter_async_context(subscribed(app, "t", query=user))
            before = await metrics(app)
            marked = {"Last-Event-ID": "0:1-1~e"}
            assert 429 == (await ask(app.port, "GET", "/events?topic=t&user=resumer", headers=marked)).status
            after = await metrics(app)
        assert 0 == after["sse_streams_resumed_total"] - before["sse_streams_resumed_total"]

    async def test_refusals(self, app):
        """
        What is refused is counted by its status.
        """
        name = 'sse_requests_refused_total{status="%d"}'
        before = await metrics(app)
        assert 400 == (await ask(app.port, "GET", "/events?topic=a%20b")).status
        assert 403 == (await ask(app.port, "GET", "/events?topic=user:bob")).status
        assert 404 == (await ask(app.port, "GET", "/event")).status
        assert 405 == (await ask(app.port, "PUT", "/publish")).status
        assert 415 == (await ask(app.port, "POST", "/publish", body=b"x")).status
        after = await metrics(app)

        for status in (400, 403, 404, 405, 415):
            assert 1 == after[name % status] - before.get(name % status, 0)


_COUNTED = {
    "sse_streams_opened_total",
    "sse_streams_resumed_total",
    "sse_streams_handed_off_total",
    "sse_deliveries_total",
    "sse_replayed_total",
    "sse_published_total",
    "sse_log_entries_total",
}


class TestReasons:
    async def test_each_end_is_counted_under_its_reason(self, require):
        """
        A stream ends for one reason, and that one is counted: age, slow reader, drain, client.
        """
        require("redis-server", "valkey-server")
        with Site() as site:
            app = await asyncio.to_thread(
                site.app, shared.server, max_age_seconds=3, slow_consumer_seconds=0.3,
                drain_seconds=30, drain_lead_seconds=0, send_buffer_bytes=4096,
            )  # fmt: skip

            async def ended(reason: str, count: int = 1) -> bool:
                return (await metrics(app))[f'sse_streams_ended_total{{reason="{reason}"}}'] == count

            async with subscribed(app, "aged") as stream:
                await stream.until(lambda s: s.ended)
                assert "clean" == stream.ended
                await becomes(lambda: ended("max_age"))
            async with subscribed(app, "gone"):
                pass
            await becomes(lambda: ended("client_gone"))
            # A client that asks and then reads nothing.
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", app.port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
            writer.write(b"GET /events?topic=slow HTTP/1.1\r\nHost: test\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.pause_reading()
            for _ in range(60):
                await publish(app, event("x" * 200_000, "slow"))
                if await ended("slow_consumer"):
                    break
            await becomes(lambda: ended("slow_consumer"))
            writer.transport.abort()
            async with subscribed(app, "drained") as one, subscribed(app, "drained"):
                app.kill(signal.SIGTERM)
                await becomes(lambda: ended("draining"))
                assert one
