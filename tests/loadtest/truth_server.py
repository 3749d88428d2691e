"""
A server of event streams that does wrong what it is told to, and says what it did.

    python tests/loadtest/truth_server.py PORT FAULTS

FAULTS is JSON: topics to faults. `delay_ms` holds every event back; `drop`, `repeat` and
`swap` name numbers: these never come, come twice, or come after their successor;
`cut_at` ends the connection after these numbers, `lose_on_cut` does not replay them,
`reset` says so. `flood` is a number of events of nobody's after each. `fallback` answers the first connects with a soft fail; `refuse_at`
answers with a status after so many connects, `refuse_head` always; `moved` redirects.
Runs repeat the numbered words of their prompt, with the faults of the topic `runs`: `drop`,
`repeat` (the same event), `again` (as another event), `swap`, `cut_at`, `lose_on_cut`, and
`drop_own` of its own words; `fail` and `no_end` after a number; `model` is another's name;
`first_ms` before the first word.
`GET /truth` tells how many events were published, and how many writes were made.
"""

import asyncio
import json
import sys
from collections import Counter
from urllib.parse import parse_qs, unquote, urlsplit

FAULTS = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
log: list[tuple[str, int, str]] = []
streams: set["Stream"] = set()
truth: Counter[str] = Counter()
runs: dict[str, "Run"] = {}
WORD_SECONDS = 0.01


class Stream:
    def __init__(self, topics: list[str], writer: asyncio.StreamWriter) -> None:
        self.topics = topics
        self.writer = writer
        self.held: bytes | None = None
        # Of the log, what it was sent: an event that was replayed may still be on its way.
        self.at = 0

    def write(self, block: bytes) -> None:
        if not self.writer.is_closing():
            self.writer.write(b"%x\r\n%b\r\n" % (len(block), block))

    def send(self, topic: str, at: int, data: str) -> None:
        fault = FAULTS.get(topic, {})
        number = int(data.split(" ", 3)[2])
        block = f"id: {at}\ndata: {data}\n\n".encode()
        if number in fault.get("drop", ()):
            truth["dropped"] += 1
            return
        if number in fault.get("swap", ()):
            truth["swapped"] += 1
            self.held = block
            return
        truth["written"] += 1
        self.write(block)
        if self.held is not None:
            self.write(self.held)
            self.held = None
        if "flood" in fault:
            self.write(b"data: .\n\n" * fault["flood"])
        if number in fault.get("repeat", ()):
            truth["repeated"] += 1
            self.write(block)
        if number in fault.get("cut_at", ()):
            truth["cut"] += 1
            streams.discard(self)
            self.writer.transport.abort()


class Run:
    """An answer whose words are all due at their time, for whoever reads them then."""

    def __init__(self, prompt: str) -> None:
        fault = self.fault = FAULTS.get("runs", {})
        self.began = asyncio.get_running_loop().time() + fault.get("first_ms", 0) / 1000
        words = ["You", "wrote:", *prompt.split()]
        asked = len(words) - 2
        # (number of the prompt's word, event, data), where the number is below 0 for its own.
        self.events: list[tuple[int, str, dict[str, object]]] = [
            (at - 2, "run.token", {"text": word}) for at, word in enumerate(words)
        ]
        for number in fault.get("swap", ()):
            at = number + 2
            self.events[at], self.events[at + 1] = self.events[at + 1], self.events[at]
            truth["words_swapped"] += 1
        for number in fault.get("again", ()):
            at = next(at for at, event in enumerate(self.events) if event[0] == number)
            self.events.insert(at + 1, self.events[at])
            truth["words_repeated"] += 1
        end: tuple[str, dict[str, object]] = (
            "run.done",
            {"tokens": asked + 2, "model": fault.get("model", "offline generator")},
        )
        if "fail" in fault:
            del self.events[fault["fail"] + 2 :]
            end = "run.failed", {"reason": "upstream_broken"}
        self.events.append((asked, *end))
        self.cut = False

    async def tell(self, stream: Stream, at: int) -> None:
        """Write the events from *at* on."""
        fault = self.fault
        while at < len(self.events):
            due = self.began + at * WORD_SECONDS - asyncio.get_running_loop().time()
            await asyncio.sleep(max(0.0, due))
            number, event, data = self.events[at]
            at += 1
            if number >= fault.get("no_end", 10**9):
                await asyncio.sleep(3600)
            block = f"id: {at}\nevent: {event}\ndata: {json.dumps(data)}\n\n".encode()
            if number in fault.get("drop", ()) or (number < 0 and fault.get("drop_own") == number):
                truth["words_dropped"] += 1
                continue
            stream.write(block)
            if number in fault.get("repeat", ()):
                truth["words_repeated"] += 1
                stream.write(block)
            if number in fault.get("cut_at", ()) and not self.cut:
                self.cut = True
                truth["runs_cut"] += 1
                await stream.writer.drain()
                # What the client has not read would be lost with it, were it aborted at once.
                await asyncio.sleep(0.05)
                stream.writer.transport.abort()
                if fault.get("lose_on_cut"):
                    truth["words_dropped"] += 1
                    self.events[at] = (number, "comment", {})
                return
        stream.writer.write(b"0\r\n\r\n")


