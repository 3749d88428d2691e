"""`make nginx-size`: what it prints is enough, and fits together."""

import re
import subprocess
import sys

import pytest

from app.stack import ROOT


def printed(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "nginx/size.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def number(name: str, text: str) -> int:
    return int(re.search(rf"{name}[ =]+(\d+)", text)[1])


class TestSize:
    @pytest.mark.parametrize("streams", [1, 1_000, 16_384, 50_000, 1_000_000])
    @pytest.mark.parametrize("nofile", [2_048, 20_000, 65_536])
    def test_holds_the_streams(self, streams, nofile):
        """Two connections per stream fit, with a quarter to spare, and no worker asks for more than it may have."""
        run = printed(str(streams), "--nofile", str(nofile))
        workers = number("worker_processes", run.stdout)
        connections = number("worker_connections", run.stdout)
        files = number("worker_rlimit_nofile", run.stdout)

        assert workers * connections >= 2.5 * streams
        # All of them pass, and the rest of the connections is left to the API.
        assert streams <= number("limit_conn sse_streams_of_nginx", run.stdout) <= workers * connections / 2.5
        assert connections < files <= nofile

    def test_ports(self):
        """Few ports mean more processes, not failed connections."""
        def processes(ports: str) -> int:
            return int(re.search(r"(\d+) processes at least", printed("100000", "--ports", ports).stdout)[1])

        assert processes("5000") >= 25 > processes("64511")

    def test_memory_by_way(self):
        """TLS costs more than plain, and twice the streams about twice the memory."""

        def memory(*arguments: str) -> int:
            return int(re.search(r"(\d+) MiB of memory", printed(*arguments).stdout)[1])

        assert memory("50000", "--way", "plain") < memory("50000", "--way", "h2") < memory("50000", "--way", "tls")
        assert 1.8 < memory("100000") / memory("50000") < 2.2

    def test_readme(self):
        """The README has the figures that are counted with."""
        readme = (ROOT / "nginx/README.md").read_text()
        rows = dict(re.findall(r"(?m)^\| (plain|TLS, HTTP/1|TLS, HTTP/2).*?\| ([0-9.]+) KB \|", readme))

        for name, way in (("plain", "plain"), ("TLS, HTTP/1", "tls"), ("TLS, HTTP/2", "h2")):
            counted = printed("1000", "--way", way).stdout
            assert f"({float(rows[name]):g} KB per stream, 7.4 KB in the kernel" in counted
        assert "the table's KB + 7.4 KB" in readme

    @pytest.mark.parametrize("arguments", [("0",), ("many",), (), ("10", "--nofile", "7"), ("10", "--way", "udp")])
    def test_bad_input(self, arguments):
        """A wrong number is one line and exit status 2."""
        run = printed(*arguments)

        assert 2 == run.returncode
        assert "" == run.stdout
        assert "Traceback" not in run.stderr
