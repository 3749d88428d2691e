"""
The HTTP edge of a real process: what it answers, what it refuses, and that refusing publishes nothing.
"""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from app.factory import create_app
from app.settings import load
from app.stack import App, Redis
from tests.live import (
    Answer,
    Site,
    Subscriber,
    ask,
    becomes,
    connect,
    event,
    eventually,
    logged,
    metrics,
    order,
    post,
    publish,
    readiness,
    shared,
    subscribed,
)

JSON = {"Content-Type": "application/json"}
EVENT_SOURCE = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module", autouse=True)
def _tools(require: Callable[..., str]) -> None:
    require("redis-server", "valkey-server")


@pytest.fixture(scope="module")
def server() -> Redis:
    return shared.server


@pytest.fixture(scope="module")
def app() -> App:
    """A process as it is shipped, with small limits."""
    return shared.app


@pytest.fixture(scope="module")
def plain() -> App:
    """The same without the hand-off and without uvloop: every promise holds there too."""
    return shared.plain


@pytest.fixture(scope="module", params=["handoff", "generator"])
def either(request: pytest.FixtureRequest) -> App:
    return request.getfixturevalue("app" if request.param == "handoff" else "plain")


@pytest.fixture
def unchanged(server: Redis) -> Iterator[None]:
    """Fail a test that added anything to the log."""
    with connect(server) as hands:

        def added() -> int:
            return hands.xinfo_stream("{sse}:log")["entries-added"] if hands.exists("{sse}:log") else 0

        before = added()
        yield
        assert before == added()


