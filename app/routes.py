"""
The HTTP edge: what is asked is checked here, and answered or refused.
"""

import json
import re
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote_to_bytes

from quart import Blueprint, Response, abort, request, send_from_directory
from werkzeug.exceptions import HTTPException

from app.access import BROADCAST, Caller, refuse_ticket
from app.edge import soft_fail, wants_soft_fail
from app.event import (
    RUN_TOPICS,
    Draft,
    EventError,
    check_name,
    check_open_topic,
    check_retry,
    check_subscription,
)
from app.kit import Kit
from app.log import Batch, IdempotencyConflict, LogUnavailable, is_marked
from app.openapi import document
from app.opening import EARLIEST, Opening, Place
from app.problem import Problem
from app.settings import Settings
from app.stream import Stream
from app.ticket_routes import add_ticket_routes
from app.user_routes import add_user_routes

_STATIC = Path(__file__).parent / "static"
_STATIC_FILES = frozenset(path.name for path in _STATIC.iterdir())
_STREAM_ARGUMENTS = ("ticket", "topic", "last_event_id")
_EVENT_FIELDS = frozenset({"topics", "event", "data", "retry"})
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
# What a client may send as its position; anything else was never an id of ours.
_POSITION = re.compile(r"[\x21-\x7e]{1,200}")
_CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


