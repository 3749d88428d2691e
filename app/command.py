"""
The command line's two clients: publish standard input, and follow a stream.

`python -m app publish` and `python -m app listen`; `--help` shows examples.
Standard output carries events and nothing else; all that is said goes to standard error.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

# httpx2 is imported where it is used: it takes longer than all the rest, and --help
# and a mistyped option should not wait for it.
from app.event import EventError, check_name, check_subscription, check_topic, encode

DEFAULT_URL = "http://localhost:8080"
# Lines that come together go together: so many, so many bytes, at most so often.
BATCH_LINES = 200
BATCH_BYTES = 262_144
BATCH_SECONDS = 0.02
PROGRESS_SECONDS = 0.2

_PUBLISH_HELP = """\
Each line becomes one event. Lines that arrive together are sent together; a line
that arrives alone is sent at once. The order stays, and nothing is doubled when a
lost answer makes the command send again.

examples:
  echo hello | python -m app publish --topic news
  tail -n 0 -F access.log | python -m app publish --topic logs --json
  python -m app publish --topic logs --topic audit --event line < old.log

Ctrl-C and SIGTERM end the reading; what was read is still published. A second one
ends at once.

exit codes:
  0  every line was published
  1  a line was skipped or refused, or the server could not be reached for --timeout
  2  the command line was wrong
"""

_LISTEN_HELP = """\
Reconnects by itself and resumes where it was: no event is missed and none comes
twice while the server keeps them. When it no longer does, "reset" is said on
standard error.

examples:
  python -m app listen --topic news
  python -m app listen --topic 'logs/*' --from earliest --format json
  python -m app listen --topic logs --count 1 --timeout 10

formats:
  data  the event's data and a line end
  json  one object a line: {"id": .., "event": .., "data": ".."}
  raw   the event as text/event-stream

exit codes:
  0  --count events came, the stream has no more, or it was ended by Ctrl-C, SIGTERM,
     --timeout, or the reader of its output
  1  --count events did not come, no stream could be opened, or the server refused
  2  the command line was wrong
"""


def main(argv: list[str]) -> int:
    """Run `publish` or `listen` and return the exit code; *argv* begins with that word."""
    arguments = _arguments(argv)
    run = _publish if arguments.command == "publish" else _listen
    try:
        return run(arguments)
    except BrokenPipeError:
        # The reader has enough, as in `| head -3`. What is still buffered must not be
        # flushed into the closed pipe when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 1


# --- Arguments ---


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app")
    commands = parser.add_subparsers(dest="command", required=True)

    publish = _command(commands, "publish", "publish standard input, line by line", _PUBLISH_HELP)
    publish.add_argument(
        "--topic",
        action="append",
        required=True,
        type=_checked(check_topic),
        metavar="TOPIC",
        help="topic to publish to; repeat it for several",
    )
    publish.add_argument(
        "--event",
        default="",
        type=_checked(check_name),
        metavar="NAME",
        help="event name (default: message)",
    )
    publish.add_argument(
        "--json",
        action="store_true",
        help="each line is a JSON value, published as it stands; what is none is skipped",
    )
    publish.add_argument(
        "--timeout",
        default=60.0,
        type=_seconds,
        metavar="SECONDS",
        help="how long to try the same lines before giving up (default: 60)",
    )

    listen = _command(commands, "listen", "follow a stream, resuming by itself", _LISTEN_HELP)
    listen.add_argument(
        "--topic",
        action="append",
        required=True,
        type=_checked(check_subscription),
        metavar="TOPIC",
        help="topic to listen to, or a prefix such as 'logs/*'; repeat it for several",
    )
    listen.add_argument(
        "--from",
        dest="position",
        type=_position,
        metavar="earliest|ID",
        help="begin with all that is kept, or after the event with this id (default: now)",
    )
    listen.add_argument(
        "--format",
        choices=("data", "json", "raw"),
        default="data",
        help="what is written for an event (default: data)",
    )
    listen.add_argument("--user", metavar="ID", help="listen as this user (SSE_AUTH=none only)")
    listen.add_argument(
        "--count",
        type=_count,
        metavar="N",
        help="end after N events",
    )
    listen.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="end after so many seconds",
    )
    return parser.parse_args(argv)


def _command(commands: Any, name: str, summary: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary.capitalize() + ".",
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--url",
        default=DEFAULT_URL,
        type=_address,
        metavar="ADDRESS",
        help=f"the server (default: {DEFAULT_URL})",
    )
    parser.add_argument(
        "--token-file",
        default=None,
        type=_token_file,
        metavar="FILE",
        help="token to send (SSE_AUTH=jwt); read anew for every request",
    )
    return parser


class _TokenFile(Mapping[str, str]):
    """The header that carries the token of a file, which may be replaced at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = ""

    def __getitem__(self, name: str) -> str:
        if name != "Authorization":
            raise KeyError(name)
        # One that is being replaced is for a moment not there.
        with contextlib.suppress(OSError, UnicodeDecodeError):
            self._last = self._path.read_text("ascii").strip() or self._last
        return f"Bearer {self._last}"

    def __iter__(self) -> Iterator[str]:
        return iter(("Authorization",))

    def __len__(self) -> int:
        return 1


