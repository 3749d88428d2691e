"""
Follow streams and publish events from Python, across restarts and bad networks.

`listen` resumes where it was, so that no event is missed and none comes twice; where a
process says that it is about to end, it makes the next stream before the old one breaks.
`publish` retries under one Idempotency-Key, so that nothing is lost and nothing doubled.
`run` starts a run and reads it to its end; `cancel` ends it on the server.
All wait longer after each failure, with jitter, and never less than the server asks for.
"""

import asyncio
import json
import random
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

import httpx2

from app.parser import Parser, ServerSentEvent

__all__ = ["GaveUp", "Refused", "RunFailed", "ServerSentEvent", "StreamReset", "cancel", "listen", "publish", "run"]

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
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

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
    Nobody confirmed a publish, or the end of a run, before its deadline.

    *uncertain* tells whether it may have been done all the same: an attempt went out and its
    answer did not come back. Publishing the events again under the same *key* cannot double
    them while the server remembers it (SSE_IDEMPOTENCY_SECONDS).
    """

    def __init__(self, fate: str, cause: str, key: str, uncertain: bool) -> None:
        self.key = key
        self.uncertain = uncertain
        super().__init__(f"{fate}: {cause}")


class RunFailed(Exception):
    """A run ended with `run.failed`; *problem* has its reason, name, rule, value and cure."""

    def __init__(self, problem: dict[str, Any]) -> None:
        self.problem = problem
        self.reason = str(problem.get("reason", ""))
        super().__init__(f"the run failed ({self.reason}): {problem.get('detail', '')}")


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
    _run: "_Run | None" = None,
) -> AsyncGenerator[ServerSentEvent]:
    """
    Yield the events of *topics* in order, each once, and reconnect for as long as it takes.

    Ends when the server says that there is no more to come (204). Leave it with
    ``contextlib.aclosing``, so that the connection closes at once.

    At `stream.draining` the successor is opened first, and read from where this stream stood;
    what both carry is yielded once.

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
    params: dict[str, str | Sequence[str]] = {"topic": topics} if _run is None else {}
    if user is not None:
        params["user"] = user
    position = "" if last_event_id == EARLIEST else last_event_id
    failures = 0

    def request() -> httpx2.Request:
        fresh = last_event_id == EARLIEST and not position
        if _run is not None and not _run.id:
            own = {"Content-Type": "application/json", "Idempotency-Key": _run.key, **(headers or {})}
            return http.build_request(
                "POST",
                url.rstrip("/") + "/runs",
                params=params,
                content=json.dumps(_run.body),
                headers=_stream_headers(own, ""),
                timeout=None,
            )
        return http.build_request(
            "GET",
            url.rstrip("/") + ("/events" if _run is None else f"/runs/{_run.id}/events"),
            params={**params, "last_event_id": EARLIEST} if fresh else params,
            headers=_stream_headers(headers, position),
            timeout=None,
        )

    async with nullcontext(client) if client else httpx2.AsyncClient() as http:
        # Opened while the stream before it still runs; None: none was, or it failed.
        successor: asyncio.Task[_Stream | None] | None = None
        following: _Stream | None = None
        # Ids that the stream before has given since its successor's position.
        repeated: set[str] = set()
        try:
            while True:
                silence, least = silence_seconds, 0.0
                parser = Parser(last_event_id=position)
                try:
                    stream = following or await _begin(http, request(), position, silence)
                    following, parser = None, stream.parser
                    async with aclosing(stream.response):
                        if stream.response.status_code == 204:
                            return
                        events: list[ServerSentEvent] | None = stream.first
                        while events is not None:
                            for event in events:
                                failures = 0
                                if event.event == "stream.open":
                                    opened = _json_object(event.data)
                                    silence = _silence(opened, silence)
                                    if _run is not None and not _run.id:
                                        _run.id = str(opened["topics"][0]).removeprefix("run:")
                                    if on_open is not None:
                                        on_open(opened)
                                elif event.event == "stream.reset":
                                    repeated.clear()
                                elif event.event == "stream.draining" and event.id and not (successor or repeated):
                                    position = event.id
                                    successor = asyncio.create_task(_succeed(http, request(), position, silence))
                                own = event.event.startswith("stream.")
                                if repeated and successor is None and (own or event.id in repeated):
                                    # The successor's begin: its position is before what was given already.
                                    repeated.discard(event.id)
                                    continue
                                if successor is not None and event.id:
                                    if not own:
                                        repeated.add(event.id)
                                    position = event.id
                                if event.event == "stream.reset":
                                    yield StreamReset(event.event, event.data, event.id)
                                elif kit_events or not own:
                                    yield event
                            events = await _read(stream, silence, successor)
                    cause = "the stream ended"
                    if later_status := stream.response.headers.get("X-Sse-Fallback"):
                        cause = f"the server answered {later_status}, softened for browsers"
                except _Later as later:
                    cause, least = str(later), later.seconds
                except TimeoutError:
                    cause = f"nothing came for {silence:g} s"
                except httpx2.TransportError as error:
                    cause = _cause(error)
                retry_ms = retry_ms if parser.retry_ms is None else parser.retry_ms
                if successor is not None:
                    following, successor = await successor, None
                    if following is not None:
                        continue
                elif not repeated:
                    # The id of the last complete block: one that was cut counts for nothing.
                    position = parser.last_event_id
                repeated.clear()
                seconds = _wait_seconds(retry_ms / 1000, failures, least)
                failures += 1
                if on_wait is not None:
                    on_wait(cause, seconds)
                await asyncio.sleep(seconds)
        finally:
            if successor is not None:
                successor.cancel()
                [following] = await asyncio.gather(successor, return_exceptions=True)  # type: ignore[assignment]
            if isinstance(following, _Stream):
                await following.response.aclose()