def routes(kit: Kit) -> Blueprint:
    """Return all routes of one process."""
    pages = Blueprint("sse", __name__)
    settings = kit.settings
    description = document(settings)

    @pages.get("/events")
    async def events() -> Response:
        caller = await caller_of(kit)
        topics = _topics(settings, caller)
        if request.method == "HEAD":
            return stream_head(Response(b""))
        may_connect(caller, kit)
        place = await place_of(kit)
        return await open_stream(kit, caller, topics, place)

    @pages.get("/operator/events")
    async def figures() -> Response:
        caller = await caller_of(kit)
        if not caller.admin:
            raise Problem(
                403, "forbidden", "caller", "must be an administrator", caller.user, "The token needs `admin`."
            )
        for name in request.args:
            if name not in ("last_event_id", "ticket", "user"):
                raise Problem(
                    400, "invalid", "query parameter", "must be ticket or user", name, "There are no topics here."
                )
        if request.method == "HEAD":
            return stream_head(Response(b""))
        may_connect(caller, kit)
        # From now on, wherever a client stood: figures are of the moment.
        return await open_stream(kit, caller, (), Place(), of_figures=True)

    @pages.post("/publish")
    async def publish() -> tuple[dict[str, Any], int]:
        caller = await caller_of(kit)
        drafts = _drafts(await json_body(settings.max_body_bytes), kit)
        _may_publish(caller, drafts)
        if caller.user is not None and (wait := kit.publishes.take(caller.user, len(drafts))):
            raise Problem(
                429,
                "publish-rate",
                "events",
                f"must be at most SSE_LIMIT_PUBLISH_PER_USER ({settings.limit_publish_per_user}) per second",
                len(drafts),
                "Publish the same again later, or spread it out.",
                wait_seconds=wait,
            )
        key = request.headers.get("Idempotency-Key")
        if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
            raise Problem(
                400,
                "invalid",
                "Idempotency-Key",
                "must be 1 to 255 visible ASCII characters",
                key,
                "A UUID is a good one.",
            )
        try:
            ids = await kit.log.publish(Batch.of(drafts, key))
        except IdempotencyConflict:
            raise Problem(
                422,
                "idempotency-conflict",
                "Idempotency-Key",
                "was used with other events before",
                key,
                "Make a new key for each publish; repeat one only with the same body.",
            ) from None
        except LogUnavailable as error:
            kit.logger.warning("publish_failed", error=str(error), events=len(drafts))
            raise Problem(
                503,
                "log-unavailable",
                "log",
                "does not answer",
                None,
                "Publish again with the same Idempotency-Key: nothing will be doubled.",
                {"Retry-After": "1"},
            ) from None
        kit.tally.published += len(ids)
        return {"ids": ids}, 201

    add_ticket_routes(pages, kit)
    add_user_routes(pages, kit)

    @pages.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "process": kit.process}

    @pages.get("/readyz")
    async def readyz() -> tuple[dict[str, Any], int]:
        why = await kit.unready()
        if why is not None:
            return {"status": "unready", "reason": why, "process": kit.process}, 503
        return {"status": "ready", "process": kit.process, "streams": len(kit.hub)}, 200

    @pages.get("/openapi.json")
    async def describe() -> dict[str, Any]:
        return description

    @pages.get("/")
    async def page() -> Response:
        return await send_from_directory(_STATIC, "index.html")

    @pages.get("/static/<path:name>")
    async def static(name: str) -> Response:
        if name not in _STATIC_FILES:
            abort(404)
        return await send_from_directory(_STATIC, name)

    @pages.after_app_request
    async def secure(response: Response) -> Response:
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        if request.path == "/" or request.path.startswith("/static/"):
            # Asked for again each time, by its ETag: an old script with a new page breaks.
            response.headers["Cache-Control"] = "no-cache"
        if response.mimetype == "text/html":
            response.headers["Content-Security-Policy"] = _CONTENT_SECURITY
            response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @pages.app_errorhandler(Problem)
    async def refused(problem: Problem) -> Response:
        kit.tally.refuse(problem.status, problem.slug)
        headers = {k.lower().encode(): v.encode() for k, v in request.headers.items()}
        if (
            settings.soft_fail
            and problem.status in (429, 503)
            and request.endpoint in ("sse.events", "sse.figures", "runs.events")
            and wants_soft_fail(headers, problem)
        ):
            return soft_fail(kit, problem)  # type: ignore[no-any-return]
        # A browser hides the body of an error from EventSource: say it here too.
        kit.logger.info("refused", path=request.path, status=problem.status, why=str(problem))
        return problem.response()

    @pages.app_errorhandler(LogUnavailable)
    async def unavailable(error: LogUnavailable) -> Response:
        kit.logger.warning("store_unavailable", path=request.path, error=str(error))
        return await refused(
            Problem(
                503,
                "log-unavailable",
                "store",
                "does not answer",
                None,
                "Try again; Redis is away, or refuses.",
                {"Retry-After": "1"},
            )
        )

    def failed(problem: Problem) -> Response:
        """Answer with *problem*, which no route has raised, and count it like those."""
        kit.tally.refuse(problem.status, problem.slug)
        return problem.response()

    @pages.app_errorhandler(404)
    async def not_found(error: Exception) -> Response:
        return failed(
            Problem(
                404,
                "not-found",
                "path",
                "must be one of this application",
                request.path,
                "See the endpoints in README.md.",
            )
        )

    @pages.app_errorhandler(405)
    async def bad_method(error: Any) -> Response:
        allowed = ", ".join(sorted(error.valid_methods or ()))
        return failed(
            Problem(
                405,
                "bad-method",
                "method",
                f"must be one of {allowed}",
                request.method,
                "See the endpoints in README.md.",
                {"Allow": allowed},
            )
        )

    @pages.app_errorhandler(413)
    async def too_large(error: Exception) -> Response:
        return failed(_body_too_large(settings.max_body_bytes))

    @pages.app_errorhandler(HTTPException)
    async def otherwise(error: HTTPException) -> Response:
        cure = error.description or "See the endpoints in README.md."
        return failed(Problem(error.code or 500, "http", "request", f"was refused: {error.name}", None, cure))

    @pages.app_errorhandler(500)
    async def broken(error: Exception) -> Response:
        kit.logger.error("request_failed", path=request.path, exc_info=error)
        return failed(
            Problem(
                500,
                "internal",
                "server",
                "failed",
                None,
                "It is logged with this request's id.",
            )
        )

    return pages


