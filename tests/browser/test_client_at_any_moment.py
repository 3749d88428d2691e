"""
The browser client in Chromium against a scripted server: what a page, a server or the other tabs may do at any moment.

The server is a `fetch` in the page, and timers go off when a test says so: nothing here waits for a clock.
"""

import pytest

# The server: `requests` has each request, and what a test has it say. Timers go off by `fire()`.
SCRIPT = """
async () => {
  const { connect, run, follow, StreamError } = await import("/static/sse-client.js");
  Object.assign(window, { connect, run, follow, StreamError });
  window.requests = [];
  window.thrown = [];
  addEventListener("error", (event) => { thrown.push(event.error.message); event.preventDefault(); });
  window.block = (event, text, id) => (id ? `id: ${id}\\n` : "") + `event: ${event}\\ndata: ${text}\\n\\n`;
  window.opening = (id, more = {}) =>
    block("stream.open", JSON.stringify({ stream: "p-1", process: "p", topics: ["t"], heartbeat_seconds: 15, ...more }), id);
  window.fetch = (url, { signal, method = "GET", headers = {}, ...more } = {}) => new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(signal.reason);
    const bytes = new TextEncoder();
    let body;
    const request = { url: new URL(url), method, headers, signal, ended: false, ...more,
      say(...blocks) { body.enqueue(bytes.encode(blocks.join(""))); },
      end() { request.ended = true; body.close(); },
      stream(...blocks) {
        resolve(new Response(new ReadableStream({ start: (it) => void (body = it) }),
          { headers: { "Content-Type": "text/event-stream" } }));
        if (blocks.length) request.say(...blocks);
      },
      answer(status, content = "", headers = {}) { request.ended = true; resolve(new Response(content, { status, headers })); },
      fail() { request.ended = true; reject(new TypeError("network")); },
    };
    signal?.addEventListener("abort", () => { request.ended = true; reject(signal.reason); body?.error(signal.reason); });
    requests.push(request);
  });
  let timers = [];
  window.waits = [];
  window.setTimeout = (done, wait) => { waits.push(wait); timers.push(done); return timers.length; };
  window.clearTimeout = (timer) => { if (timer) timers[timer - 1] = () => {}; };
  // All that has been set until now, each once.
  window.fire = () => { for (const [at, done] of [...timers.entries()]) { timers[at] = () => {}; done(); } };
  // The same for the newest alone.
  window.fireLast = () => { const done = timers.at(-1); timers[timers.length - 1] = () => {}; done(); };
  // Until all that has been begun is done: what comes after a message has had its turn.
  window.settle = async () => {
    for (let turn = 0; turn < 20; turn += 1) {
      await new Promise((done) => { const { port1, port2 } = new MessageChannel(); port1.onmessage = done; port2.postMessage(0); });
    }
  };
  window.until = async (condition) => {
    const end = performance.now() + 40_000;
    while (!condition()) {
      if (performance.now() > end) throw new Error(`never: ${condition}`);
      await settle();
    }
  };
  // Reads what a stream tells: texts of what was published, by `read`.
  window.reading = (options) => {
    const told = { read: [], states: [], refused: null };
    told.stream = connect("/events", { mode: "fetch", ...options,
      onstate: (state, it) => { told.states.push(state); options?.onstate?.(state, it); },
      onerror: (error) => { told.refused = error.problem; } });
    told.stream.on("*", (data, { event, text }) => event.startsWith("stream.") || told.read.push(text));
    return told;
  };
}
"""


@pytest.fixture(scope="module")
def address(driven_chromium, request):
    """Where the client is: a page that has nothing of its own."""
    site = request.getfixturevalue("kept_stack")
    return f"{site.url}/healthz"


@pytest.fixture
def script(driven_chromium, address):
    """Run an asynchronous function in a page that has the client and the scripted server."""
    context = driven_chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(45_000)
    page.goto(address)
    page.evaluate(SCRIPT)
    yield lambda text, argument=None: page.evaluate(text, argument)
    context.close()


