"""
The whole stack on one machine: Redis, N application processes, nginx.

Two uses of the same parts. `make up` leaves them running on their own and
remembers them in `.run/PORT/`, so that `make down` ends exactly what was
started. Tests and benchmarks use `Stack` as a context manager: what it starts
dies with them, even if they crash.

Standard library only: this runs before anything else works. It reads the
environment because it hands it on to the processes that it starts.
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import functools
import grp
import http.client
import json
import os
import pwd
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

ROOT = Path(__file__).resolve().parent.parent
# Where `make up AUTH=jwt` keeps the secret of its stack, and `make token` finds it.
_SECRET = "jwt-secret"
RUN = ROOT / ".run"
LINUX = sys.platform == "linux"

# A machine with every core busy takes some seconds to start Python twice.
READY_SECONDS = 60.0
# nginx and Redis end in milliseconds, unless something is very wrong.
STOP_SECONDS = 10.0
# What `make up` gives streams to end in, unless SSE_DRAIN_SECONDS says
# otherwise: nobody wants to wait 45 s for `make down` on a laptop.
LOCAL_DRAIN_SECONDS = "2"
# What the task `checksums` may read there, so that it can be tried: the kit's own
# files, which are no secret. SSE_TASK_ROOT chooses another folder, or none.
LOCAL_TASK_ROOT = str(ROOT / "app")


class StackError(Exception):
    """
    The stack cannot do what was asked.

    The text is for the person at the terminal: what, why, and the cure.
    """


# --- Tools and ports


def find_tool(*names: str) -> str:
    """
    Return the path of the first of *names* that is installed.

    A variable chooses another one: NGINX_BINARY=/opt/nginx, REDIS_SERVER_BINARY=...

    Raises:
        StackError: none is.
    """
    # Debian keeps servers in sbin, which is not on an ordinary user's PATH.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin"])
    for name in names:
        chosen = os.environ.get(f"{name.upper().replace('-', '_')}_BINARY", name)
        if found := shutil.which(chosen, path=path):
            return found
    wanted = " or ".join(names)
    raise StackError(
        f"{wanted} must be installed, found none on PATH. `make up` installs it on Debian and "
        f"Ubuntu; elsewhere use the system's package manager (macOS: brew install {names[0].removesuffix('-server')})."
    )


def reserve_port() -> tuple[int, socket.socket | None]:
    """
    Choose a free TCP port of 127.0.0.1 and keep it from everybody else.

    The socket is bound but does not listen. On Linux a server may bind beside
    it (both use SO_REUSEADDR), while the kernel gives the port to no other
    program and to no outgoing connection, also during a restart of the server.
    Close it when the port is no longer needed. Elsewhere there is no such way,
    and the port is only likely to stay free.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    if LINUX:
        return port, holder
    holder.close()
    return port, None


def check_port_free(port: int) -> None:
    """
    Raise StackError with the holder's name if somebody listens on *port*.
    """
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            # Connections of an ended server still linger for a minute; only a
            # listener counts.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except PermissionError:
                raise StackError(f"PORT must be one that you may open, got {port}. Use 1024 or higher.") from None
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    continue  # no IPv6 on this machine
                raise StackError(
                    f"PORT must be free, but {port} is in use by {_port_holder(port)}. "
                    f"Use another one: make up PORT={port + 1}."
                ) from None


