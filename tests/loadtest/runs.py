"""
Whole runs of the load test, from the command line, against a server that faults on purpose.
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from app.stack import reserve_port

ROOT = Path(__file__).parents[2]
# One topic that all streams have, so that each event is sent to each stream.
SCENARIO = """
[truth]
about = "Every event to every stream."
streams = 8
streams_per_topic = {per}
rate = {rate}
connects_per_second = 50
publish_when_open = true
stages = [{stages}]
{more}
"""


class Truth:
    """A server that faults, in a process of its own."""

    def __init__(self, faults: dict[str, Any]) -> None:
        self.port, self._holder = reserve_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, str(ROOT / "tests/loadtest/truth_server.py"), str(self.port), json.dumps(faults)]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.truth()
                return
            time.sleep(0.05)
        raise TimeoutError("the truth server does not answer")

    def truth(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.url}/truth", timeout=5) as answer:
            return json.load(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._holder is not None:
            self._holder.close()


def processes_of(run: "Run") -> dict[int, int]:
    """Return the processes that work for a run, and their parents; they name its folder."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(run.folder / "results").encode() in (folder / "cmdline").read_bytes():
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    found[int(folder.name)] = int(parent)
    return found


RUNNING: list["Run"] = []


class Run:
    """One run of the command line."""

    def __init__(
        self, folder: Path, url: str, *more: str, per: int = 0, rate: float = 20, seconds: float = 3,
        scenario: str = "", stages: str = "", program: tuple[str, ...] = ("loadtest",), stdout: int = subprocess.PIPE,
    ) -> None:  # fmt: skip
        self.folder = folder
        stages = stages or f"{{ streams = 1.0, seconds = {seconds} }}"
        (folder / "scenarios.toml").write_text(SCENARIO.format(per=per, rate=rate, stages=stages, more=scenario))
        command = [
            sys.executable, "-m", *program, "--host", url, "--scenario", "truth",
            "--scenarios", str(folder / "scenarios.toml"), "--results", str(folder / "results"), *more,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE if stdout != subprocess.PIPE else subprocess.STDOUT,
            text=True, bufsize=1,
        )  # fmt: skip
        RUNNING.append(self)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or self.process.stderr or ():
            self.lines.append(line.rstrip("\n"))

    def until(self, text: str, seconds: float = 60) -> None:
        """Wait for a line of progress that has *text*, a regular expression."""
        deadline = time.monotonic() + seconds
        while not any(re.search(text, line) for line in self.lines):
            assert time.monotonic() < deadline, self.output
            assert self.process.poll() is None, self.output
            time.sleep(0.05)

    def end(self, seconds: float = 90) -> int:
        code = self.process.wait(seconds)
        self._reader.join()
        return code

    def close(self) -> None:
        """End the run, if its test did not."""
        if self.process.poll() is None:
            for _ in range(2):  # the second ends it at once
                self.process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            self.process.kill()
        self._reader.join()

    @property
    def code(self) -> int | None:
        """The exit code, after `end`."""
        return self.process.returncode

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "results/result.json").read_text())

    @property
    def figures(self) -> dict[str, Any]:
        return self.result["figures"]


# On a machine with every core busy a generator is late; that is what this says, elsewhere.
BUSY = "--thresholds=lag_p99_ms<=60000,cpu_percent<=200"
PATIENT = f"{BUSY},delivery_p99_ms<=60000,publish_delay_p99_ms<=60000"
TOPIC = "loadtest__0"


@contextlib.contextmanager
def all_at_once(names: Iterable[str], start: Callable[[str], tuple[Run, Truth]]) -> Iterator[dict[str, tuple[Run, Truth]]]:
    """Start one run for each name, wait for all, and end their servers afterwards: they wait more than they compute."""
    found = {name: start(name) for name in names}
    for run, _ in found.values():
        run.end()
    yield found
    for _, truth in found.values():
        truth.close()


def wrong_with_runs(run: Run) -> dict[str, float]:
    """Return what a load test of runs found wrong; nothing where every token came once, and every run ended."""
    names = "tokens_lost", "tokens_duplicate", "tokens_out_of_order", "runs_failed", "runs_unended", "runs_unjudged"
    return {name: run.figures[name] for name in names if run.figures[name] != 0}
