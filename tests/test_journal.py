"""
What one process writes: a line when a stream opens and one when it ends, with who asked and why it ended.
"""

import asyncio
import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import structlog

from app import journal
from app.journal import _Seldom, _Sure
from app.stack import App
from tests.live import (
    Site,
    ask,
    becomes,
    connect,
    event,
    eventually,
    lines,
    logged,
    publish,
    shared,
    subscribed,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def _tools(require: Callable[..., str]) -> None:
    require("redis-server", "valkey-server")


@pytest.fixture(scope="module")
def app() -> App:
    return shared.app


@pytest.fixture(scope="module")
def hashing() -> App:
    """A process with SSE_LOG_HASH_USERS=on."""
    return shared.plain


async def line(app: App, name: str, **wanted: Any) -> dict[str, Any]:
    """Wait for the one line of *app* named *name* that holds what is *wanted*."""
    [found] = await becomes(lambda: asyncio.to_thread(lambda: logged(app, name, **wanted)))
    return found


class TestStreams:
    async def test_one_line_each(self, app):
        """
        One line when a stream opens, one when it ends, none for its events.
        """
        ids = await publish(app, event("1", "told"), event("2", "told"), event("3", "told"))
        async with subscribed(app, "told", last_event_id=ids[0], query={"user": "tim"}) as stream:
            await stream.until_data("3")
            await publish(app, event("4", "told"))
            await stream.until_data("4")
            id = stream.opened["stream"]
        opened = await line(app, "stream_opened", stream=id)
        ended = await line(app, "stream_ended", stream=id)

        assert {
            "stream": id, "user": "tim", "topics": ["told", "broadcast", "user:tim"],
            "resumed_from": ids[0], "path": "handoff", "level": "info", "event": "stream_opened",
            "request_id": opened["request_id"], "timestamp": opened["timestamp"],
        } == opened  # fmt: skip
        assert {
            "stream": id, "user": "tim", "reason": "client_gone", "events": 3, "replayed": 2, "level": "info",
            "event": "stream_ended", "seconds": ended["seconds"], "bytes": ended["bytes"],
            "request_id": ended["request_id"], "timestamp": ended["timestamp"],
        } == ended  # fmt: skip
        assert 0 < ended["seconds"] < 30
        assert len(stream.raw) / 2 < ended["bytes"] <= 2 * len(stream.raw) + 1000
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", ended["timestamp"])
        assert {"stream_opened", "stream_ended"} == {each["event"] for each in lines(app) if each.get("stream") == id}

    async def test_request_id_from_nginx(self, app):
        """
        The id that nginx gave the request is in both lines, so that its log and ours can be joined.
        """
        async with subscribed(app, "t", headers={"X-Request-Id": "nginx-0123456789abcdef"}) as stream:
            id = stream.opened["stream"]
        for name in ("stream_opened", "stream_ended"):
            assert "nginx-0123456789abcdef" == (await line(app, name, stream=id))["request_id"]

    @pytest.mark.parametrize("path", ["handoff", "generator"])
    async def test_request_ids_of_many(self, path):
        """
        Whatever ends a stream, its last line carries its own request's id, and not another's.
        """
        app = shared.app if path == "handoff" else shared.plain
        streams = {}
        for n in range(12):
            async with subscribed(app, f"many/{n}", headers={"X-Request-Id": f"{path}-{n}"}) as stream:
                streams[stream.opened["stream"]] = f"{path}-{n}"
        for id, request in streams.items():
            assert request == (await line(app, "stream_opened", stream=id))["request_id"]
            assert request == (await line(app, "stream_ended", stream=id))["request_id"]

    @pytest.mark.parametrize("given", ["", "a b", "x" * 65, "{}", "a\tb", "é"], ids=ascii)
    async def test_foreign_request_id(self, app, given):
        """
        An id that could forge or flood a line is replaced by one of ours.
        """
        async with subscribed(app, "t", headers={"X-Request-Id": given}) as stream:
            id = stream.opened["stream"]

        assert re.fullmatch("[0-9a-f]{16}", (await line(app, "stream_opened", stream=id))["request_id"])

    async def test_what_clients_send_stays_in_its_field(self, app):
        """
        A line is JSON whatever a client puts into its position or its name.
        """
        wild = '"}\x7f{"event":"forged"} é'
        async with subscribed(app, "t", headers={"Last-Event-ID": wild}, query={"user": 'a"\n{}\u2028'}) as stream:
            id = stream.opened["stream"]
        opened = await line(app, "stream_opened", stream=id)

        assert wild == opened["resumed_from"]
        assert 'a"\n{}\u2028' == opened["user"]
        assert not logged(app, "forged")


class TestOtherLines:
    async def test_start(self, app):
        """
        The first lines say what runs and how.
        """
        [starting] = logged(app, "starting")

        assert f"http://127.0.0.1:{app.port}" == starting["url"]
        assert ("redis", "on", "uvloop") == (starting["log"], starting["handoff"], starting["loop"])
        assert logged(app, "auth_none")
        assert logged(app, "window_loaded")
        assert logged(app, "log_connected")
        assert not logged(app, "log_in_memory")

    async def test_refused(self, app):
        """
        A browser hides an error's body from EventSource, so the sentence is here too, without what was given.
        """
        await ask(app.port, "GET", "/events?topic=user:bob", headers={"X-Request-Id": "refused-1"})
        refused = await line(app, "refused", request_id="refused-1")

        assert ("/events", 403, "topic must not be another user's") == (
            refused["path"], refused["status"], refused["why"],
        )  # fmt: skip
        assert "bob" not in json.dumps(refused)

    async def test_every_line_is_json(self, app):
        """
        Nothing writes past the format: no traceback, no print.
        """
        text = app.log()

        assert text
        for each in text.strip().split("\n"):
            assert {"event", "level", "timestamp"} <= json.loads(each).keys()


class TestHashedUsers:
    async def test_no_line_holds_an_id(self, hashing):
        """
        With SSE_LOG_HASH_USERS=on no line holds a user's id, whatever happened to that user.
        """
        user = "Ängström-kappa"
        for _ in range(2):
            async with subscribed(
                hashing, "t", query={"user": user}, last_event_id=f"user:{user}".encode().decode("latin-1")
            ):
                pass
        await ask(hashing.port, "GET", "/events?topic=user:Other-lambda&user=Third-sigma")
        with connect(shared.server) as hands:
            hands.xadd("{sse}:log", {"v": "1", "topics": "user:Fourth,omega", "data": "x"})
            hands.xadd("{sse}:log", {"v": "1", "topics": "t user:Fïfth-theta", "data": "x"})
        await asyncio.to_thread(eventually, lambda: len(logged(hashing, "stream_ended")) >= 2)
        await asyncio.to_thread(eventually, lambda: len(logged(hashing, "entry_broken")) >= 2)
        text = hashing.log()

        for word in ("kappa", "lambda", "sigma", "omega", "theta", "ngstr", "Other", "Third", "Fourth"):
            assert word not in text

    async def test_one_user_has_one_hash(self, hashing):
        """
        The hash is the same in all lines of one process, and differs between users.
        """
        hashes = {}
        for user in ("zoë", "bob", "zoë"):
            async with subscribed(hashing, "t", query={"user": user}) as stream:
                id = stream.opened["stream"]
            opened = await line(hashing, "stream_opened", stream=id)
            ended = await line(hashing, "stream_ended", stream=id)
            assert opened["user"] == ended["user"]
            assert ["t", "broadcast", f"user:{opened['user']}"] == opened["topics"]
            assert opened["user"] == hashes.setdefault(user, opened["user"])

        assert 2 == len(set(hashes.values()))
        assert all(re.fullmatch("[0-9a-f]{12}", each) for each in hashes.values())


_WRITE = """
import logging, structlog
from app import journal
from app.settings import load

def deep(password):
    raise ValueError("what happened")

journal.configure(load({settings}))
log = structlog.get_logger()
try:
    deep("hun" + "ter2")
except ValueError as error:
    log.error("failed", exc_info=error)
    logging.getLogger("library").exception("from a library")
log.debug("quiet")
log.warning("loud", number=7, text="ä\\n")
logging.getLogger("library").warning("old %s", "style")
logging.getLogger("library").info("chatter")
"""


def written(**settings: str) -> str:
    """Return what a fresh interpreter writes with *settings*."""
    return subprocess.run(
        [sys.executable, "-c", _WRITE.replace("{settings}", repr(settings))],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip


class TestFormats:
    def test_json(self):
        """
        JSON lines: one object each, also for exceptions and for libraries.
        """
        found = [json.loads(each) for each in written(SSE_LOG_FORMAT="json").splitlines()]

        assert ["failed", "from a library", "loud", "old style"] == [each["event"] for each in found]
        assert [7, "ä\n"] == [found[2]["number"], found[2]["text"]]
        assert "library" == found[3]["logger"]
        assert "what happened" == found[0]["exception"][0]["exc_value"]
        assert "deep" == found[0]["exception"][0]["frames"][-1]["name"]

    def test_not_a_terminal(self):
        """
        `auto` is JSON where nobody watches.
        """
        assert all(json.loads(each) for each in written().splitlines())

    def test_console(self):
        """
        For people: one readable line, and a traceback as Python writes it.
        """
        text = written(SSE_LOG_FORMAT="console")

        assert "loud" in text
        assert "number=7" in text
        assert "ValueError: what happened" in text
        assert "quiet" not in text

    @pytest.mark.parametrize("form", ["json", "console"])
    def test_tracebacks_hold_no_values(self, form):
        """
        A traceback names functions and lines, never what was in their variables: passwords are.
        """
        assert "hunter2" not in written(SSE_LOG_FORMAT=form)

    @pytest.mark.parametrize(("level", "count"), [("debug", 5), ("info", 4), ("warning", 4), ("error", 2)])
    def test_level(self, level, count):
        """
        What is less severe than SSE_LOG_LEVEL is not written.
        """
        assert count == len(written(SSE_LOG_FORMAT="json", SSE_LOG_LEVEL=level).splitlines())


@contextmanager
def piped(form: str, port: int) -> Iterator[IO[bytes]]:
    """A process that writes *form*; yields the pipe, from which its first lines have been read."""
    settings = {"SSE_LOG_FORMAT": form, "SSE_PORT": str(port), "SSE_METRICS_PORT": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "app"], cwd=ROOT, env={"PATH": os.environ["PATH"]} | settings, stderr=subprocess.PIPE
    )
    try:
        assert process.stderr
        while b"log_connected" not in process.stderr.readline():
            assert process.poll() is None
        yield process.stderr
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()


@pytest.fixture(params=["json", "console"])
def unread(request, free_port) -> Iterator[int]:
    """A process whose standard error was closed when it served."""
    with piped(request.param, free_port) as pipe:
        pipe.close()
        yield free_port


@pytest.fixture
def slowly(free_port) -> Iterator[tuple[int, IO[bytes]]]:
    """A process whose standard error is read when the test does."""
    with piped("json", free_port) as pipe:
        os.set_blocking(pipe.fileno(), False)
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)  # one page
        yield free_port, pipe


