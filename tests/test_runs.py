"""
Runs in real processes: told once, in order, to their end; whoever makes them, and whoever reads them.

The upstream is a scripted server that speaks OpenAI's chat completions, or fails to.
"""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from app import client
from app.memory_log import MemoryLog
from app.metrics import Tally
from app.parser import Parser
from app.register import MemoryRegister, Record
from app.runs import Runs
from app.stack import App, reserve_port
from tests.live import (
    DEADLINE,
    LOG,
    SCALED,
    Answer,
    Proxy,
    Site,
    Subscriber,
    _head,
    _request,
    ask,
    becomes,
    connect,
    eventually,
    frozen,
    logged,
    metrics,
    shared,
    subscribed,
)
from tests.scripted_server import Exchange, dropped, serving, silent, status, stream

JSON = {"Content-Type": "application/json"}
CHAT = {"kind": "chat", "prompt": "Hello"}
BOTH = pytest.mark.parametrize("path", ["handoff", "generator"])


@dataclass
class Reader(Subscriber):
    """A reader of a run: by the POST that starts it, or by its id."""

    body: dict | None = None
    path: str = "/runs"

    async def open(self):
        self._changed = asyncio.Event()
        reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
        headers = {"Host": "test", **self.headers}
        if self.last_event_id:
            headers["Last-Event-ID"] = self.last_event_id
        body = b"" if self.body is None else json.dumps(self.body).encode()
        if body:
            headers |= JSON | {"Content-Length": str(len(body))}
        self._writer.write(_request("POST" if body else "GET", self.path, headers) + body)
        self.status, self.head = await _head(reader)
        self.parser = Parser(last_event_id=self.last_event_id)
        self._task = asyncio.create_task(self._read(reader))
        return self

    @property
    def run(self) -> str:
        return self.opened["topics"][0].removeprefix("run:")

    @property
    def text(self) -> str:
        return "".join(json.loads(event.data)["text"] for event in self.told("run.token"))

    @property
    def last(self) -> tuple[str, dict]:
        event = self.events[-1]
        return event.event, json.loads(event.data)

    async def until_ended(self, seconds=DEADLINE):
        return await self.until(lambda s: s.ended, seconds)


@asynccontextmanager
async def reading(app: App, **more) -> AsyncIterator[Reader]:
    async with asyncio.timeout(DEADLINE):
        reader = await Reader(app.port, (), **more).open()
    try:
        yield reader
    finally:
        reader.leave()


@asynccontextmanager
async def started(app: App, body=CHAT, **headers) -> AsyncIterator[Reader]:
    """Start a run and read it."""
    async with reading(app, body=body, headers=headers) as reader:
        await reader.until_open()
        yield reader


@asynccontextmanager
async def following(app: App, run: str, last_event_id="") -> AsyncIterator[Reader]:
    async with reading(app, path=f"/runs/{run}/events", last_event_id=last_event_id) as reader:
        yield reader


def token(text: str) -> bytes:
    """One event of an upstream's stream."""
    return b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode()


def finish(why="stop") -> bytes:
    return b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": why}]}).encode()


DONE = b"data: [DONE]\n\n"


def says(*texts, pause=0.0):
    """An upstream that answers *texts* and ends as it should."""
    pieces = []
    for text in texts:
        pieces += [token(text), pause] if pause else [token(text)]
    return stream(*pieces, finish(), DONE)


class Apps:
    """Two processes on one log, whose model is at `port`."""

    def __init__(self, folder) -> None:
        self.site = Site()
        self.port, self.holder = reserve_port()
        self.server = self.site.redis()
        self.folder = folder
        self.settings = {
            "llm_base_url": f"http://127.0.0.1:{self.port}/v1",
            "llm_silence_seconds": 2,
            "task_root": str(folder),
            "run_finish_seconds": 10,
        }
        self.a = self.app()
        self.b = self.app(handoff="off", loop="asyncio")

    def app(self, **more) -> App:
        return self.site.app(self.server, **(self.settings | more))

    def on(self, path: str) -> App:
        return self.a if path == "handoff" else self.b

    def model(self, *answers):
        return serving(*answers, port=self.port)


@pytest.fixture(scope="module")
def apps(require, tmp_path_factory) -> Iterator[Apps]:
    require("redis-server", "valkey-server")
    made = Apps(tmp_path_factory.mktemp("root"))
    yield made
    made.site.close()
    if made.holder:
        made.holder.close()


