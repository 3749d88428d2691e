"""
The door: what is decided about a request before Quart does any work for it.

A process that drains or is full refuses new streams here, cheaply, and a storm
of them waits here: see `app.admission`. A native EventSource
gives up for ever on any answer but 200; what only means "later" reaches it as
200 with `retry:` and a clean end, the soft fail.
"""

import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from random import Random
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import structlog

from app import handoff
from app.cors import Headers
from app.event import RETRY_MAX_MS
from app.problem import Problem

if TYPE_CHECKING:
    from app.kit import Kit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

_OTHER_STREAMS = re.compile(r"runs/[^/]+/events|operator/events")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_random = Random()
# While a process drains, nginx lets go of its idle connections one by one. At
# the end none is left on which a POST could meet a server that has gone: nginx
# does not repeat a POST.
_CLOSE = [(b"connection", b"close")]


class Edge:
    """ASGI middleware in front of Quart."""

    def __init__(self, app: Asgi, kit: "Kit") -> None:
        self._app = app
        self._kit = kit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # nginx writes the same id into its own log.
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        scope.setdefault("extensions", {})["sse.request_id"] = request_id
        cors = self._kit.cors
        preflight = cors.preflight(scope["method"], headers)
        if preflight is not None:
            await send({"type": "http.response.start", "status": 204, "headers": preflight})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        shared = cors.headers(headers)
        # As Quart and Werkzeug read it: a target may name the host (RFC 9112,
        # section 3.2.2), and repeated slashes in front are ignored.
        path = scope["path"]
        if not path.startswith("/"):
            try:
                path = urlsplit(path).path
            except ValueError:  # half of an IPv6 address
                path = None
            if path is None or not scope["path"]:
                # Quart and Werkzeug would fail on these.
                wrong = Problem(400, "invalid", "target", "must be a path or an address", scope["path"], "Begin it with `/`.")
                self._kit.tally.refuse(wrong.status, wrong.slug)
                await _answer(wrong.response(), shared, send)
                return
        if path.lstrip("/") == "runs" and scope["method"] == "POST":
            # Its answer is a stream, too; it has a body, so the route decides.
            await self._open(scope, receive, send, [*shared, *_CLOSE] if self._kit.draining else shared)
            return
        if scope["method"] == "GET" and (path.lstrip("/") == "events" or _OTHER_STREAMS.fullmatch(path.lstrip("/"))):
            problem = await self._kit.admitted()
            if handoff.gone(send):
                return  # it did not wait for its turn
            if problem is not None:
                await self._refuse(problem, headers, shared, send)
                return
            opening = object()
            self._kit.opening.add(opening)
            scope["extensions"]["sse.turn"] = opening
            try:
                await self._open(scope, receive, send, shared)
            finally:
                self._kit.opening.discard(opening)
            return
        if self._kit.draining:
            shared = [*shared, *_CLOSE]
        await self._app(scope, receive, _adding(send, shared) if shared else send)

    async def _open(self, scope: Scope, receive: Receive, send: Send, shared: Headers) -> None:
        """Run a request whose answer may be a stream on a connection that is taken over."""
        extensions = scope.setdefault("extensions", {})
        # The server's own `send`: Quart wraps it, and the hand-off needs it bare.
        extensions["sse.send"] = send
        taken = False

        async def send_on(message: MutableMapping[str, Any]) -> None:
            nonlocal taken
            if taken:
                return  # the rest of an answer that the server no longer gives
            if message["type"] == "http.response.start":
                if shared:
                    message = {**message, "headers": [*message["headers"], *shared]}
                if opening := extensions.get("sse.opening"):
                    taken = opening.take(message["status"], message["headers"])
                    if taken:
                        return
            await send(message)

        async def receive_on() -> MutableMapping[str, Any]:
            # Nobody reads a body here, and Quart would keep all that comes.
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                if not message.get("more_body", False):
                    return {**message, "body": b""}

        try:
            await self._app(scope, receive if scope["method"] == "POST" else receive_on, send_on)
        finally:
            if opening := extensions.get("sse.opening"):
                opening.close()
            # They refer to the scope: a ring that only the cyclic collector would open.
            extensions.clear()

    async def _refuse(self, problem: Problem, headers: dict[bytes, bytes], shared: Headers, send: Send) -> None:
        self._kit.tally.refuse(problem.status, problem.slug)
        response = (
            soft_fail(self._kit, problem)
            if self._kit.settings.soft_fail and wants_soft_fail(headers, problem)
            else problem.response()
        )
        await _answer(response, shared, send)


async def _answer(response: Any, shared: Headers, send: Send) -> None:
    body = await response.get_data(as_text=False)
    await send(
        {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": [
                *((name.lower().encode(), value.encode()) for name, value in response.headers.items()),
                *shared,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _adding(send: Send, headers: Headers) -> Send:
    """Return *send*, with *headers* in every head."""

    async def send_on(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)

    return send_on


def wants_soft_fail(headers: dict[bytes, bytes], problem: Problem) -> bool:
    """
    Tell whether a native EventSource asks, and nobody before us softens the answer.

    It sends `Accept: text/event-stream` and cannot send `Authorization`. Our
    nginx snippet says by `X-Sse-Soft-Fail` that it does the softening itself;
    but only we know how long a user's limit will hold.
    """
    return (
        headers.get(b"accept", b"").strip() == b"text/event-stream"
        and b"authorization" not in headers
        and (b"x-sse-soft-fail" not in headers or problem.wait_seconds is not None)
    )


def soft_fail(kit: "Kit", problem: Problem) -> Any:
    """Return the answer that a native EventSource understands as "later"."""
    from quart import Response

    kit.tally.soft_failed += 1
    if problem.wait_seconds is not None:
        retry = min(RETRY_MAX_MS, int(problem.wait_seconds * 1000))
    else:
        retry = _random.randint(2_000, 8_000) if problem.status == 429 else _random.randint(500, 2_000)
    response = Response(
        f"retry: {retry}\n: {problem.status}, come back later\n\n",
        status=200,
        content_type="text/event-stream; charset=utf-8",
    )
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Sse-Fallback"] = str(problem.status)
    return response