def _port_holder(port: int) -> str:
    if LINUX:
        inodes = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            with contextlib.suppress(OSError):
                for line in Path(table).read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                        inodes.add(f"socket:[{fields[9]}]")
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                if os.readlink(link) in inodes:
                    pid = link.parts[2]
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                    return f"`{words.decode(errors='replace').strip()[:80]}` (pid {pid})"
    elif lsof := shutil.which("lsof"):
        command = [lsof, "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fcp"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        if len(found) > 1:
            return f"`{found[1][1:]}` (pid {found[0][1:]})"
    return "another process"


# --- Processes


def identity(pid: int) -> str | None:
    """
    Return a text that no other process has, not even a later one with *pid*.

    None if no process has *pid*, or only a zombie.
    """
    if LINUX:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            # The name may hold spaces and parentheses; the fields after it not.
            fields = stat.rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"
    command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return None if not found or found[0].startswith("Z") else " ".join(found[1:])


# prctl's PR_SET_PDEATHSIG counts the *thread* that started a child as its
# parent. Tests start stacks from threads that soon end, so one thread that
# lives as long as the process starts all children.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stack-starter")
_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


def _in_child(parent: int, death_signal: int, pid_path: Path | None) -> None:
    # 10,000 streams are 20,000 descriptors in nginx; the usual limit is 1,024.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if death_signal and LINUX:
        _libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
    if pid_path:
        # By the child itself, before it becomes the program: whoever kills
        # `make up`, at whatever moment, leaves no process that `make down`
        # does not know. The lock of `up` is held until then, too.
        pid_path.write_text(f"{os.getpid()} {identity(os.getpid())}")


class Part:
    """
    One process of the stack: its command, its log, its life.
    """

    # Sent when the process that made a Stack dies.
    death_signal = signal.SIGKILL

    def __init__(self, name: str, directory: Path, *, port: int | None = None, detached: bool = False) -> None:
        self.name = name
        self.directory = directory
        self.log_path = directory / f"{name}.log"
        self.detached = detached
        self.process: subprocess.Popen[bytes] | None = None
        self._holders: list[socket.socket] = []
        self.port = port or self._reserve()

    def command(self) -> list[str]:
        """Return the program and its arguments."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Return the environment of the process."""
        return dict(os.environ)

    def probe(self) -> bool:
        """Return whether the process does its work."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """Where the process answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process's id; an error before the first start."""
        assert self.process is not None, f"{self.name} was never started"
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process and return at once."""
        if self.alive:
            raise StackError(f"{self.name} must not run yet, but has pid {self.pid}. Stop it first.")
        self.process = self._spawn() if self.detached else _starter.submit(self._spawn).result()

    def _spawn(self) -> subprocess.Popen[bytes]:
        death_signal = 0 if self.detached else self.death_signal
        pid_path = self.directory / f"{self.name}.pid" if self.detached else None
        with self.log_path.open("ab") as log, self._open_stdout() as stdout:
            return subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                cwd=self.directory,
                env=self.environment(),
                start_new_session=True,  # Ctrl-C in the terminal is not for it
                preexec_fn=functools.partial(_in_child, os.getpid(), death_signal, pid_path),  # noqa: PLW1509 (no locks in it)
            )

    def wait_ready(self, timeout: float = READY_SECONDS) -> None:
        """
        Return when the process does its work.

        Raises:
            StackError: it ended or was not ready within *timeout* seconds;
                with the last lines of its log.
        """
        deadline = time.monotonic() + timeout
        while not (self.probe() and self.alive):
            if not self.alive:
                code = self.process.returncode if self.process else None
                raise StackError(f"{self.name} must stay up, but ended with {code}.{self._last_lines()}")
            if time.monotonic() > deadline:
                raise StackError(f"{self.name} must be ready within {timeout:g} s, but is not.{self._last_lines()}")
            time.sleep(0.03)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """
        Send a signal; for SIGKILL, to the whole process group, and wait for the end.
        """
        if self.process is None:
            return
        if number != signal.SIGKILL:
            self.process.send_signal(number)
            return
        # The group: a killed nginx master would leave its workers behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, timeout: float = STOP_SECONDS) -> int:
        """
        End the process by SIGTERM, after *timeout* seconds by SIGKILL; return its exit code.
        """
        if self.process is None:
            return 0
        self.kill(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        self.kill()
        return self.process.wait()

    def restart(self, number: int = signal.SIGTERM, timeout: float = READY_SECONDS) -> None:
        """
        End the process with a signal, start it again on the same port, wait until it is ready.
        """
        self.kill(number)
        if self.process is not None:
            self.process.wait(timeout)
        self.start()
        self.wait_ready(timeout)

    def log(self) -> str:
        """Return what the process has written so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def close(self) -> None:
        """Kill the process and give its ports back."""
        self.kill()
        self.release()

    def release(self) -> None:
        """Give the ports back; a process that listens keeps its own."""
        while self._holders:
            self._holders.pop().close()

    def _reserve(self) -> int:
        port, holder = reserve_port()
        if holder is not None:
            self._holders.append(holder)
        return port

    def _open_stdout(self) -> IO[bytes]:
        return self.log_path.open("ab")

    def _last_lines(self, count: int = 15) -> str:
        lines = self.log().splitlines()[-count:]
        return f" Its log ({self.log_path.name}) ends:\n" + "\n".join(f"  {line}" for line in lines)


class Redis(Part):
    """
    A Redis or Valkey of our own: own directory, own port, no configuration of the system.
    """

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        name: str = "redis",
        detached: bool = False,
        binary: str | None = None,
    ) -> None:
        super().__init__(name, directory, detached=detached)
        self.binary = binary or find_tool("redis-server", "valkey-server")
        self.arguments = list(arguments)
        self.data = directory / f"{name}-data"
        self.data.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        """What SSE_REDIS_URL takes."""
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        """Return the program and its arguments."""
        return [
            self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--daemonize", "no",
            "--dir", str(self.data), "--save", "", "--appendonly", "yes",
            "--maxmemory-policy", "noeviction", *self.arguments,
        ]  # fmt: skip

    def probe(self) -> bool:
        """Return whether it answers PING; it does not while it loads its file."""
        return _pongs(self.port)


