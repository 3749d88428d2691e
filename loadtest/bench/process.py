"""
Start the servers under measurement, read their CPU time and memory, end them.

Nothing outlives the run: each process dies with this one (PR_SET_PDEATHSIG), and
a guardian kills the process groups of those that fork, even after SIGKILL.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class StartError(RuntimeError):
    """
    A server did not come up; the text ends with what it wrote.
    """


def free_port() -> int:
    """
    Return a port of the loopback that nothing listens on.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent() -> None:
    """
    Ask the kernel to kill this process when its parent ends.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Guardian:
    """
    A process that ends everything we started when we are gone, however we went.

    nginx and Pushpin fork, and PR_SET_PDEATHSIG does not reach grandchildren.
    The guardian reads process groups and folders from a pipe; when the pipe ends
    it kills the ones and removes the others.
    """

    _code = """
import os, shutil, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
groups, folders = set(), []
for line in sys.stdin:
    sign, what = line[0], line[1:].strip()
    if sign == "+":
        groups.add(int(what))
    elif sign == "-":
        groups.discard(int(what))
    else:
        folders.append(what)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
for folder in folders:
    shutil.rmtree(folder, ignore_errors=True)
"""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def tell(self, sign: str, what: object) -> None:
        """
        Watch (`+`) or forget (`-`) a process group; remove a folder (`=`).
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", self._code],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        self._process.stdin.write(f"{sign}{what}\n".encode())
        self._process.stdin.flush()


guardian = Guardian()


def process_cpu(pid: int) -> float:
    """
    Return the CPU seconds of all threads of *pid*, ended ones included.

    This is the kernel's nanosecond clock of another process (clock_getcpuclockid):
    /proc/PID/stat counts in hundredths of a second, too coarse for short slices.
    """
    return time.clock_gettime((~pid << 3) | 2)


def descendants(pid: int) -> list[int]:
    """
    Return *pid* and all processes below it.
    """
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for each in found:
        found.extend(children.get(each, []))
    return found


def process_pss(pid: int) -> int:
    """
    Return the proportional set size of *pid* in bytes, without the pages of files.

    A process's share of the pages of programs and libraries moves by megabytes
    as other processes that use them come and go; streams are in the rest.
    """
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
            total += int(line.split()[1]) * 1024
    return total


class Watched:
    """
    A program whose CPU and memory are read: one process and all below it.
    """

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self._pids = descendants(pid)

    def find_children(self) -> None:
        """
        Look again for processes below it.
        """
        self._pids = descendants(self.pid)

    def cpu(self) -> float:
        """
        Return the CPU seconds of all its processes.
        """
        total = 0.0
        for pid in self._pids:
            with contextlib.suppress(OSError):
                total += process_cpu(pid)
        return total

    def pss(self) -> int:
        """
        Return the proportional set size of all its processes, in bytes.
        """
        return sum(process_pss(pid) for pid in self._pids)


class Server(Watched):
    """
    A program that we start, and end with its process group.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=None if env is None else dict(env),
                cwd=cwd,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - this program has one thread
            )
        super().__init__(name, self._process.pid)
        self._groups = {self.pid}
        guardian.tell("+", self.pid)

    def wait_until(self, ready: Callable[[], bool], seconds: float = 30) -> None:
        """
        Wait until *ready* holds; raise StartError when the program ends or time is up.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                what = f"ended with code {code}" if code is not None else f"not ready in {seconds:g} s"
                said = self.log.read_text(errors="replace")[-1500:].strip()
                self.end()
                raise StartError(f"{self.name}: {what}. It wrote:\n{said}")
            time.sleep(0.02)
        self.find_children()
        # Pushpin gives each of its programs a group of its own.
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                group = os.getpgid(pid)
                if group not in self._groups:
                    self._groups.add(group)
                    guardian.tell("+", group)

    def end(self) -> None:
        """
        End the program at once: nothing in it is worth a drain.
        """
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self._process.wait()
        for group in self._groups:
            guardian.tell("-", group)


def answers(port: int, path: str = "/healthz", statuses: Iterable[int] = (200, 204)) -> Callable[[], bool]:
    """
    Return a check whether GET *path* on *port* has one of *statuses*.
    """
    wanted = {str(status).encode() for status in statuses}

    def check() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), 2) as link:
                link.settimeout(2)
                link.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                words = link.recv(4096).split(b" ", 2)
                return len(words) > 1 and words[1][:3] in wanted
        except OSError:
            return False

    return check
