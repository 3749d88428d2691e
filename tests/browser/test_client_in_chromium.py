"""
The browser client in Chromium, through nginx: what a page reads is what was published, whatever happens.

Pages stand at the gate, so a test sees every request for a stream and can cut one.
The parser's cases run here too; in Node they are in tests/test_sse_client_parser.py.
"""

import contextlib
import json
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from app.stack import Stack
from tests.browser import native
from tests.browser.gate import Gate
from tests.signing import SECRET, token

HERE = Path(__file__).parent
BOTH = pytest.mark.parametrize("mode", ["eventsource", "fetch"])
WAIT_SECONDS = 60

# Reads into `got` what the stream delivers, and into `states` what it says of itself.
START = """
async ([url, options, names]) => {
  const { connect } = await import("/static/sse-client.js");
  window.got = [];
  window.states = [];
  window.refused = null;
  window.stream = connect(url, {
    ...options,
    onstate: (state) => states.push(state),
    onerror: (error) => (refused = error.problem),
  });
  for (const name of names) stream.on(name, () => {});
  stream.on("*", (data, { event, text, id }) => got.push({ event, text, id }));
}
"""


class Tab:
    """A page that follows a stream by the client."""

    def __init__(self, page):
        self.page = page

    def start(self, topic, *, url="/events", names=(), **options):
        self.page.evaluate(START, [url, {"topics": [topic], **options}, list(names)])
        return self

    def wait(self, expression):
        """Wait until *expression* is true in the page; return its value."""
        try:
            return self.page.wait_for_function(expression, timeout=WAIT_SECONDS * 1000, polling=20).json_value()
        except Exception:
            print("in the page:", json.dumps(self.page.evaluate("({ got, states, refused })"))[-3000:])
            raise

    def wait_open(self, times=1):
        """Wait for the *times*-th `stream.open`; return what it told."""
        told = f"got.filter(({{ event }}) => event === 'stream.open')[{times - 1}]"
        return json.loads(self.wait(told)["text"])

    def wait_texts(self, *texts):
        """Wait until exactly *texts* were read, in this order."""
        last = json.dumps(texts[-1])
        self.wait(f"got.some(({{ event, text }}) => !event.startsWith('stream.') && text === {last})")
        assert list(texts) == self.texts()

    def texts(self):
        """What publishers sent, as it was read."""
        return self.page.evaluate("got.filter(({ event }) => !event.startsWith('stream.')).map(({ text }) => text)")

    def told(self, name):
        """Texts of the kit's own events of this name."""
        return self.page.evaluate("(name) => got.filter(({ event }) => event === name).map(({ text }) => text)", name)

    @property
    def states(self):
        return self.page.evaluate("states")


