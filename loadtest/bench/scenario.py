"""
What is done to the servers, and what is read off them.

Each function runs one scenario over all peers and returns samples by row and peer.
Rounds go over the peers in turn (A B C, B C A, ...), so that a machine's noise and
the place in the round hit all of them alike.
"""

import contextlib
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from .client import Clients, Report
from .first_token import DIRECT, Upstream, ask
from .histogram import Histogram
from .peers import Peer, Running
from .process import StartError
from .publisher import PublishError, make_data

KEY = 0
# The client rests this long between turns. Without it it would be woken by every
# single send, at the server's expense, and spin behind it on its own core.
NAP_US = 200
# Linux acknowledges the first segments after a pause one by one (TCP_MAX_QUICKACKS),
# later ones when 40 ms have passed; a pause is what is longer than its shortest RTO.
# On the loopback such an acknowledgement is the sender's CPU time: 0.9 µs of 5,
# which no network costs anybody.
_QUICK_ACKS = 16
_QUICK_ACK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Size:
    """
    How much is done: the full run, or a fifth of it.
    """

    name: str
    rounds: int
    single_streams: int
    single_events: int
    single_rate: float
    sparse_events: int
    sparse_rate: float
    burst_streams: int
    burst_seconds: float
    hold_seconds: float
    connect_streams: int
    connect_rounds: int
    idle_seconds: float
    heartbeat: int
    missed: int
    scale_streams: tuple[int, int]
    scale_events: int
    scale_rate: float
    churn: tuple[int, int]
    churn_rounds: int
    runs: int

    def with_rounds(self, rounds: int) -> "Size":
        """
        Return the same with another number of rounds everywhere.
        """
        return replace(self, rounds=rounds, connect_rounds=rounds, churn_rounds=rounds)


FULL = Size(
    name="full",
    rounds=7,
    single_streams=2000,
    single_events=32,
    single_rate=16.0,
    # As many as the slowest server takes and has a quarter of its core left.
    sparse_events=24,
    sparse_rate=8.0,
    burst_streams=1000,
    burst_seconds=2.0,
    hold_seconds=3.0,
    connect_streams=5000,
    connect_rounds=3,
    idle_seconds=5.0,
    heartbeat=5,
    missed=100,
    scale_streams=(1000, 10_000),
    scale_events=10,
    scale_rate=3.0,
    churn=(10_000, 100_000),
    churn_rounds=3,
    runs=40,
)
QUICK = Size(
    name="quick",
    rounds=3,
    single_streams=400,
    single_events=32,
    single_rate=40.0,
    sparse_events=8,
    sparse_rate=10.0,
    # A fifth of these would measure the publisher's round trips.
    burst_streams=1000,
    burst_seconds=0.7,
    hold_seconds=0.7,
    connect_streams=1000,
    connect_rounds=3,
    idle_seconds=1.0,
    heartbeat=1,
    missed=100,
    scale_streams=(200, 2000),
    scale_events=10,
    scale_rate=10.0,
    churn=(1000, 10_000),
    churn_rounds=3,
    runs=10,
)


@dataclass(slots=True)
class Sample:
    """
    One value of one round; *void* and *faults* say why it may not count.
    """

    value: float
    round: int = 0
    void: str | None = None
    faults: list[str] = field(default_factory=list)
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """
        Whether the value counts.
        """
        return self.void is None and not self.faults


class Results:
    """
    Samples by row and peer, and what went wrong by peer.
    """

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, list[Sample]]] = {}
        self.notes: list[str] = []

    def add(self, row: str, peer: str, sample: Sample) -> None:
        """
        Keep one sample.
        """
        self.samples.setdefault(row, {}).setdefault(peer, []).append(sample)

    def note(self, text: str) -> None:
        """
        Keep a remark for the report and show it now.
        """
        self.notes.append(text)
        progress(f"note: {text}")


_started = time.monotonic()


def progress(text: str) -> None:
    """
    Show one line about what happens, with the time since the start.
    """
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", file=sys.stderr, flush=True)


