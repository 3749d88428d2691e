"""
The promises of the core under everything that can happen at once.

A seeded machine publishes, cuts off, pauses, kills, trims and loses on purpose,
turn by turn of the event loop, so also in the middle of a flush, of a replay or
of a reload. `tests.simulated` knows what every client must have read.

For more than the suite runs: ``python -m tests.test_simulation --seconds 300 --seed 7``.
"""

import argparse
import sys
import time
from collections import Counter
from typing import ClassVar

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.hub import Pace
from tests.simulated import Client, Process, World, fine_grained

STEPS = 10_000
PHASES = (Phase.generate, Phase.shrink)

SUBSCRIPTIONS = (
    ("a", "broadcast"),
    ("a", "b", "broadcast"),
    ("b", "deep/x", "broadcast"),
    ("*", "broadcast"),
    ("deep/*", "a", "broadcast"),
    ("user:*", "broadcast"),
    ("broadcast", "user:ann"),
    ("deep/*", "deep/x", "broadcast", "user:ann"),
    ("quiet", "broadcast"),
    ("a", "broadcast"),
)
TOPICS = st.sampled_from(
    [
        ("a",),
        ("b",),
        ("a", "b"),
        ("deep/x",),
        ("deep/y", "a"),
        ("user:ann",),
        ("user:ben", "b"),
        ("broadcast",),
        ("nobody",),
    ]
)
slots = st.integers(0, 1)
clients = st.integers(0, len(SUBSCRIPTIONS) - 1)
rooms = st.sampled_from([10, 150, 1_000, 100_000])


