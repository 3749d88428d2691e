"""
What this process writes about itself: structlog, to standard error.

JSON lines in production, readable on a terminal. One line when a stream opens
and one when it ends; never one per event.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import orjson
import structlog

from app.settings import Settings

# Lines that one fault can cause again and again, and how many of each may come in
# _SELDOM_SECONDS: an operator needs the first ones, and a count of the rest.
_SELDOM = {"log_ahead_of_clock": 1, "trim_refused": 1, "entry_broken": 20}
_SELDOM_SECONDS = 10.0
# What a pipe that is ready surely takes at once: PIPE_BUF, pipe(7).
_PIECE_BYTES = 4_096
# How long a line that has begun may wait for the room of its rest: a terminal has
# room for 12 KB, and who reads it needs its turn to make more.
_REST_SECONDS = 0.02
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure(settings: Settings) -> None:
    """Set up structlog and the standard library's logging for this process."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    sure = _Sure()
    shared: list[structlog.typing.Processor] = [
        _Seldom(),
        sure,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if settings.log_hash_users:
        shared.append(_HashUsers())
    level = _LEVELS[settings.log_level]
    if as_json:
        structlog.configure(
            processors=[
                *shared,
                # Without the variables of each frame: passwords are among them.
                structlog.processors.ExceptionRenderer(
                    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
                ),
                structlog.processors.JSONRenderer(serializer=_json),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(level),
            logger_factory=lambda *_: sure,
            cache_logger_on_first_use=True,
        )
    else:
        structlog.configure(
            processors=[
                *shared,
                structlog.dev.ConsoleRenderer(
                    colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
                ),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(level),
            logger_factory=lambda *_: sure,
            cache_logger_on_first_use=True,
        )
    # Libraries write through the standard library: give their lines the same form.
    logging.basicConfig(level=logging.WARNING, handlers=[_ThroughStructlog()], force=True)


def _json(line: Any, **options: Any) -> bytes:
    return orjson.dumps(line, default=options.get("default"))


class _Sure:
    """
    Standard error that takes every line at once, also where it is lost: a full disk, a reader that died or stands still.

    Lines are written wherever a stream begins or ends. An error there would end
    the process, and a pipe that nobody empties would hold all streams, for nothing
    but a line. The next line that is taken says how many were not, as `lost`.
    """

    def __init__(self) -> None:
        self._lost = 0
        self._cut = False  # the last line ended in the middle
        self._fd = _unwaiting()
        self._room = select.poll()
        self._room.register(self._fd, select.POLLOUT)
        # The collector may come by in the middle of a line, and what it takes away
        # may have something to say. A lock that is not its holder's own would hold
        # the process for ever then; and the line waits for the end of the other.
        self._lock = threading.RLock()
        self._waiting: deque[bytes] = deque()
        self._writing = False

    def __call__(self, logger: Any, method: str, event: Any) -> Any:
        """Tell of lost lines in *event*: a processor of structlog."""
        if self._lost:
            event["lost"] = self._lost
        return event

    def _write(self, text: bytes | str) -> None:
        line = text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text
        with self._lock:
            self._waiting.append(line + b"\n")
            if self._writing:
                return
            self._writing = True
            try:
                while self._waiting:
                    told = self._lost
                    if self._take(self._waiting.popleft()):
                        self._lost -= told
                    else:
                        self._lost += 1
            finally:
                self._writing = False

    # What structlog calls, by level.
    debug = info = warning = error = critical = _write

    def _take(self, line: bytes) -> bool:
        if self._cut:
            line = b"\n" + line
        wait, until = 0.0, time.monotonic() + _REST_SECONDS
        try:
            while line:
                if not self._room.poll(1000 * wait):
                    return False
                line = line[os.write(self._fd, line[:_PIECE_BYTES]) :]
                self._cut = bool(line)
                wait = max(0.0, until - time.monotonic())
        except OSError:
            return False
        return True


def _unwaiting() -> int:
    """Return a descriptor of standard error on which no write waits, where there can be one."""
    try:
        fd = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # replaced by something without one, or None
        fd = 2
    with suppress(OSError):
        if os.isatty(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode):
            # A terminal that is ready takes less than a piece; and others who write to
            # the same pipe may fill it first. Opened anew, because to change the mode
            # of what is open changes it for all who share it.
            return os.open(f"/dev/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return fd


class _ThroughStructlog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        event: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        structlog.get_logger().log(max(record.levelno, logging.WARNING), record.getMessage(), **event)


class _Seldom:
    """
    Drop lines of `_SELDOM` that come too often; the next one says how many, as `unsaid`.

    Counts that must be exact are metrics.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By name: when its time began, how many were said in it, how many were not since.
        self._said: dict[str, tuple[float, int, int]] = {}

    def __call__(self, logger: Any, method: str, event: Any) -> Any:
        name = event["event"]
        most = _SELDOM.get(name)
        if most is None:
            return event
        now = self._clock()
        began, said, unsaid = self._said.get(name, (now, 0, 0))
        if now - began >= _SELDOM_SECONDS:
            began, said = now, 0
        if said == most:
            self._said[name] = (began, said, unsaid + 1)
            raise structlog.DropEvent
        self._said[name] = (began, said + 1, 0)
        if unsaid:
            event["unsaid"] = unsaid
        return event


class _HashUsers:
    """
    Replace user ids by a hash, the same for one user as long as the process lives.

    Keyed, because a plain hash of a short id is guessed in no time. Also where a
    client or a publisher wrote one: in a position, in a topic that is none.
    """

    _IN_TEXT = re.compile(r"user:\S+")

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)

    def __call__(self, logger: Any, method: str, event: Any) -> Any:
        if event.get("user"):
            event["user"] = self._hash(event["user"])
        if event.get("topics"):
            event["topics"] = [self._hash_topic(topic) for topic in event["topics"]]
        for key, value in event.items():
            if isinstance(value, str) and "user:" in value:
                event[key] = self._IN_TEXT.sub(lambda found: self._hash_topic(found[0]), value)
        return event

    def _hash_topic(self, topic: str) -> str:
        return "user:" + self._hash(unquote(topic[5:])) if topic.startswith("user:") else topic

    def _hash(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()[:12]
