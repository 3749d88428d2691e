"""
sse-starlette on uvicorn, in an environment of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..compiler import cache_folder
from ..process import Server, answers, free_port
from ..publisher import HttpPublisher
from .base import HEARTBEAT_SECONDS, TOPIC, Absent, Peer, Running
from .quart_recipe import PROGRAMS, render_burst

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"


def find_python() -> str | None:
    """
    Return an interpreter that can import sse-starlette: the bench's own, else ours.
    """
    for python in (str(cache_folder() / "venv" / "bin" / "python"), sys.executable):
        if os.access(python, os.X_OK):
            done = subprocess.run([python, "-c", "import sse_starlette, uvicorn"], capture_output=True, check=False)
            if done.returncode == 0:
                return python
    return None


def install() -> None:
    """
    Make the environment from the hashed requirements, if it is not there.
    """
    folder = cache_folder() / "venv"
    made_from = folder / "made-from.txt"
    if made_from.exists() and made_from.read_bytes() == REQUIREMENTS.read_bytes():
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--require-hashes"]
    subprocess.run([*command, "-r", str(REQUIREMENTS)], check=True, stdout=sys.stderr)
    made_from.write_bytes(REQUIREMENTS.read_bytes())


class SseStarlette(Peer):
    """
    The library most Python services use, on uvicorn as its own extra installs it.

    `sse-starlette[uvicorn]` brings neither uvloop nor httptools.
    """

    name = "sse-starlette"
    title = "sse-starlette on uvicorn"
    label = "sse-starlette"
    loop = "asyncio"
    parser = "h11"

    def version(self) -> str:
        """
        Name the installed versions.
        """
        python = find_python()
        if python is None:
            raise Absent("sse-starlette is not installed: run python -m loadtest.bench --install")
        names = repr(("sse-starlette", "uvicorn", self.parser, *(["uvloop"] if self.loop == "uvloop" else [])))
        code = f"from importlib.metadata import version as v; print(*(n + ' ' + v(n) for n in {names}), sep=', ')"
        return subprocess.check_output([python, "-c", code], text=True).strip()

    def start(self, folder: Path, *, processes: int = 1, heartbeat: int = HEARTBEAT_SECONDS) -> Running:
        """
        Start one uvicorn.
        """
        python = find_python()
        if python is None:
            raise Absent("sse-starlette is not installed: run python -m loadtest.bench --install")
        port = free_port()
        command = [python, "-m", "uvicorn", "--loop", self.loop, "--http", self.parser]
        command += ["--host", "127.0.0.1", "--port", str(port), "--backlog", "4096"]
        command += ["--no-access-log", "--log-level", "warning", "sse_starlette_app:app"]
        server = Server(
            "uvicorn",
            command,
            log=folder / "uvicorn.log",
            cwd=PROGRAMS,
            env={**os.environ, "PING_SECONDS": str(heartbeat)},
        )
        server.wait_until(answers(port))
        publisher = HttpPublisher(port, render_burst)
        return Running(
            [("127.0.0.1", port)],
            f"/events?topic={TOPIC}",
            publisher.publish,
            [server],
            [publisher.end, server.end],
        )


class SseStarletteUvloop(SseStarlette):
    """
    The same on the fastest loop and parser that uvicorn has.
    """

    name = "sse-starlette-uvloop"
    title = "sse-starlette on uvicorn, uvloop"
    label = "sse-starlette, uvloop"
    loop = "uvloop"
    parser = "httptools"
