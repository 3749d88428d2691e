"""
What takes minutes: rolling restarts, the storm, stalled readers, the soak, and faults by seed.
"""

import asyncio
import random
import re
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import httpx2

from app.client import publish
from app.stack import App
from loadtest.bench.histogram import Histogram
from tests.faults.parts import connect
from tests.faults.trial import PREFIX, SCALED, Crowd, Row, Size, Trial
from tests.live import frozen, metrics

# As shipped, but for a shorter drain: five times all processes in minutes.
SHIPPED = {"SSE_LOG_FORMAT": "json", "SSE_DRAIN_SECONDS": "12", "SSE_HISTORY_SECONDS": "300"}


def percentiles(histogram: Histogram) -> str:
    """Return a histogram in words, in ms."""
    shown = ", ".join(f"p{share:g} {histogram.percentile(share) / 1000:.1f}" for share in (50, 99, 99.9))
    return f"{shown}, max {histogram.max / 1000:.1f} ms"


async def rolling(streams: int = 2_000, rounds: int = 5, drain_seconds: float = 12) -> tuple[Row, list[str]]:
    """
    All processes restarted, one after the other, *rounds* times, under 2,000 deliveries a second.

    Nothing lost, nothing twice, no client error; no second of a drain sees more
    than three times its mean of reconnects.
    """
    env = SHIPPED | {"SSE_DRAIN_SECONDS": f"{drain_seconds:g}"}
    size = Size(streams, streams // 10, streams // 10, calm_seconds=10, listeners=20, env=env)
    broken = []
    async with Trial(size) as trial:
        began = time.monotonic()
        windows = []
        for _ in range(rounds):
            for app in trial.apps:
                start = time.monotonic() - began
                await asyncio.to_thread(app.restart)
                windows.append(start)
        row = await trial.result("rolling restarts")
        figures = trial.log_lines("drained")
    assert len(windows) == len(figures) == rounds * size.processes
    shape: Counter[int] = Counter()
    worst = 0.0
    for start, figure in zip(windows, sorted(figures, key=lambda line: line["timestamp"]), strict=True):
        seconds = Counter(int(at - start) for at in row.opened if 0 <= at - start < drain_seconds + 1)
        shape += seconds
        mean = figure["streams"] / drain_seconds
        worst = max(worst, max(seconds.values(), default=0) / max(1.0, mean))
    if worst > 3:
        broken.append(f"a second of a drain had {worst:.1f} times the mean of reconnects, limit 3")
    row.notes += [
        f"before {percentiles(row.before)}",
        f"during {percentiles(row.during)}",
        (
            f"ended by drains: {sum(f['streams'] for f in figures)} streams, "
            f"{sum(f['events_in_flight'] for f in figures)} events in flight"
        ),
        f"busiest second of a drain: {worst:.1f} times the mean. Reconnects by second of the drain:",
        *histogram(shape, int(drain_seconds) + 1),
    ]
    return row, broken


def histogram(counts: Counter[int], bins: int) -> list[str]:
    """Draw *counts*, one line a second."""
    most = max(counts.values(), default=1)
    return [f"  {second:3} s {'#' * round(40 * counts[second] / most):<40} {counts[second]}" for second in range(bins)]


async def storm(streams: int = 4_000, others: int = 500) -> tuple[Row, list[str]]:
    """
    4,000 streams lose their process at one instant.

    All come back at another one, whose own streams hear their events as before:
    within 15 s, and at most at five times their p99 latency.
    """
    # The third process takes the publishers, so that only delivery is measured.
    env = SHIPPED | {"SSE_DRAIN_SECONDS": "2"}
    size = Size(streams, 40, 40, calm_seconds=1, listeners=0, processes=3, behind_nginx=1, env=env)
    beside = Crowd()
    broken = []
    async with Trial(size) as trial:
        lost, kept, api = trial.apps
        trial.press.url = api.url
        trial.nginx.servers.append(f"127.0.0.1:{kept.port}")
        (trial.nginx.prefix / "upstream.conf").write_text(
            "".join(f"server {server} max_fails=0;\n" for server in trial.nginx.servers)
        )
        trial.nginx.kill(signal.SIGHUP)
        await beside.start()
        try:
            await beside.ask("open", count=others, at_once=64, topics=40, port=kept.port, prefix=PREFIX, seconds=60)
            await beside.ask("mark")
            await asyncio.sleep(10)
            before = Histogram()
            before.add((await beside.ask("report"))["latency"])
            await beside.ask("mark")
            await trial.crowd.ask("mark")
            began = time.monotonic()
            lost.kill(signal.SIGKILL)
            await trial.until(lambda report: report["ends"].get("cut", 0) + report["ends"].get("clean", 0) >= streams
                              and report["open"] >= streams, "all are back")  # fmt: skip
            took = time.monotonic() - began
            during = Histogram()
            during.add((await beside.ask("report"))["latency"])
            row = await trial.result("storm")
            hold = (await metrics(kept))["sse_loop_longest_hold_seconds"]
        finally:
            await beside.end()
    p99, was = during.percentile(99), before.percentile(99)
    if took > 15:
        broken.append(f"all were back after {took:.1f} s, limit 15")
    if p99 > 5 * max(was, 2_000):
        broken.append(f"p99 of the others was {p99 / 1000:.1f} ms, limit 5 times {was / 1000:.1f}")
    row.notes += [
        f"all {streams} back after {took:.1f} s; connect to stream.open {percentiles(row.opening)}",
        f"the other process's {others} streams before: {percentiles(before)}",
        (
            f"the other process's {others} streams during: {percentiles(during)}; "
            f"the loop was held for {hold * 1000:.0f} ms at most"
        ),
    ]
    return row, broken


async def stalled(streams: int = 1_000, stalled: int = 50, seconds: float = 25) -> tuple[Row, list[str]]:
    """
    50 readers that stop reading among 1,000, each owed 640 KB a second.

    The others' p99 stays within 1.5 times what it was, and memory within what
    is configured, the kernel's included; the stalled ones are ended.
    """
    env = SHIPPED | {"SSE_DRAIN_SECONDS": "2"}
    size = Size(streams, 20, 40, calm_seconds=seconds, listeners=0, heavy=stalled, env=env)
    broken = []
    async with Trial(size) as trial:
        parts = [*trial.apps, trial.nginx]
        kernel = sum(kernel_bytes(part.port) for part in parts)
        resident = sum(resident_bytes(app) for app in trial.apps)
        await trial.crowd.ask("stall", count=stalled)
        await trial.crowd.ask("mark")
        most = grown = sent = 0
        until = time.monotonic() + seconds
        async with httpx2.AsyncClient() as client:
            while time.monotonic() < until:
                await publish(trial.nginx.url, {"topics": ["heavy"], "data": "x" * 64_000}, client=client)
                sent += 1
                if sent % 20 == 0:
                    most = max(most, await asyncio.to_thread(lambda: sum(kernel_bytes(part.port) for part in parts)))
                    grown = max(grown, sum(resident_bytes(app) for app in trial.apps) - resident)
                await asyncio.sleep(0.1)
        most -= kernel
        ended = sum([(await metrics(app))['sse_streams_ended_total{reason="slow_consumer"}'] for app in trial.apps])
        during = Histogram()
        during.add((await trial.crowd.ask("report"))["latency"])
        row = await trial.result("stalled readers", open_streams=streams - stalled)
    p99, was = during.percentile(99), row.before.percentile(99)
    # The send buffers of the process and of nginx, 64 KiB each; the kernel doubles
    # them for its own book-keeping, and what is on loopback's way counts once more.
    limit = stalled * 2 * 4 * 65_536
    if p99 > 1.5 * was + 2_000:
        broken.append(f"p99 of the others was {p99 / 1000:.1f} ms, limit 1.5 times {was / 1000:.1f}")
    if most > limit:
        broken.append(f"the kernel held {most / 1e6:.1f} MB for {stalled} stalled readers, limit {limit / 1e6:.1f}")
    if ended < stalled:
        broken.append(f"only {ended:g} of {stalled} stalled readers were ended")
    row.notes += [
        f"without: {percentiles(row.before)}",
        f"with: {percentiles(during)}",
        f"sockets grew by {most / stalled / 1024:.0f} KiB of the kernel's memory a stalled reader",
        # The window among it: the heavy events are kept for the history.
        f"the processes grew by {grown / 1e6:.1f} MB; ended as slow_consumer: {ended:g}",
    ]
    return row, broken


def kernel_bytes(port: int) -> int:
    """Return what the kernel holds in the buffers of the sockets that *port* accepted."""
    out = subprocess.run(["ss", "-tmnH", "sport", "=", f":{port}"], capture_output=True, text=True, check=True).stdout
    # r: received and not read, w: queued to send, f: kept ahead.
    return sum(sum(map(int, found)) for found in re.findall(r"skmem:\(r(\d+),.*?,f(\d+),w(\d+)", out))


def resident_bytes(app: App) -> int:
    """Return the resident memory of *app*."""
    return int(Path(f"/proc/{app.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def descriptors(app: App) -> int:
    """Return how many descriptors *app* has open."""
    return sum(1 for _ in Path(f"/proc/{app.pid}/fd").iterdir())


async def soak(minutes: float = 30, streams: int = 300, visitors: int = 40) -> tuple[Row, list[str]]:
    """Streams that come, go and listen, for *minutes*: memory, descriptors, tasks and Redis stay flat."""
    env = SHIPPED | {"SSE_HISTORY_SECONDS": "60", "SSE_MAX_AGE_SECONDS": "120"}
    size = Size(streams, 30, 100, calm_seconds=1, env=env)
    samples: list[dict[str, float]] = []
    broken = []
    async with Trial(size) as trial:
        await trial.crowd.ask("churn", port=trial.nginx.port, at_once=visitors)
        until = time.monotonic() + minutes * 60
        while time.monotonic() < until:
            sample: dict[str, float] = {}
            for app in trial.apps:
                facts = await metrics(app)
                sample[f"{app.name} MB"] = resident_bytes(app) / 1e6
                sample[f"{app.name} descriptors"] = descriptors(app)
                sample[f"{app.name} tasks"] = facts["sse_loop_tasks"]
            with connect(trial.redis) as hands:
                sample["Redis MB"] = hands.info("memory")["used_memory"] / 1e6
            samples.append(sample)
            await asyncio.sleep(min(5.0, minutes * 2))
        report = await trial.crowd.ask("report")
        await trial.crowd.ask("calm")
        row = await trial.result("soak")
    # The log and the heap fill first: compare the last third with the one before.
    third = max(1, len(samples) // 3)
    row.notes.append(f"{minutes:g} minutes, {report['churned']} streams came and went; second and last third:")
    for name in samples[0]:
        middle = sum(s[name] for s in samples[third : 2 * third]) / third
        last = sum(s[name] for s in samples[-third:]) / third
        row.notes.append(f"  {name}: {middle:.1f}, {last:.1f}")
        if last > 1.08 * middle + 3:
            broken.append(f"{name} grew from {middle:.1f} to {last:.1f}")
    return row, broken


# --- By seed


async def _restart(trial: Trial, dice: random.Random) -> None:
    await asyncio.to_thread(dice.choice(trial.apps).restart)


async def _kill(trial: Trial, dice: random.Random) -> None:
    await asyncio.to_thread(dice.choice(trial.apps).restart, signal.SIGKILL)


async def _freeze(trial: Trial, dice: random.Random) -> None:
    with frozen(dice.choice(trial.apps)):
        await asyncio.sleep(dice.uniform(0.2, 4))


async def _reload(trial: Trial, dice: random.Random) -> None:
    trial.nginx.kill(signal.SIGHUP)


async def _restart_nginx(trial: Trial, dice: random.Random) -> None:
    await asyncio.to_thread(trial.nginx.restart, signal.SIGKILL)


async def _kill_redis(trial: Trial, dice: random.Random) -> None:
    trial.redis.kill()
    await asyncio.sleep(dice.uniform(0, 3))
    trial.redis.start()
    await asyncio.to_thread(trial.redis.wait_ready)


async def _freeze_redis(trial: Trial, dice: random.Random) -> None:
    with frozen(trial.redis):
        await asyncio.sleep(dice.uniform(0.2, 5))


async def _read_only(trial: Trial, dice: random.Random) -> None:
    with connect(trial.redis) as hands:
        hands.replicaof("127.0.0.1", "1")
        await asyncio.sleep(dice.uniform(0.2, 3))
        hands.replicaof("NO", "ONE")


async def _full(trial: Trial, dice: random.Random) -> None:
    with connect(trial.redis) as hands:
        hands.config_set("maxmemory", 1)
        await asyncio.sleep(dice.uniform(0.2, 3))
        hands.config_set("maxmemory", 0)


async def _cut_clients(trial: Trial, dice: random.Random) -> None:
    with connect(trial.redis) as hands:
        hands.execute_command("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")


_DICE: dict[str, Callable[[Trial, random.Random], Awaitable[None]]] = {
    "restart": _restart,
    "kill": _kill,
    "freeze": _freeze,
    "reload nginx": _reload,
    "kill nginx": _restart_nginx,
    "kill Redis": _kill_redis,
    "freeze Redis": _freeze_redis,
    "read-only Redis": _read_only,
    "full Redis": _full,
    "cut Redis's clients": _cut_clients,
}


async def by_seed(seed: int, seconds: float, streams: int = 400) -> tuple[Row, list[str]]:
    """Faults at random, two at once at times, for *seconds*; the same for the same seed."""
    dice = random.Random(seed)
    size = Size(streams, max(4, streams // 10), max(20, streams // 2), processes=3, env=SCALED)
    done: Counter[str] = Counter()
    async with Trial(size) as trial:
        # Their processes are shared: two faults on one at once would be a mistake of the test.
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(dice.uniform(0.1, 2))
            of_redis = dice.random() < 0.4
            names = [name for name in _DICE if ("Redis" in name) == of_redis]
            chosen = [dice.choice(names)]
            if dice.random() < 0.3:
                chosen.append(dice.choice([name for name in _DICE if ("Redis" in name) != of_redis]))
            done.update(chosen)
            await asyncio.gather(*(_DICE[name](trial, dice) for name in chosen))
        row = await trial.result(f"seed {seed}")
    row.notes.append(", ".join(f"{name} {count}" for name, count in sorted(done.items())))
    broken = [] if row.whole else [f"{row.lost} lost, {row.duplicate} twice, {row.disorder} out of order"]
    if row.resets:
        broken.append(f"{row.resets} resets, though the log survived")
    return row, broken


QUICK = Size()
LONG = replace(QUICK, streams=400, topics=40, events=200, calm_seconds=3, freeze_seconds=20)
