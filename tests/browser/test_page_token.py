"""
The demonstration page where tokens are asked for: its field for one, in Chromium, straight from nginx.
"""

import json
import urllib.request

import pytest
from playwright.sync_api import expect

from app.stack import Stack
from tests.signing import SECRET, bearer, token

expect.set_options(timeout=15_000)

# The warning comes two seconds after a token of a minute was shown.
SECONDS = 60
ENV = {
    "SSE_AUTH": "jwt",
    "SSE_JWT_SECRET": SECRET,
    "SSE_JWT_LEEWAY_SECONDS": "0",
    "SSE_EXPIRING_SECONDS": str(SECONDS - 2),
    "SSE_RETRY_MS": "200",
}
ALL = {"subscribe": ["*"], "publish": ["*", "user:*", "run:*"], "admin": True}


@pytest.fixture(scope="module")
def guarded(require):
    require("redis-server", "valkey-server")
    require("nginx")
    with Stack(env=ENV) as stack:
        yield stack


def enter(page, text):
    page.get_by_label("Token").fill(text)
    page.get_by_role("button", name="Connect").click()


def state(page):
    return page.get_by_role("status").first


def feed(page):
    return page.get_by_role("log", name="Feed")


def publish(site, topic, data):
    body = json.dumps({"topics": [topic], "data": data}).encode()
    headers = {"content-type": "application/json", **bearer(token(**ALL))}
    urllib.request.urlopen(urllib.request.Request(f"{site.url}/publish", body, headers), timeout=10).close()


@pytest.mark.usefixtures("expects_failed_requests")
class TestToken:
    def test_every_part_shows_it(self, guarded, page, topic):
        """
        Without a token the page says what is missing; with one all of its parts work.
        """
        page.goto(f"{guarded.url}/?topic={topic}")
        expect(state(page)).to_have_text("Closed")
        expect(page.locator("#stream-problem")).to_contain_text("401")

        enter(page, f"{token('alice', seconds=3600, **ALL)}\n")

        expect(state(page)).to_have_text("Open")
        expect(page.locator("#stream-problem")).to_be_hidden()
        page.get_by_label("Topic", exact=True).fill(topic)
        page.get_by_label("Data").fill("by the form")
        page.get_by_role("button", name="Publish").click()
        expect(feed(page)).to_contain_text("by the form")
        page.get_by_label("To", exact=True).fill("alice")
        page.get_by_label("Notification", exact=True).fill("for alice")
        page.get_by_role("button", name="Notify").click()
        expect(page.get_by_role("log", name="Your notifications")).to_have_text("for alice")
        page.get_by_label("Your message").fill("Hello")
        page.get_by_role("button", name="Ask").click()
        expect(page.get_by_role("log", name="Conversation").locator(".answer")).to_contain_text("This is")
        page.get_by_role("button", name="Watch").click()
        expect(page.locator("#figures tbody tr")).to_have_count(len(guarded.apps))

    def test_kept_in_memory_alone(self, guarded, page, context_storage, topic):
        """
        It is in no address, no storage, no command and no text of the page, and a reload forgets it.
        """
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        text = token("alice", seconds=3600, **ALL)
        page.goto(f"{guarded.url}/?topic={topic}")
        enter(page, text)
        expect(state(page)).to_have_text("Open")

        assert not [url for url in [page.url, *asked] if text in url]
        assert [] == context_storage()
        assert text not in page.content()
        assert "$TOKEN" in page.locator("#curl-listen").inner_text()
        page.reload()
        expect(state(page)).to_have_text("Closed")
        assert "" == page.get_by_label("Token").input_value()

    def test_renewed(self, guarded, page, topic):
        """
        Before it expires the page asks for a new one, and the open stream goes on with it.
        """
        page.goto(f"{guarded.url}/?topic={topic}")
        enter(page, token("alice", seconds=SECONDS, **ALL))
        expect(page.locator("#token-asked")).to_contain_text("expires soon")
        stream = page.locator("#stream").inner_text()
        streams = []
        page.on("request", lambda request: streams.append(request.url) if "/events" in request.url else None)

        with page.expect_response("**/streams/*/token") as answer:
            enter(page, token("alice", seconds=3600, **ALL))

        assert 200 == answer.value.status
        expect(page.locator("#token-asked")).to_be_empty()
        publish(guarded, topic, "goes on")
        expect(feed(page)).to_contain_text("goes on")
        assert stream == page.locator("#stream").inner_text()
        assert [] == streams

    def test_another_user(self, guarded, page, topic):
        """
        Another user's token opens another stream, with that user's notifications.
        """
        page.goto(f"{guarded.url}/?topic={topic}")
        enter(page, token("alice", seconds=3600, **ALL))
        expect(state(page)).to_have_text("Open")
        first = page.locator("#stream").inner_text()

        enter(page, token("bob", seconds=3600, **ALL))

        expect(page.locator("#stream")).not_to_have_text(first)
        expect(state(page)).to_have_text("Open")
        publish(guarded, "user:bob", "for bob")
        expect(feed(page)).to_contain_text("for bob")

    def test_tabs_of_two_users(self, guarded, page, topic):
        """
        Tabs share a stream with the same token, and never one of another user.
        """
        alice = token("alice", seconds=3600, **ALL)
        tabs = [page, page.context.new_page(), page.context.new_page()]
        for tab, text in zip(tabs, (alice, alice, token("bob", seconds=3600, **ALL)), strict=True):
            tab.goto(f"{guarded.url}/?topic={topic}")
            enter(tab, text)
            expect(state(tab)).to_have_text("Open")
        publish(guarded, "user:alice", "for alice alone")
        publish(guarded, topic, "for all")

        streams = []
        for tab in tabs:
            expect(feed(tab)).to_contain_text("for all")
            streams.append(tab.locator("#stream").inner_text())
        assert streams[0] == streams[1] != streams[2]
        assert ["for alice alone"] == [
            text for text in feed(tabs[1]).locator("li.event .data").all_inner_texts() if "alone" in text
        ]
        assert "alone" not in feed(tabs[2]).inner_text()

    def test_no_token(self, guarded, page, topic):
        """
        What is no token is said to be none, and stays text.
        """
        page.goto(f"{guarded.url}/?topic={topic}")
        expect(state(page)).to_have_text("Closed")

        for text in ("<img src=x onerror=alert(1)>", "two words", "größe"):
            enter(page, text)
            assert not page.get_by_label("Token").evaluate("field => field.validity.valid")
        assert 0 == page.locator("img").count()
        enter(page, "no.token")
        expect(state(page)).to_have_text("Closed")
        expect(page.locator("#stream-problem")).to_contain_text("401")


@pytest.fixture
def context_storage(page):
    """Return what the page's profile keeps of it: storage and cookies."""

    def kept():
        inside = page.evaluate("[...Object.entries(localStorage), ...Object.entries(sessionStorage), document.cookie]")
        return [each for each in inside if each] + page.context.cookies()

    return kept
