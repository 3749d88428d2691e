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
    rule,
    run_state_machine_as_test,
)

from app.hub import Pace
from tests.simulated import Client, Process, World, fine_grained

STEPS = 10_000

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
# What a run must have seen, or it proves less than it says.
HAPPENS = (
    *("client_gone", "slow_consumer", "max_age", "draining", "evicted"),
    *("reset epoch_changed", "reset history_lost", "reset log_replaced", "reset log_went_back"),
    *("reset trimmed", "reset unknown_position"),
    *("written stream.position", "written stream.draining", "writes taken in part", "writes by the short way", "gaps announced"),
)
CLIENTS = st.sets(st.integers(0, len(SUBSCRIPTIONS) - 1), min_size=1)
ROOMS = st.sampled_from([10, 150, 1_000, 100_000])
TURNS = st.integers(0, 6)
WHAT = st.sampled_from(
    [
        *["publish"] * 18,
        *["publish_mixed"] * 8,
        *["turn"] * 12,
        *["run"] * 12,
        *["hold"] * 2,
        *["connect"] * 7,
        *["all_connect"] * 7,
        *["leave"] * 4,
        *["pause"] * 4,
        *["read"] * 6,
        *["roll"] * 2,
        *["lag"] * 3,
        *["connection"] * 2,
        *["log_fails"] * 6,
        "rest",
    ]
)


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
        calm=st.sampled_from([True, False, False]),
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

    def process(self, draw) -> Process:
        return self.slots[draw(st.integers(0, 1))]

    def client(self, draw) -> Client:
        return self.world.clients[draw(st.integers(0, len(self.world.clients) - 1))]

    @rule(what=WHAT, data=st.data())
    def step(self, what, data):
        """One thing happens. As one rule, because their weights matter: faults are rare in a life."""
        Service.steps += 1
        Service.happened[what] += 1
        getattr(self, what)(data.draw)

    # --- time

    def turn(self, draw):
        """Some turns of the loop: stops in the middle of flushes, loads and replays."""
        self.turns(draw, st.integers(1, 8))

    def run(self, draw):
        self.world.run(draw(st.sampled_from([0.003, 0.01, 0.05, 0.3, 1.1, 3.0])))

    def hold(self, draw):
        """Nothing has a turn: the processes are frozen, or something holds their loops."""
        self.world.hold(draw(st.sampled_from([0.05, 0.7] if self.world.calm else [0.05, 0.7, 5.0, 12.0])))

    def turns(self, draw, count=TURNS):
        for _ in range(draw(count)):
            self.world.turn()

    # --- publishers

    def publish(self, draw):
        self.world.server.publish(
            draw(TOPICS),
            draw(st.sampled_from([0, 5, 40, 500, 3_000])),
            draw(st.sampled_from([1, 1, 2, 5, 12])),
            bare=draw(st.booleans()),
            broken=draw(st.integers(0, 9)) == 9,
        )
        self.turns(draw)

    def publish_mixed(self, draw):
        """Many kinds of events in one batch of the reader, and a stop in the middle of its flush."""
        for topics in draw(st.lists(TOPICS, min_size=2, max_size=12)):
            self.world.server.publish(topics, 3, 1, bare=False, broken=False)
        self.turns(draw)

    # --- clients

    def connect(self, draw):
        """One client connects: where it was, or as somebody new."""
        client, process = self.client(draw), self.process(draw)
        if not process.open_for_streams():
            return
        client.give_up()
        ask = draw(st.sampled_from([None, None, None, "earliest", "", "garbage", "e1:7-0"]))
        if ask is not None:
            # It starts over: what it has read before does not count.
            client.last_id = "" if ask in ("", "earliest") else ask
        client.connect(process, turns=draw(TURNS), room=draw(ROOMS), ask=ask)

    def all_connect(self, draw):
        """A storm: everybody who is away comes at once."""
        process, room = self.process(draw), draw(ROOMS)
        if process.open_for_streams():
            for client in self.world.clients:
                if client.away:
                    client.connect(process, turns=1, room=room)
            self.turns(draw)

    def leave(self, draw):
        """Connections end, by the client or for a reason of the process."""
        how = draw(st.sampled_from(["closes", "vanishes", "is evicted"]))
        for number in sorted(draw(CLIENTS)):
            client = self.world.clients[number]
            wire = client.wire
            if how == "closes":
                client.give_up()
            elif how == "vanishes":
                client.vanish()
            elif wire is not None and not wire.ended and wire.process.alive:
                hub = wire.process.hub
                hub.end(wire.stream, "evicted", hub.farewell())

    def pause(self, draw):
        """Clients stop or go on reading, perhaps with something in their way."""
        reading = draw(st.booleans())
        for number in draw(CLIENTS):
            self.world.clients[number].reading = reading
        if draw(st.booleans()):
            self.world.server.publish(("broadcast",), 3_000, 2, bare=False, broken=False)

    def read(self, draw):
        wire = self.client(draw).wire
        if wire is not None:
            wire.deliver(draw(st.sampled_from([1, 20, 200, 2_000])))

    # --- processes

    def roll(self, draw):
        """SIGKILL or a drain; a new process that loads the log anew takes its place."""
        slot = draw(st.integers(0, 1))
        process = self.slots[slot]
        how = draw(st.sampled_from(["killed", "drained", "drained slowly"]))
        if how == "killed":
            process.kill()
        elif process.kit.draining or not process.reader.loaded:
            return
        else:
            lead, seconds = (0.0, 0.1) if how == "drained" else (0.2, 3.0)
            self.world.task(process.drain(lead, seconds))
        self.slots[slot] = self.world.start()

    def lag(self, draw):
        """Answers of the log take their time to one process."""
        delays = [0.0, 0.02, 0.05] if self.world.calm else [0.0, 0.02, 0.4, 1.5]
        self.process(draw).log.delay = draw(st.sampled_from(delays))
        self.world.late = 1.0

    def connection(self, draw):
        """A reader's connection breaks, or the log is out of its reach for longer."""
        log = self.process(draw).log
        away = draw(st.sampled_from([None] if self.world.calm else [None, True, False]))
        if away is not None:
            log.away = away
        if away is not False:
            log.break_off()

    # --- the log

    def log_fails(self, draw):
        """What can befall a log: it is emptied or replaced, or its newest entries never came over."""
        server = self.world.server
        what = draw(st.sampled_from(["FLUSHALL", "replaced", "failover", "failover", "clock jumps", "XDEL"]))
        if self.world.calm:
            return
        Service.happened[what] += 1
        seconds = draw(st.sampled_from([0, 0, -60, -1, 2, 5]))
        if what == "FLUSHALL":
            server.flush()
        elif what == "replaced":
            self.world.replace()
        elif what == "failover":
            self.world.promote(draw(st.integers(0, 5)), seconds * 1000)
        elif what == "clock jumps":
            server.jump(seconds * 1000)
        elif server.entries:
            server.delete(draw(st.integers(0, len(server.entries) - 1)))
        self.turns(draw)
        if draw(st.booleans()):
            self.world.run(0.2)

    # --- what must hold

    def rest(self, draw):
        """Everything is healed; then nobody lacks anything, or it was told."""
        self.world.come_to_rest()

    @invariant()
    def sound(self):
        if hasattr(self, "world"):
            self.world.check()


