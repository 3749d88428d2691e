"""
The client misses nothing, doubles nothing, and comes back by itself.

First against scripted bytes, then against the real application.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager
from email.utils import formatdate

import httpx2
import pytest

from app import client as client_module
from app.client import GaveUp, Refused, RunFailed, ServerSentEvent, StreamReset, cancel, listen, publish, run
from app.event import encode
from app.stack import Stack
from tests.scripted_server import accepted, dropped, serving, silent, status, stream

EVENT = {"topics": ["logs"], "data": "a"}
OPEN = encode(id="e:0", event="stream.open", data='{"stream":"s","heartbeat_seconds":15}', retry=1)


class Enough(Exception):
    """Raised by a test's callback to leave a client that would try for ever."""


def block(number: int) -> bytes:
    return encode(id=f"e:{number}", data=str(number))


def event(number: int) -> ServerSentEvent:
    return ServerSentEvent("message", str(number), f"e:{number}")


async def take(count: int, url: str, topics="logs", **options) -> list[ServerSentEvent]:
    events: list[ServerSentEvent] = []
    async with aclosing(listen(url, topics, **options)) as listening:
        async for event in listening:
            events.append(event)
            if len(events) == count:
                break
    return events


async def waits_of(url: str, count: int, **options) -> list[tuple[str, float]]:
    """What *count* waits would have been: cause and seconds."""
    waits = []

    def on_wait(cause: str, seconds: float) -> None:
        waits.append((cause, seconds))
        if len(waits) == count:
            raise Enough

    with pytest.raises(Enough):
        await take(1000, url, on_wait=on_wait, **options)
    return waits


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client_module, "SHORTEST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(client_module, "PUBLISH_WAIT_SECONDS", 0.01)