class TestClose:
    @pytest.mark.parametrize("when", ["connecting", "open", "again"])
    def test_told_of_a_state(self, script, when):
        """
        A page that closes a stream when it hears of a state has closed it for good.
        """
        told = script(
            """async (when) => {
              let opens = 0;
              const told = reading({ onstate: (state, stream) => {
                opens += state === "open";
                if (when === "again" ? state === "connecting" && opens : state === when) stream.close();
              } });
              await settle();
              if (when !== "connecting") requests[0].stream(opening("e:1"), block("a", "one", "e:2"));
              await settle();
              if (when === "again") requests[0].end();
              await settle();
              const [count, open] = [requests.length, requests.filter(({ ended }) => !ended).length];
              fire();
              await settle();
              return { state: told.stream.state, last: told.states.at(-1), later: requests.length - count, open };
            }""",
            when,
        )

        assert {"state": "closed", "last": "closed", "later": 0, "open": 0} == told

    def test_while_a_token_is_fetched(self, script):
        """
        What a closed stream waited for begins no connection.
        """
        told = script(
            """async () => {
              let give;
              const { stream, states } = reading({ token: () => new Promise((done) => (give = done)) });
              await settle();
              stream.close();
              give("late");
              await settle();
              fire();
              await settle();
              return { states, open: requests.filter(({ signal, ended }) => !ended && !signal.aborted).length };
            }"""
        )

        assert {"states": ["connecting", "closed"], "open": 0} == told

    def test_while_a_successor_is_waited_for(self, script):
        """
        A successor that was refused, then the end of the old stream: no timer of either outlives `close`.
        """
        later = script(
            """async () => {
              const { stream } = reading();
              await settle();
              requests[0].stream(opening("e:1"), block("stream.draining", "{}"));
              await settle();
              requests[1].answer(503);
              await settle();
              requests[0].end();
              await settle();
              stream.close();
              fire();
              await settle();
              return requests.length - 2;
            }"""
        )

        assert 0 == later

    def test_leaving_the_loop(self, script):
        """
        Whoever leaves a `for await` early has closed the stream.
        """
        told = script(
            """async () => {
              const stream = run("/runs", { kind: "chat" });
              await settle();
              requests[0].stream(opening("e:1", { topics: ["run:r"] }), block("run.token", '{"text": "a"}', "e:2"));
              for await (const { data } of stream) if (data.text === "a") break;
              fire();
              await settle();
              return [stream.state, requests.length, requests[0].ended];
            }"""
        )

        assert ["closed", 1, True] == told


class TestHandlers:
    def test_one_that_throws(self, script):
        """
        It harms neither the stream nor other handlers, and the page's `error` event tells of it.
        """
        told = script(
            """async () => {
              const told = reading({
                on: { a: () => { throw new Error("in a handler"); } },
                onstate: () => { throw new Error("in onstate"); },
              });
              await settle();
              requests[0].stream(opening("e:1"), block("a", "one", "e:2"), block("b", "two", "e:3"));
              await settle();
              return { read: told.read, state: told.stream.state, requests: requests.length, thrown };
            }"""
        )

        assert ["one", "two"] == told["read"]
        assert ["in onstate", "in onstate", "in a handler"] == told["thrown"]
        assert ("open", 1) == (told["state"], told["requests"])


class TestWaits:
    @pytest.mark.parametrize("retry", [0, 1, 10**12])
    def test_growing_and_bounded(self, script, retry):
        """
        Whatever `retry:` says: waits grow while nobody answers, and none is longer than a timer can be.
        """
        waits = script(
            """async (retry) => {
              reading();
              await settle();
              requests[0].stream(`retry: ${retry}\\n\\n`);
              await settle();
              requests[0].end();
              const seen = [];
              for (let round = 0; round < 12; round += 1) {
                await settle();
                seen.push(waits.at(-1));
                fire();
                await settle();
                requests.at(-1).fail();
              }
              return seen;
            }""",
            retry,
        )

        assert min(waits) >= 50
        assert max(waits) < 2**31
        assert waits[-1] >= 20_000

    def test_successor_that_is_refused(self, script):
        """
        While the old stream lives, one whose token is refused is tried again at the pace of all failures.
        """
        seen = script(
            """async () => {
              reading({ token: () => "old" });
              await settle();
              requests[0].stream(opening("e:1"), block("stream.expiring", "{}"));
              await settle();
              requests[1].answer(401);
              const seen = [];
              for (let round = 2; round < 7; round += 1) {
                await settle();
                requests[round].answer(401);
                await settle();
                seen.push(waits.at(-1));
                fireLast();
                await settle();
              }
              return seen;
            }"""
        )

        assert seen[-1] > 8 * seen[0]

    def test_retry_after(self, script):
        """
        A proxy that asks for years is not asked again at once.
        """
        wait = script(
            """async () => {
              reading();
              await settle();
              requests[0].answer(503, "", { "Retry-After": "99999999" });
              await settle();
              return waits.at(-1);
            }"""
        )

        assert 60_000 < wait < 2**31


