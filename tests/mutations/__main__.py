"""
Break each guarantee on purpose, and see its test fail.

    make test-mutations                       all
    make test-mutations ONLY=handoff          those whose name contains it
    make test-mutations LIST=1                names alone

The mutations are data, one file per area beside this one: name, file, the text
to replace, its replacement, and the test that must turn red. Each runs in a
copy of the tree; the tree itself is never touched.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_LIMIT_SECONDS = 300


@dataclass(frozen=True)
class Mutation:
    """One guard to break, and the test that guards the guard."""

    area: str
    name: str
    file: str
    old: str
    new: str
    test: str


def mutations() -> list[Mutation]:
    """Return all mutations of all areas, in the order of their files."""
    return [
        Mutation(path.stem, **fields)
        for path in sorted(_HERE.glob("*.toml"))
        for fields in tomllib.loads(path.read_text())["mutation"]
    ]


def guarantees() -> dict[str, list[str]]:
    """Return each guarantee of the README, with the names of mutations that prove its tests."""
    named: dict[str, list[str]] = tomllib.loads((_HERE / "faults.toml").read_text())["guarantees"]
    return named


def fault(mutation: Mutation, root: Path = _ROOT) -> str | None:
    """Return why *mutation* cannot be applied to the tree as it is, or None."""
    path = root / mutation.file
    if not path.is_file():
        return f"{mutation.file} does not exist"
    count = path.read_text().count(mutation.old)
    if count != 1:
        return f"its text stands {count} times in {mutation.file}, must be once"
    if mutation.old == mutation.new:
        return "it changes nothing"
    return None


def caught(mutation: Mutation, whole: bool = False) -> tuple[bool, str]:
    """
    Run the test against the broken copy; return whether it failed, and its last lines.

    *whole* leaves the copy as it is: a test that fails there proves nothing.
    """
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(
            _ROOT,
            copy,
            ignore=shutil.ignore_patterns(
                ".git", ".venv", ".python", ".run", ".hypothesis", "__pycache__", ".*_cache", "results"
            ),
        )
        if not whole:
            target = copy / mutation.file
            target.write_text(target.read_text().replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        try:
            run = subprocess.run(
                [*command, *shlex.split(mutation.test)],
                cwd=copy,
                capture_output=True,
                text=True,
                timeout=_LIMIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True, f"no end in {_LIMIT_SECONDS} s"
        # 1: tests failed. Anything else (no tests, wrong name) proves nothing.
        return run.returncode == 1, "\n".join(run.stdout.splitlines()[-15:])


def judged(mutation: Mutation) -> tuple[Mutation, bool, str]:
    """Return whether *mutation* is caught by a test that passes without it."""
    why = fault(mutation)
    if why is not None:
        return mutation, False, why
    with _sound_lock:
        sound = _sound.setdefault(mutation.test, Future())
        first = not sound.running() and not sound.done() and sound.set_running_or_notify_cancel()
    if first:
        sound.set_result(caught(mutation, whole=True))
    red, output = sound.result()
    if red:
        return mutation, False, f"its test fails without it:\n{output}"
    return mutation, *caught(mutation)


# Each test runs once on the whole tree, however many mutations name it.
_sound: dict[str, Future[tuple[bool, str]]] = {}
_sound_lock = Lock()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.split("\n")[1])
    parser.add_argument("--only", default="", help="those whose area or name contains this")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [m for m in mutations() if options.only in f"{m.area}/{m.name}"]
    if not chosen:
        print(f"--only must name a mutation, got {options.only!r}. See --list.", file=sys.stderr)
        return 2
    if options.list:
        for mutation in chosen:
            print(f"{mutation.area}/{mutation.name}: {mutation.test}")
        return 0
    survived = 0
    began = time.monotonic()

    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (mutation, red, output) in enumerate(pool.map(judged, chosen), 1):
            survived += not red
            print(
                f"{number:3}/{len(chosen)} {'caught  ' if red else 'SURVIVED'} {mutation.area}/{mutation.name}",
                flush=True,
            )
            if not red:
                print("    " + output.replace("\n", "\n    "), flush=True)
    print(f"{len(chosen) - survived} caught, {survived} survived, {time.monotonic() - began:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
