"""
Let new streams in at the pace that the event loop can bear.

A storm lengthens the wait of those who come, never that of the events of open
streams. An open costs about a millisecond, in steps over a dozen turns of the
loop. So what is bounded is how many begin in one turn, and that follows from
how long the last turn took: less where it was long, more where it was short.
Nobody waits where nobody else does, and an open that waits for Redis holds
up none behind it.
"""

import asyncio
import time
from collections import deque

# How long one turn of the event loop may take.
_TURN_SECONDS = 0.005
_MOST_A_TURN = 32


class Admission:
    """
    The line of those who wait to open a stream, first come, first served.

    Attributes:
        refused: how many were told to come again later.
    """

    def __init__(self, wait_seconds: float) -> None:
        self.refused = 0
        self._wait_seconds = wait_seconds
        self._line: deque[tuple[float, asyncio.Future[bool]]] = deque()
        self._allowance = _MOST_A_TURN
        self._begun = 0  # in this turn of the loop
        self._counting = False
        self._turn_at = 0.0

    def __len__(self) -> int:
        return len(self._line)

    async def enter(self) -> bool:
        """
        Return when an open may begin.

        Returns:
            False after *wait_seconds* in the line: more come than can be served.
        """
        loop = asyncio.get_running_loop()
        if not self._counting:
            self._counting = True
            self._turn_at = time.monotonic()
            loop.call_soon(self._turn, loop)
        if not self._line and self._begun < self._allowance:
            self._begun += 1
            return True
        turn: asyncio.Future[bool] = loop.create_future()
        self._line.append((time.monotonic(), turn))
        return await turn

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count anew for the next turn of the loop, and let in who may."""
        now = time.monotonic()
        if now - self._turn_at > _TURN_SECONDS:
            self._allowance = max(1, self._allowance // 2)
        else:
            self._allowance = min(_MOST_A_TURN, self._allowance + 1)
        self._turn_at = now
        begun = self._begun
        self._begun = 0
        while self._line and self._begun < self._allowance:
            since, turn = self._line.popleft()
            if turn.done():  # its client left
                continue
            self._begun += 1
            in_time = now - since <= self._wait_seconds
            self.refused += not in_time
            turn.set_result(in_time)
        self._counting = bool(self._line or begun or self._begun)
        if self._counting:
            loop.call_soon(self._turn, loop)
