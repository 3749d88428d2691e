"""
The operator's view: every process's figures, told to the streams that watch.

Nothing is told while nobody watches. A process with watchers asks all of them
by a notice every other second; each then tells its own figures once a second,
by notices too. They are what `/metrics` says, sample by sample.
"""

import asyncio
import json
import time
from weakref import WeakSet

import structlog

from app.event import encode
from app.hub import Hub
from app.log import Log, LogUnavailable, Notice
from app.metrics import Metrics
from app.stream import ENDED, LIVE, Stream

EVENT = "operator.figures"
_TELL_SECONDS = 1.0
_ASK_SECONDS = 2.0
# Two questions may get lost.
_WATCHED_SECONDS = 3 * _ASK_SECONDS


class Figures:
    """This process's part in telling and in watching."""

    def __init__(self, process: str, metrics: Metrics, hub: Hub, log: Log) -> None:
        self._process = process
        self._metrics = metrics
        self._hub = hub
        self._log = log
        # Weak: one whose client went away before it began is forgotten.
        self._watchers: WeakSet[Stream] = WeakSet()
        self._watched_until = 0.0
        self._wake = asyncio.Event()

    def watch(self, stream: Stream) -> None:
        """Let *stream*, which is about to begin, be told the figures of all processes."""
        self._watchers.add(stream)
        self._wake.set()

    def heed_watch(self, fields: dict[str, str]) -> None:
        """Somebody watches: tell for a while."""
        self._watched_until = time.monotonic() + _WATCHED_SECONDS
        self._wake.set()

    def heed_figures(self, fields: dict[str, str]) -> None:
        """Tell the watchers here what a process has told."""
        block = encode(event=EVENT, data=fields["figures"])
        for stream in self._open():
            # One that has not read the last ones gets later ones: they would gather in memory.
            if stream.state is LIVE:
                self._hub.tell(stream, block)

    async def run(self) -> None:
        """Ask and tell while somebody watches; for ever."""
        asked = 0.0
        while True:
            watchers = self._open()
            try:
                if watchers and time.monotonic() - asked >= _ASK_SECONDS:
                    asked = time.monotonic()
                    await self._log.notify(Notice("watch", {}))
                if time.monotonic() < self._watched_until:
                    await self._log.notify(Notice("figures", {"figures": json.dumps(self.now())}))
            except LogUnavailable as error:
                structlog.get_logger().info("figures_untold", error=str(error))
            if not watchers and time.monotonic() >= self._watched_until:
                self._wake.clear()
                await self._wake.wait()
            else:
                await asyncio.sleep(_TELL_SECONDS)

    def _open(self) -> list[Stream]:
        return [stream for stream in self._watchers if stream.state is not ENDED]

    def now(self) -> dict[str, object]:
        """Return the figures of this process, each under its name in `/metrics`."""
        samples: dict[str, float] = {}
        for metric in self._metrics.collect():
            for sample in metric.samples:
                labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return {"process": self._process, "at": time.time(), "samples": samples}
