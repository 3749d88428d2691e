/*
 * Streams and runs of the kit, for browsers. An ES module without dependencies.
 *
 *   const stream = connect("/events", { topics: ["orders"], share: true });
 *   stream.on("created", (order) => show(order));
 *   for await (const { event, data } of run("/runs", { kind: "chat", prompt })) …
 *
 * EventSource where that is enough; fetch where headers must be sent, where all
 * names of events are wanted, and for runs. Types: sse-client.d.ts.
 */

// Until the server says otherwise (`retry:`, `stream.open`), in milliseconds.
const RETRY = 1_000;
const SILENCE = 45_000;
// Between attempts. Less would call a server that ends each stream at once in a tight loop.
const LEAST_WAIT = 50;
const MOST_WAIT = 30_000;
// Ids remembered for removing duplicates, when one connection follows another.
const REMEMBERED = 1_000;
// What EventSource must be told to listen to.
const NAMES = [
  "message", "run.token", "run.progress", "run.done", "run.failed",
  ..."open position reset draining evicted expiring expired".split(" ").map((name) => `stream.${name}`),
];
const LATER = [408, 425, 429];

const unique = () => Math.random().toString(36).slice(2) + Date.now().toString(36);

/** Bytes in, events out, cut anywhere; to the letter of the WHATWG text. */
export class Parser {
  lastEventId;
  retry; // milliseconds, once the server sent some
  #decoder = new TextDecoder(); // drops one byte order mark
  #id;
  #line = "";
  #afterCr = false;
  #event = "";
  #data = [];

  constructor(lastEventId = "") {
    this.lastEventId = this.#id = lastEventId;
  }

