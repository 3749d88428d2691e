"""
Lead a run: when how many streams, what is done to them, when it ends, and what it showed.

Runs on Locust's master (or its only process), and speaks to the processes that generate
load by Locust's own messages; their figures come with Locust's own reports.
"""

import argparse
import time
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gevent
from locust.env import Environment
from locust.runners import LocalRunner, MasterRunner, WorkerRunner
from locust.stats import bucket_response_time

from loadtest import users
from loadtest.generator import Generator, as_expected
from loadtest.measures import Collected, Measures
from loadtest.options import chosen, chosen_thresholds, results_folder, source_addresses
from loadtest.page import page
from loadtest.parts import Watch
from loadtest.result import Result, judge, verdict_line
from loadtest.sse_client import Target
from loadtest.terminal import say

PROGRESS_SECONDS = 2.0
# How much longer than planned a stage may need until its streams are there.
LATE_SECONDS = 30.0
# A publish in flight ends by itself: connect and answer have 10 s each.
PUBLISH_PATIENCE = 20.0
INTERRUPTED = 130
BROKEN = 2


class Conductor:
    """
    One run, seen from its leader.

    Attributes:
        stopped: Why it ended before its time; "" if it did not.
        void: Why it proves nothing, where no figure says so; "" else.
    """

    def __init__(self, environment: Environment, options: argparse.Namespace) -> None:
        self.environment = environment
        self.options = options
        self.scenario = chosen(options)
        self.streams = options.streams or self.scenario.streams
        self.rate = options.rate or self.scenario.connects_per_second
        self.thresholds = chosen_thresholds(options)
        self.collected = Collected()
        self.watch = Watch(Path(options.stack)) if options.stack else None
        self.workers = 1
        self.stopped = ""
        self.exit_code: int | None = None
        self.void = ""
        self.steps: list[dict[str, Any]] = []
        self.began_at = datetime.now(UTC)
        self.result: Result | None = None
        self._began = time.monotonic()
        self._stage = 0
        self._stage_began = self._began
        self._reached: float | None = None
        self._answered = 0
        self._held = 0.0
        self._actions = list(self.scenario.actions)
        self._seen_open = self._began
        self._ever_open = False
        self._step_before: dict[str, float] = {}
        self._finished: set[str] = set()
        self._published: dict[str, Any] = {}
        self._told: set[str] = set()
        self._asked_at: float | None = None
        self._so_far: dict[str, dict[str, Any]] = {}
        self._over = False
        self._phase = "open"

    # --- The course of a run

    def start(self, workers: int) -> None:
        """The run begins with so many processes."""
        self.workers = workers
        self._began = self._stage_began = self._seen_open = time.monotonic()
        self.began_at = datetime.now(UTC)
        self._say(
            f"{self.scenario.name}: {self.streams:,} streams on {self.scenario.topics(self.streams):,} topics, "
            f"{self.scenario.rate * self.scenario.topics(self.streams) + self.scenario.broadcast_rate:g} events/s, "
            f"{workers} {'process' if workers == 1 else 'processes'}"
        )
        gevent.spawn(self._progress)

    def tick(self) -> tuple[int, float] | None:
        """Return how many users there must be now, and how fast; None when the run is over."""
        if self._over:
            return None
        if self._began == self._stage_began and self._stage == 0 and self._phase == "open":
            self._begin_stage()
        now = time.monotonic()
        refusals = {
            name.partition(":")[2]: count for name, count in self.collected.tally.items() if name.startswith("refused:")
        }
        if changed := self._processes_changed():
            # What one had read is gone, and whoever came would publish what others do.
            self.void = changed
            self.stop(changed)
        elif self._gone(now):
            self.stop(f"the target is gone: no stream has been open for {self._patience():g} s")
        elif refusals and not self.collected.open and self.collected.tally["gave_up"] >= self._wanted():
            said = ", ".join(f"{count:,} times {status}" for status, count in sorted(refusals.items()))
            self.stop(f"every stream was refused for ever: {said}")
        elif self._reached is None:
            runner = self.environment.runner
            assert runner is not None
            ready = runner.user_count == self._users() and (
                self.collected.open >= self._wanted() * 0.999 or self._answers() - self._answered >= self._wanted()
            )
            # Connects that are staggered or refused never make it whole.
            if ready or now > self._stage_began + self._ramp_seconds() + LATE_SECONDS:
                self._reached = now
                self._phase = "hold"
                if self.scenario.publish_when_open and self._stage == 0:
                    self._tell("sse_publish", {})
                self.collected.begin_step()
                self._step_before = self._failures()
        else:
            held = now - self._reached
            self._act(held)
            if self._stage_over(held):
                self._end_stage(now)
        if self._over:
            self.finish()
            return None
        return self._users(), self.rate

    def stop(self, why: str, exit_code: int | None = None) -> None:
        """End the run before its time."""
        self.stopped = why
        self.exit_code = exit_code
        self._over = True
        self._say(why)

    def _processes_changed(self) -> str:
        runner = self.environment.runner
        if not isinstance(runner, MasterRunner):
            return ""
        here = len(runner.clients.all) - len(runner.clients.missing)
        if here < self.workers:
            return f"{self.workers - here} of {self.workers} generator processes dead or silent"
        if here > self.workers:
            return f"{here - self.workers} generator processes more than the run began with"
        return ""

    def _wanted(self) -> int:
        return round(self.scenario.stages[self._stage].streams * self.streams)

    def _users(self) -> int:
        return self._wanted() + self.workers

    def _ramp_seconds(self) -> float:
        before = round(self.scenario.stages[self._stage - 1].streams * self.streams) if self._stage else 0
        return abs(self._wanted() - before) / self.rate

    def _stage_over(self, held: float) -> bool:
        """
        Tell whether the stage has been held for long enough.

        Whoever leaves at its end must have what was published `settle` seconds before,
        or it is lost; a short stage lasts longer for that.
        """
        stages, settle = self.scenario.stages, self.options.settle
        seconds = stages[self._stage].seconds
        if self._stage + 1 == len(stages) or stages[self._stage + 1].streams >= stages[self._stage].streams:
            return held >= seconds
        if self._asked_at is None:
            if held >= max(seconds / 2, seconds - settle):
                self._asked_at = held
                self._so_far.clear()
                self._tell("sse_say_so_far", {})
            return False
        return held >= max(seconds, self._asked_at + settle)

    def so_far(self, worker: str, data: dict[str, Any]) -> None:
        """A process says what it published so far; when all did, all hear it."""
        self._so_far[worker] = data
        if len(self._so_far) >= self.workers and self._phase != "end":
            self._tell(
                "sse_owed", {"published": {key: each for data in self._so_far.values() for key, each in data.items()}}
            )

    def _begin_stage(self) -> None:
        self._stage_began = time.monotonic()
        # Those who are open already need no answer.
        self._answered = self._answers() - self.collected.open
        self._reached = self._asked_at = None
        self._phase = "to"

    def _answers(self) -> int:
        """Return how many connects were answered: some with "later", some with "never"."""
        tally = self.collected.tally
        return tally["opened"] + tally["soft_failed"] + tally["gave_up"] + tally["runs_refused"]

    def _end_stage(self, now: float) -> None:
        self._held += now - (self._reached or now)
        step = self.collected.step() | {"streams": self._wanted(), "open": self.collected.open}
        step |= {name: count - self._step_before.get(name, 0) for name, count in self._failures().items()}
        if self.watch:
            step["parts"] = self.watch.busiest()
        self.steps.append(step)
        if self.scenario.stop_at_limit and (gave := self._gave_way(step)):
            self.stop(gave)
            if ": the generator " in gave:
                self.void = gave  # of the server's limit it says nothing
            else:
                self.exit_code = 0  # the limit is what was looked for
            return
        if self._stage + 1 == len(self.scenario.stages):
            self._over = True
            return
        self._stage += 1
        self._begin_stage()

    def _failures(self) -> dict[str, float]:
        tally, counts = self.collected.tally, self.collected.counts
        return {
            "gave_up": tally["gave_up"],
            "soft_failed": tally["soft_failed"],
            "broken": sum(count for name, count in tally.items() if name.startswith("broken:")),
            "lost": counts.lost,
            "generator_errors": tally["generator_errors"],
        }

    def _gave_way(self, step: dict[str, Any]) -> str:
        """Return what made this step the last one, in a sentence; "" if all is well."""
        bounds = {threshold.figure: threshold for threshold in self.thresholds}
        at = f"at {step['streams']:,} streams"

        def over(name: str, value: float | None) -> bool:
            return name in bounds and not bounds[name].holds(value)

        cause = self.watch.cause() if self.watch else ""
        if step["generator_errors"]:
            return f"limit {at}: the generator ran out of descriptors or ports; use more processes or sources"
        if over("lag_p99_ms", step["lag_p99_ms"]) and not cause:
            return f"limit {at}: the generator gave way first, lag p99 {step['lag_p99_ms']:g} ms; use more processes"
        late = over("lag_p99_ms", step["lag_p99_ms"]) or over("delivery_p99_ms", step["delivery_p99_ms"])
        if late and over("cpu_percent", step["cpu_percent"]):
            return f"limit {at}: the generator gave way first, its CPU at {step['cpu_percent']:g} %; use more processes"
        because = f"; {cause}" if cause else ""
        if step["lost"]:
            return f"limit {at}: {step['lost']:,} events lost{because}"
        # Where connections have run out, few refusals stand beside many that failed.
        refusals = {
            "gave_up": f"streams refused{self._most('refused')}",
            "soft_failed": "opens told to come back later",
            "broken": f"connects failed{self._most('broken')}",
        }
        worst = max(refusals, key=lambda name: step[name])
        if step[worst]:
            return f"limit {at}: {step[worst]:,} {refusals[worst]}{because}"
        if over("delivery_p99_ms", step["delivery_p99_ms"]):
            return f"limit {at}: delivery p99 {step['delivery_p99_ms']:g} ms{because or '; no part was at its limit'}"
        if over("opened_percent", 100 * step["open"] / max(1, step["streams"])):
            return f"limit {at}: only {step['open']:,} were open{because}"
        if over("lag_p99_ms", step["lag_p99_ms"]):
            return f"limit {at}: the machine, lag p99 of the generator {step['lag_p99_ms']:g} ms{because}"
        return ""

    def _most(self, kind: str) -> str:
        """Return the commonest status or error of the run's failures of this *kind*, in parentheses."""
        found = {name: count for name, count in self.collected.tally.items() if name.startswith(f"{kind}:")}
        return f" ({max(found, key=found.__getitem__).partition(':')[2]})" if found else ""

    def _act(self, elapsed: float) -> None:
        if self._stage + 1 != len(self.scenario.stages):
            return
        while self._actions and self._actions[0].at <= elapsed:
            action = self._actions.pop(0)
            self._say(f"{action.do}: {action.share:.0%} of the streams")
            self._tell("sse_disconnect", {"share": action.share})

    def _gone(self, now: float) -> bool:
        if self.collected.open or not self._ever_open or not self._wanted():
            self._ever_open = self._ever_open or bool(self.collected.open)
            self._seen_open = now
        return now - self._seen_open > self._patience()

    def _patience(self) -> float:
        # A reader of runs has no stream between two of them.
        return self.options.patience + (self.scenario.run_every if "run" in self.scenario.users else 0.0)

    # --- The end

    def finish(self, settle: float | None = None) -> None:
        """End publishing, let the last events arrive, and gather what every process has."""
        if self._phase == "end":
            # Another greenlet is at it; who kills that one now loses the results.
            self._wait(lambda: self.result is not None, 60)
            return
        self._over = True
        self._phase = "end"
        if settle is None:
            settle = self.options.settle if not self.stopped or self.collected.open else 1.0
        self._tell("sse_stop_publishing", {})
        self._wait(lambda: len(self._told) >= self._alive(), PUBLISH_PATIENCE + 3)
        self._tell("sse_finish", {"published": self._published, "seconds": settle})
        self._wait(lambda: len(self._finished) >= self._alive(), settle + 15)
        self._conclude()

    def published(self, worker: str, data: dict[str, Any]) -> None:
        """A process says what it published."""
        self._published.update(data)
        self._told.add(worker)

    def finished(self, worker: str, report: dict[str, Any]) -> None:
        """A process handed over its last figures."""
        self.collected.add(worker, report)
        self._finished.add(worker)

    def _conclude(self) -> None:
        self.collected.end()
        missing = self.workers - len(self._finished)
        self.result = judge(
            self.collected,
            self.thresholds,
            scenario=self.scenario,
            target=self.environment.host or "",
            streams=self.streams,
            workers=self.workers,
            began=self.began_at,
            seconds=time.monotonic() - self._began,
            held=self._held,
            stopped=self.stopped,
            exit_code=self.exit_code,
            workers_missing=missing,
            void_because=self.void,
            steps=self.steps,
            parts=self.watch.end(self.collected.most_open) if self.watch else [],
        )
        folder = results_folder(self.options, f"{self.began_at:%Y%m%d-%H%M%S}-{self.scenario.name}")
        self.environment.process_exit_code = self.result.exit_code
        # Locust keeps errors in a table of its own; its web page shows it.
        for name in ("lost", "duplicate", "out_of_order"):
            for _ in range(min(1000, int(self.result.figures[name] or 0))):
                self.environment.stats.log_error("SSE", "delivery", name)
        # First of all for people: an hour's run is not lost with a full disk.
        say(self.result.as_text())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.html").write_text(page(self.result))
            self.result.write(folder / "result.json")
        except OSError as error:
            say(f"The results could not be written into {folder}: {error.strerror}.")
            self.environment.process_exit_code = BROKEN
        else:
            say(f"Written: {folder / 'result.json'}, {folder / 'report.html'}")
        say(verdict_line(self.result))

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            gevent.sleep(0.05)

    def _alive(self) -> int:
        """Return how many processes can still answer."""
        runner = self.environment.runner
        if not isinstance(runner, MasterRunner):
            return 1
        return min(self.workers, len(runner.clients.all) - len(runner.clients.missing))

    def _tell(self, what: str, data: dict[str, Any]) -> None:
        runner = self.environment.runner
        assert runner is not None
        runner.send_message(what, data)

    # --- The terminal

    def _progress(self) -> None:
        while not self.result:
            gevent.sleep(PROGRESS_SECONDS)
            if self.watch:
                self.watch.sample(self._phase == "hold")
            if not self.result:
                self._say(self.line())

    def line(self) -> str:
        """Return how things stand, in one line."""
        latest, tally, counts = self.collected.latest(), self.collected.tally, self.collected.counts
        p99 = latest["p99_ms"]
        words = [
            f"{self._phase} {self._wanted():,}" if self._phase != "end" else "last events",
            f"streams {self.collected.open:,}",
            f"deliveries {latest['deliveries']:,}/s",
            f"p99 {p99:g} ms" if p99 is not None else "p99 -",
            f"lost {counts.lost}",
        ]
        for name, count in (
            ("duplicate", counts.duplicate),
            ("out of order", counts.out_of_order),
            ("soft-failed", tally["soft_failed"]),
            ("refused", sum(count for name, count in tally.items() if name.startswith("refused:"))),
            ("broken", sum(count for name, count in tally.items() if name.startswith("broken:"))),
            ("publishes failed", tally["publish_failed"]),
            ("publishes repeated", tally["publish_repeated"]),
            ("runs ended", tally["runs_done"]),
            ("runs failed", tally["runs_failed"]),
            ("tokens lost", tally["tokens_lost"]),
            ("tokens twice", tally["tokens_duplicate"]),
        ):
            if count:
                words.append(f"{name} {count:,}")
        return "  ".join(words)

    def _say(self, text: str) -> None:
        say(f"{time.monotonic() - self._began:6.0f} s  {text}")