class TestChat:
    @BOTH
    async def test_the_answer_is_the_stream(self, apps, path):
        """
        POST /runs answers with the tokens as they come, and ends with `run.done`.
        """
        app = apps.on(path)
        upstream = apps.model(says("Hel", "lo", " world\r\n", "\u2028é😀", pause=0.05))
        async with upstream as model, started(app) as reader:
            await reader.until_ended()

        assert 200 == reader.status
        assert "text/event-stream; charset=utf-8" == reader.head["content-type"]
        assert f"/runs/{reader.run}/events" == reader.head["content-location"]
        assert "Hello world\r\n\u2028é😀" == reader.text
        assert len(reader.told("run.token")) > 1
        assert ("run.done", {"finish": "stop", "tokens": 4, "model": "default"}) == reader.last
        assert "clean" == reader.ended
        eventually(lambda: logged(app, "stream_ended", stream=reader.opened["stream"], reason="run_ended"))
        [request] = model.requests
        assert ("POST", "/v1/chat/completions") == (request.method, request.path)
        assert {"model": "default", "stream": True, "messages": [{"role": "user", "content": "Hello"}]} == request.json

    async def test_tokens_come_as_they_are_made(self, apps):
        """
        A token is read before the upstream has made the next one.
        """
        go_on = asyncio.Event()

        async def one_then_wait(exchange: Exchange) -> bool:
            await stream(token("first"), then="hang on")(exchange)
            await go_on.wait()
            for piece in (token(" second"), finish(), DONE):
                exchange.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            exchange.writer.write(b"0\r\n\r\n")
            await exchange.writer.drain()
            return False

        async with apps.model(one_then_wait), started(apps.a) as reader:
            await reader.until(lambda s: s.text == "first")
            go_on.set()
            await reader.until_ended()

        assert "first second" == reader.text

    async def test_runs_share_the_connection_to_the_model(self, apps):
        """
        The next run's first token waits for no handshake: the answer was read to its end.
        """

        async def keep(exchange: Exchange) -> bool:
            piece = token("first") + finish() + DONE
            exchange.writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"%x\r\n%b\r\n" % (len(piece), piece)
            )
            await exchange.writer.drain()
            await asyncio.sleep(0.02)
            exchange.writer.write(b"0\r\n\r\n")
            return True

        async with apps.model(keep) as model:
            for _ in range(3):
                async with started(apps.a) as reader:
                    await reader.until_ended()
                    assert "run.done" == reader.last[0]
            assert (3, 0) == (len(model.requests), model.gone)

    async def test_a_model_that_does_not_end_holds_up_no_run(self, apps):
        """
        After `[DONE]` the answer is whole, whatever its connection does.
        """
        upstream = apps.model(stream(token("all"), finish(), DONE, then="hold"))
        async with upstream as model, started(apps.a) as reader:
            await reader.until_ended()
            assert ("all", "run.done") == (reader.text, reader.last[0])
            await asyncio.wait_for(model.left.wait(), DEADLINE)

    @BOTH
    async def test_another_process_has_all_of_it(self, apps, path):
        """
        Whoever has the id reads the same events on any process, from the first or from where they were.
        """
        other = apps.b if path == "handoff" else apps.a
        async with apps.model(says(*"abcdefghij", pause=0.03)), started(apps.on(path)) as reader:
            await reader.until(lambda s: len(s.text) >= 3)
            reader.leave()
            position = reader.position
            async with following(other, reader.run, position) as rest, following(other, reader.run) as whole:
                await rest.until_ended()
                await whole.until_ended()

        assert "abcdefghij" == reader.text + rest.text == whole.text
        assert "run.done" == rest.last[0] == whole.last[0]
        assert [event.id for event in whole.events] == [event.id for event in reader.events + rest.events]

    @BOTH
    async def test_after_the_end(self, apps, path):
        """
        Who has read the end is told 204, which ends a native EventSource; others get what they miss.
        """
        app = apps.on(path)
        async with apps.model(says("all")), started(app) as reader:
            await reader.until_ended()
        url = f"/runs/{reader.run}/events"

        assert 204 == (await ask(app.port, "GET", url, headers={"Last-Event-ID": reader.position})).status
        assert 204 == (await ask(app.port, "HEAD", f"{url}?last_event_id={reader.position}")).status
        assert 200 == (await ask(app.port, "HEAD", url)).status
        async with following(app, reader.run) as late:
            await late.until_ended()
        assert "all" == late.text
        assert "clean" == late.ended

    async def test_cancelled_by_another_process(self, apps):
        """
        DELETE ends the run wherever it is made, and the upstream hears it.
        """
        async with apps.model(stream(token("endless"), then="hold")) as model, started(apps.a) as reader:
            await reader.until(lambda s: s.text)
            answer = await ask(apps.b.port, "DELETE", f"/runs/{reader.run}")
            await reader.until_ended()
            async with asyncio.timeout(DEADLINE):
                await model.left.wait()

        assert (202, "cancelling") == (answer.status, answer.json["state"])
        assert ("run.failed", "cancelled") == (reader.last[0], reader.last[1]["reason"])
        again = await ask(apps.b.port, "DELETE", f"/runs/{reader.run}")
        assert (200, "ended") == (again.status, again.json["state"])

    async def test_cancelled_from_python(self, apps):
        """
        `app.client.cancel` ends what `app.client.run` reads, by the topic that its stream told.
        """
        opened: list[dict] = []
        async with apps.model(stream(token("endless"), then="hold")):
            url = f"http://127.0.0.1:{apps.a.port}"
            async with aclosing(client.run(url, {"kind": "chat", "prompt": "Hello"}, on_open=opened.append)) as events:
                await anext(events)
                await client.cancel(f"http://127.0.0.1:{apps.b.port}", opened[0]["topics"][0])
                with pytest.raises(client.RunFailed, match="cancelled"):
                    await anext(events)

    async def test_reader_gone(self, apps):
        """
        A run goes on without its reader, who may come back for the rest.
        """
        async with apps.model(says(*"abcdef", pause=0.05)):
            async with started(apps.a) as reader:
                await reader.until(lambda s: s.text)
            async with following(apps.a, reader.run) as again:
                await again.until_ended()

        assert "abcdef" == again.text

    async def test_repeated_post(self, apps):
        """
        A POST repeated under its Idempotency-Key reads the same run; the upstream is asked once.
        """
        async with apps.model(says(*"abcdef", pause=0.05)) as model:
            async with started(apps.a, **{"Idempotency-Key": "once"}) as first:
                await first.until(lambda s: s.text)
                async with started(apps.b, **{"Idempotency-Key": "once"}) as second:
                    await first.until_ended()
                    await second.until_ended()
            other = await ask(
                apps.a.port,
                "POST",
                "/runs",
                headers=JSON | {"Idempotency-Key": "once"},
                body=json.dumps({**CHAT, "prompt": "Other"}).encode(),
            )

        assert first.run == second.run
        assert "abcdef" == first.text == second.text
        assert 1 == len(model.requests)
        assert (422, "urn:sse-kit:idempotency-conflict") == (other.status, other.json["type"])

    async def test_redis_frozen(self, apps):
        """
        What the log does not take at once is kept for it: each token comes once, in order.
        """
        texts = [f"{number} " for number in range(100)]
        async with apps.model(says(*texts, pause=0.03)), started(apps.a) as reader:
            await reader.until(lambda s: len(s.text) > 10)
            with frozen(apps.server):
                await asyncio.sleep(2.5)  # longer than SSE_REDIS_TIMEOUT_SECONDS
            await reader.until_ended()

        assert "".join(texts) == reader.text
        assert "run.done" == reader.last[0]

    @pytest.mark.parametrize("other", [False, True], ids=["asked again there", "asked again elsewhere"])
    async def test_answer_of_the_register_lost(self, apps, other):
        """
        A run that was entered, as nobody was told, is made when it is asked for again; else it ends.
        """
        proxy = apps.site.proxy(apps.server)
        maker = apps.site.app(proxy, **(apps.settings | {"llm_base_url": ""}))
        headers = {"Idempotency-Key": f"lost-{other}"}
        body = {**CHAT, "max_tokens": 2}
        async with started(maker, body) as reader:
            await reader.until_ended()  # Redis knows the script
        proxy.swallow = b"fingerprint"
        answer = await ask(maker.port, "POST", "/runs", headers=JSON | headers, body=json.dumps(body).encode())
        proxy.swallow = None
        assert (503, 1) == (answer.status, proxy.swallowed)
        async with AsyncExitStack() as busy:
            if other:  # or the others would take it for dead
                await busy.enter_async_context(started(maker, {**CHAT, "prompt": "Hello " * 2000}))
            async with started(apps.b if other else maker, body, **headers) as reader:
                await reader.until_ended()

        expected = ("run.failed", "process_lost") if other else ("run.done", None)
        assert expected == (reader.last[0], reader.last[1].get("reason"))

    async def test_offline_generator(self, apps):
        """
        Without a model the kit answers, and says that no model does.
        """
        app = apps.app(llm_base_url="")

        async with started(app, {**CHAT, "max_tokens": 12}) as reader:
            await reader.until_ended()

        assert "This is the kit's offline generator, not a model: it understands nothing." == reader.text
        assert "offline generator" == reader.last[1]["model"]


    async def test_longer_than_an_event(self):
        """
        A token that is longer than SSE_MAX_EVENT_BYTES comes in several events, and whole.
        """
        word = "w" * 6_000 + "\U0001f600" * 500
        assert shared.LIMITS["max_event_bytes"] == 5_000

        async with started(shared.app, {**CHAT, "prompt": word}) as reader:
            await reader.until_ended()

        assert reader.text.endswith(f"You wrote 1 words: {word}")
        assert "run.done" == reader.last[0]

    async def test_no_place_for_its_reader(self, apps):
        """
        A run whose reader finds no place is not made: nobody would know of it.
        """
        app = apps.site.app("", llm_base_url="", limit_streams_per_user=1, limit_policy="reject")
        async with subscribed(app, "t", query={"user": "alice"}):
            body = json.dumps({**CHAT, "prompt": "Hello " * 5_000}).encode()  # minutes of answer
            answer = await ask(app.port, "POST", "/runs?user=alice", headers=JSON, body=body)
            assert 429 == answer.status
            [ended] = await becomes(lambda: asyncio.to_thread(lambda: logged(app, "run_ended")), "the run's end")
        assert "cancelled" == ended["how"]

    async def test_first_token_before_the_stream(self, apps):
        """
        A run may tell something before the stream of its POST has begun: that is not missed.
        """
        app = apps.site.app("", llm_base_url="")
        for _ in range(10):
            async with started(app, {**CHAT, "max_tokens": 1}) as reader:
                await reader.until_ended()

            assert "This" == reader.text


