"""
See from inside of a cluster that streams work, through nginx and past it.

Runs in the application's image, as a Job. Prints one line per check, and ends
with 0 only if all passed. Between `holding` and a file /tmp/stop it holds
streams and publishes: whoever restarts the application meanwhile sees whether
an event is lost.
"""

import asyncio
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx2
import jwt

from app.parser import Parser, ServerSentEvent

URL = os.environ.get("SMOKE_URL", "http://sse-nginx")
# The application's pods: a name with an address for each, or HOST:PORT words.
PODS = os.environ.get("SMOKE_PODS", "sse-app-headless:8000")
# Set where nginx counts nobody in here: the component load-test.
EXEMPT = bool(os.environ.get("SMOKE_EXEMPT", ""))
SECRET_FILE = os.environ.get("SMOKE_JWT_SECRET_FILE", "")
# What the deployment asks of tokens: SSE_JWT_AUDIENCE, SSE_JWT_ISSUER.
CLAIMS = {name: value for name, value in (("aud", os.environ.get("SMOKE_JWT_AUDIENCE")), ("iss", os.environ.get("SMOKE_JWT_ISSUER"))) if value}
STOP = Path(os.environ.get("SMOKE_STOP_FILE", "/tmp/stop"))
HOLD_SECONDS = float(os.environ.get("SMOKE_HOLD_SECONDS", "840"))
TOPIC = f"smoke:{uuid.uuid4().hex}"
PATIENCE = 10.0


def headers(user: str = "smoke") -> dict[str, str]:
    """What every request carries: a token, where the deployment asks for one."""
    if not SECRET_FILE:
        return {}
    now = int(time.time())
    rights = {"subscribe": ["smoke:*"], "publish": ["smoke:*"]}
    claims = {"sub": user, "iat": now, "exp": now + 3600, "sse": rights} | CLAIMS
    return {"Authorization": "Bearer " + jwt.encode(claims, Path(SECRET_FILE).read_text().strip(), "HS256")}


def client(http2: bool = False) -> httpx2.AsyncClient:
    """A client that takes any certificate: a smoke test of streams, not of names."""
    timeout = httpx2.Timeout(PATIENCE, read=40)
    return httpx2.AsyncClient(http1=not http2, http2=http2, verify=False, timeout=timeout, headers=headers())


async def events(response: httpx2.Response) -> AsyncIterator[ServerSentEvent]:
    """Read a stream's events."""
    parser = Parser()
    async for chunk in response.aiter_raw():
        for event in parser.feed(chunk):
            yield event


async def next_event(stream: AsyncIterator[ServerSentEvent], seconds: float = PATIENCE) -> ServerSentEvent:
    """Return the next event, or fail."""
    return await asyncio.wait_for(anext(stream), seconds)


async def publish(http: httpx2.AsyncClient, data: str, base: str = URL) -> str:
    """Publish and return the id; repeat what failed with the same key."""
    key = uuid.uuid4().hex
    for attempt in range(5):
        try:
            answer = await http.post(f"{base}/publish", json={"topics": [TOPIC], "data": data}, headers={"Idempotency-Key": key})
            if answer.status_code == 201:
                return str(answer.json()["ids"][0])
            last = f"{answer.status_code} {answer.text[:200]}"
        except httpx2.TransportError as error:
            last = repr(error)
        await asyncio.sleep(0.2 * (attempt + 1))
    raise AssertionError(f"a publish must be accepted, got {last}")


def pods() -> list[str]:
    """Return the addresses of all pods."""
    found: list[str] = []
    for word in PODS.split():
        host, _, port = word.rpartition(":")
        addresses = {info[4][0] for info in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)}
        found += [f"http://[{a}]:{port}" if ":" in str(a) else f"http://{a}:{port}" for a in sorted(map(str, addresses))]
    return found


# --- The checks


async def head_and_heartbeat(http2: bool) -> None:
    """The head and the first event arrive at once, and a heartbeat on a silent stream."""
    async with client(http2) as http:
        began = time.monotonic()
        async with http.stream("GET", f"{URL}/events", params={"topic": TOPIC}) as response:
            assert response.status_code == 200, response.status_code
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1"), response.http_version
            parser, opened = Parser(), None
            async for chunk in response.aiter_raw():
                found = parser.feed(chunk)
                if opened is None and found:
                    assert found[0].event == "stream.open", found[0]
                    assert time.monotonic() - began < 5, "a proxy holds the head back"
                    opened = json.loads(found[0].data)
                elif opened is not None and chunk:
                    return  # a heartbeat, or stream.position in its place
                if opened is not None:
                    assert time.monotonic() - began < 3 * opened["heartbeat_seconds"] + 5, "no heartbeat"