class TestListen:
    async def test_first_request(self):
        """
        Topics, user and Accept go out as the wire contract says, without a position.
        """
        async with serving(stream(OPEN, block(1))) as server:
            await take(1, server.url + "/", ["logs", "a b"], user="zoë", headers={"X-A": "b"})

        request = server.requests[0]
        assert ("GET", "/events") == (request.method, request.path)
        assert {"topic": ["logs", "a b"], "user": ["zoë"]} == request.query
        # Not EventSource's own, which would be answered with a soft fail.
        assert "text/event-stream, application/problem+json" == request.headers["accept"]
        assert "b" == request.headers["x-a"]
        assert "last-event-id" not in request.headers

    @pytest.mark.parametrize("cut", [b"", b"id: e:3\nda", b"id: e:3\ndata: 3\n"])
    @pytest.mark.parametrize("then", ["end", "cut"])
    async def test_resumes_after_the_end(self, then, cut):
        """
        After a clean end or a cut, also within an event, every event comes once and in order.
        """
        first = stream(OPEN, block(1) + block(2), cut, then=then)
        async with serving(first, stream(block(3)), stream(block(4))) as server:
            events = await take(4, server.url)

        assert [event(number) for number in (1, 2, 3, 4)] == events
        positions = [request.headers.get("last-event-id") for request in server.requests]
        assert [None, "e:2", "e:3"] == positions

    async def test_resumes_from_a_given_position(self):
        """
        A caller that stored an id goes on from there, also when no event came before the end.
        """
        async with serving(stream(), stream(b"data: a\n\n")) as server:
            events = await take(1, server.url, last_event_id="é:7", retry_ms=1)

        assert [ServerSentEvent("message", "a", "é:7")] == events
        positions = [request.headers["last-event-id"] for request in server.requests]
        assert ["é:7", "é:7"] == [value.encode("latin-1").decode() for value in positions]

    async def test_earliest_until_there_is_an_id(self):
        """
        `earliest` is asked for until an id is known; later a replay would come twice.
        """
        replay = stream(OPEN, block(1), block(2), then="cut")
        async with serving(stream(), replay, stream(block(3))) as server:
            events = await take(3, server.url, last_event_id="earliest", retry_ms=1)

        assert [event(1), event(2), event(3)] == events
        assert [["earliest"], ["earliest"], None] == [request.query.get("last_event_id") for request in server.requests]
        assert [None, None, "e:2"] == [request.headers.get("last-event-id") for request in server.requests]

    async def test_position_moves_on_a_quiet_topic(self):
        """
        `stream.open` and `stream.position` move the resume point unseen.
        """
        position = encode(id="e:9", event="stream.position")
        async with serving(stream(OPEN), stream(position), stream(block(10))) as server:
            events = await take(1, server.url, retry_ms=1)

        assert [event(10)] == events
        assert "e:0" == server.requests[1].headers["last-event-id"]
        assert "e:9" == server.requests[2].headers["last-event-id"]

    async def test_kit_events_on_request(self):
        """
        A caller that stores its own position sees every event that moves it.
        """
        position = encode(id="e:9", event="stream.position")
        async with serving(stream(OPEN, position)) as server:
            events = await take(2, server.url, kit_events=True)

        assert ["stream.open", "stream.position"] == [event.event for event in events]
        assert "e:9" == events[1].id

    async def test_reset_is_visible(self):
        """
        Loss comes as an event with a type of its own, and the resume point moves with it.
        """
        reset = encode(id="n:5", event="stream.reset", data='{"reason":"history_lost"}')
        async with serving(stream(OPEN, reset, block(6)), stream(block(7))) as server:
            events = await take(3, server.url)

        assert isinstance(events[0], StreamReset)
        assert ("history_lost", "n:5") == (events[0].reason, events[0].id)
        assert [event(6), event(7)] == events[1:]

    async def test_on_open(self):
        """
        Each opened stream is told, with what the server says of it.
        """
        opened = []
        async with serving(stream(OPEN), stream(OPEN, block(1))) as server:
            await take(1, server.url, on_open=opened.append)

        assert [{"stream": "s", "heartbeat_seconds": 15}] * 2 == opened

    async def test_server_that_is_not_there_yet(self, free_port):
        """
        A client may be started before its server.
        """
        url = f"http://127.0.0.1:{free_port}"
        tried = asyncio.Event()
        listening = asyncio.create_task(take(1, url, retry_ms=1, on_wait=lambda *_: tried.set()))
        await tried.wait()
        async with serving(stream(OPEN, block(1)), port=free_port):
            assert [event(1)] == await listening

    @pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
    async def test_not_now(self, code):
        """
        What only means "later" is tried again, where a browser gives up for ever.
        """
        causes = []
        later = status(code, body={"title": "later"}, kind="application/problem+json")
        async with serving(later, dropped, stream(OPEN, block(1))) as server:
            events = await take(1, server.url, retry_ms=1, on_wait=lambda cause, _: causes.append(cause))

        assert [event(1)] == events
        assert f"the server answered {code} Status {code}" == causes[0]
        assert "disconnected" in causes[1]

    @pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
    async def test_refused(self, code):
        """
        What no repetition changes is raised, with the server's own words.
        """
        problem = {"detail": "topic must be short. Shorten it.", "name": "topic"}
        async with serving(status(code, body=problem)) as server:
            with pytest.raises(Refused) as refused:
                await take(1, server.url)

        expected = f"GET /events got status {code}: topic must be short. Shorten it."
        assert expected == str(refused.value)
        assert (code, problem) == (refused.value.status, refused.value.problem)
        assert 1 == len(server.requests)

    async def test_not_an_event_stream(self):
        """
        A page with status 200 is not a stream without events.
        """
        async with serving(status(200, body="<html>", kind="text/html")) as server:
            with pytest.raises(Refused, match="must be text/event-stream, got 'text/html'"):
                await take(1, server.url)

    async def test_caller_mistakes_are_not_retried(self):
        """
        An address without a scheme will not get one.
        """
        with pytest.raises(httpx2.UnsupportedProtocol):
            await take(1, "localhost:8080")

    async def test_no_more_to_come(self):
        """
        204 ends the iteration.
        """
        async with serving(stream(OPEN, block(1)), status(204)) as server:
            assert [event(1)] == await take(1000, server.url)

    async def test_redirect(self):
        """
        A stream that moved is followed, as browsers do.
        """
        async with serving(stream(block(1))) as target:
            moved = status(307, f"Location: {target.url}/events?topic=logs")
            async with serving(moved) as server:
                assert [event(1)] == await take(1, server.url)

    async def test_silence_after_opening(self):
        """
        Three heartbeats of silence are a dead connection: reconnect, and miss nothing.
        """
        opened = encode(id="e:0", event="stream.open", data='{"heartbeat_seconds":0.05}', retry=1)
        dead = stream(opened, block(1), then="hold")
        waits = []
        async with serving(dead, stream(block(2))) as server:
            started = time.monotonic()
            events = await take(2, server.url, on_wait=lambda cause, _: waits.append(cause))

        assert [event(1), event(2)] == events
        assert ["nothing came for 0.15 s"] == waits
        assert time.monotonic() - started >= 0.15
        assert "e:1" == server.requests[1].headers["last-event-id"]

    @pytest.mark.parametrize("answer", [silent, stream(then="hold"), stream(b":\n\n", then="hold")])
    async def test_silence_before_opening(self, answer):
        """
        A server that takes the connection and says nothing is left too.
        """
        async with serving(answer, stream(block(1))) as server:
            events = await take(1, server.url, silence_seconds=0.5, retry_ms=1)

        assert [event(1)] == events

    async def test_heartbeats_are_no_silence(self):
        """
        A quiet stream with heartbeats stays.
        """
        opened = encode(id="e:0", event="stream.open", data='{"heartbeat_seconds":0.4}')
        beats = [part for _ in range(4) for part in (0.5, b":\n\n")]
        async with serving(stream(opened, *beats, block(1))) as server:
            assert [event(1)] == await take(1, server.url)

        assert 1 == len(server.requests)

    async def test_slow_caller_is_no_silence(self):
        """
        The server is not left because the caller takes its time.
        """
        opened = encode(id="e:0", event="stream.open", data='{"heartbeat_seconds":0.2}')
        async with (
            serving(stream(opened, block(1), block(2))) as server,
            aclosing(listen(server.url, "logs")) as listening,
        ):
            assert event(1) == await anext(listening)
            await asyncio.sleep(0.8)
            assert event(2) == await anext(listening)

        assert 1 == len(server.requests)

    async def test_leaving_closes_the_connection(self):
        """
        The server sees at once that the caller left, also when the HTTP client stays.
        """
        async with (
            serving(stream(OPEN, block(1), then="hold")) as server,
            httpx2.AsyncClient() as shared,
        ):
            await take(1, server.url, client=shared)
            await asyncio.wait_for(server.left.wait(), 2)

    async def test_refusing_closes_the_connection(self):
        """
        What is no event stream is not kept open, although nobody reads on.
        """
        page = stream(b"<html>", then="hold", kind="text/html")
        async with serving(page) as server, httpx2.AsyncClient() as shared:
            with pytest.raises(Refused):
                await take(1, server.url, client=shared)
            await asyncio.wait_for(server.left.wait(), 2)


