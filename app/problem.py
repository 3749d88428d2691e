"""
Errors as problem details: name, rule, value, cure. RFC 9457.

https://www.rfc-editor.org/rfc/rfc9457
"""

import json
import math
from http import HTTPStatus

from quart import Response

from app.event import EventError

# Names, not addresses: a table in README.md explains each.
_TYPE = "urn:sse-kit:"


# Longest text from outside that is given back.
_LONGEST = 200


def _plain(text: str) -> str:
    """Return *text* short, and such that UTF-8 can carry it."""
    short = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return short.encode("utf-8", "backslashreplace").decode()


def _shown(value: object) -> int | float | str | None:
    """Return *value* as a problem document can hold it."""
    # JSON has no Infinity, and few readers take an integer of thousands of digits.
    if value is None or (isinstance(value, int | float) and abs(value) < 2**53):
        return value
    if isinstance(value, str):
        return _plain(value)
    try:
        return _plain(repr(value))
    except RecursionError:
        return "nested too deeply to show"


class Problem(Exception):
    """A request that is refused, and what the client should know about it."""

    def __init__(
        self,
        status: int,
        slug: str,
        name: str,
        rule: str,
        value: object,
        cure: str,
        headers: dict[str, str] | None = None,
        *,
        wait_seconds: float | None = None,
    ) -> None:
        name = _plain(name)
        super().__init__(f"{name} {rule}")
        self.status = status
        self.slug = slug
        self.name = name
        self.rule = rule
        self.value = value
        self.cure = cure
        self.headers = headers or {}
        # When to come back, where that is known: for API clients and for the soft fail.
        self.wait_seconds = wait_seconds
        if wait_seconds is not None:
            self.headers = {**self.headers, "Retry-After": str(math.ceil(wait_seconds))}

    @classmethod
    def of(cls, error: EventError, prefix: str = "") -> "Problem":
        """Return the 400 that tells of *error*; *prefix* says where in a batch."""
        return cls(400, "invalid", prefix + error.name, error.rule, error.value, error.cure)

    def fields(self) -> dict[str, object]:
        """Return what stands in the problem document."""
        return {
            "type": f"{_TYPE}{self.slug}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": f"{self.name} {self.rule}. {self.cure}",
            "name": self.name,
            "rule": self.rule,
            "value": _shown(self.value),
            "cure": self.cure,
        }

    def response(self) -> Response:
        """Return the answer: `application/problem+json`."""
        response = Response(
            json.dumps(self.fields(), ensure_ascii=False) + "\n",
            status=self.status,
            content_type="application/problem+json",
        )
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
        for name, value in self.headers.items():
            response.headers[name] = value
        return response
