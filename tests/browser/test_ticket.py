"""
A browser's own EventSource with a ticket, from the first connect to the end of its token.
"""

import contextlib
import json
import threading
import time
import urllib.request

import pytest

from app.stack import Stack
from tests.signing import SECRET, bearer, token

# How long the token lives: long enough for all that happens to it on a busy machine.
SECONDS = 14
# The ladder, scaled down: a stream's age is a fraction of the token's.
ENV = {
    "SSE_AUTH": "jwt",
    "SSE_JWT_SECRET": SECRET,
    "SSE_JWT_LEEWAY_SECONDS": "0",
    "SSE_EXPIRING_SECONDS": "2",
    "SSE_HEARTBEAT_SECONDS": "0.5",
    "SSE_MAX_AGE_SECONDS": "2",
    "SSE_RETRY_MS": "200",
    "SSE_DRAIN_SECONDS": "0.5",
    "SSE_DRAIN_LEAD_SECONDS": "0.1",
}


@pytest.fixture
def site(require):
    require("redis-server", "valkey-server")
    require("nginx")
    with Stack(env=ENV) as stack:
        yield stack


def post(url, path, text, body=b"{}"):
    headers = {"Content-Type": "application/json", **bearer(text)}
    with urllib.request.urlopen(urllib.request.Request(url + path, body, headers), timeout=10) as answer:
        return json.load(answer)


class Feed:
    """Publishes 0, 1, 2, … for as long as it is open, each until it is confirmed."""

    def __init__(self, url):
        self.url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        text = token("feed", seconds=600, publish=["orders/*"])
        number = 0
        while not self._over.wait(0.05):
            body = json.dumps({"topics": ["orders/1"], "data": str(number)}).encode()
            # The same key until it is confirmed: a process that was killed may have published it.
            headers = {"Content-Type": "application/json", "Idempotency-Key": f"feed-{number}", **bearer(text)}
            with contextlib.suppress(OSError), urllib.request.urlopen(
                urllib.request.Request(f"{self.url}/publish", body, headers), timeout=10
            ):
                number += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


def app_of(site, process):
    for app in site.apps:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{app.url}/readyz") as answer:
            if json.load(answer)["process"] == process:
                return app
    raise AssertionError(f"no process calls itself {process!r}")


class TestTicket:
    @pytest.mark.timeout(300)
    @pytest.mark.parametrize("started_browser", ["chromium"], indirect=True)
    def test_from_first_use_to_the_end_of_its_token(self, site, browser):
        """
        It survives maximum age, SIGKILL and a drain without losing or doubling an event, until `exp`.
        """
        # On a busy machine two restarts take longer than the token lives: then it lives longer.
        if not self._follow(site, browser, SECONDS):
            assert self._follow(site, browser, 6 * SECONDS), "the machine is too slow for this test"

    def _follow(self, site, browser, seconds):
        """Follow one ticket; return whether all happened while its token lived."""
        browser.aim(site.url)
        with Feed(site.url):
            ends = time.time() + seconds
            ticket = post(site.url, "/tickets", token(exp=ends, subscribe=["orders/*"]))["ticket"]
            source = browser.open(f"/events?topic=orders/1&ticket={ticket}", ["stream.expiring", "stream.expired"])
            source.wait_open(3)  # its age ended two streams

            killed = app_of(site, latest(source))
            count = len(source.events("stream.open"))
            killed.kill()
            source.wait_open(count + 1)
            killed.restart()

            drained = app_of(site, latest(source))
            count = len(source.events("stream.open"))
            drained.restart()
            source.wait_open(count + 1)
            if time.time() > ends - 1:
                return False

            source.wait(lambda: source.events("stream.expired"), seconds + 30)
            assert time.time() > ends - 2
            # Its own reconnect is refused, and the browser gives up: the page gets a new ticket.
            source.wait(lambda: [said for said in source.reports() if said["kind"] == "error" and said["closed"]])

        numbers = [int(event["data"]) for event in source.events()]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert len(numbers) > 2 * seconds
        assert source.events("stream.expiring")
        assert [] == source.events("stream.reset")
        assert [] == source.events("stream.evicted")
        assert {f"/events?topic=orders/1&ticket={ticket}"} == {stream.target for stream in source.streams()}
        return True


def latest(source):
    """The process that serves the newest stream."""
    return json.loads(source.events("stream.open")[-1]["data"])["process"]
