"""
The faults, each once, each on a stack of its own; and what must be true after it.
"""

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from app.stack import App, Part
from tests.faults.parts import Network, connect
from tests.faults.trial import Row, Size, Trial
from tests.live import LOG, ask, frozen, readiness
from tests.live import post as post_events


@dataclass(frozen=True, slots=True)
class Fault:
    """
    One row of the table.

    Attributes:
        about: what is promised.
        log: which log the trial needs; see `Trial`.
        announced: the log did not survive, so every stream reads `stream.reset`.
        may_reset: the log lost what nobody had been promised; some are told.
        errors: connects may fail meanwhile.
        env: settings of the processes.
    """

    name: str
    about: str
    work: Callable[[Trial], Awaitable[list[str]]]
    log: str = "redis"
    announced: bool = False
    may_reset: bool = False
    errors: bool = False
    env: tuple[tuple[str, str], ...] = ()


FAULTS: dict[str, Fault] = {}
_Work = Callable[[Trial], Awaitable[list[str]]]


def fault(**options: object) -> Callable[[_Work], _Work]:
    """Make a function a fault of its name; its docstring is the promise."""

    def enter(work: _Work) -> _Work:
        name = work.__name__.replace("_", "-")
        about = (work.__doc__ or "").strip()
        FAULTS[name] = Fault(name, about, work, **options)  # type: ignore[arg-type]
        return work

    return enter


async def run(name: str, size: Size) -> Row:
    """Do one fault on a fresh stack, and count."""
    each = FAULTS[name]
    async with Trial(size, log=each.log, **dict(each.env)) as trial:
        notes = await each.work(trial)
        row = await trial.result(name, announced=each.announced, may_reset=each.may_reset)
        row.notes += notes
        reasons = Counter(line["reason"] for line in trial.log_lines("log_gap"))
        row.notes += [f"announced by the processes: {dict(reasons)}"] if reasons else []
        return row


def complaints(row: Row) -> list[str]:
    """Return which promises *row* breaks; empty when all were kept."""
    each = FAULTS[row.fault]
    broken = []
    if row.lost:
        broken.append(f"{row.lost} events lost that no stream.reset told of")
    if row.duplicate:
        broken.append(f"{row.duplicate} events twice")
    if row.disorder:
        broken.append(f"{row.disorder} events out of order")
    if row.events < row.streams:
        broken.append(f"only {row.events} events on {row.streams} streams")
    if each.announced and row.reset_streams < row.streams:
        broken.append(f"only {row.reset_streams} of {row.streams} streams were told of the loss")
    if not each.announced and not each.may_reset and row.resets:
        broken.append(f"{row.resets} resets, though the log survived")
    breaks = {why: count for why, count in row.ends.items() if why.startswith("listen: ")}
    if row.fault in ("rolling-restart", "nginx-reloaded"):
        if breaks:
            broken.append(f"the kit's own client had to break before it made: {breaks}")
        if row.ends.get("cut"):
            broken.append(f"{row.ends['cut']} streams were cut in the middle")
    if not each.errors and row.errors:
        broken.append(f"client errors: {row.errors}")
    return broken


# --- What the faults are made of


async def restart(part: Part, number: int = signal.SIGTERM) -> None:
    await asyncio.to_thread(part.restart, number)


@contextlib.asynccontextmanager
async def away(trial: Trial, seconds: float) -> AsyncIterator[list[str]]:
    """
    See what Redis's absence, made by the caller before, does in *seconds*.

    No process becomes unready, no stream ends, the API says 503 and when to
    come again.
    """
    notes: list[str] = []
    app = trial.apps[0]
    began = time.monotonic()
    answer = await post_events(app, {"topics": ["away"], "data": "x"}, seconds=30)
    assert answer.status == 503, (answer.status, answer.body)
    assert answer.headers["retry-after"].isdigit()
    notes.append(f"publish answered 503 after {time.monotonic() - began:.1f} s")
    while time.monotonic() < began + seconds:
        for each in trial.apps:
            ready = await readiness(each)
            assert ready.status == 200, ready.body
            assert (await ask(each.port, "GET", "/healthz")).status == 200
        await asyncio.sleep(0.3)
    ends = (await trial.crowd.ask("report"))["ends"]
    assert not ends, f"streams must stay open while Redis is away, {ends} ended"
    yield notes