async def run(
    url: str,
    body: Mapping[str, Any],
    *,
    user: str | None = None,
    headers: Mapping[str, str] | None = None,
    on_open: OnOpen | None = None,
    on_wait: OnWait | None = None,
    client: httpx2.AsyncClient | None = None,
) -> AsyncGenerator[ServerSentEvent]:
    """
    Start a run, such as ``{"kind": "chat", "prompt": "Hello"}``, and yield its events to `run.done`.

    Whatever becomes of the connection or the process, it goes on where it was. The POST is
    repeated under one Idempotency-Key, so that one run is started. The other arguments are
    those of `listen`.

    Raises:
        RunFailed: The run ended with `run.failed`.
        Refused: The server does not start it.
    """
    events = listen(
        url,
        (),
        user=user,
        headers=headers,
        on_open=on_open,
        on_wait=on_wait,
        client=client,
        _run=_Run(body, secrets.token_urlsafe(18)),
    )
    async with aclosing(events):
        async for event in events:
            if event.event == "run.failed":
                raise RunFailed(_json_object(event.data))
            yield event
            if event.event == "run.done":
                return


@dataclass(slots=True)
class _Run:
    """What is started, under which Idempotency-Key; its id, when it is known."""

    body: Mapping[str, Any]
    key: str
    id: str = ""


async def cancel(
    url: str,
    run: str,
    *,
    user: str | None = None,
    headers: Mapping[str, str] | None = None,
    on_wait: OnWait | None = None,
    client: httpx2.AsyncClient | None = None,
    timeout_seconds: float = 60.0,
) -> None:
    """
    End a run on the server, wherever it is made; to leave `run` only ends the reading.

    Its readers read `run.failed` with the reason "cancelled". One that is over stays as it was.
    Retried as `publish` is.

    Args:
        run: The run's id, or its topic, which `on_open` is told: ``opened["topics"][0]``.

    Raises:
        ValueError: *run* can be no run's id.
        Refused: There is no such run, or it is somebody else's.
        GaveUp: Nobody confirmed it in time.
    """
    id = run.removeprefix("run:")
    # `..` would end something else.
    if not _RUN_ID.fullmatch(id):
        raise ValueError(f"run must be 1 to 64 of A-Z a-z 0-9 _ -, got {run!r}. Give the topic that `on_open` was told.")
    response = await _confirmed(
        {
            "method": "DELETE",
            "url": f"{url.rstrip('/')}/runs/{id}",
            "params": {} if user is None else {"user": user},
            "headers": headers,
        },
        ("the run was not cancelled", "the run may or may not have been cancelled"),
        on_wait=on_wait,
        client=client,
        timeout_seconds=timeout_seconds,
    )
    if _json_object(response.text).get("run") != id:
        raise Refused(response, "the answer does not name the run; is this the kit's address?")


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
    response = await _confirmed(
        {
            "method": "POST",
            "url": url.rstrip("/") + "/publish",
            "content": json.dumps(events, ensure_ascii=False, separators=(",", ":")).encode(),
            "headers": {**(headers or {}), "Content-Type": "application/json", "Idempotency-Key": key},
        },
        ("the events were not published", "the events may or may not have been published"),
        key=key,
        on_wait=on_wait,
        client=client,
        timeout_seconds=timeout_seconds,
    )
    ids = _json_object(response.text).get("ids")
    if not isinstance(ids, list):
        raise Refused(response, "the answer holds no ids; is this the kit's address?")
    return ids