  feed(bytes) {
    let text = this.#decoder.decode(bytes, { stream: true });
    const events = [];
    if (!text) return events;
    // A CR ended its line at once; an LF that comes next belongs to it.
    if (this.#afterCr && text[0] === "\n") text = text.slice(1);
    this.#afterCr = text ? text.endsWith("\r") : false;
    const lines = text.split(/\r\n|\r|\n/);
    lines[0] = this.#line + lines[0];
    this.#line = lines.pop();
    for (const line of lines) {
      if (!line) {
        this.lastEventId = this.#id;
        if (this.#data.length) {
          events.push({ event: this.#event || "message", text: this.#data.join("\n"), id: this.#id });
        }
        this.#event = "";
        this.#data = [];
        continue;
      }
      const colon = line.indexOf(":");
      const name = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
      if (name === "data") this.#data.push(value);
      else if (name === "event") this.#event = value;
      else if (name === "id" && !value.includes("\0")) this.#id = value;
      else if (name === "retry" && /^\d+$/.test(value)) this.retry = Math.min(Number(value), 1e15);
    }
    return events;
  }
}

/** One event. `data` is its text read as JSON, or the text itself where it is none. */
class Message {
  #data;

  constructor({ event, text, id }) {
    Object.assign(this, { event, text, id });
  }

  get data() {
    if (this.#data === undefined) {
      try {
        this.#data = JSON.parse(this.text);
      } catch {
        this.#data = this.text;
      }
    }
    return this.#data;
  }
}

/** Why a stream closed for good, or a run failed: a problem document's words. */
export class StreamError extends Error {
  constructor(problem) {
    super(problem.detail ?? problem.title ?? "the stream failed");
    this.name = "StreamError";
    this.problem = problem;
  }
}

/** Follow topics. Reconnects and resumes until `close`. */
export const connect = (url, options) => new Stream(url, options);

/** Start a run and follow it to its end: `for await (const { event, data } of run(…))`. */
export const run = (url, body, options) => new Stream(url, { ...options, body });

/** Follow a run that was started before; `lastEventId: "earliest"` reads it from its beginning. */
export const follow = (url, options) => new Stream(url, { ...options, body: null });

export class Stream {
  state = "new"; // connecting, open, paused, closed
  lastEventId;
  opened = null; // what `stream.open` told: stream, process, topics, heartbeat_seconds
  error = null; // a StreamError, if that closed it
  #url;
  #options;
  #native;
  #run; // it has an end
  #key = unique(); // of a run's POST, so that repeating it starts no second one
  #handlers = new Map();
  #names = new Set(NAMES);
  #link = null; // the connection
  #next = null; // the one that takes over
  #seen = new Map(); // id: the connection that brought it
  #failures = 0;
  #retry = RETRY;
  #silence = SILENCE;
  #timer;
  #channel = null; // to the other tabs
  #leader = false;
  #resign;
  #shown; // the token or ticket of the last request
  #refused; // the one that last got a 401
  #queue = null; // for `for await`
  #wake = () => {};

  constructor(url, options = {}) {
    this.#options = options;
    this.#url = new URL(url, globalThis.location?.href);
    for (const topic of options.topics ?? []) this.#url.searchParams.append("topic", topic);
    this.lastEventId = options.lastEventId ?? "";
    this.#run = options.body !== undefined;
    if (this.#run) this.#queue = [];
    const { mode, token, headers, ticket, share } = options;
    this.#native = mode ? mode === "eventsource" : !!ticket || !(token || headers || share || this.#run);
    this.#native &&= "EventSource" in globalThis;
    for (const [name, handler] of Object.entries(options.on ?? {})) this.on(name, handler);
    // A page in the back-forward cache holds no stream, and no lock.
    this.#listen("addEventListener");
    this.#begin();
  }

  /** Call `handler(data, message)` for each event of this name; "*" for all. Returns what undoes it. */
  on(name, handler) {
    if (!this.#handlers.has(name)) this.#handlers.set(name, new Set());
    this.#handlers.get(name).add(handler);
    if (name !== "*") this.#learn([name]);
    this.#channel?.postMessage({ names: [...this.#names] });
    return () => this.#handlers.get(name).delete(handler);
  }

  /** End it for good. */
  close() {
    this.#end(null);
  }

  /** Stop a run on the server, too. */
  async cancel() {
    // Before `stream.open` came, nobody knows its name.
    const url = this.#run && (this.#options.body === null || this.opened) ? this.#url : null;
    this.close();
    if (url) await this.#fetch(new URL(url.pathname.replace(/\/events$/, ""), url), { method: "DELETE" });
  }

  async *[Symbol.asyncIterator]() {
    this.#queue ??= [];
    try {
      for (;;) {
        while (this.#queue.length) yield this.#queue.shift();
        if (this.error) throw this.error;
        if (this.state === "closed") return;
        await new Promise((resolve) => (this.#wake = resolve));
      }
    } finally {
      this.close();
    }
  }

  // --- Connections

  #begin() {
    this.#set("connecting");
    if (this.#options.share && globalThis.navigator?.locks && globalThis.BroadcastChannel) this.#share();
    else this.#open();
  }

  /** Connect; beside a connection that still lives, as its successor. */
  #open(renew = false) {
    clearTimeout(this.#timer);
    const link = { from: unique(), shut: false, close() {}, learn() {} };
    if (this.#link) this.#next = link;
    else this.#link = link;
    const connect = this.#native ? this.#listenTo(link, renew) : this.#read(link, renew);
    connect.then((end) => end && this.#over(link, end), (error) => this.#over(link, { why: String(error) }));
  }

  #address() {
    const url = new URL(this.#url);
    if (this.lastEventId) url.searchParams.set("last_event_id", this.lastEventId);
    return url;
  }

  /** The kit's other addresses, also below a prefix. */
  #beside(path) {
    return new URL(this.#url.pathname.replace(/(events|runs\b.*)$/, path), this.#url);
  }

  /** The token, or the ticket, as the options say it. */
  async #shows(kind, renew) {
    let it = this.#options[kind];
    if (typeof it === "function") it = await it({ renew });
    this.#shown = it ?? this.#shown;
    return it;
  }

  async #fetch(url, { renew = false, headers, ...more } = {}) {
    const token = await this.#shows("token", renew);
    return fetch(url, {
      cache: "no-store",
      credentials: this.#options.credentials ?? "same-origin",
      headers: { ...this.#options.headers, ...(token && { Authorization: `Bearer ${token}` }), ...headers },
      ...more,
    });
  }

  /** An EventSource, which reconnects by itself until it gives up. */
  async #listenTo(link, renew) {
    const url = this.#address();
    let ticket = await this.#shows("ticket", renew);
    if (!ticket && this.#options.token) {
      const answer = await this.#fetch(this.#beside("tickets"), { method: "POST", renew });
      if (!answer.ok) return refusal(answer);
      ({ ticket } = await answer.json());
    }
    if (ticket) url.searchParams.set("ticket", ticket);
    if (link.shut) return;
    const source = new EventSource(url, { withCredentials: this.#options.credentials === "include" });
    const known = new Set();
    link.close = () => source.close();
    link.learn = (names) => {
      for (const name of names) {
        if (known.has(name)) continue;
        known.add(name);
        source.addEventListener(name, (event) => {
          // The browser's own `open` and `error` look like events of these names.
          if (!(event instanceof MessageEvent)) return;
          this.#got(link, { event: event.type, text: event.data, id: event.lastEventId });
        });
      }
    };
    link.learn(this.#names);
    return new Promise((end) => {
      source.addEventListener("error", async (event) => {
        if (event instanceof MessageEvent || link.shut) return;
        if (source.readyState !== EventSource.CLOSED && !(this.#next && link === this.#link)) {
          if (link === this.#link) this.#set("connecting");
          return;
        }
        // The browser hides why it gave up. HEAD takes none of the user's streams.
        source.close();
        const ask = (method) => this.#fetch(url, { method, headers: { Accept: "application/problem+json" } });
        try {
          let answer = await ask("HEAD");
          if (answer.status >= 400) answer = await ask("GET");
          if (answer.status === 200) answer.body?.cancel();
          end(answer.status === 200 ? {} : await refusal(answer));
        } catch {
          end({});
        }
      });
    });
  }

  /** A request of our own; returns how it ended. */
  async #read(link, renew) {
    const abort = new AbortController();
    let watch;
    const alive = () => {
      clearTimeout(watch);
      if (!link.shut) watch = setTimeout(() => abort.abort(), this.#silence);
    };
    link.close = () => {
      clearTimeout(watch);
      abort.abort();
    };
    alive();
    const start = this.#options.body && !this.opened;
    const headers = { Accept: "text/event-stream, application/problem+json" };
    if (start) Object.assign(headers, { "Content-Type": "application/json", "Idempotency-Key": this.#key });
    const answer = await this.#fetch(this.#address(), {
      renew,
      headers,
      signal: abort.signal,
      ...(start && { method: "POST", body: JSON.stringify(this.#options.body) }),
    });
    if (!answer.headers.get("Content-Type")?.startsWith("text/event-stream")) return refusal(answer);
    const parser = new Parser(this.lastEventId);
    const reader = answer.body.getReader();
    for (;;) {
      alive();
      const { done, value } = await reader.read();
      if (done || link.shut) return {};
      for (const event of parser.feed(value)) this.#got(link, event);
      this.#retry = parser.retry ?? this.#retry;
    }
  }

  #got(link, message) {
    if (link.shut) return;
    if (link === this.#next && message.event === "stream.open") {
      // Only now: until then the old one brings what is published.
      this.#shut(this.#link);
      this.#link = link;
      this.#next = null;
    }
    this.#channel?.postMessage({ message, from: link.from });
    this.#take(message, link.from);
    if (link !== this.#link || this.#next) return;
    if (message.event === "stream.draining") this.#open();
    if (message.event === "stream.expiring") this.#renew();
  }

  /** A new token for the open stream; where that cannot be, a new stream with one. */
  async #renew() {
    if (this.#options.token && this.opened) {
      const url = this.#beside(`streams/${encodeURIComponent(this.opened.stream)}/token`);
      const answer = await this.#fetch(url, { method: "POST", renew: true }).catch(() => null);
      if (answer?.ok) return;
    }
    if (this.#link && !this.#next) this.#open(true);
  }

  #shut(link) {
    if (!link) return;
    link.shut = true;
    link.close();
  }

  #over(link, { status = 0, problem, after = 0, why }) {
    if (link.shut) return;
    this.#shut(link);
    if (link === this.#next) this.#next = null;
    else {
      this.#link = this.#next;
      this.#next = null;
      if (this.#link) return; // on its way already
      if (status === 204) return this.close();
      // Asked for another, it may have one: at once, and not the same again.
      const renewable = status === 401 && this.#failures < 2 && this.#shown !== this.#refused;
      if (status === 401) this.#refused = this.#shown;
      if (status >= 400 && status < 500 && !renewable && !LATER.includes(status)) return this.#end(new StreamError(problem));
      this.#set("connecting");
    }
    const wait = status === 401 ? LEAST_WAIT : Math.max(LEAST_WAIT, this.#retry, Math.min(MOST_WAIT, this.#retry * 2 ** this.#failures), after);
    this.#failures++;
    this.#timer = setTimeout(() => this.#open(status === 401), wait * (1 + Math.random() / 2));
  }

  // --- Events

  #take(message, from) {
    const { event, id } = message;
    if (id) this.lastEventId = id;
    if (event.startsWith("stream.")) {
      if (event === "stream.open") this.#isOpen(JSON.parse(message.text));
    } else if (id) {
      // An id of the same connection is no duplicate: events may go without an own one.
      if ((this.#seen.get(id) ?? from) !== from) return;
      this.#seen.set(id, from);
      if (this.#seen.size > REMEMBERED && !this.#next) this.#seen.delete(this.#seen.keys().next().value);
    }
    const told = new Message(message);
    for (const name of [event, "*"]) for (const handler of this.#handlers.get(name) ?? []) handler(told.data, told);
    if (event.startsWith("stream.")) return;
    this.#queue?.push(told);
    this.#wake();
    if (this.#run && event === "run.done") this.close();
    if (this.#run && event === "run.failed") this.#end(new StreamError(told.data));
  }

  #isOpen(opened) {
    if (this.#options.body && !this.opened) {
      const id = opened.topics[0].slice("run:".length);
      this.#url = new URL(`${this.#url.pathname}/${encodeURIComponent(id)}/events`, this.#url);
    }
    this.opened = opened;
    this.#failures = 0;
    this.#silence = 3_000 * opened.heartbeat_seconds || SILENCE;
    this.#set("open");
  }

  #learn(names) {
    for (const name of names) this.#names.add(name);
    this.#link?.learn(this.#names);
    this.#next?.learn(this.#names);
  }

  #set(state) {
    if (this.state === state) return;
    this.state = state;
    this.#options.onstate?.(state, this);
    if (this.#leader) this.#welcome();
  }

  #end(error) {
    if (this.state === "closed") return;
    this.#drop();
    this.#listen("removeEventListener");
    this.error = error;
    this.#set("closed");
    if (error) this.#options.onerror?.(error);
    this.#wake();
  }

  // --- One stream for all tabs: who holds the lock reads, the others are told

  #share() {
    const name = `sse ${this.#options.share === true ? this.#url : this.#options.share}`;
    const channel = (this.#channel = new BroadcastChannel(name));
    const leaving = new AbortController();
    this.#resign = () => leaving.abort();
    channel.onmessage = ({ data: { message, from, names, welcome } }) => {
      if (names) {
        this.#learn(names);
        if (this.#leader) this.#welcome();
      }
      if (this.#leader) return;
      if (message) this.#take(message, from);
      if (welcome) {
        this.lastEventId ||= welcome.lastEventId;
        this.opened = welcome.opened;
        this.#set(welcome.state);
      }
    };
    channel.postMessage({ names: [...this.#names] });
    navigator.locks.request(name, { signal: leaving.signal }, () => new Promise((resolve) => {
      if (leaving.signal.aborted) return resolve();
      this.#resign = resolve;
      this.#leader = true;
      this.#open();
    })).catch(() => {}); // it left before its turn came
  }

  #welcome() {
    const { state, opened, lastEventId } = this;
    this.#channel.postMessage({ welcome: { state, opened, lastEventId } });
  }

  // --- The page

  #listen(change) {
    for (const name of ["pagehide", "pageshow", "online"]) globalThis[change]?.(name, this.#page);
  }

  #page = ({ type, persisted }) => {
    if (type === "pagehide") {
      this.#drop();
      this.#set("paused");
    } else if (type === "pageshow" && persisted) this.#begin();
    // Do not sit out a long wait.
    else if (type === "online" && this.state === "connecting" && !this.#link && (this.#leader || !this.#channel)) this.#open();
  };

  #drop() {
    clearTimeout(this.#timer);
    this.#shut(this.#link);
    this.#shut(this.#next);
    this.#link = this.#next = null;
    this.#leader = false;
    this.#resign?.();
    this.#channel?.close();
    this.#channel = null;
  }
}

/** What an answer that is no stream says. */
async function refusal(answer) {
  const { status, headers } = answer;
  const problem = { status, title: `${status} ${answer.statusText}`.trim() };
  if (headers.get("Content-Type")?.includes("json")) Object.assign(problem, await answer.json().catch(() => null));
  return { status, problem, after: 1_000 * (Number(headers.get("Retry-After")) || 0) };
}