def refusing(code, body=None):
    return status(code, body=body)


FAILURES = {
    "unreachable": (None, "upstream_unreachable"),
    "hung up": (dropped, "upstream_unreachable"),
    "key refused": (refusing(401, {"error": {"message": "Incorrect API key: sk-secret"}}), "upstream_refused"),
    "busy": (refusing(429, {"error": {"message": "Rate limit"}}), "upstream_busy"),
    "its own fault": (refusing(500), "upstream_refused"),
    "a redirect": (status(307, "Location: http://elsewhere/"), "upstream_refused"),
    "no stream": (status(200, body={"choices": []}), "upstream_broken"),
    "cut": (stream(token("half"), then="cut"), "upstream_broken"),
    "ended early": (stream(token("half")), "upstream_broken"),
    "no JSON": (stream(b"data: <html>\n\n"), "upstream_broken"),
    "no object": (stream(b"data: 7\n\n"), "upstream_broken"),
    "nested too deeply": (stream(b"data: " + b"[" * 200_000 + b"\n\n"), "upstream_broken"),
    "compressed in vain": (stream(token("half"), head="Content-Encoding: gzip\r\n"), "upstream_broken"),
    "an error within": (stream(token("half"), b'data: {"error": {"message": "overloaded"}}\n\n'), "upstream_broken"),
    "silent from the start": (silent, "upstream_silent"),
    "silent in the middle": (stream(token("half"), then="hold"), "upstream_silent"),
    "an endless event": (stream(b"data: " + b"x" * 1_100_000), "upstream_broken"),
}


