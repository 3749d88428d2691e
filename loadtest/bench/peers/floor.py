"""
The floor: floor.c, a bare epoll loop.
"""

from pathlib import Path

from ..compiler import build, find_compiler
from ..process import Server, answers, free_port
from ..publisher import HttpPublisher
from .base import HEARTBEAT_SECONDS, Absent, Peer, Running


class Floor(Peer):
    """
    The least any server can do on this kernel.
    """

    name = "floor"
    title = "C, a bare epoll loop"
    label = "C, the floor"
    scales = True

    def version(self) -> str:
        """
        Name the compiler.
        """
        compiler = find_compiler()
        if compiler is None:
            raise Absent("the floor needs a C compiler: apt-get install gcc libc6-dev")
        return f"compiled by {compiler} -O2"

    def start(self, folder: Path, *, processes: int = 1, heartbeat: int = HEARTBEAT_SECONDS) -> Running:
        """
        Start one program for each process.
        """
        program = build("floor")
        if program is None:
            raise Absent("the floor needs a C compiler: apt-get install gcc libc6-dev")
        servers, publishers, addresses = [], [], []
        for number in range(processes):
            port = free_port()
            server = Server("floor", [str(program), str(port), str(heartbeat)], log=folder / f"floor{number}.log")
            server.wait_until(answers(port))
            servers.append(server)
            addresses.append(("127.0.0.1", port))
            publishers.append(HttpPublisher(port, self._render))

        def publish(burst: list[str]) -> None:
            for publisher in publishers:
                publisher.publish(burst)

        closers = [publisher.end for publisher in publishers] + [server.end for server in servers]
        return Running(addresses, "/events", publish, [*servers], closers)

    @staticmethod
    def _render(burst: list[str]) -> list[tuple[str, dict[str, str], bytes]]:
        return [("/publish", {}, "\n".join(burst).encode())]