async def noticed(trial: Trial, seconds: float = 30.0) -> float:
    """Wait until every process has said that the log is away; return how long it took."""
    began = time.monotonic()
    while len({line.get("port") or id(app) for app in trial.apps for line in _lines(app)}) < len(trial.apps):
        assert time.monotonic() - began < seconds, "every process must notice that Redis is away"
        await asyncio.sleep(0.05)
    return time.monotonic() - began


def _lines(app: App) -> list[dict[str, object]]:
    return [{"port": app.port}] if '"log_unavailable"' in app.log() else []


# --- Processes


@fault()
async def rolling_restart(trial: Trial) -> list[str]:
    """SIGTERM for one process after the other: no client sees an error."""
    for app in trial.apps:
        await restart(app)
    notes = [
        f"drained: {line['streams']} streams, {line['events_in_flight']} events in flight, {line['seconds']} s"
        for line in trial.log_lines("drained")
    ]
    assert len(notes) == len(trial.apps)
    return notes


@fault(errors=True)
async def process_killed(trial: Trial) -> list[str]:
    """SIGKILL of a process: its streams go on at another one, whole."""
    app = trial.apps[0]
    app.kill(signal.SIGKILL)
    await trial.back()
    app.start()
    await asyncio.to_thread(app.wait_ready)
    return []


@fault(errors=True)
async def process_frozen(trial: Trial) -> list[str]:
    """SIGSTOP of a process for three seconds: its streams get what they missed."""
    with frozen(trial.apps[0]):
        await asyncio.sleep(3)
    return []


# --- nginx


@fault()
async def nginx_reloaded(trial: Trial) -> list[str]:
    """SIGHUP of nginx: the old workers keep their streams, new ones begin at the new workers."""
    trial.nginx.kill(signal.SIGHUP)
    await asyncio.sleep(1)
    # Every stream leaves the old workers: the processes are replaced under the new ones.
    for app in trial.apps:
        await restart(app)
    return []


@fault(errors=True)
async def nginx_killed(trial: Trial) -> list[str]:
    """SIGKILL of nginx and all its workers: all come back through the next one."""
    await restart(trial.nginx, signal.SIGKILL)
    return []


# --- Redis


@fault()
async def redis_killed(trial: Trial) -> list[str]:
    """SIGKILL of Redis with appendonly: what was acknowledged is delivered, once."""
    trial.redis.kill()
    took = await noticed(trial)
    async with away(trial, 2) as notes:
        trial.redis.start()
        await asyncio.to_thread(trial.redis.wait_ready)
    return [f"noticed after {took:.1f} s", *notes]


@fault()
async def redis_frozen(trial: Trial) -> list[str]:
    """SIGSTOP of Redis: noticed by its silence, streams stay, publishers hear 503."""
    with frozen(trial.redis):
        took = await noticed(trial)
        async with away(trial, trial.size.freeze_seconds) as notes:
            pass
    return [f"noticed after {took:.1f} s", *notes]


@fault()
async def redis_read_only(trial: Trial) -> list[str]:
    """A Redis that has become a replica refuses to write: as if away, until it is a master again."""
    with connect(trial.redis) as hands:
        hands.replicaof("127.0.0.1", "1")
        took = await noticed(trial)
        async with away(trial, 1) as notes:
            hands.replicaof("NO", "ONE")
    return [f"noticed after {took:.1f} s", *notes]