class TestUpstreamFailures:
    @pytest.mark.parametrize("name", FAILURES)
    async def test_clear_event(self, apps, name):
        """
        Whatever the upstream does wrong, the reader is told one reason, and the stream ends.
        """
        answer, reason = FAILURES[name]
        async with apps.model(answer) if answer else asyncio.timeout(None), started(apps.a) as reader:
            await reader.until_ended()

        event, data = reader.last
        assert ("run.failed", reason) == (event, data["reason"])
        assert {"detail", "name", "rule", "value", "cure"} <= data.keys()
        assert "sk-secret" not in json.dumps(data)
        assert "clean" == reader.ended
        assert reader.text in ("", "half")

    async def test_odd_but_whole(self, apps):
        """
        Comments, roles, usage and empty pieces are no tokens; an end without [DONE] is one if it says why.
        """
        pieces = [
            b": keep-alive\n\n",
            b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n',
            token("ok"),
            b'data: {"choices": [{"delta": {"content": null}}]}\n\n',
            b'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n',
            finish("length"),
        ]
        async with apps.model(stream(*pieces)), started(apps.a) as reader:
            await reader.until_ended()

        assert "ok" == reader.text
        expected = {"finish": "length", "tokens": 1, "model": "default", "usage": {"total_tokens": 3}}
        assert ("run.done", expected) == reader.last