async def from_pod_to_pod() -> None:
    """What one pod takes, a stream of another pod delivers."""
    every = pods()
    async with client() as http, http.stream("GET", f"{every[0]}/events", params={"topic": TOPIC}) as response:
        stream = events(response)
        await next_event(stream)
        await publish(http, "across", every[-1])
        assert (await next_event(stream)).data == "across"
    print(f"  ({len(every)} pods)")


async def resume() -> None:
    """A client that comes back with its last id gets what it missed."""
    async with client() as http:
        first = await publish(http, "seen")
        await publish(http, "missed")
        async with http.stream("GET", f"{URL}/events", params={"topic": TOPIC}, headers={"Last-Event-ID": first}) as response:
            stream = events(response)
            data = [(await next_event(stream)).data for _ in range(2)]
            assert data[-1] == "missed", data


async def nothing_lost() -> None:
    """Streams that are held while the application is restarted miss nothing, and read nothing twice."""
    seen: list[list[int]] = [[] for _ in range(4)]
    opened: set[int] = set()
    refused: list[str] = []
    sent, running = 0, True

    async def hold(number: int, mine: list[int]) -> None:
        last = ""
        while running:
            extra = {"Last-Event-ID": last} if last else {}
            try:
                async with client() as http, http.stream("GET", f"{URL}/events", params={"topic": TOPIC}, headers=extra) as response:
                    if response.status_code != 200:
                        refused.append(f"{response.status_code}")
                    else:
                        async for event in events(response):
                            last = event.id or last
                            if event.event == "stream.open":
                                opened.add(number)
                            if event.event == "message" and event.data.startswith("held "):
                                mine.append(int(event.data[5:]))
                            assert event.event != "stream.reset", event.data
            except httpx2.TransportError:
                pass  # cut; it comes back
            await asyncio.sleep(1.5)  # nginx lets a user connect once a second

    holders = [asyncio.create_task(hold(number, mine)) for number, mine in enumerate(seen)]
    until = time.monotonic() + 30
    while len(opened) < len(seen):
        assert time.monotonic() < until, f"streams must open, {len(opened)} of {len(seen)} did; {refused[:5]}"
        await asyncio.sleep(0.1)
    print("holding", flush=True)
    until = time.monotonic() + HOLD_SECONDS
    async with client() as http:
        while not sent or (time.monotonic() < until and not STOP.exists()):  # noqa: ASYNC240 - a file in memory
            sent += 1
            await publish(http, f"held {sent}")
            await asyncio.sleep(0.1)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not all(mine and mine[-1] == sent for mine in seen):  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    running = False
    for task in holders:
        task.cancel()
    await asyncio.gather(*holders, return_exceptions=True)
    for mine in seen:
        assert mine == list(range(1, sent + 1)), f"lost or doubled: {len(mine)} read of {sent}"
    assert not refused, f"streams were refused: {refused[:5]}"
    print(f"  ({sent} events, each read by {len(seen)} streams)")


async def limit() -> None:
    """Who connects too often is told so, with the true status."""
    async with client() as http:
        for _ in range(80):
            answer = await http.head(f"{URL}/events", params={"topic": TOPIC})
            if answer.status_code == 429:
                return
    raise AssertionError("80 connects at once must meet a limit")


def checks() -> list[tuple[str, Callable[[], Awaitable[None]]]]:
    """Return all checks in their order."""
    tls = URL.startswith("https:")
    listed: list[tuple[str, Callable[[], Awaitable[None]]]] = [
        ("HTTP/1.1: head, first event, heartbeat", lambda: head_and_heartbeat(False)),
    ]
    if tls:
        listed.append(("HTTP/2: head, first event, heartbeat", lambda: head_and_heartbeat(True)))
    listed += [
        ("from pod to pod", from_pod_to_pod),
        ("resume by id", resume),
        ("held streams miss nothing", nothing_lost),
    ]
    return listed if EXEMPT else [*listed, ("a limit answers 429", limit)]


async def main() -> int:
    """Make all checks; return the exit status."""
    failed = 0
    if EXEMPT:
        print("left out  a limit answers 429: this overlay exempts private addresses", flush=True)
    for name, check in checks():
        try:
            await check()
            print(f"ok      {name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAILED  {name}: {error!r}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