def _strict(text: bytes) -> Any:
    """Parse JSON as others do: Python alone takes Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON: {text!r}")

    return json.loads(text, parse_constant=refuse)


def check_problem(answer: Answer, status: int, name: str = "", rule: str = "") -> dict[str, Any]:
    """Assert that *answer* is a whole problem document, and return it."""
    assert status == answer.status, answer.body
    assert "application/problem+json" == answer.headers["content-type"]
    assert "nosniff" == answer.headers["x-content-type-options"]
    problem = _strict(answer.body)
    assert {"type", "title", "status", "detail", "name", "rule", "value", "cure"} == problem.keys()
    assert status == problem["status"]
    for field in ("type", "title", "detail", "name", "rule", "cure"):
        assert isinstance(problem[field], str)
        assert 0 < len(problem[field]) < 1000, field
    assert len(json.dumps(problem["value"])) < 3000
    assert name in problem["name"]
    assert rule in problem["rule"]
    return problem


class TestHead:
    """The head of a stream."""

    async def test_get(self, either):
        """
        The head is exactly the contract's.
        """
        async with subscribed(either, "t") as stream:
            head = dict(stream.head)
            del head["date"]

            assert 200 == stream.status
            assert {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-store",
                "x-accel-buffering": "no",
                "connection": "close",
                "transfer-encoding": "chunked",
                "x-content-type-options": "nosniff",
            } == head

    async def test_head(self, either):
        """
        HEAD answers headers only: no stream is opened and no slot is taken.
        """
        before = await metrics(either)
        answer = await ask(either.port, "HEAD", "/events?topic=t&user=headless")
        after = await metrics(either)

        assert (200, b"") == (answer.status, answer.body)
        assert "text/event-stream; charset=utf-8" == answer.headers["content-type"]
        assert "no-store" == answer.headers["cache-control"]
        assert before["sse_streams_opened_total"] == after["sse_streams_opened_total"]
        assert not logged(either, "stream_opened", user="headless")

    async def test_head_with_a_mistake(self, app):
        """
        HEAD is refused like GET, without a body.
        """
        answer = await ask(app.port, "HEAD", "/events?topic=a%20b")

        assert (400, b"") == (answer.status, answer.body)

    async def test_first_event(self, either):
        """
        A stream begins with `stream.open`: the resume point, who serves, what it carries, when it beats.
        """
        [id] = await publish(either, event("before"))
        async with subscribed(either, "a", "b/*", query={"user": "zoë"}) as stream:
            opened = stream.everything[0]

            assert "stream.open" == opened.event
            assert order(opened.id) >= order(id)
            assert {
                "stream": stream.opened["stream"],
                "process": stream.opened["process"],
                "topics": ["a", "b/*", "broadcast", "user:zo%C3%AB"],
                "heartbeat_seconds": 0.2,
            } == stream.opened
            assert 20 <= stream.parser.retry_ms <= 40


class TestTarget:
    """Every form of a request's target that RFC 9112, section 3.2, has for a GET."""

    @pytest.mark.parametrize("target", ["/events", "http://test/events", "http://other.example:81/events", "//events"])
    async def test_stream(self, either, target):
        """
        A target that names the host, as for a proxy, is the same stream.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", either.port)
        try:
            writer.write(f"GET {target}?topic=absolute HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            async with asyncio.timeout(30):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 ")
                await reader.readuntil(b"event: stream.open\n")
                await publish(either, event("here", "absolute"))
                await reader.readuntil(b"data: here\n")
        finally:
            writer.close()

    @pytest.mark.parametrize("target", ["http://[/events?topic=a", "?topic=a"])
    async def test_none(self, either, target):
        """
        What is no target is refused, and is no fault of the server.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", either.port)
        try:
            writer.write(f"GET {target} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            async with asyncio.timeout(30):
                head = await reader.readuntil(b"\r\n\r\n")
        finally:
            writer.close()
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"application/problem+json" in head


class TestBadStream:
    """Requests for a stream that are the programmer's mistake: refused by status."""

    @pytest.mark.parametrize(
        ("query", "status", "name", "rule"),
        [
            ("topic=a%20b", 400, "topic", "1 to 255 characters"),
            ("topic=", 400, "topic", "1 to 255 characters"),
            ("topic", 400, "topic", "1 to 255 characters"),
            ("topic=%C3%A4", 400, "topic", "1 to 255 characters"),
            ("topic=%F0%9F%98%80", 400, "topic", "1 to 255 characters"),
            ("topic=a%00", 400, "topic", "1 to 255 characters"),
            ("topic=a%0Ab", 400, "topic", "1 to 255 characters"),
            ("topic=a%0A", 400, "topic", "1 to 255 characters"),
            ("topic=a,b", 400, "topic", "1 to 255 characters"),
            ("topic=ok&topic=no%22", 400, "topic", "1 to 255 characters"),
            ("topic=" + "a" * 256, 400, "topic", "1 to 255 characters"),
            ("topic=" + "a" * 256 + "*", 400, "topic", "1 to 255 characters"),
            ("topic=a*b", 400, "topic", "1 to 255 characters"),
            ("topic=**", 400, "topic", "1 to 255 characters"),
            ("&".join(f"topic={n}" for n in range(6)), 400, "topics", "SSE_MAX_TOPICS (6)"),
            ("topic=a&topics=b", 400, "query parameter", "topic, last_event_id or user"),
            ("topic=a&Topic=b", 400, "query parameter", "topic, last_event_id or user"),
            ("topic=a&%C3%A4=b", 400, "query parameter", "topic, last_event_id or user"),
            ("topic=a&" + "x" * 3000 + "=b", 400, "query parameter", "topic, last_event_id or user"),
            ("topic=user:bob", 403, "topic", "another user's"),
            ("topic=user:bob&user=alice", 403, "topic", "another user's"),
            ("topic=user:bob&topic=user:alice&user=alice", 403, "topic", "another user's"),
            ("topic=user:*&user=alice", 403, "topic", "another user's"),
            ("topic=user:alice*&user=alice", 403, "topic", "another user's"),
            ("topic=user:&user=alice", 403, "topic", "another user's"),
            ("topic=user%3Abob", 403, "topic", "another user's"),
            ("topic=a&user=", 400, "user", "1 to 64"),
            ("topic=a&user=" + "u" * 65, 400, "user", "1 to 64"),
            # Percent-encoded it would be a topic that is too long for anybody to publish to.
            ("topic=a&user=" + quote("é" * 64), 400, "user", "250 characters when percent-encoded"),
            # As text in Latin-1 would come, an overlong slash, a surrogate, half of a character.
            ("topic=a&user=caf%E9", 400, "query", "UTF-8"),
            ("topic=a%C0%AF", 400, "query", "UTF-8"),
            ("topic=a&user=%ED%A0%80", 400, "query", "UTF-8"),
            ("topic=a&user=%C3", 400, "query", "UTF-8"),
            ("topic=a&%FF=b", 400, "query", "UTF-8"),
            ("topic=a&last_event_id=%FF", 400, "query", "UTF-8"),
            ("topic=a&last_event_id=", 400, "last_event_id", "read from a stream"),
            ("topic=a&last_event_id=a%20b", 400, "last_event_id", "read from a stream"),
            ("topic=a&last_event_id=%C3%A4", 400, "last_event_id", "read from a stream"),
            ("topic=a&last_event_id=e:1-1%0A", 400, "last_event_id", "read from a stream"),
            ("topic=a&last_event_id=" + "1" * 201, 400, "last_event_id", "read from a stream"),
        ],
    )
    @pytest.mark.parametrize("headers", [{}, EVENT_SOURCE], ids=["api", "event source"])
    async def test_query(self, app, query, status, name, rule, headers):
        """
        What can't be a stream is a problem document that names the rule and the cure.
        """
        check_problem(await ask(app.port, "GET", f"/events?{query}", headers=headers), status, name, rule)

    async def test_most_topics(self, app):
        """
        The limit counts what the stream carries: `broadcast` and the user's own topic too.
        """
        fits = "&".join(f"topic={n}" for n in range(5))
        async with subscribed(app, *map(str, range(5))) as stream:
            assert 6 == len(stream.opened["topics"])

        check_problem(await ask(app.port, "GET", f"/events?{fits}&user=alice"), 400, "topics", "SSE_MAX_TOPICS")

    async def test_same_topic_twice(self, app):
        """
        A topic that is named again is still one.
        """
        async with subscribed(app, "a", "a", "broadcast", "a") as stream:
            assert ["a", "broadcast"] == stream.opened["topics"]

    async def test_longest_own_topic(self, app):
        """
        Every user that is let in has a topic that can be published to.
        """
        user = "é" * 41  # 6 characters each, after `user:`
        async with subscribed(app, "t", query={"user": user}) as stream:
            await publish(app, event("yours", "user:" + quote(user)))
            await stream.until_data("yours")


class TestForeignPosition:
    """A position that is none: told in band, because a native EventSource gives up on any status but 200."""

    @pytest.mark.parametrize(
        ("id", "reason"),
        [
            ("garbage", "unknown_position"),
            ("with spaces in it", "unknown_position"),
            ("\xe9\xff", "unknown_position"),
            ("1", "unknown_position"),
            (":::", "unknown_position"),
            ("e:1-", "unknown_position"),
            ("e:1-2-3", "unknown_position"),
            ("e:-1-2", "unknown_position"),
            ("E:1-1", "unknown_position"),
            ("e:1_0-1", "unknown_position"),
            ("e:18446744073709551616-0", "unknown_position"),
            ("1763712000000-0", "unknown_position"),
            ('"}\x7f{"', "unknown_position"),
            ("x" * 4000, "unknown_position"),
            ("EARLIEST", "unknown_position"),
            ("0123abcd:1763712000000-0", "epoch_changed"),
        ],
        ids=str,
    )
    async def test_header(self, app, id, reason):
        """
        Whatever stands in `Last-Event-ID`, the stream opens, says what was wrong, and is live.
        """
        async with subscribed(app, "t", headers={"Last-Event-ID": id}) as stream:
            await stream.until(lambda s: s.resets)
            [reset] = stream.resets

            assert reason == reset["reason"]
            assert "Last-Event-ID" == reset["name"]
            assert id[:200].strip() == reset["value"]
            assert all(reset[field] for field in ("rule", "cure"))
            await publish(app, event("live"))
            await stream.until_data("live")
            assert ["live"] == stream.data

    async def test_query(self, app):
        """
        A well-formed position of another log is told in band in the query, too.
        """
        async with subscribed(app, "t", query={"last_event_id": "0123abcd:1-0"}) as stream:
            await stream.until(lambda s: s.resets)

            assert ["epoch_changed"] == [reset["reason"] for reset in stream.resets]

    async def test_position_that_never_was(self, app):
        """
        An entry of this history that is not there: `history_lost` behind, `unknown_position` ahead.
        """
        [first, last] = await publish(app, event("a"), event("b"))
        epoch = first.partition(":")[0]
        ms, seq = order(last)
        for id, reason in (
            (f"{epoch}:1-1", "history_lost"),
            (f"{epoch}:{ms - 1}-999", "history_lost"),
            (f"{epoch}:{ms}-{seq + 1}", "unknown_position"),
            (f"{epoch}:{ms + 60_000}-0", "unknown_position"),
        ):
            async with subscribed(app, "t", last_event_id=id) as stream:
                await stream.until(lambda s: s.resets)
                assert [reason] == [reset["reason"] for reset in stream.resets]

    async def test_empty_header(self, app):
        """
        An empty position is none: the stream begins now.
        """
        await publish(app, event("before"))
        async with subscribed(app, "t", headers={"Last-Event-ID": ""}) as stream:
            await publish(app, event("after"))
            await stream.until_data("after")

            assert (["after"], []) == (stream.data, stream.resets)

    async def test_header_and_query(self, app):
        """
        A browser's own reconnect repeats the address and adds the header: the header is the newer one.
        """
        ids = await publish(app, *(event(n) for n in "abc"))
        async with subscribed(app, "t", last_event_id=ids[1], query={"last_event_id": ids[0]}) as stream:
            await stream.until_data("c")

            assert (["c"], ids[1]) == (stream.data, stream.told("stream.open")[0].id)

    @pytest.mark.parametrize("where", ["header", "query"])
    async def test_earliest(self, app, where):
        """
        `earliest` is the whole window, oldest first.
        """
        await publish(app, *(event(n, "early") for n in "abc"))
        options = {"last_event_id": "earliest"} if where == "header" else {"query": {"last_event_id": "earliest"}}
        async with subscribed(app, "early", **options) as stream:
            await stream.until(lambda s: len(s.data) >= 3)
            assert ["a", "b", "c"] == stream.data[:3]

    async def test_other_topics(self, app):
        """
        A position is of the log, not of a subscription: it can be used with other topics.
        """
        [id, *_] = await publish(app, event("1", "one"), event("2", "two"), event("3", "one"))
        async with subscribed(app, "two", last_event_id=id) as stream:
            await stream.until_data("2")
            assert ([], ["2"]) == (stream.resets, stream.data)


class TestPublish:
    @pytest.mark.parametrize(
        ("data", "text"),
        [
            ("plain", "plain"),
            ("", ""),
            (" spaced ", " spaced "),
            ("one\ntwo\n\nthree", "one\ntwo\n\nthree"),
            ('{"looks": "like JSON"}', '{"looks": "like JSON"}'),
            ("𝄞 漢字 \u2028", "𝄞 漢字 \u2028"),
            ({"a": [1, 2.5, None, True], "ä": "𝄞"}, '{"a":[1,2.5,null,true],"ä":"𝄞"}'),
            ([], "[]"),
            (None, "null"),
            (False, "false"),
            (0, "0"),
            (2**53 + 1, "9007199254740993"),
            (-(2**64) - 1, "-18446744073709551617"),
            (10**1000 + 7, str(10**1000 + 7)),
            ({"deep": [[[[[[[[[["x"]]]]]]]]]]}, '{"deep":[[[[[[[[[["x"]]]]]]]]]]}'),
        ],
    )  # fmt: skip
    async def test_data(self, app, data, text):
        """
        A string is sent as it is, anything else as compact JSON; nothing is rounded.
        """
        async with subscribed(app, "t") as stream:
            [id] = await publish(app, event(data))
            await stream.until(lambda s: s.events)

            assert [(id, "message", text)] == [(e.id, e.event, e.data) for e in stream.events]

    async def test_single_event(self, app):
        """
        One event is an object, and the answer holds its one id.
        """
        async with subscribed(app, "t") as stream:
            answer = await post(app, event("x", event="named", retry=77))
            await stream.until(lambda s: s.events)

            assert 201 == answer.status
            assert "application/json" == answer.headers["content-type"]
            assert {"ids": [stream.ids[0]]} == answer.json
            assert ("named", 77) == (stream.events[0].event, stream.parser.retry_ms)

    @pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json;x=y"])
    async def test_content_type(self, app, kind):
        """
        Parameters and case of the type mean nothing.
        """
        assert 201 == (await post(app, event("x"), headers={"Content-Type": kind})).status

    async def test_without_a_length(self, app):
        """
        A body in chunks is a body.
        """
        body = json.dumps(event("x")).encode()
        answer = await ask(app.port, "POST", "/publish", headers=JSON, chunks=[body[:7], body[7:9], body[9:]])

        assert 201 == answer.status

    async def test_largest(self, app):
        """
        What just fits is published: event, batch and topics.
        """
        assert 201 == (await post(app, event("x" * 5000))).status
        assert 201 == (await post(app, event("ä" * 2500))).status
        assert 201 == (await post(app, [event(n) for n in range(10)])).status
        assert 201 == (await post(app, event("x", *map(str, range(6))))).status
        assert 201 == (await post(app, event("x", "t" * 255, event="n" * 255, retry=86_400_000))).status


GOOD = '{"topics": ["t"], "data": "good"}'


@pytest.mark.usefixtures("unchanged")
class TestBadPublish:
    """Bodies that are refused as a whole."""

    @pytest.mark.parametrize(
        ("body", "name", "rule"),
        [
            ("", "body", "must be JSON"),
            ("hello", "body", "must be JSON"),
            ("{", "body", "must be JSON"),
            (GOOD + GOOD, "body", "must be JSON"),
            (GOOD[:-1] + ",}", "body", "must be JSON"),
            ("\ufeff" + GOOD, "body", "must be JSON"),
            (GOOD.encode("utf-16"), "body", "must be JSON"),
            (GOOD.encode("utf-32"), "body", "must be JSON"),
            (GOOD.encode().replace(b"good", b"\xff"), "body", "must be JSON"),
            (GOOD.encode().replace(b"good", b"\xed\xa0\x80"), "body", "must be JSON"),
            (GOOD.replace("good", "\0"), "body", "must be JSON"),
            ('{"topics": ["t"], "data": "x", "data": "y"}', "body", "'data' stands twice"),
            ('{"topics": ["t"], "topics": ["t"], "data": "x"}', "body", "'topics' stands twice"),
            ('{"topics": ["t"], "data": "x", "d\\u0061ta": "x"}', "body", "'data' stands twice"),
            ('{"topics": ["t"], "data": [{"a": {"b": 1, "c": 2, "b": 1}}]}', "body", "'b' stands twice"),
            (f'[{GOOD}, {{"topics": ["t"], "data": "x", "event": "a", "event": "b"}}]', "body", "'event' stands twice"),
            ('{"topics": ["t"], "data": {"\\ud800": 1, "\\ud800": 2}}', "body", "stands twice"),
            ('{"' + "k" * 5000 + '": 1, "' + "k" * 5000 + '": 1}', "body", "stands twice"),
            ("null", "body", "an event or an array"),
            ("true", "body", "an event or an array"),
            ("7", "body", "an event or an array"),
            ('"text"', "body", "an event or an array"),
            ("[]", "body", "an event or an array"),
            ("[" * 9000 + "]" * 9000, "", ""),
            ("[" * 900 + "]" * 900, "", ""),
            ('{"topics":["t"],"data":' + "[" * 9000 + "]" * 9000 + "}", "", ""),
            ('{"a":' * 2500 + "1" + "}" * 2500, "", ""),
            ("[null]", "[0].event", "an object"),
            (f"[{GOOD}, []]", "[1].event", "an object"),
            ("{}", "topics", "at least one topic"),
            ('{"data": "x"}', "topics", "at least one topic"),
            ('{"topics": "t", "data": "x"}', "topics", "at least one topic"),
            ('{"topics": [], "data": "x"}', "topics", "at least one topic"),
            ('{"topics": null, "data": "x"}', "topics", "at least one topic"),
            ('{"topics": {"t": 1}, "data": "x"}', "topics", "at least one topic"),
            ('{"topics": [1], "data": "x"}', "topic", "1 to 255 characters"),
            ('{"topics": [null], "data": "x"}', "topic", "1 to 255 characters"),
            ('{"topics": [1e999], "data": "x"}', "topic", "1 to 255 characters"),
            ('{"topics": [["t"]], "data": "x"}', "topic", "1 to 255 characters"),
            ('{"topics": [""], "data": "x"}', "topic", "1 to 255 characters"),
            ('{"topics": ["t", "a b"], "data": "x"}', "topic", "1 to 255 characters"),
            ('{"topics": ["t*"], "data": "x"}', "topic", "1 to 255 characters"),
            ('{"topics": ["ä"], "data": "x"}', "topic", "1 to 255 characters"),
            ('{"topics": ["t\\n"], "data": "x"}', "topic", "1 to 255 characters"),
            ('{"topics": ["\\ud800"], "data": "x"}', "topic", "1 to 255 characters"),
            (json.dumps(event("x", "t" * 256)), "topic", "1 to 255 characters"),
            (json.dumps(event("x", *map(str, range(7)))), "topics", "SSE_MAX_TOPICS (6)"),
            ('{"topics": ["t"]}', "data", "must be there"),
            ('{"topics": ["t"], "data": NaN}', "body", "NaN is not JSON"),
            ('{"topics": ["t"], "data": [Infinity]}', "body", "Infinity is not JSON"),
            ('{"topics": ["t"], "data": {"a": -Infinity}}', "body", "-Infinity is not JSON"),
            ('{"topics": ["t"], "data": [1e999]}', "data", "must be JSON"),
            ('{"topics": ["t"], "data": ' + "9" * 5000 + "}", "body", "must be JSON"),
            ('{"topics": ["t"], "data": "\\ud800"}', "data", "UTF-8"),
            ('{"topics": ["t"], "data": {"a": ["\\udfff x"]}}', "data", "UTF-8"),
            ('{"topics": ["t"], "data": {"\\ud800": 1}}', "data", "UTF-8"),
            (json.dumps(event("x" * 5001)), "data", "SSE_MAX_EVENT_BYTES (5000)"),
            (json.dumps(event("ä" * 2501)), "data", "SSE_MAX_EVENT_BYTES (5000)"),
            (json.dumps(event(["x" * 5000])), "data", "SSE_MAX_EVENT_BYTES (5000)"),
            ('{"topics": ["t"], "data": "x", "event": 7}', "event", "a string"),
            ('{"topics": ["t"], "data": "x", "event": null}', "event", "a string"),
            ('{"topics": ["t"], "data": "x", "event": "a\\nb"}', "event", "CR, LF or NUL"),
            ('{"topics": ["t"], "data": "x", "event": "a\\r"}', "event", "CR, LF or NUL"),
            ('{"topics": ["t"], "data": "x", "event": "\\u0000"}', "event", "CR, LF or NUL"),
            ('{"topics": ["t"], "data": "x", "event": "\\ud800"}', "event", "UTF-8"),
            ('{"topics": ["t"], "data": "x", "event": "stream.reset"}', "event", "begin with `stream.` or `run.`"),
            ('{"topics": ["t"], "data": "x", "event": "stream."}', "event", "begin with `stream.` or `run.`"),
            ('{"topics": ["t"], "data": "x", "event": "run.token"}', "event", "begin with `stream.` or `run.`"),
            (json.dumps(event("x", event="n" * 256)), "event", "at most 255"),
            ('{"topics": ["t"], "data": "x", "retry": -1}', "retry", "milliseconds from 0"),
            ('{"topics": ["t"], "data": "x", "retry": 86400001}', "retry", "milliseconds from 0"),
            ('{"topics": ["t"], "data": "x", "retry": 1.5}', "retry", "milliseconds from 0"),
            ('{"topics": ["t"], "data": "x", "retry": "5"}', "retry", "milliseconds from 0"),
            ('{"topics": ["t"], "data": "x", "retry": true}', "retry", "milliseconds from 0"),
            ('{"topics": ["t"], "data": "x", "retry": 1e999}', "retry", "milliseconds from 0"),
            ('{"topics": ["t"], "data": "x", "retry": [1e999]}', "retry", "milliseconds from 0"),
            ('{"topics": ["t"], "data": "x", "retry": ' + "9" * 4000 + "}", "retry", "milliseconds from 0"),
            ('{"topics": ["t"], "data": "x", "id": "7"}', "id", "not a field"),
            ('{"topics": ["t"], "data": "x", "Topics": []}', "Topics", "not a field"),
            ('{"topics": ["t"], "data": "x", "": 1e999}', "", "not a field"),
            ('{"topics": ["t"], "data": "x", "\\ud800": "\\ud800"}', "", "not a field"),
            ('{"topics": ["t"], "data": "x", "' + "k" * 9000 + '": 1}', "", "not a field"),
            (f"[{GOOD}, {GOOD}, {{}}]", "[2].topics", "at least one topic"),
            (f'[{GOOD}, {{"topics": ["t"], "data": "x", "event": "a\\nb"}}]', "[1].event", "CR, LF or NUL"),
            (f"[{', '.join([GOOD] * 11)}]", "events", "SSE_MAX_BATCH_EVENTS (10)"),
        ],
        ids=lambda value: ascii(value)[:40],
    )  # fmt: skip
    async def test_body(self, app, body, name, rule):
        """
        One mistake anywhere, and nothing of the body is published.
        """
        raw = body if isinstance(body, bytes) else body.encode()

        check_problem(await ask(app.port, "POST", "/publish", headers=JSON, body=raw), 400, name, rule)

    @pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
    async def test_large_body(self, app, chunked):
        """
        A body over the limit is refused, also one that does not say how long it is.
        """
        body = json.dumps([event("x" * 4000) for _ in range(8)]).encode()
        sent = {"chunks": [body[:8000], body[8000:16000], body[16000:]]} if chunked else {"body": body}
        answer = await ask(app.port, "POST", "/publish", headers=JSON, **sent)

        check_problem(answer, 413, "body", "SSE_MAX_BODY_BYTES (20000)")

    async def test_endless_body(self, app):
        """
        A body that only claims to be too long is refused before it was read.
        """
        headers = JSON | {"Content-Length": "99999999"}

        check_problem(await ask(app.port, "POST", "/publish", headers=headers, body=b"["), 413, "body")

    async def test_body_that_never_comes(self):
        """
        Whatever else the framework refuses is a problem document, too.
        """
        application = create_app(load({}))
        application.config["BODY_TIMEOUT"] = 0.05
        sent: list[Any] = []

        answered = asyncio.Event()

        async def receive() -> Any:
            await answered.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                answered.set()

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/publish", "raw_path": b"/publish", "query_string": b"", "root_path": "",
            "headers": [(b"host", b"test"), (b"content-type", b"application/json"), (b"content-length", b"9")],
        }  # fmt: skip
        await application(scope, receive, send)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}

        check_problem(Answer(sent[0]["status"], headers, sent[1]["body"]), 408, "request")

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/x-www-form-urlencoded"},
            {"Content-Type": "application/jsonx"},
            {"Content-Type": "text/json"},
            {"Content-Type": ""},
        ],
        ids=str,
    )
    async def test_content_type(self, app, headers):
        """
        Only what says that it is JSON is read: a foreign page's form can't publish.
        """
        answer = await ask(app.port, "POST", "/publish", headers=headers, body=GOOD.encode())

        check_problem(answer, 415, "Content-Type", "application/json")

    @pytest.mark.parametrize("key", ["", "a b", "k" * 256, "clé", "a\tb"], ids=lambda key: ascii(key)[:10])
    async def test_idempotency_key(self, app, key):
        """
        A key that could be mangled on its way is refused.
        """
        check_problem(await post(app, event("x"), key=key), 400, "Idempotency-Key", "1 to 255")


