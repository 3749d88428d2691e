"""
The HTTP edge of runs: start one, follow one, cancel one.

The answer to `POST /runs` is the run's stream itself. Whoever loses it goes on
at `GET /runs/<id>/events`, on any process.
"""

import hashlib
import json
import re
import secrets
from base64 import urlsafe_b64encode
from typing import Any

from quart import Blueprint, Response, request

from app.access import Caller
from app.event import RUN_TOPICS
from app.kit import Kit
from app.log import LogUnavailable, Notice
from app.opening import EARLIEST, Place
from app.problem import Problem
from app.register import Record
from app.routes import IDEMPOTENCY_KEY, caller_of, json_body, may_connect, open_stream, place_of, stream_head

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ARGUMENTS = frozenset({"last_event_id", "user", "ticket"})


def run_routes(kit: Kit) -> Blueprint:
    """Return the routes of runs."""
    pages = Blueprint("runs", __name__)
    settings = kit.settings
    kinds = {"chat": kit.chat.prepare, "task": kit.tasks.prepare}

    @pages.post("/runs")
    async def start() -> Response:
        caller = await caller_of(kit)
        body = await json_body(settings.max_body_bytes)
        kind = body.get("kind") if isinstance(body, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise Problem(
                400, "invalid", "kind", f"must be one of {', '.join(kinds)}", kind, 'Send {"kind": "chat", "prompt": "Hello"}.'
            )
        if not caller.may_publish(RUN_TOPICS + kind):
            raise Problem(
                403,
                "forbidden",
                "kind",
                f"needs a right to publish to `{RUN_TOPICS}{kind}`",
                kind,
                "Ask for a token that names it; `*` alone does not.",
            )
        work = kinds[kind](body)
        refusal = kit.refusal()
        if refusal is not None:
            raise refusal
        if len(kit.runs) >= kit.runs.most:
            raise Problem(
                429,
                "runs-full",
                "runs of this process",
                f"must be at most SSE_MAX_RUNS ({kit.runs.most})",
                len(kit.runs),
                "Start it again later.",
                {"Retry-After": "2"},
            )
        may_connect(caller, kit)
        record = Record(_new_id(caller), kind, caller.user, kit.process, _fingerprint(body))
        # From before its first event.
        place = Place(cursor=kit.window.end, resets=kit.window.resets)
        try:
            known = await kit.runs.start(record, work)
        except LogUnavailable:
            raise _unavailable("run", "could not be entered", record.id) from None
        if known is not None:
            if (known.fingerprint, known.user) != (record.fingerprint, record.user):
                raise Problem(
                    422,
                    "idempotency-conflict",
                    "Idempotency-Key",
                    "was used with another run before",
                    request.headers.get("Idempotency-Key"),
                    "Make a new key for each run; repeat one only with the same body.",
                )
            return await _follow(known, caller, Place(EARLIEST))
        try:
            return await _stream(record, caller, place)
        except Problem:
            # No place for its reader. Whoever gave a key asks again, and reads it then.
            if "Idempotency-Key" not in request.headers:
                kit.runs.cancel(record.id)
            raise

    @pages.get("/runs/<id>/events")
    async def events(id: str) -> Response:
        caller = await caller_of(kit)
        for name in request.args:
            if name not in _ARGUMENTS or (name == "user" and settings.auth != "none"):
                raise Problem(
                    400, "invalid", "query parameter", "must be last_event_id, ticket or user", name, "Leave it out."
                )
        record = await _record(id)
        if record.user != caller.user and not caller.may_subscribe(RUN_TOPICS + id):
            raise Problem(
                403, "forbidden", "run", "must be your own, or its topic allowed by your token", id, "Ask who started it."
            )
        if request.method != "HEAD":
            may_connect(caller, kit)
        place = await place_of(kit)
        # Whoever does not say where to begin wants all of it.
        return await _follow(record, caller, place if place.asked else Place(EARLIEST))

    @pages.delete("/runs/<id>")
    async def cancel(id: str) -> tuple[dict[str, Any], int]:
        caller = await caller_of(kit)
        record = await _record(id)
        if record.user != caller.user and not caller.admin:
            raise Problem(403, "forbidden", "run", "must be your own", id, "Ask who started it.")
        if record.ended:
            return {"run": id, "state": "ended"}, 200
        if record.process == kit.process:
            kit.runs.cancel(id)
        else:
            try:
                await kit.log.notify(Notice("cancel", {"run": id}))
            except LogUnavailable:
                raise _unavailable("run", "could not be cancelled", id) from None
        return {"run": id, "state": "cancelling"}, 202

    async def _record(id: str) -> Record:
        try:
            record = await kit.runs.register.get(id) if _ID.fullmatch(id) else None
        except LogUnavailable:
            raise _unavailable("run", "could not be looked up", id) from None
        if record is None:
            raise Problem(
                404, "run-unknown", "run", "must be one that is kept", id, "Start one by POST /runs; ended ones are forgotten."
            )
        return record

    async def _follow(record: Record, caller: Caller, place: Place) -> Response:
        """Answer with what is left of a run, which may be nothing."""
        window, topic = kit.window, RUN_TOPICS + record.id
        if record.ended and window.end_of(topic) is None:
            if place.asked == record.ended:
                return Response(b"", 204)
            # Another process may have read further; else its end has left the window.
            try:
                found = await kit.reader.located(record.ended)
            except LogUnavailable:
                raise _unavailable("run", "could not be located", record.id) from None
            if isinstance(found, str) or window.end_of(topic) is None:
                raise Problem(
                    410,
                    "run-gone",
                    "run",
                    "is over, and its events are no longer kept",
                    record.id,
                    "Read a run within SSE_HISTORY_SECONDS of its end.",
                )
        end = window.end_of(topic)
        if end is not None and place.cursor is not None and place.cursor > end:
            return Response(b"", 204)
        if request.method == "HEAD":
            return stream_head(Response(b""))
        return await _stream(record, caller, place)

    async def _stream(record: Record, caller: Caller, place: Place) -> Response:
        owned = record.user == caller.user
        response = await open_stream(kit, caller, (RUN_TOPICS + record.id,), place, of_run=True, owned=owned)
        # What the answer to a POST is a representation of (RFC 9110, section 8.7).
        response.headers["Content-Location"] = f"/runs/{record.id}/events"
        return response

    return pages


def _new_id(caller: Caller) -> str:
    """Return the id of a new run; with an Idempotency-Key the same each time."""
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return secrets.token_urlsafe(16)
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise Problem(
            400, "invalid", "Idempotency-Key", "must be 1 to 255 visible ASCII characters", key, "A UUID is a good one."
        )
    digest = hashlib.sha256(json.dumps([caller.user, key]).encode()).digest()
    return urlsafe_b64encode(digest[:16]).decode().rstrip("=")


def _fingerprint(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]


def _unavailable(name: str, rule: str, value: object) -> Problem:
    return Problem(
        503,
        "log-unavailable",
        name,
        f"{rule}: Redis does not answer",
        value,
        "Ask again with the same Idempotency-Key or Last-Event-ID.",
        {"Retry-After": "1"},
    )