DRAINING = encode(event="stream.draining", data='{"seconds": 1}')


def opened_at(number: int) -> bytes:
    return encode(id=f"e:{number}", event="stream.open", data='{"stream":"s","heartbeat_seconds":15}', retry=1)


class TestMakeBeforeBreak:
    async def test_the_successor_is_open_before_the_end(self):
        """
        At stream.draining the next stream is opened from where this one stands, while it goes on.

        What both carry comes once, in order, without a wait; then the old one is left.
        """
        first = stream(OPEN, block(1) + DRAINING + block(2), 0.2, block(3), then="hold")
        second = stream(opened_at(1), 0.5, block(2) + block(3) + block(4))
        opens, waits = [], []
        async with serving(first, second) as server:
            events = await take(4, server.url, on_open=opens.append, on_wait=lambda *wait: waits.append(wait))
            await server.left.wait()

            assert [event(1), event(2), event(3), event(4)] == events
            assert [None, "e:1"] == [request.headers.get("last-event-id") for request in server.requests]
            assert (2, []) == (len(opens), waits)

    async def test_the_old_stream_ends_first(self):
        """A successor that is slow to open is waited for; nobody else is asked."""
        first = stream(OPEN, block(1) + DRAINING + block(2), then="cut")
        second = stream(0.3, opened_at(1), block(2) + block(3))
        waits = []
        async with serving(first, second) as server:
            events = await take(3, server.url, on_wait=lambda *wait: waits.append(wait))

            assert [event(1), event(2), event(3)] == events
            assert (2, []) == (len(server.requests), waits)

    @pytest.mark.parametrize(
        "refusal",
        [status(503), status(400), dropped, stream(then="end"), stream(b": nothing", then="end")],
        ids=["503", "400", "dropped", "empty", "no stream.open"],
    )
    async def test_no_successor(self, refusal):
        """Where no other process answers, the stream is read to its end, and resumed as ever."""
        first = stream(OPEN, block(1) + DRAINING, 0.2, block(2))
        third = stream(opened_at(2), block(3))
        async with serving(first, refusal, third) as server:
            events = await take(3, server.url)

            assert [event(1), event(2), event(3)] == events
            assert [None, "e:1", "e:2"] == [request.headers.get("last-event-id") for request in server.requests]

    async def test_successor_that_breaks_while_it_repeats(self):
        """It is resumed behind what was given, not behind what the successor had repeated so far."""
        first = stream(OPEN, block(1) + DRAINING + block(2) + block(3), 0.2)
        second = stream(0.3, opened_at(1), block(2), then="cut")
        third = stream(opened_at(3), block(4))
        async with serving(first, second, third) as server:
            events = await take(4, server.url)

            assert [event(1), event(2), event(3), event(4)] == events
            assert "e:3" == server.requests[2].headers["last-event-id"]

    async def test_successor_that_drains_while_it_repeats(self):
        """Two restarts close to each other double nothing."""
        first = stream(OPEN, block(1) + DRAINING + block(2) + block(3), 0.2)
        second = stream(0.3, opened_at(1), block(2) + DRAINING + block(3) + block(4))
        third = stream(opened_at(4), block(5))
        async with serving(first, second, third) as server:
            events = await take(5, server.url)

            assert [event(1), event(2), event(3), event(4), event(5)] == events

    async def test_successor_without_the_history(self):
        """A successor that announces a loss is believed: what follows is new."""
        reset = encode(id="f:9", event="stream.reset", data='{"reason": "epoch_changed"}')
        first = stream(OPEN, block(1) + DRAINING + block(2), 0.2)
        second = stream(0.3, encode(event="stream.open", data="{}"), reset, block(2))
        async with serving(first, second) as server:
            events = await take(4, server.url)

            assert ["1", "2", '{"reason": "epoch_changed"}', "2"] == [each.data for each in events]
            assert isinstance(events[2], StreamReset)

    async def test_leaving_closes_both(self):
        """A caller that leaves meanwhile leaves no connection open."""
        async with serving(stream(OPEN, block(1) + DRAINING + block(2), then="hold"), silent) as server:
            async with aclosing(listen(server.url, "logs")) as listening:
                async for each in listening:
                    if each == event(2):
                        while len(server.requests) < 2:  # noqa: ASYNC110
                            await asyncio.sleep(0.01)
                        break
            while server.gone < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def run_opened(number: int) -> bytes:
    return encode(id=f"e:{number}", event="stream.open", data='{"topics": ["run:r"], "heartbeat_seconds": 15}', retry=1)


