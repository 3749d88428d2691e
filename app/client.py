"""
Follow streams and publish events from Python, across restarts and bad networks.

`listen` resumes where it was, so that no event is missed and none comes twice.
`publish` retries under one Idempotency-Key, so that nothing is lost and nothing doubled.
Both wait longer after each failure, with jitter, and never less than the server asks for.
"""

import asyncio
import json
import random
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

import httpx2

from app.parser import Parser, ServerSentEvent

__all__ = ["GaveUp", "Refused", "ServerSentEvent", "StreamReset", "listen", "publish"]

EARLIEST = "earliest"
# A stream that is silent for so many heartbeats is dead, whatever TCP says.
HEARTBEATS_MISSED = 3
# How long a server may keep silent before stream.open told its heartbeat: three of 15 s.
SILENCE_SECONDS = 45.0
ATTEMPT_SECONDS = 10.0
# The server keeps keys for SSE_IDEMPOTENCY_SECONDS (600); the last attempt must end before.
KEY_KEPT_SECONDS = 600.0 - ATTEMPT_SECONDS
# Below it a server that ends every stream at once would be called in a tight loop.
SHORTEST_WAIT_SECONDS = 0.05
# The first wait of a publish that failed; doubled four times at most.
PUBLISH_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 86_400.0

OnOpen = Callable[[dict[str, Any]], None]
OnWait = Callable[[str, float], None]


class Refused(Exception):
    """
    The server answered, and asking again would not change the answer.

    *problem* is its problem document (name, rule, value, cure where it has them), or {}.
    """

    def __init__(self, response: httpx2.Response, why: str = "") -> None:
        self.status = response.status_code
        self.problem = {} if why else _json_object(response.text)
        why = why or self.problem.get("detail") or response.reason_phrase
        if response.has_redirect_location:
            why += f"; give the address {response.headers['Location']} instead"
        request = response.request
        super().__init__(f"{request.method} {request.url.path} got status {self.status}: {why}")


class GaveUp(Exception):
    """
    Nobody confirmed a publish before its deadline.

    *uncertain* tells whether the events may have been published all the same: an attempt
    went out and its answer did not come back. Publishing them again under the same *key*
    cannot double them while the server remembers it (SSE_IDEMPOTENCY_SECONDS).
    """

    def __init__(self, cause: str, key: str, uncertain: bool) -> None:
        self.key = key
        self.uncertain = uncertain
        fate = "may or may not have been published" if uncertain else "were not published"
        super().__init__(f"the events {fate}: {cause}")


class StreamReset(ServerSentEvent):
    """
    Events were lost between the one before and the next: fetch your state again.

    An event like any other (`stream.reset`), with a type of its own, so that it is not overlooked.
    """

    __slots__ = ()

    @property
    def reason(self) -> str:
        """The server's word for why; its whole text where it sent none."""
        return str(_json_object(self.data).get("reason") or self.data)


class _Later(Exception):
    """The server answered "not now"."""

    def __init__(self, response: httpx2.Response) -> None:
        self.seconds = _retry_after(response.headers.get("Retry-After", ""))
        # A proxy's 502 or 504 says nothing of what the application did before.
        self.uncertain = response.status_code >= 500
        super().__init__(f"the server answered {response.status_code} {response.reason_phrase}")