@fault()
async def redis_out_of_memory(trial: Trial) -> list[str]:
    """A full Redis refuses events; what it has is delivered, and it goes on when it has room."""
    with connect(trial.redis) as hands:
        hands.config_set("maxmemory", 1)
        async with away(trial, 1) as notes:
            hands.config_set("maxmemory", 0)
    return notes


@fault(log="distant")
async def network_cut(trial: Trial) -> list[str]:
    """Every packet between the processes and Redis is dropped: no connection breaks, all is silent."""
    assert trial.network
    with trial.network.cut():
        took = await noticed(trial)
        async with away(trial, 3) as notes:
            pass
    return [f"noticed after {took:.1f} s", *notes]


@fault(log="sentinel", may_reset=True, env=(("SSE_PUBLISH_WAIT_REPLICAS", "1"),))
async def failover(trial: Trial) -> list[str]:
    """
    SIGKILL of the master behind a Sentinel: with SSE_PUBLISH_WAIT_REPLICAS=1 all that was
    acknowledged is in the promoted replica, once.
    """
    assert trial.replica
    assert trial.sentinel
    began = time.monotonic()
    # In one instant: what is acknowledged by then must be there.
    promised = set(trial.press.acknowledged)
    trial.redis.kill()
    while trial.sentinel.master_port() != trial.replica.port:
        assert time.monotonic() - began < 60, "the Sentinel must promote the replica"
        await asyncio.sleep(0.1)
    promoted = time.monotonic() - began
    # WAIT asks for a replica: the new master gets the old machine as its own.
    trial.redis.arguments += ["--replicaof", "127.0.0.1", str(trial.replica.port)]
    trial.redis.start()
    await asyncio.to_thread(trial.redis.wait_ready)
    await trial.back()
    kept = trial.kept(trial.replica)
    missing = [data for data in promised if kept[data] != 1]
    assert not missing, f"{len(missing)} acknowledged events are not there once: {missing[:3]}"
    return [f"promoted after {promoted:.1f} s, served again after {time.monotonic() - began:.1f} s"]


@fault(log="sentinel", announced=True)
async def failover_that_lost_the_tail(trial: Trial) -> list[str]:
    """A promoted replica without the newest events: every stream is told."""
    assert trial.replica
    assert trial.sentinel
    began = time.monotonic()
    with connect(trial.replica) as hands:
        # The master has no password, so a replica that gives one is refused.
        hands.config_set("masterauth", "wrong")
        hands.execute_command("CLIENT", "KILL", "TYPE", "MASTER")
    behind = len(trial.press.acknowledged)
    while len(trial.press.acknowledged) < behind + 20:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    # What the streams have read by now exists nowhere afterwards.
    await trial.crowd.ask("final", last=list(trial.press.last), seconds=30)
    trial.redis.kill()
    while trial.sentinel.master_port() != trial.replica.port:
        assert time.monotonic() - began < 60, "the Sentinel must promote the replica"
        await asyncio.sleep(0.1)
    return [f"promoted after {time.monotonic() - began:.1f} s"]


@fault(announced=True)
async def log_emptied(trial: Trial) -> list[str]:
    """FLUSHALL: every stream is told, and goes on."""
    with connect(trial.redis) as hands:
        hands.flushall()
    return []


@fault(announced=True)
async def log_cut_short(trial: Trial) -> list[str]:
    """Entries trimmed away while the processes could not read: every stream is told."""
    with contextlib.ExitStack() as all_frozen:
        for app in trial.apps:
            all_frozen.enter_context(frozen(app))
        with connect(trial.redis) as hands:
            for _ in range(20):
                hands.xadd(LOG, {"v": "1", "topics": "nobody", "data": "x"})
            hands.xtrim(LOG, maxlen=3, approximate=False)
    return []


def possible(name: str) -> str:
    """Return why a fault cannot be made on this machine, or an empty text."""
    if FAULTS[name].log == "distant" and not Network.possible():
        return "a network namespace needs root, ip and nft"
    return ""


__all__ = ["FAULTS", "Fault", "complaints", "possible", "run"]