def run(examples: int, *, seed: int | None = None, shrink: bool = False) -> None:
    machine = Service
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=100,
        deadline=None,
        database=None,
        derandomize=seed is None,
        print_blob=False,
        report_multiple_bugs=False,
        # A shorter example takes minutes to find; the trace beside it says more.
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    if seed is not None:
        machine = hypothesis.seed(seed)(type("Seeded", (Service,), {}))
    run_state_machine_as_test(machine, settings=settings)


class TestService:
    @pytest.mark.timeout(300)
    def test_ten_thousand_steps(self):
        """
        Whatever happens, a client misses nothing, reads nothing twice, or is told.
        """
        Service.steps = 0
        Service.happened.clear()

        run(130)

        assert Service.steps >= STEPS
        assert not [what for what in HAPPENS if not Service.happened[what]]


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
    def away(world: World, *, phase: float, away: float, elsewhere: bool, again: bool = False) -> Client:
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
        if again:
            quiet.give_up()
            busy(away)
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

    def test_a_client_that_leaves_again_at_once(self, world):
        """
        The id with which it came is renewed at once, so that its time begins anew.
        """
        quiet = self.away(world, phase=0.3, away=world.pace.history - 0.15, elsewhere=False, again=True)

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


def soak(seconds: float, seed: int, *, shrink: bool = False) -> None:
    """Run the machine with one seed after the other, for some time."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        Service.happened.clear()
        before = Service.steps
        run(50, seed=seed, shrink=shrink)
        print(f"seed {seed}: {Service.steps - before} steps, {time.monotonic() - began:.0f} s", flush=True)
        seed += 1
    print(f"{Service.steps} steps in {time.monotonic() - began:.0f} s; of the last seed: {dict(Service.happened)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.test_simulation", description=soak.__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shrink", action="store_true", help="look for a short example where one fails")
    options = parser.parse_args()
    soak(options.seconds, options.seed, shrink=options.shrink)