def _token_file(value: str) -> _TokenFile:
    found = _TokenFile(Path(value))
    # Else the client's library would speak of a header that nobody typed.
    if not re.fullmatch(r"Bearer [\x21-\x7e]+", found["Authorization"]):
        raise argparse.ArgumentTypeError(f"must be a file that holds a token, got {value!r}.")
    return found


def _checked(check: Callable[[object], str]) -> Callable[[str], str]:
    def convert(value: str) -> str:
        try:
            return check(value)
        except EventError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _address(value: str) -> str:
    try:
        parts = urlsplit(value)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or set(value) & set("?# "):
        raise argparse.ArgumentTypeError(
            f"must be the server's address with http:// or https:// and no query, got {value!r}. Such as {DEFAULT_URL}."
        )
    return value


def _position(value: str) -> str:
    if not (value.isascii() and value.isprintable() and " " not in value and 0 < len(value) <= 200):
        raise argparse.ArgumentTypeError(f"must be `earliest` or an id that was read from a stream, got {value!r}.")
    return value


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {value!r}.")
    return seconds


def _count(value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value[:18]) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {value!r}.")
    return int(value[:18])


# --- Publish ---


def _publish(arguments: argparse.Namespace) -> int:
    if sys.stdin is None:
        # Descriptor 0 was closed at the start, and is by now something else.
        _say("standard input cannot be read: it is closed. Use < /dev/null for none.")
        return 1
    return asyncio.run(Publishing(arguments).run())


type _Event = tuple[int, dict[str, Any]]


class Publishing:
    """One run of `publish`: lines in, batches out, and an account of every line."""

    def __init__(self, arguments: argparse.Namespace, descriptor: int = 0) -> None:
        self.arguments = arguments
        self.descriptor = descriptor
        self.published = 0
        self.skipped = 0
        self.repaired = 0
        self.terminal = sys.stderr.isatty()
        self.shown_at = 0.0

    async def run(self) -> int:
        """Publish until the input ends; return the exit code."""
        import httpx2

        from app.client import GaveUp, Refused
        from app.lines import Lines

        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        sent_at = float("-inf")
        why = ""
        with Lines(self.descriptor) as lines:
            self.lines = lines

            def interrupted() -> None:
                if lines.stopped:
                    task.cancel()
                else:
                    lines.stop()

            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, interrupted)
            try:
                async with httpx2.AsyncClient() as client:
                    while batch := await lines.batch(BATCH_LINES, BATCH_BYTES, sent_at + BATCH_SECONDS):
                        sent_at = loop.time()
                        await self.send(client, self.events(batch))
                if lines.error:
                    why = f"standard input cannot be read: {lines.error.strerror}"
            except GaveUp as error:
                why = f"gave up (--timeout {self.arguments.timeout:g}): {error}"
            except Refused as error:
                why = str(error)
            except asyncio.CancelledError:
                why = "it was stopped at once"
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(number)
            return self.account(lines, why)

    def events(self, lines: list[tuple[int, bytes | None]]) -> list[_Event]:
        """Return the lines that can be published, as events; say which cannot."""
        events: list[_Event] = []
        for number, line in lines:
            try:
                data = self.data(line)
            except ValueError as error:
                self.skip(number, str(error))
                continue
            event = {"topics": self.arguments.topic, "data": data}
            if self.arguments.event:
                event["event"] = self.arguments.event
            events.append((number, event))
        return events

    def data(self, line: bytes | None) -> str:
        """Return the event's data; raise ValueError where the line is none."""
        if line is None:
            raise ValueError("is too long for one event (over 16 MiB). Split it.")
        if not self.arguments.json:
            text = line.decode("utf-8", "replace")
            self.repaired += "\ufffd" in text and text.encode() != line
            return text
        try:
            text = line.decode()
            _JSON.decode(text)
        except UnicodeDecodeError:
            raise ValueError(f"must be JSON in UTF-8, got {_short(line)}.") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"must be JSON, got {_short(text)} ({error.msg} at column {error.colno}).") from None
        except RecursionError:
            raise ValueError(f"must be JSON of a sane depth, got {_short(text)}.") from None
        return text

    async def send(self, client: Any, events: list[_Event]) -> None:
        """Publish *events* in order; find out which one it was when the server refuses some."""
        from app.client import Refused, publish

        if not events:
            return
        try:
            await publish(
                self.arguments.url,
                [event for _, event in events],
                client=client,
                headers=self.arguments.token_file,
                timeout_seconds=self.arguments.timeout,
                on_wait=self.waiting,
            )
        except Refused as refused:
            # The others say something about all lines: no such address, no such right.
            if refused.status not in (400, 413):
                raise
            if len(events) == 1:
                self.skip(events[0][0], f"was refused: {refused}")
                return
            # A batch is published whole or not at all, so its halves are new batches.
            half = len(events) // 2
            await self.send(client, events[:half])
            await self.send(client, events[half:])
            return
        self.published += len(events)
        self.progress()

    def skip(self, number: int, why: str) -> None:
        self.skipped += 1
        self.say(f"line {number:,} {why} Skipped.")

    def waiting(self, cause: str, seconds: float) -> None:
        self.say(f"Not published yet: {cause}. Trying again in {seconds:.1f} s.")

    def progress(self) -> None:
        """Show the count on a terminal, a few times a second."""
        if self.terminal and time.monotonic() - self.shown_at > PROGRESS_SECONDS:
            self.shown_at = time.monotonic()
            print(f"\r{_lines(self.published)} published", end="\033[K", file=sys.stderr, flush=True)

    def say(self, sentence: str) -> None:
        print("\r\033[K" * self.terminal + sentence, file=sys.stderr, flush=True)

    def account(self, lines: Any, why: str) -> int:
        """Say what became of every line; return the exit code."""
        if why:
            self.say(f"Ended early: {why}.")
        if lines.unfinished:
            self.say("The last line had not come to its end when the reading was stopped: not published.")
        if self.repaired:
            self.say(f"{_lines(self.repaired)} had bytes that are not UTF-8: sent as U+FFFD.")
        lost = lines.count - self.published - self.skipped
        total = f"{_lines(self.published)} published"
        if self.skipped:
            total += f", {self.skipped:,} skipped"
        if lost:
            total += f", {lost:,} read but not confirmed"
        if why:
            total += "; what comes after them was not read"
        self.say(total + ".")
        return 1 if why or lost or self.skipped else 0


