"""
This kit: its application on both paths, with and without Redis, and behind its nginx.

Redis and nginx count as part of the server: what the kit needs, the kit pays.
All parts are started by app/stack.py, as `make up` starts them.
"""

import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jwt

from app.stack import Stack, StackError, find_tool

from ..process import StartError, Watched
from ..publisher import HttpPublisher, RedisPublisher, json_body
from .base import HEARTBEAT_SECONDS, TOPIC, Absent, Peer, Running

KEY_PREFIX = "bench"


class _Application(Peer):
    resumes = True
    scales = True
    handoff = "auto"
    redis = True
    nginx = False
    run_request = ("/runs", {"kind": "chat", "prompt": "Hello"})

    def version(self) -> str:
        """
        Name the versions below it.
        """
        try:
            if self.redis:
                find_tool("redis-server", "valkey-server")
            if self.nginx:
                find_tool("nginx")
        except StackError as error:
            raise Absent(str(error)) from None
        try:
            return ", ".join(f"{name} {version(name)}" for name in ("quart", "hypercorn", "uvloop", "redis"))
        except PackageNotFoundError as error:
            raise Absent(f"the application needs {error.name}: run make install") from None

    def start(
        self, folder: Path, *, processes: int = 1, heartbeat: int = HEARTBEAT_SECONDS, upstream: str = ""
    ) -> Running:
        """
        Start the application's processes, Redis and nginx where they are used.
        """
        self.version()
        # (!) A second start in the same run needs an empty folder: Redis loads
        # what the first left.
        number = sum(1 for _ in folder.glob(f"{self.name}-*"))
        settings = {
            "SSE_HANDOFF": self.handoff,
            "SSE_HEARTBEAT_SECONDS": str(heartbeat),
            "SSE_KEY_PREFIX": KEY_PREFIX,
            "SSE_LOG_FORMAT": "json",
            # The load client does not come back by itself, and a run is longer than the
            # age as shipped.
            "SSE_MAX_AGE_SECONDS": "3600",
            "SSE_LLM_BASE_URL": upstream,
            **self.settings(),
        }
        stack = Stack(
            apps=processes,
            env=settings,
            redis=self.redis,
            nginx=self.nginx,
            directory=folder / f"{self.name}-{number}",
        )
        try:
            stack.start()
        except StackError as error:
            raise StartError(f"{self.name}: {error}") from None
        publisher: RedisPublisher | HttpPublisher
        if stack.redis is not None:
            publisher = RedisPublisher(stack.redis.port, f"{{{KEY_PREFIX}}}:log", TOPIC)
        else:
            publisher = HttpPublisher(stack.apps[0].port, render_publish)
        fronts = [stack.nginx] if stack.nginx is not None else stack.apps
        return Running(
            [("127.0.0.1", front.port) for front in fronts],
            f"/events?topic={TOPIC}",
            publisher.publish,
            [Watched(part.name.partition("-")[0], part.pid) for part in stack.parts],
            [publisher.end, stack.close],
            tuple(app.metrics_port for app in stack.apps),
            self.paths(),
        )

    def settings(self) -> dict[str, str]:
        """
        Return the settings in which it differs from what is shipped.
        """
        return {}

    def paths(self) -> tuple[str, ...]:
        """
        Return the streams' paths, where they differ from one another.
        """
        return ()


def render_publish(burst: list[str]) -> list[tuple[str, dict[str, str], bytes]]:
    """
    Put a burst into one POST /publish.
    """
    drafts = [{"topics": [TOPIC], "event": "message", "data": data} for data in burst]
    return [("/publish", {"Content-Type": "application/json"}, json_body(drafts))]


class ApplicationOn(_Application):
    """
    As shipped: Redis and the hand-off; published to by XADD.
    """

    name = "app"
    title = "this kit"
    label = "this kit"


class ApplicationWithTokens(_Application):
    """
    A thousand users, each with a token and a lease for every stream; other rows would be those of `app`.
    """

    name = "app-auth"
    title = "this kit, with tokens and limit per user"
    label = "kit, tokens and limit"
    fans_out = False
    run_request = None
    users = 1_000
    secret = "0123456789abcdef" * 4

    def settings(self) -> dict[str, str]:
        """
        Ask for tokens.
        """
        return {"SSE_AUTH": "jwt", "SSE_JWT_SECRET": self.secret}

    def paths(self) -> tuple[str, ...]:
        """
        Return a path for each user.
        """
        claims = {"exp": int(time.time()) + 7200, "sse": {"subscribe": [TOPIC]}}
        tokens = (jwt.encode({**claims, "sub": f"user-{n}"}, self.secret, "HS256") for n in range(self.users))
        return tuple(f"/events?topic={TOPIC}#{token}" for token in tokens)


class ApplicationInMemory(_Application):
    """
    The same without Redis; published to by POST /publish.
    """

    name = "app-memory"
    title = "this kit, log in memory"
    label = "kit, log in memory"
    redis = False
    scales = False


class ApplicationOff(_Application):
    """
    The generator path, which serves what cannot be handed off.
    """

    name = "app-off"
    title = "this kit, generator path"
    label = "kit, generator path"
    handoff = "off"
    run_request = None


class ApplicationBehindNginx(_Application):
    """
    The whole stack: Redis, one application process, nginx with the kit's configuration.
    """

    name = "app-nginx"
    title = "this kit behind nginx"
    label = "kit behind nginx"
    nginx = True
