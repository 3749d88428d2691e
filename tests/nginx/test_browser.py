"""A restart of the application, as Chromium's own EventSource sees it: with the soft fail, and without."""

import asyncio
from collections.abc import Iterator

import pytest

from app.stack import ROOT
from tests.browser import native
from tests.nginx.conftest import NATIVE


@pytest.fixture(scope="module")
def chromium(require) -> Iterator[native.Browser]:
    with native.started("chromium", require("chromium")) as browser:
        yield browser


def without_soft_fail() -> dict[str, str]:
    """Switch it off as its first lines say: `default 0;` is the map's only line."""
    text = (ROOT / "nginx/snippets/sse-soft-fail.http.conf").read_text()
    assert "    text/event-stream 1;\n" in text
    return {"snippets/sse-soft-fail.http.conf": text.replace("    text/event-stream 1;\n", "")}


async def restarted(chromium, front, toy) -> native.Source:
    """Open an EventSource, kill the application under it, and return once the browser has met nobody."""
    chromium.aim(front.url)
    source = chromium.open("/events?topic=a")
    await asyncio.to_thread(source.wait, lambda: any(said["kind"] == "open" for said in source.reports()))
    toy.answer = "hang up"
    toy.cut()
    await asyncio.to_thread(source.wait, lambda: len(source.streams()) > 1 and source.streams()[1].ended)
    return source


class TestRestart:
    async def test_with_the_soft_fail(self, nginx, toys, chromium):
        """It meets 502 as 200 with `retry:`, comes back until somebody answers, and reads on."""
        (toy,) = await toys()
        front = nginx([toy.server])
        source = await restarted(chromium, front, toy)
        toy.answer = "stream"
        await asyncio.to_thread(source.wait, lambda: toy.open)
        toy.say(b"data: here again\n\n")
        events = await asyncio.to_thread(source.wait_events, 1)
        chromium.rest()

        assert ["here again"] == [event["data"] for event in events]
        assert not any(said["closed"] for said in source.reports() if said["kind"] == "error")
        assert [head for head in toy.heads if "X-Sse-Soft-Fail: nginx" in head]

    async def test_without_it(self, nginx, toys, chromium):
        """It meets the true 502, and gives up for ever: that is what the soft fail is for."""
        (toy,) = await toys()
        front = nginx([toy.server], files=without_soft_fail())
        source = await restarted(chromium, front, toy)
        toy.answer = "stream"
        closed = await asyncio.to_thread(
            source.wait, lambda: [said for said in source.reports() if said["kind"] == "error" and said["closed"]]
        )
        requests = len(source.streams())
        chromium.rest()

        assert closed
        assert 2 == requests
        assert 0 == toy.open
        assert "X-Sse-Soft-Fail" not in toy.heads[0]
        assert NATIVE["Accept"] in toy.heads[0]