def _no_constant(name: str) -> NoReturn:
    raise json.JSONDecodeError(f"{name} is not JSON", name, 0)


# Numbers stay text: the line is published as it stands, so that their digits do not matter,
# and Python refuses to convert very long ones.
_JSON = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_no_constant)


def _lines(count: int) -> str:
    return f"{count:,} line" + "s" * (count != 1)


def _short(value: str | bytes) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:70] + "…" + text[-1]


# --- Listen ---


@dataclass
class Heard:
    """What a run of `listen` has come to, also when it is interrupted."""

    events: int = 0
    opened: bool = False


def _listen(arguments: argparse.Namespace) -> int:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    # Raised at once, also within a write to a reader that has stopped reading: the event
    # loop's own handlers would wait for it.
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, interrupted)
    heard = Heard()
    try:
        refused = asyncio.run(_follow(arguments, heard))
    except KeyboardInterrupt:
        refused = False
    if refused or (arguments.count is not None and heard.events < arguments.count):
        return 1
    return 0


async def _follow(arguments: argparse.Namespace, heard: Heard) -> bool:
    """Write events until there is a reason to end; return whether it is a bad one."""
    from app.client import Refused, StreamReset, listen

    def on_open(opened: dict[str, Any]) -> None:
        heard.opened = True
        topics = ", ".join(map(str, opened.get("topics", arguments.topic)))
        _say(f"Opened: {topics} (stream {opened.get('stream', '?')}).")

    def on_wait(cause: str, seconds: float) -> None:
        _say(f"Reconnecting in {seconds:.1f} s: {cause}.")

    events = listen(
        arguments.url,
        arguments.topic,
        last_event_id=arguments.position or "",
        user=arguments.user,
        headers=arguments.token_file,
        on_open=on_open,
        on_wait=on_wait,
    )
    try:
        async with asyncio.timeout(arguments.timeout) as limit, aclosing(events):
            async for event in events:
                if isinstance(event, StreamReset):
                    _say(f"Reset: events were lost ({event.reason}). Fetch your state again.")
                    continue
                sys.stdout.buffer.write(_WRITTEN[arguments.format](event))
                sys.stdout.buffer.flush()
                heard.events += 1
                if heard.events == arguments.count:
                    return False
    except TimeoutError:
        if not limit.expired():
            raise
        if not heard.opened:
            _say(f"No stream could be opened in {arguments.timeout:g} s.")
        return not heard.opened
    except Refused as refused:
        _say(str(refused))
        return True
    _say("The stream has no more to come.")
    return False


def _data(event: Any) -> bytes:
    return event.data.encode() + b"\n"  # type: ignore[no-any-return]


def _json(event: Any) -> bytes:
    fields = {"id": event.id, "event": event.event, "data": event.data}
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def _raw(event: Any) -> bytes:
    return encode(id=event.id, event=event.event, data=event.data)


_WRITTEN = {"data": _data, "json": _json, "raw": _raw}


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