class TestTokens:
    def test_one_that_takes_its_time(self, script):
        """
        Somebody who logs in takes longer than a server may be silent, and is asked once.
        """
        told = script(
            """async () => {
              let asked = 0;
              let give;
              reading({ token: () => { asked += 1; return new Promise((done) => (give = done)); } });
              await settle();
              fire();
              give("late");
              await settle();
              return [asked, requests.length, requests[0].signal.aborted, requests[0].headers.Authorization];
            }"""
        )

        assert [1, 1, False, "Bearer late"] == told

    def test_one_that_fails(self, script):
        """
        It is asked again later.
        """
        told = script(
            """async () => {
              let asked = 0;
              const { states } = reading({ token: async () => {
                asked += 1;
                if (asked === 1) throw new Error("no token now");
                return "good";
              } });
              await settle();
              fire();
              await settle();
              return [asked, requests.length, states];
            }"""
        )

        assert [2, 1, ["connecting"]] == told

    def test_tickets_that_never_come(self, script):
        """
        A server that takes the request for a ticket and says nothing is asked again.
        """
        told = script(
            """async () => {
              const limits = [];
              AbortSignal.timeout = () => { const it = new AbortController(); limits.push(it); return it.signal; };
              const { stream } = reading({ mode: "eventsource", token: "t" });
              await settle();
              const first = requests.map(({ url, method }) => [method, url.pathname]);
              limits[0].abort(new DOMException("late", "TimeoutError"));
              await settle();
              fire();
              await settle();
              return { first, requests: requests.length, state: stream.state };
            }"""
        )

        assert {"first": [["POST", "/tickets"]], "requests": 2, "state": "connecting"} == told

    @pytest.mark.parametrize(
        ("path", "renewed"),
        [
            ("/events", "/streams/p-1/token"),
            ("/operator/events", "/streams/p-1/token"),
            ("/below/events", "/below/streams/p-1/token"),
            ("/runs-of-us/events", "/runs-of-us/streams/p-1/token"),
            ("/runs/r/events", "/streams/p-1/token"),
        ],
    )
    def test_where_it_is_renewed(self, script, path, renewed):
        """
        A token is renewed beside the stream, wherever that is.
        """
        told = script(
            """async (path) => {
              connect(path, { token: "t" });
              await settle();
              requests[0].stream(opening("e:1"), block("stream.expiring", '{"seconds": 1}'));
              await settle();
              return [requests[1].method, requests[1].url.pathname];
            }""",
            path,
        )

        assert ["POST", renewed] == told


class TestRefusal:
    def test_no_stream_at_all(self, script):
        """
        Where another site answers, the page hears so; where it is a network's login page, the stream waits it out.
        """
        told = script(
            """async () => {
              const wrong = reading();
              const later = reading();
              await settle();
              const page = [200, "<p>Welcome", { "Content-Type": "text/html" }];
              requests[0].answer(...page);
              requests[1].stream(opening("e:1"));
              await settle();
              requests[1].end();
              await settle();
              fire();
              await settle();
              requests[2].answer(...page);
              await settle();
              return [wrong.stream.state, wrong.refused.title, later.stream.state];
            }"""
        )

        assert ["closed", "the answer is no event stream", "connecting"] == told


class TestTopics:
    @pytest.mark.parametrize("topics", ["orders", ["orders"]])
    def test_one(self, script, topics):
        """
        One topic may be a text: it is not taken for its letters.
        """
        asked = script(
            """async (topics) => {
              reading({ topics });
              await settle();
              return requests[0].url.search;
            }""",
            topics,
        )

        assert "?topic=orders" == asked