# --- Locust


class Wiring:
    """
    What connects Locust's events with the conductor and with this process's generator.
    """

    def __init__(self, environment: Environment, tick: float = 0.02) -> None:
        self.environment = environment
        self.conductor: Conductor | None = None
        self.generator: Generator | None = None
        self._tick = tick
        runner = environment.runner
        assert runner is not None
        self.leads = isinstance(runner, LocalRunner | MasterRunner)
        self.generates = isinstance(runner, LocalRunner | WorkerRunner)
        events = environment.events
        events.test_start.add_listener(self._start)
        events.test_stopping.add_listener(self._stopping)
        events.test_stop.add_listener(self._stop)
        if self.generates:
            events.report_to_master.add_listener(self._to_master)
            runner.register_message("sse_publish", self._publish)
            runner.register_message("sse_disconnect", self._disconnect)
            runner.register_message("sse_say_so_far", self._say_so_far)
            runner.register_message("sse_owed", self._owed)
            runner.register_message("sse_stop_publishing", self._stop_publishing, concurrent=True)
            runner.register_message("sse_finish", self._finish, concurrent=True)
        if isinstance(runner, MasterRunner):
            events.worker_report.add_listener(self._from_worker)
            runner.register_message("sse_so_far", self._so_far)
            runner.register_message("sse_published", self._published)
            runner.register_message("sse_finished", self._finished)
        if self.leads:
            self._choose_users()

    @property
    def options(self) -> argparse.Namespace:
        """The options; a worker has its master's."""
        options = self.environment.parsed_options
        assert options is not None
        return options

    def _choose_users(self) -> None:
        """Let Locust start the scenario's kinds of users, and one publisher per process."""
        scenario = chosen(self.options)
        for kind, weight in scenario.users.items():
            users.KINDS[kind].weight = weight
        users.Publisher.fixed_count = 1
        self.environment.user_classes = [users.Publisher, *(users.KINDS[kind] for kind in scenario.users)]

    def tick(self) -> tuple[int, float] | None:
        """Return what the load's shape is now."""
        if self.conductor is None or self.conductor.result:
            # The web page starts a run as often as somebody likes.
            self.conductor = Conductor(self.environment, self.options)
            self._lead()
        try:
            return self.conductor.tick()
        except Exception as error:
            # Locust would log it and hold its users for ever.
            self.conductor.stop(f"the load test itself failed: {error!r}", BROKEN)
            self.conductor.finish(settle=0.0)
            raise

    def _lead(self) -> None:
        runner, conductor = self.environment.runner, self.conductor
        assert conductor is not None
        workers = max(1, runner.worker_count) if isinstance(runner, MasterRunner) else 1
        self._choose_users()
        users.Publisher.fixed_count = workers
        options = self.options
        # These travel to the workers with Locust's own message.
        options.sse_run = uuid.uuid4().hex[:8]
        options.sse_workers = workers
        options.sse_streams = conductor.streams
        conductor.start(workers)

    def _start(self, **_: object) -> None:
        if not self.generates:
            return
        options = self.options
        runner: Any = self.environment.runner
        target = Target(
            self.environment.host or "", sources=source_addresses(options, self.environment.host or ""),
            insecure=options.insecure,
        )  # fmt: skip
        self.generator = users.current = Generator(
            chosen(options),
            options,
            target,
            streams=options.sse_streams,
            run=options.sse_run,
            workers=options.sse_workers,
            index=max(0, runner.worker_index),
            tick=self._tick,
        )
        self.generator.start(self._report)

    def _report(self) -> None:
        """Locust's own reports carry the figures from a worker; the only process adds its own."""
        assert self.generator is not None
        if self.leads and self.conductor and not self.generator.closed:
            show(self.generator.measures, self.environment)
            self.conductor.collected.add("local", self.generator.hand_over())

    def _to_master(self, data: dict[str, Any], **_: object) -> None:
        if self.generator is not None and not self.generator.closed and not self.leads:
            # Locust has gathered its statistics before this is called: the next report has them.
            show(self.generator.measures, self.environment)
            data["sse"] = self.generator.hand_over()

    def _from_worker(self, client_id: str, data: dict[str, Any], **_: object) -> None:
        if self.conductor is not None and "sse" in data and not self.conductor.result:
            self.conductor.collected.add(client_id, data["sse"])

    def _publish(self, **_: object) -> None:
        if self.generator is not None:
            self.generator.may_publish.set()

    def _disconnect(self, msg: Any, **_: object) -> None:
        if self.generator is not None:
            self.generator.cut(msg.data["share"])

    def _stop_publishing(self, **_: object) -> None:
        generator, runner = self.generator, self.environment.runner
        if generator is None or runner is None:
            return
        generator.stop_publishing()
        # The publish in flight is waited for: what it says is acknowledged, or it is not.
        generator.between_publishes.wait(PUBLISH_PATIENCE)
        if self.conductor is not None:
            self.conductor.published("local", generator.as_told())
        else:
            runner.send_message("sse_published", generator.as_told())

    def _say_so_far(self, **_: object) -> None:
        generator, runner = self.generator, self.environment.runner
        if generator is None or runner is None:
            return
        if self.conductor is not None:
            self.conductor.so_far("local", generator.as_told())
        else:
            runner.send_message("sse_so_far", generator.as_told())

    def _so_far(self, msg: Any, **_: object) -> None:
        if self.conductor is not None:
            self.conductor.so_far(msg.node_id, msg.data)

    def _owed(self, msg: Any, **_: object) -> None:
        if self.generator is not None:
            self.generator.owed = as_expected(msg.data["published"])

    def _published(self, msg: Any, **_: object) -> None:
        if self.conductor is not None:
            self.conductor.published(msg.node_id, msg.data)

    def _finish(self, msg: Any, **_: object) -> None:
        generator, runner = self.generator, self.environment.runner
        if generator is None or runner is None:
            return
        generator.finish(as_expected(msg.data["published"]), msg.data["seconds"])
        report = generator.hand_over()
        if self.conductor is not None:
            self.conductor.finished("local", report)
        else:
            runner.send_message("sse_finished", report)

    def _finished(self, msg: Any, **_: object) -> None:
        if self.conductor is not None:
            self.conductor.finished(msg.node_id, msg.data)

    def _stopping(self, **_: object) -> None:
        """Somebody stops the run, by Ctrl-C or on the web page: keep what there is."""
        if self.leads and self.conductor is not None and not self.conductor.result:
            if not self.conductor.stopped:
                self.conductor.stop("interrupted", INTERRUPTED)
            # As at any end: events that are late are not lost.
            self.conductor.finish()

    def _stop(self, **_: object) -> None:
        if self.generator is not None:
            self.generator.stop()