def told(number: int, text: str) -> bytes:
    return encode(id=f"e:{number}", event="run.token", data=text)


RUN_DONE = encode(id="e:9", event="run.done", data="{}")


class TestRun:
    @pytest.mark.parametrize("late", [0.0, 0.2], ids=["at once", "late"])
    @pytest.mark.parametrize("then", ["hold", "end", "cut"])
    async def test_one_stream_follows_the_other(self, then, late):
        """At a drain the run is started once and read by two streams, whichever ends or opens first."""
        first = stream(run_opened(0), told(1, "a") + DRAINING + told(2, "b"), then=then)
        second = stream(late, run_opened(1), told(2, "b") + told(3, "c"), 0.1, RUN_DONE)
        opens, waits = [], []
        async with serving(first, second) as server:
            events = [
                event
                async for event in run(
                    server.url, {"kind": "chat"}, on_open=opens.append, on_wait=lambda *wait: waits.append(wait)
                )
            ]

        assert ["a", "b", "c", "{}"] == [event.data for event in events]
        asked = [(request.method, request.path, request.headers.get("last-event-id")) for request in server.requests]
        assert [("POST", "/runs", None), ("GET", "/runs/r/events", "e:1")] == asked
        assert (2, []) == (len(opens), waits)

    async def test_started_once(self):
        """A POST whose answer was lost is repeated under its key; the run's id then leads to the rest."""
        first = stream(run_opened(0), told(1, "a"), then="cut")
        async with serving(dropped, first, stream(run_opened(1), RUN_DONE)) as server:
            async for _ in run(server.url, {"kind": "chat", "prompt": "x"}):
                pass

        assert ["POST", "POST", "GET"] == [request.method for request in server.requests]
        assert 1 == len({request.headers["idempotency-key"] for request in server.requests[:2]})
        assert [{"kind": "chat", "prompt": "x"}] * 2 == [request.json for request in server.requests[:2]]

    async def test_failed(self):
        """`run.failed` is raised with its reason, and no other stream is opened."""
        failed = encode(id="e:1", event="run.failed", data='{"reason": "too_long", "detail": "It took too long."}')
        async with serving(stream(run_opened(0), failed)) as server:
            with pytest.raises(RunFailed, match="too_long"):
                async for _ in run(server.url, {"kind": "chat"}):
                    pass

        assert 1 == len(server.requests)

    async def test_cancelled(self):
        """It is ended by its id or its topic, asked for again where no answer came, under the same user."""
        for name in ("r", "run:r"):
            async with serving(dropped, status(503), status(202, body={"run": "r"})) as server:
                await cancel(server.url + "/", name, user="ann", headers={"X-A": "b"})

            asked = [(each.method, each.path, each.query, each.headers["x-a"]) for each in server.requests]
            assert [("DELETE", "/runs/r", {"user": ["ann"]}, "b")] * 3 == asked

    async def test_not_cancelled(self, free_port):
        """
        A run that is not there is refused, and so is a page of somebody else's; a server that is not there is given up.
        """
        async with serving(status(200, body={"ok": True})) as server:
            with pytest.raises(Refused, match="is this the kit's address"):
                await cancel(server.url, "r")
            for wrong in ("..", "run:.", "", "a/b"):  # `/runs/..` is `/`
                with pytest.raises(ValueError, match="run must be 1 to 64 of"):
                    await cancel(server.url, wrong)
            assert 1 == len(server.requests)
        async with serving(status(404)) as server:
            with pytest.raises(Refused, match="DELETE /runs/r got status 404"):
                await cancel(server.url, "r")
        with pytest.raises(GaveUp, match="the run was not cancelled"):
            await cancel(f"http://127.0.0.1:{free_port}", "r", timeout_seconds=0.3)