class TestProcesses:
    async def test_killed(self, apps):
        """
        When the process that makes a run is killed, its readers elsewhere hear `run.failed` within seconds.
        """
        maker = apps.app()
        async with apps.model(stream(token("half"), then="hold")), started(maker) as reader:
            await reader.until(lambda s: s.text)
            async with following(apps.b, reader.run, reader.position) as other:
                await other.until_open()
                maker.kill()
                await other.until_ended()

        assert ("run.failed", "process_lost") == (other.last[0], other.last[1]["reason"])
        assert "clean" == other.ended
        async with following(apps.a, reader.run) as late:
            await late.until_ended()
        assert ["run.token", "run.failed"] == [event.event for event in late.events]

    @pytest.mark.parametrize("settings", [{}, {"handoff": "off"}])
    async def test_drained(self, apps, settings):
        """
        A process that drains finishes its runs first; their readers go on elsewhere.
        """
        texts = [f"{number} " for number in range(100)]
        maker = apps.app(**settings)
        async with apps.model(says(*texts, pause=0.03)), started(maker) as reader:
            await reader.until(lambda s: s.text)
            os.kill(maker.pid, signal.SIGTERM)
            await reader.until_ended()
            async with following(apps.a, reader.run, reader.position) as rest:
                await rest.until_ended()
            await asyncio.to_thread(maker.stop)

        assert "".join(texts) == reader.text + rest.text
        assert "run.done" == rest.last[0]
        assert rest.text

    async def test_drained_and_too_long(self, apps):
        """
        A run that does not end while its process may wait for it fails, and says so.
        """
        maker = apps.app(run_finish_seconds=0.3)
        async with apps.model(stream(token("half"), then="hold")), started(maker) as reader:
            await reader.until(lambda s: s.text)
            async with following(apps.a, reader.run) as other:
                await other.until_open()
                os.kill(maker.pid, signal.SIGTERM)
                await other.until_ended()

        assert ("run.failed", "process_ended") == (other.last[0], other.last[1]["reason"])

    async def test_frozen_and_thawed(self, apps):
        """
        A process that was taken for dead writes nothing more to its runs when it goes on.
        """
        maker = apps.app()
        async with apps.model(says(*"abcdefghijklmnopqrstuvwxyz" * 20, pause=0.02)), started(maker) as reader:
            await reader.until(lambda s: s.text)
            async with following(apps.a, reader.run) as other:
                await other.until_open()
                with frozen(maker):
                    await other.until_ended()
            assert "process_lost" == other.last[1]["reason"]
            eventually(lambda: logged(maker, "run_ended", run=reader.run, how="process_lost"))
        with connect(apps.server) as redis:
            events = [fields["event"] for _, fields in redis.xrange(LOG) if fields["topics"] == f"run:{reader.run}"]
        assert "run.failed" == events[-1]
        assert 1 == events.count("run.failed")
        maker.kill()

    async def test_counted(self, apps):
        """
        Runs are in the metrics, by how they ended.
        """
        before = await metrics(apps.a)
        async with apps.model(says("a")), started(apps.a) as reader:
            await reader.until_ended()

        after = await becomes(lambda: _more(apps.a, before), "one run more")
        assert 0 == after["sse_runs_open"]


async def _all(requests, count):
    return len(requests) == count


class CountedRegister(MemoryRegister):
    """Counts what it is asked; `makers`: what it says of the other processes."""

    def __init__(self):
        super().__init__()
        self.looks = self.renewals = 0
        self.makers = False

    async def orphans(self):
        self.looks += 1
        return [], self.makers

    async def renew(self):
        self.renewals += 1
        return True


async def until(condition):
    """Return when *condition* holds, in this process."""

    async def met():
        return condition()

    await becomes(met)