class App(Part):
    """
    One `python -m app`.

    `env` may be changed between `kill` and `start`.
    """

    def __init__(self, name: str, directory: Path, env: Mapping[str, str], *, detached: bool = False) -> None:
        super().__init__(name, directory, detached=detached)
        self.metrics_port = self._reserve()
        self.env = dict(env)

    @property
    def metrics_url(self) -> str:
        """Where Prometheus reads."""
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    def command(self) -> list[str]:
        """Return the program and its arguments."""
        return [sys.executable, "-m", "app"]

    def environment(self) -> dict[str, str]:
        """Return the environment: ours without its own settings, plus `env`."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SSE_")}
        return (
            inherited
            | {
                "PYTHONPATH": str(ROOT),
                "PYTHONUNBUFFERED": "1",
                "SSE_PORT": str(self.port),
                "SSE_METRICS_PORT": str(self.metrics_port),
            }
            | self.env
        )

    def probe(self) -> bool:
        """Return whether it is ready."""
        return _status(f"127.0.0.1:{self.port}", "/readyz") == 200


class Nginx(Part):
    """
    nginx with the kit's own files, byte for byte, in front of the applications.

    Only what differs from place to place is generated: addresses, processes,
    and who is exempt from the limits: this machine. `tls` names a folder with
    tls.crt and tls.key: then it speaks TLS, HTTP/1.1 and HTTP/2. Tests that
    scale the timeout ladder down replace values of directives
    (`directives={"proxy_read_timeout": "2s"}`), and give whole files other
    contents (`files={"exempt.conf": ""}`: nobody is exempt).
    """

    # SIGKILL would leave its workers; SIGTERM ends them at once.
    death_signal = signal.SIGTERM

    def __init__(
        self,
        directory: Path,
        servers: Sequence[str],
        *,
        port: int | None = None,
        binary: str | None = None,
        directives: Mapping[str, str] | None = None,
        detached: bool = False,
        tls: Path | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__("nginx", directory, port=port, detached=detached)
        self.metrics_port = self._reserve()
        self.binary = binary or find_tool("nginx")
        self.access_log_path = directory / "access.log"
        self.servers = list(servers)
        self.directives = dict(directives or {})
        self.tls = tls
        self.files = dict(files or {})
        self.prefix = directory / "nginx"

    @property
    def url(self) -> str:
        """Where the process answers."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """Return the program and its arguments."""
        # A root-started nginx changes to another user, who can't read a
        # directory of root's; all of this stack runs as whoever started it.
        user = f" user {pwd.getpwuid(0).pw_name} {grp.getgrgid(0).gr_name};" if os.geteuid() == 0 else ""
        return [
            self.binary, "-p", f"{self.prefix}/", "-c", str(self.prefix / "nginx.conf"),
            "-e", "stderr", "-g", f"daemon off;{user}",
        ]  # fmt: skip

    def start(self) -> None:
        """Write the configuration and start nginx."""
        self.write()
        super().start()

    def write(self) -> None:
        """Write the configuration; SIGHUP makes a running nginx take it."""
        source = ROOT / "nginx"
        missing = set(self.directives)
        for path in (*source.glob("*.conf"), *source.glob("snippets/*.conf")):
            text = path.read_text()
            for name, value in self.directives.items():
                text, count = re.subn(rf"(?m)^(\s*{re.escape(name)}\s+)[^;]+;", rf"\g<1>{value};", text)
                if count:
                    missing.discard(name)
            target = self.prefix / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        if missing:
            raise StackError(f"directives must name ones of nginx/, got {', '.join(sorted(missing))!r}.")
        listen = (source / ("listen.tls.conf" if self.tls else "listen.conf")).read_text()
        (self.prefix / "listen.conf").write_text(self._listen(listen))
        (self.prefix / "listen-metrics.conf").write_text(f"listen 127.0.0.1:{self.metrics_port};\n")
        (self.prefix / "exempt.conf").write_text("127.0.0.0/8 1;\n::1 1;\n")
        if "upstream.conf" not in self.files:
            (self.prefix / "upstream.conf").write_text(self._upstream())
        for name, text in self.files.items():
            (self.prefix / name).write_text(text)
        if self.tls:
            (self.prefix / "tls").mkdir(exist_ok=True)
            for name in ("tls.crt", "tls.key"):
                shutil.copyfile(self.tls / name, self.prefix / "tls" / name)

    def probe(self) -> bool:
        """Return whether it answers; the applications may not yet."""
        return _status(f"127.0.0.1:{self.metrics_port}", "/livez") == 200

    def _upstream(self) -> str:
        # The generator that Kubernetes and people use, too.
        command = ["sh", str(ROOT / "nginx/upstream.sh"), "static", *self.servers]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def _listen(self, shipped: str) -> str:
        line = re.search(r"(?m)^listen (8080|8443)( .*)?;$", shipped)
        assert line, "nginx/listen.conf and nginx/listen.tls.conf must hold `listen PORT ...;`"
        text = line[2] or ""
        if not LINUX:  # neither works the same way there
            text = re.sub(r" reuseport| so_keepalive=\S+", "", text)
        rest = "".join(f"{other}\n" for other in shipped.splitlines() if re.match("[a-z]", other) and other != line[0])
        if self.tls and nginx_version(self.binary) < (1, 25, 1):  # as listen.tls.conf says
            text, rest = text.replace(" ssl", " ssl http2"), rest.replace("http2 on;\n", "")
        addresses = [f"127.0.0.1:{self.port}"]
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))  # `localhost` is ::1 first in most browsers
            addresses.append(f"[::1]:{self.port}")
        return "".join(f"listen {address}{text};\n" for address in addresses) + rest

    def _open_stdout(self) -> IO[bytes]:
        # nginx.conf writes the access log to /dev/stdout.
        return self.access_log_path.open("ab")


@functools.cache
def nginx_version(binary: str) -> tuple[int, ...]:
    """Return the version of *binary*, as `(1, 30, 6)`."""
    said = subprocess.run([binary, "-v"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"nginx/([0-9.]+)", said)
    if not found:
        raise StackError(f"nginx must say its version, but `{binary} -v` said {said!r}.")
    return tuple(int(number) for number in found[1].split("."))


def _status(address: str, path: str, *, tls: bool = False) -> int | None:
    connection = http.client.HTTPConnection(address, timeout=2)
    if tls:  # our own process on our own port: nothing to verify
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(address, timeout=2, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _pongs(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")
    return False


# --- The stack


class Stack:
    """
    Redis, applications and nginx, wired together.

    Args:
        apps: how many application processes.
        env: extra SSE_ variables of every application; others that this
            process has are not handed on.
        redis: False keeps the log in memory (sensible with one application).
        nginx: False leaves nginx out; `url` is then the first application's.
        port: nginx's port; None takes a free one.
        directory: logs and data; None makes a temporary one and removes it.
        nginx_binary: another nginx than the one on PATH.
        nginx_directives: values to replace in nginx's files, by directive.
        nginx_options: other keywords of `Nginx`: `tls`, `files`.
        detached: the processes outlive this one (`make up`).

    All parts are made, with their ports, before any is started, so a test may
    start some of them by hand. As a context manager it starts all and waits.
    """

    def __init__(
        self,
        *,
        apps: int = 2,
        env: Mapping[str, str] | None = None,
        redis: bool = True,
        nginx: bool = True,
        port: int | None = None,
        directory: Path | str | None = None,
        nginx_binary: str | None = None,
        nginx_directives: Mapping[str, str] | None = None,
        nginx_options: Mapping[str, Any] | None = None,
        detached: bool = False,
    ) -> None:
        self._temporary = directory is None
        self.directory = Path(directory or tempfile.mkdtemp(prefix="sse-stack-")).resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.redis = Redis(self.directory, detached=detached) if redis else None
        base = {"SSE_REDIS_URL": self.redis.url} if self.redis else {}
        self.apps = [
            App(f"app-{number}", self.directory, base | dict(env or {}), detached=detached)
            for number in range(1, apps + 1)
        ]
        self.nginx = None
        if nginx:
            servers = [f"127.0.0.1:{app.port}" for app in self.apps]
            self.nginx = Nginx(
                self.directory, servers, port=port, binary=nginx_binary,
                directives=nginx_directives, detached=detached, **(nginx_options or {}),
            )  # fmt: skip

    @property
    def parts(self) -> list[Part]:
        """All parts in the order of their start."""
        return [part for part in (self.redis, *self.apps, self.nginx) if part is not None]

    @property
    def url(self) -> str:
        """Where clients go: nginx, or without it the first application."""
        return self.nginx.url if self.nginx else self.apps[0].url

    def start(self, timeout: float = READY_SECONDS) -> Self:
        """
        Start every part in order and return when all are ready.

        Raises:
            StackError: one is not; nothing is left running.
        """
        try:
            groups: list[list[Part]] = [[*self.apps]]
            if self.redis:
                groups.insert(0, [self.redis])
            if self.nginx:
                groups.append([self.nginx])
            for group in groups:
                for part in group:
                    part.start()
                for part in group:
                    part.wait_ready(timeout)
            if self.nginx and (status := self._status_through_nginx()) != 200:
                raise StackError(
                    f"nginx must reach the application, but /readyz answered {status}." + self.nginx._last_lines()
                )
        except BaseException:
            self.close()
            raise
        return self

    def _status_through_nginx(self) -> int | None:
        assert self.nginx is not None
        return _status(f"127.0.0.1:{self.nginx.port}", "/readyz", tls=self.nginx.tls is not None)

    def close(self) -> None:
        """Kill all parts, in the order in which `down` ends them."""
        for part in (*self.apps, self.nginx, self.redis):
            if part is not None:
                part.close()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def logs(self) -> str:
        """Return all logs with headings, for a failed test's report."""
        return "\n".join(f"--- {part.log_path.name}\n{part.log()}" for part in self.parts)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