class Service(RuleBasedStateMachine):
    """Two processes on one log, ten clients, and all that can befall them."""

    steps = 0
    happened: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self._fine = fine_grained()
        self._fine.__enter__()

    @initialize(
        seed=st.integers(0, 1 << 32),
        calm=st.booleans(),
        cost=st.sampled_from([0.0, 0.002, 0.006]),
        max_events=st.sampled_from([1_000_000, 1_000_000, 30]),
        window_bytes=st.sampled_from([1 << 30, 1 << 30, 30_000]),
        read_count=st.sampled_from([1, 7, 100]),
        max_age=st.sampled_from([20.0, 1_000.0]),
        slow_consumer=st.sampled_from([2.0, 12.0]),
    )
    def begin(self, seed, calm, cost, max_events, window_bytes, read_count, max_age, slow_consumer):
        if calm:
            # Nothing cuts the history short, and no process is overloaded.
            max_events, window_bytes, cost = 1_000_000, 1 << 30, min(cost, 0.001)
        self.world = World(
            seed=seed,
            pace=Pace(heartbeat=1.0, history=8.0, slow_consumer=slow_consumer, max_age=max_age),
            max_events=max_events,
            window_bytes=window_bytes,
            read_count=read_count,
            cost=cost,
            calm=calm,
        )
        self.slots = [self.world.start(), self.world.start()]
        for topics in SUBSCRIPTIONS:
            self.world.client(*topics)
        self.world.run(0.1)
        for number, client in enumerate(self.world.clients):
            client.connect(self.slots[number % 2], turns=1, room=1_000)

    def teardown(self) -> None:
        world = getattr(self, "world", None)
        try:
            if world is not None and sys.exc_info()[0] is None:
                world.come_to_rest()
                for process in world.processes:
                    self.happened["gaps announced"] += process.reader.gaps
                self.happened.update(world.reasons)
                self.happened["resets read"] += sum(client.ledger.resets for client in world.clients)
                self.happened["events published"] += len(world.server.records)
                self.happened.update(world.happened)
        finally:
            if world is not None:
                if sys.exc_info()[0] is not None:
                    hypothesis.note("\n".join(world.trace))
                world.close()
            self._fine.__exit__(None, None, None)

    def process(self, slot: int) -> Process:
        return self.slots[slot]

    def client(self, number: int) -> Client:
        return self.world.clients[number]

    def note(self, what: str) -> None:
        Service.steps += 1
        Service.happened[what] += 1

    # --- time

    @rule(turns=st.integers(1, 6))
    def turn(self, turns):
        """Some turns of the loop: stops in the middle of flushes, loads and replays."""
        self.note("turn")
        for _ in range(turns):
            self.world.turn()

    @rule(seconds=st.sampled_from([0.003, 0.01, 0.05, 0.3, 1.1, 3.0]))
    def run(self, seconds):
        self.note("run")
        self.world.run(seconds)

    @rule(seconds=st.sampled_from([0.05, 0.7, 5.0, 12.0]))
    def hold(self, seconds):
        """Nothing has a turn: the processes are frozen, or something holds their loops."""
        if self.world.calm and seconds > 1:
            return
        self.note("hold")
        self.world.hold(seconds)

    # --- publishers

    @rule(
        topics=TOPICS,
        padding=st.sampled_from([0, 5, 40, 500, 3_000]),
        count=st.sampled_from([1, 1, 2, 5, 12]),
        bare=st.booleans(),
        broken=st.sampled_from([False, False, False, False, True]),
    )
    def publish(self, topics, padding, count, bare, broken):
        self.note("publish")
        self.world.server.publish(topics, padding, count, bare=bare, broken=broken)

    @rule(several=st.lists(TOPICS, min_size=2, max_size=12), turns=st.integers(0, 6))
    def publish_mixed(self, several, turns):
        """Many runs of topics in one batch of the reader, and a stop in the middle of its flush."""
        self.note("publish")
        for topics in several:
            self.world.server.publish(topics, 3, 1, bare=False, broken=False)
        for _ in range(turns):
            self.world.turn()

    # --- clients

    @rule(
        number=clients,
        slot=slots,
        turns=st.integers(0, 4),
        room=rooms,
        ask=st.sampled_from([None, None, None, "earliest", "", "garbage", "e1:7-0"]),
    )
    def connect(self, number, slot, turns, room, ask):
        """One client connects: where it was, or as somebody new."""
        client, process = self.client(number), self.process(slot)
        if not process.open_for_streams():
            return
        self.note("connect")
        client.give_up()
        if ask is not None:
            # It starts over: what it has read before does not count.
            client.last_id = "" if ask in ("", "earliest") else ask
        client.connect(process, turns=turns, room=room, ask=ask)

    @rule(slot=slots, room=rooms, turns=st.integers(0, 4))
    def all_connect(self, slot, room, turns):
        """A storm: everybody who is away comes at once."""
        process = self.process(slot)
        if not process.open_for_streams():
            return
        self.note("storm")
        for client in self.world.clients:
            if client.away:
                client.connect(process, turns=1, room=room)
        for _ in range(turns):
            self.world.turn()

    @rule(numbers=st.sets(clients, min_size=1), how=st.sampled_from(["closes", "vanishes", "is evicted"]))
    def leave(self, numbers, how):
        """Connections end, by the client or for a reason of the process."""
        self.note(how)
        for number in sorted(numbers):
            client = self.client(number)
            wire = client.wire
            if how == "closes":
                client.give_up()
            elif how == "vanishes":
                client.vanish()
            elif wire is not None and not wire.ended and wire.process.alive:
                hub = wire.process.hub
                hub.end(wire.stream, "evicted", hub.farewell())

    @rule(numbers=st.sets(clients, min_size=1), reading=st.booleans(), padding=st.sampled_from([0, 3_000]))
    def pause(self, numbers, reading, padding):
        """Clients stop or go on reading, perhaps with something in their way."""
        self.note("pause")
        for number in numbers:
            self.client(number).reading = reading
        if padding:
            self.world.server.publish(("broadcast",), padding, 2, bare=False, broken=False)

    @rule(number=clients, count=st.sampled_from([1, 20, 200, 2_000]))
    def read(self, number, count):
        client = self.client(number)
        if client.wire is not None:
            self.note("read")
            client.wire.deliver(count)

    # --- processes

    @rule(slot=slots, how=st.sampled_from(["restart", "drain", "drain slowly"]))
    def roll(self, slot, how):
        """SIGKILL or a drain; a new process that loads the log anew takes its place."""
        process = self.process(slot)
        self.note(how)
        if how == "restart":
            process.kill()
        elif process.kit.draining or not process.reader.loaded:
            return
        else:
            lead, seconds = (0.0, 0.1) if how == "drain" else (0.2, 3.0)
            self.world.task(process.drain(lead, seconds))
        self.slots[slot] = self.world.start()

    @rule(slot=slots, delay=st.sampled_from([0.0, 0.02, 0.05, 0.4, 1.5]))
    def lag(self, slot, delay):
        """Answers of the log take their time to this process."""
        if self.world.calm and delay > 0.1:
            return
        self.note("lag")
        self.process(slot).log.delay = delay
        self.world.late = 1.0

    @rule(slot=slots, how=st.sampled_from(["breaks", "away", "back"]))
    def connection(self, slot, how):
        """The reader's connection breaks, or the log is out of reach for longer."""
        log = self.process(slot).log
        if how == "breaks":
            self.note("connection breaks")
            log.break_off()
        elif not self.world.calm:
            self.note("log is " + how)
            log.away = how == "away"
            if log.away:
                log.break_off()

    # --- the log

    @precondition(lambda self: not self.world.calm)
    @rule(
        what=st.sampled_from(["FLUSHALL", "replaced", "failover", "failover", "clock jumps", "XDEL"]),
        lost=st.integers(0, 5),
        seconds=st.sampled_from([0, 0, -60, -1, 2, 5]),
        turns=st.integers(0, 3),
    )
    def log_fails(self, what, lost, seconds, turns):
        """What can befall a log: it is emptied or replaced, or its newest entries never came over."""
        self.note(what)
        server = self.world.server
        if what in ("FLUSHALL", "replaced"):
            server.flush()
        elif what == "failover":
            server.lose(lost, seconds * 1000)
        elif what == "clock jumps":
            server.offset_ms += seconds * 1000
        elif server.entries:
            server.delete(max(0, len(server.entries) - 1 - lost))
        if what in ("replaced", "failover"):
            for process in self.world.processes:
                process.log.break_off()
        for _ in range(turns):
            self.world.turn()

    # --- what must hold

    @rule(really=st.sampled_from([False, False, True]))
    def rest(self, really):
        """Everything is healed; then nobody lacks anything, or it was told."""
        if not really:
            return
        self.note("rest")
        self.world.come_to_rest()

    @invariant()
    def sound(self):
        if hasattr(self, "world"):
            self.world.check()