async def open_stream(
    kit: Kit,
    caller: Caller,
    topics: tuple[str, ...],
    place: Place,
    *,
    of_run: bool = False,
    of_figures: bool = False,
    owned: bool = False,
) -> Response:
    """Return the answer that is a stream of *topics* from *place*, which *caller* may read."""
    extensions: dict[str, Any] = request.scope["extensions"]
    if caller.ticket is not None and is_marked(place.asked):
        await _leave_ticket(kit, caller.ticket)
    stream = Stream(
        kit.next_stream_id(),
        topics,
        user=caller.user,
        resumed_from=place.asked,
        request_id=extensions["sse.request_id"],
        expires_at=kit.control.expiry(caller),
        ticket=caller.ticket,
        of_run=of_run,
        owned=owned,
    )
    before = None
    if caller.user is not None or caller.ticket is not None:
        kit.control.coming[stream.id] = stream
    if caller.ticket is not None:
        before = await kit.tickets.hold(caller.ticket, stream.id, caller.user)
        if before is None:
            refuse_ticket()  # it was revoked while its client was on its way
        if before:
            await kit.control.end(before, "evicted")
    # Last, so that nothing can go wrong between getting a place and giving it back.
    if caller.user is not None:
        await _take_place(kit, stream, before)
    if of_figures:
        kit.figures.watch(stream)
    opening = Opening(kit, stream, place, request.scope)
    extensions["sse.opening"] = opening
    response = stream_head(Response(opening.body()))
    response.timeout = None
    return response


def stream_head(response: Response) -> Response:
    """Return *response* with the head of a stream."""
    response.headers["Content-Type"] = "text/event-stream; charset=utf-8"
    response.headers["Cache-Control"] = "no-store"
    # For proxies that are not ours: nginx's way to say proxy_buffering off.
    response.headers["X-Accel-Buffering"] = "no"
    if request.http_version.startswith("1"):
        # Else nginx would reuse a connection that is no longer Hypercorn's.
        response.headers["Connection"] = "close"
    response.headers.pop("Content-Length", None)
    return response


async def caller_of(kit: Kit) -> Caller:
    """Return who asks, before anything is taken or spent for the request."""
    _check_query()
    return await kit.access.caller(request.headers, request.args)


def _check_query() -> None:
    """Refuse a query that is not UTF-8: Quart would read replacement characters, and nobody asked for those."""
    query = unquote_to_bytes(request.query_string)
    try:
        query.decode()
    except UnicodeDecodeError as error:
        raise Problem(
            400,
            "invalid",
            "query",
            "must be UTF-8, percent-encoded",
            query[max(0, error.start - 20) : error.start + 4].decode("utf-8", "backslashreplace"),
            "Encode text as UTF-8 first; encodeURIComponent does both.",
        ) from None


def _topics(settings: Settings, caller: Caller) -> tuple[str, ...]:
    """Return what the stream carries: as asked, `broadcast`, and the caller's own topic."""
    most = settings.max_topics
    # Who a caller is, a token or ticket says; only without any is one believed.
    known = (*_STREAM_ARGUMENTS, "user") if settings.auth == "none" else _STREAM_ARGUMENTS
    for name in request.args:
        if name not in known:
            raise Problem(
                400,
                "invalid",
                "query parameter",
                f"must be {', '.join(known[:-1])} or {known[-1]}",
                name,
                "Give each topic as its own `topic=`.",
            )
    own = caller.own_topic
    asked = dict.fromkeys(request.args.getlist("topic"))
    for topic in asked:
        try:
            check_subscription(topic)
        except EventError as error:
            raise Problem.of(error) from None
        if caller.may_subscribe(topic):
            continue
        if topic.startswith("user:"):
            raise Problem(
                403,
                "forbidden",
                "topic",
                "must not be another user's",
                topic,
                "A user's own topic comes with every stream of that user.",
            )
        raise Problem(
            403,
            "forbidden",
            "topic",
            "must be contained in a pattern that the token lets its user subscribe to",
            topic,
            "Ask for what the token names, or get another token."
            + (" Runs must be named there, as `run:…`." if topic.startswith(RUN_TOPICS) else ""),
        )
    asked[BROADCAST] = None
    if own is not None:
        asked[own] = None
    if len(asked) > most:
        raise Problem(
            400,
            "invalid",
            "topics",
            f"must be at most SSE_MAX_TOPICS ({most})",
            len(asked),
            "Use a prefix such as `orders/*`, or a second stream.",
        )
    return tuple(asked)