# --- What runs on its own: `make up` and its relatives


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """
    Hold *directory*, which is made if need be, against another `up` or `down`.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Whoever held it may have removed it: then the lock is on nothing.
        with contextlib.suppress(OSError):
            if directory.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def _read_state(directory: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((directory / "state.json").read_text())
    except (OSError, ValueError):
        return None
    for part in state["parts"]:
        with contextlib.suppress(OSError, ValueError):
            pid, part["identity"] = (directory / f"{part['name']}.pid").read_text().split(maxsplit=1)
            part["pid"] = int(pid)
    return state


def _write_state(stack: Stack, stop_seconds: float) -> None:
    # Before anything is started; each process adds its own number, in NAME.pid.
    parts = [
        {
            "name": part.name, "port": part.port, "metrics_port": getattr(part, "metrics_port", None),
            "log": str(part.log_path), "pid": 0, "identity": None,
        }
        for part in stack.parts
    ]  # fmt: skip
    (stack.directory / "state.json").write_text(
        json.dumps({"version": 1, "stop_seconds": stop_seconds, "parts": parts}, indent=1)
    )


def _runs(part: Mapping[str, Any]) -> bool:
    return part["identity"] is not None and identity(part["pid"]) == part["identity"]


def up(port: int, apps: int, env: Mapping[str, str], auth: str = "none") -> str:
    """
    Start a stack that outlives this process; return what to tell the user.

    With *auth* "jwt" it asks for tokens, signed with a secret made here.
    """
    directory = RUN / str(port)
    env = {"SSE_DRAIN_SECONDS": LOCAL_DRAIN_SECONDS, "SSE_TASK_ROOT": LOCAL_TASK_ROOT} | dict(env)
    try:
        stop_seconds = float(env["SSE_DRAIN_SECONDS"]) + STOP_SECONDS
    except ValueError:
        stop_seconds = STOP_SECONDS  # the application will say what is wrong
    with _locked(directory):
        if state := _read_state(directory):
            running = [part["name"] for part in state["parts"] if _runs(part)]
            missing = [part["name"] for part in state["parts"] if part["name"] not in running]
            if running and not missing:
                return f"It runs already, with {_processes(len(running) - 2)}: {_address(port)}"
            if running:
                raise StackError(
                    f"The stack on port {port} must be whole or absent, but {', '.join(missing)} does not run. "
                    f"Logs are in {directory}. End the rest: make down{_port_argument(port)}."
                )
            _remove(directory)  # a restarted machine leaves this
        try:
            check_port_free(port)
            if auth == "jwt":
                env |= {"SSE_AUTH": "jwt", "SSE_JWT_SECRET_FILE": str(_write_secret(directory))}
            stack = Stack(apps=apps, env=env, port=port, directory=directory, detached=True)
            _write_state(stack, stop_seconds)
            stack.start()
        except BaseException:
            _remove(directory)
            directory.rmdir()
            raise
        for part in stack.parts:
            part.release()
    return _welcome(port, apps, auth)


def _write_secret(directory: Path) -> Path:
    path = directory / _SECRET
    path.touch(0o600)
    path.write_text(secrets.token_hex(32) + "\n")
    return path


def _remove(directory: Path) -> None:
    """Empty *directory*; the lock on it stays."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _address(port: int) -> str:
    return f"http://localhost:{port}/"


