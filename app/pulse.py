"""
Run the hub on the event loop: its ticks, and the streams that are behind.

The hub itself has no loop and no clock of its own, so that a simulation can
drive it. Here are the only timers: one for all streams.
"""

import asyncio
from contextvars import Context

from app.histogram import Histogram
from app.hub import Hub


class Pulse:
    """
    Attributes:
        longest_hold_seconds: longest that a tick came late, since the start:
            how long the event loop was held by something else.
        lag: seconds that each tick came late.
    """

    def __init__(self, hub: Hub) -> None:
        self.longest_hold_seconds = 0.0
        self.lag = Histogram(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
        self._hub = hub
        self._pumping = False
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Not that of the request which happened to wake the hub: all streams'
        # log lines would carry its id, and it would be kept in memory.
        self._context = Context()
        hub.wake = self._wake

    async def run(self) -> None:
        """Beat for ever; raises what went wrong in serving the streams that are behind."""
        interval = self._hub.pace.tick
        self._loop = asyncio.get_running_loop()
        clock = self._loop.time
        while self._error is None:
            expected = clock() + interval
            await asyncio.sleep(interval)
            late = clock() - expected
            self.lag.observe(max(0.0, late))
            if late > self.longest_hold_seconds:
                self.longest_hold_seconds = late
            for _ in self._hub.tick():
                await asyncio.sleep(0)
        raise self._error

    def tasks(self) -> int:
        """Return how many tasks the event loop has; from any thread."""
        return 0 if self._loop is None else len(asyncio.all_tasks(self._loop))

    def _wake(self) -> None:
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump, context=self._context)

    def _pump(self) -> None:
        # One slice, then everybody else has a turn: replays share this budget.
        try:
            self._pumping = self._hub.pump()
        except Exception as error:
            # Nobody awaits this: all streams that are behind would wait for ever.
            self._error = error
            return
        if self._pumping:
            asyncio.get_running_loop().call_soon(self._pump, context=self._context)