class TestRuns:
    @pytest.mark.parametrize("options", [{"share": True}, {"mode": "eventsource"}])
    def test_each_is_its_own(self, script, options):
        """
        Options that are meant for streams start each run all the same, by POST.
        """
        asked = script(
            """async (options) => {
              for (const prompt of ["one", "two"]) run("/runs", { kind: "chat", prompt }, options);
              await settle();
              return requests.map(({ method, body }) => [method, JSON.parse(body).prompt]);
            }""",
            options,
        )

        assert [["POST", "one"], ["POST", "two"]] == asked

    def test_goes_on_with_its_query(self, script):
        """
        What the address says behind `?`, such as `user=` without tokens, is said again, and when it is cancelled.
        """
        asked = script(
            """async () => {
              const stream = run("/runs?user=ann", { kind: "chat" });
              await settle();
              requests[0].stream(opening("e:1", { topics: ["run:r/1"] }));
              await settle();
              requests[0].end();
              await settle();
              fire();
              await settle();
              void stream.cancel();
              await settle();
              return requests.map(({ method, url }) => `${method} ${url.pathname}${url.search}`);
            }"""
        )

        assert [
            "POST /runs?user=ann",
            "GET /runs/r%2F1/events?user=ann&last_event_id=e%3A1",
            "DELETE /runs/r%2F1?user=ann",
        ] == asked

    @pytest.mark.parametrize("lost", [False, True])
    def test_cancelled_before_it_is_known(self, script, lost):
        """
        The server has started it perhaps: it is cancelled as soon as it has a name.
        """
        asked = script(
            """async (lost) => {
              const stream = run("/runs", { kind: "chat" });
              await settle();
              const cancelled = stream.cancel();
              await settle();
              if (lost) {
                requests[0].fail();
                await settle();
                fire();
                await settle();
              }
              requests.at(-1).stream(opening("e:1", { topics: ["run:r"] }));
              await settle();
              requests.at(-1).answer(202, "{}");
              await cancelled;
              const keys = requests.map(({ headers }) => headers["Idempotency-Key"]).filter(Boolean);
              return [requests.map(({ method, url }) => `${method} ${url.pathname}`), new Set(keys).size, stream.state];
            }""",
            lost,
        )

        posts = ["POST /runs"] * (2 if lost else 1)
        assert [[*posts, "DELETE /runs/r"], 1, "closed"] == asked

    def test_cancelled_and_refused(self, script):
        """
        One that is not started has nothing to cancel; one that cannot be cancelled says why.
        """
        told = script(
            """async () => {
              const refused = run("/runs", { kind: "chat" });
              const known = follow("/runs/r/events");
              await settle();
              const first = refused.cancel();
              requests[0].answer(403, JSON.stringify({ title: "no" }), { "Content-Type": "application/problem+json" });
              await first;
              const second = known.cancel().catch(({ problem }) => problem);
              await settle();
              requests[2].answer(503, JSON.stringify({ cure: "later" }), { "Content-Type": "application/problem+json" });
              return [requests.map(({ method }) => method), (await second).cure];
            }"""
        )

        assert [["POST", "GET", "DELETE"], "later"] == told


