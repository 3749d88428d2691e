"""
The benchmark may be believed: its client counts exactly what a server did wrong.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtest.bench.chart import draw
from loadtest.bench.client import SATURATED, Clients, Report
from loadtest.bench.compiler import build, find_compiler
from loadtest.bench.figures import LIMITS, Limit, Verdict, check, make_figure, ratio
from loadtest.bench.first_token import TOKENS, ask
from loadtest.bench.histogram import Histogram, bucket_of, middle_of
from loadtest.bench.peers import PEERS
from loadtest.bench.peers.floor import Floor
from loadtest.bench.publisher import DATA_SIZE, make_data
from loadtest.bench.report import Report as RunReport
from loadtest.bench.report import describe_machine
from loadtest.bench.scenario import QUICK, ROWS, Results, Sample

ROOT = Path(__file__).parents[2]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
OPEN = b": open\n\n"

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")


def event(number: int, *, key: int = 0, end: bytes = b"\n") -> bytes:
    """
    Return one measured event whose id is its sequence number.
    """
    return b"id: %d%bdata: %b%b%b" % (number, end, make_data(key, number).encode(), end, end)


class ScriptedServer:
    """
    Accepts streams and writes to each what *script* says for its request.

    The script gets the request's head and the stream's ordinal and returns the
    pieces to write; None as a piece ends the stream.
    """

    def __init__(self, script: Callable[[bytes, int], list[bytes | None]]) -> None:
        self.requests: list[bytes] = []
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._links: list[socket.socket] = []
        # Pieces after the first wait for this, so that all streams are open first.
        self.go = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._listener.accept()
                self._links.append(link)
                threading.Thread(target=self._serve, args=(link, len(self._links) - 1), daemon=True).start()

    def _serve(self, link: socket.socket, ordinal: int) -> None:
        with contextlib.suppress(OSError):
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request = b""
            while b"\r\n\r\n" not in request:
                request += link.recv(4096)
            self.requests.append(request)
            first, *pieces = self._script(request, ordinal)
            if first is not None:
                link.sendall(first)
            self.go.wait(10)
            for piece in pieces:
                if piece is None:
                    link.shutdown(socket.SHUT_RDWR)
                    link.close()
                    return
                link.sendall(piece)

    def close(self) -> None:
        """
        Close the listener and all streams.
        """
        self._listener.close()
        for link in self._links:
            link.close()


@pytest.fixture(params=["C", "Python"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """
    Each test of the client runs with the C client and with its fallback.
    """
    if request.param == "C" and find_compiler() is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("BENCH_FALLBACK", "1" if request.param == "Python" else "")
    return request.param


@contextlib.contextmanager
def playing(
    script: Callable[[bytes, int], list[bytes | None]], *, streams: int = 1, keys: tuple[int, ...] = (0,)
) -> Iterator[tuple[Clients, ScriptedServer]]:
    """
    Connect clients to a scripted server.
    """
    server = ScriptedServer(script)
    clients = Clients([("127.0.0.1", server.port)])
    try:
        clients.add(streams, "/events", list(keys))
        yield clients, server
    finally:
        clients.end()
        server.close()


def play(*pieces: bytes | None, last: int, wait: float = 2.0, keys: tuple[int, ...] = (0,)) -> Report:
    """
    Play *pieces* to one stream and report; *last* is the last number published.
    """
    # In one write, so that what comes after the last number is in the report, too.
    script: list[bytes | None] = []
    for piece in pieces:
        if piece is not None and script and script[-1] is not None:
            script[-1] += piece
        else:
            script.append(piece)
    with playing(lambda request, ordinal: [HEAD + OPEN, *script], keys=keys) as (clients, server):
        assert 1 == clients.connect()["open"]
        server.go.set()
        clients.wait(0, last, wait)
        return clients.report()


def counts(report: Report) -> tuple[int, int, int, int]:
    """
    Return (events, missing, dup, order).
    """
    return report.events, report.missing, report.dup, report.order


class TestVerification:
    def test_all_events_in_order(self, kind: str):
        """
        A server that does its work has no faults.
        """
        report = play(*map(event, range(1, 21)), last=20)

        assert (20, 0, 0, 0) == counts(report)
        assert [] == report.faults()

    def test_dropped(self, kind: str):
        """
        Events that never come are missing, each of them.
        """
        report = play(*map(event, [1, 2, 5, 6, 9, 10]), last=10)

        assert (6, 4, 0, 0) == counts(report)
        assert 1 == report.faulty

    def test_dropped_at_the_end(self, kind: str):
        """
        An event that is missing at the end is counted too, though no gap shows it.
        """
        report = play(*map(event, [1, 2, 3]), last=5, wait=1.0)

        assert (3, 2, 0, 0) == counts(report)

    def test_dropped_at_the_start(self, kind: str):
        """
        An open stream gets the very first event that is published.
        """
        report = play(*map(event, [3, 4]), last=4)

        assert (2, 2, 0, 0) == counts(report)

    def test_repeated(self, kind: str):
        """
        Every copy after the first is a duplicate.
        """
        report = play(*map(event, [1, 2, 2, 3, 1, 2, 4]), last=4)

        assert (7, 0, 3, 0) == counts(report)

    def test_reordered(self, kind: str):
        """
        A late event is out of order, no longer missing, and no duplicate.
        """
        report = play(*map(event, [1, 4, 2, 3, 5, 7, 6, 8]), last=8)

        assert (8, 0, 0, 3) == counts(report)

    def test_all_at_once(self, kind: str):
        """
        Dropped, repeated and late events do not hide each other.
        """
        report = play(*map(event, [2, 1, 1, 9, 5, 6, 5, 4, 10]), last=12, wait=1.0)

        # Missing: 3, 7, 8, 11, 12. Twice: 1, 5. Late: 1, 5, 6, 4.
        assert (9, 5, 2, 4) == counts(report)

    def test_each_stream_for_itself(self, kind: str):
        """
        Faults are counted where they happened.
        """
        scripts = [[1, 2, 3, 4], [1, 3, 4], [1, 2, 2, 3, 4], [1, 3, 2, 4]]

        def script(request: bytes, ordinal: int) -> list[bytes | None]:
            return [HEAD + OPEN, *map(event, scripts[ordinal])]

        with playing(script, streams=4) as (clients, server):
            clients.connect()
            server.go.set()
            clients.wait(0, 4)
            found = sorted((s["missing"], s["dup"], s["order"]) for s in clients.streams())
            report = clients.report()

        assert [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)] == found
        assert 3 == report.faulty

    def test_topics_apart(self, kind: str):
        """
        Each topic has its own sequence; a topic that was not asked for is foreign.
        """
        pieces = [event(1), event(1, key=3), event(2, key=3), event(1, key=7), event(2), event(4, key=3)]
        report = play(*pieces, last=2, keys=(0, 3))

        assert (5, 1, 0, 0) == counts(report)
        assert 1 == report.foreign

    def test_damaged(self, kind: str):
        """
        An event whose data was cut is damaged, and not taken for read.
        """
        report = play(event(1), event(2).replace(b"$", b""), last=1)

        assert (1, 1) == (report.events, report.corrupt)

    def test_others(self, kind: str):
        """
        Events and comments of the server's own disturb nothing.
        """
        report = play(b"event: stream.open\nid: 7\ndata: {}\n\n", b":\n\n", event(1), last=1)

        assert (1, 1, []) == (report.events, report.others, report.faults())


class TestFraming:
    @pytest.mark.parametrize("end", [b"\n", b"\r\n"])
    @pytest.mark.parametrize("size", [1, 7, 10_000])
    def test_chunks_of_any_size(self, kind: str, size: int, end: bytes):
        """
        Chunks and reads may end anywhere, within a line end too.
        """
        body = OPEN.replace(b"\n", end) + b"".join(event(n, end=end) for n in range(1, 11))
        chunks = [body[i : i + size] for i in range(0, len(body), size)]
        framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        pieces = [framed[i : i + 11] for i in range(0, len(framed), 11)]

        with playing(lambda request, ordinal: [CHUNKED_HEAD, *pieces]) as (clients, server):
            server.go.set()
            clients.connect()
            clients.wait(0, 10)
            report = clients.report()

        assert (10, 0, 0, 0) == counts(report)

    def test_end_of_chunks(self, kind: str):
        """
        The last chunk ends the stream though the connection stays.
        """
        body = b"%x\r\n%b\r\n" % (len(OPEN), OPEN)
        with playing(lambda request, ordinal: [CHUNKED_HEAD + body, b"0\r\n\r\n"]) as (clients, server):
            clients.connect()
            server.go.set()
            until(lambda: clients.report().lost == 1)

            assert ["1 streams ended by the server"] == clients.report().faults()


class TestStreams:
    def test_ended_by_the_server(self, kind: str):
        """
        A stream that the server ends is lost, and what it had not read is missing.
        """
        report = play(event(1), None, last=3, wait=1.0)

        assert (1, 2, 1) == (report.events, report.missing, report.lost)

    def test_refused(self, kind: str):
        """
        A stream that was refused is not open, and the status is told.
        """
        refusal = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
        with playing(lambda request, ordinal: [refusal]) as (clients, _):
            answer = clients.connect()

        assert (0, 1, {"status 503": 1}) == (answer["open"], answer["failed"], answer["why"])

    def test_not_an_event_stream(self, kind: str):
        """
        Status 200 with another content type is no stream.
        """
        with playing(lambda request, ordinal: [HEAD.replace(b"event-stream", b"html") + OPEN]) as (clients, _):
            answer = clients.connect()

        assert {"not text/event-stream": 1} == answer["why"]

    def test_head_alone_is_not_open(self, kind: str):
        """
        Only the first block of the body shows that the server has subscribed the stream.
        """
        with playing(lambda request, ordinal: [HEAD]) as (clients, _):
            answer = clients.connect(seconds=0.2)

        assert (0, {"timeout": 1}) == (answer["open"], answer["why"])

    def test_reconnect(self, kind: str):
        """
        A stream comes back with its last id, and its count goes on where it was.
        """

        def script(request: bytes, ordinal: int) -> list[bytes | None]:
            # The second connection forgets event 4 and repeats event 3.
            numbers = [1, 2, 3] if ordinal == 0 else [3, 5, 6]
            return [HEAD + OPEN, *map(event, numbers)]

        with playing(script) as (clients, server):
            server.go.set()
            clients.connect()
            clients.wait(0, 3)
            clients.ask("close")
            clients.connect()
            clients.wait(0, 6)
            report = clients.report()

        assert b"last-event-id" not in server.requests[0].lower()
        assert b"\r\nLast-Event-ID: 3\r\n" in server.requests[1]
        assert (6, 1, 1, 0) == counts(report)

    def test_accept(self, kind: str):
        """
        A stream asks for an event stream.
        """
        with playing(lambda request, ordinal: [HEAD + OPEN]) as (clients, server):
            clients.connect()

        assert b"\r\nAccept: text/event-stream\r\n" in server.requests[0]

    def test_token(self, kind: str):
        """
        What a path has behind a '#' goes as a bearer token, and not as a part of the path.
        """
        with playing(lambda request, ordinal: [HEAD + OPEN]) as (clients, server):
            clients.add(1, "/events?topic=a#the.token", [0])
            clients.connect()

            known, unknown = sorted(server.requests, key=len, reverse=True)
            lines = known.split(b"\r\n")
            assert b"GET /events?topic=a HTTP/1.1" == lines[0]
            assert b"Authorization: Bearer the.token" in lines
            assert b"Authorization" not in unknown

    def test_churn(self, kind: str):
        """
        Every one of many connects is made and counted.
        """
        with playing(lambda request, ordinal: [HEAD + OPEN]) as (clients, server):
            answer = clients.ask_one("churn 30 4 0 /events 10000")
            until(lambda: len(server.requests) == 30)

        assert (30, 0) == (answer["done"], answer["failed"])


class TestVoid:
    def test_saturated_client(self, kind: str):
        """
        A server that sends more than the client can read voids the row.
        """
        block = b"".join(map(event, range(1, 2001)))
        script = lambda request, ordinal: [HEAD + OPEN, *[block] * 100_000]  # noqa: E731
        with playing(script, streams=2) as (clients, server):
            clients.connect()
            server.go.set()
            # On a machine that is busy with something else, the client gets its
            # share of a core at some time.
            for _ in range(20):
                clients.ask("mark")
                time.sleep(0.5)
                report = clients.report()
                reason = report.void_reason()
                if reason is not None:
                    break

        assert reason is not None, (report.cpu_share, report.busy_share)
        assert "busy" in reason or "lag" in reason

    def test_resting_client(self, kind: str):
        """
        A client with time to spare voids nothing.
        """
        with playing(lambda request, ordinal: [HEAD + OPEN]) as (clients, _):
            clients.connect()
            reasons = []
            # A machine that is busy with something else voids it rightly, but not for ever.
            while None not in reasons and len(reasons) < 50:
                clients.ask("mark")
                time.sleep(0.2)
                reasons.append(clients.report().void_reason())

            assert reasons[-1] is None

    def test_busy_share(self):
        """
        A client that other work keeps from its core is saturated at little CPU.
        """
        report = Report(cpu_share=0.3, busy_share=SATURATED + 0.01)

        assert report.void_reason() is not None

    @pytest.mark.parametrize(("first", "last", "void"), [(100, 50_000, True), (30_000, 50_000, False)])
    def test_lag(self, first: int, last: int, void: bool):
        """
        Lag that grows voids; lag that was there from the start does not.
        """
        report = Report(lag_first_us=first, lag_last_us=last)

        assert void == (report.void_reason() is not None)


class TestFigures:
    limit = Limit("single", "text", 1.3, 1.05, ("single", "app"), ("single", "floor"))

    def samples(self, app: list[Sample], floor: list[Sample]) -> dict[str, dict[str, list[Sample]]]:
        """
        Return the samples of a row.
        """
        return {"single": {"app": app, "floor": floor}}

    def test_ratio_is_of_one_round(self):
        """
        A machine that was slow in one round for both does not move the ratio.
        """
        app = [Sample(10, 0), Sample(30, 1), Sample(11, 2)]
        floor = [Sample(10, 0), Sample(30, 1), Sample(10, 2)]
        figure = ratio(app, floor)

        assert (1.0, 1.0, 1.1) == (figure.median, figure.low, figure.high)

    def test_void_samples_do_not_count(self):
        """
        The median is of rounds whose client could vouch for them.
        """
        figure = make_figure([Sample(10, 0), Sample(99, 1, void="busy"), Sample(12, 2)])

        assert (11, 2, True) == (figure.median, figure.count, figure.counts)

    def test_mostly_void(self):
        """
        A row with half of its rounds void is void.
        """
        app = [Sample(10, 0), Sample(10, 1, void="busy")]
        found = check(self.limit, self.samples(app, [Sample(10, 0), Sample(10, 1)]))

        assert Verdict.VOID == found.verdict

    @pytest.mark.parametrize(("value", "verdict"), [(10.4, Verdict.AIM), (12.9, Verdict.OK), (13.2, Verdict.BROKEN)])
    def test_limit(self, value: float, verdict: Verdict):
        """
        The aim, the limit, and what is beyond it.
        """
        assert verdict == check(self.limit, self.samples([Sample(value)], [Sample(10)])).verdict

    def test_throughput_is_bounded_from_below(self):
        """
        More deliveries are better.
        """
        limit = Limit("burst", "text", 500, 1000, ("burst", "app"), at_least=True)
        verdicts = [check(limit, {"burst": {"app": [Sample(v)]}}).verdict for v in (1000, 600, 400)]

        assert [Verdict.AIM, Verdict.OK, Verdict.BROKEN] == verdicts

    def test_lost_event_breaks_the_limit(self):
        """
        A fast server that loses an event has not passed.
        """
        app = [Sample(1, faults=["1 events missing"])]

        assert Verdict.BROKEN == check(self.limit, self.samples(app, [Sample(10)])).verdict

    def test_a_fifth_of_the_streams(self):
        """
        A limit that needs all streams is not held against a quick run.
        """
        limit = replace(self.limit, full_only=True)
        samples = self.samples([Sample(2.0, 0)], [Sample(1.0, 0)])

        assert Verdict.BROKEN == check(limit, samples).verdict
        assert Verdict.UNCHECKED == check(limit, samples, full=False).verdict

    def test_absent_peer(self):
        """
        A ratio to a peer that was not measured is not checked, and says so.
        """
        found = check(self.limit, {"single": {"app": [Sample(1)]}})

        assert (Verdict.UNCHECKED, "floor was not measured") == (found.verdict, found.reason)

    def test_peer_that_failed(self):
        """
        A peer that is here and yet has no figure fails the run: no limit is passed by crashing.
        """
        found = check(self.limit, {"single": {"floor": [Sample(1)]}}, present={"app", "floor"})

        assert Verdict.VOID == found.verdict

    def test_every_limit_has_a_row(self):
        """
        What a failed run names is what --only takes.
        """
        assert {limit.row for limit in LIMITS} <= ROWS


class TestHistogram:
    def test_percentiles(self):
        """
        A percentile is within 3 % of the truth.
        """
        histogram = Histogram()
        for value in range(1, 10_001):
            histogram.record(value)

        for percent in (1, 50, 99, 100):
            assert percent * 100 == pytest.approx(histogram.percentile(percent), rel=0.03)

    def test_buckets(self):
        """
        The middle of a bucket is in the bucket, from microseconds to hours.
        """
        for value in (0, 1, 63, 64, 65, 127, 128, 1000, 123_456, 10**9, 10**10):
            bucket = bucket_of(value)
            assert bucket == bucket_of(int(middle_of(bucket)))

    @needs_compiler
    def test_c_and_python_agree(self, monkeypatch: pytest.MonkeyPatch):
        """
        The C client counts a time in the bucket in which it is read.
        """
        monkeypatch.setenv("BENCH_FALLBACK", "")
        ago = 60_000_000_000  # long beside the time that the test itself takes
        old = make_data(0, 1)
        stamp = old.split("t=")[1].split()[0]
        late = f"data: {old}\n\n".replace(stamp, str(int(stamp) - ago)).encode()
        report = play(late, last=1)

        assert 60_000_000 == pytest.approx(report.latency.percentile(50), rel=0.05)


class TestFloor:
    @needs_compiler
    def test_delivers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """
        The floor gives every stream every event, single and in bursts.
        """
        monkeypatch.setenv("BENCH_FALLBACK", "")
        running = Floor().start(tmp_path, processes=2)
        clients = Clients(running.addresses)
        try:
            clients.add(20, running.path, [0])
            assert 20 == clients.connect()["open"]
            running.publish([make_data(0, 1)])
            running.publish([make_data(0, number) for number in range(2, 12)])

            assert 0 == clients.wait(0, 11)
            assert (220, 0, 0, 0) == counts(clients.report())
        finally:
            clients.end()
            running.end()


# A whole run, as each tells it.
RECIPE = [b'data: {"text": "%b"}\n\n' % token.encode() for token in TOKENS]
KIT = [b"event: stream.open\ndata: {}\n\n", *(b"event: run.token\n%b" % event for event in RECIPE)]
UPSTREAM = [b'data: {"choices": [{"delta": {"content": "%b"}}]}\n\n' % token.encode() for token in TOKENS]
DONE = b"data: [DONE]\n\n"
RUN_DONE = b'event: run.done\ndata: {"tokens": 10}\n\n'


class TestFirstToken:
    """
    The text is compared, and the time is that of the first token, not of the head or the end.
    """

    def asked(self, *pieces: bytes, head: bytes = HEAD, late: float = 0.0):
        """
        Ask a server that writes *pieces* after its head, *late* seconds later.
        """
        server = ScriptedServer(lambda request, ordinal: [head, *pieces, None])
        timer = threading.Timer(late, server.go.set)
        timer.start()
        try:
            return ask(("127.0.0.1", server.port), "/runs", {}, 1)
        finally:
            timer.join()
            server.close()

    def test_time(self):
        """
        Of the first token, which comes 0.3 s after the head.
        """
        first = self.asked(b"".join(RECIPE) + DONE, late=0.3)

        assert 290 <= first.median < 5_000  # of two clocks
        assert [] == first.faults

    @pytest.mark.parametrize(
        ("pieces", "right"),
        [
            ([*RECIPE, DONE], True),
            ([*KIT, RUN_DONE], True),
            ([*UPSTREAM, DONE], True),
            (RECIPE, False),
            ([*RECIPE[:4], *RECIPE[5:], DONE], False),
            ([*RECIPE, RECIPE[-1], DONE], False),
            ([*KIT[:3], b'event: run.failed\ndata: {"reason": "internal"}\n\n'], False),
        ],
        ids=["recipe", "kit", "upstream", "cut off", "lost", "doubled", "failed"],
    )
    def test_text(self, pieces: list[bytes], right: bool):
        """
        A time counts when the text is the upstream's, to its end.
        """
        asked = self.asked(b"".join(pieces))

        assert (int(right), int(not right)) == (len(asked.times), len(asked.faults))

    def test_chunks_that_were_cut(self):
        """
        An answer whose last chunk never came is not whole.
        """
        body = b"".join(RECIPE) + DONE
        chunk = b"%x\r\n%b\r\n" % (len(body), body)

        assert [1, 0] == [len(self.asked(chunk + end, head=CHUNKED_HEAD).times) for end in (b"0\r\n\r\n", b"")]

    def test_run(self, tmp_path: Path):
        """
        The kit and the recipe hand the same tokens on, and the upstream's own time is beside them.
        """
        command = [sys.executable, "-m", "loadtest.bench", "--quick", "--only", "first_token", "--rounds", "1"]
        command += ["--peers", "app-memory,quart", "--output", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

        assert 0 == done.returncode, done.stderr
        rows = json.loads((tmp_path / "results.json").read_text())["rows"]
        assert {"upstream", "app-memory", "quart"} == rows["first_token"].keys()
        assert all(row["median"] > 0 and not row["faults"] for row in rows["first_token"].values())
        added = rows["first_token"]["quart"]["median"] - rows["first_token"]["upstream"]["median"]
        assert added == pytest.approx(rows["first_token_added"]["quart"]["median"], abs=0.01)


class TestReport:
    def report(self) -> RunReport:
        """
        Return the report of a small run.
        """
        results = Results()
        for number in range(3):
            results.add("pss", "app", Sample(9.0, number))
        for number in range(3):
            results.add("sparse", "floor", Sample(8.0, number))
            results.add("sparse", "app", Sample(8.8, number))
            results.add("sparse", "quart", Sample(30.0, number, void="the client was busy"))
        peers = [PEERS["floor"], PEERS["app"], PEERS["quart"]]
        versions = {peer.name: "1.0" for peer in peers}
        return RunReport(results, QUICK, peers, versions, {"nchan": "no"}, describe_machine(), "C", {"sparse", "single", "pss"}, 60)

    def test_table(self):
        """
        Void figures are called void, absent peers are named, ratios are shown.
        """
        text = self.report().as_text()

        assert "1.10 (1.10 to 1.10)" in text
        assert re.search(r"\(`quart`\) +\| +void", text)
        assert "nchan: skipped. no" in text

    def test_json(self):
        """
        All samples are kept, and the value and verdict of every limit.
        """
        written = json.loads(json.dumps(self.report().as_json()))

        assert [8.8] * 3 == written["rows"]["sparse"]["app"]["samples"]
        verdicts = {c["figure"].split(",")[0]: c["verdict"] for c in written["checks"]}
        assert Verdict.BROKEN == verdicts["PSS per idle stream"]
        assert Verdict.UNCHECKED == verdicts["CPU per delivery"]

    def test_chart(self):
        """
        The chart is well-formed, and has a bar for each figure that counts.
        """
        tree = ElementTree.fromstring(draw(self.report()))
        bars = tree.findall("{http://www.w3.org/2000/svg}rect")

        assert ["floor", "kit", "kit"] == [bar.get("class") for bar in bars]

    @needs_compiler
    def test_run(self, tmp_path: Path):
        """
        The command runs, writes its three files and succeeds.
        """
        command = [sys.executable, "-m", "loadtest.bench", "--quick", "--only", "sparse", "--rounds", "1"]
        command += ["--peers", "floor", "--output", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

        assert 0 == done.returncode, done.stderr
        assert {"results.json", "table.md", "chart.svg"} == {path.name for path in tmp_path.iterdir()}

    def test_unknown_row(self):
        """
        A row that does not exist is refused with those that do.
        """
        command = [sys.executable, "-m", "loadtest.bench", "--only", "speed"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

        assert 2 == done.returncode
        assert "got 'speed'. Known: burst, churn" in done.stderr


class TestProcesses:
    def test_data_has_its_size(self):
        """
        Data is as long as it should be, whatever the numbers in it.
        """
        assert [DATA_SIZE] * 3 == [len(make_data(key, n)) for key, n in ((0, 1), (999, 5), (1, 10**9))]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_nothing_outlives_the_run(self, tmp_path: Path, number: signal.Signals):
        """
        Servers end with the benchmark however it ends, and so do their children.
        """
        script = tmp_path / "run.py"
        script.write_text(
            "import sys, time\n"
            "from pathlib import Path\n"
            "from loadtest.bench.process import Server\n"
            "server = Server('sh', ['sh', '-c', 'sleep 300 & echo $!; wait'], log=Path(sys.argv[1]))\n"
            "server.wait_until(lambda: Path(sys.argv[1]).read_text().strip())\n"
            "print(server.pid, flush=True)\n"
            "time.sleep(300)\n"
        )
        log = tmp_path / "log"
        run = subprocess.Popen(
            [sys.executable, str(script), str(log)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert run.stdout is not None
        pids = [int(run.stdout.readline()), int(log.read_text())]
        run.send_signal(number)
        run.wait(60)
        run.stdout.close()

        until(lambda: not any(map(alive, pids)))

    @needs_compiler
    def test_compiled_once(self):
        """
        The same file is not compiled twice.
        """
        assert build("client") == build("client")


def alive(pid: int) -> bool:
    """
    Say whether a process runs; a zombie does not.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """
    Wait until *condition* holds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