async def _confirmed(
    request: Mapping[str, Any],
    fates: tuple[str, str],
    *,
    key: str = "",
    on_wait: OnWait | None,
    client: httpx2.AsyncClient | None,
    timeout_seconds: float,
) -> httpx2.Response:
    """Return the 2xx answer to *request*, which may be repeated; *fates*: what `GaveUp` says."""
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
                    response = await http.request(**request, timeout=None)
                await _check(response)
                return response
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
                raise GaveUp(fates[uncertain], cause, key, uncertain)
            seconds = min(left, _wait_seconds(PUBLISH_WAIT_SECONDS, min(failures, 4), least))
            failures += 1
            if on_wait is not None:
                on_wait(cause, seconds)
            await asyncio.sleep(seconds)


@dataclass(slots=True)
class _Stream:
    """One answer that is a stream, or a 204; *first* are events read while it was opened."""

    response: httpx2.Response
    chunks: AsyncIterator[bytes]
    parser: Parser
    first: list[ServerSentEvent]


async def _begin(client: httpx2.AsyncClient, request: httpx2.Request, position: str, silence: float) -> _Stream:
    """Send *request*; return its answer, which the caller closes."""
    async with asyncio.timeout(silence):
        response = await client.send(request, stream=True, follow_redirects=True)
    try:
        async with asyncio.timeout(silence):
            await _check(response)
        kind = response.headers.get("Content-Type", "")
        if response.status_code != 204 and not kind.lower().startswith("text/event-stream"):
            raise Refused(response, f"Content-Type must be text/event-stream, got {kind!r}")
    except BaseException:
        await response.aclose()
        raise
    return _Stream(response, response.aiter_bytes(), Parser(last_event_id=position), [])


async def _succeed(
    client: httpx2.AsyncClient, request: httpx2.Request, position: str, silence: float
) -> _Stream | None:
    """
    Open the stream that goes on from *position* where another one is about to end.

    It is there when `stream.open` was read. Whatever goes wrong, nothing is lost:
    the other stream is read to its end, and the client connects again then.
    """
    stream = None
    try:
        stream = await _begin(client, request, position, silence)
        while not stream.first:
            chunk = await _next(stream.chunks, silence)
            if chunk is None:
                break
            stream.first = stream.parser.feed(chunk)
        if stream.first and stream.first[0].event == "stream.open":
            return stream
    except (_Later, Refused, TimeoutError, httpx2.TransportError):
        pass
    except BaseException:
        if stream is not None:
            await stream.response.aclose()
        raise
    if stream is not None:
        await stream.response.aclose()
    return None


async def _read(
    stream: _Stream, silence: float, successor: asyncio.Task[_Stream | None] | None
) -> list[ServerSentEvent] | None:
    """Return the next events; None at the end, and as soon as the *successor* is open."""
    if successor is None:
        chunk = await _next(stream.chunks, silence)
        return None if chunk is None else stream.parser.feed(chunk)
    if successor.done() and successor.result() is not None:
        return None
    reading = asyncio.ensure_future(_next(stream.chunks, silence))
    try:
        if not successor.done():
            await asyncio.wait({reading, successor}, return_when=asyncio.FIRST_COMPLETED)
        if reading.done() or successor.result() is None:
            chunk = await reading
            return None if chunk is None else stream.parser.feed(chunk)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    return None


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