def run(examples: int, *, seed: int | None = None) -> None:
    machine = Service
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=100,
        deadline=None,
        database=None,
        derandomize=seed is None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )
    if seed is not None:
        machine = hypothesis.seed(seed)(type("Seeded", (Service,), {}))
    run_state_machine_as_test(machine, settings=settings)


class TestService:
    def test_ten_thousand_steps(self):
        """
        Whatever happens, a client misses nothing, reads nothing twice, or is told.
        """
        Service.steps = 0
        Service.happened.clear()

        run(110)

        assert Service.steps >= STEPS


@pytest.fixture
def world():
    with fine_grained():
        world = World()
        yield world
        world.check()
        world.close()


class TestHistory:
    """Be back within the history and you miss nothing; later, you are told."""

    @staticmethod
    def away(world: World, *, phase: float, away: float, elsewhere: bool) -> Client:
        """Let a client of a quiet topic leave a busy log at *phase*, and come back."""
        process = world.start()
        world.run(0.1)
        quiet = world.client("quiet")
        quiet.connect(process, turns=1, room=1_000)

        def busy(seconds: float) -> None:
            end = world.loop.now + seconds
            while world.loop.now < end:
                world.server.publish(("other",), 0, 1, bare=False, broken=False)
                world.run(min(0.05, end - world.loop.now))

        busy(10.0 + phase)
        quiet.give_up()
        busy(away)
        if elsewhere:
            process.kill()
            process = world.start()
            world.run(0.05)
        quiet.connect(process, turns=1, room=1_000)
        world.run(0.05)
        return quiet

    @pytest.mark.parametrize("elsewhere", [False, True])
    @pytest.mark.parametrize("phase", [0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8])
    def test_a_quiet_client_that_is_back_in_time(self, world, phase, elsewhere):
        """
        Its topic was silent for longer than the history, and it hears of no loss.
        """
        quiet = self.away(world, phase=phase, away=world.pace.history - 0.15, elsewhere=elsewhere)

        assert 0 == quiet.ledger.resets
        assert quiet.wire is not None

    @pytest.mark.parametrize("elsewhere", [False, True])
    def test_a_client_that_is_back_too_late(self, world, elsewhere):
        """
        It is told, and not left to believe that nothing happened.
        """
        quiet = self.away(world, phase=0.0, away=world.pace.retention + 2.0, elsewhere=elsewhere)

        assert 1 == quiet.ledger.resets
        assert "history_lost" in quiet.ledger.reasons[0]


def soak(seconds: float, seed: int) -> None:
    """Run the machine with one seed after the other, for *seconds*."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        Service.happened.clear()
        before = Service.steps
        run(50, seed=seed)
        print(f"seed {seed}: {Service.steps - before} steps, {time.monotonic() - began:.0f} s", flush=True)
        seed += 1
    print(f"{Service.steps} steps in {time.monotonic() - began:.0f} s; of the last seed: {dict(Service.happened)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.test_simulation", description=soak.__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    soak(options.seconds, options.seed)
