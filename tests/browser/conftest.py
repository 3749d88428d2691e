"""
Browsers for the tests of this folder, and the stacks they look at.

A browser that is not installed is a skip that names its package.
"""

import json
import threading
import urllib.request
import uuid

import native
import pytest
from playwright.sync_api import sync_playwright

BROWSERS = {"chromium": native.chromium, "firefox": native.firefox}


@pytest.fixture
def topic():
    """A topic that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def publish(stack):
    """Publish drafts to the stack as one batch, in order; returns their ids."""
    return publisher(stack)


def publisher(stack):
    def publish(*drafts):
        request = urllib.request.Request(
            f"{stack.url}/publish",
            json.dumps(drafts).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["ids"]

    return publish


# Native browsers


@pytest.fixture(scope="module", params=BROWSERS)
def started_browser(request):
    with BROWSERS[request.param]() as browser:
        yield browser


@pytest.fixture
def browser(started_browser, stack):
    """A browser whose probe page has the stack behind its gate."""
    started_browser.aim(stack.url)
    yield started_browser
    started_browser.rest()


# A page in Chromium


@pytest.fixture(scope="module")
def chromium():
    # Stopped with the module: as long as it runs, its event loop occupies this
    # thread, and no asynchronous test could run.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=native.CHROMIUM, args=native.CHROMIUM_FLAGS
        )
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page with a profile of its own."""
    context = chromium.new_context()
    page = context.new_page()
    page.said = []
    page.on("console", lambda message: page.said.append((message.type, message.text)))
    page.on("pageerror", lambda error: page.said.append(("pageerror", str(error))))
    yield page
    context.close()


@pytest.fixture
def no_page_errors(request, page):
    """
    The page's console stays silent: no error, nothing against its policy.

    Chromium writes each answer of 400 and above there, so tests of such
    answers are marked and allow those lines.
    """
    yield
    said = page.said
    if request.node.get_closest_marker("expects_page_errors"):
        said = [line for line in said if "Failed to load resource" not in line[1]]
    assert [] == said