async def listen(
    url: str,
    topics: str | Sequence[str],
    *,
    last_event_id: str = "",
    user: str | None = None,
    headers: Mapping[str, str] | None = None,
    kit_events: bool = False,
    on_open: OnOpen | None = None,
    on_wait: OnWait | None = None,
    client: httpx2.AsyncClient | None = None,
    retry_ms: int = 1000,
    silence_seconds: float = SILENCE_SECONDS,
) -> AsyncGenerator[ServerSentEvent]:
    """
    Yield the events of *topics* in order, each once, and reconnect for as long as it takes.

    Ends when the server says that there is no more to come (204). Leave it with
    ``contextlib.aclosing``, so that the connection closes at once.

    `stream.reset` comes as a `StreamReset`. The kit's other `stream.*` events are handled here;
    *kit_events* yields them too, for a caller that stores its own position: `stream.position`
    moves it while the topics are quiet.

    Args:
        url: The server's address, without `/events`.
        last_event_id: Where to resume; "earliest" for all that the server still has.
        on_open: Called with the content of each `stream.open`.
        on_wait: Called with the cause and the seconds before each wait to reconnect.
        retry_ms: Reconnection time until the server sends `retry:`.
        silence_seconds: Longest silence until `stream.open` tells the heartbeat.

    Raises:
        Refused: A 4xx other than 408, 425 and 429, or an answer that is no event stream.
    """
    params: dict[str, str | Sequence[str]] = {"topic": topics}
    if user is not None:
        params["user"] = user
    position = "" if last_event_id == EARLIEST else last_event_id
    failures = 0
    async with nullcontext(client) if client else httpx2.AsyncClient() as http:
        while True:
            parser = Parser(last_event_id=position)
            silence, least = silence_seconds, 0.0
            fresh = last_event_id == EARLIEST and not position
            request = http.build_request(
                "GET",
                url.rstrip("/") + "/events",
                params={**params, "last_event_id": EARLIEST} if fresh else params,
                headers=_stream_headers(headers, position),
                timeout=None,
            )
            try:
                async with _answer(http, request, silence) as response:
                    if response.status_code == 204:
                        return
                    chunks = response.aiter_bytes()
                    while (chunk := await _next(chunks, silence)) is not None:
                        for event in parser.feed(chunk):
                            failures = 0
                            if event.event == "stream.open":
                                opened = _json_object(event.data)
                                silence = _silence(opened, silence)
                                if on_open is not None:
                                    on_open(opened)
                            if event.event == "stream.reset":
                                yield StreamReset(event.event, event.data, event.id)
                            elif kit_events or not event.event.startswith("stream."):
                                yield event
                cause = "the stream ended"
                if later_status := response.headers.get("X-Sse-Fallback"):
                    cause = f"the server answered {later_status}, softened for browsers"
            except _Later as later:
                cause, least = str(later), later.seconds
            except TimeoutError:
                cause = f"nothing came for {silence:g} s"
            except httpx2.TransportError as error:
                cause = _cause(error)
            # The id of the last complete block: one that was cut counts for nothing.
            position = parser.last_event_id
            retry_ms = retry_ms if parser.retry_ms is None else parser.retry_ms
            seconds = _wait_seconds(retry_ms / 1000, failures, least)
            failures += 1
            if on_wait is not None:
                on_wait(cause, seconds)
            await asyncio.sleep(seconds)


async def publish(
    url: str,
    events: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    on_wait: OnWait | None = None,
    client: httpx2.AsyncClient | None = None,
    timeout_seconds: float = 60.0,
) -> list[str]:
    """
    Publish one event, or several in one piece (all or none), and return their ids.

    Give a *client* of your own when you publish often: it keeps its connection.

    An event is ``{"topics": [..], "event": "..", "data": any, "retry": ms}``.
    Network errors, 5xx, 408, 425 and 429 are retried under one Idempotency-Key until
    *timeout_seconds* have passed, or until the server could have forgotten the key.

    Raises:
        Refused: The server does not want these events.
        GaveUp: Nobody confirmed them in time.
    """
    key = key or secrets.token_urlsafe(18)
    body = json.dumps(events, ensure_ascii=False, separators=(",", ":")).encode()
    deadline = asyncio.get_running_loop().time() + timeout_seconds
    uncertain = False
    failures = 0
    async with nullcontext(client) if client else httpx2.AsyncClient() as http:
        while True:
            least = 0.0
            started = asyncio.get_running_loop().time()
            was_uncertain = uncertain
            try:
                async with asyncio.timeout(min(ATTEMPT_SECONDS, max(deadline - started, 1.0))):
                    response = await http.post(
                        url.rstrip("/") + "/publish",
                        content=body,
                        headers={
                            **(headers or {}),
                            "Content-Type": "application/json",
                            "Idempotency-Key": key,
                        },
                        timeout=None,
                    )
                await _check(response)
                ids = _json_object(response.text).get("ids")
                if not isinstance(ids, list):
                    raise Refused(response, "the answer holds no ids; is this the kit's address?")
                return ids
            except _Later as later:
                cause, least = str(later), later.seconds
                uncertain |= later.uncertain
            except httpx2.ConnectError as error:
                cause = _cause(error)
            except TimeoutError:
                cause, uncertain = "the server did not answer in time", True
            except httpx2.TransportError as error:
                cause, uncertain = _cause(error), True
            if uncertain and not was_uncertain:
                # From the first attempt whose fate is unknown, the key must stay known.
                deadline = min(deadline, started + KEY_KEPT_SECONDS)
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0 or least > left:
                raise GaveUp(cause, key, uncertain)
            seconds = min(left, _wait_seconds(PUBLISH_WAIT_SECONDS, min(failures, 4), least))
            failures += 1
            if on_wait is not None:
                on_wait(cause, seconds)
            await asyncio.sleep(seconds)