def _port_argument(port: int) -> str:
    return "" if port == 8080 else f" PORT={port}"


def _processes(count: int) -> str:
    return "1 application process" if count == 1 else f"{count} application processes"


def _welcome(port: int, apps: int, auth: str) -> str:
    address, argument = _address(port), _port_argument(port)
    if auth == "jwt":
        return f"""\
Redis, {_processes(apps)} and nginx are ready, and ask for tokens: {address}

Make one that may read and publish the topic `demo`:
  TOKEN=$(make -s token{argument} SUB=alice SUBSCRIBE=demo PUBLISH=demo)
Read a stream, and leave it running:
  curl -N -H "Authorization: Bearer $TOKEN" '{address}events?topic=demo'
Publish an event from a second terminal, with a token of its own:
  curl -d '{{"topics": ["demo"], "data": "hello"}}' -H "Authorization: Bearer $TOKEN" -H 'Content-Type: application/json' {address}publish

make status{argument}, make logs{argument} and make feed{argument} look at it; make down{argument} ends it."""
    return f"""\
Redis, {_processes(apps)} and nginx are ready: {address}

Read a stream, and leave it running:
  curl -N '{address}events?topic=demo'
Publish an event from a second terminal:
  curl -d '{{"topics": ["demo"], "data": "hello"}}' -H 'Content-Type: application/json' {address}publish
The second answers {{"ids":["..."]}}, and the first shows `data: hello` under the same id.

make status{argument}, make logs{argument} and make feed{argument} look at it; make down{argument} ends it."""


