"""
Let pages of other sites use the API, credentials included: only those that are named.

https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from collections.abc import Mapping

Headers = list[tuple[bytes, bytes]]

_METHODS = b"GET, POST, DELETE"
_REQUEST_HEADERS = b"Authorization, Content-Type, Idempotency-Key, Last-Event-ID"
# Besides those that every page may read.
_ANSWER_HEADERS = b"Retry-After, WWW-Authenticate, X-Sse-Fallback"
# No browser keeps a preflight's answer for longer than two hours.
_PREFLIGHT_SECONDS = b"7200"


class Cors:
    """What browsers are told about the origins of SSE_CORS_ORIGINS."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, request: Mapping[bytes, bytes]) -> Headers:
        """Return what an answer carries; nothing where no origin is configured."""
        if not self._origins:
            return []
        # Even without an origin: else a cache could give this answer to a page.
        headers = [(b"vary", b"Origin")]
        origin = request.get(b"origin", b"")
        if origin in self._origins:
            # The very origin: `*` is not allowed with credentials, and must not be.
            headers += [
                (b"access-control-allow-origin", origin),
                (b"access-control-allow-credentials", b"true"),
                (b"access-control-expose-headers", _ANSWER_HEADERS),
            ]
        return headers

    def preflight(self, method: str, request: Mapping[bytes, bytes]) -> Headers | None:
        """Return the headers that answer a preflight (204), None where it is not one of ours."""
        if method != "OPTIONS" or b"access-control-request-method" not in request:
            return None
        if request.get(b"origin", b"") not in self._origins:
            return None
        return [
            *self.headers(request),
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", _REQUEST_HEADERS),
            (b"access-control-max-age", _PREFLIGHT_SECONDS),
        ]