class TestWaiting:
    async def test_retry_is_honoured(self):
        """
        After an opened stream the wait is what `retry:` says, and up to half more.
        """
        async with serving(stream(OPEN, b"retry: 400\n\n")) as server:
            [(cause, seconds)] = await waits_of(server.url, 1)

        assert "the stream ended" == cause
        assert 0.4 <= seconds <= 0.6

    async def test_failures_wait_longer_and_longer(self):
        """
        Each failure doubles the wait, to 30 seconds; a soft fail is one.
        """
        async with serving(status(503)) as server:
            random.seed(1)
            with_sleep = [client_module._wait_seconds(1, failures, 0) for failures in range(12)]
            waits = await waits_of(server.url, 3, retry_ms=2)

        assert all(2**n <= seconds <= 1.5 * 2**n for n, seconds in enumerate(with_sleep[:5]))
        assert all(30 <= seconds <= 45 for seconds in with_sleep[5:])
        assert [0.002, 0.004, 0.008] == pytest.approx([s for _, s in waits], rel=0.5)
        assert waits[2][1] >= 0.008
        soft = stream(b"retry: 2\n: 503, come back later\n\n", head="X-Sse-Fallback: 503\r\n")
        async with serving(soft) as server:
            cause, seconds = (await waits_of(server.url, 3))[2]
        assert seconds >= 0.008
        assert "the server answered 503, softened for browsers" == cause

    async def test_an_event_ends_the_failures(self):
        """
        After a stream that opened, waiting begins anew.
        """
        async with serving(status(503), status(503), stream(OPEN)) as server:
            waits = await waits_of(server.url, 3, retry_ms=100 / 3)

        assert waits[2][1] <= 0.0015

    async def test_retry_zero_is_no_tight_loop(self, monkeypatch):
        """
        A server that sends `retry: 0` and ends every stream is not called without a pause.
        """
        monkeypatch.undo()
        async with serving(stream(OPEN, b"retry: 0\n\n")) as server:
            assert (await waits_of(server.url, 2))[1][1] >= 0.05

    async def test_endless_retry(self):
        """
        A reconnection time that overflows timers is a day.
        """
        async with serving(stream(b"retry: 99999999999999999999\n\n")) as server:
            assert 86_400 == (await waits_of(server.url, 1))[0][1]

    @pytest.mark.parametrize("code", [429, 503])
    async def test_retry_after(self, code):
        """
        Retry-After is respected, in seconds or as a date, and spread.
        """
        date = formatdate(time.time() + 90, usegmt=True)
        for value, least, most in (("7", 7, 10.5), (date, 60, 136.5), ("soon", 0.001, 3), ("-3", 0.001, 3)):
            async with serving(status(code, f"Retry-After: {value}")) as server:
                [(_, seconds)] = await waits_of(server.url, 1, retry_ms=1)
            assert least <= seconds <= most

    async def test_many_clients_do_not_come_at_once(self):
        """
        Waits of the same length are spread over half as much again.
        """
        waits = sorted(client_module._wait_seconds(1, 0, 0) for _ in range(1000))

        assert waits[100] < 1.1
        assert waits[900] > 1.4


