"""
The command line: every line of the input has one fate, and it is said which.

The clients run in this process against scripted bytes; what only a process has (signals to
it, pipes that close, start-up) is tried on one.
"""

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager

import pytest

from app import command, lines
from app.command import Heard, Publishing, main
from app.event import encode
from tests.scripted_server import (
    TEST_DEADLINE_SECONDS,
    Exchange,
    accepted,
    dropped,
    serving,
    status,
    stream,
)

OPEN = encode(
    id="e:0",
    event="stream.open",
    data='{"stream":"s1","topics":["logs","broadcast"],"heartbeat_seconds":15}',
    retry=1,
)
ONE = encode(id="e:1", event="tick", data="a\nü")
TWO = encode(id="e:2", data="{}")


async def until(condition, what: str) -> None:
    """Wait for *condition*; a test that waits for nothing fails by name."""
    try:
        async with asyncio.timeout(TEST_DEADLINE_SECONDS):
            while not condition():  # noqa: ASYNC110 - some of what is waited for happens in a thread
                await asyncio.sleep(0.002)
    except TimeoutError:
        pytest.fail(f"never came: {what}")


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ("publish", "the following arguments are required: --topic"),
            ("publish --topic a*b", "--topic: topic must be 1 to 255 characters of A-Z"),
            ("publish --topic a --event stream.open", "--event: event must not begin with `stream.`"),
            ("publish --topic a --url localhost:8080", "--url: must be the server's address with http:// or"),
            ("publish --topic a --url http://", "--url: must be the server's address"),
            ("publish --topic a --url http://a:b", "--url: must be the server's address"),
            ("publish --topic a --url http://a/?b", "--url: must be the server's address"),
            ("listen --topic a --from é", "--from: must be `earliest` or an id that was read from a stream, got 'é'"),
            ("listen --topic a --from \x7f", "--from: must be `earliest` or an id"),
            ("publish --topic a --timeout 0", "--timeout: must be a number of seconds above 0, got '0'"),
            ("publish --topic a --timeout nan", "--timeout: must be a number of seconds above 0, got 'nan'"),
            ("listen --topic a --count 0", "--count: must be a whole number above 0, got '0'"),
            ("listen --topic a --count x", "--count: must be a whole number above 0, got 'x'"),
            ("listen --topic a --format xml", "--format: invalid choice: 'xml'"),
            ("listen --topic ü", "--topic: topic must be 1 to 255 characters"),
        ],
    )
    def test_wrong(self, arguments, sentence, capsys):
        """
        A wrong command line ends with code 2 and one sentence, before anything is read or sent.
        """
        with pytest.raises(SystemExit) as ended:
            main(arguments.split())

        assert 2 == ended.value.code
        assert sentence in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["publish", "listen"])
    def test_help(self, name, capsys):
        """
        Help has examples and says what every exit code means.
        """
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])

        text = capsys.readouterr().out
        assert 0 == ended.value.code
        assert f"python -m app {name} --topic" in text
        assert "exit codes:\n  0  " in text


# --- Publish ---