async def run(method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> None:
    if method == "POST":
        truth["runs"] += 1
        name = str(truth["runs"])
        runs[name] = Run(json.loads(body)["prompt"])
    else:
        name = path.split("/")[2]
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    stream = Stream([], writer)
    at = int(headers.get("last-event-id") or 0)
    opening = json.dumps({"topics": [f"run:{name}"]})
    stream.write(f"id: {at}\nevent: stream.open\nretry: 100\ndata: {opening}\n\n".encode())
    await runs[name].tell(stream, at)
    await writer.drain()


def deliver(topic: str, at: int, data: str) -> None:
    for stream in list(streams):
        if topic in stream.topics and at > stream.at:
            stream.send(topic, at, data)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head[:-4].split("\r\n")
            method, target, _ = first.split(" ")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            url = urlsplit(target)
            if url.path == "/publish":
                for event in json.loads(body):
                    topic = event["topics"][0]
                    log.append((topic, len(log) + 1, event["data"]))
                    truth["published"] += 1
                    delay = FAULTS.get(topic, {}).get("delay_ms", 0)
                    asyncio.get_running_loop().call_later(delay / 1000, deliver, *log[-1])
                await answer(writer, "201 Created", b"{}")
            elif url.path == "/events":
                if await events(method, parse_qs(url.query), headers, reader, writer):
                    return
            elif url.path.startswith("/runs"):
                if truth["runs"] >= FAULTS.get("runs", {}).get("refuse_after", 10**9):
                    await answer(writer, "429 Too Many Requests", b"{}")
                    return
                await run(method, url.path, headers, body, writer)
                return
            else:
                await answer(writer, "200 OK", json.dumps(truth).encode())
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def events(
    method: str,
    query: dict[str, list[str]],
    headers: dict[str, str],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> bool:
    topics = [unquote(topic) for topic in query.get("topic", ())] + ["broadcast"]
    fault = FAULTS.get(topics[0], {})
    if fault.get("refuse_head"):
        await answer(writer, "401 Unauthorized", b"" if method == "HEAD" else b'{"detail": "the token expired"}')
        return False
    if "moved" in fault:
        writer.write(f"HTTP/1.1 301 Moved\r\nLocation: {fault['moved']}\r\nContent-Length: 0\r\n\r\n".encode())
        return False
    if method == "HEAD":
        await answer(writer, "200 OK", b"", kind="text/event-stream")
        return False
    truth["connects"] += 1
    if truth["connects"] > fault.get("refuse_at", 10**9):
        await answer(writer, "401 Unauthorized", b'{"detail": "the token expired"}')
        return False
    start = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n"
    if fault.get("fallback", 0) > truth["soft"]:
        truth["soft"] += 1
        writer.write(f"{start}X-Sse-Fallback: 1\r\n\r\n".encode() + b"c\r\nretry: 100\n\n\r\n0\r\n\r\n")
        await writer.drain()
        return True
    writer.write(f"{start}\r\n".encode())
    stream = Stream(topics, writer)
    resumed = headers.get("last-event-id")
    stream.write(f"id: {resumed or len(log)}\nevent: stream.open\nretry: 100\ndata: {{}}\n\n".encode())
    if resumed and fault.get("reset"):
        stream.write(b"event: stream.reset\ndata: {}\n\n")
    for topic, at, data in log[int(resumed) :] if resumed else ():
        if topic in topics:
            if fault.get("lose_on_cut"):
                truth["missed"] += 1
            else:
                stream.send(topic, at, data)
            stream.at = at
    streams.add(stream)
    await reader.read()
    streams.discard(stream)
    return True


async def answer(writer: asyncio.StreamWriter, status: str, body: bytes, kind: str = "application/json") -> None:
    writer.write(f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


asyncio.run(main())