class TestLook:
    @pytest.fixture
    async def runs(self, monkeypatch):
        """A process's runs, of which nobody makes any yet; looks are scaled down."""
        monkeypatch.setattr("app.runs.LOOK_SECONDS", 0.01)
        monkeypatch.setattr("app.runs.LIVE_SECONDS", 600)
        log = MemoryLog(history_seconds=10, max_events=10)
        made = Runs(log, CountedRegister(), "p", Tally(), most=9, max_seconds=60, keep_seconds=60, max_event_bytes=9_999)
        task = asyncio.create_task(made.look())
        await until(lambda: made.register.looks)
        yield made
        task.cancel()
        await made.close()

    async def test_seldom_while_nobody_makes_a_run(self, runs):
        """
        A register without makers is not asked again at once: nobody can be dead yet.
        """
        await asyncio.sleep(0.2)

        assert (1, 0) == (runs.register.looks, runs.register.renewals)

    async def test_at_once_when_a_run_begins(self, runs):
        """
        Who begins a run stays alive from then on, however long nobody had looked.
        """
        working = asyncio.Event()

        async def work(teller):
            await working.wait()
            return {}

        await runs.start(Record("r", "task", None, "p", "f"), work)

        await until(lambda: runs.register.renewals)

    async def test_often_while_others_make_runs(self, runs):
        """
        While anybody makes runs, all look for dead ones.
        """
        runs.register.makers = True
        runs._begun.set()

        await until(lambda: runs.register.looks > 5)


async def _more(app, before):
    after = await metrics(app)
    name = 'sse_runs_ended_total{how="done"}'
    return after if after[name] == before.get(name, 0) + 1 and after["sse_runs_open"] == 0 else None


class TestPythonClient:
    async def test_run_across_a_drain(self, apps):
        """
        `app.client.run` reads a run to its end, whichever process it is read from.
        """
        texts = [f"{number} " for number in range(100)]
        maker, opens, waits = apps.app(), [], []
        door = Proxy(maker.port)
        url = f"http://127.0.0.1:{door.port}"
        async with apps.model(says(*texts, pause=0.03)) as model:
            text, stopping = "", None
            async for event in client.run(
                url,
                CHAT,
                on_open=lambda opened: opens.append(opened["process"]),
                on_wait=lambda cause, _: waits.append(cause),
            ):
                if event.event == "run.token":
                    text += json.loads(event.data)["text"]
                if stopping is None and text:
                    door.target = apps.a.port
                    stopping = asyncio.create_task(asyncio.to_thread(maker.stop))
            await stopping
        door.close()

        assert "".join(texts) == text
        assert "run.done" == event.event
        # Its own, and its successor; each other one is told by the wait before it: a
        # busy machine is silent for three of these heartbeats, 0.6 s, now and then.
        assert len(opens) <= 2 + len(waits), waits
        assert 2 == len(set(opens))
        assert 1 == len(model.requests)

    async def test_failure(self, apps):
        """
        `run.failed` is raised, with its reason.
        """
        async with apps.model(refusing(500)):
            with pytest.raises(client.RunFailed) as failed:
                async for _ in client.run(apps.a.url, CHAT):
                    pass

        assert "upstream_refused" == failed.value.reason


