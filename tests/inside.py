"""
The application in this very process, in a thread with its own event loop.

So a test can count what a connection leaves behind: tasks, descriptors, objects.
"""

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import hypercorn.asyncio
import uvloop
from hypercorn.config import Config

import app.server  # noqa: F401  makes Hypercorn's connections end with their clients
from app import journal
from app.event import Draft
from app.factory import create_app
from app.kit import Kit
from app.log import Batch
from app.settings import Settings
from app.stack import reserve_port
from app.stream import Stream
from tests.wire import PATIENCE_SECONDS, Wire

# One of these that is still there belongs to a connection that is not.
PER_CONNECTION = (
    "Connection",
    "H11Protocol",
    "H2Protocol",
    "HTTPStream",
    "Opening",
    "Pulled",
    "Stream",
    "TCPTransport",
    "_Connection",
    "_SelectorSocketTransport",
)


class Inside:
    """
    Serve until the end of the `with` block.

    Args:
        loop: "uvloop" or "asyncio".
        server: "hypercorn" or "uvicorn".
        config: attributes of the server's own configuration.
        settings: fields of `Settings`.
    """

    kit: Kit

    def __init__(
        self, loop: str = "uvloop", *, server: str = "hypercorn", config: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        self.port, self._holder = reserve_port()
        self._factory = uvloop.new_event_loop if loop == "uvloop" else None
        self._server = server
        self._config = config or {}
        self._settings = Settings(**{"port": self.port, "metrics_port": 0, "log_level": "warning"} | settings)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inside")
        self._error: BaseException | None = None

    def call[T](self, work: Callable[[], T]) -> T:
        """Return what *work* returns, run in the application's event loop."""

        async def run() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE_SECONDS)

    def publish(self, topic: str, *data: str) -> None:
        """Publish without a connection, which would count among those that are left."""
        batch = Batch.of([Draft((topic,), text) for text in data])
        asyncio.run_coroutine_threadsafe(self.kit.log.publish(batch), self._loop).result(PATIENCE_SECONDS)

    def streams(self) -> list[Stream]:
        return self.call(lambda: list(self.kit.hub.streams.values()))

    def end_all(self) -> None:
        """End all streams as their age would."""
        hub = self.kit.hub
        self.call(lambda: [hub.end(stream, "max_age", hub.farewell()) for stream in list(hub.streams.values())])

    def tasks(self) -> list[str]:
        return self.call(lambda: sorted(task.get_coro().__qualname__ for task in asyncio.all_tasks()))

    def held(self) -> Counter[str]:
        """Return what there is of descriptors, tasks and connections' objects."""
        # In the loop's own turn: else it may drop a reference meanwhile.
        objects = self.call(lambda: (gc.collect(), Counter(type(found).__name__ for found in gc.get_objects()))[1])
        return Counter(
            {name: objects[name] for name in PER_CONNECTION if objects[name]}
            | {f"task {name}": count for name, count in Counter(self.tasks()).items()}
            | {"descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir())}
        )

    def wait_until_only(self, held: Counter[str], seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until nothing is held beyond *held*."""
        deadline = time.monotonic() + seconds
        while left := self.held() - held:
            assert time.monotonic() < deadline, f"must be given back within {seconds:g} s, but there is still {left}"
            time.sleep(0.03)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(PATIENCE_SECONDS), "the application must start"
        if self._error:
            raise self._error
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:  # the window is loaded before the server listens
            with contextlib.suppress(ConnectionRefusedError), Wire(self.port):
                return self
            assert time.monotonic() < deadline, "the server must listen"
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the application must end"
        if self._holder:
            self._holder.close()
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._factory) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self._error = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        journal.configure(self._settings)
        quart = create_app(self._settings)
        self.kit = quart.extensions["sse"]
        serving = asyncio.create_task(getattr(self, f"_{self._server}")(quart))
        while not self.kit.reader.loaded:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._ready.set()
        await serving

    async def _hypercorn(self, quart: Any) -> None:
        config = Config()
        config.bind = [f"127.0.0.1:{self.port}"]
        config.accesslog = None
        config.errorlog = logging.getLogger("hypercorn")
        config.keep_alive_timeout = 75
        config.graceful_timeout = 1
        for name, value in self._config.items():
            setattr(config, name, value)
        await hypercorn.asyncio.serve(quart, config, shutdown_trigger=self._stop.wait)

    async def _uvicorn(self, quart: Any) -> None:
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(quart, port=self.port, log_level="error", **self._config))
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        serving = asyncio.create_task(server.serve())
        await self._stop.wait()
        server.should_exit = server.force_exit = True
        await serving