def show(measures: Measures, environment: Environment) -> None:
    """
    Put the last second into Locust's statistics, for its web page.

    In one go per bucket: firing its `request` event for every delivery costs 7 µs each.
    """
    for name, method in (("open", "SSE"), ("delivery", "SSE"), ("first_token", "SSE"), ("publish", "POST")):
        values = measures.times[name]
        if not values.total_count:
            continue
        # hdrhistogram's own iterator takes 30 ms for what is one look at an array.
        buckets: Counter[int] = Counter()
        spent = 0.0
        for index, count in enumerate(memoryview(values.counts).cast("B").cast("q").tolist()):
            if count:
                value = values.get_value_from_index(index) / 1000
                buckets[bucket_response_time(value)] += count
                spent += value * count
        now = time.time()
        low, high = values.min_value / 1000, values.max_value / 1000
        for entry in (environment.stats.get(name, method), environment.stats.total):
            entry.num_requests += values.total_count
            entry.num_reqs_per_sec[int(now)] = entry.num_reqs_per_sec.get(int(now), 0) + values.total_count
            entry.last_request_timestamp = now
            entry.min_response_time = low if entry.min_response_time is None else min(entry.min_response_time, low)
            entry.max_response_time = max(entry.max_response_time, high)
            entry.total_response_time += spent
            for bucket, count in buckets.items():
                entry.response_times[bucket] = entry.response_times.get(bucket, 0) + count