class TestTask:
    @pytest.fixture
    def files(self, apps):
        """Some files below the root, and what their sums are."""
        folder = apps.folder / "some"
        (folder / "inner").mkdir(parents=True, exist_ok=True)
        contents = {"a.bin": os.urandom(9_000_000), "inner/b.txt": b"hello", "inner/empty": b""}
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return {f"some/{name}": hashlib.sha256(content).hexdigest() for name, content in contents.items()}

    @BOTH
    async def test_checksums(self, apps, files, path):
        """
        The sums are right, and the percentage rises to 100.
        """
        body = {"kind": "task", "task": "checksums", "arguments": {"path": "some"}}

        async with started(apps.on(path), body) as reader:
            await reader.until_ended()

        event, result = reader.last
        assert "run.done" == event
        assert files == {each["path"]: each["sha256"] for each in result["files"]}
        told = [json.loads(event.data) for event in reader.told("run.progress")]
        percents = [each["percent"] for each in told]
        assert sorted(percents) == percents
        assert 100 == percents[-1]
        assert {"percent", "stage", "done", "total"} == told[0].keys()

    @pytest.mark.parametrize("asked", ["..", "/etc", "some/../../x", "link", "missing", 7, "a\0b"])
    async def test_outside(self, apps, files, asked):
        """
        Nothing outside of the root is read, not by links either.
        """
        link = apps.folder / "link"
        if not link.is_symlink():
            link.symlink_to("/etc")
        body = {"kind": "task", "task": "checksums", "arguments": {"path": asked}}

        async with started(apps.a, body) as reader:
            await reader.until_ended()

        assert ("run.failed", "invalid", "path") == (reader.last[0], reader.last[1]["reason"], reader.last[1]["name"])

    async def test_your_own(self, apps, tmp_path):
        """
        A module of one's own offers a task; what it raises becomes `run.failed`.
        """
        (tmp_path / "mytasks.py").write_text(
            "from app.task import task\n"
            "@task('count')\n"
            "async def count(arguments, teller):\n"
            "    for number in range(arguments['to']):\n"
            "        await teller.progress(100 * number / arguments['to'], f'number {number}')\n"
            "    return {'counted': arguments['to']}\n"
        )
        root = str(Path(__file__).parent.parent)
        settings = {"PYTHONPATH": f"{root}:{tmp_path}", "SSE_TASK_MODULES": "mytasks"}
        app = App("mine", tmp_path, SCALED | settings)
        try:
            app.start()
            app.wait_ready()
            for arguments, expected in (({"to": 3}, "run.done"), ({}, "run.failed")):
                async with started(app, {"kind": "task", "task": "count", "arguments": arguments}) as reader:
                    await reader.until_ended()
                assert expected == reader.last[0]
            assert "internal" == reader.last[1]["reason"]
        finally:
            app.close()

    async def test_mistakes_of_your_own(self, apps, tmp_path):
        """
        Whatever a task tells that no event can carry, its readers hear of its end, behind what it told before.
        """
        (tmp_path / "mistakes.py").write_text(
            "from app.task import task\n"
            "async def result(teller): return {'ids': {1, 2}}\n"
            "async def number(teller): return {'mean': float('nan')}\n"
            "async def progress(teller): await teller.progress(50, 'half', ids={1, 2})\n"
            "async def text(teller): await teller.token(b'bytes')\n"
            "async def timeout(teller): raise TimeoutError\n"
            "@task('mistake')\n"
            "async def mistake(arguments, teller):\n"
            "    await teller.token('told before')\n"
            "    return await globals()[arguments['of']](teller)\n"
        )
        root = str(Path(__file__).parent.parent)
        app = App("mine", tmp_path, SCALED | {"PYTHONPATH": f"{root}:{tmp_path}", "SSE_TASK_MODULES": "mistakes"})
        ends = {}
        try:
            app.start()
            app.wait_ready()
            for of in ("result", "number", "progress", "text", "timeout"):
                async with started(app, {"kind": "task", "task": "mistake", "arguments": {"of": of}}) as reader:
                    await reader.until_ended()
                ends[of] = (reader.last[0], reader.last[1]["reason"], reader.text)
        finally:
            app.close()

        assert {("run.failed", "internal")} == {end[:2] for end in ends.values()}
        # Text that is none spoils what was to be written with it.
        assert {"told before"} == {text for of, (_, _, text) in ends.items() if of != "text"}

    def test_module_that_is_missing(self, tmp_path):
        """
        A module that cannot be imported ends start-up with one line.
        """
        command = [sys.executable, "-m", "app"]
        root = Path(__file__).parent.parent
        environment = {"SSE_TASK_MODULES": "no_such_tasks", "PATH": os.environ["PATH"]}
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60, check=False)

        assert 2 == run.returncode
        assert "SSE_TASK_MODULES must be modules that can be imported (" in run.stderr.splitlines()[-1]


