"""
Watch the processes of the local stack: CPU, memory and descriptors of every part.

Reads /proc and the files that `make up` keeps; on a machine without them it sees nothing.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
# A process of one thread at this share of a core has no more to give.
FULL_CPU_PERCENT = 90.0
FULL_DESCRIPTORS = 0.97
FULL_MACHINE_PERCENT = 95.0


@dataclass(slots=True)
class Process:
    """One process of a part, and what was seen of it."""

    part: str
    pid: int
    ticks: int = 0
    cpu_percent: float = 0.0
    held_percents: list[float] = field(default_factory=list)
    memory_before: int = 0
    memory: int = 0
    descriptors: int = 0
    descriptors_limit: int = 0


def _text(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text()
    return ""


def _ticks(pid: int) -> int:
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) if len(fields) > 12 else 0


def memory(pid: int) -> int:
    """Return the bytes that a process has for itself, with its share of what is shared (PSS)."""
    for line in _text(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _children(pid: int) -> list[int]:
    return [int(child) for child in _text(f"/proc/{pid}/task/{pid}/children").split()]


def _limit(pid: int) -> int:
    for line in _text(f"/proc/{pid}/limits").splitlines():
        if line.startswith("Max open files"):
            word = line.split()[3]
            return int(word) if word.isdigit() else 0
    return 0


def _descriptors(pid: int) -> int:
    with suppress(OSError):
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return 0


def _sockets_memory() -> int:
    """Return the bytes of all TCP buffers of this machine's kernel."""
    for line in _text("/proc/net/sockstat").splitlines():
        if line.startswith("TCP:"):
            return int(line.split()[-1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _machine_ticks() -> tuple[int, int]:
    """Return the ticks that the machine was busy, and all."""
    fields = [int(word) for word in _text("/proc/stat").partition("\n")[0].split()[1:]]
    return sum(fields) - sum(fields[3:5]), sum(fields[:8])


class Watch:
    """
    The parts of the stack in *folder*, and this process and its children as `generator`.
    """

    def __init__(self, folder: Path) -> None:
        self.processes = [Process("generator", pid) for pid in (os.getpid(), *_children(os.getpid()))]
        for path in sorted(folder.glob("*.pid")):
            with suppress(OSError, ValueError):
                pid = int(path.read_text().split()[0])
                name = path.stem
                # nginx's master does nothing; its workers are it.
                pids = _children(pid) if name == "nginx" else [pid]
                self.processes += [Process(name, each) for each in pids]
        for process in self.processes:
            process.ticks = _ticks(process.pid)
            process.memory_before = memory(process.pid)
            process.descriptors_limit = _limit(process.pid)
        self._at = time.monotonic()
        self._machine = _machine_ticks()
        self._machine_percent = 0.0
        self._kernel_before = self._kernel = _sockets_memory()

    def sample(self, held: bool) -> None:
        """Look at all processes; *held* marks the time in which a load is held."""
        now = time.monotonic()
        for process in self.processes:
            ticks = _ticks(process.pid)
            process.cpu_percent = 100 * max(0, ticks - process.ticks) / TICKS / max(1e-9, now - self._at)
            process.ticks = ticks
            if held:
                process.held_percents.append(process.cpu_percent)
                process.descriptors = max(process.descriptors, _descriptors(process.pid))
        busy, total = _machine_ticks()
        self._machine_percent = 100 * (busy - self._machine[0]) / max(1, total - self._machine[1])
        self._machine = (busy, total)
        self._at = now

    def weigh(self) -> None:
        """Measure memory; it takes milliseconds per process, so not at every sample."""
        for process in self.processes:
            process.memory = max(process.memory, memory(process.pid))
        self._kernel = max(self._kernel, _sockets_memory())

    def busiest(self) -> dict[str, float]:
        """Return the CPU of the busiest process of each part, in percent of a core."""
        found: dict[str, float] = {}
        for process in self.processes:
            found[process.part] = round(max(found.get(process.part, 0.0), process.cpu_percent), 1)
        return found | {"machine": round(self._machine_percent, 1)}

    def cause(self) -> str:
        """Return which part is at its limit, in words; "" if none is."""
        for process in self.processes:
            if process.descriptors_limit and process.descriptors > FULL_DESCRIPTORS * process.descriptors_limit:
                return f"{process.part} has {process.descriptors:,} of {process.descriptors_limit:,} descriptors"
        worst = max(self.processes, key=lambda process: process.cpu_percent)
        if worst.cpu_percent > FULL_CPU_PERCENT:
            return f"CPU of {worst.part} at {worst.cpu_percent:.0f} % of a core"
        if self._machine_percent > FULL_MACHINE_PERCENT:
            parts = sorted(self.busiest().items(), key=lambda item: -item[1])
            shares = ", ".join(f"{name} {percent:.0f} %" for name, percent in parts if name != "machine")
            ours = sum(process.cpu_percent for process in self.processes)
            others = self._machine_percent * (os.cpu_count() or 1) - ours
            if others > ours:
                return f"the machine is full of other programs, {others:.0f} % of a core, beside {ours:.0f} % of ours"
            return f"CPU of the machine at {self._machine_percent:.0f} %, of a core each: {shares}"
        return ""

    def end(self, streams: int) -> list[dict[str, Any]]:
        """Return a row per part, with the memory that each of *streams* cost it."""
        self.weigh()
        rows: dict[str, dict[str, Any]] = {}
        for process in self.processes:
            row = rows.setdefault(
                process.part,
                {"part": process.part, "processes": 0, "cpu_percent": 0.0, "cpu_max_percent": 0.0, "memory_mb": 0.0,
                 "grown": 0, "descriptors": 0},
            )  # fmt: skip
            row["processes"] += 1
            held = process.held_percents or [0.0]
            row["cpu_percent"] += sum(held) / len(held)
            row["cpu_max_percent"] = max(row["cpu_max_percent"], *held)
            row["memory_mb"] += process.memory / 1e6
            row["grown"] += max(0, process.memory - process.memory_before)
            row["descriptors"] = max(row["descriptors"], process.descriptors)
        found = list(rows.values())
        found.append(
            {"part": "kernel (TCP buffers)", "processes": 0, "cpu_percent": None, "cpu_max_percent": None,
             "memory_mb": self._kernel / 1e6, "grown": max(0, self._kernel - self._kernel_before), "descriptors": 0}
        )  # fmt: skip
        for row in found:
            row["kb_per_stream"] = round(row.pop("grown") / 1000 / streams, 2) if streams else None
            for name in ("cpu_percent", "cpu_max_percent", "memory_mb"):
                if row[name] is not None:
                    row[name] = round(row[name], 1)
        return found
