"""
The face all servers of the benchmark show.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..process import Watched

TOPIC = "bench"
HEARTBEAT_SECONDS = 15


class Absent(RuntimeError):
    """
    A peer is not on this machine; the text says how to install it.
    """


@dataclass(slots=True)
class Running:
    """
    A peer that runs.
    """

    # Where its streams are, and under which path.
    addresses: list[tuple[str, int]]
    path: str
    # Publishes a burst; with several processes, to all of them.
    publish: Callable[[list[str]], None]
    # The programs whose CPU and memory are the peer's.
    programs: list[Watched]
    # Ends whatever was started.
    closers: list[Callable[[], None]]
    # Where the server tells its own figures, if it does.
    metrics_ports: tuple[int, ...] = ()
    # Paths with tokens, for a server that wants to know who asks; streams share them evenly.
    paths: tuple[str, ...] = ()

    def cpu(self) -> float:
        """
        Return the CPU seconds of all its programs.
        """
        return sum(program.cpu() for program in self.programs)

    def cpu_by_program(self) -> dict[str, float]:
        """
        Return the CPU seconds of each program.
        """
        seconds: dict[str, float] = {}
        for program in self.programs:
            seconds[program.name] = seconds.get(program.name, 0.0) + program.cpu()
        return seconds

    def pss(self) -> int:
        """
        Return the proportional set size of its programs, in bytes.
        """
        return sum(program.pss() for program in self.programs)

    def end(self) -> None:
        """
        End everything that was started.
        """
        for close in self.closers:
            close()


class Peer(ABC):
    """
    One way to serve event streams.
    """

    name: str
    # For tables, and shorter for the chart.
    title: str
    label: str
    # Whether a client that comes back is sent what it missed.
    resumes = False
    # Whether it differs from another peer once its streams are open.
    fans_out = True
    # Whether it sends heartbeats to silent streams.
    heartbeats = True
    # Whether `start` can make several processes that carry the same topic.
    scales = False
    # What is posted for a run: path and body; None: it makes none. Then `start` takes
    # the upstream's URL.
    run_request: tuple[str, dict[str, str]] | None = None

    @abstractmethod
    def version(self) -> str:
        """
        Return the versions of its programs; raise Absent when one is not here.
        """

    @abstractmethod
    def start(self, folder: Path, *, processes: int = 1, heartbeat: int = HEARTBEAT_SECONDS) -> Running:
        """
        Start it on free ports of the loopback, its files under *folder*.
        """
