"""
Show a run: a table for people, JSON for programs.
"""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from .figures import LIMITS, Check, Figure, Verdict, check, make_figure, ratio
from .peers import Peer
from .scenario import FULL, Results, Size


def describe_machine() -> dict[str, object]:
    """
    Return what the figures depend on: processor, cores, memory, kernel, Python.
    """
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


class Report:
    """
    A finished run.
    """

    def __init__(
        self,
        results: Results,
        size: Size,
        peers: Sequence[Peer],
        versions: dict[str, str],
        absent: dict[str, str],
        machine: dict[str, object],
        client: str,
        rows: set[str],
        seconds: float,
    ) -> None:
        self.results = results
        self.size = size
        self.peers = list(peers)
        self.versions = versions
        self.absent = absent
        self.machine = machine
        self.client = client
        self.seconds = seconds
        self.date = datetime.now(UTC).replace(microsecond=0)
        self.figures: dict[str, dict[str, Figure]] = {
            row: {peer: make_figure(samples) for peer, samples in by_peer.items()}
            for row, by_peer in results.samples.items()
        }
        self.checks: list[Check] = [check(limit, results.samples, versions, full=size.name == FULL.name) for limit in LIMITS if limit.row in rows]

    @property
    def broken(self) -> list[Check]:
        """
        The checks that fail the run.
        """
        return [c for c in self.checks if c.verdict in (Verdict.BROKEN, Verdict.VOID)]

    def figure(self, row: str, peer: str) -> Figure | None:
        """
        Return one figure, or None when it was not measured.
        """
        return self.figures.get(row, {}).get(peer)

    def as_json(self) -> dict[str, object]:
        """
        Return everything, samples included.
        """
        return {
            "format": 1,
            "date": self.date.isoformat(),
            "seconds": round(self.seconds),
            "size": self.size.name,
            "settings": {name: getattr(self.size, name) for name in self.size.__slots__ if name != "name"},
            "machine": self.machine,
            "client": self.client,
            "peers": {peer.name: {"title": peer.title, "version": self.versions[peer.name]} for peer in self.peers},
            "absent": self.absent,
            "rows": {
                row: {
                    peer: {
                        "median": _round(figure.median),
                        "low": _round(figure.low),
                        "high": _round(figure.high),
                        "samples": [_round(s.value) for s in self.results.samples[row][peer]],
                        "void": figure.void,
                        "faults": figure.faults,
                        "extra": {name: _round(value) for name, value in figure.extra.items()},
                    }
                    for peer, figure in by_peer.items()
                }
                for row, by_peer in self.figures.items()
            },
            "checks": [
                {
                    "row": c.limit.row,
                    "figure": c.limit.text,
                    "value": _round(c.figure.median) if c.figure and c.figure.count else None,
                    "low": _round(c.figure.low) if c.figure and c.figure.count else None,
                    "high": _round(c.figure.high) if c.figure and c.figure.count else None,
                    "limit": c.limit.limit,
                    "aim": c.limit.aim,
                    "verdict": c.verdict.value,
                    "reason": c.reason,
                }
                for c in self.checks
            ],
            "notes": self.results.notes,
        }

    def as_text(self) -> str:
        """
        Return the tables, as Markdown that also reads well in a terminal.
        """
        machine = self.machine
        where = (
            f"{self.date:%Y-%m-%d %H:%M} UTC, {self.size.name} run of {self.seconds / 60:.0f} minutes,"
            f" {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB,"
            f" {machine['kernel']}, Python {machine['python']}, load client in {self.client}."
        )
        lines = [where, ""]
        lines += _table(self._peer_rows())
        lines.append("")
        if self.checks:
            lines += _table(self._check_rows())
            lines.append("")
        growth = self._growth_lines()
        lines += growth
        lines += [f"* {peer.name}: {self.versions[peer.name]}" for peer in self.peers]
        lines += [f"* {name}: skipped. {why}" for name, why in self.absent.items()]
        lines += [f"* note: {note}" for note in self.results.notes]
        return "\n".join(lines).rstrip() + "\n"

    def _peer_rows(self) -> list[list[str]]:
        columns = (
            (f"CPU µs a delivery, {self.size.single_rate:g}/s", "single", 1.0, 2),
            (f"CPU µs a delivery, {self.size.sparse_rate:g}/s", "sparse", 1.0, 2),
            ("p50 ms", "latency_p50", 1.0, 1),
            ("p99 ms", "latency_p99", 1.0, 1),
            ("deliveries/s, bursts", "burst", 1.0, 0),
            ("CPU µs, bursts", "burst_cpu", 1.0, 2),
            ("CPU µs a connect", "connect", 1.0, 0),
            ("CPU µs a reconnect", "reconnect", 1.0, 0),
            ("KB a stream", "pss", 1.0, 1),
            ("idle CPU ms/s", "idle", 1.0, 1),
            ("longest hold ms", "hold", 1.0, 1),
            ("first token ms", "first_token", 1.0, 2),
        )
        shown = [column for column in columns if self.figures.get(column[1])]
        compared = {name for name in ("single", "sparse") if self.results.samples.get(name, {}).get("floor")}
        head = ["server"]
        for title, name, *_ in shown:
            head += [title, "÷ floor"] if name in compared else [title]
        rows = [head]
        for peer in self.peers:
            row = [f"{peer.title} (`{peer.name}`)"]
            for _, name, scale, digits in shown:
                row.append(_cell(self.figure(name, peer.name), scale, digits))
                if name in compared:
                    samples = self.results.samples[name]
                    row.append(
                        _cell(ratio(samples[peer.name], samples["floor"]), 1.0, 2) if samples.get(peer.name) else ""
                    )
            rows.append(row)
        return rows

    def _check_rows(self) -> list[list[str]]:
        rows = [["figure", "value", "limit", "aim", "verdict"]]
        for c in self.checks:
            sign = "≥" if c.limit.at_least else "≤"
            value = _cell(c.figure, 1.0, c.limit.digits) if c.figure and c.figure.count else ""
            verdict = c.verdict.value + (f": {c.reason}" if c.reason else "")
            rows.append(
                [
                    f"{c.limit.row}: {c.limit.text}",
                    value,
                    f"{sign} {_plain(c.limit.limit)}",
                    _plain(c.limit.aim),
                    verdict,
                ]
            )
        return rows

    def _growth_lines(self) -> list[str]:
        lines = []
        few, many = self.size.scale_streams
        for peer in ("app", "floor"):
            small, large = self.figure("scale_few", peer), self.figure("scale_many", peer)
            if small and large and small.count and large.count:
                lines.append(
                    f"* {peer}, two processes: {small.median:.2f} µs a delivery at {few:,} streams,"
                    f" {large.median:.2f} at {many:,}"
                )
        first, last = self.figure("churn_first", "app"), self.figure("churn_last", "app")
        if first and last:
            lines.append(
                f"* app: {first.median:.1f} MB after {self.size.churn[0]:,} connects and disconnects,"
                f" {last.median:.1f} MB after {self.size.churn[1]:,}"
            )
        hold = self.figure("hold", "app")
        if hold and "own_longest_since_start" in hold.extra:
            lines.append(
                "* app: longest hold that it noticed itself since its start, connects included:"
                f" {hold.extra['own_longest_since_start']:.1f} ms"
            )
        direct, added = self.figure("first_token", "upstream"), self.figure("first_token_added", "app")
        if direct and added and direct.count and added.count:
            lines.append(
                f"* first token of a run: {direct.median:.2f} ms from the upstream itself;"
                f" through the kit {added.median:.2f} ms more"
            )
        return lines


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def _cell(figure: Figure | None, scale: float, digits: int) -> str:
    if figure is None:
        return ""
    if figure.faults:
        return "faulty"
    if not figure.counts:
        return "void"
    text = f"{figure.median * scale:,.{digits}f}"
    if figure.count > 1:
        text += f" ({figure.low * scale:,.{digits}f} to {figure.high * scale:,.{digits}f})"
    return text


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if number == 0:
            marks = ["-" * width if place == 0 else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
            lines.append(f"| {' | '.join(marks)} |")
    return lines
