"""
What `/openapi.json` says: every route, what it takes, and every status it answers with.

https://spec.openapis.org/oas/v3.1.1.html
"""

from typing import Any

from app.event import NAME_MAX_CHARACTERS, RETRY_MAX_MS, TOPIC_MAX_CHARACTERS
from app.settings import Settings

Schema = dict[str, Any]

_TOPIC = rf"^[A-Za-z0-9._~:/@%-]{{1,{TOPIC_MAX_CHARACTERS}}}$"
_SUBSCRIPTION = rf"^([A-Za-z0-9._~:/@%-]{{1,{TOPIC_MAX_CHARACTERS}}}\*?|\*)$"
_VISIBLE = r"^[\x21-\x7e]+$"
_USER = {"type": "string", "minLength": 1, "maxLength": 64}
_RUN_ID = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}

# What each status means, wherever it is answered.
_PROBLEMS = {
    400: "Something in the request breaks a rule.",
    401: "No token, ticket or cookie, or one that is not valid.",
    403: "No right to a topic, or a cookie from a foreign page.",
    404: "There is none.",
    410: "It is over, and no longer kept.",
    413: "The body is over SSE_MAX_BODY_BYTES.",
    415: "The body is not application/json.",
    422: "The Idempotency-Key was used with other events.",
    429: "A limit is reached: come back later.",
    503: "Not now: the process drains or loads, Redis or the keys are away.",
}