class TestIdempotency:
    async def test_same_body(self, app, plain, server):
        """
        The same key and the same events, also written another way: the first ids, once in the log.
        """
        first = await post(app, event("once"), key="same")
        with connect(server) as hands:
            added = hands.xinfo_stream("{sse}:log")["entries-added"]
            again = await post(app, [{"data": "once", "retry": None, "topics": ["t", "t"]}], key="same")
            elsewhere = await post(plain, event("once"), key="same")

            assert [201] * 3 == [first.status, again.status, elsewhere.status]
            assert first.json == again.json == elsewhere.json
            assert added == hands.xinfo_stream("{sse}:log")["entries-added"]

    async def test_other_body(self, app, plain, server):
        """
        The same key with other events is a mistake of the client, through any process.
        """
        await post(app, event("first"), key="reused")
        with connect(server) as hands:
            added = hands.xinfo_stream("{sse}:log")["entries-added"]
            for process in (app, plain):
                problem = check_problem(await post(process, event("second"), key="reused"), 422, "Idempotency-Key")
                assert "reused" == problem["value"]
            assert added == hands.xinfo_stream("{sse}:log")["entries-added"]

    async def test_without_a_key(self, app):
        """
        Equal publishes without a key are different ones.
        """
        assert await publish(app, event("twin")) != await publish(app, event("twin"))


