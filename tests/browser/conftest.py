"""
Browsers for the tests of this folder, and the stacks they look at.

A browser that is not installed is a skip that names its package.
"""

import contextlib
import json
import threading
import urllib.request
import uuid

import pytest

from app.stack import Stack
from tests.browser import native

# Browsers come back after 0.2 to 0.4 s (Firefox: 0.5 s) and not 1 to 2 s.
QUICK_RETRY = {"SSE_RETRY_MS": "200"}
# A drain of 45 s is a long time to watch.
QUICK_DRAIN = {"SSE_DRAIN_SECONDS": "4"}


@pytest.fixture
def topic():
    """A topic that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


# Stacks


@pytest.fixture(scope="package")
def kept_stack(require):
    require("redis-server", "valkey-server")
    require("nginx")
    with Stack(env=QUICK_RETRY | QUICK_DRAIN) as stack:
        yield stack


@pytest.fixture
def site(kept_stack):
    """
    nginx, two processes and Redis, kept for all tests of this folder.

    A test may kill processes: they run again for the next one.
    """
    for app in kept_stack.apps:
        if not app.alive:
            app.start()
    for app in kept_stack.apps:
        app.wait_ready()
    return kept_stack


@pytest.fixture(scope="package")
def forgetful_site(require):
    """A stack that keeps four seconds of history, and is busy on another topic."""
    require("redis-server", "valkey-server")
    require("nginx")
    env = {"SSE_HISTORY_SECONDS": "4", "SSE_HEARTBEAT_SECONDS": "0.3"}
    with Stack(env=QUICK_RETRY | env) as stack:
        over = threading.Event()

        def keep_busy():
            while not over.wait(0.1):
                with contextlib.suppress(OSError):
                    publish_at(stack.url, {"topics": ["others"], "data": ""})

        busy = threading.Thread(target=keep_busy)
        busy.start()
        yield stack
        over.set()
        busy.join()


def publish_at(url, *drafts):
    request = urllib.request.Request(
        f"{url}/publish", json.dumps(drafts).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)["ids"]


@pytest.fixture
def publish():
    """Publish drafts at an address, as one batch, in order; returns their ids."""
    return publish_at


@pytest.fixture
def app_of(site):
    """The part of the stack whose process calls itself by this name."""

    def app_of(process):
        for app in site.apps:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{app.url}/readyz") as answer:
                if json.load(answer)["process"] == process:
                    return app
        raise AssertionError(f"no process of the stack calls itself {process!r}")

    return app_of


# Native browsers


@pytest.fixture(scope="package", params=["chromium", "firefox-esr"])
def started_browser(request, require):
    with native.started(request.param, require(request.param)) as browser:
        yield browser


@pytest.fixture
def browser(started_browser):
    """A browser that shows the probe page; `aim` it at a stack."""
    yield started_browser
    started_browser.rest()


# A page in Chromium


@pytest.fixture(scope="module")
def driven_chromium(require):
    # Imported late, and stopped with the module: as long as it runs, its event
    # loop occupies this thread, and no asynchronous test could run.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=require("chromium"), args=native.CHROMIUM_FLAGS
        )
        yield browser
        browser.close()


@pytest.fixture
def page(driven_chromium):
    """
    A page with a profile of its own, whose console must stay silent.

    Errors and what its policy blocks fail the test.
    """
    context = driven_chromium.new_context()
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"uncaught: {error}"))
    page.allowed_in_console = ()
    yield page
    context.close()
    assert [] == [line for line in said if not any(text in line for text in page.allowed_in_console)]


@pytest.fixture
def expects_failed_requests(page):
    """Chromium writes answers of 400 and above, and broken streams, to the console."""
    page.allowed_in_console = ("Failed to load resource",)