@pytest.fixture(scope="module")
def chromium(require):
    """
    Chromium as people have it: the driver's own flag against the back-forward cache is left out.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=require("chromium"),
            args=native.CHROMIUM_FLAGS,
            ignore_default_args=["--disable-back-forward-cache"],
        )
        yield browser
        browser.close()


@pytest.fixture
def gate(site):
    gate = Gate()
    gate.target = ("127.0.0.1", site.nginx.port)
    yield gate
    gate.close()


@pytest.fixture
def context(chromium):
    context = chromium.new_context()
    yield context
    context.close()


@pytest.fixture
def tab(context, gate):
    """Open a tab of one browser; they share storage, locks and channels."""

    def open_tab(path="/healthz"):
        page = context.new_page()
        page.goto(gate.url + path)
        return Tab(page)

    return open_tab


def streams_on(site):
    """How many streams the server has open, over all processes."""
    count = 0
    for app in site.apps:
        if app.alive:
            with urllib.request.urlopen(f"{app.url}/readyz") as answer:
                count += json.load(answer)["streams"]
    return count


def becomes(condition, what, seconds=WAIT_SECONDS):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@contextlib.contextmanager
def publishing(site, publish, topic):
    """Publish numbered events until the end of the block; gives what was sent so far."""
    over = threading.Event()
    sent = []

    def keep_publishing():
        while not over.wait(0.005):
            sent.append(f"event {len(sent)}")
            publish(site.url, {"topics": [topic], "data": sent[-1]})

    publisher = threading.Thread(target=keep_publishing)
    publisher.start()
    try:
        yield sent
    finally:
        over.set()
        publisher.join()


class TestParser:
    def test_the_shared_cases(self, tab):
        """
        Chromium reads the standard's cases as the application does.
        """
        cases = json.loads((HERE.parent / "parser_cases.json").read_text())
        check = (HERE.parent / "parser_cases.js").read_text().split("*/", 1)[1].strip().removesuffix(";")
        script = f"async (cases) => ({check})((await import('/static/sse-client.js')).Parser, cases)"

        told = tab().page.evaluate(script, cases)

        assert [] == told["wrong"]
        assert told["checked"] > 1000


class TestConnect:
    @BOTH
    def test_reads_what_is_published(self, site, gate, publish, tab, topic, mode):
        """
        Data comes as JSON where it is some, with its name and its id.
        """
        one = tab().start(topic, mode=mode, names=["created"])
        opened = one.wait_open()
        one.page.evaluate("void stream.on('created', (data, message) => (window.created = [data, message.id]))")

        ids = publish(
            site.url,
            {"topics": [topic], "event": "created", "data": {"id": 7}},
            {"topics": [topic], "data": "a\nb 😀"},
        )

        one.wait_texts('{"id":7}', "a\nb 😀")
        assert [{"id": 7}, ids[0]] == one.page.evaluate("created")
        assert ids[1] == one.page.evaluate("stream.lastEventId")
        assert topic in opened["topics"]
        assert ["connecting", "open"] == one.states

    def test_every_name_is_heard_by_fetch(self, site, gate, publish, tab, topic):
        """
        What EventSource needs a listener for, "*" hears by fetch.
        """
        one = tab().start(topic, mode="fetch")
        one.wait_open()

        publish(site.url, {"topics": [topic], "event": "nobody.listens", "data": "heard"})

        one.wait_texts("heard")

    @BOTH
    def test_event_named_error(self, site, publish, tab, topic, mode):
        """
        An event published as `error` is an event, and no failure of the stream.
        """
        one = tab().start(topic, mode=mode, names=["error"])
        one.wait_open()

        publish(site.url, {"topics": [topic], "event": "error", "data": "only a name"})

        one.wait_texts("only a name")
        assert ["connecting", "open"] == one.states

    @BOTH
    def test_close(self, site, tab, topic, mode):
        """
        The server learns at once that the page has left.
        """
        becomes(lambda: streams_on(site) == 0, "the end of other tests' streams")
        one = tab().start(topic, mode=mode)
        one.wait_open()
        assert 1 == streams_on(site)

        one.page.evaluate("stream.close()")

        becomes(lambda: streams_on(site) == 0, "the stream has ended")
        assert ["connecting", "open", "closed"] == one.states

    @BOTH
    def test_network_cut(self, site, gate, publish, tab, topic, mode):
        """
        A stream that breaks goes on where it stood: nothing lost, nothing twice.
        """
        one = tab().start(topic, mode=mode)
        one.wait_open()
        publish(site.url, {"topics": [topic], "data": "before"})
        one.wait_texts("before")

        gate.cut()
        publish(site.url, {"topics": [topic], "data": "meanwhile"})
        one.wait_open(2)
        publish(site.url, {"topics": [topic], "data": "after"})

        one.wait_texts("before", "meanwhile", "after")

    @BOTH
    def test_offline_and_online(self, site, context, gate, publish, tab, topic, mode):
        """
        Offline, the page says so by its state; online again, it reads what it missed.
        """
        one = tab().start(topic, mode=mode)
        one.wait_open()

        context.set_offline(True)
        gate.cut()
        one.wait("stream.state === 'connecting'")
        publish(site.url, {"topics": [topic], "data": "while offline"})
        context.set_offline(False)

        one.wait_texts("while offline")
        assert one.page.evaluate("navigator.onLine")

    def test_online_ends_a_long_wait(self, publish, site, context, gate, tab, topic):
        """
        A wait that has grown long is not sat out when the network is back.
        """
        one = tab().start(topic, mode="fetch")
        one.wait_open()
        publish(site.url, {"topics": [topic], "data": "slow", "retry": 3_600_000})
        one.wait_texts("slow")
        context.set_offline(True)
        gate.cut()
        one.wait("stream.state === 'connecting'")

        context.set_offline(False)

        one.wait_open(2)

    @BOTH
    def test_no_application_for_a_while(self, site, gate, publish, tab, topic, mode):
        """
        A 502 is no end: by EventSource nginx softens it, by fetch the client waits it out.
        """
        one = tab().start(topic, mode=mode)
        one.wait_open()
        for app in site.apps:
            app.kill()
        one.wait("stream.state === 'connecting'")
        count = len(gate.streams)
        with gate.changed:
            assert gate.changed.wait_for(lambda: len(gate.streams) >= count + 2, WAIT_SECONDS)

        for app in site.apps:
            app.start()
        for app in site.apps:
            app.wait_ready()

        one.wait_open(2)
        publish(site.url, {"topics": [topic], "data": "back"})
        one.wait_texts("back")

    @BOTH
    def test_refused_for_good(self, gate, tab, topic, mode):
        """
        What asking again would not change ends the stream, and says the rule that was broken.
        """
        one = tab().start("not a topic!", mode=mode)

        one.wait("stream.state === 'closed'")

        problem = one.page.evaluate("refused")
        assert (400, "topic", "not a topic!") == (problem["status"], problem["name"], problem["value"])
        assert len(gate.streams) <= 3

    def test_silence(self, tab):
        """
        By fetch, a stream without its heartbeat is left for a new one: the server may be frozen.
        """
        one = tab()
        one.page.evaluate(
            """async () => {
              const { connect } = await import("/static/sse-client.js");
              const open = 'event: stream.open\\ndata: {"heartbeat_seconds": 0.1, "topics": []}\\n\\n';
              window.asked = 0;
              window.fetch = async (url, { signal }) => {
                asked += 1;
                const body = new ReadableStream({
                  start(controller) {
                    controller.enqueue(new TextEncoder().encode(open));
                    signal.addEventListener("abort", () => controller.error(signal.reason));
                  },
                });
                return new Response(body, { headers: { "Content-Type": "text/event-stream" } });
              };
              window.silent = connect("/events", { mode: "fetch", topics: ["any"] });
            }"""
        )

        one.wait("asked >= 2")


class TestMakeBeforeBreak:
    @BOTH
    def test_drain(self, site, gate, publish, tab, topic, app_of, mode):
        """
        The successor is open before the drain ends the old stream, and each event is read once.
        """
        one = tab().start(topic, mode=mode)
        opened = one.wait_open()
        app = app_of(opened["process"])
        ended_before = []
        with publishing(site, publish, topic) as sent:
            becomes(lambda: len(sent) > 20, "some events")
            stopped = threading.Thread(target=app.stop, args=(60,))
            stopped.start()
            with gate.changed:
                assert gate.changed.wait_for(lambda: len(gate.streams) > 1, WAIT_SECONDS)
                ended_before.append(gate.streams[0].ended)
            successor = one.wait_open(2)
            becomes(lambda: gate.streams[0].ended, "the old stream ended")
            count = len(sent)
            becomes(lambda: len(sent) > count + 20, "some more events")
        stopped.join()

        one.wait_texts(*sent)
        assert [False] == ended_before
        assert opened["process"] != successor["process"]
        assert 2 == len(gate.streams)
        assert ["connecting", "open"] == one.states

    def test_duplicates(self, tab):
        """
        What the old stream brought while the new one opened comes once, in order; equal ids of one stream stay.
        """
        one = tab()
        one.page.evaluate(
            """async () => {
              const { connect } = await import("/static/sse-client.js");
              const block = (event, text, id) => `id: ${id}\\nevent: ${event}\\ndata: ${text}\\n\\n`;
              const open = block("stream.open", '{"heartbeat_seconds": 15, "topics": []}', "e:1");
              const bodies = [];
              window.say = (number, ...blocks) => bodies[number].enqueue(new TextEncoder().encode(blocks.join("")));
              window.block = block;
              window.open_ = open;
              window.bodies = bodies;
              window.asked = [];
              window.fetch = async (url) => {
                asked.push(new URL(url).searchParams.get("last_event_id"));
                const body = new ReadableStream({ start: (controller) => void bodies.push(controller) });
                return new Response(body, { headers: { "Content-Type": "text/event-stream" } });
              };
              window.read = [];
              window.stream = connect("/events", { mode: "fetch", on: { "*": (data, { event, text }) => {
                if (!event.startsWith("stream.")) read.push(text);
              } } });
            }"""
        )
        one.wait("bodies.length === 1")
        one.page.evaluate("say(0, open_, block('a', 'one', 'e:2'), block('a', 'same id', 'e:2'))")
        one.page.evaluate("say(0, 'event: stream.draining\\ndata: {}\\n\\n')")
        one.wait("bodies.length === 2")
        one.page.evaluate("say(0, block('a', 'two', 'e:3'), block('a', 'three', 'e:4'))")
        one.wait("read.length === 4")

        one.page.evaluate("say(1, open_, block('a', 'two', 'e:3'), block('a', 'three', 'e:4'), block('a', 'four', 'e:5'))")

        one.wait("read.includes('four')")
        assert ["one", "same id", "two", "three", "four"] == one.page.evaluate("read")
        assert [None, "e:2"] == one.page.evaluate("asked")


class TestBackForwardCache:
    @BOTH
    def test_page_comes_back(self, site, gate, publish, tab, topic, mode):
        """
        A page in the cache holds no stream; it comes back as it was, and goes on where it stood.
        """
        becomes(lambda: streams_on(site) == 0, "the end of other tests' streams")
        one = tab().start(topic, mode=mode)
        one.wait_open()
        publish(site.url, {"topics": [topic], "data": "seen"})
        one.wait_texts("seen")
        one.page.evaluate(
            "addEventListener('pageshow', ({ persisted }) => (window.persisted = persisted)); window.kept = 'alive'"
        )

        one.page.goto(gate.url + "/readyz")
        becomes(lambda: streams_on(site) == 0, "a page in the cache holds no stream")
        publish(site.url, {"topics": [topic], "data": "missed"})
        one.page.go_back(wait_until="commit")

        one.wait("window.persisted === true && kept === 'alive'")
        one.wait_texts("seen", "missed")
        assert "paused" in one.states

    def test_shared_stream_does_not_keep_a_page_out(self, site, gate, publish, tab, topic):
        """
        Locks and channels are let go of on the way into the cache.
        """
        one = tab().start(topic, share=True)
        one.wait_open()
        one.page.evaluate("addEventListener('pageshow', ({ persisted }) => (window.persisted = persisted))")

        one.page.goto(gate.url + "/readyz")
        publish(site.url, {"topics": [topic], "data": "missed"})
        one.page.go_back(wait_until="commit")

        one.wait("window.persisted === true")
        one.wait_texts("missed")

    def test_page_comes_back_to_other_tabs(self, site, gate, publish, tab, topic):
        """
        Another tab took over meanwhile: what it was told is not lost here, and soon there is one stream again.
        """
        becomes(lambda: streams_on(site) == 0, "the end of other tests' streams")
        one, other = (tab().start(topic, share=True) for _ in range(2))
        for each in (one, other):
            each.wait("stream.state === 'open'")
        publish(site.url, {"topics": [topic], "data": "seen"})
        one.wait_texts("seen")

        one.page.goto(gate.url + "/readyz")
        publish(site.url, {"topics": [topic], "data": "missed"})
        other.wait_texts("seen", "missed")
        one.page.go_back(wait_until="commit")

        one.wait_texts("seen", "missed")
        publish(site.url, {"topics": [topic], "data": "to both"})
        for each in (one, other):
            each.wait_texts("seen", "missed", "to both")
        becomes(lambda: streams_on(site) == 1, "one stream for both")
        publish(site.url, {"topics": [topic], "data": "and on"})
        one.wait_texts("seen", "missed", "to both", "and on")


class TestOneStreamForAllTabs:
    def test_five_tabs(self, site, gate, publish, tab, topic):
        """
        Five tabs are one stream on the server, and each reads everything.
        """
        becomes(lambda: streams_on(site) == 0, "the end of other tests' streams")
        tabs = [tab().start(topic, share=True) for _ in range(5)]
        for each in tabs:
            each.wait("stream.state === 'open'")

        publish(site.url, {"topics": [topic], "event": "any.name", "data": "to all"})

        for each in tabs:
            each.wait_texts("to all")
        assert 1 == len(gate.streams)
        assert 1 == streams_on(site)
        processes = {each.page.evaluate("stream.opened.process") for each in tabs}
        assert 1 == len(processes)

    def test_leader_closed(self, site, gate, publish, tab, topic):
        """
        When the tab that reads is closed another takes over; nobody loses or doubles an event.
        """
        becomes(lambda: streams_on(site) == 0, "the end of other tests' streams")
        tabs = [tab().start(topic, share=True) for _ in range(5)]
        for each in tabs:
            each.wait("stream.state === 'open'")
        with publishing(site, publish, topic) as sent:
            # Each in turn is the leader: locks are granted in the order they were asked for.
            for leader in tabs[:3]:
                count = len(sent)
                becomes(lambda count=count: len(sent) > count + 50, "some events")
                opens = len(gate.streams)
                leader.page.close()
                becomes(lambda opens=opens: len(gate.streams) == opens + 1, "another tab has taken over")

        for each in tabs[3:]:
            each.wait_texts(*sent)
        assert 4 == len(gate.streams)
        becomes(lambda: streams_on(site) == 1, "one stream is left")

    def test_tab_that_comes_later(self, site, gate, publish, tab, topic):
        """
        A new tab knows at once that the stream is open, and begins with the next event.
        """
        first = tab().start(topic, share=True)
        first.wait_open()
        publish(site.url, {"topics": [topic], "data": "before it came"})
        first.wait_texts("before it came")

        later = tab().start(topic, share=True)
        later.wait("stream.state === 'open'")
        publish(site.url, {"topics": [topic], "data": "after"})

        later.wait_texts("after")
        assert first.page.evaluate("stream.lastEventId") == later.page.evaluate("stream.lastEventId")
        assert 1 == len(gate.streams)

    def test_names_of_others_by_event_source(self, site, gate, publish, tab, topic):
        """
        Where the leader reads by EventSource it listens to the names that other tabs want.
        """
        first = tab().start(topic, share=True, mode="eventsource")
        first.wait_open()
        later = tab().start(topic, share=True, mode="eventsource", names=["wanted"])
        later.wait("stream.state === 'open'")

        publish(site.url, {"topics": [topic], "event": "wanted", "data": "heard"})

        later.wait_texts("heard")

    def test_other_streams_are_not_shared(self, site, gate, publish, tab, topic):
        """
        Another address is another stream.
        """
        first = tab().start(topic, share=True)
        first.wait_open()
        other = tab().start(topic + "-other", share=True)
        other.wait_open()

        publish(site.url, {"topics": [topic], "data": "a"}, {"topics": [topic + "-other"], "data": "b"})

        first.wait_texts("a")
        other.wait_texts("b")
        assert 2 == len(gate.streams)


@pytest.fixture(scope="module")
def guarded(require):
    """A stack that asks for tokens; those of the tests last some seconds."""
    require("redis-server", "valkey-server")
    require("nginx")
    env = {"SSE_AUTH": "jwt", "SSE_JWT_SECRET": SECRET, "SSE_JWT_LEEWAY_SECONDS": "0"}
    env |= {"SSE_EXPIRING_SECONDS": "3", "SSE_RETRY_MS": "200"}
    with Stack(env=env) as stack:
        yield stack


class TestTokens:
    """Pages whose server gives out tokens that last for seconds only."""

    @pytest.fixture
    def visitor(self, context, guarded):
        """A tab whose page gets its tokens from its own server, here the test."""
        gate = Gate()
        gate.target = ("127.0.0.1", guarded.nginx.port)
        asked = []

        def give(how):
            asked.append(how)
            return token("alice", seconds=6, subscribe=["*"], publish=["*"])

        page = context.new_page()
        page.goto(gate.url + "/healthz")
        page.expose_function("giveToken", give)
        page.asked = asked
        page.gate = gate
        yield Tab(page)
        gate.close()

    def start(self, one, topic, mode):
        one.page.evaluate(
            """async ([topic, mode]) => {
              const { connect } = await import("/static/sse-client.js");
              window.got = [];
              window.states = [];
              window.refused = null;
              window.stream = connect("/events", {
                topics: [topic], mode, token: (how) => giveToken(how),
                onstate: (state) => states.push(state), onerror: (error) => (refused = error.problem),
              });
              stream.on("*", (data, { event, text, id }) => got.push({ event, text, id }));
            }""",
            [topic, mode],
        )

    def publish(self, guarded, topic, data):
        headers = {"content-type": "application/json", "authorization": f"Bearer {token(publish=['*'])}"}
        body = json.dumps({"topics": [topic], "data": data}).encode()
        request = urllib.request.Request(f"{guarded.url}/publish", body, headers)
        urllib.request.urlopen(request, timeout=10).close()

    @BOTH
    def test_renewed_before_it_expires(self, guarded, visitor, topic, mode):
        """
        A stream outlives its token: by a new one in place, without a gap and without a second stream.
        """
        self.start(visitor, topic, mode)
        visitor.wait_open()

        # Two tokens have been used up when the third warning comes.
        visitor.wait("got.filter(({ event }) => event === 'stream.expiring').length >= 3")
        self.publish(guarded, topic, "still here")

        visitor.wait_texts("still here")
        assert [] == visitor.told("stream.expired")
        assert 1 == len(visitor.page.gate.streams)
        assert ["connecting", "open"] == visitor.states
        assert len(visitor.page.asked) >= 3

    @BOTH
    def test_expired(self, guarded, visitor, topic, mode):
        """
        Where no new token comes in time the stream ends, and goes on with the next one without a loss.
        """
        visitor.page.evaluate("void (window.late = true)")
        visitor.page.evaluate(
            """void (window.fetch = ((real) => (url, init) =>
                late && String(url).includes("/streams/") ? Promise.reject(new TypeError("cut")) : real(url, init)
            )(window.fetch))"""
        )
        self.start(visitor, topic, mode)
        visitor.wait_open()
        self.publish(guarded, topic, "before")
        visitor.wait_texts("before")

        visitor.wait_open(2)
        self.publish(guarded, topic, "after")

        visitor.wait_texts("before", "after")

    def test_refused_token(self, guarded, visitor, topic):
        """
        A token that stays bad ends the stream, with the server's own words.
        """
        visitor.page.evaluate("void (window.giveToken = () => (window.asked = (window.asked ?? 0) + 1) && 'not a token')")
        self.start(visitor, topic, "fetch")

        visitor.wait("stream.state === 'closed'")

        assert 401 == visitor.page.evaluate("refused.status")
        assert visitor.page.evaluate("refused.cure")
        # Asked for another one, it gave the same: there is nothing to wait for.
        assert 2 == visitor.page.evaluate("asked")

    @BOTH
    def test_token_after_a_refusal(self, guarded, visitor, topic, mode):
        """
        Where a token is refused, the next one opens the stream.
        """
        visitor.page.evaluate("""void (window.giveToken = ((good) => async (asked) => {
            const token = await good(asked);
            return asked.renew ? token : token.slice(0, -4) + "AAAA";
        })(window.giveToken))""")
        self.start(visitor, topic, mode)

        visitor.wait_open()