class Input:
    """A pipe that a test writes to and `publish` reads from."""

    def __init__(self) -> None:
        self.descriptor, self._end = os.pipe()

    def write(self, data: bytes) -> None:
        os.write(self._end, data)

    def write_what_fits(self, data: bytes) -> int:
        """Write without waiting; return how much the pipe took."""
        os.set_blocking(self._end, False)
        try:
            return os.write(self._end, data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        if self._end >= 0:
            os.close(self._end)
            self._end = -1


class Run:
    """One `publish` in this process."""

    def __init__(self, server, *options: str, descriptor: int | None = None) -> None:
        self.server = server
        self.input = Input()
        arguments = command._arguments(["publish", "--topic", "logs", "--url", server.url, *options])
        given = self.input.descriptor if descriptor is None else descriptor
        self.publishing = Publishing(arguments, given)
        self.task = asyncio.create_task(self.publishing.run())

    async def end(self) -> int:
        """Close the input and return the exit code."""
        self.input.close()
        return await self.ended()

    async def ended(self) -> int:
        # Awaiting the task alone would, at the test's deadline, cancel it and take that for its end.
        await until(self.task.done, "the end of the run")
        return self.task.result()

    @property
    def data(self) -> list[str]:
        return [event["data"] for request in self.server.requests for event in request.events]


@asynccontextmanager
async def publishing(*answers, options=(), text: bytes | None = None, descriptor=None):
    async with serving(*(answers or [accepted])) as server:
        run = Run(server, *options, descriptor=descriptor)
        try:
            if text is not None:
                run.input.write(text)
            yield run
        finally:
            run.input.close()
            if not run.task.done():
                run.task.cancel()
                await run.task
            os.close(run.input.descriptor)


async def published(text: bytes, *answers, options=()):
    """Publish *text* to its end; return the run and its exit code."""
    async with publishing(*answers, options=options, text=text) as run:
        return run, await run.end()


class TestPublish:
    async def test_lines(self, capsys):
        """
        Each line is an event, whatever its end, in order; the last one needs no end.
        """
        options = ("--topic", "more", "--event", "line")
        run, code = await published("a\r\n\n b \n\u2028ü\nlast".encode(), options=options)

        assert 0 == code
        assert ["a", "", " b ", "\u2028ü", "last"] == run.data
        event = run.server.requests[0].events[0]
        assert {"topics": ["logs", "more"], "event": "line", "data": "a"} == event
        assert "5 lines published.\n" == capsys.readouterr().err

    async def test_nothing(self, capsys):
        """
        An empty input is no event and no error.
        """
        run, code = await published(b"")

        assert 0 == code
        assert [] == run.server.requests
        assert "0 lines published.\n" == capsys.readouterr().err

    async def test_batches(self, tmp_path):
        """
        Lines that come together go together, in order, in batches of a bounded size.
        """
        expected = [str(number) for number in range(3000)]
        # A regular file, which asyncio itself could not watch.
        (tmp_path / "input").write_text("\n".join(expected))
        descriptor = os.open(tmp_path / "input", os.O_RDONLY)
        async with publishing(descriptor=descriptor) as run:
            assert 0 == await run.end()
        os.close(descriptor)

        assert expected == run.data
        sizes = [len(request.events) for request in run.server.requests]
        assert 200 == max(sizes)
        assert len(sizes) < 60

    async def test_batches_are_bounded_in_bytes(self, tmp_path):
        """
        Long lines make smaller batches, under what the server takes as one body.
        """
        (tmp_path / "input").write_text(("x" * 100_000 + "\n") * 12)
        descriptor = os.open(tmp_path / "input", os.O_RDONLY)
        async with publishing(descriptor=descriptor) as run:
            assert 0 == await run.end()
        os.close(descriptor)

        assert ["x" * 100_000] * 12 == run.data
        assert max(len(request.body) for request in run.server.requests) < 300_000

    async def test_a_lone_line_goes_at_once(self, monkeypatch):
        """
        The first line does not wait for others; those that follow soon go together.
        """
        # Longer than this test waits for anything: only the end of the input ends the second batch.
        monkeypatch.setattr(command, "BATCH_SECONDS", 600)
        async with publishing() as run:
            run.input.write(b"a\n")
            await until(lambda: run.data == ["a"], "the lone line")
            for text, lines in ((b"b\n", 2), (b"c", 2), (b"\n", 3), (b"d\n", 4)):
                run.input.write(text)
                await until(lambda lines=lines: run.publishing.lines.count == lines, "each line has come before the next")
            assert 0 == await run.end()
            assert [["a"], ["b", "c", "d"]] == [
                [event["data"] for event in request.events] for request in run.server.requests
            ]

    async def test_the_end_does_not_wait(self, monkeypatch):
        """
        At the end of the input nothing is held back for a fuller batch.
        """
        monkeypatch.setattr(command, "BATCH_SECONDS", 60)
        async with publishing(text=b"a\n") as run:
            await until(lambda: run.data == ["a"], "the first line")
            run.input.write(b"b\n")
            assert 0 == await run.end()

        assert ["a", "b"] == run.data

    async def test_json_lines_as_they_are(self):
        """
        A JSON line is published as it stands: its digits, spaces and order stay.
        """
        given = ['{"b": 1.0,"a":[1, 2]}', '"text"', "123456789012345678901234567890", " null\t", '"\\ud800"', "1e999"]
        given += ["9" * 5000]
        run, code = await published("\n".join(given).encode(), options=["--json"])

        assert 0 == code
        assert given == run.data

    async def test_lines_that_are_not_json(self, capsys):
        """
        Each is named with its number and skipped; the others go on, and the exit code tells.
        """
        text = b'{"a":1}\nnope\n\n{"a":NaN}\n"\xff"\n' + b"[" * 50_000 + b"\n2"
        run, code = await published(text, options=["--json"])

        assert 1 == code
        assert ['{"a":1}', "2"] == run.data
        said = capsys.readouterr().err
        assert "line 2 must be JSON, got 'nope' (Expecting value at column 1). Skipped." in said
        assert "line 3 must be JSON, got ''" in said
        assert "line 4 must be JSON" in said
        assert "line 5 must be JSON in UTF-8" in said
        assert "line 6 must be JSON of a sane depth" in said
        assert said.endswith("2 lines published, 5 skipped.\n")

    async def test_text_that_is_not_utf_8(self, capsys):
        """
        A log line with broken bytes is not lost; that it was changed is said.
        """
        run, code = await published("a\n\ufffd\n".encode() + b"\xffb\n")

        assert 0 == code
        assert ["a", "\ufffd", "\ufffdb"] == run.data
        assert "1 line had bytes that are not UTF-8" in capsys.readouterr().err

    async def test_line_without_an_end(self, monkeypatch, capsys):
        """
        A line that would fill the memory is skipped; the next one is read.
        """
        monkeypatch.setattr(lines, "LINE_MAX_BYTES", 1000)
        run, code = await published(b"x" * 1000 + b"\n" + b"x" * 1001 + b"\nb\n" + b"x" * 1001)

        assert 1 == code
        assert ["x" * 1000, "b"] == run.data
        said = capsys.readouterr().err
        assert "line 2 is too long for one event" in said
        assert "line 4 is too long for one event" in said

    async def test_reads_no_further_than_it_publishes(self):
        """
        A slow server slows down the writer of the pipe, instead of filling the memory here.
        """
        gate = asyncio.Event()

        async def slow(exchange: Exchange) -> bool:
            await gate.wait()
            return await accepted(exchange)

        async with publishing(slow) as run:
            line = b"x" * 999 + b"\n"
            taken, full = 0, 0
            # The pipe is full when the reader has left it so for a while.
            while full < 30 and taken < 100_000_000:
                count = run.input.write_what_fits(line * 64)
                taken += count
                full = 0 if count else full + 1
                await asyncio.sleep(0.005)
            assert taken < 2_000_000
            gate.set()
            assert 0 == await run.end()

        assert taken // 1000 == len(run.data)
        assert {999} == {len(data) for data in run.data}

    async def test_recovers(self, capsys):
        """
        A server that is away for a while gets every line once.
        """
        run, code = await published(b"a\nb\n", status(503), dropped, accepted)

        assert 0 == code
        assert ["a", "b"] * 3 == run.data
        assert 1 == len({request.headers["idempotency-key"] for request in run.server.requests})
        said = capsys.readouterr().err
        assert "Not published yet: the server answered 503 Status 503. Trying again in 0." in said
        assert said.endswith("2 lines published.\n")

    async def test_gives_up(self, capsys):
        """
        After --timeout it is said how many lines were published, and how many were not.
        """
        monkey = b"".join(b"%d\n" % number for number in range(250))
        _, code = await published(monkey, accepted, status(503), options=["--timeout", "0.3"])

        assert 1 == code
        said = capsys.readouterr().err
        assert (
            "Ended early: gave up (--timeout 0.3): the events may or may not have been published: the server answered 503"
            in said
        )
        assert "200 lines published, 50 read but not confirmed; what comes after them was not read.\n" in said

    async def test_refused_lines(self, capsys):
        """
        Of a batch that the server refuses, only the lines that it does not want are skipped.
        """

        async def choosy(exchange: Exchange) -> bool:
            bad = any("bad" in event["data"] for event in exchange.request.events)
            problem = {"detail": "data must be good. Be good."}
            return await (status(400, body=problem) if bad else accepted)(exchange)

        text = b"".join(b"bad\n" if number in (3, 11) else b"%d\n" % number for number in range(1, 21))
        async with publishing(choosy, text=text) as run:
            assert 1 == await run.end()
            good = [
                event["data"]
                for request in run.server.requests
                for event in request.events
                if all("bad" not in event["data"] for event in request.events)
            ]

        assert [str(number) for number in range(1, 21) if number not in (3, 11)] == good
        said = capsys.readouterr().err
        for number in (3, 11):
            assert f"line {number} was refused: POST /publish got status 400: data must be good. Be good." in said
        assert said.endswith("18 lines published, 2 skipped.\n")

    @pytest.mark.parametrize("code", [401, 403, 404])
    async def test_refused_altogether(self, code, capsys):
        """
        A refusal that no line can change ends the run at once.
        """
        problem = {"detail": "token must be there. Send one."}
        async with publishing(status(code, body=problem), text=b"a\nb\n") as run:
            assert 1 == await run.ended()

        assert 1 == len(run.server.requests)
        said = capsys.readouterr().err
        assert f"POST /publish got status {code}: token must be there" in said
        assert "0 lines published, 2 read but not confirmed" in said

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    async def test_signal(self, number, monkeypatch, capsys):
        """
        Ctrl-C and SIGTERM end the reading: lines that were read are published, half a line is not.
        """
        monkeypatch.setattr(command, "BATCH_SECONDS", 60)
        async with publishing(text=b"a\n") as run:
            await until(lambda: run.data == ["a"], "the first line")
            run.input.write(b"b\nhalf")
            reading = run.publishing
            await until(lambda: reading.lines.count == 2, "the second line")
            os.kill(os.getpid(), number)
            assert 0 == await run.ended()

        assert ["a", "b"] == run.data
        said = capsys.readouterr().err
        assert "The last line had not come to its end" in said
        assert said.endswith("2 lines published.\n")

    async def test_second_signal(self, capsys):
        """
        A second one does not wait for a server that does not answer.
        """
        async with publishing(status(503), text=b"a\nb\n") as run:
            await until(lambda: run.server.requests, "the first attempt")
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: run.publishing.lines.stopped, "the first signal")
            assert not run.task.done()
            os.kill(os.getpid(), signal.SIGTERM)
            assert 1 == await run.ended()

        said = capsys.readouterr().err
        assert "Ended early: it was stopped at once." in said
        assert "0 lines published, 2 read but not confirmed" in said

    async def test_input_that_cannot_be_read(self, tmp_path, capsys):
        """
        A directory as standard input is named, not a traceback.
        """
        descriptor = os.open(tmp_path, os.O_RDONLY)
        async with publishing(descriptor=descriptor) as run:
            assert 1 == await run.ended()
        os.close(descriptor)

        assert "standard input cannot be read: Is a directory" in capsys.readouterr().err

    async def test_progress_on_a_terminal(self, capsys, monkeypatch):
        """
        A terminal shows the count while it grows; each sentence gets a line of its own.
        """
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        _, code = await published(b"a\nnope\n", options=["--json"])

        assert 1 == code
        said = capsys.readouterr().err
        assert "\r\033[Kline 1 must be JSON" in said
        _, code = await published(b"1\n", options=["--json"])
        assert "\r1 line published\033[K\r\033[K1 line published.\n" == capsys.readouterr().err


