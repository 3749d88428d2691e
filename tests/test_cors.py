"""Pages of other sites: those that are named may use the API, no other."""

import pytest

from tests.inside import Inside
from tests.live import ask
from tests.signing import SECRET, bearer, token
from tests.wire import Reader, Wire, request

ORIGIN = "https://app.example"
FOREIGN = ["https://evil.example", "null", "http://app.example", "https://app.example.evil", "*", ""]
PREFLIGHT = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization,last-event-id"}


@pytest.fixture(scope="module", params=["auto", "off"])
def server(request):
    """A process of each path that lets two origins in."""
    settings = {"auth": "jwt", "jwt_secret": SECRET, "cors_origins": f"{ORIGIN} http://localhost:3000"}
    with Inside(handoff=request.param, max_streams=2, **settings) as server:
        yield server


def shared(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("access-control-")}


READABLE = {
    "access-control-allow-origin": ORIGIN,
    "access-control-allow-credentials": "true",
    "access-control-expose-headers": "Retry-After, WWW-Authenticate, X-Sse-Fallback",
}


class TestPreflight:
    """What a browser asks before it sends `Authorization` or `Last-Event-ID`."""

    @pytest.mark.parametrize("path", ["/events", "/publish", "/tickets", "/streams/a-1/token"])
    async def test_allowed(self, server, path):
        """Answered at the door, without a token: browsers send none with it."""
        answer = await ask(server.port, "OPTIONS", path, headers={"Origin": ORIGIN, **PREFLIGHT})

        assert 204 == answer.status
        assert READABLE.items() <= answer.headers.items()
        assert "GET, POST, DELETE" == answer.headers["access-control-allow-methods"]
        allowed = answer.headers["access-control-allow-headers"].lower().split(", ")
        assert {"authorization", "content-type", "last-event-id", "idempotency-key"} == set(allowed)

    @pytest.mark.parametrize("origin", FOREIGN)
    async def test_foreign(self, server, origin):
        """No header of ours lets another origin go on."""
        answer = await ask(server.port, "OPTIONS", "/events", headers={"Origin": origin, **PREFLIGHT})

        assert {} == shared(answer.headers)


class TestAnswers:
    def test_stream(self, server):
        """A stream may be read, on either path; caches keep it apart."""
        headers = {"Origin": ORIGIN, **bearer(token(subscribe=["t"]))}
        with Reader.open(server.port, "t", headers=headers) as stream:
            assert READABLE == shared(stream.until_open().headers)
            assert "Origin" == stream.headers["vary"]

    def test_soft_fail(self, server):
        """What means "later" may be read, too: on an answer that it must not read, an EventSource gives up for ever."""
        headers = {**bearer(token(subscribe=["t"]))}
        full = [Reader.open(server.port, "t", headers=headers).until_open() for _ in range(2)]
        with Reader.open(server.port, "t", headers={"Origin": ORIGIN}) as later:
            assert (200, "429") == (later.status, later.headers["x-sse-fallback"])
            assert READABLE == shared(later.headers)
        for stream in full:
            stream.close()

    async def test_refusals(self, server):
        """A page may read why it was refused."""
        for path, status in (("/nowhere", 404), ("/publish", 405)):
            answer = await ask(server.port, "GET", path, headers={"Origin": ORIGIN})

            assert (status, READABLE) == (answer.status, shared(answer.headers))

    @pytest.mark.parametrize("origin", FOREIGN)
    async def test_foreign(self, server, origin):
        """Another origin is never allowed, let alone `*`."""
        answer = await ask(server.port, "GET", "/healthz", headers={"Origin": origin})

        assert ({}, "Origin") == (shared(answer.headers), answer.headers["vary"])

    async def test_without_an_origin(self, server):
        """A cache must not give this answer to a page of another site."""
        answer = await ask(server.port, "GET", "/healthz")

        assert ({}, "Origin") == (shared(answer.headers), answer.headers["vary"])

    def test_none_configured(self):
        """Without origins nothing is said at all."""
        with Inside() as server, Wire(server.port) as wire:
            wire.send(request("/healthz", {"Origin": ORIGIN}))
            head = wire.until(b"\r\n\r\n").lower()

        assert b"access-control" not in head
        assert b"vary" not in head


class TestPages:
    async def test_security_headers(self, server):
        """A page runs its own scripts alone, in no frame, and tells no other site where it was."""
        answer = await ask(server.port, "GET", "/")

        policy = answer.headers["content-security-policy"]
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
        assert ("nosniff", "no-referrer") == (
            answer.headers["x-content-type-options"],
            answer.headers["referrer-policy"],
        )
