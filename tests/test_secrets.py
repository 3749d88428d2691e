"""Several processes behind nginx with tokens: what they tell each other, and what no log tells."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.stack import Stack
from app.tickets import read_ticket
from tests.live import ask, connect
from tests.signing import SECRET, bearer, token
from tests.wire import Reader

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def stack(require) -> Iterator[Stack]:
    """nginx, two processes and Redis; every line is logged."""
    require("redis-server", "valkey-server")
    require("nginx")
    env = {
        "SSE_AUTH": "jwt",
        "SSE_JWT_SECRET": SECRET,
        "SSE_LOG_LEVEL": "debug",
        "SSE_LOG_FORMAT": "json",
        "SSE_DRAIN_SECONDS": "0.2",
    }
    with Stack(env=env) as stack:
        yield stack


def right(sub: str = "alice", seconds: float = 600) -> str:
    return token(sub, seconds=seconds, subscribe=["orders/*"], publish=["orders/*"])


async def ticket(port: int, text: str) -> str:
    answer = await ask(port, "POST", "/tickets", headers=bearer(text))
    assert 201 == answer.status, answer.body
    return answer.json["ticket"]


class TestElsewhere:
    """The request may reach any process."""

    async def test_renewed(self, stack):
        """A stream is renewed wherever it lives, and refused for the same reasons."""
        one, other = stack.apps
        with Reader.open(one.port, "orders/1", headers=bearer(right(seconds=60))) as stream:
            path = f"/streams/{(await asyncio.to_thread(stream.until_open)).opened['stream']}/token"
            fine = await ask(other.port, "POST", path, headers=bearer(right(seconds=3000)))
            stranger = await ask(other.port, "POST", path, headers=bearer(right("bob")))
            less = await ask(other.port, "POST", path, headers=bearer(token()))

        assert (200, 404, 403) == (fine.status, stranger.status, less.status)
        assert fine.json["expires_at"] == pytest.approx(time.time() + 3010, abs=30)
        assert ("stream", "orders/1") == (stranger.json["name"], less.json["value"])

    async def test_renewed_nowhere(self, stack):
        """A process that is gone does not answer, and the asker does not wait for long."""
        began = time.monotonic()
        answer = await ask(stack.apps[0].port, "POST", "/streams/000000-7/token", headers=bearer(right()))

        assert 404 == answer.status
        assert time.monotonic() - began < 15

    async def test_ticket(self, stack):
        """A ticket made by one process opens a stream of another, and ends the one before, wherever that is."""
        one, other = stack.apps
        query = f"ticket={await ticket(one.port, right())}"
        with Reader.open(other.port, "orders/1", query=query) as first:
            await asyncio.to_thread(first.until_open)
            with Reader.open(one.port, "orders/1", query=query) as second:
                await asyncio.to_thread(second.until_open)
                await asyncio.to_thread(first.until_over)
                assert "stream.evicted" == first.names[-1]
                assert 204 == (await ask(other.port, "DELETE", f"/tickets?{query}")).status
                await asyncio.to_thread(second.until_over)
                assert {"reason": "revoked"} == json.loads(second.events[-1].data)
        with Reader.open(one.port, "orders/1", query=query) as again:
            assert 401 == again.status

    async def test_ticket_of_two_tabs(self, stack):
        """Whom another client ended does not take its ticket back, wherever that one reads, unless its process is gone."""
        one, other = stack.apps
        text = await ticket(one.port, right())
        query = f"ticket={text}"
        with Reader.open(other.port, "orders/1", query=query) as first:
            await asyncio.to_thread(first.until_open)
            with Reader.open(one.port, "orders/1", query=query) as second:
                await asyncio.to_thread(second.until_open)
                await asyncio.to_thread(first.until_over)
                back = {"Last-Event-ID": first.last_event_id}
                refused = await ask(other.port, "GET", f"/events?topic=orders/1&{query}", headers=back)
                assert (429, "urn:sse-kit:ticket-busy") == (refused.status, refused.json["type"])
                # As if it had been served by a process that was killed.
                with connect(stack.redis) as redis:
                    redis.hset(f"{{sse}}:ticket:{read_ticket(text)[1]}", "stream", "000000-7")
                with Reader.open(other.port, "orders/1", query=query, resume=first.last_event_id) as again:
                    await asyncio.to_thread(again.until_open)

    async def test_race_for_a_ticket(self, stack):
        """However many streams begin at once, one is left in the end."""
        query = f"ticket={await ticket(stack.apps[0].port, right())}"
        assert (await ask(stack.apps[0].port, "HEAD", f"/events?{query}")).status == 200

        def open_one(number: int) -> Reader:
            return Reader.open(stack.apps[number % 2].port, "orders/1", query=query)

        streams = await asyncio.gather(*(asyncio.to_thread(open_one, number) for number in range(20)))
        try:
            deadline = time.monotonic() + 20
            while len(left := [stream for stream in streams if not stream.over]) > 1:
                assert time.monotonic() < deadline, f"{len(left)} streams of one ticket are open"
                for stream in left:
                    while stream.read(0.01):
                        pass
            for stream in left:
                stream.during(0.3)
            assert [False] == [stream.over for stream in left]
        finally:
            for stream in streams:
                stream.close()


class TestLogs:
    """Neither a token nor a ticket is in any log: ours, nginx's, Redis's."""

    async def test_grep(self, stack):
        """Whatever is done with them, right or wrong, and whatever is answered."""
        port = stack.nginx.port
        good, bad, late = right("carol"), right("carol")[:-5] + "wrong", right("carol", seconds=-100)
        tickets = [await ticket(port, good) for _ in range(2)]
        body = json.dumps({"topics": ["orders/1"], "data": "x"}).encode()
        for query in (f"ticket={tickets[0]}", f"ticket={tickets[0]}x", f"ticket={good}"):
            with contextlib.closing(Reader.open(port, "orders/1", query=query)) as stream:
                if stream.status == 200:
                    await asyncio.to_thread(stream.until_open)
        for text in (good, bad, late):
            fetched = {"Sec-Fetch-Site": "same-origin"}
            for headers in (bearer(text), {"Authorization": text}, {"Cookie": f"session={text}"} | fetched):
                await ask(port, "POST", "/publish", headers={**headers, **JSON}, body=body)
                await ask(port, "GET", "/events?topic=nothing", headers=headers)
                await ask(port, "POST", "/streams/000000-7/token", headers=headers)
            await ask(port, "GET", f"/nowhere?token={text}")
            await ask(port, "GET", f"/events?topic=orders/1&access_token={text}", headers=bearer(good))
        await ask(port, "DELETE", f"/tickets?ticket={tickets[1]}")
        # With Redis away, the error says what could not be done, and not with what.
        stack.redis.kill()
        await ask(port, "GET", f"/events?topic=orders/1&ticket={tickets[0]}")
        await ask(port, "POST", "/tickets", headers=bearer(good))
        stack.redis.start()
        for app in stack.apps:
            app.stop()

        texts = written(stack.directory)
        assert {"app-1.log", "app-2.log"} <= texts.keys()
        assert any(b'"path":"/events"' in text for name, text in texts.items() if "nginx" in name or "access" in name)
        assert b"ticket" in texts["app-1.log"] + texts["app-2.log"]
        secrets = {"a token": [text.split(".")[2] for text in (good, bad, late)], "the secret": [SECRET]}
        secrets["a ticket"] = [text.split(".")[1] for text in tickets]
        found = {
            (what, name)
            for what, parts in secrets.items()
            for part in parts
            for name, text in texts.items()
            if part.encode() in text
        }
        assert set() == found


def written(folder: Path) -> dict[str, bytes]:
    """Return what all processes have written below *folder*, by file."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".conf"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
