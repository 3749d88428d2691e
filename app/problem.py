"""
Errors as problem details: name, rule, value, cure. RFC 9457.

https://www.rfc-editor.org/rfc/rfc9457
"""

import json
from http import HTTPStatus

from quart import Response

from app.event import EventError

# Names, not addresses: a table in README.md explains each.
_TYPE = "urn:sse-kit:"


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
    ) -> None:
        super().__init__(f"{name} {rule}")
        self.status = status
        self.slug = slug
        self.name = name
        self.rule = rule
        self.value = value
        self.cure = cure
        self.headers = headers or {}

    @classmethod
    def of(cls, error: EventError, prefix: str = "") -> "Problem":
        """Return the 400 that tells of *error*; *prefix* says where in a batch."""
        return cls(400, "invalid", prefix + error.name, error.rule, error.value, error.cure)

    def fields(self) -> dict[str, object]:
        """Return what stands in the problem document."""
        value = self.value
        if not isinstance(value, int | float | str | type(None)):
            value = repr(value)
        if isinstance(value, str) and len(value) > 200:
            value = value[:200] + "…"
        if isinstance(value, str):
            value = value.encode("utf-8", "backslashreplace").decode()
        return {
            "type": f"{_TYPE}{self.slug}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": f"{self.name} {self.rule}. {self.cure}",
            "name": self.name,
            "rule": self.rule,
            "value": value,
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
        for name, value in self.headers.items():
            response.headers[name] = value
        return response