@asynccontextmanager
async def _answer(
    client: httpx2.AsyncClient, request: httpx2.Request, silence: float
) -> AsyncGenerator[httpx2.Response]:
    """Send *request*; the answer is a stream to read, or a 204."""
    async with asyncio.timeout(silence):
        response = await client.send(request, stream=True, follow_redirects=True)
    async with aclosing(response):
        async with asyncio.timeout(silence):
            await _check(response)
        kind = response.headers.get("Content-Type", "")
        if response.status_code != 204 and not kind.lower().startswith("text/event-stream"):
            raise Refused(response, f"Content-Type must be text/event-stream, got {kind!r}")
        yield response


async def _check(response: httpx2.Response) -> None:
    """Raise what a status other than 2xx means."""
    if response.status_code in (408, 425, 429) or response.status_code >= 500:
        raise _Later(response)
    if not response.is_success:
        await response.aread()
        raise Refused(response)


async def _next(chunks: AsyncIterator[bytes], silence: float) -> bytes | None:
    # Around each read, never around a yield: a slow caller is not a silent server.
    async with asyncio.timeout(silence):
        return await anext(chunks, None)


def _stream_headers(headers: Mapping[str, str] | None, position: str) -> list[tuple[bytes, bytes]]:
    own = {
        # More than EventSource asks for: what is not now gets its true status, and no soft fail.
        "Accept": "text/event-stream, application/problem+json",
        "Accept-Encoding": "identity",
        "Cache-Control": "no-store",
    }
    if position:
        own["Last-Event-ID"] = position
    # UTF-8, as browsers do: an id may hold more than ASCII.
    return [(name.encode(), value.encode()) for name, value in {**own, **(headers or {})}.items()]


def _wait_seconds(retry_seconds: float, failures: int, least: float) -> float:
    """Never sooner than told; doubled after each failure; spread, so that not all come at once."""
    grown = min(max(retry_seconds, SHORTEST_WAIT_SECONDS) * (1 << min(failures, 20)), 30.0)
    spread = random.uniform(1, 1.5)
    return min(max(grown, retry_seconds, least) * spread, LONGEST_WAIT_SECONDS)


def _retry_after(value: str) -> float:
    """Seconds or a date; 0 for neither."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return 0.0


def _silence(opened: dict[str, Any], otherwise: float) -> float:
    heartbeat = opened.get("heartbeat_seconds")
    if isinstance(heartbeat, int | float) and heartbeat > 0:
        return HEARTBEATS_MISSED * heartbeat
    return otherwise


def _json_object(text: str) -> dict[str, Any]:
    """Return *text* as a JSON object; {} where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _cause(error: httpx2.TransportError) -> str:
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        # The caller's own mistake: no number of attempts cures it.
        raise error
    return str(error) or type(error).__name__