# --- Listen ---


async def heard(*answers, options=()) -> tuple[bool, Heard]:
    async with serving(*answers) as server:
        result = Heard()
        arguments = command._arguments(["listen", "--topic", "logs", "--url", server.url, *options])
        bad = await command._follow(arguments, result)
        result.requests = server.requests
        return bad, result


class TestListen:
    @pytest.mark.parametrize(
        ("form", "expected"),
        [
            ("data", "a\nü\n{}\n"),
            (
                "json",
                '{"id": "e:1", "event": "tick", "data": "a\\nü"}\n{"id": "e:2", "event": "message", "data": "{}"}\n',
            ),
            ("raw", "id: e:1\nevent: tick\ndata: a\ndata: ü\n\nid: e:2\ndata: {}\n\n"),
        ],
    )
    async def test_formats(self, form, expected, capsysbinary):
        """
        Standard output has the events and nothing else, in UTF-8; notices go to standard error.
        """
        bad, result = await heard(stream(OPEN, ONE, TWO), options=["--format", form, "--count", "2"])

        written = capsysbinary.readouterr()
        assert expected.encode() == written.out
        assert b"Opened: logs, broadcast (stream s1).\n" == written.err
        assert (False, 2) == (bad, result.events)

    async def test_resumes(self, capsysbinary):
        """
        The stream goes on after its end; why and when is said.
        """
        answers = stream(OPEN, ONE), status(503), stream(OPEN, TWO), status(204)
        bad, result = await heard(*answers, options=["--format", "json"])

        written = capsysbinary.readouterr()
        assert ["e:1", "e:2"] == [json.loads(line)["id"] for line in written.out.splitlines()]
        assert b"Reconnecting in 0.1 s: the stream ended.\n" in written.err
        assert b": the server answered 503 Status 503.\n" in written.err
        assert written.err.endswith(b"The stream has no more to come.\n")
        assert not bad
        assert "e:1" == result.requests[1].headers["last-event-id"]

    async def test_reset_is_said(self, capsysbinary):
        """
        Loss is never silent.
        """
        reset = encode(id="n:1", event="stream.reset", data='{"reason":"epoch_changed"}')
        await heard(stream(OPEN, reset, ONE), options=["--count", "1"])

        written = capsysbinary.readouterr()
        assert b"Reset: events were lost (epoch_changed). Fetch your state again.\n" in written.err
        assert "a\nü\n".encode() == written.out

    async def test_position_and_user(self):
        """
        --from and --user reach the server.
        """
        options = ["--count", "1", "--user", "zoë"]
        _, result = await heard(stream(ONE), options=[*options, "--from", "earliest"])
        assert {"topic": ["logs"], "user": ["zoë"], "last_event_id": ["earliest"]} == result.requests[0].query

        _, result = await heard(stream(ONE), options=[*options, "--from", "e:7"])
        assert "e:7" == result.requests[0].headers["last-event-id"]

    async def test_timeout(self, capsysbinary):
        """
        --timeout is a good end of a stream that was open, and a bad one of a stream that never was.
        """
        options = ["--timeout", "1"]
        assert not (await heard(stream(OPEN, ONE, then="hold"), options=options))[0]
        assert (await heard(status(503), options=options))[0]
        assert b"No stream could be opened in 1 s.\n" in capsysbinary.readouterr().err

    async def test_refused(self, capsysbinary):
        """
        The server's sentence is passed on.
        """
        problem = {"detail": "topic must be yours. Ask for the right."}
        assert (await heard(status(403, body=problem)))[0]
        assert b"GET /events got status 403: topic must be yours." in capsysbinary.readouterr().err


