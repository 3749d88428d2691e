"""A stream ends with its token: warned before, renewed in place, told at the end."""

import asyncio
import json
import time
from math import inf

import pytest

from app.event import encode
from tests.inside import Inside
from tests.live import ask
from tests.signing import SECRET, bearer, token
from tests.test_hub import Bench
from tests.wire import Reader


@pytest.fixture(scope="module", params=["auto", "off"])
def server(request):
    """A process of each path whose streams are warned a second before their tokens expire."""
    settings = {"auth": "jwt", "jwt_secret": SECRET, "jwt_leeway_seconds": 0, "expiring_seconds": 1}
    with Inside(handoff=request.param, heartbeat_seconds=0.4, **settings) as server:
        yield server


def until(seconds: float, sub: str = "alice", **rights: object) -> str:
    """Return a token that expires in so many seconds, fractions counted."""
    return token(sub, exp=time.time() + seconds, **({"subscribe": ["orders/*"]} | rights))


async def renew(server: Inside, stream: Reader, text: str) -> dict:
    path = f"/streams/{stream.opened['stream']}/token"
    answer = await ask(server.port, "POST", path, headers=bearer(text))
    assert 200 == answer.status, answer.body
    return answer.json


class TestStream:
    def test_to_the_end(self, server):
        """`stream.expiring` before, `stream.expired` at `exp`, a clean end, and the reason."""
        with Reader.open(server.port, "orders/1", headers=bearer(until(2.5))) as stream:
            opened = stream.until_open().opened["stream"]
            [kept] = [each for each in server.streams() if each.id == opened]
            stream.until_over()

        expiring = next(event for event in stream.events if event.event == "stream.expiring")
        assert ["stream.expiring", "stream.expired"] == [name for name in stream.names if "expir" in name]
        assert "stream.expired" == stream.names[-1]
        assert opened == json.loads(expiring.data)["stream"]
        assert 0 < json.loads(expiring.data)["seconds"] <= 1
        assert stream.clean
        assert "token_expired" == kept.reason

    def test_moves_no_position(self, server):
        """Neither event carries an id: where a client stands is another matter."""
        with Reader.open(server.port, "orders/1", headers=bearer(until(1.5))) as stream:
            position = stream.until_open().last_event_id
            stream.until_over()

        assert position == stream.last_event_id
        assert "id:" not in str([piece.text for piece in stream.pieces if b"expir" in piece.text])

    def test_again_after_the_end(self, server):
        """The same token is refused then, by status: a native EventSource gives up, as it should."""
        headers = {"Accept": "text/event-stream", **bearer(until(1.5))}
        with Reader.open(server.port, "orders/1", headers=headers) as stream:
            stream.until_open().until_over()
        with Reader.open(server.port, "orders/1", headers=headers) as again:
            assert 401 == again.status

    async def test_renewed(self, server):
        """A new token lets the very stream go on; it is warned anew, and ends at the new `exp`."""
        with Reader.open(server.port, "orders/1", headers=bearer(until(3))) as stream:
            await asyncio.to_thread(stream.until, lambda s: "stream.expiring" in s.names)
            ends = time.time() + 3
            answer = await renew(server, stream, until(3))
            assert answer["expires_at"] == pytest.approx(ends, abs=2)
            await asyncio.to_thread(stream.until_over)

        assert time.time() >= answer["expires_at"] - 0.05
        assert 2 == stream.names.count("stream.expiring")
        assert 1 == stream.names.count("stream.expired")

    async def test_renewed_with_other_rights(self, server):
        """What counts is that the new token carries all that the stream does."""
        with Reader.open(server.port, "orders/1", headers=bearer(until(60))) as stream:
            await asyncio.to_thread(stream.until_open)
            await renew(server, stream, until(90, subscribe=["orders/1"]))

    async def test_ticket_is_renewed_with_its_stream(self, server):
        """The browser's next reconnect repeats the ticket, so it lives as long as its stream."""
        answer = await ask(server.port, "POST", "/tickets", headers=bearer(until(2)))
        query = f"ticket={answer.json['ticket']}"
        with Reader.open(server.port, "orders/1", query=query) as stream:
            await asyncio.to_thread(stream.until_open)
            await renew(server, stream, until(60))
        await asyncio.sleep(2)  # past the first end
        with Reader.open(server.port, "orders/1", query=query) as again:
            await asyncio.to_thread(again.until_open)


class TestWheel:
    """The hub's side, with a clock of its own."""

    def test_idle_streams_cost_no_second_look(self):
        """Age, expiry and warning are one number; a stream without expiry has its age alone."""
        bench = Bench()
        plain, _ = bench.open("t")
        expiring, _ = bench.open("t", expires_at=bench.now + bench.hub.pace.expiring + 5)

        assert (inf, plain.end_at) == (plain.expires_at, plain.deadline)
        assert bench.now + 5 == pytest.approx(expiring.deadline)

    def test_age_comes_first(self):
        """A token that lives longer than a stream may changes nothing."""
        bench = Bench()
        stream, _ = bench.open("t", expires_at=bench.now + 10 * bench.hub.pace.max_age)
        bench.wait(bench.hub.pace.max_age)

        assert "max_age" == stream.reason

    def test_while_the_client_takes_nothing(self):
        """A blocked client is told with what waits for it, and its stream ends all the same."""
        bench = Bench()
        stream, sink = bench.open("t", expires_at=bench.now + 2)
        sink.room = 0
        bench.publish(("t",))
        bench.wait(1)
        assert stream.waiting
        assert stream.pending.startswith(b"event: stream.expiring")
        bench.wait(1.5)

        assert "token_expired" == stream.reason

    def test_behind(self):
        """In the middle of a replay the warning goes in front of the next piece."""
        bench = Bench()
        bench.read(*[("t",)] * 3)
        stream, sink = bench.open("t", at=bench.window.first, expires_at=bench.now + 2)
        bench.wait(0.5)
        bench.pump()

        assert stream.warned
        written = b"".join(piece.raw for piece in sink.pieces)
        assert written.index(b"stream.expiring") < written.index(b"data: 1\n")

    def test_expired_before_it_began(self):
        """A token that ends while its stream is on its way gives a stream that ends at once."""
        bench = Bench()
        stream, sink = bench.open("t", expires_at=bench.now - 1)
        bench.wait(1)

        assert "token_expired" == stream.reason
        assert sink.pieces[-1].raw == encode(event="stream.expired", data=json.dumps({"stream": stream.id}))

    def test_renewed_after_its_end(self):
        """What has ended is not begun again."""
        bench = Bench()
        stream, _ = bench.open("t", expires_at=bench.now + 1)
        bench.wait(2)
        bench.hub.renew(stream, bench.now + 100)

        assert "token_expired" == stream.reason
        assert not bench.hub.streams