def _may_publish(caller: Caller, drafts: list[Draft]) -> None:
    """Refuse a publish to a topic that the caller has no right to."""
    for topic in {topic for draft in drafts for topic in draft.topics}:
        if not caller.may_publish(topic):
            raise Problem(
                403,
                "forbidden",
                "topic",
                "must match a pattern that the token lets its user publish to",
                topic,
                "Publish to what the token names, or get another token. Users' own topics must be named as `user:…`.",
            )


def may_connect(caller: Caller, kit: Kit) -> None:
    """Refuse a stream to a user whose client connects in a loop."""
    if caller.user is None:
        return
    wait = kit.connects.take(caller.user)
    if wait:
        raise Problem(
            429,
            "user-rate",
            "new streams of this user",
            f"must be at most SSE_LIMIT_CONNECTS_PER_USER ({kit.settings.limit_connects_per_user}) per second",
            None,
            "Something connects in a loop; wait before connecting again.",
            wait_seconds=wait + kit.hub.random.uniform(2, 8),
        )


async def _leave_ticket(kit: Kit, ticket: str) -> None:
    """
    Refuse a client that lost its stream to another with the same *ticket*, which still has one.

    Else both would take turns for ever: two tabs with one address.
    """
    served = await kit.tickets.serves(ticket)
    if served is None or not await kit.control.lives(served):
        return
    raise Problem(
        429,
        "ticket-busy",
        "ticket",
        "must serve one stream at a time, and another client has it",
        None,
        "Make a ticket for each client: POST /tickets.",
        wait_seconds=kit.hub.random.uniform(0.75, 1.25) * kit.settings.evicted_retry_seconds,
    )


async def _take_place(kit: Kit, stream: Stream, before: str | None) -> None:
    """
    Get *stream* a place among its user's; the one of *before*, its predecessor, if it has one.

    A client that was evicted says so by its position, and never evicts in turn.
    """
    settings = kit.settings
    marked = is_marked(stream.resumed_from)
    if await kit.leases.take(stream.user or "", stream.id, stream.topics, evict=not marked, instead=before or ""):
        return
    # Where somebody else is about to leave, a moment will do.
    longer = marked or settings.limit_policy == "reject"
    raise Problem(
        429,
        "user-full",
        "streams of this user",
        f"must be at most SSE_LIMIT_STREAMS_PER_USER ({settings.limit_streams_per_user}), over all processes",
        None,
        "Close one, or share one between tabs.",
        wait_seconds=kit.hub.random.uniform(0.75, 1.25) * settings.evicted_retry_seconds
        if longer
        else kit.hub.random.uniform(2, 8),
    )


async def place_of(kit: Kit) -> Place:
    """Return where the stream that is asked for begins."""
    asked = request.args.get("last_event_id")
    if asked is not None and not _POSITION.fullmatch(asked):
        raise Problem(
            400,
            "invalid",
            "last_event_id",
            "must be an id that was read from a stream",
            asked,
            "Leave it out to begin now, or give `earliest` for all that is kept.",
        )
    # The header comes with a browser's own reconnect, to the same address as
    # before: it is the newer one.
    asked = request.headers.get("Last-Event-ID") or asked
    if not asked:
        return Place()
    shown = asked[:200]
    if asked == EARLIEST:
        return Place(shown)
    if not _POSITION.fullmatch(asked):
        # In a header this is never refused by status: a native EventSource
        # that comes from another server would give up for ever.
        return Place(shown, lost="unknown_position")
    try:
        found = await kit.reader.located(asked)
    except LogUnavailable:
        raise Problem(
            503,
            "log-unavailable",
            "position",
            "could not be checked: the log does not answer",
            asked,
            "Connect again with the same Last-Event-ID.",
            {"Retry-After": "1"},
        ) from None
    if isinstance(found, str):
        return Place(shown, lost=found)
    return Place(shown, found, kit.window.resets)