class TestWrongAddress:
    @pytest.mark.parametrize(
        "path",
        [
            "/nothing",
            "/metrics",
            "/events/",
            "/events/x",
            "/publish/x",
            "/EVENTS",
            "/static/",
            "/static/nothing.js",
            "/static/../routes.py",
            "/static/..%2froutes.py",
            "/static/%2e%2e/routes.py",
            "/static//etc/passwd",
            "/static/%00",
            "/static/" + "a" * 300,
            "/%ff",
            "/%00",
            "/" + "a" * 3000,
            "//nothing",
            "/events//",
        ],
        ids=lambda path: path[:30],
    )
    async def test_path(self, app, path):
        """
        What is not there is 404, and nothing outside the static folder is there.
        """
        check_problem(await ask(app.port, "GET", path), 404, "path")

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("POST", "/events", "GET"),
            ("PUT", "/publish", "POST"),
            ("GET", "/publish", "POST"),
            ("DELETE", "/healthz", "GET"),
            ("PATCH", "/readyz", "GET"),
            ("POST", "/", "GET"),
            ("BREW", "/events", "GET"),
            ("TRACE", "/events", "GET"),
        ],
    )
    async def test_method(self, app, method, path, allowed):
        """
        A wrong method is told which are right.
        """
        answer = await ask(app.port, method, path)

        check_problem(answer, 405, "method", allowed)
        assert allowed in answer.headers["allow"].split(", ")

    async def test_upgrade(self, app):
        """
        This is no WebSocket server.
        """
        headers = {
            "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }  # fmt: skip
        answer = await ask(app.port, "GET", "/events?topic=t", headers=headers)

        assert 400 <= answer.status < 500
        assert not logged(app, "request_failed")


class TestPage:
    @pytest.mark.parametrize("path", ["/", "/static/page.js", "/static/page.css"])
    async def test_headers(self, app, path):
        """
        The page loads only what is its own, and nobody can frame it.
        """
        answer = await ask(app.port, "GET", path)

        assert 200 == answer.status
        assert "nosniff" == answer.headers["x-content-type-options"]
        if path == "/":
            policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
            assert "'none'" == policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"]
            assert "'self'" == policy["script-src"] == policy["connect-src"] == policy["style-src"]
            assert "no-referrer" == answer.headers["referrer-policy"]


    @pytest.mark.parametrize("path", ["/", "/static/page.js", "/static/page.css"])
    async def test_asked_for_again_each_time(self, app, path):
        """
        After an update a browser never runs an old script with a new page, and an unchanged file costs one empty answer.
        """
        answer = await ask(app.port, "GET", path)
        again = await ask(app.port, "GET", path, headers={"If-None-Match": answer.headers["etag"]})

        assert "no-cache" == answer.headers["cache-control"]
        assert (304, b"") == (again.status, again.body)
        assert "no-cache" == again.headers["cache-control"]


class TestHealth:
    async def test_health_and_readiness(self, app):
        """
        A process that serves is healthy and ready, and names itself.
        """
        health, ready = await ask(app.port, "GET", "/healthz"), await ask(app.port, "GET", "/readyz")

        assert (200, "ok") == (health.status, health.json["status"])
        assert (200, "ready") == (ready.status, ready.json["status"])
        assert health.json["process"] == ready.json["process"]

    @pytest.mark.parametrize(("answers", "status"), [(True, 503), (False, 200)])
    async def test_reader_that_is_stuck(self, answers, status):
        """
        A reader that is stuck while the log answers others is this process's own fault.

        Where the log is away for all, no process leaves: DNS must not be empty.
        """
        application = create_app(load({}))
        kit = application.extensions["sse"]
        kit.reader.loaded = True
        kit.reader.progress_at -= 4 * kit.settings.redis_timeout_seconds + 3
        kit.log.ping = lambda: asyncio.sleep(0, answers)
        answer = await application.test_client().get("/readyz")

        assert status == answer.status_code
        assert ("reader stuck" in (await answer.get_data(as_text=True))) == (status == 503)


class TestSoftFail:
    """
    "Later" reaches a native EventSource as 200 with `retry:`, and everybody else as the status that it is.
    """

    @pytest.fixture(scope="class")
    @classmethod
    def loading(cls) -> Iterator[App]:
        """A process whose Redis is not there."""
        with Site() as site:
            app = site.app(site.redis(start=False), ready=False)
            eventually(lambda: site.listens(app))
            yield app

    @staticmethod
    async def _check_soft(app: App, low: int, high: int, status: str) -> None:
        async with subscribed(app, "t") as stream:
            await stream.until(lambda s: s.ended == "clean")

            assert 200 == stream.status
            assert "text/event-stream; charset=utf-8" == stream.head["content-type"]
            assert "no-store" == stream.head["cache-control"]
            assert status == stream.head["x-sse-fallback"]
            assert [] == stream.everything
            assert low <= stream.parser.retry_ms <= high

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Accept": "*/*"},
            {"Accept": "application/json, text/event-stream"},
            EVENT_SOURCE | {"Authorization": "Bearer x"},
            # Our nginx says by this that it softens the answer itself.
            EVENT_SOURCE | {"X-Sse-Soft-Fail": "1"},
        ],
        ids=str,
    )
    async def test_loading_for_others(self, loading, headers):
        """
        Who can read a status gets it, with the time to come back.
        """
        answer = await ask(loading.port, "GET", "/events?topic=t", headers=headers)

        check_problem(answer, 503, "process", "not loaded")
        assert "1" == answer.headers["retry-after"]

    async def test_loading(self, loading):
        """
        A native EventSource is told to come back soon.
        """
        await self._check_soft(loading, 500, 2000, "503")

    async def test_spread(self, loading):
        """
        Not all come back at the same time.
        """
        waits = set()
        for _ in range(6):
            answer = await ask(loading.port, "GET", "/events?topic=t", headers=EVENT_SOURCE)
            waits.add(answer.body.partition(b"\n")[0])

        assert len(waits) > 1

    async def test_loading_process_is_healthy_but_not_ready(self, loading):
        """
        Nobody kills a process that waits for the log, and nobody sends it requests.
        """
        assert 200 == (await ask(loading.port, "GET", "/healthz")).status
        ready = await ask(loading.port, "GET", "/readyz")
        assert 503 == ready.status
        assert "waiting for the log" == ready.json["reason"]
        assert logged(loading, "log_unavailable")

    async def test_publish_while_loading(self, loading):
        """
        What can't be published is told so within SSE_PUBLISH_TIMEOUT_SECONDS, softly to nobody.
        """
        answer = await post(loading, event("x"), headers=EVENT_SOURCE)

        check_problem(answer, 503, "log", "does not answer")
        assert "1" == answer.headers["retry-after"]

    @pytest.mark.parametrize(("switch", "status"), [("on", 200), ("off", 503)])
    async def test_switch(self, switch, status):
        """
        SSE_SOFT_FAIL=off leaves the softening to somebody in front.
        """
        client = create_app(load({"SSE_SOFT_FAIL": switch})).test_client()
        answer = await client.get("/events?topic=t", headers=EVENT_SOURCE)

        assert status == answer.status_code

    @pytest.mark.parametrize("handoff", ["auto", "off"])
    async def test_full_with_those_on_their_way(self, handoff):
        """
        A crowd that is let in, and waits for something, counts: no more begin than SSE_MAX_STREAMS.
        """
        with Site() as site:
            app = await asyncio.to_thread(site.app, shared.server, max_streams=5, handoff=handoff)
            [id] = await publish(app, event("x"))
            ahead = f"{id.partition(':')[0]}:{2**62}-0"  # looked for, for two seconds
            held = [await Subscriber(app.port, ("t",), headers={"Accept": "*/*"}).open() for _ in range(4)]
            crowd = [Subscriber(app.port, ("t",), ahead, headers={"Accept": "*/*"}) for _ in range(40)]
            await asyncio.gather(*(stream.open() for stream in crowd))
            for stream in [*held, *crowd]:
                if stream.status == 200:
                    await stream.until_open()
            opened = (await metrics(app))["sse_streams_open"]
            for stream in [*held, *crowd]:
                stream.leave()
        assert {200: 4} == Counter(stream.status for stream in held)
        assert {200: 1, 429: 39} == Counter(stream.status for stream in crowd)
        assert 5 == opened

    async def test_full_then_draining(self):
        """
        A full process answers 429, a draining one 503; both soften it for a native EventSource.

        While it drains it still publishes, and says that it wants no more requests.
        """
        with Site() as site:
            app = await asyncio.to_thread(
                site.app, shared.server, max_streams=1, drain_seconds=60, drain_lead_seconds=60
            )
            async with subscribed(app, "full"):
                await self._check_soft(app, 2000, 8000, "429")
                full = await ask(app.port, "GET", "/events?topic=t")
                check_problem(full, 429, "streams", "SSE_MAX_STREAMS (1)")
                assert "5" == full.headers["retry-after"]
                # A second way past the door would be a way past every limit.
                assert 429 == (await ask(app.port, "GET", "//events?topic=t")).status
                assert 429 == (await ask(app.port, "GET", "/%65vents?topic=t")).status
                assert 429 == (await ask(app.port, "GET", "http://test/events?topic=t")).status
                assert 429 == (await ask(app.port, "GET", "http://test//events?topic=t")).status

            async def streams() -> float:
                return (await readiness(app)).json["streams"] == 0

            await becomes(streams, "the client's place free again")
            async with subscribed(app, "full") as stream:
                app.kill(signal.SIGTERM)
                await stream.until(lambda s: s.told("stream.draining"))
                await self._check_soft(app, 500, 2000, "503")
                draining = await ask(app.port, "GET", "/events?topic=t")
                check_problem(draining, 503, "process", "shutting down")
                ready = await readiness(app)
                assert (503, "draining") == (ready.status, ready.json["reason"])
                assert 200 == (await ask(app.port, "GET", "/healthz")).status
                await publish(app, event("still", "full"))
                await stream.until_data("still")
                counted = await metrics(app)
                assert (6, 2, 2) == (
                    counted['sse_requests_refused_total{status="429"}'],
                    counted['sse_requests_refused_total{status="503"}'],
                    counted["sse_soft_failed_total"],
                )