class TestOtherTabs:
    """Several streams of one page stand for tabs: they talk by the same locks and channels."""

    def test_one_that_stood_elsewhere(self, script):
        """
        A tab that missed something reads it by itself, in order, and then shares again.
        """
        told = script(
            """async () => {
              const leader = reading({ share: "x" });
              await until(() => requests.length === 1);
              requests[0].stream(opening("e:0"), block("a", "1", "e:1"), block("a", "2", "e:2"), block("a", "3", "e:3"));
              await until(() => leader.read.length === 3);
              const back = reading({ share: "x", lastEventId: "e:1" });
              await until(() => requests.length === 2);
              requests[0].say(block("a", "4", "e:4"));
              await until(() => leader.read.includes("4"));
              requests[1].stream(opening("e:1"), block("a", "2", "e:2"), block("a", "3", "e:3"));
              await until(() => requests[1].ended);
              requests[0].say(block("a", "5", "e:5"));
              await until(() => back.read.includes("5"));
              return { asked: requests.map(({ url }) => url.searchParams.get("last_event_id")), leader: leader.read, back: back.read };
            }"""
        )

        assert [None, "e:1"] == told["asked"]
        assert list("12345") == told["leader"]
        assert list("2345") == told["back"]

    def test_one_beside_a_quiet_leader(self, script):
        """
        The same position is enough to share again, though no event comes.
        """
        told = script(
            """async () => {
              const leader = reading({ share: "x" });
              await until(() => requests.length === 1);
              requests[0].stream(opening("e:0"), block("stream.position", "", "p:1"));
              await until(() => leader.stream.lastEventId === "p:1");
              const back = reading({ share: "x", lastEventId: "e:0" });
              await until(() => requests.length === 2);
              requests[1].stream(opening("e:0"));
              await until(() => back.stream.state === "open");
              const before = requests[1].ended;
              requests[1].say(block("stream.position", "", "p:1"));
              await until(() => requests[1].ended);
              requests[0].say(block("a", "1", "e:1"));
              await until(() => back.read.includes("1"));
              return [before, back.read, back.stream.state];
            }"""
        )

        assert [False, ["1"], "open"] == told

    def test_one_that_is_ahead(self, script):
        """
        What it read by itself before the leader told it comes once.
        """
        read = script(
            """async () => {
              const leader = reading({ share: "x" });
              await until(() => requests.length === 1);
              requests[0].stream(opening("p:2"));
              await until(() => leader.stream.state === "open");
              const back = reading({ share: "x", lastEventId: "e:1" });
              await until(() => requests.length === 2);
              requests[1].stream(opening("e:1"), ...[2, 3, 4].map((n) => block("a", n, `e:${n}`)));
              await until(() => back.read.includes("4"));
              requests[0].say(...[3, 4, 5].map((n) => block("a", n, `e:${n}`)));
              await until(() => back.read.includes("5"));
              return [back.read, requests[1].ended];
            }"""
        )

        assert [list("2345"), True] == read

    def test_one_that_comes_while_a_successor_repeats(self, script):
        """
        What the leader has told already it does not tell again.
        """
        read = script(
            """async () => {
              const leader = reading({ share: "x" });
              await until(() => requests.length === 1);
              requests[0].stream(opening("e:1"), block("stream.draining", "{}"));
              await until(() => requests.length === 2);
              requests[0].say(block("a", "2", "e:2"), block("a", "3", "e:3"));
              await until(() => leader.read.length === 2);
              const late = reading({ share: "x" });
              await until(() => late.stream.state === "open");
              requests[1].stream(opening("e:1"), ...[2, 3, 4].map((n) => block("a", n, `e:${n}`)));
              await until(() => late.read.includes("4"));
              return [leader.read, late.read];
            }"""
        )

        assert [["2", "3", "4"], ["4"]] == read

    def test_leader_gone_while_one_comes(self, script):
        """
        Whoever asks nobody who leads is answered by the next leader.
        """
        told = script(
            """async () => {
              const leader = reading({ share: "x" });
              await until(() => requests.length === 1);
              requests[0].stream(opening("e:1"), block("a", "2", "e:2"));
              const second = reading({ share: "x" });
              await until(() => second.stream.state === "open");
              const third = reading({ share: "x" });
              leader.stream.close();
              await until(() => requests.length === 2);
              requests[1].stream(opening("e:2"), block("a", "3", "e:3"));
              await until(() => third.read.includes("3"));
              return [second.read, third.read, third.stream.state, requests.length];
            }"""
        )

        assert "3" == told[0][-1]
        assert ["3"] == told[1]
        assert ["open", 2] == told[2:]


class TestFrozen:
    @pytest.mark.parametrize("share", ["x", False])
    def test_page(self, script, share):
        """
        A page that is frozen holds no stream and keeps no other tab from reading; it goes on where it stood.
        """
        told = script(
            """async (share) => {
              const told = reading({ share });
              await until(() => requests.length === 1);
              requests[0].stream(opening("e:1"), block("a", "2", "e:2"));
              await until(() => told.read.length === 1);
              document.dispatchEvent(new Event("freeze"));
              await settle();
              const frozen = [told.stream.state, requests[0].ended];
              void navigator.locks.request("sse x", () => void frozen.push("lock is free"));
              await until(() => frozen.length === 3);
              document.dispatchEvent(new Event("resume"));
              dispatchEvent(new PageTransitionEvent("pageshow", { persisted: true }));
              await until(() => requests.length === 2);
              await settle();
              return [...frozen, requests.length, requests[1].url.searchParams.get("last_event_id"), told.states];
            }""",
            share,
        )

        assert ["paused", True, "lock is free", 2, "e:2"] == told[:5]
        assert ["connecting", "open", "paused", "connecting"] == told[5]