async def json_body(most: int) -> Any:
    """Return the request's body, read as JSON; raise a Problem where it is none, or has over *most* bytes."""
    if request.mimetype != "application/json":
        raise Problem(
            415,
            "media-type",
            "Content-Type",
            "must be application/json",
            request.headers.get("Content-Type"),
            "Send JSON and say so.",
        )
    if (request.content_length or 0) > most:
        raise _body_too_large(most)
    body: bytes = await request.get_data(as_text=False)  # type: ignore[assignment]
    try:
        # Decoded here: `loads` would guess UTF-16, and take surrogates in UTF-8.
        return json.loads(body.decode(), parse_constant=_no_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else f"must be JSON ({error})"
        raise Problem(
            400,
            "invalid",
            "body",
            why,
            body[:100].decode("utf-8", "replace"),
            "Send one event or an array of events.",
        ) from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object whose names are unique. RFC 8259, section 4: others read other values."""
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        # `add` returns None: the first name that was there before.
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:100]!a} stands twice in one object")
    return made


def _body_too_large(most: int) -> Problem:
    return Problem(
        413,
        "too-large",
        "body",
        f"must have at most SSE_MAX_BODY_BYTES ({most}) bytes",
        request.content_length,
        "Publish in smaller batches.",
    )


def _drafts(body: Any, kit: Kit) -> list[Draft]:
    """Return the events of *body*, all checked: none is published if one is wrong."""
    settings = kit.settings
    if isinstance(body, dict):
        return [_draft(body, kit, "")]
    if not isinstance(body, list) or not body:
        raise Problem(
            400,
            "invalid",
            "body",
            "must be an event or an array of events",
            body,
            'Send {"topics": ["news"], "data": "hello"}.',
        )
    if len(body) > settings.max_batch_events:
        raise Problem(
            400,
            "invalid",
            "events",
            f"must be at most SSE_MAX_BATCH_EVENTS ({settings.max_batch_events})",
            len(body),
            "Publish in smaller batches.",
        )
    return [_draft(item, kit, f"[{number}].") for number, item in enumerate(body)]


def _draft(item: Any, kit: Kit, where: str) -> Draft:
    def wrong(name: str, rule: str, value: object, cure: str) -> Problem:
        return Problem(400, "invalid", where + name, rule, value, cure)

    settings = kit.settings
    if not isinstance(item, dict):
        raise wrong("event", "must be an object", item, 'Such as {"topics": ["news"], "data": "hello"}.')
    for name in item:
        if name not in _EVENT_FIELDS:
            raise wrong(name or '""', "is not a field of an event", item[name], "Fields: topics, event, data, retry.")
    topics = item.get("topics")
    if not isinstance(topics, list) or not topics:
        raise wrong("topics", "must be an array of at least one topic", topics, 'Such as ["news"].')
    if len(topics) > settings.max_topics:
        raise wrong(
            "topics",
            f"must be at most SSE_MAX_TOPICS ({settings.max_topics})",
            len(topics),
            "Publish twice.",
        )
    if "data" not in item:
        raise wrong("data", "must be there", None, 'Send "" for an event without data.')
    try:
        data = item["data"]
        if not isinstance(data, str):
            data = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(data.encode())
        if size > settings.max_event_bytes:
            raise wrong(
                "data",
                f"must have at most SSE_MAX_EVENT_BYTES ({settings.max_event_bytes}) bytes",
                size,
                "Send a link to it instead.",
            )
        event = item.get("event", "")
        name = check_name(event) if event != "" else ""
        name.encode()
        retry = item.get("retry")
        return Draft(
            topics=tuple(dict.fromkeys(check_open_topic(topic) for topic in topics)),
            data=data,
            event=name,
            retry=None if retry is None else check_retry(retry),
        )
    except EventError as error:
        raise Problem.of(error, where) from None
    except UnicodeEncodeError as error:
        field = "event" if error.object == item.get("event") else "data"
        raise wrong(field, "must be text that UTF-8 can carry", error.object, "A surrogate stands alone.") from None
    except (ValueError, RecursionError) as error:
        raise wrong("data", f"must be JSON ({error})", None, "Infinity and NaN are none.") from None
