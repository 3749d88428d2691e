"""
End or renew one stream, wherever it lives: here at once, elsewhere by a notice.

A stream's id names its process, so that only that one acts on a notice.
"""

import asyncio
import json
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple
from weakref import WeakValueDictionary

from app.access import Caller
from app.event import RETRY_MAX_MS, encode
from app.hub import Hub
from app.log import ORIGIN, Log, Notice, mark_id, write_id
from app.stream import ENDED, Stream

# A stream's id, as `Kit.next_stream_id` writes it.
_ELSEWHERE = re.compile(r"[0-9a-f]{6}-[1-9][0-9]{0,18}")
# A process that reads the log answers in milliseconds; one that is gone never.
_ANSWER_SECONDS = 1.5


class Renewal(NamedTuple):
    """
    What became of a renewal.

    Attributes:
        found: there is such a stream of that user.
        refused: the topic that the new token gives no right to.
        ticket: the hash of the ticket that the stream was opened with.
    """

    found: bool
    refused: str = ""
    ticket: str = ""


class Control:
    """
    Acts on the streams of all processes.

    Attributes:
        coming: streams of this process that are allowed and have not begun.
    """

    def __init__(
        self,
        process: str,
        hub: Hub,
        log: Log,
        heed: dict[str, Callable[[dict[str, str]], None]],
        *,
        evicted_seconds: float = 60.0,
    ) -> None:
        self._evicted_seconds = evicted_seconds
        self.coming: WeakValueDictionary[str, Stream] = WeakValueDictionary()
        self._process = process
        self._hub = hub
        self._log = log
        self._asked: dict[str, asyncio.Future[dict[str, str]]] = {}
        heed["end"] = self._heed_end
        heed["renew"] = self._heed_renew
        heed["renewed"] = self._heed_answer
        heed["look"] = self._heed_look
        heed["looked"] = self._heed_answer
        self._answers: set[asyncio.Task[None]] = set()

    async def end(self, stream: str, reason: str) -> None:
        """End *stream* for *reason*, if it is still there. Raises LogUnavailable."""
        if not self.end_here(stream, reason) and not self._is_here(stream):
            await self._log.notify(Notice("end", {"stream": stream, "reason": reason}))

    async def renew(self, stream: str, caller: Caller) -> Renewal:
        """Give *stream* of the same user the expiry of *caller*. Raises LogUnavailable."""
        if self._is_here(stream):
            return self._renew_here(stream, caller)
        if not _ELSEWHERE.fullmatch(stream):
            return Renewal(False)
        told = json.dumps([caller.user, caller.subscribe, caller.expires_at])
        answer = await self._ask("renew", {"stream": stream, "caller": told, "admin": str(int(caller.admin))})
        if answer is None:
            return Renewal(False)
        return Renewal(answer["found"] == "1", answer["refused"], answer["ticket"])

    async def lives(self, stream: str) -> bool:
        """Tell whether *stream* is open, or about to be; its process may be gone. Raises LogUnavailable."""
        if self._is_here(stream):
            return self._lives_here(stream)
        answer = await self._ask("look", {"stream": stream})
        return answer is not None and answer["found"] == "1"

    def begun(self, stream: Stream) -> None:
        """End *stream*, which has just begun, if that was asked for while it was on its way."""
        self.coming.pop(stream.id, None)
        if stream.reason and stream.state is not ENDED:
            self.end_here(stream.id, stream.reason)

    def end_coming(self, user: str, reason: str) -> None:
        """End the streams of *user* that are on their way, as soon as they begin."""
        for stream in list(self.coming.values()):
            if stream.user == user:
                self.end_here(stream.id, reason)

    def expiry(self, caller: Caller) -> float:
        """Return when the rights of *caller* end, by the hub's clock."""
        left = float("inf") if caller.expires_at is None else caller.expires_at - time.time()
        return self._hub.clock() + left

    async def _ask(self, kind: str, fields: dict[str, str]) -> dict[str, str] | None:
        """Return what the process of a stream answers; None where it does not."""
        number = secrets.token_hex(8)
        answer: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            await self._log.notify(Notice(kind, {**fields, "number": number}))
            with suppress(TimeoutError):
                async with asyncio.timeout(_ANSWER_SECONDS):
                    return await answer
        finally:
            del self._asked[number]
        return None

    def _is_here(self, stream: str) -> bool:
        return stream.startswith(f"{self._process}-")

    def _lives_here(self, id: str) -> bool:
        return id in self._hub.streams or id in self.coming

    def end_here(self, id: str, reason: str) -> bool:
        """End the stream *id* for *reason*, or as soon as it has begun; False if it is not here."""
        stream = self._hub.streams.get(id)
        if stream is not None:
            self._hub.end(stream, reason, self._farewell(stream, reason))
            return True
        coming = self.coming.get(id)
        if coming is not None and coming.state is not ENDED:
            coming.reason = reason  # `begun` ends it
            return True
        return False

    def _farewell(self, stream: Stream, reason: str) -> bytes:
        data = json.dumps({"reason": reason})
        if reason != "evicted":
            return encode(event="stream.evicted", data=data)
        # It would only find its place taken: it comes back later, with a mark.
        window, position = self._hub.window, self._hub.position(stream)
        # Where the window no longer reaches back to what it has had, it is told so then.
        id = window.id_at(position) if position >= window.first else write_id(window.epoch, ORIGIN)
        wait = self._evicted_seconds * self._hub.random.uniform(0.75, 1.25)
        return encode(
            id=mark_id(id),
            event="stream.evicted",
            data=data,
            retry=min(RETRY_MAX_MS, int(wait * 1000)),
        )

    def _renew_here(self, id: str, caller: Caller) -> Renewal:
        stream = self._hub.streams.get(id)
        if stream is None or stream.user != caller.user:
            return Renewal(False)
        if not stream.topics and not caller.admin:
            return Renewal(True, "operator")
        for topic in stream.topics:
            if not stream.owned and not caller.may_subscribe(topic):
                return Renewal(True, topic)
        self._hub.renew(stream, self.expiry(caller))
        return Renewal(True, "", stream.ticket or "")

    def _heed_end(self, fields: dict[str, str]) -> None:
        self.end_here(fields["stream"], fields["reason"])

    def _heed_renew(self, fields: dict[str, str]) -> None:
        if not self._is_here(fields["stream"]):
            return
        user, subscribe, expires_at = json.loads(fields["caller"])
        # An older version does not say so.
        admin = fields.get("admin") == "1"
        caller = Caller(user, tuple(subscribe), admin=admin, expires_at=expires_at)
        done = self._renew_here(fields["stream"], caller)
        self._answer(
            Notice(
                "renewed",
                {
                    "number": fields["number"],
                    "found": str(int(done.found)),
                    "refused": done.refused,
                    "ticket": done.ticket,
                },
            )
        )

    def _heed_look(self, fields: dict[str, str]) -> None:
        if self._is_here(fields["stream"]):
            found = str(int(self._lives_here(fields["stream"])))
            self._answer(Notice("looked", {"number": fields["number"], "found": found}))

    def _answer(self, notice: Notice) -> None:
        task = asyncio.get_running_loop().create_task(self._notify(notice))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _notify(self, notice: Notice) -> None:
        # Without an answer whoever asked says 404, and is asked again.
        with suppress(Exception):
            await self._log.notify(notice)

    def _heed_answer(self, fields: dict[str, str]) -> None:
        answer = self._asked.get(fields["number"])
        if answer is not None and not answer.done():
            answer.set_result(fields)
