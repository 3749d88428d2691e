"""
Every metric: its name and one line of help. Served on a port of its own.

The hot path counts in plain integers; they are read when somebody asks.
https://prometheus.io/docs/practices/naming/
"""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from threading import Thread
from typing import Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from app.histogram import Histogram
from app.hub import Hub
from app.leases import Leases
from app.reader import Reader
from app.stream import REASONS
from app.window import Window

# Problems that say that there is too much of something.
LIMITS = ("process-full", "process-busy", "user-full", "user-rate", "publish-rate")


@dataclass(slots=True)
class Tally:
    """What happened at the edge and to streams, since the start."""

    ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    published: int = 0
    refused: dict[int, int] = field(default_factory=dict)
    # By the limit that refused; the problem's name is the limit's.
    limited: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0))
    soft_failed: int = 0
    handed_off: int = 0
    resumed: int = 0
    runs_open: int = 0
    runs_started: int = 0
    runs_ended: dict[str, int] = field(default_factory=dict)
    # Events that one stream caught up with, counted when it ends.
    replays: Histogram = field(default_factory=lambda: Histogram(0, 1, 10, 100, 1_000, 10_000, 100_000))

    def refuse(self, status: int, slug: str) -> None:
        """Count a request that was refused with the problem *slug*."""
        self.refused[status] = self.refused.get(status, 0) + 1
        if slug in self.limited:
            self.limited[slug] += 1


class _Lag(Protocol):
    longest_hold_seconds: float
    lag: Histogram

    def tasks(self) -> int: ...


class Metrics:
    """
    Reads the parts of one process when Prometheus asks.

    Attributes:
        handoff: connections are taken over from Hypercorn; known once it serves.
    """

    def __init__(
        self,
        tally: Tally,
        hub: Hub,
        window: Window,
        reader: Reader,
        pulse: _Lag,
        leases: Leases,
        *,
        max_streams: int,
        line: Sized,
    ) -> None:
        self._leases = leases
        self.handoff = False
        self._max_streams = max_streams
        self._line = line
        self._tally = tally
        self._hub = hub
        self._window = window
        self._reader = reader
        self._pulse = pulse
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._server: tuple[WSGIServer, Thread] | None = None

    def serve(self, host: str, port: int) -> None:
        """Serve `/metrics` from a thread of its own. Raises OSError if the port is taken."""
        self._server = start_http_server(port, host, self.registry)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def collect(self) -> Iterator[Metric]:
        hub, window, reader, tally = self._hub, self._window, self._reader, self._tally
        counts = hub.counts
        yield _gauge("sse_streams_open", "Streams open now.", len(hub))
        yield _gauge("sse_opens_waiting", "Opens that wait for their turn.", len(self._line))
        yield _gauge("sse_streams_limit", "Most streams of this process: SSE_MAX_STREAMS.", self._max_streams)
        yield _counter("sse_streams_opened", "Streams opened.", counts.opened)
        yield _labelled("sse_streams_ended", "Streams ended, by reason.", "reason", tally.ended.items())
        yield _counter("sse_streams_resumed", "Streams opened with a position.", tally.resumed)
        yield _counter("sse_streams_handed_off", "Streams on a taken-over connection.", tally.handed_off)
        yield _gauge(
            "sse_handoff", "1 if connections are taken over from Hypercorn, as they should.", int(self.handoff)
        )
        yield _counter("sse_deliveries", "Events written to streams.", counts.deliveries)
        yield _counter("sse_delivered_bytes", "Bytes written to streams.", counts.bytes)
        yield _counter("sse_replayed", "Events written to streams that were behind.", counts.replayed)
        yield _histogram("sse_replay_events", "Events that a stream caught up with, when it ends.", tally.replays)
        yield _counter("sse_heartbeats", "Heartbeats written.", counts.heartbeats)
        yield _counter("sse_positions", "Events stream.position written.", counts.positions)
        yield _counter("sse_resets", "Events stream.reset written.", counts.resets)
        yield _gauge("sse_runs_open", "Runs that this process makes now.", tally.runs_open)
        yield _counter("sse_runs_started", "Runs that this process began to make.", tally.runs_started)
        yield _labelled(
            "sse_runs_ended",
            "Runs of this process that ended: done, or why they failed.",
            "how",
            list(tally.runs_ended.items()),
        )
        yield _counter("sse_published", "Events accepted by POST /publish.", tally.published)
        yield _labelled(
            "sse_requests_refused",
            "Requests answered with a problem, by status.",
            "status",
            [(str(status), count) for status, count in list(tally.refused.items())],
        )
        yield _labelled("sse_limit_refused", "Requests refused by a limit.", "limit", list(tally.limited.items()))
        yield _gauge("sse_leases", "Streams of known users that hold a place, here.", len(self._leases))
        yield _counter("sse_lease_errors", "Times that the leases in Redis were away.", self._leases.errors)
        yield _gauge(
            "sse_leases_local",
            "1 while Redis is away and this process counts its users' streams alone.",
            int(self._leases.away),
        )
        yield _counter("sse_soft_failed", "Refused opens answered 200 with retry.", tally.soft_failed)
        yield _counter("sse_log_entries", "Entries read from the log.", reader.entries)
        yield _counter("sse_log_entries_broken", "Entries of the log that could not be understood.", reader.broken)
        yield _counter("sse_log_gap", "Losses of history noticed and announced.", reader.gaps)
        yield _counter("sse_log_errors", "Times that the log was away.", reader.errors)
        yield _gauge(
            "sse_reader_lag_seconds", "How far the reader was behind the log, at its last check.", reader.lag_seconds
        )
        yield _histogram(
            "sse_publish_to_write_seconds",
            "From the log's taking an event to its being written to this process's streams, once per batch.",
            reader.latency,
        )
        yield _gauge("sse_log_connected", "1 if the reader reaches the log.", int(reader.connected))
        yield _gauge("sse_window_events", "Events in the window.", len(window))
        yield _gauge("sse_window_bytes", "Estimated memory of the window.", window.bytes)
        yield _gauge(
            "sse_window_seconds",
            "How far back the window reaches: the promise of SSE_HISTORY_SECONDS as it stands.",
            reader.window_seconds(),
        )
        yield _gauge(
            "sse_loop_longest_hold_seconds",
            "Longest delay of the event loop since the start.",
            self._pulse.longest_hold_seconds,
        )
        yield _histogram("sse_loop_lag_seconds", "How late the event loop's ticks came.", self._pulse.lag)
        yield _gauge(
            "sse_loop_tasks", "Tasks of the event loop: requests, and streams not taken over.", self._pulse.tasks()
        )


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(name, about, value=value)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(name, about, value=value)


def _histogram(name: str, about: str, histogram: Histogram) -> Metric:
    return HistogramMetricFamily(name, about, buckets=histogram.cumulative(), sum_value=histogram.sum)


def _labelled(name: str, about: str, label: str, rows: Iterable[tuple[str, float]]) -> Metric:
    family = CounterMetricFamily(name, about, labels=[label])
    for key, value in rows:
        family.add_metric([key], value)
    return family