class Session:
    """
    One peer that runs, its load clients, and the sequence number of its topic.
    """

    def __init__(self, peer: Peer, running: Running) -> None:
        self.peer = peer
        self.running = running
        self.clients = Clients(running.addresses)
        self.clients.ask(f"nap {NAP_US}")
        # Tens of thousands of connections in a minute need more than one address.
        self.clients.ask("sources 8")
        self.sequence = 0

    def add_streams(self, count: int) -> None:
        """
        Add *count* streams, closed.
        """
        paths = self.running.paths or (self.running.path,)
        for number, path in enumerate(paths):
            share = count // len(paths) + (number < count % len(paths))
            if share:
                self.clients.add(share, path, [KEY])

    def open(self, wanted: int) -> dict:
        """
        Open all streams; raise StartError when not all stay open.
        """
        self.clients.ask(f"base {KEY} {self.sequence}")
        answer = self.clients.connect()
        first = answer
        for _ in range(5):
            if answer["open"] == wanted and not answer["failed"]:
                break
            # Pushpin refuses or cuts a few of many that come at once.
            time.sleep(0.2)
            answer = self.clients.connect(concurrency=16)
        if answer["open"] != wanted:
            raise StartError(f"{self.peer.name}: {answer['open']} of {wanted} streams opened, {first['why']}")
        return first

    def publish(self, count: int) -> None:
        """
        Publish one burst of *count* events.
        """
        burst = [make_data(KEY, self.sequence + 1 + i) for i in range(count)]
        self.sequence += count
        self.running.publish(burst)

    def wait(self, seconds: float = 30) -> int:
        """
        Wait until all streams have all events; return how many have not.
        """
        return self.clients.wait(KEY, self.sequence, seconds)

    def end(self) -> None:
        """
        End clients and server.
        """
        self.clients.end()
        self.running.end()


class Bench:
    """
    One run: the peers that are here, the size, the rows that are wanted, the results.
    """

    def __init__(self, peers: Sequence[Peer], size: Size, rows: set[str], folder: Path) -> None:
        self.peers = list(peers)
        self.size = size
        self.folder = folder
        self.rows = rows
        self.results = Results()

    def run(self) -> Results:
        """
        Run the scenarios that make the wanted rows.
        """
        for scenario, made in SCENARIOS:
            if made & self.rows:
                scenario(self)
        return self.results

    @contextlib.contextmanager
    def sessions(self, peers: Sequence[Peer], *, processes: int = 1, **options: Any) -> Iterator[list[Session]]:
        """
        Start all of *peers*, with `heartbeat` or `upstream`; one that does not come up is left out, with a note.
        """
        sessions: list[Session] = []
        try:
            for peer in peers:
                session = self.start(peer, processes=processes, **options)
                if session is not None:
                    sessions.append(session)
            yield sessions
        finally:
            for session in sessions:
                session.end()

    def start(self, peer: Peer, *, processes: int = 1, **options: Any) -> Session | None:
        """
        Start one peer in a folder of its own.
        """
        folder = Path(tempfile.mkdtemp(prefix=f"{peer.name}-", dir=self.folder))
        try:
            return Session(peer, peer.start(folder, processes=processes, **options))
        except StartError as error:
            self.results.note(str(error))
            return None

    def open_all(self, sessions: list[Session], count: int, total: int) -> None:
        """
        Add *count* streams to each session and open them; leave out peers that fail.
        """
        for session in list(sessions):
            session.add_streams(count)
            try:
                session.open(total)
            except StartError as error:
                self.results.note(str(error))
                sessions.remove(session)
                session.end()
        # What a server cuts just after it opened is opened again, then counting starts.
        time.sleep(0.5)
        for session in sessions:
            report = session.clients.report()
            if report.lost:
                self.results.note(
                    f"{session.peer.name} cut {report.lost} of {total} streams while they opened;"
                    " they were opened again"
                )
                session.open(total)
            session.clients.ask("clear")