class TestPublish:
    async def test_one(self):
        """
        One event goes out as one JSON object, with a key.
        """
        async with serving(accepted) as server:
            ids = await publish(server.url + "/", {**EVENT, "data": "ü"}, headers={"X-A": "b"})

        assert ["e:1"] == ids
        request = server.requests[0]
        assert ("POST", "/publish") == (request.method, request.path)
        assert {"topics": ["logs"], "data": "ü"} == request.json
        assert "application/json" == request.headers["content-type"]
        assert "b" == request.headers["x-a"]
        assert len(request.headers["idempotency-key"]) >= 20

    async def test_several_and_keys(self):
        """
        Several events are one request; every call has a key of its own, unless it is given.
        """
        async with serving(accepted) as server:
            for key in (None, None, "mine"):
                assert ["e:1", "e:2"] == await publish(server.url, [EVENT, EVENT], key=key)

        first, second, third = [request.headers["idempotency-key"] for request in server.requests]
        assert first != second
        assert "mine" == third
        assert [EVENT, EVENT] == server.requests[0].json

    @pytest.mark.parametrize("failure", [dropped, status(500), status(503), status(504), status(429)])
    async def test_retried_under_one_key(self, failure):
        """
        A lost answer is asked for again with the same key and the same bytes, so it counts once.
        """
        async with serving(failure, failure, accepted) as server:
            assert ["e:1"] == await publish(server.url, EVENT)

        assert 3 == len(server.requests)
        assert 1 == len({request.headers["idempotency-key"] for request in server.requests})
        assert 1 == len({request.body for request in server.requests})

    async def test_no_answer(self, monkeypatch):
        """
        A server that keeps silent is asked again.
        """
        monkeypatch.setattr(client_module, "ATTEMPT_SECONDS", 0.5)
        async with serving(silent, accepted) as server:
            assert ["e:1"] == await publish(server.url, EVENT)

    async def test_server_that_is_not_there(self, free_port):
        """
        At the deadline it is said that nothing was published, and why.
        """
        causes = []
        started = time.monotonic()

        with pytest.raises(GaveUp, match="were not published") as gave_up:
            await publish(
                f"http://127.0.0.1:{free_port}",
                EVENT,
                timeout_seconds=1.5,
                on_wait=lambda cause, _: causes.append(cause),
            )

        assert not gave_up.value.uncertain
        assert time.monotonic() - started >= 1.5
        assert len(causes) >= 2

    async def test_deadline_with_a_lost_answer(self):
        """
        At the deadline it is said that they may have been published, and under which key.
        """
        async with serving(dropped) as server:
            with pytest.raises(GaveUp, match="may or may not have been published") as gave_up:
                await publish(server.url, EVENT, timeout_seconds=0.3)

        assert gave_up.value.uncertain
        assert server.requests[0].headers["idempotency-key"] == gave_up.value.key

    async def test_no_attempt_after_the_key_may_be_forgotten(self, monkeypatch):
        """
        Once an answer was lost, attempts end before the server forgets the key.
        """
        monkeypatch.setattr(client_module, "KEY_KEPT_SECONDS", 0.3)
        started = time.monotonic()
        async with serving(status(429), dropped) as server:
            with pytest.raises(GaveUp):
                await publish(server.url, EVENT, timeout_seconds=60)

        assert time.monotonic() - started < 30

    async def test_retry_after(self):
        """
        Retry-After is respected; one beyond the deadline is not waited for.
        """

        def on_wait(cause: str, seconds: float) -> None:
            assert "the server answered 429 Status 429" == cause
            assert 7 <= seconds <= 10.5
            raise Enough

        async with serving(status(429, "Retry-After: 7")) as server:
            with pytest.raises(Enough):
                await publish(server.url, EVENT, on_wait=on_wait)

        async with serving(status(429, "Retry-After: 60")) as server:
            with pytest.raises(GaveUp, match="429") as gave_up:
                await publish(server.url, EVENT, timeout_seconds=30)
        assert not gave_up.value.uncertain

    async def test_refused(self):
        """
        Events that the server does not want are not sent again.
        """
        problem = {"detail": "topic must be short. Shorten it."}
        async with serving(status(400, body=problem)) as server:
            with pytest.raises(Refused, match="topic must be short"):
                await publish(server.url, EVENT)
        assert 1 == len(server.requests)

        async with serving(status(301, "Location: /elsewhere")) as server:
            with pytest.raises(Refused, match="give the address /elsewhere instead"):
                await publish(server.url, EVENT)

        async with serving(status(200, body={"hello": "world"})) as server:
            with pytest.raises(Refused, match="holds no ids"):
                await publish(server.url, EVENT)

    async def test_text_that_utf_8_cannot_carry(self):
        """
        A lone surrogate is refused here, before anything is sent.
        """
        async with serving(accepted) as server:
            with pytest.raises(ValueError, match="surrogates"):
                await publish(server.url, {**EVENT, "data": "\ud800"})

        assert [] == server.requests


