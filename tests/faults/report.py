"""
Run what was asked for and print the table.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

from tests.faults import long
from tests.faults.matrix import FAULTS, complaints, possible, run
from tests.faults.trial import Row

_COLUMNS = ("fault", "streams", "events", "lost", "twice", "disorder", "resets", "gap s", "client errors")
_WIDTHS = (30, 7, 9, 5, 5, 8, 7, 6, 14)


def cells(row: Row) -> tuple[str, ...]:
    """Return *row* as the table shows it."""
    figures = (row.streams, row.events, row.lost, row.duplicate, row.disorder, row.resets)
    return (row.fault, *map(str, figures), f"{row.longest_gap:.2f}", str(row.client_errors))


def line(texts: tuple[str, ...]) -> str:
    first, *rest = zip(texts, _WIDTHS, strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f" {text:>{width}}" for text, width in rest)


def show(row: Row, broken: list[str]) -> None:
    """Print one line, and below it what belongs to it."""
    print(line(cells(row)) + ("   BROKEN" if broken else ""), flush=True)
    notes = list(row.notes)
    if row.errors:
        notes.append("client errors: " + ", ".join(f"{count} {why}" for why, count in sorted(row.errors.items())))
    if row.publish_failures:
        notes.append(
            "publishers repeated: " + ", ".join(f"{count} {why}" for why, count in row.publish_failures.items())
        )
    for note in notes + [f"BROKEN: {text}" for text in broken]:
        print(f"    {note}", flush=True)


_LONG: dict[str, Callable[[argparse.Namespace], Awaitable[tuple[Row, list[str]]]]] = {
    "rolling": lambda options: long.rolling(options.streams or 2_000),
    "storm": lambda options: long.storm(options.streams or 4_000),
    "stalled": lambda options: long.stalled(options.streams or 1_000),
    "soak": lambda options: long.soak(options.minutes, options.streams or 300),
}


def main() -> int:
    """Return 0 if every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="each fault once, in under 3 minutes")
    parser.add_argument("--only", default="", help=f"names, with commas: {', '.join([*FAULTS, *_LONG, 'seeds'])}")
    parser.add_argument("--seed", type=int, default=0, help="of the faults at random (default: from the clock)")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after the other (default: 1)")
    parser.add_argument("--seconds", type=float, default=150, help="faults at random for so long (default: 150)")
    parser.add_argument("--minutes", type=float, default=30, help="of the soak (default: 30)")
    parser.add_argument(
        "--streams", type=int, default=0, help="another number for rolling, storm, stalled, soak and seeds"
    )
    options = parser.parse_args()
    chosen = [name for name in options.only.split(",") if name]
    if unknown := [name for name in chosen if name not in {*FAULTS, *_LONG, "seeds"}]:
        print(f"--only must be names of faults, got {unknown[0]!r}. See --help.", file=sys.stderr)
        return 2
    # The soak alone is longer than all the rest: it is asked for by name.
    chosen = chosen or [*FAULTS, *([] if options.quick else ["rolling", "storm", "stalled", "seeds"])]
    return asyncio.run(_run(chosen, options))


async def _run(chosen: list[str], options: argparse.Namespace) -> int:
    began = time.monotonic()
    failed = skipped = 0
    print(line(_COLUMNS))
    jobs: list[tuple[str, Callable[[], Awaitable[tuple[Row, list[str]]]]]] = []
    for name in chosen:
        if name == "seeds":
            first = options.seed or int(time.time()) % 1_000_000
            jobs += [
                (f"seed {seed}", lambda seed=seed: long.by_seed(seed, options.seconds, options.streams or 400))  # type: ignore[misc]
                for seed in range(first, first + options.seeds)
            ]
        elif name in _LONG:
            jobs.append((name, lambda name=name: _LONG[name](options)))  # type: ignore[misc]
        elif why := possible(name):
            skipped += 1
            print(f"{name:<{_WIDTHS[0]}} skipped: {why}")
        else:
            jobs.append((name, lambda name=name: _matrix(name, options.quick)))  # type: ignore[misc]
    for name, job in jobs:
        try:
            row, broken = await job()
        except (AssertionError, TimeoutError) as error:
            failed += 1
            print(f"{name:<{_WIDTHS[0]}} BROKEN: {error}", flush=True)
            continue
        failed += bool(broken)
        show(row, broken)
    left = f", {skipped} skipped" if skipped else ""
    print(f"{len(jobs) - failed} as promised, {failed} broken{left}, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


async def _matrix(name: str, quick: bool) -> tuple[Row, list[str]]:
    row = await run(name, long.QUICK if quick else long.LONG)
    return row, complaints(row)
