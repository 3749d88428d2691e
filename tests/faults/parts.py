"""
What `app.stack` has no need of: a Sentinel, and a network that can be cut.
"""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import redis as sync_redis

from app.stack import Part, Redis, find_tool
from tests.live import eventually

MASTER = "sse"


class Sentinel(Part):
    """
    A Redis Sentinel that watches *master* under the name `sse`, and decides alone.

    `down_seconds` without an answer, and the master is replaced.
    """

    def __init__(self, directory: Path, master: Redis, *, name: str = "sentinel", down_seconds: float = 1.0) -> None:
        super().__init__(name, directory)
        self.configuration = directory / f"{name}.conf"
        self.configuration.write_text(
            f"port {self.port}\nbind 127.0.0.1\nsentinel monitor {MASTER} 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds {MASTER} {int(down_seconds * 1000)}\n"
            f"sentinel failover-timeout {MASTER} 5000\nsentinel parallel-syncs {MASTER} 1\n"
        )

    def command(self) -> list[str]:
        return [find_tool("redis-server", "valkey-server"), str(self.configuration), "--sentinel"]

    def probe(self) -> bool:
        with contextlib.suppress(sync_redis.RedisError, OSError), self.client() as client:
            return bool(client.ping())
        return False

    def client(self) -> "sync_redis.Redis":
        return sync_redis.Redis(port=self.port, decode_responses=True, socket_timeout=2)

    def master_port(self) -> int:
        with self.client() as client:
            return int(client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)[1])

    def replicas_known(self) -> int:
        with self.client() as client:
            return len(client.sentinel_slaves(MASTER))


def sentinel_url(*sentinels: Sentinel) -> str:
    """Return what SSE_REDIS_URL takes."""
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    return f"redis+sentinel://{hosts}/{MASTER}/0"


def follow(replica: Redis, master: Redis) -> None:
    """Make *replica* one of *master*, and wait until it has everything."""
    with connect(master) as old, connect(replica) as new:
        # A master waits five seconds for more replicas before it sends anything.
        old.config_set("repl-diskless-sync-delay", 0)
        new.config_set("repl-diskless-sync-delay", 0)
        new.replicaof("127.0.0.1", str(master.port))
        eventually(lambda: new.info("replication").get("master_link_status") == "up", "the replica's first copy")


def connect(server: Redis) -> "sync_redis.Redis":
    """Return a client for the test's own hands on *server*."""
    return sync_redis.Redis(port=server.port, decode_responses=True, socket_timeout=5)


class Network:
    """
    A network namespace with one Redis in it, on a cable that can be cut.

    A cut drops every packet: nobody hears that the connection is gone. Needs
    root, `ip` and `nft`.
    """

    _numbers = itertools.count(os.getpid() % 8_000)

    def __init__(self) -> None:
        number = next(self._numbers)
        self.name = f"sse-fault-{number}"
        self.subnet = f"10.{200 + number // 250 % 50}.{number % 250}"
        self._cable = f"sf{number}"

    @staticmethod
    def possible() -> bool:
        """Tell whether this machine lets us make one."""
        tools = all(shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin") for tool in ("ip", "nft"))
        return tools and os.geteuid() == 0

    @property
    def address(self) -> str:
        """Where the Redis inside listens."""
        return f"{self.subnet}.2"

    def __enter__(self) -> "Network":
        self._run("ip", "netns", "add", self.name)
        try:
            self._run("ip", "link", "add", self._cable, "type", "veth", "peer", "name", "inside", "netns", self.name)
            self._run("ip", "address", "add", f"{self.subnet}.1/24", "dev", self._cable)
            self._run("ip", "link", "set", self._cable, "up")
            self.inside("ip", "address", "add", f"{self.address}/24", "dev", "inside")
            self.inside("ip", "link", "set", "inside", "up")
            self.inside("ip", "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Its end of the cable goes with it, and so does ours.
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Drop every packet, in both directions, for the time of the block."""
        rules = "table inet cut { chain in { type filter hook input priority 0; policy drop; }; "
        rules += "chain out { type filter hook output priority 0; policy drop; }; }"
        self.inside("nft", rules)
        try:
            yield
        finally:
            self.inside("nft", "delete table inet cut")

    def inside(self, *command: str) -> None:
        """Run *command* in the namespace."""
        self._run("ip", "netns", "exec", self.name, *command)

    @staticmethod
    def _run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


class DistantRedis(Redis):
    """A Redis inside a `Network`."""

    def __init__(self, directory: Path, network: Network, *arguments: str) -> None:
        super().__init__(directory, *arguments, name="redis")
        self.network = network

    @property
    def url(self) -> str:
        return f"redis://{self.network.address}:{self.port}/0"

    def command(self) -> list[str]:
        inner = super().command()
        inner[inner.index("--bind") + 1] = self.network.address
        return ["ip", "netns", "exec", self.network.name, *inner, "--protected-mode", "no"]

    def probe(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.network.address, self.port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        return False
