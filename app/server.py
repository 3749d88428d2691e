"""
Run one process: Hypercorn, signals, limits of the system.

Hypercorn alone never ends while a stream is open (Python 3.12+, asyncio), and
tells the application of a shutdown only after the connections: so the drain
runs inside its `shutdown_trigger`. Its connections outlive their clients; ours
do not.
"""

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

import hypercorn.asyncio.run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config
from hypercorn.events import Closed, Event

from app import handoff, journal
from app.drain import drain
from app.factory import create_app
from app.kit import Kit
from app.settings import SettingError, Settings

# Longest that a listen queue may grow. The kernel caps it at net.core.somaxconn.
_BACKLOG = 4_096
# asyncio accepts a whole backlog in one turn of the loop: 1.3 s of hold at 4,096.
_BACKLOG_ASYNCIO = 64
# After the drain, requests that are not answered yet have this long.
_GRACE_SECONDS = 3.0


class _Connection(TCPServer):
    """Hypercorn's connection, for as long as its client is there."""

    async def run(self) -> None:
        _open.add(self)
        try:
            await super().run()
        finally:
            _open.discard(self)
            # Server, protocol and server refer to each other in a ring: without
            # this some 60 objects wait for the cyclic collector, and with them
            # stay in the memory of a stream that was taken over long ago.
            with suppress(AttributeError):
                self.protocol.send = self.protocol.protocol.send = handoff.nowhere

    async def _read_data(self) -> None:
        await super()._read_data()
        # Else the descriptor of a client that has gone is kept until the
        # keep-alive timeout: 75 s for every probe and every single request.
        await self.idle_task.stop()

    # A client that vanished (ETIMEDOUT, EHOSTUNREACH) has gone like any other.

    async def protocol_send(self, event: Event) -> None:
        try:
            await super().protocol_send(event)
        except OSError:
            await self.protocol.handle(Closed())

    async def _close(self) -> None:
        with suppress(OSError):
            await super()._close()


_open: set[_Connection] = set()
# Where Hypercorn looks it up; it has no setting for it.
hypercorn.asyncio.run.TCPServer = _Connection  # type: ignore[attr-defined]


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    _fill_closed_descriptors()
    journal.configure(settings)
    _raise_descriptor_limit()
    factory: Any = None
    if settings.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    try:
        app = create_app(settings)
    except SettingError as error:  # a file of keys that cannot be used
        print(error, file=sys.stderr)
        return 2
    kit: Kit = app.extensions["sse"]
    _say_how(kit)
    if settings.metrics_port:
        try:
            kit.metrics.serve(settings.metrics_host, settings.metrics_port)
        except OSError as error:
            return _cannot_listen("SSE_METRICS_PORT", settings.metrics_port, error)
    config = Config()
    config.bind = [f"{settings.host}:{settings.port}"]
    config.backlog = _BACKLOG if settings.loop == "uvloop" else _BACKLOG_ASYNCIO
    # nginx keeps idle connections for 60 s: be the one who closes later.
    config.keep_alive_timeout = 75
    config.keep_alive_max_requests = 1_000_000
    config.graceful_timeout = _GRACE_SECONDS
    config.shutdown_timeout = 10
    config.include_server_header = False
    config.accesslog = None
    # An exception in a stream's generator reaches nobody else.
    config.errorlog = logging.getLogger("hypercorn")
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if asked.is_set():
            kit.logger.warning("stopped_at_once", streams=len(kit.hub))
            os._exit(1)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    # What lives now lives for ever: spare the collector from looking at it.
    gc.collect()
    gc.freeze()
    try:
        await hypercorn.asyncio.serve(app, config, shutdown_trigger=lambda: _until(asked, kit))
    except (OSError, ExceptionGroup) as error:
        if not kit.draining:
            if isinstance(error, OSError):
                return _cannot_listen("SSE_PORT", settings.port, error)
            raise
        # Hypercorn gathers what went wrong in the last connections.
        kit.logger.warning("requests_cut", why=str(error))
    return 1 if kit.failed.is_set() else 0


async def _until(asked: asyncio.Event, kit: Kit) -> None:
    """Return when Hypercorn may end: no stream is left, see `app.drain`."""
    waits = [asyncio.ensure_future(asked.wait()), asyncio.ensure_future(kit.failed.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    await drain(kit)
    # With asyncio's loop Hypercorn waits for every connection, and a client that
    # never finishes its request would hold the process for a minute.
    asyncio.get_running_loop().call_later(_GRACE_SECONDS, _abort_requests)


def _abort_requests() -> None:
    for connection in list(_open):
        connection.writer.transport.abort()


def _say_how(kit: Kit) -> None:
    settings = kit.settings
    why = handoff.UNFIT if settings.handoff == "auto" else "SSE_HANDOFF=off"
    kit.metrics.handoff = why is None
    kit.logger.info(
        "starting",
        process=kit.process,
        url=f"http://{settings.host}:{settings.port}",
        log="redis" if settings.redis_url else "memory",
        auth=settings.auth,
        handoff="on" if why is None else f"off: {why}",
        loop=settings.loop,
        pid=os.getpid(),
    )
    if settings.handoff == "auto" and why is not None:
        kit.logger.warning(
            "handoff_off",
            why=why,
            note="Streams are served all the same, for several times the CPU and memory. Install the pinned versions.",
        )
    if not settings.redis_url:
        kit.logger.warning(
            "log_in_memory",
            note="One process, and nothing outlives it. Set SSE_REDIS_URL for more.",
        )
    if settings.auth == "none":
        kit.logger.warning("auth_none", note="Anybody may read and publish everything. Never expose this.")


def _fill_closed_descriptors() -> None:
    """
    Open what a supervisor has closed of standard input, output and error.

    A socket or the event loop would get the number: lines of the log would go
    there, and uvloop aborts the process when it closes such a one.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  as long as the process


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _cannot_listen(name: str, port: int, error: OSError) -> int:
    print(
        f"{name} must be a free port, got {port}: {error.strerror or error}. End what holds it, or choose another.",
        file=sys.stderr,
    )
    return 2
