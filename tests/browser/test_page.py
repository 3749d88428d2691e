"""
The demonstration page at `/`, in Chromium, straight from nginx.

Elements are found by their labels and roles, as a screen reader finds them.
"""

import contextlib
import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import redis
from playwright.sync_api import expect

from app.stack import Stack

ROOT = Path(__file__).parents[2]

# Two busy cores make a browser wait for its turn.
expect.set_options(timeout=45_000)


def row(page, text):
    return page.get_by_role("log", name="Feed").locator("li.event").filter(has_text=text)


class TestFeed:
    def test_published_event(self, site, publish, page, topic):
        """
        An event is seen where it is published, as text.
        """
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")

        [id] = publish(site.url, {"topics": [topic], "data": "<img src=x onerror=alert(1)> 😀"})

        expect(row(page, "<img src=x onerror=alert(1)> 😀")).to_have_count(1)
        expect(page.locator("#position")).to_have_text(id)
        expect(page.get_by_role("log", name="Feed").locator("img")).to_have_count(0)

    def test_defaults(self, site, publish, page):
        """
        With nothing in its address the page shows what `make up` and `make feed` publish.
        """
        page.goto(f"{site.url}/")
        expect(page.get_by_role("status").first).to_have_text("Open")

        publish(
            site.url,
            {"topics": ["demo"], "event": "greeting", "data": "to demo"},
            {"topics": ["logs"], "data": "to logs"},
        )

        expect(row(page, "to demo").first).to_be_visible()
        expect(row(page, "to logs").first).to_be_visible()

    def test_named_event(self, site, publish, page, topic):
        """
        Events of every name are heard, without saying so before.
        """
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")

        publish(site.url, {"topics": [topic], "event": "order.created", "data": "an order"})

        expect(row(page, "an order")).to_contain_text("order.created")

    @pytest.mark.parametrize("name", ["error", "open"])
    def test_event_named_as_the_browsers_own(self, site, publish, page, topic, name):
        """
        An event published as `error` or `open` is an event, not a failure.
        """
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")

        publish(
            site.url,
            {"topics": [topic], "event": name, "data": "only a name"},
            {"topics": [topic], "data": "the next event"},
        )

        expect(row(page, "the next event")).to_have_count(1)
        expect(row(page, "only a name")).to_have_count(1)
        expect(page.get_by_role("log", name="Feed").locator("li.notice")).to_have_count(1)  # opened, once

    def test_event_made_to_harm(self, site, publish, page, topic):
        """
        Whatever types a publisher chooses: an event is a row of its own, and the stream goes on.
        """
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")
        no_text = {"toString": 1, "valueOf": 1}
        line = {"status": 200, "method": "GET", "path": "/"}

        publish(
            site.url,
            *({"topics": [topic], "data": line | {name: no_text}} for name in ("status", "method", "path", "time", "seconds")),
            {"topics": [topic], "event": "notification", "data": {"text": no_text}},
            {"topics": [topic], "event": "constructor", "data": "an event"},
            {"topics": [topic], "data": line | {"path": "/" + "x" * 100_000}},
            {"topics": [topic], "data": "the last"},
        )

        expect(row(page, "the last")).to_have_count(1)
        feed = page.get_by_role("log", name="Feed")
        expect(feed.locator("li.event")).to_have_count(9)
        expect(feed.locator("li.notice")).to_have_count(1)  # opened, once
        expect(row(page, "an event")).to_contain_text("constructor")
        expect(row(page, "xxx")).to_contain_text("characters, the first 20,000 shown")

    @pytest.mark.parametrize(("path", "seconds"), [("path", "seconds"), ("uri", "request_time")])
    def test_access_log_line(self, site, publish, page, topic, path, seconds):
        """
        A line of nginx's access log is readable, and whole when unfolded.
        """
        line = {
            "time": "2026-01-02T03:04:05+00:00",
            "status": 502,
            "method": "POST",
            path: "/publish",
            seconds: 0.012,
            "request_id": "5f0c",
        }
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")

        publish(site.url, {"topics": [topic], "data": json.dumps(line)})

        summary = row(page, "502").locator("summary")
        expect(summary).to_contain_text("502 POST /publish 12 ms")
        summary.click()
        expect(row(page, "502")).to_contain_text('"request_id": "5f0c"')

    def test_access_log_followed_live(self, site, page, topic, tmp_path):
        """
        A request to nginx is seen on the page while it still runs: log, topic, stream, browser.
        """
        with (tmp_path / "publish.log").open("wb") as said:
            tail = subprocess.Popen(
                ["tail", "-n", "0", "-F", site.nginx.access_log_path],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            # Past nginx: each line published through it would write another.
            command = ["-m", "app", "publish", "--topic", topic, "--json", "--url", site.apps[0].url]
            feed = subprocess.Popen(
                [sys.executable, *command], stdin=tail.stdout, stdout=said, stderr=said, cwd=ROOT
            )
        try:
            page.goto(f"{site.url}/?topic={topic}")
            expect(page.get_by_role("status").first).to_have_text("Open")

            # `tail` begins when it can: the first requests may come before it.
            for _ in range(100):
                with contextlib.suppress(urllib.error.HTTPError):
                    urllib.request.urlopen(f"{site.url}/no-such-page?secret=1")
                with contextlib.suppress(AssertionError):
                    expect(row(page, "404 GET /no-such-page").first).to_be_visible(timeout=200)
                    break

            expect(row(page, "404 GET /no-such-page").first).to_contain_text('"status": 404')
            assert "secret" not in page.get_by_role("log", name="Feed").inner_text()
        finally:
            tail.terminate()
            feed.terminate()
            tail.wait()
            feed.wait()

    def test_pause_filter_and_limit(self, site, publish, page, topic):
        """
        Paused rows wait, filtered ones hide, and old ones go.
        """
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")
        page.get_by_role("button", name="Pause").click()

        publish(site.url, *({"topics": [topic], "data": f"number {n:02}"} for n in range(20)))

        expect(page.locator("#count")).to_contain_text("waiting while paused")
        expect(row(page, "number")).to_have_count(0)
        page.get_by_role("button", name="Continue").click()
        expect(row(page, "number")).to_have_count(20)
        page.get_by_label("Filter").fill("NUMBER 07")
        expect(row(page, "number").locator("visible=true")).to_have_count(1)
        page.get_by_label("Filter").fill("")
        page.get_by_label("Rows kept").fill("5")
        page.get_by_label("Rows kept").press("Enter")
        expect(row(page, "number")).to_have_text([re.compile(f"number {n}$") for n in range(19, 14, -1)])

    @pytest.mark.usefixtures("expects_failed_requests")
    def test_killed_process(self, site, publish, page, topic, app_of):
        """
        The page says that it reconnects, and shows every event once.
        """
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")
        publish(site.url, {"topics": [topic], "data": "number 0"})
        expect(row(page, "number 0")).to_have_count(1)

        app_of(page.locator("#process").inner_text()).kill()
        publish(site.url, {"topics": [topic], "data": "number 1"})

        expect(page.get_by_role("log", name="Feed")).to_contain_text("Opened again")
        publish(site.url, {"topics": [topic], "data": "number 2"})
        expect(row(page, "number")).to_have_text([re.compile(f"number {n}$") for n in (2, 1, 0)])


    def test_lost_history(self, site, page, topic):
        """
        A loss that the server tells of is told to the reader.
        """
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")

        with socket.create_connection(("127.0.0.1", site.redis.port)) as redis:
            redis.sendall(b"FLUSHALL\r\n")
            assert b"+OK\r\n" == redis.recv(64)

        expect(page.get_by_role("log", name="Feed")).to_contain_text("History was lost")


class TestPublishForm:
    def test_event(self, site, page, topic):
        """
        What the form publishes arrives, also under a new name.
        """
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")

        page.get_by_label("Topic", exact=True).fill(topic)
        page.get_by_label("Event name").fill("greeting")
        page.get_by_label("Data").fill("hello\nworld")
        page.get_by_label("Data").press("Control+Enter")

        expect(page.locator("#published")).to_contain_text("Published as ")
        expect(row(page, "hello")).to_contain_text("greeting")

    @pytest.mark.usefixtures("expects_failed_requests")
    @pytest.mark.parametrize(
        ("field", "value"),
        [("Topic", "not a topic!"), ("Topic", ""), ("Event name", "stream.open")],
    )
    def test_refused(self, site, page, topic, field, value):
        """
        A refusal shows rule, value and cure, and marks the field.
        """
        page.goto(f"{site.url}/?topic={topic}")

        with page.expect_response("**/publish") as answer:
            page.get_by_label(field, exact=True).fill(value)
            page.get_by_role("button", name="Publish").click()

        problem = answer.value.json()
        shown = page.get_by_role("alert")
        expect(shown).to_contain_text(str(problem["status"]))
        for part in ("name", "rule", "value", "cure"):
            expect(shown).to_contain_text(str(problem[part]))
        expect(page.get_by_label(field, exact=True)).to_have_attribute("aria-invalid", "true")


class TestTerminal:
    def test_commands(self, site, page, topic, require):
        """
        Both commands work as they stand on the page.
        """
        require("curl")
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")

        listen = ["sh", "-c", "exec " + page.locator("#curl-listen").inner_text()]
        with subprocess.Popen(listen, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as curl:
            assert b"event: stream.open\n" in curl.stdout
            publish = ["sh", "-c", page.locator("#curl-publish").inner_text()]
            subprocess.run(publish, check=True, capture_output=True, timeout=15)
            assert b"data: hello\n" in curl.stdout
            curl.terminate()

        expect(row(page, "hello")).to_have_count(1)


class TestRefusedStream:
    @pytest.mark.usefixtures("expects_failed_requests")
    def test_topic(self, site, page, topic):
        """
        The page says why the browser gave the stream up, and can start again.
        """
        page.goto(f"{site.url}/?topic=not+a+topic!")

        expect(page.get_by_role("status").first).to_have_text("Closed")
        expect(page.get_by_role("alert")).to_contain_text("topic!")
        page.get_by_label("Topics", exact=True).fill(topic)
        page.get_by_role("button", name="Connect").click()
        expect(page.get_by_role("status").first).to_have_text("Open")
        expect(page.get_by_role("alert")).to_have_count(0)


# Each element with text of its own whose contrast with its ground is under 4.5
# (WCAG 2.2, 1.4.3), as [selector, contrast].
PALE_TEXT = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = channels(color).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if ((channels(color)[3] ?? 1) === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const pale = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility()) continue;
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) pale.push([element.id || element.className || element.tagName, contrast]);
  }
  return pale;
}"""


class TestLayout:
    @pytest.mark.parametrize("width", [360, 1280])
    def test_nothing_is_wider_than_the_screen(self, site, publish, page, topic, width):
        """
        No sideways scrolling, on a phone either.
        """
        page.set_viewport_size({"width": width, "height": 800})
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")
        publish(site.url, {"topics": [topic], "event": "x" * 100, "data": ""}, {"topics": [topic], "data": "y" * 5000})

        expect(row(page, "yyy")).to_have_count(1)
        for selector in ("html", "#feed"):
            shown, whole = page.locator(selector).evaluate("e => [e.clientWidth, e.scrollWidth]")
            assert shown == whole, selector

    @pytest.mark.usefixtures("expects_failed_requests")
    @pytest.mark.parametrize("colors", ["light", "dark"])
    def test_contrast(self, site, publish, page, topic, colors):
        """
        Text stands out from its ground, in both colour schemes.
        """
        page.emulate_media(color_scheme=colors)
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")
        lines = [{"status": status, "method": "GET", "path": "/"} for status in (200, 304, 404, 502)]
        publish(
            site.url,
            *({"topics": [topic], "data": line} for line in lines),
            {"topics": [topic], "event": "order.created", "data": ""},
        )
        page.get_by_label("Topic", exact=True).fill("not a topic!")
        page.get_by_role("button", name="Publish").click()
        expect(page.get_by_role("alert")).to_be_visible()
        expect(row(page, "order.created")).to_have_count(1)

        assert [] == page.evaluate(PALE_TEXT)

    def test_keyboard_alone(self, site, page, topic):
        """
        Every control is reached with the tab key.
        """
        page.goto(f"{site.url}/?topic={topic}")
        expect(page.get_by_role("status").first).to_have_text("Open")

        reached = []
        while True:
            page.keyboard.press("Tab")
            id = page.evaluate("document.activeElement.id || document.activeElement.textContent")
            if id in reached or page.evaluate("document.activeElement === document.body"):
                break
            reached.append(id)

        assert [
            "topics", "user", "token", "Connect", "pause", "clear", "filter", "rows", "announce", "feed",
            "publish-topic", "publish-event", "publish-data", "Publish",
            "notify-user", "notify-text", "Notify",
            "conversation", "prompt", "Ask", "path", "Start", "watch", "figures-scroll",
        ] == reached  # fmt: skip


class TestSecurity:
    def test_policy(self, site, page):
        """
        Nothing from elsewhere and nothing inline can run in the page.
        """
        answer = page.goto(f"{site.url}/")

        policy = answer.headers["content-security-policy"]
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'"} <= {
            rule.strip() for rule in policy.split(";")
        }


@pytest.fixture(scope="module")
def whole(require, tmp_path_factory):
    """A stack with files for tasks and nothing else to do; its processes may be killed."""
    require("redis-server", "valkey-server")
    require("nginx")
    root = tmp_path_factory.mktemp("root")
    (root / "large.bin").write_bytes(b"\0" * 60_000_000)
    (root / "small.txt").write_bytes(b"hello")
    with Stack(env={"SSE_RETRY_MS": "200", "SSE_TASK_ROOT": str(root), "SSE_DRAIN_SECONDS": "2"}) as stack:
        yield stack


def ask(page, text):
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Ask").click()
    return page.get_by_role("log", name="Conversation").locator(".answer").last


def maker_of(stack, page):
    """The process that makes the run of this page: its POST is read from there. Others may still make another."""
    told = page.locator("#chat-told")
    expect(told).to_contain_text("Read from process")
    process = re.search(r"Read from process (\w+)", told.inner_text())[1]
    for app in stack.apps:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{app.url}/healthz") as answer:
            if json.load(answer)["process"] == process:
                return app
    raise AssertionError(f"no process is {process}")


def samples(app):
    with urllib.request.urlopen(app.metrics_url) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("sse_")}


class TestChat:
    def test_streams(self, whole, page):
        """
        An answer grows word by word, and the next question knows it.
        """
        page.goto(f"{whole.url}/")
        answer = ask(page, "Hello kit")

        expect(answer).to_contain_text("This is the kit")
        expect(page.get_by_role("button", name="Stop answering")).to_be_enabled()
        expect(answer).to_contain_text("You wrote 2 words: Hello kit")
        expect(page.get_by_role("button", name="Ask")).to_be_enabled()

    def test_by_keyboard(self, whole, page):
        """
        The focus moves on to what can be done, and no second question is asked while one is answered.
        """
        page.goto(f"{whole.url}/")
        page.get_by_label("Your message").fill("word " * 200)
        page.get_by_role("button", name="Ask").press("Enter")
        expect(page.get_by_role("button", name="Stop answering")).to_be_focused()
        expect(page.get_by_role("log", name="Conversation")).to_have_attribute("aria-busy", "true")

        page.get_by_label("Your message").fill("another")
        page.get_by_label("Your message").press("Control+Enter")
        expect(page.get_by_role("log", name="Conversation").locator(".answer")).to_contain_text("This is")
        page.get_by_role("button", name="Stop answering").press("Enter")

        expect(page.get_by_role("button", name="Ask")).to_be_focused()
        expect(page.get_by_role("log", name="Conversation")).not_to_have_attribute("aria-busy", "true")
        expect(page.get_by_role("log", name="Conversation").locator(".asked")).to_have_count(1)
        expect(page.get_by_label("Your message")).to_have_value("another")

    @pytest.mark.usefixtures("expects_failed_requests")
    def test_refused(self, whole, page):
        """
        What could not be asked is in its field again, and the page says why.
        """
        problem = {"title": "Forbidden", "name": "kind", "rule": "needs a right", "cure": "Ask for a token."}
        page.route("**/runs", lambda route: route.fulfill(status=403, json=problem, content_type="application/problem+json"))
        page.goto(f"{whole.url}/")

        ask(page, "Hello kit")

        expect(page.get_by_role("alert")).to_contain_text("Ask for a token.")
        expect(page.get_by_label("Your message")).to_have_value("Hello kit")
        expect(page.get_by_role("log", name="Conversation")).to_be_empty()

    def test_stopped(self, whole, page):
        """
        Stopping ends the run on the server too.
        """
        page.goto(f"{whole.url}/")
        answer = ask(page, "word " * 500)
        expect(answer).to_contain_text("This is")
        maker = maker_of(whole, page)

        page.get_by_role("button", name="Stop answering").click()

        expect(page.get_by_role("button", name="Ask")).to_be_enabled()
        for _ in range(200):
            if samples(maker)["sse_runs_open"] == 0:
                break
            time.sleep(0.05)
        assert 'sse_runs_ended_total{how="cancelled"}' in samples(maker)

    @pytest.mark.usefixtures("expects_failed_requests")
    def test_killed_process(self, whole, page):
        """
        When the process that answers is killed, another one answers before the reader's eyes.
        """
        page.goto(f"{whole.url}/")
        answer = ask(page, "word " * 150)
        expect(answer).to_contain_text("This is the kit")
        maker = maker_of(whole, page)

        maker.kill()

        expect(page.locator("#chat-told")).to_contain_text("was lost. Asked again.")
        expect(answer).to_contain_text("You wrote 150 words", timeout=60_000)
        maker.start()
        maker.wait_ready()

    def test_drained_process(self, whole, page):
        """
        When the process that answers is stopped, the text goes on from another without a gap.
        """
        page.goto(f"{whole.url}/")
        answer = ask(page, "word " * 100)
        expect(answer).to_contain_text("This is the kit")
        maker = maker_of(whole, page)

        stopping = threading.Thread(target=maker.restart)
        stopping.start()

        expect(page.locator("#chat-told")).to_contain_text("Goes on by process")
        expect(answer).to_have_text(re.compile(r"^This is the kit's offline .* You wrote 100 words: (word ?){100}$"))
        stopping.join()


class TestTask:
    def test_progress_and_result(self, whole, page):
        """
        The bar reaches its end, and the result is that of sha256sum.
        """
        page.goto(f"{whole.url}/")
        page.get_by_role("button", name="Start").click()

        expect(page.locator("#result")).to_contain_text(f"{hashlib.sha256(b'hello').hexdigest()}  small.txt")
        assert 100 == page.locator("#progress").evaluate("bar => bar.value")
        expect(page.locator("#stage")).to_have_text("done")
        expect(page.locator("#stage")).not_to_have_attribute("aria-busy", "true")

    def test_failure(self, whole, page):
        """
        A task that fails says rule and cure.
        """
        page.goto(f"{whole.url}/")
        page.get_by_label("Checksums of").fill("../..")
        page.get_by_role("button", name="Start").click()

        expect(page.get_by_role("alert")).to_contain_text("must be below SSE_TASK_ROOT")


class TestNotifications:
    def test_one_user(self, whole, page, driven_chromium):
        """
        A notification reaches that user and nobody else.
        """
        page.goto(f"{whole.url}/?user=alice")
        other = driven_chromium.new_context().new_page()
        other.goto(f"{whole.url}/?user=bob")
        for each in (page, other):
            expect(each.get_by_role("status").first).to_have_text("Open")

        for user in ("alice", "bob"):
            page.get_by_label("To", exact=True).fill(user)
            page.get_by_label("Notification", exact=True).fill(f"for {user} alone")
            page.get_by_role("button", name="Notify").click()
            expect(page.locator("#notified")).to_have_text(f"{user} is notified.")

        expect(page.get_by_role("log", name="Your notifications")).to_have_text("for alice alone")
        expect(other.get_by_role("log", name="Your notifications")).to_have_text("for bob alone")
        other.context.close()


class TestTabs:
    def test_one_stream(self, whole, page):
        """
        A second tab of the same page opens no second stream.
        """
        page.goto(f"{whole.url}/?topic=tabs")
        expect(page.get_by_role("status").first).to_have_text("Open")
        count = sum(samples(app)["sse_streams_open"] for app in whole.apps)

        second = page.context.new_page()
        second.goto(f"{whole.url}/?topic=tabs")

        expect(second.get_by_role("status").first).to_have_text("Open")
        assert count == sum(samples(app)["sse_streams_open"] for app in whole.apps)


class TestOperator:
    def test_equal_to_the_metrics(self, whole, publish, page, topic):
        """
        Every process has its row, with the figures that its /metrics has.
        """
        page.goto(f"{whole.url}/?topic={topic}")
        page.get_by_role("button", name="Watch").click()
        rows = page.locator("#figures tbody tr")
        expect(rows).to_have_count(len(whole.apps))
        publish(whole.url, {"topics": [topic], "data": "counted"})

        for app in whole.apps:
            with urllib.request.urlopen(f"{app.url}/readyz") as answer:
                process = json.load(answer)["process"]
            row = rows.filter(has_text=process)
            told = samples(app)
            for figure, name in (("streams", "sse_streams_open"), ("opened", "sse_streams_opened_total")):
                expect(row.locator(f"[data-figure={figure}]")).to_have_text(f"{told[name]:,.0f}")
            for name, count in told.items():
                if count and (reason := re.fullmatch(r'sse_streams_ended_total\{reason="(\w+)"\}', name)):
                    expect(row.locator("[data-figure=ended]")).to_contain_text(f"{reason[1]} {count:,.0f}")

    def test_quiet_while_nobody_watches(self, whole, page):
        """
        Nothing is told when nobody looks.
        """
        page.goto(f"{whole.url}/")
        page.get_by_role("button", name="Watch").click()
        expect(page.locator("#figures tbody tr")).to_have_count(len(whole.apps))

        page.get_by_role("button", name="Stop watching").click()

        expect(page.locator("#figures")).to_be_hidden()
        with redis.Redis(port=whole.redis.port) as client:
            key = "{sse}:control"
            for _ in range(24):
                last = client.xinfo_stream(key)["last-generated-id"]
                time.sleep(2.5)  # each process tells once a second
                if last == client.xinfo_stream(key)["last-generated-id"]:
                    break
            else:
                raise AssertionError("figures are told for ever")