def down(port: int) -> str:
    """
    End the stack on *port*, and nothing else; return what to tell the user.
    """
    directory = RUN / str(port)
    if not directory.exists():
        return f"Nothing of this clone runs on port {port}."
    with _locked(directory):
        state = _read_state(directory)
        # First of all, so that they send what they have.
        _end(_feeds(directory), STOP_SECONDS, directory)
        parts = state["parts"] if state else []
        applications = [part for part in parts if part["name"].startswith("app-")]
        others = {part["name"]: [part] for part in parts if part not in applications}
        # Applications first, so that their streams end properly through nginx;
        # Redis last, because they write to it until they end.
        _end(applications, state["stop_seconds"] if state else 0, directory)
        for name in ("nginx", "redis"):
            _end(others.get(name, []), STOP_SECONDS, directory)
        _remove(directory)
        directory.rmdir()
    return f"The stack on port {port} is down."


def _end(parts: list[dict[str, Any]], seconds: float, directory: Path) -> None:
    for part in parts:
        if _runs(part):
            os.kill(part["pid"], signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while any(map(_runs, parts)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for part in parts:
        if _runs(part):
            print(f"{part['name']} did not end within {seconds:g} s; it is killed.", file=sys.stderr)
            os.kill(part["pid"], signal.SIGKILL)
    for pid in _orphans({part["pid"] for part in parts}, directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while any(map(_runs, parts)):
        time.sleep(0.02)


def _feeds(directory: Path) -> list[dict[str, Any]]:
    """Return every `make feed` of the stack; each wrote its number into feed-NUMBER.pid."""
    feeds = []
    for path in directory.glob("feed-*.pid"):
        # One that just ends takes its file away; one that was killed could not.
        with contextlib.suppress(OSError, ValueError):
            pid, mark = path.read_text().split(maxsplit=1)
            feeds.append({"name": "feed", "pid": int(pid), "identity": mark})
    return feeds


def _orphans(groups: set[int], directory: Path) -> list[int]:
    """
    Return what a killed part left behind, as a killed nginx its workers.

    They have the part's process group and work in the stack's directory: both,
    because the number of the group alone could be another's by now.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            group = int((entry / "stat").read_text().rpartition(")")[2].split()[2])
            if group and group in groups and Path(os.readlink(entry / "cwd")).is_relative_to(directory):
                found.append(int(entry.name))
    return found


def status(port: int) -> tuple[str, bool]:
    """
    Return a table of the parts, and whether all is well.
    """
    others = [name for name in _ports() if name != port]
    beside = f"\nOther stacks of this clone: {', '.join(map(str, others))}." if others else ""
    state = _read_state(RUN / str(port))
    if state is None:
        return f"Nothing of this clone runs on port {port}. Start it: make up{_port_argument(port)}.{beside}", True
    lines, well = [f"{'PART':<8} {'PID':>7} {'PORT':>6} {'METRICS':>7}  STATE"], True
    for part in state["parts"]:
        word = "ended" if not _runs(part) else "ready" if _answers(part) else "not ready"
        well = well and word == "ready"
        metrics = part.get("metrics_port") or ""
        lines.append(f"{part['name']:<8} {part['pid']:>7} {part['port']:>6} {metrics:>7}  {word}")
    feeds = filter(_runs, _feeds(RUN / str(port)))
    lines += [f"{'feed':<8} {each['pid']:>7} {'':>6} {'':>7}  runs" for each in feeds]
    return "\n".join([*lines, f"{_address(port)}   logs: {RUN / str(port)}"]) + beside, well


def _answers(part: Mapping[str, Any]) -> bool:
    if part["name"] == "redis":
        return _pongs(part["port"])
    return _status(f"127.0.0.1:{part['port']}", "/readyz") == 200


def _ports() -> list[int]:
    return sorted(int(entry.name) for entry in RUN.glob("[0-9]*") if (entry / "state.json").exists())


def _running(port: int) -> dict[str, Any]:
    state = _read_state(RUN / str(port))
    if state is None:
        raise StackError(f"A stack must run on port {port}, but none does. Start it: make up{_port_argument(port)}.")
    return state


def logs(port: int) -> None:
    """
    Become `tail` on all logs of the stack.
    """
    files = [part["log"] for part in _running(port)["parts"]] + [str(RUN / str(port) / "access.log")]
    os.execvp("tail", ["tail", "-n", "20", "-F", *files])


def feed(port: int, topic: str) -> int:
    """
    Publish the stack's own access log, line by line as it grows.

    It goes to an application directly: published through nginx, every line
    would write the next one, for ever. `down` ends it.
    """
    directory = RUN / str(port)
    _running(port)
    with _locked(directory):  # `down` sees either this feed or no stack
        application = next(part for part in _running(port)["parts"] if part["name"] == "app-1")
        own = directory / f"feed-{os.getpid()}.pid"
        own.write_text(f"{os.getpid()} {identity(os.getpid())}")
    try:
        token = _feed_token(directory, topic) if (directory / _SECRET).exists() else []
        return _feed(port, topic, application["port"], token)
    finally:
        own.unlink(missing_ok=True)


def _feed_token(directory: Path, topic: str) -> list[str]:
    """Return the arguments with which `publish` shows a token of its own."""
    command = [
        sys.executable, "-m", "app", "token", "--secret-file", str(directory / _SECRET),
        "--sub", "feed", "--publish", topic, "--ttl", "604800",
    ]  # fmt: skip
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if made.returncode:
        raise StackError(made.stderr.strip())
    path = directory / "feed-token"
    path.touch(0o600)
    path.write_text(made.stdout)
    return ["--token-file", str(path)]


def _feed(port: int, topic: str, application_port: int, token: list[str]) -> int:
    source = ["tail", "-n", "0", "-F", str(RUN / str(port) / "access.log")]
    sink = [
        sys.executable, "-m", "app", "publish", "--topic", topic, "--json",
        "--url", f"http://127.0.0.1:{application_port}", *token,
    ]  # fmt: skip
    print(f"The access log of {_address(port)} goes into the topic `{topic}`, until you press Ctrl-C. Watch it:")
    print(f"  curl -N '{_address(port)}events?topic={topic}'")
    print(f"+ {shlex.join(source)} | {shlex.join(sink)}", flush=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SSE_")}
    # Both end with this process, also by `make down` and by a closed terminal. The
    # signal is noted, not raised: raised while one is being started, it would leave it.
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: told.append(number))
    with (
        subprocess.Popen(source, stdout=subprocess.PIPE) as tail,
        subprocess.Popen(sink, stdin=tail.stdout, cwd=ROOT, env=environment) as publish,
    ):
        while publish.poll() is None and not told:
            time.sleep(0.1)
        tail.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            publish.wait(5)  # it reads the end of its input, and sends what it has
        publish.kill()
        return 0 if told else publish.wait()


def _number(name: str, text: str, high: int) -> int:
    """Return *text* as the value of make's variable *name*."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= high:
        usual = {"PORT": 8080, "APPS": 2}[name]
        raise StackError(f"{name} must be a whole number from 1 to {high}, got {text!r}. Such as {name}={usual}.")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command of `python -m app.stack`.
    """
    parser = argparse.ArgumentParser(prog="python -m app.stack", description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("command", choices=["up", "down", "status", "logs", "feed"])
    # Texts: make hands on whatever was given, and argparse would speak of options that nobody typed.
    parser.add_argument("--port", default="8080", help="nginx's port (default: 8080)")
    parser.add_argument("--apps", default="2", help="application processes (default: 2)")
    parser.add_argument("--auth", default="none", help="none, or jwt to ask for tokens (default: none)")
    parser.add_argument("--topic", default="logs", help="topic of `feed` (default: logs)")
    parser.add_argument("--all", action="store_true", help="`down`: every stack of this clone")
    options = parser.parse_args(arguments)
    try:
        port = _number("PORT", options.port, 65_535)
        apps = _number("APPS", options.apps, 64)
        match options.command:
            case "up":
                if options.auth not in ("none", "jwt"):
                    raise StackError(f"AUTH must be none or jwt, got {options.auth!r}. Such as AUTH=jwt.")
                settings = {k: v for k, v in os.environ.items() if k.startswith("SSE_")}
                print(up(port, apps, settings, options.auth))
            case "down":
                for each in _ports() if options.all else [port]:
                    print(down(each))
            case "status":
                text, well = status(port)
                print(text)
                return 0 if well else 1
            case "logs":
                logs(port)
            case "feed":
                return feed(port, options.topic)
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
