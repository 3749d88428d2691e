"""
Break each guarantee on purpose, and see its test fail.

    make test-mutations                       all
    make test-mutations ONLY=handoff          those whose name contains it
    make test-mutations LIST=1                names alone
    make test-mutations CHECK=1               do they fit the tree? Runs no test

The mutations are data, one file per area beside this one: name, file, the text
to replace, its replacement, and the test that must turn red. Each runs in a
copy of the tree; the tree itself is never touched.
"""

import argparse
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

import yaml

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
    """
    Return why *mutation* would prove nothing about the tree as it is, or None.

    A file that no longer parses turns any test red that reads it.
    """
    path = root / mutation.file
    if not path.is_file():
        return f"{mutation.file} does not exist"
    text = path.read_text()
    count = text.count(mutation.old)
    if count != 1:
        return f"its text stands {count} times in {mutation.file}, must be once"
    if mutation.old == mutation.new:
        return "it changes nothing"
    try:
        _parse(path.suffix, text.replace(mutation.old, mutation.new))
    except (SyntaxError, ValueError, yaml.YAMLError) as error:
        return f"it leaves {mutation.file} unreadable: {error}"
    return _absent(mutation.test, root)


def _parse(suffix: str, text: str) -> None:
    parsers: dict[str, Callable[[str], object]] = {
        ".py": lambda text: compile(text, "mutated", "exec", dont_inherit=True),
        ".json": json.loads,
        ".toml": tomllib.loads,
        ".yaml": lambda text: list(yaml.safe_load_all(text)),
    }
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        parsers.get(suffix, str)(text)


def _absent(test: str, root: Path) -> str | None:
    """Return what pytest's arguments *test* name that is not there: a file, a class, a test."""
    arguments = shlex.split(test)
    words = re.findall(r"\w+", arguments[arguments.index("-k") + 1]) if "-k" in arguments else []
    known: set[str] = set()
    for argument in arguments:
        if not argument.startswith("tests/"):
            continue
        file, *names = argument.partition("[")[0].split("::")
        if not (root / file).is_file():
            return f"{file} does not exist"
        known |= _tests(root / file)
        if names and "::".join(names) not in _tests(root / file):
            return f"{file} has no {'::'.join(names)}"
    # Words without an underscore may be those of a parameter.
    lost = [word for word in words if "_" in word and not any(word in name for name in known)]
    return f"no test there is called {lost[0]}" if lost else None


@cache
def _tests(file: Path) -> set[str]:
    """Return the names in *file*: `function`, `Class` and `Class::method`."""
    return set(_names(ast.parse(file.read_text()).body, ""))


def _names(body: list[ast.stmt], prefix: str) -> list[str]:
    found = []
    for each in body:
        if isinstance(each, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(prefix + each.name)
        if isinstance(each, ast.ClassDef):
            found += _names(each.body, f"{prefix}{each.name}::")
    return found


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
                ".git", ".venv", ".python", ".run", ".hypothesis", ".cache", "__pycache__", ".*_cache", "results"
            ),
        )
        if (_ROOT / ".cache").exists():  # programs for tests, which no mutation touches
            (copy / ".cache").symlink_to(_ROOT / ".cache")
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
    parser.add_argument("--check", action="store_true", help="only tell whether they fit the tree")
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
    faults = [f"{m.area}/{m.name}: {why}" for m in chosen if (why := fault(m)) is not None]
    if faults or options.check:
        print(*faults, f"{len(chosen) - len(faults)} fit the tree, {len(faults)} do not", sep="\n")
        return 1 if faults else 0
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
