"""
Read lines from a descriptor without holding up the event loop, and without reading far ahead.

A thread reads, because asyncio cannot watch regular files.
It stops reading while enough lines wait, so a slow server slows down the writer of the pipe.
https://man7.org/linux/man-pages/man7/epoll.7.html
"""

import asyncio
import os
import select
import threading
from collections import deque
from contextlib import suppress
from typing import Self

CHUNK_BYTES = 65_536
# How much may wait here; a pipe holds as much again.
HELD_BYTES = 262_144
LINE_MAX_BYTES = 16_777_216


class Lines:
    """
    The lines of *descriptor*, without their ends (LF or CRLF).

    The end of the input ends the last line; `stop` does not: half a line is none.
    A line that is longer than LINE_MAX_BYTES is given as None.

    Attributes:
        count: Complete lines read up to now.
        ended: No more will come than what `batch` still gives.
        unfinished: `stop` cut a line, which is not given.
        error: What ended the input before its end.
    """

    def __init__(self, descriptor: int) -> None:
        self.count = 0
        self.ended = False
        self.stopped = False
        self.unfinished = False
        self.error: OSError | None = None
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._waiting: deque[bytes | None] = deque()
        self._held = 0
        self._room = threading.Condition()
        self._wake_reader, self._wake_writer = os.pipe()
        # A daemon: a read that never returns must not keep the process.
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(timeout=1)
        if not self._thread.is_alive():
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def stop(self) -> None:
        """Read no more. What was read is still given."""
        if not self.stopped:
            self.stopped = True
            os.write(self._wake_writer, b"!")
            with self._room:
                self._room.notify()

    async def batch(self, most: int, most_bytes: int, not_before: float) -> list[tuple[int, bytes | None]]:
        """
        Wait for lines; return up to *most* of them with their numbers, [] at the end.

        Before the loop's time *not_before* only a full batch is given: lines that come
        quickly go together, and a line that comes alone does not wait.
        """
        while not self._waiting and not self.ended:
            await self._change()
        while not self.ended and len(self._waiting) < most and self._held < most_bytes:
            seconds = not_before - self._loop.time()
            if seconds <= 0:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._change()
        first = self.count - len(self._waiting) + 1
        lines: list[bytes | None] = []
        size = 0
        while self._waiting and len(lines) < most:
            size += _weight(self._waiting[0])
            if lines and size > most_bytes:
                size -= _weight(self._waiting[0])
                break
            lines.append(self._waiting.popleft())
        with self._room:
            self._held -= size
            self._room.notify()
        return list(enumerate(lines, first))

    async def _change(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _arrive(self, lines: list[bytes | None]) -> None:
        self._waiting += lines
        self.count += len(lines)
        self._news.set()

    def _end(self, unfinished: bool, error: OSError | None) -> None:
        self.unfinished, self.error, self.ended = unfinished, error, True
        self._news.set()

    # --- In the thread ---

    def _run(self) -> None:
        unfinished, error = False, None
        # RuntimeError: the loop ended first, and nobody waits for lines any more.
        with suppress(RuntimeError):
            try:
                unfinished = self._read()
            except OSError as caught:
                error = caught
            self._loop.call_soon_threadsafe(self._end, unfinished, error)

    def _read(self) -> bool:
        """Read to the end (False), or until `stop`: whether that cut a line."""
        # The line that has not ended yet, in pieces: joined once, so that time stays linear.
        pieces: list[bytes] = []
        size = 0
        while True:
            with self._room:
                self._room.wait_for(lambda: self._held < HELD_BYTES or self.stopped)
            ready, _, _ = select.select([self._descriptor, self._wake_reader], [], [])
            if self._wake_reader in ready:
                return size > 0
            try:
                chunk = os.read(self._descriptor, CHUNK_BYTES)
            except BlockingIOError:
                continue
            if not chunk:
                if size:
                    self._give([_line(pieces, size)])
                return False
            *ends, rest = chunk.split(b"\n")
            lines: list[bytes | None] = []
            for end in ends:
                pieces.append(end)
                lines.append(_line(pieces, size + len(end)))
                pieces, size = [], 0
            size += len(rest)
            if size <= LINE_MAX_BYTES:
                pieces.append(rest)
            else:
                # Of a line that is too long, only the length is kept.
                pieces.clear()
            if lines:
                self._give(lines)

    def _give(self, lines: list[bytes | None]) -> None:
        with self._room:
            self._held += sum(map(_weight, lines))
        self._loop.call_soon_threadsafe(self._arrive, lines)


def _line(pieces: list[bytes], size: int) -> bytes | None:
    return b"".join(pieces).removesuffix(b"\r") if size <= LINE_MAX_BYTES else None


def _weight(line: bytes | None) -> int:
    # Empty lines take room too.
    return 64 + len(line or b"")
