"""
The usual Quart recipe on Hypercorn: generator and queue.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..process import Server, answers, free_port
from ..publisher import HttpPublisher, json_body
from .base import HEARTBEAT_SECONDS, TOPIC, Absent, Peer, Running

PROGRAMS = Path(__file__).with_name("programs")


def render_burst(burst: list[str]) -> list[tuple[str, dict[str, str], bytes]]:
    """
    Put a burst into one post, as both Python recipes take it.
    """
    body = json_body({"topic": TOPIC, "burst": burst})
    return [("/publish", {"Content-Type": "application/json"}, body)]


class QuartRecipe(Peer):
    """
    What Quart's users write, on the server they run it with. It sends no heartbeats.
    """

    name = "quart"
    title = "Quart recipe: generator and queue"
    label = "Quart recipe"
    heartbeats = False
    run_request = ("/chat", {"prompt": "Hello"})

    def version(self) -> str:
        """
        Name the installed versions.
        """
        try:
            return f"quart {version('quart')}, hypercorn {version('hypercorn')}, uvloop {version('uvloop')}"
        except PackageNotFoundError as error:
            raise Absent(f"the Quart recipe needs {error.name}: run make install") from None

    def start(
        self, folder: Path, *, processes: int = 1, heartbeat: int = HEARTBEAT_SECONDS, upstream: str = ""
    ) -> Running:
        """
        Start one Hypercorn without workers of its own.
        """
        port = free_port()
        command = [sys.executable, "-m", "hypercorn", "--worker-class", "uvloop", "--workers", "0"]
        command += ["--bind", f"127.0.0.1:{port}", "--backlog", "4096", "quart_recipe_app:app"]
        environment = {**os.environ, "UPSTREAM": upstream}
        server = Server("quart", command, log=folder / "quart.log", env=environment, cwd=PROGRAMS)
        server.wait_until(answers(port))
        publisher = HttpPublisher(port, render_burst)
        return Running(
            [("127.0.0.1", port)],
            f"/events?topic={TOPIC}",
            publisher.publish,
            [server],
            [publisher.end, server.end],
        )