class TestNobodyReads:
    async def test_streams_go_on(self, unread):
        """
        Where standard error is closed, streams begin, read and end as before.
        """
        await becomes(lambda: _answers(unread), "it serves")
        for number in range(3):
            async with subscribed(unread, "t") as stream:
                body = json.dumps(event(number)).encode()
                await ask(unread, "POST", "/publish", headers={"Content-Type": "application/json"}, body=body)
                await stream.until_data(str(number))
        assert 404 == (await ask(unread, "GET", "/nowhere")).status

    async def test_who_reads_too_slowly(self, slowly):
        """
        A pipe that is full holds nothing up: lines are lost, whole ones, and the next that is taken tells how many.
        """
        port, pipe = slowly
        await becomes(lambda: _answers(port), "it serves")
        for _ in range(60):
            assert 400 == (await ask(port, "GET", "/events?topic=%20")).status
        text = pipe.read()
        assert 400 == (await ask(port, "GET", "/events?topic=%20")).status
        text += pipe.read()
        found = [json.loads(line) for line in text.splitlines()]
        assert {"refused"} == {each["event"] for each in found}
        lost = [each.get("lost", 0) for each in found]
        assert [0] * (len(found) - 1) == lost[:-1]
        assert 61 == len(found) + lost[-1]
        assert lost[-1] > 30

    async def test_closed_before_the_start(self, free_port):
        """
        A supervisor that closes standard input, output and error gets a process like any other.

        A socket would have their numbers, and lines of the log would go there.
        """
        settings = {"SSE_LOG_FORMAT": "auto", "SSE_PORT": str(free_port), "SSE_METRICS_PORT": "0"}
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", f"exec {sys.executable} -m app <&- >&- 2>&-",
            cwd=ROOT, env={"PATH": os.environ["PATH"]} | settings,
        )  # fmt: skip
        try:
            await becomes(lambda: _answers(free_port), "it serves")
            assert ["/dev/null"] * 3 == [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in range(3)]
            process.terminate()
            assert 0 == await asyncio.wait_for(process.wait(), 20)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def test_terminal_that_stands_still(self):
        """
        A terminal that nobody empties, such as that of a broken ssh, holds nothing up either.
        """
        program = (
            "import app.journal as j, app.settings as s, structlog\n"
            "j.configure(s.load({}))\n"
            "for n in range(3000): structlog.get_logger().warning('line', n=n)\n"
        )
        ours, theirs = os.openpty()
        try:
            subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=theirs, check=True, timeout=20)
        finally:
            os.close(ours)
            os.close(theirs)

    def test_rest_of_a_long_line(self, monkeypatch):
        """
        A line longer than there is room for waits a moment for who reads.
        """
        monkeypatch.setattr(journal, "_REST_SECONDS", 20.0)
        reads, writes = os.pipe()
        fcntl.fcntl(reads, fcntl.F_SETPIPE_SZ, 4096)
        with os.fdopen(writes, "wb") as end, os.fdopen(reads, "rb", buffering=0) as pipe:
            monkeypatch.setattr(sys, "stderr", end)
            os.set_blocking(reads, False)
            writer = threading.Thread(target=_Sure().info, args=["x" * 50_000])
            writer.start()
            text = b""
            while writer.is_alive():
                if select.select([pipe], [], [], 0.05)[0]:
                    text += pipe.read(1) or b""  # there is room when all of a page was read
            text += pipe.read(8192) or b""
        assert b"x" * 50_000 + b"\n" == text

    def test_line_in_the_middle_of_another(self):
        """
        What the collector takes away while a line is written may log, too: behind that line.
        """
        program = """
import app.journal as j, app.settings as s, structlog
class Gone:
    def __del__(self):
        structlog.get_logger().warning("inner")
gone = [Gone()]
take = j._Sure._take
def taking(self, line):
    gone.clear()
    return take(self, line)
j._Sure._take = taking
j.configure(s.load({"SSE_LOG_FORMAT": "json"}))
structlog.get_logger().warning("outer")
"""
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, timeout=20)
        assert ["outer", "inner"] == [json.loads(line)["event"] for line in run.stderr.splitlines()]