# --- Against the application ---


@pytest.fixture(scope="module")
def application() -> Iterator[str]:
    """One process with its log in memory, whose streams end several times a second."""
    env = {
        "SSE_MAX_AGE_SECONDS": "0.3",
        "SSE_HEARTBEAT_SECONDS": "0.1",
        "SSE_RETRY_MS": "1",
        "SSE_MAX_TOPICS": "3",
        "SSE_DRAIN_LEAD_SECONDS": "0",
        "SSE_DRAIN_SECONDS": "0",
    }
    with Stack(apps=1, redis=False, nginx=False, env=env) as stack:
        yield stack.url


@asynccontextmanager
async def losing_answers(url: str, count: int) -> AsyncGenerator[str]:
    """A way to *url* that loses the first *count* answers, after the server gave them."""
    host, port = url.removeprefix("http://").split(":")
    lost = 0

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal lost
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        request = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in request.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        far_writer.write(request + await reader.readexactly(int(length.partition(b":")[2])))
        answer = await far_reader.readuntil(b"\r\n\r\n")
        if lost < count:
            lost += 1
            assert answer.startswith(b"HTTP/1.1 201 ")
            writer.transport.abort()
        else:
            writer.write(answer + await far_reader.read(10_000))
            await writer.drain()
            writer.close()
        far_writer.close()

    listener = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        listener.close_clients()