def rotations[T](servers: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """
    Yield (round, server), starting each round one place further.
    """
    for number in range(rounds):
        shift = number % max(1, len(servers))
        for server in [*servers[shift:], *servers[:shift]]:
            yield number, server


def judge(session: Session, report: Report, behind: int) -> tuple[str | None, list[str]]:
    """
    Return why the sample is void, and what the streams did not get.
    """
    faults = report.faults()
    if behind:
        faults.append(f"{behind} streams never got the last event")
    if report.open < report.streams:
        faults.append(f"{report.streams - report.open} streams not open")
    if faults:
        # Later slices count only their own faults.
        session.clients.ask("clear")
    return report.void_reason(), faults


def paced(session: Session, events: int, rate: float) -> None:
    """
    Publish single events at *rate* a second.
    """
    due = time.monotonic()
    for _ in range(events):
        time.sleep(max(0.0, due - time.monotonic()))
        session.publish(1)
        due += 1 / rate


def measure_single(session: Session, events: int, rate: float) -> tuple[Sample, Report]:
    """
    Return CPU µs per delivery of single events, and the report behind it.
    """
    # The first events find cold caches, and after other peers' turns all are cold.
    # And at less than _QUICK_ACK_SECONDS between two events, acknowledgements change
    # behind the first _QUICK_ACKS of them.
    paced(session, 2 + _QUICK_ACKS if 1 / rate < _QUICK_ACK_SECONDS else 2, 4 * rate)
    session.wait()
    session.clients.ask("mark")
    before = session.running.cpu_by_program()
    paced(session, events, rate)
    behind = session.wait()
    after = session.running.cpu_by_program()
    report = session.clients.report()
    void, faults = judge(session, report, behind)
    spent = {name: (after[name] - before[name]) / max(1, report.events) * 1e6 for name in after}
    extra = {"client_share": max(report.cpu_share, report.busy_share), "deliveries": report.events}
    if len(spent) > 1:
        extra |= {f"{name}_us": value for name, value in spent.items()}
    return Sample(sum(spent.values()), 0, void, faults, extra), report


def fan_out(bench: Bench) -> None:
    """
    Single events, bursts, latency, and the longest hold, all peers up at once.
    """
    size = bench.size
    peers = [peer for peer in bench.peers if peer.fans_out]
    progress(f"fan-out: starting {len(peers)} servers")
    with bench.sessions(peers) as sessions:
        # The lesser number of streams first: they stay open for the other.
        steps = [(size.burst_streams, fan_out_bursts), (size.single_streams, fan_out_singles)]
        opened = 0
        if not bench.rows & {"single", "sparse", "latency", "hold"}:
            del steps[1]
        if "burst" not in bench.rows:
            del steps[0]
        for count, measure in sorted(steps, key=lambda step: step[0]):
            bench.open_all(sessions, count - opened, count)
            opened = count
            measure(bench, sessions)


def fan_out_bursts(bench: Bench, sessions: list[Session]) -> None:
    """
    Bursts, as fast as each server takes them.
    """
    size, results = bench.size, bench.results
    for number, session in rotations(sessions, size.rounds):
        sample = guarded(bench, session, lambda s=session: measure_burst(s, size.burst_seconds))
        if sample is None:
            continue
        sample.round = number
        results.add("burst", session.peer.name, sample)
        cost = Sample(sample.extra["cpu_us"], number, sample.void, sample.faults)
        results.add("burst_cpu", session.peer.name, cost)
        progress(
            f"burst {number + 1}/{size.rounds} {session.peer.name}: {sample.value:,.0f} deliveries/s{_doubt(sample)}"
        )


def fan_out_singles(bench: Bench, sessions: list[Session]) -> None:
    """
    Single events at a low rate for all: CPU, latency, the longest hold.

    Then at a higher one, for those whom that leaves some of their core: what a
    server does however few events there are weighs less there.
    """
    size, results = bench.size, bench.results
    for number, session in rotations(sessions, size.rounds):
        measured = guarded(bench, session, lambda s=session: measure_single(s, size.sparse_events, size.sparse_rate))
        if measured is None:
            continue
        sample, report = measured
        sample.round = number
        name = session.peer.name
        results.add("sparse", name, sample)
        for percent in (50, 99):
            late = report.latency.percentile(percent) / 1000
            results.add(f"latency_p{percent}", name, Sample(late, number, sample.void, sample.faults))
        progress(f"sparse {number + 1}/{size.rounds} {name}: {sample.value:.2f} µs a delivery{_doubt(sample)}")
    able = [session for session in sessions if "single" in bench.rows and _keeps_up(bench, session)]
    for number, session in rotations(able, size.rounds):
        measured = guarded(bench, session, lambda s=session: measure_single(s, size.single_events, size.single_rate))
        if measured is None:
            continue
        sample, _ = measured
        sample.round = number
        name = session.peer.name
        results.add("single", name, sample)
        progress(f"single {number + 1}/{size.rounds} {name}: {sample.value:.2f} µs a delivery{_doubt(sample)}")
    if "hold" in bench.rows:
        for session in sessions:
            measure_hold(bench, session)


def _keeps_up(bench: Bench, session: Session) -> bool:
    """
    Tell whether the higher rate would leave the server a third of a core, as far as the lower one tells.
    """
    size = bench.size
    costs = [sample.value for sample in bench.results.samples.get("sparse", {}).get(session.peer.name, [])]
    share = median(costs) / 1e6 * size.single_streams * size.single_rate if costs else 1.0
    if share > 2 / 3:
        bench.results.note(
            f"{session.peer.name}: not asked for {size.single_rate:g} events a second, which would take {share:.1f} cores"
        )
        return False
    return True


def _doubt(sample: Sample) -> str:
    reasons = [*sample.faults, *([sample.void] if sample.void else [])]
    return f" ({'; '.join(reasons)})" if reasons else ""


def guarded[T](bench: Bench, session: Session, measure: Callable[[], T]) -> T | None:
    """
    Return what *measure* returns; None, with a note, when the server refused to go on.
    """
    try:
        return measure()
    except (PublishError, OSError) as error:
        bench.results.note(f"{session.peer.name}: {error}")
        return None


def measure_burst(session: Session, seconds: float) -> Sample:
    """
    Return deliveries per second of bursts of 10, at most two of them on their way.
    """
    session.publish(10)
    session.wait()
    session.clients.ask("mark")
    before = session.running.cpu()
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        session.publish(10)
        # One burst may be on its way while the next is published: the server
        # is never idle, and can't join more than two.
        session.clients.wait(KEY, session.sequence - 10)
    behind = session.wait()
    took = time.monotonic() - began
    spent = session.running.cpu() - before
    report = session.clients.report()
    void, faults = judge(session, report, behind)
    extra = {
        "cpu_us": spent / max(1, report.events) * 1e6,
        "events_per_read": report.events / max(1, report.reads),
        "client_share": max(report.cpu_share, report.busy_share),
        "server_share": spent / took,
    }
    return Sample(report.events / took, 0, void, faults, extra)


def measure_hold(bench: Bench, session: Session) -> None:
    """
    Ask for another answer all the time while events fan out; keep the longest wait.
    """
    size = bench.size
    prober = Clients([session.running.addresses[0]])
    try:
        milliseconds = int(size.hold_seconds * 1000)
        prober.send_one(f"probe 0 /healthz 5 {milliseconds}")
        paced(session, int(size.hold_seconds * size.sparse_rate) - 1, size.sparse_rate)
        answer = prober.read_one(size.hold_seconds + 30)
    except (PublishError, OSError) as error:
        bench.results.note(f"{session.peer.name}: {error}")
        return
    finally:
        prober.end()
    session.wait()
    times = Histogram()
    times.add(answer["times"])
    extra = {"p50": times.percentile(50) / 1000, "p99": times.percentile(99) / 1000, "probes": times.count}
    held = [own_hold(port) for port in session.running.metrics_ports]
    if any(held):
        extra["own_longest_since_start"] = max(held) * 1000
    sample = Sample(times.max / 1000, 0, None, [], extra)
    if answer["bad"]:
        sample.faults.append(f"{answer['bad']} probes failed")
    bench.results.add("hold", session.peer.name, sample)
    progress(f"hold {session.peer.name}: {sample.value:.1f} ms{_doubt(sample)}")


def own_hold(port: int) -> float:
    """
    Return the longest hold (s) that the application itself noticed, 0 when it tells none.
    """
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return 0.0
    found = re.search(r"(?m)^sse_loop_longest_hold_seconds (\S+)$", text)
    return float(found[1]) if found else 0.0


def connections(bench: Bench) -> None:
    """
    Connect cost, memory and idle cost of many streams, and their return.
    """
    size, results = bench.size, bench.results
    for number in range(size.connect_rounds):
        shift = number % max(1, len(bench.peers))
        for peer in [*bench.peers[shift:], *bench.peers[:shift]]:
            progress(f"connect {number + 1}/{size.connect_rounds} {peer.name}")
            with bench.sessions([peer], heartbeat=size.heartbeat) as sessions:
                for session in sessions:
                    try:
                        _connections_of(bench, session, number)
                    except (StartError, PublishError, OSError) as error:
                        results.note(f"{peer.name}: {error}")


def _connections_of(bench: Bench, session: Session, number: int) -> None:
    size, results, name = bench.size, bench.results, session.peer.name
    running, clients = session.running, session.clients
    # Some streams load what every server loads once. Few at a time: what many at
    # once leave free would hold the streams that count.
    clients.ask_one(f"churn 20 2 0 {(running.paths or (running.path,))[0]} 20000", 30)
    settle(running)

    half, count = size.connect_streams // 2, size.connect_streams
    before = running.cpu()
    clients.ask("mark")
    session.add_streams(half)
    session.open(half)
    settle(running)
    # The first half fills the memory that the server's start left free, so the
    # second half shows what a stream takes.
    memory = running.pss()
    session.add_streams(count - half)
    opened = session.open(count)
    settle(running)
    spent = running.cpu() - before
    report = clients.report()
    extra = {
        "p50_ms": report.connects.percentile(50) / 1000,
        "p99_ms": report.connects.percentile(99) / 1000,
        "per_second": (count - half) / opened["seconds"],
    }
    faults = [f"{opened['failed']} connects failed"] if opened["failed"] else []
    sample = Sample(spent / count * 1e6, number, report.void_reason(), [], extra)
    results.add("connect", name, sample)
    if faults:
        results.note(f"{name}: {faults[0]} at first ({opened['why']}), and were repeated")

    memory = running.pss() - memory
    results.add("pss", name, Sample(memory / (count - half) / 1024, number))

    if session.peer.heartbeats:
        before, began = running.cpu(), time.monotonic()
        time.sleep(size.idle_seconds)
        took = time.monotonic() - began
        results.add("idle", name, Sample((running.cpu() - before) / took * 1000, number))

    if session.peer.resumes:
        _reconnect(bench, session, number)


def _reconnect(bench: Bench, session: Session, number: int) -> None:
    size, running, clients = bench.size, session.running, session.clients
    session.publish(1)
    if behind := session.wait():
        bench.results.note(f"{session.peer.name}: {behind} streams did not get the event before the reconnect")
    clients.ask("clear")
    clients.ask("close")
    settle(running)
    for _ in range(size.missed // 10):
        session.publish(10)
    settle(running)
    clients.ask("mark")
    before = running.cpu()
    opened = session.open(size.connect_streams)
    behind = session.wait()
    settle(running)
    spent = running.cpu() - before
    report = clients.report()
    void, faults = judge(session, report, behind)
    if opened["failed"]:
        faults.append(f"{opened['failed']} connects failed")
    wanted = size.missed * size.connect_streams
    if report.events != wanted:
        faults.append(f"{report.events} events read, {wanted} were due")
    extra = {"seconds": opened["seconds"], "us_per_event": spent / wanted * 1e6}
    sample = Sample(spent / size.connect_streams * 1e6, number, void, faults, extra)
    bench.results.add("reconnect", session.peer.name, sample)
    progress(f"reconnect {session.peer.name}: {sample.value:.0f} µs a stream{_doubt(sample)}")


def settle(running: Running, *, quiet: float = 0.25, limit: float = 10.0) -> None:
    """
    Wait until the server has nothing left to do but heartbeats: under a quarter of a core.
    """
    deadline = time.monotonic() + limit
    calm = 0
    while calm < 3 and time.monotonic() < deadline:
        before = running.cpu()
        time.sleep(0.04)
        calm = calm + 1 if running.cpu() - before < quiet * 0.04 else 0


def growth(bench: Bench) -> None:
    """
    CPU per delivery with ten times the streams, on two processes.
    """
    size, results = bench.size, bench.results
    peers = [peer for peer in bench.peers if peer.scales and peer.name in ("app", "floor")]
    progress(f"growth: {size.scale_streams[0]:,} and {size.scale_streams[1]:,} streams on two processes")
    with contextlib.ExitStack() as stack:
        rows: list[Session] = []
        counts: dict[int, int] = {}
        for count in size.scale_streams:
            sessions = stack.enter_context(bench.sessions(peers, processes=2))
            bench.open_all(sessions, count, count)
            for session in sessions:
                counts[id(session)] = count
            rows.extend(sessions)
        for number, session in rotations(rows, size.rounds):
            measured = guarded(bench, session, lambda s=session: measure_single(s, size.scale_events, size.scale_rate))
            if measured is None:
                continue
            sample, _ = measured
            sample.round = number
            which = "few" if counts[id(session)] == size.scale_streams[0] else "many"
            results.add(f"scale_{which}", session.peer.name, sample)
            progress(
                f"growth {number + 1}/{size.rounds} {session.peer.name} at {counts[id(session)]:,}:"
                f" {sample.value:.2f} µs a delivery{_doubt(sample)}"
            )


def churn(bench: Bench) -> None:
    """
    Memory after many connects and disconnects.
    """
    size, results = bench.size, bench.results
    first, last = size.churn
    for number in range(size.churn_rounds):
        for peer in bench.peers:
            if peer.name != "app":
                continue
            with bench.sessions([peer]) as sessions:
                for session in sessions:
                    running = session.running
                    done = 0
                    for row, goal in (("churn_first", first), ("churn_last", last)):
                        while done < goal:
                            # In parts, so that a long run shows that it is alive.
                            part = min(10_000, goal - done)
                            command = f"churn {part} 64 0 {running.path} 300000"
                            answer = session.clients.ask_one(command, 330)
                            if answer["failed"]:
                                results.note(f"{peer.name}: {answer['failed']} connects failed: {answer['why']}")
                            done += part
                            progress(
                                f"churn {number + 1}/{size.churn_rounds} {peer.name}: {done:,} of {last:,},"
                                f" {part / answer['seconds']:,.0f} a second"
                            )
                        settle(running)
                        time.sleep(2.0)
                        extra = {program.name: program.pss() / 2**20 for program in running.programs}
                        results.add(row, peer.name, Sample(running.pss() / 2**20, number, extra=extra))


def first_tokens(bench: Bench) -> None:
    """
    Time to a run's first token: from the upstream itself, and through each server that makes runs.
    """
    size, results = bench.size, bench.results
    peers = [peer for peer in bench.peers if peer.run_request]
    if not peers:
        return
    upstream = Upstream(bench.folder)
    try:
        with bench.sessions(peers, upstream=upstream.url) as sessions:
            servers = [("upstream", upstream.address, *DIRECT)]
            for session in sessions:
                assert session.peer.run_request
                servers.append((session.peer.name, session.running.addresses[0], *session.peer.run_request))
            for number, (name, address, path, body) in rotations(servers, size.rounds):
                # The first ones find cold caches, and no connection to the upstream.
                ask(address, path, body, 3)
                asked = ask(address, path, body, size.runs, upstream)
                extra = {"p99": asked.p99}
                sample = Sample(asked.median, number, asked.void, sorted(set(asked.faults)), extra)
                results.add("first_token", name, sample)
                progress(f"first token {number + 1}/{size.rounds} {name}: {sample.value:.2f} ms{_doubt(sample)}")
    finally:
        upstream.end()
    own = {sample.round: sample for sample in results.samples["first_token"]["upstream"]}
    for name, samples in results.samples["first_token"].items():
        for sample in samples if name != "upstream" else ():
            alone = own[sample.round]
            void, faults = sample.void or alone.void, [*sample.faults, *alone.faults]
            added = Sample(sample.value - alone.value, sample.round, void, faults)
            results.add("first_token_added", name, added)


SCENARIOS: tuple[tuple[Callable[[Bench], None], frozenset[str]], ...] = (
    (fan_out, frozenset({"single", "sparse", "burst", "latency", "hold"})),
    (connections, frozenset({"connect", "pss", "idle", "reconnect"})),
    (growth, frozenset({"scale"})),
    (churn, frozenset({"churn"})),
    (first_tokens, frozenset({"first_token"})),
)
ROWS = frozenset().union(*(rows for _, rows in SCENARIOS))