# --- As a process ---


@asynccontextmanager
async def process(*arguments: str, stdout=asyncio.subprocess.PIPE):
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "app",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
        # Python's own buffering, as everywhere else, also where the tests run without.
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        # A CI job may run in the background, where a shell has Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


class TestProcess:
    async def test_count(self):
        """
        --count ends with code 0 and lets the connection go.
        """
        async with serving(stream(OPEN, ONE, then="hold")) as server:
            async with process("listen", "--topic", "logs", "--url", server.url, "--count", "1") as listen:
                out, err = await listen.communicate()
            await server.left.wait()

        assert (0, "a\nü\n".encode()) == (listen.returncode, out)
        assert b"Opened: logs, broadcast (stream s1).\n" == err

    async def test_count_that_is_not_reached(self):
        """
        A stream that ends before --count events is code 1.
        """
        async with (
            serving(stream(OPEN, ONE), status(204)) as server,
            process("listen", "--topic", "logs", "--url", server.url, "--count", "2") as listen,
        ):
            await listen.communicate()

        assert 1 == listen.returncode

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    async def test_events_come_at_once_and_signals_end(self, number):
        """
        An event is written when it comes, not when a buffer is full; Ctrl-C ends without a traceback.
        """
        async with (
            serving(stream(OPEN, ONE, then="hold")) as server,
            process("listen", "--topic", "logs", "--url", server.url) as listen,
        ):
            assert b"a\n" == await listen.stdout.readline()
            listen.send_signal(number)
            _, err = await listen.communicate()

        assert (0, b"Opened: logs, broadcast (stream s1).\n") == (listen.returncode, err)

    async def test_closed_output(self):
        """
        A reader that has enough, as `head`, is no error and no noise.
        """
        reader, writer = os.pipe()
        async with (
            serving(stream(OPEN, *[ONE] * 10, then="end")) as server,
            process("listen", "--topic", "logs", "--url", server.url, stdout=writer) as listen,
        ):
            os.close(writer)
            assert await asyncio.to_thread(os.read, reader, 1)
            os.close(reader)
            err = await listen.stderr.read()
            await listen.wait()

        assert 0 == listen.returncode
        assert b"Traceback" not in err
        assert b"BrokenPipe" not in err

    async def test_signal_while_the_output_is_stuck(self):
        """
        A reader that stopped reading cannot keep the process.
        """
        reader, writer = os.pipe()
        big = encode(data="x" * 200_000)
        async with (
            serving(stream(OPEN, big, then="hold")) as server,
            process("listen", "--topic", "logs", "--url", server.url, stdout=writer) as listen,
        ):
            os.close(writer)
            assert await asyncio.to_thread(os.read, reader, 1)
            listen.send_signal(signal.SIGTERM)
            await asyncio.wait_for(listen.wait(), 30)
        os.close(reader)

        assert 0 == listen.returncode

    async def test_publish(self):
        """
        Standard input is read to its end, and SIGTERM publishes what was read.
        """
        async with serving(accepted) as server:
            async with process("publish", "--topic", "logs", "--url", server.url) as publish:
                publish.stdin.write(b"a\n")
                await until(lambda: server.requests, "the first line")
                publish.stdin.write(b"b\n")
                publish.send_signal(signal.SIGTERM)
                await publish.wait()
                assert 0 == publish.returncode
            async with process("publish", "--topic", "logs", "--url", server.url) as publish:
                out, err = await publish.communicate(b"c\nd")

        assert (0, b"", b"2 lines published.\n") == (publish.returncode, out, err)
        assert ["c", "d"] == [event["data"] for event in server.requests[-1].events]

    async def test_closed_input(self):
        """
        No standard input at all is named, not a traceback.
        """
        line = f"{sys.executable} -m app publish --topic logs --url http://127.0.0.1:9 <&-"
        shell = await asyncio.create_subprocess_shell(line, stderr=asyncio.subprocess.PIPE)
        _, err = await shell.communicate()

        assert 1 == shell.returncode
        assert b"standard input cannot be read" in err
        assert b"Traceback" not in err

    async def test_help_does_not_wait_for_the_client(self):
        """
        What needs no server imports no HTTP client.
        """
        code = "import sys, app.command; sys.exit('httpx2' in sys.modules or 'quart' in sys.modules)"
        check = await asyncio.create_subprocess_exec(sys.executable, "-c", code)

        assert 0 == await check.wait()


# --- Against the application ---


class TestAgainstTheApplication:
    async def test_every_line_once_while_the_application_is_killed(self, stack):
        """
        What goes into `publish` comes out of `listen`, once and in order, also when SIGKILL comes between.
        """
        kit = stack(apps=1, nginx=False, env={"SSE_RETRY_MS": "20"})
        application = kit.apps[0]
        given = b"".join(b"%d\n" % number for number in range(3000))
        async with (
            process("listen", "--topic", "logs", "--url", kit.url, "--count", "3000", "--timeout", "60") as listen,
            process("publish", "--topic", "logs", "--url", kit.url) as publish,
        ):
            assert (await listen.stderr.readline()).startswith(b"Opened: logs, broadcast ")
            publish.stdin.write(given[:5000])
            first = await listen.stdout.readline()
            application.kill()
            publish.stdin.write(given[5000:])
            await asyncio.to_thread(application.restart)
            (out, err), (_, said) = await asyncio.gather(listen.communicate(), publish.communicate())

        assert given == first + out
        assert b"Reconnecting in " in err
        assert said.endswith(b"3,000 lines published.\n")
        assert (0, 0) == (listen.returncode, publish.returncode)