class TestAgainstTheApplication:
    async def test_every_event_once_over_many_streams(self, application):
        """
        Streams end and begin anew while events come; the listener sees one order without a gap.
        """
        opened, opens = asyncio.Event(), []

        def on_open(content: dict) -> None:
            opens.append(content["stream"])
            opened.set()

        listening = asyncio.create_task(take(300, application, ["many"], on_open=on_open))
        await opened.wait()
        async with httpx2.AsyncClient() as client:
            for number in range(300):
                await publish(application, {"topics": ["many"], "data": str(number)}, client=client)
                await asyncio.sleep(0.005)

        events = await asyncio.wait_for(listening, 60)

        assert [str(number) for number in range(300)] == [event.data for event in events]
        assert sorted({event.id for event in events}) == sorted(event.id for event in events)
        assert len(opens) >= 3

    async def test_replay_from_a_stored_position(self, application):
        """
        Names, line ends and any text arrive, from the beginning or after a stored id.
        """
        data = ["é😀\na\r\nb\rc", "", {"n": [1, None]}, " x "]
        events = [{"topics": ["replay"], "event": "tick", "data": value} for value in data]
        ids = await publish(application, events)

        expected = list(zip(["é😀\na\nb\nc", "", '{"n":[1,null]}', " x "], ids, strict=True))
        replayed = await take(4, application, "replay", last_event_id="earliest")
        assert expected == [(event.data, event.id) for event in replayed]
        assert {"tick"} == {event.event for event in replayed}
        replayed = await take(2, application, "replay", last_event_id=ids[1])
        assert expected[2:] == [(event.data, event.id) for event in replayed]

    async def test_an_answer_that_was_lost(self, application):
        """
        Events whose acknowledgement was lost are published once.
        """
        events = [{"topics": ["lost"], "data": str(number)} for number in range(3)]
        async with losing_answers(application, 2) as url:
            ids = await publish(url, events)
        await publish(application, {"topics": ["lost"], "data": "last"})

        replayed = await take(4, application, "lost", last_event_id="earliest")
        assert ["0", "1", "2", "last"] == [event.data for event in replayed]
        assert ids == [event.id for event in replayed[:3]]

    async def test_loss_is_announced(self, application):
        """
        A position of another history comes back as a reset, and the stream goes on.
        """
        async with aclosing(listen(application, "reset", last_event_id="0ther:1-0")) as listening:
            reset = await anext(listening)
            await publish(application, {"topics": ["reset"], "data": "after"})
            after = await anext(listening)

        assert isinstance(reset, StreamReset)
        assert "epoch_changed" == reset.reason
        assert "after" == after.data

    async def test_refusals_carry_the_problem(self, application):
        """
        What the application refuses reaches the caller with name, rule and cure.
        """
        with pytest.raises(Refused, match=r"topics must be at most SSE_MAX_TOPICS \(3\)") as refused:
            await take(1, application, ["a", "b", "c"])
        assert "topics" == refused.value.problem["name"]
        with pytest.raises(Refused, match=r"\[1\]\.topic must be 1 to 255 characters") as refused:
            await publish(application, [EVENT, {"topics": ["ü"], "data": ""}])
        assert 400 == refused.value.status

    async def test_killed_application(self, stack):
        """
        SIGKILL of the process that serves the stream: what was published meanwhile comes once, in order.
        """
        kit = stack(
            apps=2, nginx=False, env={"SSE_RETRY_MS": "20", "SSE_DRAIN_LEAD_SECONDS": "0", "SSE_DRAIN_SECONDS": "0"}
        )
        first, second = kit.apps
        opened = asyncio.Event()
        listening = asyncio.create_task(take(200, first.url, on_open=lambda _: opened.set()))
        await opened.wait()
        async with httpx2.AsyncClient() as client:
            for number in range(200):
                if number == 50:
                    first.kill()
                if number == 150:
                    await asyncio.to_thread(first.restart)
                await publish(second.url, {"topics": ["logs"], "data": str(number)}, client=client)

        events = await asyncio.wait_for(listening, 60)
        assert [str(number) for number in range(200)] == [event.data for event in events]