def document(settings: Settings) -> Schema:
    """Return the description of the API of a process with *settings*."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "SSE kit",
            "version": "0.1.0",
            "summary": "Server-Sent Events for many clients, over several processes.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"bearer": []}, {"ticket": []}, {"cookie": []}] if settings.auth == "jwt" else [],
        "paths": _with_heads(_paths(settings)),
        "components": {
            "schemas": {"Problem": _problem(), "Event": _event(settings), "StreamEvent": _stream_event()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "ticket": {"type": "apiKey", "in": "query", "name": "ticket"},
                "cookie": {"type": "apiKey", "in": "cookie", "name": "session"},
            },
        },
    }


def _paths(settings: Settings) -> Schema:
    stream = {
        "description": "The stream; it begins with `stream.open`. With `X-Sse-Fallback`: not now, come back after `retry`.",
        "headers": {
            "X-Sse-Fallback": {"description": "The status that it would have been.", "schema": {"type": "string"}}
        },
        # Of each event: the body is a sequence of them.
        "content": {"text/event-stream": {"schema": _ref("StreamEvent")}},
    }
    batch = {
        "oneOf": [
            _ref("Event"),
            {"type": "array", "items": _ref("Event"), "minItems": 1, "maxItems": settings.max_batch_events},
        ]
    }
    return {
        "/events": {
            "get": _operation(
                "openStream",
                "Open a stream of these topics, of `broadcast`, and of the caller's own topic.",
                {200: stream},
                (400, 401, 403, 429, 503),
                [
                    _query(
                        "topic",
                        "A topic, or a prefix that ends in `*`. Each as an argument of its own.",
                        {
                            "type": "array",
                            "items": {"type": "string", "pattern": _SUBSCRIPTION},
                            "maxItems": settings.max_topics,
                        },
                    ),
                    _query(
                        "last_event_id",
                        "Where to go on: an id that was read from a stream, or `earliest`.",
                        {"type": "string", "pattern": _VISIBLE, "maxLength": 200},
                    ),
                    *_user(settings),
                    {
                        "name": "Last-Event-ID",
                        "in": "header",
                        "description": "The same, as browsers send it; it counts before the argument.",
                        "schema": {"type": "string"},
                    },
                ],
            )
        },
        "/runs": {
            "post": _operation(
                "startRun",
                "Start a run; the answer is its stream, which ends with `run.done` or `run.failed`.",
                {200: stream},
                (400, 401, 403, 413, 415, 422, 429, 503),
                [_key("Repeat a POST with the same key: it reads the same run."), *_user(settings)],
                body=_run(),
            )
        },
        "/runs/{id}/events": {
            "get": _operation(
                "followRun",
                "Follow a run, from its beginning or from a position.",
                {200: stream, 204: {"description": "The end was read already."}},
                (400, 401, 403, 404, 410, 429, 503),
                [
                    _path("id", "As `stream.open` names it, behind `run:`.", _RUN_ID),
                    _query(
                        "last_event_id",
                        "Where to go on.",
                        {"type": "string", "pattern": _VISIBLE, "maxLength": 200},
                    ),
                    *_user(settings),
                ],
            )
        },
        "/runs/{id}": {
            "delete": _operation(
                "cancelRun",
                "Cancel a run, wherever it is made.",
                {
                    200: _json("It had ended.", _object({"run": {"type": "string"}, "state": {"const": "ended"}})),
                    202: _json("It ends soon.", _object({"run": {"type": "string"}, "state": {"const": "cancelling"}})),
                },
                (400, 401, 403, 404, 503),
                [_path("id", "As `stream.open` names it, behind `run:`.", _RUN_ID), *_user(settings)],
            )
        },
        "/operator/events": {
            "get": _operation(
                "watch",
                "Watch the figures of all processes, as `/metrics` has them, once a second; for administrators.",
                {200: stream},
                (400, 401, 403, 429, 503),
                _user(settings),
            )
        },
        "/publish": {
            "post": _operation(
                "publish",
                "Publish one event or an array of them: all or none, in one order.",
                {
                    201: _json(
                        "Published.", _object({"ids": {"type": "array", "items": {"type": "string"}, "minItems": 1}})
                    )
                },
                (400, 401, 403, 413, 415, 422, 429, 503),
                [_key("Repeat a publish that failed with the same key: nothing is doubled.")],
                body=batch,
            )
        },
        "/tickets": {
            "post": _operation(
                "makeTicket",
                "Make a ticket, with which an EventSource opens streams.",
                {
                    201: _json(
                        "The ticket; use it soon.",
                        _object(
                            {
                                "ticket": {"type": "string"},
                                "use_within_seconds": {"type": "number"},
                                "expires_at": {"type": "number", "description": "Seconds since 1970."},
                            }
                        ),
                    )
                },
                (400, 401, 403, 503),
                _user(settings),
            ),
            "delete": _operation(
                "revokeTicket",
                "End a ticket and the stream that it serves. Whoever has it may.",
                {204: {"description": "It is over, or was none."}},
                (400, 503),
                [_query("ticket", "The ticket.", {"type": "string"}, required=True)],
                open_to_all=True,
            ),
        },
        "/streams/{stream}/token": {
            "post": _operation(
                "renewStream",
                "Let an open stream of the same user go on until this request's token expires.",
                {
                    200: _json(
                        "Renewed.", _object({"stream": {"type": "string"}, "expires_at": {"type": ["number", "null"]}})
                    )
                },
                (400, 401, 403, 404, 503),
                [_path("stream", "As `stream.open` names it.", {"type": "string", "minLength": 1}), *_user(settings)],
            )
        },
        "/users/{user}/streams": {
            "get": _operation(
                "listStreams",
                "List a user's streams on all processes. For administrators.",
                {
                    200: _json(
                        "The streams, the oldest first.",
                        _object({"user": {"type": "string"}, "streams": {"type": "array", "items": _held()}}),
                    )
                },
                (400, 401, 403, 404, 503),
                [_path("user", "Their id, percent-encoded.", _USER), *_user(settings)],
            ),
            "delete": _operation(
                "endStreams",
                "End a user's streams on all processes, and their tickets. For administrators.",
                {
                    200: _json(
                        "They are ending.",
                        _object({"user": {"type": "string"}, "ended": {"type": "integer", "minimum": 0}}),
                    )
                },
                (400, 401, 403, 404, 503),
                [_path("user", "Their id, percent-encoded.", _USER), *_user(settings)],
            ),
        },
        "/healthz": {
            "get": _operation(
                "health",
                "Tell whether the event loop runs.",
                {200: _json("It does.", _object({"status": {"const": "ok"}, "process": {"type": "string"}}))},
                open_to_all=True,
            )
        },
        "/readyz": {
            "get": _operation(
                "readiness",
                "Tell whether this process should get requests.",
                {
                    200: _json(
                        "It should.",
                        _object(
                            {
                                "status": {"const": "ready"},
                                "process": {"type": "string"},
                                "streams": {"type": "integer", "minimum": 0},
                            }
                        ),
                    ),
                    503: _json(
                        "It should not.",
                        _object(
                            {
                                "status": {"const": "unready"},
                                "reason": {"type": "string"},
                                "process": {"type": "string"},
                            }
                        ),
                    ),
                },
                open_to_all=True,
            )
        },
        "/openapi.json": {
            "get": _operation(
                "describe", "Return this description.", {200: _json("It.", {"type": "object"})}, open_to_all=True
            )
        },
        "/": {
            "get": _operation(
                "page",
                "Return the demonstration page.",
                {200: {"description": "It.", "content": {"text/html": {"schema": {"type": "string"}}}}, **_UNCHANGED},
                open_to_all=True,
            )
        },
        "/static/{name}": {
            "get": _operation(
                "file",
                "Return a file of the page, or the browser's client.",
                {200: {"description": "It.", "content": {"*/*": {}}}, **_UNCHANGED},
                (404,),
                [_path("name", "The file's name.", {"type": "string", "minLength": 1})],
                open_to_all=True,
            )
        },
    }


def _held() -> Schema:
    return _object(
        {
            "stream": {"type": "string"},
            "process": {"type": "string"},
            "seconds": {"type": "number", "minimum": 0, "description": "Since it was opened."},
            "topics": {"type": "array", "items": {"type": "string"}, "description": "A long list ends in `…`."},
            "leaving": {"type": "boolean", "description": "It is being ended for a newer one."},
        }
    )


_UNCHANGED: dict[int, Schema] = {
    206: {"description": "The part that was asked for.", "content": {"*/*": {}}},
    304: {"description": "The one you have is the newest."},
    416: {"description": "There is no such part.", "content": {"*/*": {}}},
}


def _operation(
    name: str,
    summary: str,
    answers: dict[int, Schema],
    problems: tuple[int, ...] = (),
    parameters: list[Schema] | None = None,
    *,
    body: Schema | None = None,
    open_to_all: bool = False,
) -> Schema:
    responses = {str(status): answer for status, answer in answers.items()}
    for status in problems:
        responses[str(status)] = {
            "description": _PROBLEMS[status],
            "content": {"application/problem+json": {"schema": _ref("Problem")}},
        }
    operation: Schema = {"operationId": name, "summary": summary, "responses": dict(sorted(responses.items()))}
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if open_to_all:
        operation["security"] = []
    return operation


def _with_heads(paths: Schema) -> Schema:
    """Return *paths* with a HEAD beside each GET: the same without a body."""
    for operations in paths.values():
        if get := operations.get("get"):
            responses = {
                status: {name: value for name, value in answer.items() if name != "content"}
                for status, answer in get["responses"].items()
            }
            operations["head"] = {**get, "operationId": get["operationId"] + "Head", "responses": responses}
    return paths


def _user(settings: Settings) -> list[Schema]:
    """Return the argument that names a user where nobody asks for a token."""
    if settings.auth != "none":
        return []
    return [_query("user", "Who asks; believed with SSE_AUTH=none alone.", _USER)]


def _query(name: str, about: str, schema: Schema, *, required: bool = False) -> Schema:
    return {"name": name, "in": "query", "description": about, "schema": schema, "required": required}


def _key(about: str) -> Schema:
    return {
        "name": "Idempotency-Key",
        "in": "header",
        "description": about,
        "schema": {"type": "string", "pattern": _VISIBLE, "maxLength": 255},
    }


def _path(name: str, about: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "description": about, "schema": schema, "required": True}


def _json(about: str, schema: Schema) -> Schema:
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def _object(properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _problem() -> Schema:
    text = {"type": "string"}
    return {
        "description": "RFC 9457: what was wrong, by name, rule, value and cure.",
        **_object(
            {
                "type": {"type": "string", "pattern": "^urn:sse-kit:[a-z-]+$"},
                "title": text,
                "status": {"type": "integer", "minimum": 400, "maximum": 599},
                "detail": text,
                "name": text,
                "rule": text,
                "value": {"type": ["string", "number", "boolean", "null"]},
                "cure": text,
            }
        ),
    }


def _event(settings: Settings) -> Schema:
    topics = {
        "type": "array",
        "items": {"type": "string", "pattern": _TOPIC},
        "minItems": 1,
        "maxItems": settings.max_topics,
    }
    return {
        "type": "object",
        "required": ["topics", "data"],
        "additionalProperties": False,
        "properties": {
            "topics": topics,
            "event": {
                "type": "string",
                "maxLength": NAME_MAX_CHARACTERS,
                "pattern": r"^(?!stream\.|run\.)[^\r\n\x00]*$",
                "description": "`message` where it is left out; names of the kit are refused.",
            },
            "data": {"description": "A string is sent as it is, anything else as JSON."},
            "retry": {"type": "integer", "minimum": 0, "maximum": RETRY_MAX_MS, "description": "Milliseconds."},
        },
    }


def _run() -> Schema:
    text = {"type": "string", "pattern": r"\S"}
    message = _object({"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}})
    choices = {
        "kind": {"const": "chat"},
        "model": {"type": "string", "minLength": 1, "maxLength": 200},
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": 1_000_000},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    }
    messages = {"type": "array", "items": message, "minItems": 1}

    def chat(name: str, schema: Schema) -> Schema:
        made = _object({**choices, name: schema})
        return {**made, "required": ["kind", name]}

    task = _object({"kind": {"const": "task"}, "task": {"type": "string"}, "arguments": {"type": "object"}})
    return {"oneOf": [chat("prompt", text), chat("messages", messages), {**task, "required": ["kind", "task"]}]}


def _stream_event() -> Schema:
    return {
        "description": "One event of a stream, as text/event-stream.",
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": _VISIBLE},
            "event": {"type": "string"},
            "data": {"type": "string"},
            "retry": {"type": "integer", "minimum": 0, "maximum": RETRY_MAX_MS},
        },
    }