async def _answers(port: int) -> bool:
    try:
        return (await ask(port, "GET", "/readyz")).status == 200
    except OSError:
        return False


class TestDrain:
    async def test_lines_of_an_end(self):
        """
        A drain says how many streams it ends, each says so, and the last line comes last.
        """
        with Site() as site:
            app = await asyncio.to_thread(site.app, shared.server, drain_seconds=0.3)
            async with subscribed(app, "t") as one, subscribed(app, "t") as two:
                app.kill(signal.SIGTERM)
                for stream in (one, two):
                    await stream.until(lambda s: s.ended)
            await asyncio.to_thread(app.process.wait, 20)
            names = [each["event"] for each in lines(app)]

            assert 0 == app.process.returncode
            assert 2 == logged(app, "draining")[0]["streams"]
            assert 2 == len(logged(app, "stream_ended", reason="draining"))
            assert ["draining", "stream_ended", "stream_ended", "drained"] == names[names.index("draining") :][:4]


async def test_wrong_settings_are_one_line():
    """
    A wrong setting ends the start with one readable sentence, and no traceback.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", cwd=ROOT, env={"SSE_HEARTBEAT_SECONDS": "soon", "PATH": ""},
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    text = (await process.communicate())[1].decode()

    assert 2 == process.returncode
    assert 1 == len(text.splitlines())
    assert text.startswith("SSE_HEARTBEAT_SECONDS must be ")
    assert "'soon'" in text


class TestSeldom:
    """Lines that one fault causes again and again: the first ones, then a count."""

    class Clock:
        """Stands still until a test moves it."""

        now = 100.0

        def __call__(self) -> float:
            return self.now

    @pytest.fixture
    def clock(self) -> Clock:
        return self.Clock()

    @staticmethod
    def said(seldom: _Seldom, name: str, **facts: Any) -> dict[str, Any] | None:
        """What of a line goes on, or None."""
        try:
            return seldom(None, "warning", {"event": name, **facts})
        except structlog.DropEvent:
            return None

    @pytest.mark.parametrize("name", ["log_ahead_of_clock", "trim_refused"])
    def test_once_in_ten_seconds(self, clock, name):
        """
        What is found again at each check is said once in ten seconds, with how often it was not said.
        """
        seldom, said = _Seldom(clock), []
        for second in range(25):
            clock.now = 100.0 + second
            if found := self.said(seldom, name, error=second):
                said.append(found)

        assert [
            {"event": name, "error": 0},
            {"event": name, "error": 10, "unsaid": 9},
            {"event": name, "error": 20, "unsaid": 9},
        ] == said

    def test_first_ones(self, clock):
        """
        Of broken entries the first are told one by one; a flood of them is counted.
        """
        seldom = _Seldom(clock)
        first = [self.said(seldom, "entry_broken", id=n) for n in range(1000)]
        clock.now += 10
        later = [self.said(seldom, "entry_broken", id=n) for n in range(2)]

        assert [{"event": "entry_broken", "id": n} for n in range(20)] == [line for line in first if line]
        assert [{"event": "entry_broken", "id": 0, "unsaid": 980}, {"event": "entry_broken", "id": 1}] == later

    def test_each_for_itself(self, clock):
        """
        One fault hides no other, and no other line is ever left out.
        """
        seldom = _Seldom(clock)
        lines = [self.said(seldom, name) for name in ("trim_refused", "log_ahead_of_clock") * 2]
        others = [self.said(seldom, "stream_ended") for _ in range(1000)]

        assert [True, True, False, False] == [line is not None for line in lines]
        assert None not in others

    def test_through_structlog(self):
        """
        What is left out reaches neither form of the log.
        """
        program = (
            "import structlog, app.journal as j, app.settings as s\n"
            "j.configure(s.load({'SSE_LOG_FORMAT': '{form}'}))\n"
            "for n in range(30): structlog.get_logger().warning('entry_broken', id=n)\n"
            "structlog.get_logger().warning('last')\n"
        )
        for form in ("json", "console"):
            run = subprocess.run(
                [sys.executable, "-c", program.replace("{form}", form)], cwd=ROOT, capture_output=True, text=True, check=True
            )

            assert [20, 1] == [run.stderr.count(word) for word in ("entry_broken", "last")], run.stderr
