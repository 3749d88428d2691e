"""
Every way of not getting in, each with its status and its problem document.

What is refused takes no slot, opens no stream, and is nobody else by mistake.
"""

import asyncio
import json
import threading
import time
from typing import Any
from urllib.parse import quote

import pytest

from tests.inside import Inside
from tests.live import ask
from tests.signing import SECRET, bearer, claims, jwks, private_key, public_pem, sign, sign_by
from tests.wire import Reader

ORIGIN = "https://app.example"
EVENTS = "/events?topic=orders/1"
RIGHT = {"subscribe": ["orders/*"], "publish": ["orders/*"]}


@pytest.fixture(scope="module")
def server():
    """A process whose tokens are signed with a secret."""
    with Inside(
        auth="jwt",
        jwt_secret=SECRET,
        jwt_audience="sse",
        jwt_issuer="https://id.example",
        jwt_leeway_seconds=1,
        ticket_use_seconds=2,
        cors_origins=ORIGIN,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A process whose tokens are verified with public keys."""
    path = tmp_path_factory.mktemp("keys") / "jwks.json"
    path.write_text(jwks())
    with Inside(auth="jwt", jwks_file=str(path)) as server:
        yield server


def right(sub: object = "alice", **more: Any) -> dict[str, Any]:
    """Return claims that are let in."""
    return claims(sub, **{"aud": "sse", "iss": "https://id.example", **RIGHT, **more})


def changed(**more: Any) -> str:
    """Return a token that would be let in without *more*; None takes a claim away."""
    return sign({name: value for name, value in (right() | more).items() if value is not None})


def with_rights(rights: object) -> str:
    return sign(right() | {"sse": rights})


async def refused(
    server: Inside,
    status: int,
    name: str,
    rule: str,
    *,
    method: str = "GET",
    path: str = EVENTS,
    headers: dict[str, str] | None = None,
    body: bytes = b"",
) -> dict[str, Any]:
    """Ask; check that it is refused as said, that the answer tells no secret, and that nothing was taken."""
    before = server.kit.hub.counts.opened
    answer = await ask(server.port, method, path, headers=headers, body=body)
    assert (status, "application/problem+json") == (answer.status, answer.headers["content-type"]), answer.body
    problem = answer.json
    assert name == problem["name"], problem
    assert rule in problem["rule"], problem
    assert {"type", "title", "status", "detail", "name", "rule", "value", "cure"} == problem.keys()
    if status == 401:
        assert "urn:sse-kit:unauthorized" == problem["type"]
        assert answer.headers["www-authenticate"].startswith("Bearer")
    for secret in (headers or {}).get("Authorization", "").split()[1:]:
        assert secret not in answer.body.decode() or len(secret) < 20
    assert before == server.kit.hub.counts.opened
    return problem


NOW = int(time.time())
# Tokens are made when this file is read, and used when a long suite gets here.
LATER = NOW + 86_400
DEEP = b"[" * 4_000 + b"]" * 4_000
SIGNED = sign(right())
TOKENS = [
    # What is no token
    ("", "token", "three parts"),
    ("garbage", "token", "three parts"),
    ("a.b", "token", "three parts"),
    ("a.b.c.d", "token", "three parts"),
    (SIGNED + "=", "token", "three parts"),
    (SIGNED + "\xe9", "token", "three parts"),
    ("x" * 9_000, "token", "8192 characters"),
    ("YQ.YQ.YQ", "token", "header"),
    (sign(right(), header=["alg"]), "token", "header"),
    (SIGNED[:-4] + "AAAA", "token", "signature"),
    (SIGNED.rsplit(".", 1)[0] + ".", "token", "signature"),
    (sign(right(), secret="b secret of tests that is long enough"), "token", "signature"),
    (".".join([SIGNED.split(".")[0], sign(right("bob")).split(".")[1], SIGNED.split(".")[2]]), "token", "signature"),
    # How it is signed
    (sign(right(), header={"alg": "none"}), "alg", "one of HS256"),
    (sign(right(), header={"alg": ["HS256"]}), "alg", "one of HS256"),
    (sign(right(), header={"alg": "none"}).rsplit(".", 1)[0] + ".", "alg", "one of HS256"),
    (sign(right(), header={"alg": "None"}), "alg", "one of HS256"),
    (sign(right(), header={"alg": "hs256"}), "alg", "one of HS256"),
    (sign(right(), header={"alg": "HS512"}), "alg", "one of HS256"),
    (sign(right(), header={"alg": "RS256"}), "alg", "one of HS256"),
    (sign(right(), header={"typ": "JWT"}), "alg", "one of HS256"),
    (sign(right(), header={"alg": "HS256", "kid": 7}), "token", "header"),
    (sign(right(), header={"alg": "HS256", "crit": ["exp"], "exp": 1}), "token", "header"),
    (sign(right(), header={"alg": "HS256", "b64": False, "crit": ["b64"]}), "token", "header"),
    # When
    (changed(exp=NOW - 60), "exp", "expired"),
    (changed(exp=0), "exp", "expired"),
    (changed(exp=None), "exp", "be there"),
    (changed(exp=str(LATER)), "exp", "number"),
    (changed(exp=True), "exp", "number"),
    (changed(exp=-1), "exp", "number"),
    (changed(exp=[LATER]), "exp", "number"),
    (changed(exp=(LATER) * 1000), "exp", "number"),
    (changed(nbf=LATER), "nbf", "not valid yet"),
    (changed(nbf="soon"), "nbf", "number"),
    (changed(iat=LATER), "iat", "not valid yet"),
    # Whose, from whom, for whom
    (changed(sub=None), "sub", "64 characters"),
    (changed(sub=""), "sub", "64 characters"),
    (changed(sub="u" * 65), "sub", "64 characters"),
    (changed(sub=7), "sub", "64 characters"),
    (changed(sub=["alice"]), "sub", "64 characters"),
    (changed(sub="é" * 64), "sub", "percent-encoded"),
    (changed(sub="a\ud800"), "sub", "UTF-8"),
    (changed(aud=None), "aud", "SSE_JWT_AUDIENCE"),
    (changed(aud="other"), "aud", "SSE_JWT_AUDIENCE"),
    (changed(aud="SSE"), "aud", "SSE_JWT_AUDIENCE"),
    (changed(aud=["other"]), "aud", "SSE_JWT_AUDIENCE"),
    (changed(aud=[["sse"]]), "aud", "string"),
    (changed(aud={"sse": 1}), "aud", "string"),
    (changed(iss=None), "iss", "SSE_JWT_ISSUER"),
    (changed(iss="https://id.example/"), "iss", "SSE_JWT_ISSUER"),
    (changed(iss=["https://id.example"]), "iss", "SSE_JWT_ISSUER"),
    # What
    (sign(b"[]"), "token", "JSON object"),
    (sign(b"{"), "token", "JSON object"),
    (sign(b"\xff\xfe"), "token", "JSON object"),
    (sign(b'{"exp": NaN}'), "token", "JSON object"),
    (sign(b'{"exp": 1e999, "sub": "a"}'), "exp", "number"),
    (sign(b'{"exp": %s}' % (b"9" * 5_000)), "token", "JSON object"),
    (sign(DEEP), "token", "8192 characters"),
    (sign(DEEP[1_500:-1_500]), "token", "JSON object"),
    (with_rights([]), "sse", "object"),
    (with_rights("orders/*"), "sse", "object"),
    (with_rights({"subscribe": "orders/*"}), "sse.subscribe", "array"),
    (with_rights({"subscribe": {"orders/*": True}}), "sse.subscribe", "array"),
    (with_rights({"subscribe": None}), "sse.subscribe", "array"),
    (with_rights({"subscribe": [7]}), "sse.subscribe", "1 to 255"),
    (with_rights({"subscribe": [["orders/*"]]}), "sse.subscribe", "1 to 255"),
    (with_rights({"subscribe": ["orders/*/items"]}), "sse.subscribe", "1 to 255"),
    (with_rights({"subscribe": [""]}), "sse.subscribe", "1 to 255"),
    (with_rights({"subscribe": ["a\nb"]}), "sse.subscribe", "1 to 255"),
    (with_rights({"subscribe": ["ä*"]}), "sse.subscribe", "1 to 255"),
    (with_rights({"subscribe": ["a"] * 501}), "sse.subscribe", "500"),
    (with_rights({"publish": "*"}), "sse.publish", "array"),
    (with_rights({"publish": [None]}), "sse.publish", "1 to 255"),
    (with_rights({"admin": 1}), "sse.admin", "true or false"),
    (with_rights({"admin": "true"}), "sse.admin", "true or false"),
]


class TestToken:
    """A token that is not right is 401: never somebody else, never anonymous."""

    async def test_none(self, server):
        """No token is no caller."""
        problem = await refused(server, 401, "token", "Authorization: Bearer")

        assert problem["value"] is None

    @pytest.mark.parametrize("path", ["/publish", "/tickets", "/streams/ab-1/token"])
    async def test_none_for_a_post(self, server, path):
        """Nothing else is open without one either."""
        await refused(server, 401, "token", "Authorization: Bearer", method="POST", path=path)

    @pytest.mark.parametrize(("text", "name", "rule"), TOKENS, ids=range(len(TOKENS)))
    async def test_wrong(self, server, text, name, rule):
        """Each mistake is named; a native EventSource hears of it by status, too: it is not "later"."""
        headers = {"Accept": "text/event-stream", **bearer(text)}
        await refused(server, 401, name, rule, headers=headers)

    @pytest.mark.parametrize(("text", "name", "rule"), TOKENS[:20:4], ids=range(5))
    async def test_wrong_in_a_cookie(self, server, text, name, rule):
        """A cookie's token is held to the same."""
        headers = {"Cookie": f"session={text}", "Sec-Fetch-Site": "same-origin"}
        await refused(server, 401, name, rule, headers=headers)

    @pytest.mark.parametrize("value", ["Basic YTpi", SIGNED, "Bearer", f"Token {SIGNED}", ""])
    async def test_wrong_scheme(self, server, value):
        """Another scheme is refused, and what may be a token is not repeated."""
        answer = await ask(server.port, "GET", EVENTS, headers={"Authorization": value})

        assert 401 == answer.status
        # Not in part either: a long value is cut where it is shown.
        assert answer.json["value"] is None
        assert not any(part in answer.body.decode() for part in (SIGNED[:20], SIGNED[-10:], "YTpi"))

    async def test_no_second_chance(self, server):
        """Where the first carrier is bad, the next is not looked at."""
        good = {"Cookie": f"session={SIGNED}", "Sec-Fetch-Site": "same-origin"}
        await refused(server, 401, "token", "three parts", headers={**good, **bearer("bad")})
        await refused(server, 401, "ticket", "soon after", headers=good, path=f"{EVENTS}&ticket=bad")

    async def test_user_argument(self, server):
        """`?user=` names nobody here."""
        await refused(
            server, 400, "query parameter", "ticket, topic or", headers=bearer(SIGNED), path=f"{EVENTS}&user=bob"
        )
        await refused(server, 401, "token", "Authorization: Bearer", path=f"{EVENTS}&user=bob")

    async def test_let_in(self, server):
        """What all of the above is a change of is let in, with every right of its own."""
        for text in (SIGNED, changed(aud=["other", "sse"]), changed(exp=LATER + 0.5), changed(nbf=NOW, iat=NOW)):
            with Reader.open(server.port, "orders/1", headers=bearer(text)) as stream:
                assert ["orders/1", "broadcast", "user:alice"] == stream.until_open().opened["topics"]


class TestKeys:
    """What is verified with public keys."""

    async def test_secret_of_the_public_key(self, public):
        """HMAC with the RSA public key, which everybody has, verifies nothing."""
        forged = sign(claims(**RIGHT), secret=public_pem("RS256"))
        await refused(public, 401, "alg", "ES256, EdDSA, RS256", headers=bearer(forged))
        forged = sign(claims(**RIGHT), header={"alg": "HS256", "kid": "RS256-one"}, secret=public_pem("RS256"))
        await refused(public, 401, "alg", "ES256, EdDSA, RS256", headers=bearer(forged))

    async def test_unknown_kid(self, public):
        """A key that is not in the set is none."""
        text = sign_by("RS256", "two")
        await refused(public, 401, "kid", "one key that verifies RS256", headers=bearer(text))

    async def test_kid_of_another_type(self, public):
        """A token chooses a key, never an algorithm."""
        text = sign_by("ES256", header={"kid": "RS256-one"})
        await refused(public, 401, "kid", "one key that verifies ES256", headers=bearer(text))

    async def test_foreign_key_of_the_same_name(self, public):
        """A name is not a signature."""
        text = sign_by("RS256", "two", header={"kid": "RS256-one"})
        await refused(public, 401, "token", "signature", headers=bearer(text))

    async def test_key_in_the_token(self, public):
        """What the header brings along is not believed."""
        from tests.signing import jwk

        text = sign_by("RS256", "two", header={"jwk": jwk("RS256", "two"), "jku": "https://evil.example/jwks.json"})
        await refused(public, 401, "kid", "one key", headers=bearer(text))

    @pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
    async def test_let_in(self, public, algorithm):
        """Each type of key verifies its own."""
        with Reader.open(public.port, "orders/1", headers=bearer(sign_by(algorithm, **RIGHT))) as stream:
            stream.until_open()
        assert private_key(algorithm)


class TestTopics:
    """What only looks as if a pattern of the token contained it."""

    @pytest.mark.parametrize(
        ("patterns", "topic"),
        [
            (["order"], "orders/1"),
            (["orders"], "orders/1"),
            (["orders/"], "orders/1"),
            (["orders/1"], "orders/10"),
            (["orders/1"], "orders/*"),
            (["orders/*"], "orders*"),
            (["orders/*"], "orders"),
            (["orders/*"], "*"),
            (["orders/*"], "Orders/1"),
            (["orders/*"], "orders%2F1"),
            (["orders/*"], "%6Frders/1"),
            (["orders%2F*"], "orders/1"),
            (["u*"], "user:x"),
            (["*"], "user:x"),
            (["*"], "user:*"),
            (["user*"], "user:x"),
            (["user*"], "user:*"),
            (["user:x"], "user:x*"),
            (["user:X"], "user:x"),
            (["user:x"], "user:%78"),
            (["broadcast"], "broadcast*"),
            ([], "orders/1"),
            ([], "user:alice*"),
            ([], "user:Alice"),
            ([], "user:alice%20"),
        ],
    )
    async def test_subscribe(self, server, patterns, topic):
        """Neither a part, a prefix, case nor percent-encoding is the same."""
        text = sign(right() | {"sse": {"subscribe": patterns, "publish": ["*"]}})
        path = f"/events?topic={quote(topic)}"
        rule = "another user's" if topic.startswith("user:") else "contained in a pattern"
        await refused(server, 403, "topic", rule, headers=bearer(text), path=path)

    @pytest.mark.parametrize("topic", ["оrders/1", "ordеrs/1", "orders∕1", "orders/１", "user:аlice", "orders/1\u200b"])
    async def test_look_alikes(self, server, topic):
        """Look-alikes of other alphabets are no topics at all."""
        await refused(server, 400, "topic", "1 to 255", headers=bearer(SIGNED), path=f"/events?topic={quote(topic)}")

    @pytest.mark.parametrize(
        ("patterns", "topics"),
        [
            ([], ["orders/1"]),
            (["orders/1"], ["orders/2"]),
            (["orders/*"], ["orders/1", "billing"]),
            (["orders/*"], ["Orders/1"]),
            (["orders/*"], ["orders%2F1"]),
            (["*"], ["user:alice"]),
            (["*"], ["user:bob"]),
            (["u*"], ["user:bob"]),
            (["user:alice"], ["user:bob"]),
            (["orders/*"], ["broadcast"]),
        ],
    )
    async def test_publish(self, server, patterns, topics):
        """One topic without a right refuses the whole publish; a right to read is none to publish."""
        text = sign(right() | {"sse": {"subscribe": ["*", "user:*"], "publish": patterns}})
        events = [{"topics": ["orders/1"], "data": "fine"}] if "orders/*" in patterns else []
        events.append({"topics": topics, "data": "not fine"})
        end = server.kit.window.end
        await refused(
            server,
            403,
            "topic",
            "publish to",
            method="POST",
            path="/publish",
            headers={**bearer(text), "Content-Type": "application/json"},
            body=json.dumps(events).encode(),
        )
        assert end == server.kit.window.end


class TestTicket:
    """A ticket that is none, any more or at all."""

    async def ticket(self, server: Inside, text: str = SIGNED) -> str:
        answer = await ask(server.port, "POST", "/tickets", headers=bearer(text))
        assert (201, "no-store") == (answer.status, answer.headers["cache-control"])
        return answer.json["ticket"]

    async def refused(self, server: Inside, ticket: str) -> None:
        problem = await refused(server, 401, "ticket", "soon after", path=f"{EVENTS}&ticket={quote(ticket)}")
        assert problem["value"] is None

    @pytest.mark.parametrize("ticket", ["", "x", "a.b", "0" * 32 + "." + "A" * 43, SIGNED, "\x00", "é"])
    async def test_none(self, server, ticket):
        """What was never a ticket is refused, and so is a token in its place."""
        await self.refused(server, ticket)

    async def test_changed(self, server):
        """Every character of it counts."""
        ticket = await self.ticket(server)
        key, _, random = ticket.partition(".")
        for other in (f"{key}.{random[:-1]}{'A' if random[-1] != 'A' else 'B'}", f"{'0' * 32}.{random}", ticket + "="):
            await self.refused(server, other)

    async def test_first_use_too_late(self, server):
        """Who does not use it within SSE_TICKET_USE_SECONDS cannot any more."""
        ticket = await self.ticket(server)
        await asyncio.sleep(2.1)
        await self.refused(server, ticket)

    async def test_after_its_token(self, server):
        """It ends with the token it was made with."""
        ticket = await self.ticket(server, changed(exp=time.time() - 0.5))  # within the leeway of a second
        with Reader.open(server.port, "orders/1", query=f"ticket={ticket}") as stream:
            assert "token_expired" == await asyncio.to_thread(ended, server, stream)
        await self.refused(server, ticket)

    async def test_revoked(self, server):
        """Whoever has it can end it, and the stream with it."""
        ticket = await self.ticket(server)
        with Reader.open(server.port, "orders/1", query=f"ticket={ticket}") as stream:
            stream.until_open()
            for _ in range(2):
                assert 204 == (await ask(server.port, "DELETE", f"/tickets?ticket={ticket}")).status
            assert "revoked" == await asyncio.to_thread(ended, server, stream)
        await self.refused(server, ticket)

    async def test_revoked_on_the_way(self, server, monkeypatch):
        """It opens nothing for a client that it let in before, and whose position is still looked for."""
        looks, revoked = threading.Event(), threading.Event()

        async def located(id: str) -> str:
            looks.set()
            await asyncio.to_thread(revoked.wait, 60)
            return "unknown_position"

        monkeypatch.setattr(server.kit.reader, "located", located)
        ticket = await self.ticket(server)
        path, headers = f"{EVENTS}&ticket={ticket}", {"Last-Event-ID": "a:1-0"}
        coming = asyncio.create_task(refused(server, 401, "ticket", "soon after", path=path, headers=headers))
        assert await asyncio.to_thread(looks.wait, 60)
        assert 204 == (await ask(server.port, "DELETE", f"/tickets?ticket={ticket}")).status
        revoked.set()
        await coming

    async def test_user_revoked_on_the_way(self, server, monkeypatch):
        """Its user's streams end, too, while one has been let in and has not asked for a place yet."""
        held, revoked = threading.Event(), threading.Event()
        hold = server.kit.tickets.hold

        async def slowly(*args: Any) -> str | None:
            before = await hold(*args)
            held.set()
            await asyncio.to_thread(revoked.wait, 60)
            return before

        monkeypatch.setattr(server.kit.tickets, "hold", slowly)
        query = f"ticket={await self.ticket(server)}"
        coming = asyncio.create_task(asyncio.to_thread(Reader.open, server.port, "orders/1", query=query))
        assert await asyncio.to_thread(held.wait, 60)
        admin = bearer(sign(right("root") | {"sse": {"admin": True}}))
        assert 200 == (await ask(server.port, "DELETE", "/users/alice/streams", headers=admin)).status
        revoked.set()
        with await coming as stream:
            assert "revoked" == await asyncio.to_thread(ended, server, stream)

    async def test_ended_for_another_reason(self, server):
        """A reason that only another version of the kit knows ends a stream like any other, and is counted."""
        with Reader.open(server.port, "orders/1", query=f"ticket={await self.ticket(server)}") as stream:
            [id] = [each.id for each in (stream.until_open(), server)[1].streams()]
            server.call(lambda: server.kit.heed["end"]({"stream": id, "reason": "tomorrow"}))
            assert "tomorrow" == await asyncio.to_thread(ended, server, stream)
        assert 1 == server.kit.tally.ended.pop("tomorrow")

    async def test_for_two_streams(self, server):
        """It serves one stream at a time: the new one begins, and the one before ends."""
        ticket = await self.ticket(server)
        with Reader.open(server.port, "orders/1", query=f"ticket={ticket}") as first:
            first.until_open()
            with Reader.open(server.port, "orders/1", query=f"ticket={ticket}") as second:
                second.until_open()
                assert "evicted" == await asyncio.to_thread(ended, server, first)
                assert "stream.evicted" == first.names[-1]
                assert [second.opened["stream"]] == [stream.id for stream in server.streams()]

    async def test_for_two_tabs(self, server):
        """Whoever lost it to another client does not take it back as long as that one reads; then they may."""
        query = f"ticket={await self.ticket(server)}"
        with Reader.open(server.port, "orders/1", query=query) as first:
            first.until_open()
            with Reader.open(server.port, "orders/1", query=query) as second:
                second.until_open()
                await asyncio.to_thread(first.until_over)
                mark = first.last_event_id
                with Reader.open(server.port, "orders/1", query=query, resume=mark) as again:
                    await asyncio.to_thread(again.until, lambda reader: reader.retry_ms)
                assert "429" == again.headers["x-sse-fallback"]
                assert 40_000 < again.retry_ms < 80_000  # a jittered minute
                await refused(
                    server, 429, "ticket", "serve one", path=f"{EVENTS}&{query}", headers={"Last-Event-ID": mark}
                )
                assert [second.opened["stream"]] == [stream.id for stream in server.streams()]
        deadline = time.monotonic() + 20
        while server.streams():
            assert time.monotonic() < deadline, "the second has left"
        with Reader.open(server.port, "orders/1", query=query, resume=mark) as again:
            again.until_open()

    async def test_opens_streams_alone(self, server):
        """It stands in a URL, so it can neither publish nor make another one."""
        ticket = await self.ticket(server)
        body = json.dumps({"topics": ["orders/1"], "data": "x"}).encode()
        headers = {"Content-Type": "application/json"}
        await refused(
            server,
            403,
            "topic",
            "publish to",
            method="POST",
            path=f"/publish?ticket={ticket}",
            headers=headers,
            body=body,
        )
        await refused(server, 401, "ticket", "not be what", method="POST", path=f"/tickets?ticket={ticket}")
        await refused(server, 401, "ticket", "not be what", method="POST", path=f"/streams/a-1/token?ticket={ticket}")

    async def test_revoking_none(self, server):
        """What to revoke has to be said."""
        await refused(server, 400, "ticket", "be there", method="DELETE", path="/tickets")


class TestCookie:
    """A cookie counts only where no foreign page can have made the browser send it."""

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": ORIGIN + ".evil.example"},
            {"Origin": "https://APP.example"},
            {"Origin": "http://app.example"},
            {"Origin": f"{ORIGIN}:444"},
            {"Origin": ""},
            {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
            {"Origin": "https://evil.example", "Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "Same-Origin"},
            {"Referer": f"{ORIGIN}/page"},
        ],
    )
    async def test_foreign(self, server, headers):
        """Before any slot is taken: else a foreign page would end a user's own streams."""
        await refused(server, 403, "Origin", "SSE_CORS_ORIGINS", headers={"Cookie": f"session={SIGNED}", **headers})

    async def test_foreign_publish(self, server):
        """A foreign form cannot publish."""
        headers = {"Cookie": f"session={SIGNED}", "Origin": "https://evil.example", "Content-Type": "application/json"}
        body = json.dumps({"topics": ["orders/1"], "data": "x"}).encode()
        await refused(
            server, 403, "Origin", "SSE_CORS_ORIGINS", method="POST", path="/publish", headers=headers, body=body
        )

    async def test_twice(self, server):
        """Of two cookies one may have been planted by a neighbouring host."""
        headers = {"Cookie": f"session={SIGNED}; session={sign(right('bob'))}", "Sec-Fetch-Site": "same-origin"}
        await refused(server, 401, "cookie", "sent once", headers=headers)

    async def test_other_names(self, server):
        """Only `session` is looked at."""
        headers = {"Cookie": f"xsession={SIGNED}; Session={SIGNED}", "Sec-Fetch-Site": "same-origin"}
        await refused(server, 401, "token", "Authorization: Bearer", headers=headers)

    @pytest.mark.parametrize(
        "headers",
        [{"Origin": ORIGIN}, {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-origin"}],
    )
    async def test_let_in(self, server, headers):
        """This site, and the origins that are named."""
        headers = {"Cookie": f'a=b; session="{SIGNED}"', **headers}
        with Reader.open(server.port, "orders/1", headers=headers) as stream:
            stream.until_open()


class TestStream:
    """Renewing what is not yours, or with less."""

    @pytest.mark.parametrize("stream", ["ab-1", "x", "%00", "a" * 300, "é"])
    async def test_unknown(self, server, stream):
        """There is no such stream."""
        path = f"/streams/{quote(stream, safe='%')}/token"
        await refused(server, 404, "stream", "of this user", method="POST", path=path, headers=bearer(SIGNED))

    async def test_of_another_user(self, server):
        """A stranger does not even learn that it is there."""
        with Reader.open(server.port, "orders/1", headers=bearer(SIGNED)) as stream:
            path = f"/streams/{stream.until_open().opened['stream']}/token"
            stranger = bearer(sign(right("bob")))
            await refused_while_open(server, 404, "stream", path, stranger)

    async def test_with_fewer_rights(self, server):
        """The new token must carry what the stream carries."""
        with Reader.open(server.port, "orders/1", headers=bearer(SIGNED)) as stream:
            path = f"/streams/{stream.until_open().opened['stream']}/token"
            less = bearer(sign(right() | {"sse": {"subscribe": ["orders/2"]}}))
            await refused_while_open(server, 403, "topic", path, less)


class TestInjection:
    """Nothing that a user supplies becomes a header, a field of an event or another line of a log."""

    EVIL = "x\r\nSet-Cookie: a=b\r\n\r\nevent: forged\ndata: forged\n\n"

    @pytest.mark.parametrize(
        ("path", "status"),
        [
            (f"/events?topic={quote(EVIL)}", 400),
            (f"/events?topic=orders/1&last_event_id={quote(EVIL)}", 400),
            (f"/events?topic=orders/1&{quote(EVIL)}=1", 400),
            (f"/events?topic=orders/1&ticket={quote(EVIL)}", 401),
            (f"/{quote(EVIL)}", 404),
        ],
    )
    async def test_arguments(self, server, path, status):
        """Arguments and paths come back in JSON alone."""
        headers = {} if "ticket" in path else bearer(SIGNED)
        answer = await ask(server.port, "GET", path, headers=headers)

        assert status == answer.status
        assert "set-cookie" not in answer.headers
        assert "forged\n" not in answer.body.decode()

    async def test_user(self, server):
        """A name with line ends is percent-encoded in its topic, and escaped in the first event."""
        with Reader.open(server.port, "orders/1", headers=bearer(sign(right(self.EVIL[:60])))) as stream:
            assert "user:" + quote(self.EVIL[:60], safe="") == stream.until_open().opened["topics"][-1]
            assert ["stream.open"] == stream.names

    @pytest.mark.parametrize("name", ["Origin", "X-Request-Id", "Last-Event-ID"])
    async def test_headers(self, server, name):
        """A header that is given back is one of ours."""
        evil = "https://evil.example\tSet-Cookie: a=b"
        answer = await ask(server.port, "GET", "/healthz", headers={name: evil})

        assert "evil" not in "".join(answer.headers.values())


async def refused_while_open(server: Inside, status: int, name: str, path: str, headers: dict[str, str]) -> None:
    answer = await ask(server.port, "POST", path, headers=headers)
    assert (status, name) == (answer.status, answer.json["name"]), answer.body


def ended(server: Inside, stream: Reader) -> str:
    """Read *stream* to its end; return why it ended."""
    opened = stream.until_open().opened["stream"]
    kept = next((each for each in server.streams() if each.id == opened), None)
    stream.until_over()
    if kept is not None:
        return kept.reason
    last = stream.events[-1]
    return "token_expired" if last.event == "stream.expired" else json.loads(last.data)["reason"]
