"""
The smoke test's own script, against a real stack: TLS, HTTP/2, tokens, and a restart under its streams.

In a cluster `make deploy` starts it, as a Job.
"""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from k8s.deploy import self_signed
from tests.k8s.rendered import ROOT
from tests.live import eventually

pytestmark = pytest.mark.timeout(180)


class Smoke:
    """The script as a process."""

    def __init__(self, stack: Any, stop: Path, **env: str) -> None:
        pods = " ".join(f"127.0.0.1:{app.port}" for app in stack.apps)
        env = {"SMOKE_URL": stack.url, "SMOKE_PODS": pods, "SMOKE_STOP_FILE": str(stop), "PYTHONPATH": str(ROOT)} | env
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "k8s/smoke/smoke.py")], env={"PATH": os.environ["PATH"]} | env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        self.lines += []
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def holds(self) -> bool:
        assert self.process.poll() is None, self.lines
        return "holding" in self.lines

    def end(self) -> int:
        code = self.process.wait(90)
        self._reader.join()
        return code

    def close(self) -> None:
        self.process.kill()
        self._reader.join()


@pytest.fixture
def smoke():
    started = []

    def start(*arguments: Any, **env: str) -> Smoke:
        started.append(Smoke(*arguments, **env))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_every_check(stack, smoke, tmp_path, require):
    """All pass over TLS with HTTP/1.1 and HTTP/2, with a token, while every process is restarted in its turn."""
    require("openssl")
    subprocess.run(["sh", str(ROOT / ".make/nginx.sh")], check=True, capture_output=True)
    for name, text in self_signed().items():
        (tmp_path / name).write_text(text)
    secret, stop = tmp_path / "secret", tmp_path / "stop"
    secret.write_text("k" * 40 + "\n")
    made = stack(
        apps=2,
        env={"SSE_AUTH": "jwt", "SSE_JWT_SECRET_FILE": str(secret), "SSE_JWT_AUDIENCE": "sse", "SSE_JWT_ISSUER": "us", "SSE_HEARTBEAT_SECONDS": "1", "SSE_DRAIN_SECONDS": "1"},
        nginx_binary=str(ROOT / ".cache/nginx/nginx"),
        nginx_options={"tls": tmp_path, "files": {"exempt.conf": ""}},
    )
    run = smoke(made, stop, SMOKE_JWT_SECRET_FILE=str(secret), SMOKE_JWT_AUDIENCE="sse", SMOKE_JWT_ISSUER="us")
    eventually(run.holds, "the streams are held", 60)
    for app in made.apps:
        app.restart()
    stop.touch()

    assert 0 == run.end(), run.lines
    assert [
        "HTTP/1.1: head, first event, heartbeat",
        "HTTP/2: head, first event, heartbeat",
        "from pod to pod",
        "resume by id",
        "held streams miss nothing",
        "a limit answers 429",
    ] == [line.partition("ok      ")[2] for line in run.lines if line.startswith("ok")]
    assert any(re.fullmatch(r"  \(\d+ events, each read by 4 streams\)", line) for line in run.lines), run.lines
