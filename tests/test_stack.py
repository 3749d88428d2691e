"""The stack on one machine: what `make up` promises, and what tests rely on."""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app import stack as module
from app.stack import ROOT, Redis, Stack, StackError, identity, reserve_port


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for *condition*; fail if it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def status(url: str) -> int:
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.status


def publish(url: str, topic: str, data: str) -> None:
    body = json.dumps({"topics": [topic], "data": data}).encode()
    request = urllib.request.Request(f"{url}/publish", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as response:
        assert response.status == 201


def subscribe(url: str, topic: str) -> http.client.HTTPResponse:
    """Open a stream and return it behind its first event."""
    response = urllib.request.urlopen(f"{url}/events?topic={topic}", timeout=10)
    while response.readline() != b"\n":
        pass
    return response


def start(port: int, path: str) -> dict:
    """Start the task `checksums`, and return what its last event says."""
    body = json.dumps({"kind": "task", "task": "checksums", "arguments": {"path": path}}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/runs", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.loads([line for line in response.read().splitlines() if line.startswith(b"data: {")][-1][6:])


def group(pid: int) -> list[int]:
    """Return the processes of the group that *pid* leads, without zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) == pid:
            found.append(int(entry.name))
    return found


def target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


@pytest.fixture
def run(require, monkeypatch, tmp_path: Path) -> Iterator[Path]:
    """Let `up` and `down` work in a folder of the test's own; nothing stays, even if it fails."""
    require("nginx")
    require("redis-server", "valkey-server")
    monkeypatch.setattr(module, "RUN", tmp_path / ".run")
    yield tmp_path / ".run"
    for port in module._ports():
        module.down(port)


def pids(run: Path, port: int) -> dict[str, int]:
    return {path.stem: int(path.read_text().split()[0]) for path in (run / str(port)).glob("*.pid")}


class TestStack:
    def test_whole(self, stack):
        """What is published at one process arrives at the other, and through nginx."""
        kit = stack(apps=2)
        streams = [subscribe(url, "t") for url in (kit.apps[1].url, kit.url)]

        publish(kit.apps[0].url, "t", "hello")

        for stream in streams:
            while b"data: hello\n" != stream.readline():  # a timeout ends it
                pass
            stream.close()
        assert 200 == status(kit.apps[0].metrics_url)

    def test_alone(self, stack):
        """One process without Redis and nginx is a stack, too."""
        kit = stack(apps=1, redis=False, nginx=False, env={"SSE_HEARTBEAT_SECONDS": "1"})

        assert kit.url == kit.apps[0].url
        assert kit.redis is None
        assert kit.nginx is None
        assert 200 == status(f"{kit.url}/readyz")

    def test_settings_of_the_caller_stay_out(self, stack, monkeypatch):
        """A test's stack has the settings that the test gives, wherever it runs."""
        monkeypatch.setenv("SSE_HEARTBEAT_SECONDS", "not a number")

        assert 200 == status(f"{stack(apps=1, redis=False, nginx=False).url}/readyz")

    def test_restart_keeps_the_address(self, stack):
        """A killed process comes back where nginx looks for it."""
        kit = stack(apps=1)
        before = kit.apps[0].pid

        kit.apps[0].restart(signal.SIGKILL)

        assert before != kit.apps[0].pid
        assert 200 == status(f"{kit.url}/readyz")

    def test_redis_keeps_its_data(self, redis_server: Redis):
        """A restarted Redis has what it had: it writes to its own folder."""
        with socket.create_connection(("127.0.0.1", redis_server.port), 5) as connection:
            connection.sendall(b"SET a 1\r\n")
            assert b"+OK\r\n" == connection.recv(64)

        redis_server.restart()

        with socket.create_connection(("127.0.0.1", redis_server.port), 5) as connection:
            connection.sendall(b"GET a\r\n")
            assert b"$1\r\n1\r\n" == connection.recv(64)

    def test_scaled_directives(self, stack):
        """Tests may scale the ladder of nginx.conf down; a misspelt directive is refused."""
        kit = stack(apps=1, redis=False, nginx_directives={"proxy_read_timeout": "2s"})

        assert "proxy_read_timeout 2s;" in (kit.directory / "nginx/snippets/sse-proxy.conf").read_text()
        with pytest.raises(StackError, match="proxy_raed"):
            stack(apps=1, redis=False, nginx_directives={"proxy_raed_timeout": "2s"})

    def test_failing_part(self, tmp_path: Path):
        """Whoever waits for a broken process sees why, and nothing is left."""
        kit = Stack(apps=2, redis=False, nginx=False, env={"SSE_HEARTBEAT_SECONDS": "-1"}, directory=tmp_path)

        with pytest.raises(StackError, match=r"app-1 must stay up, but ended with 2(.|\n)*SSE_HEARTBEAT_SECONDS"):
            kit.start()

        assert not any(part.alive for part in kit.parts)

    def test_thread_that_ends(self):
        """Started from a thread that ends, a stack lives on."""
        kit = Stack(apps=1, redis=False, nginx=False)
        thread = threading.Thread(target=kit.start)
        thread.start()
        thread.join()
        try:
            time.sleep(0.3)  # that nothing happens has no condition to wait for

            assert kit.apps[0].alive
        finally:
            kit.close()

    @pytest.mark.skipif("sys.platform != 'linux'", reason="only Linux ends children with their parent")
    def test_killed_parent(self, require):
        """A test runner that is killed leaves nothing behind, not even nginx's workers."""
        require("nginx")
        program = textwrap.dedent("""
            from app.stack import Stack
            kit = Stack(apps=2).start()
            print(kit.directory, *(part.pid for part in kit.parts), flush=True)
            input()
        """)
        parent = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        folder, *numbers = parent.stdout.readline().split()
        running = [pid for number in numbers for pid in group(int(number))]
        assert len(running) == 6  # Redis, two processes, nginx and its two workers
        parent.kill()
        parent.communicate()

        until(lambda: not any(identity(pid) for pid in running))

        subprocess.run(["rm", "-r", folder], check=True)  # nobody is left to do it


class TestPorts:
    def test_reserved(self):
        """Two runs beside each other never choose the same port."""
        reserved = [reserve_port() for _ in range(50)]

        assert 50 == len({port for port, _ in reserved})
        for _, holder in reserved:
            if holder:
                holder.close()

    def test_identity(self):
        """A process is itself, and neither a zombie nor another one later."""
        child = subprocess.Popen(["sleep", "60"])
        mine = identity(child.pid)

        assert mine
        assert mine == identity(child.pid)
        assert mine != identity(os.getpid())
        child.kill()
        until(lambda: identity(child.pid) is None)  # a zombie until the next line
        child.wait()


class TestUp:
    def test_printed_commands(self, run: Path, free_port: int):
        """The two commands that `up` prints work as printed, and `down` leaves nothing."""
        text = module.up(free_port, 2, {})
        listen, send = (shlex.split(line) for line in re.findall(r"(?m)^  (curl .*)$", text))
        everything = [pid for part in pids(run, free_port).values() for pid in group(part)]

        with subprocess.Popen(listen, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as curl:
            while b"event: stream.open\n" != curl.stdout.readline():
                pass
            sent = json.loads(subprocess.run(send, capture_output=True, check=True).stdout)
            received = b""
            while b"data: hello\n" not in received:
                received += curl.stdout.readline()
            said = module.down(free_port)
            curl.wait(5)

        assert f"http://localhost:{free_port}/" in text
        assert f"id: {sent['ids'][0]}\n".encode() in received
        assert f"The stack on port {free_port} is down." == said
        # 0: the stream was ended, not cut, although it was open.
        assert 0 == curl.returncode
        assert 6 == len(everything)
        assert not [pid for pid in everything if identity(pid)]
        assert [] == list(run.iterdir())

    def test_twice(self, run: Path, free_port: int):
        """The second time says that it runs, and starts nothing."""
        module.up(free_port, 1, {})
        before = pids(run, free_port)

        assert module.up(free_port, 1, {}).startswith("It runs already, with 1 application process")
        assert before == pids(run, free_port)

    def test_task_to_try(self, run: Path, free_port: int):
        """The task of the page runs out of the box, over the kit's own files and no others."""
        module.up(free_port, 1, {})

        told = {path: start(free_port, path) for path in ("parser.py", "..", "../.run")}

        digest = hashlib.sha256((ROOT / "app/parser.py").read_bytes()).hexdigest()
        assert [{"path": "parser.py", "bytes": (ROOT / "app/parser.py").stat().st_size, "sha256": digest}] == (
            told["parser.py"]["files"]
        )
        assert {"invalid"} == {told[path]["reason"] for path in ("..", "../.run")}

    def test_no_task(self, run: Path, free_port: int, monkeypatch):
        """Whoever sets SSE_TASK_ROOT is heard, also where it is empty."""
        chosen = []
        monkeypatch.setattr(module, "Stack", lambda **options: chosen.append(options["env"]) or 1 / 0)
        for env in ({}, {"SSE_TASK_ROOT": ""}, {"SSE_TASK_ROOT": "/srv"}):
            with pytest.raises(ZeroDivisionError):
                module.up(free_port, 1, env)

        assert [str(ROOT / "app"), "", "/srv"] == [env["SSE_TASK_ROOT"] for env in chosen]

    def test_status(self, run: Path, free_port: int):
        """`status` tells every port on which something answers, those of the metrics too."""
        module.up(free_port, 2, {})

        text, well = module.status(free_port)

        assert well
        rows = [line.split() for line in text.splitlines()]
        assert ["PART", "PID", "PORT", "METRICS", "STATE"] == rows[0]
        assert ["redis", "app-1", "app-2", "nginx"] == [row[0] for row in rows[1:5]]
        for row in rows[2:4]:
            assert "ready" == row[4]
            assert 200 == status(f"http://127.0.0.1:{row[2]}/readyz")
            assert 200 == status(f"http://127.0.0.1:{row[3]}/metrics")

    def test_second_stack(self, run: Path, free_port: int):
        """Two stacks live beside each other, and each ends alone."""
        other, holder = reserve_port()
        holder.close()
        module.up(free_port, 1, {})
        module.up(other, 1, {})

        stream = subscribe(f"http://127.0.0.1:{other}", "t")
        publish(f"http://127.0.0.1:{free_port}", "t", "not for you")
        module.down(free_port)
        publish(f"http://127.0.0.1:{other}", "t", "for you")

        while not (line := stream.readline()).startswith(b"data:"):
            pass
        assert b"data: for you\n" == line
        stream.close()

    def test_port_in_use(self, run: Path):
        """Whoever holds the port is named, and nothing is left."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]

            with pytest.raises(StackError, match=rf"{port} is in use by .*pid {os.getpid()}.*PORT={port + 1}"):
                module.up(port, 1, {})

        assert [] == list(run.iterdir())

    def test_wrong_setting(self, run: Path, free_port: int):
        """The sentence of the application reaches the terminal, and nothing is left."""
        with pytest.raises(StackError, match="SSE_HEARTBEAT_SECONDS must be"):
            module.up(free_port, 2, {"SSE_HEARTBEAT_SECONDS": "0"})

        assert [] == list(run.iterdir())

    def test_part_that_ended(self, run: Path, free_port: int):
        """Half a stack is neither running nor absent: `status` and `up` say which part ended."""
        module.up(free_port, 2, {})
        os.kill(pids(run, free_port)["app-2"], signal.SIGKILL)
        until(lambda: not identity(pids(run, free_port)["app-2"]))

        text, well = module.status(free_port)

        assert not well
        assert re.search(r"app-2 .* ended", text)
        assert re.search(r"app-1 .* ready", text)
        with pytest.raises(StackError, match="app-2 does not run"):
            module.up(free_port, 2, {})


    @pytest.mark.parametrize("last", ["redis", "app-1", "app-2", "nginx"])
    def test_killed_half_way(self, run: Path, free_port: int, last: str):
        """What a killed `up` left is neither running nor absent, and `down` ends all of it."""
        program = f"import app.stack as s, pathlib; s.RUN = pathlib.Path({str(run)!r}); s.up({free_port}, 2, {{}})"
        with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as shell:
            # It is killed while the process exists, and before it is more than started.
            until((run / str(free_port) / f"{last}.pid").exists)
            shell.kill()
        if last != "nginx":
            with pytest.raises(StackError, match="nginx does not run"):
                module.up(free_port, 2, {})
            assert not module.status(free_port)[1]

        module.down(free_port)

        assert [] == list(run.iterdir())
        assert [] == [link for link in Path("/proc").glob("[0-9]*/cwd") if str(run) in target(link)]


class TestDown:
    def test_nothing_there(self, run: Path, free_port: int):
        """Ending what does not run is no error."""
        assert f"Nothing of this clone runs on port {free_port}." == module.down(free_port)

    def test_recycled_pid(self, run: Path, free_port: int):
        """A process that has the number of an ended one is left alone."""
        module.up(free_port, 1, {})
        stranger = subprocess.Popen(["sleep", "60"])
        path = run / str(free_port) / "app-1.pid"
        original, mark = path.read_text().split(maxsplit=1)
        path.write_text(f"{stranger.pid} {mark}")

        module.down(free_port)

        assert stranger.poll() is None
        stranger.kill()
        stranger.wait()
        os.kill(int(original), signal.SIGKILL)  # down could not know it

    def test_workers_of_a_killed_nginx(self, run: Path, free_port: int):
        """What a killed part left behind ends, too."""
        module.up(free_port, 1, {})
        nginx = pids(run, free_port)["nginx"]
        workers = [pid for pid in group(nginx) if pid != nginx]
        os.kill(nginx, signal.SIGKILL)

        module.down(free_port)

        assert 2 == len(workers)
        until(lambda: not any(identity(pid) for pid in workers))

    def test_process_that_hangs(self, run: Path, free_port: int, monkeypatch):
        """A process that does not end is killed after its time, with a word."""
        monkeypatch.setattr(module, "STOP_SECONDS", 0.2)
        module.up(free_port, 1, {"SSE_DRAIN_SECONDS": "0.1"})
        application = pids(run, free_port)["app-1"]
        os.kill(application, signal.SIGSTOP)

        module.down(free_port)

        assert identity(application) is None


class TestMain:
    """What `make` hands on, as somebody typed it."""

    @pytest.mark.parametrize("command", ["up", "down", "status", "logs", "feed"])
    @pytest.mark.parametrize("text", ["abc", "", "0", "65536", "-5", "8080 9090", "8080.5", "٣", "1" * 5000])
    def test_port(self, run: Path, capsys, command: str, text: str):
        """A PORT that is none is one sentence with name, rule, value and cure, and nothing is touched."""
        assert 1 == module.main([command, f"--port={text}"])

        said = capsys.readouterr()
        assert ("", 1) == (said.out, said.err.count("\n"))
        assert said.err == f"PORT must be a whole number from 1 to 65535, got {text!r}. Such as PORT=8080.\n"
        assert not run.exists()

    def test_apps(self, run: Path, capsys):
        """The same for APPS."""
        assert 1 == module.main(["up", "--apps=65"])

        assert capsys.readouterr().err == "APPS must be a whole number from 1 to 64, got '65'. Such as APPS=2.\n"
        assert not run.exists()

    @pytest.mark.parametrize("command", ["up", "down", "status", "logs", "feed"])
    def test_as_make_calls_it(self, command: str):
        """Every target hands PORT on in one piece."""
        shown = subprocess.run(
            ["make", "-n", command, "PORT=8080 9090"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

        assert '--port="8080 9090"' in shown


@contextlib.contextmanager
def feeding(run: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run `make feed` as a process of its own; nothing of it stays, even if the test fails."""
    program = (
        f"import sys, app.stack as s, pathlib; s.RUN = pathlib.Path({str(run)!r}); "
        f"sys.exit(s.main(['feed', '--port={port}']))"
    )
    feed = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield feed
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(feed.pid, signal.SIGKILL)
        feed.wait()


@pytest.mark.skipif("sys.platform == 'win32'", reason="tail")
class TestFeed:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_end(self, run: Path, free_port: int, number: signal.Signals):
        """However it is told to end, `tail` and the publisher end with it."""
        module.up(free_port, 1, {})
        with feeding(run, free_port) as feed:
            until(lambda: 3 == len(group(feed.pid)))
            os.kill(feed.pid, number)

            assert 0 == feed.wait(30)
            assert [] == group(feed.pid)
        assert [] == list((run / str(free_port)).glob("feed-*"))

    def test_down(self, run: Path, free_port: int):
        """`down` ends the feeds of its own stack, all of them."""
        module.up(free_port, 1, {})
        with feeding(run, free_port) as feed, feeding(run, free_port) as other:
            until(lambda: 3 == len(group(feed.pid)) == len(group(other.pid)))
            text, well = module.status(free_port)
            assert well
            assert 2 == len(re.findall(r"(?m)^feed .* runs$", text))

            module.down(free_port)

            assert [0, 0] == [feed.wait(30), other.wait(30)]
            assert [] == group(feed.pid) + group(other.pid)
        assert [] == list(run.iterdir())

    def test_nothing_to_feed(self, run: Path, free_port: int):
        """Without a stack it says so, and leaves nothing."""
        with pytest.raises(StackError, match=rf"none does\. Start it: make up PORT={free_port}\."):
            module.feed(free_port, "logs")

        assert not run.exists()

    def test_own_access_log(self, run: Path, free_port: int):
        """Requests to the stack appear in the topic `logs` as they are logged, and do not loop."""
        module.up(free_port, 1, {})
        url = f"http://127.0.0.1:{free_port}"
        stream = subscribe(url, "logs")
        with feeding(run, free_port):
            # tail -F begins at the end of the file: ask until it has begun.
            found: list[dict] = []

            def read() -> None:
                with contextlib.suppress(OSError, ValueError):  # the stream ends with the test
                    found.extend(json.loads(line[6:]) for line in stream if line.startswith(b'data: {"time"'))

            threading.Thread(target=read, daemon=True).start()
            asked: list[int] = []
            until(lambda: asked.append(status(f"{url}/healthz?n=1")) or found)
            time.sleep(0.5)  # a loop would go on by itself

        assert {"/healthz"} == {line["path"] for line in found}
        assert len(found) <= len(asked)