class TestBadRequest:
    @pytest.mark.parametrize(
        ("body", "name"),
        [
            ({}, "kind"),
            ([], "kind"),
            ({"kind": "dance"}, "kind"),
            ({"kind": ["chat"]}, "kind"),
            ({"kind": "chat"}, "prompt"),
            ({"kind": "chat", "prompt": " "}, "prompt"),
            ({"kind": "chat", "prompt": "a", "messages": []}, "prompt"),
            ({"kind": "chat", "messages": []}, "messages"),
            ({"kind": "chat", "messages": [{"role": "root", "content": "a"}]}, "messages"),
            ({"kind": "chat", "messages": [{"role": "user", "content": 7}]}, "messages"),
            ({"kind": "chat", "prompt": "a", "max_tokens": 0}, "max_tokens"),
            ({"kind": "chat", "prompt": "a", "temperature": "hot"}, "temperature"),
            ({"kind": "chat", "prompt": "a", "model": ""}, "model"),
            ({"kind": "chat", "prompt": "a", "stream": False}, "stream"),
            ({"kind": "task"}, "task"),
            ({"kind": "task", "task": "other"}, "task"),
            ({"kind": "task", "task": "checksums", "arguments": 7}, "arguments"),
            ({"kind": "task", "task": "checksums", "path": "."}, "path"),
        ],
    )
    async def test_post(self, apps, body, name):
        """
        What is wrong is named before anything is begun.
        """
        answer = await ask(apps.a.port, "POST", "/runs", headers=JSON, body=json.dumps(body).encode())

        assert (400, name) == (answer.status, answer.json["name"])

    @pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
    @pytest.mark.parametrize("path", ["/runs/unknown", "/runs/a%0d%0ab"])
    async def test_unknown_run(self, apps, method, path):
        """
        A run that nobody started is 404.
        """
        where = path if method == "DELETE" else f"{path}/events"

        assert 404 == (await ask(apps.a.port, method, where)).status

    async def test_as_many_as_it_says(self, apps):
        """
        All of SSE_MAX_RUNS runs are asked of the model at once: none waits for another one's connection.
        """
        count = 110
        # None is silent for so long that its connection comes free meanwhile.
        app = apps.app(max_runs=count, llm_silence_seconds=60)
        async with apps.model(stream(token("a"), then="hold")) as model, AsyncExitStack() as readers:
            for _ in range(count):
                await readers.enter_async_context(started(app))
            await becomes(lambda: _all(model.requests, count), "all are asked")
        app.kill()

    async def test_too_many(self, apps):
        """
        A process makes SSE_MAX_RUNS runs at once, and refuses more for now.
        """
        app = apps.app(max_runs=1)
        async with apps.model(stream(token("a"), then="hold")), started(app) as reader:
            answer = await ask(app.port, "POST", "/runs", headers=JSON, body=json.dumps(CHAT).encode())
            await ask(app.port, "DELETE", f"/runs/{reader.run}")
            await reader.until_ended()

        assert (429, "urn:sse-kit:runs-full", "2") == (answer.status, answer.json["type"], answer.headers["retry-after"])

    async def test_redis_away(self, apps):
        """
        Without the register nothing is begun, and nothing is looked up.
        """
        with frozen(apps.server):
            start = ask(apps.b.port, "POST", "/runs", headers=JSON, body=json.dumps(CHAT).encode())
            follow = ask(apps.b.port, "GET", "/runs/abc/events")
            answers: list[Answer] = list(await asyncio.gather(start, follow))

        assert [503, 503] == [answer.status for answer in answers]

    async def test_publishing_to_a_run(self, apps):
        """
        Only the kit writes to a run's topic: neither by HTTP nor by XADD does anybody else.
        """
        async with apps.model(stream(token("mine"), then="hold")), started(apps.a) as reader:
            await reader.until(lambda s: s.text)
            topic = f"run:{reader.run}"
            body = json.dumps({"topics": [topic], "data": "forged"}).encode()
            answer = await ask(apps.a.port, "POST", "/publish", headers=JSON, body=body)
            with connect(apps.server) as redis:
                redis.xadd(LOG, {"v": "1", "topics": topic, "data": "forged"})
                redis.xadd(LOG, {"v": "1", "topics": topic, "event": "run.done", "data": "forged"})
                redis.xadd(LOG, {"v": "1", "topics": "demo", "event": "run.done", "data": "forged", "run": "1"})
            await ask(apps.a.port, "DELETE", f"/runs/{reader.run}")
            await reader.until_ended()

        assert (400, "topics") == (answer.status, answer.json["name"]) or (400, "topic") == (answer.status, answer.json["name"])
        assert ["run.token", "run.failed"] == [event.event for event in reader.events]


class TestGone:
    async def test_forgotten_run(self, require):
        """
        A run whose events have left the window is 410, so that a native EventSource stops asking.
        """
        with Site() as site:
            server = site.redis()
            app = site.app(server, history_seconds=1, heartbeat_seconds=0.2)
            async with started(app, {**CHAT, "max_tokens": 1}) as reader:
                await reader.until_ended()
            with connect(server) as redis:
                # Noted a moment after the last event was read.
                eventually(lambda: redis.hget(f"{{sse}}:run:{reader.run}", "ended"), "the run's end is noted")
                # Only the trim may take it, not the record's own end.
                redis.persist(f"{{sse}}:run:{reader.run}")

            async def answers():
                publish = json.dumps({"topics": ["other"], "data": ""}).encode()
                await ask(app.port, "POST", "/publish", headers=JSON, body=publish)
                answer = await ask(app.port, "HEAD", f"/runs/{reader.run}/events")
                return answer.status == 410

            await becomes(answers, "410")
            by_position = await ask(
                app.port, "GET", f"/runs/{reader.run}/events", headers={"Last-Event-ID": reader.position}
            )
            assert 204 == by_position.status


