/*
 * Streams and runs of the kit, for browsers. No dependencies. What each export
 * does, with an example: sse-client.d.ts.
 *
 * EventSource where that is enough; fetch where headers must be sent, where all
 * names of events are wanted, and for runs.
 */

// Until the server says otherwise (`retry:`, `stream.open`), in milliseconds.
const RETRY = 1_000;
const SILENCE = 45_000;
// Between attempts: no tight loop where a server ends each stream at once.
const LEAST_WAIT = 50;
const MOST_WAIT = 30_000;
// Whatever a server asks: a timer of 25 days fires at once.
const LONGEST_WAIT = 86_400_000;
// Ids, for removing duplicates.
const REMEMBERED = 1_000;
// For EventSource, which hears no others.
const NAMES = `message run.token run.progress run.done run.failed stream.open stream.position stream.reset
  stream.draining stream.evicted stream.expiring stream.expired`.split(/\s+/);

const unique = () => `${Math.random()}${Date.now()}`;
const isStream = (answer) => answer.headers.get("Content-Type")?.startsWith("text/event-stream");

// To the letter of the WHATWG text.
export class Parser {
  lastEventId;
  retry;
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

class Message {
  #data;

  constructor(sent) {
    Object.assign(this, sent);
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

export class StreamError extends Error {
  constructor(problem) {
    super(problem.detail ?? problem.title);
    this.name = "StreamError";
    this.problem = problem;
  }
}

export const connect = (url, options) => new Stream(url, options);
export const run = (url, body, options) => new Stream(url, { ...options, body });
export const follow = (url, options) => new Stream(url, { ...options, body: null });

export class Stream {
  state = "new";
  lastEventId;
  opened = null; // what `stream.open` told
  error = null;
  #url;
  #options;
  #native;
  #run; // it has an end
  #key = unique(); // of a run's POST, so that repeating it starts no second one
  #handlers = new Set();
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
  #held = null; // what the leader told while this tab reads by itself
  #resign;
  #shown; // the token or ticket of the last request
  #refused; // the one that last got a 401
  #queue; // for `for await`
  #wake = () => {};
  #moved; // told of a new state

  constructor(url, options = {}) {
    this.#options = options;
    this.#url = new URL(url, globalThis.location?.href);
    const { body, mode, token, headers, ticket, share, topics = [] } = options;
    for (const topic of typeof topics === "string" ? [topics] : topics) this.#url.searchParams.append("topic", topic);
    this.lastEventId = options.lastEventId ?? "";
    this.#run = body !== undefined;
    this.#queue = this.#run ? [] : null;
    this.#native = mode ? mode === "eventsource" : !!ticket || !(token || headers || share || this.#run);
    this.#native &&= "EventSource" in globalThis && !body;
    for (const [name, handler] of Object.entries(options.on ?? {})) this.on(name, handler);
    // A page that is frozen or in the cache holds no stream and no lock.
    this.#listen("addEventListener");
    this.#begin();
  }

  on(name, handler) {
    const entry = [name, handler];
    this.#handlers.add(entry);
    this.#learn([name]);
    this.#greet();
    return () => this.#handlers.delete(entry);
  }

  close() {
    this.#end(null);
  }

  async cancel() {
    const { body } = this.#options;
    // The server may have started it, and `stream.open` tells its name.
    if (body && !this.opened && this.state !== "closed") await new Promise((resolve) => (this.#moved = resolve));
    this.close();
    if (!this.#run || (body && !this.opened)) return;
    const { pathname, search } = this.#url;
    const url = new URL(pathname.replace(/\/events$/, "") + search, this.#url);
    const answer = await this.#fetch(url, { method: "DELETE" });
    if (!answer.ok) throw new StreamError((await refusal(answer)).problem);
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
    const { locks } = globalThis.navigator ?? {};
    if (this.#options.share && !this.#run && locks && globalThis.BroadcastChannel) this.#share(locks);
    else this.#open();
    // Last: who is told may close it.
    this.#set("connecting");
  }

  // Beside a connection that still lives, as its successor.
  #open(renew = false) {
    clearTimeout(this.#timer);
    const link = { from: unique(), shut: false, close() {}, learn() {} };
    if (this.#link) this.#next = link;
    else this.#link = link;
    const connect = this.#native ? this.#listenTo(link, renew) : this.#read(link, renew);
    connect.then((end) => end && this.#over(link, end), () => this.#over(link, {}));
  }

  #address() {
    const url = new URL(this.#url);
    if (this.lastEventId) url.searchParams.set("last_event_id", this.lastEventId);
    return url;
  }

  // Also below a prefix.
  #beside(path) {
    return new URL(this.#url.pathname.replace(/((operator|runs\/[^/]+)\/)?(events|runs)$/, path), this.#url);
  }

  async #shows(kind, renew) {
    let it = this.#options[kind];
    if (typeof it === "function") it = await it({ renew });
    this.#shown = it ?? this.#shown;
    return it;
  }

  async #fetch(url, { renew = false, headers, signal = () => AbortSignal.timeout(this.#silence), ...more } = {}) {
    const token = await this.#shows("token", renew);
    return fetch(url, {
      cache: "no-store",
      credentials: this.#options.credentials,
      headers: { ...this.#options.headers, ...(token && { Authorization: `Bearer ${token}` }), ...headers },
      signal: signal(), // only now: a token may take its time
      ...more,
    });
  }

  // An EventSource reconnects by itself, until it gives up.
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
    const hear = (event) => {
      // The browser's own `open` and `error` are none.
      if (!(event instanceof MessageEvent)) return;
      this.#got(link, { event: event.type, text: event.data, id: event.lastEventId });
    };
    link.close = () => source.close();
    // The same listener twice is one.
    link.learn = (names) => names.forEach((name) => source.addEventListener(name, hear));
    link.learn(this.#names);
    return new Promise((end) => {
      source.addEventListener("error", async (event) => {
        if (event instanceof MessageEvent || link.shut) return;
        if (source.readyState < EventSource.CLOSED && !(this.#next && link === this.#link)) {
          if (link === this.#link) this.#set("connecting");
          return;
        }
        // The browser hides why. HEAD takes none of the user's streams.
        source.close();
        const ask = (method) => this.#fetch(url, { method, headers: { Accept: "application/problem+json" } });
        try {
          let answer = await ask("HEAD");
          if (answer.status >= 400) answer = await ask("GET");
          if (!isStream(answer)) return end(await refusal(answer));
          answer.body?.cancel();
        } catch {}
        end({});
      });
    });
  }

  async #read(link, renew) {
    const abort = new AbortController();
    let watch;
    const alive = () => {
      clearTimeout(watch);
      if (!link.shut) watch = setTimeout(() => abort.abort(), this.#silence);
      return abort.signal;
    };
    link.close = () => {
      clearTimeout(watch);
      abort.abort();
    };
    const start = this.#options.body && !this.opened;
    const headers = { Accept: "text/event-stream, application/problem+json" };
    if (start) Object.assign(headers, { "Content-Type": "application/json", "Idempotency-Key": this.#key });
    const answer = await this.#fetch(this.#address(), {
      renew,
      headers,
      signal: alive,
      ...(start && { method: "POST", body: JSON.stringify(this.#options.body) }),
    });
    if (!isStream(answer)) return refusal(answer);
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
      // Until now the old one brought what was published.
      this.#shut(this.#link);
      this.#link = link;
      this.#next = null;
    }
    this.#take(message, link.from);
    this.#join();
    if (link !== this.#link || this.#next) return;
    if (message.event === "stream.draining") this.#open();
    if (message.event === "stream.expiring") this.#renew();
  }

  // A new token for the open stream, or else a new stream with one.
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

  #over(link, { status = 0, problem, after = 0 }) {
    if (link.shut) return;
    this.#shut(link);
    let renewable = false;
    if (link === this.#next) this.#next = null;
    else {
      this.#link = this.#next;
      this.#next = null;
      if (this.#link) return; // on its way already
      if (status === 204) return this.close();
      // Asked for another, it may have one: at once, and not the same again.
      renewable = status === 401 && this.#failures < 2 && this.#shown !== this.#refused;
      if (status === 401) this.#refused = this.#shown;
      // 200 and no stream: a wrong address, or later on a network's login page.
      if (status < 300 ? status && !this.opened : status < 500 && !renewable && ![408, 425, 429].includes(status)) {
        return this.#end(new StreamError(problem));
      }
    }
    const least = Math.max(LEAST_WAIT, this.#retry, after);
    const wait = renewable ? LEAST_WAIT : Math.max(least, Math.min(MOST_WAIT, least * 2 ** this.#failures));
    this.#failures++;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#open(status === 401), Math.min(wait, LONGEST_WAIT) * (1 + Math.random() / 2));
    if (!this.#link) this.#set("connecting");
  }

  // --- Events

  #take(message, from) {
    const { event, id } = message;
    const own = event.startsWith("stream.");
    if (id && !own) {
      // An id of the same connection is no duplicate: events may go without an own one.
      if ((this.#seen.get(id) ?? from) !== from) return;
      this.#seen.set(id, from);
      if (this.#seen.size > REMEMBERED && !this.#next) this.#seen.delete(this.#seen.keys().next().value);
    }
    if (id) this.lastEventId = id;
    if (this.#leader) this.#channel.postMessage({ message, from });
    if (event === "stream.open") this.#isOpen(JSON.parse(message.text));
    const told = new Message(message);
    for (const [name, handler] of this.#handlers) if (name === event || name === "*") tell(handler, told.data, told);
    if (own) return;
    this.#queue?.push(told);
    this.#wake();
    if (this.#run && event === "run.done") this.close();
    if (this.#run && event === "run.failed") this.#end(new StreamError(told.data));
  }

  #isOpen(opened) {
    if (this.#options.body && !this.opened) {
      this.#url.pathname += `/${encodeURIComponent(opened.topics[0].slice("run:".length))}/events`;
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
    if (this.state === state || this.state === "closed") return;
    this.state = state;
    tell(this.#options.onstate, state, this);
    if (this.#leader) this.#welcome();
    this.#moved?.();
  }

  #end(error) {
    if (this.state === "closed") return;
    this.#drop();
    this.#listen("removeEventListener");
    this.error = error;
    this.#set("closed");
    if (error) tell(this.#options.onerror, error);
    this.#wake();
  }

  // --- One stream for all tabs: who holds the lock reads, and tells the others

  #share(locks) {
    const name = `sse ${this.#options.share === true ? this.#url : this.#options.share}`;
    const channel = (this.#channel = new BroadcastChannel(name));
    const leaving = new AbortController();
    let joined = false;
    this.#resign = () => leaving.abort();
    channel.onmessage = ({ data: { message, from, names, welcome } }) => {
      if (names) {
        this.#learn(names);
        if (this.#leader) this.#welcome();
      }
      if (this.#leader) return;
      if (welcome && !joined) {
        joined = true;
        if (this.lastEventId && this.lastEventId !== welcome.lastEventId) {
          // As after the cache: it reads by itself what the others had meanwhile.
          this.#held = [{ message: { event: "stream.position", text: "", id: welcome.lastEventId } }];
          this.#open();
          return this.#join();
        }
      }
      if (this.#held) {
        if (message && this.#held.push({ message, from }) > REMEMBERED) this.#held.shift();
        return this.#join();
      }
      if (message && joined) this.#take(message, from);
      if (welcome) {
        this.lastEventId ||= welcome.lastEventId;
        this.opened = welcome.opened;
        this.#set(welcome.state);
      }
    };
    this.#greet();
    locks.request(name, { signal: leaving.signal }, () => new Promise((resolve) => {
      if (leaving.signal.aborted) return resolve();
      this.#resign = resolve;
      this.#leader = true;
      this.#held = null;
      this.#welcome();
      if (!this.#link) this.#open();
    })).catch(() => {}); // it left before its turn came
  }

  // Once it stands where the leader stood, what the leader told since is enough.
  #join() {
    const held = this.#held;
    if (!held?.some(({ message }) => this.#seen.has(message.id) || message.id === this.lastEventId)) return;
    this.#held = null;
    this.#unlink();
    for (const { message, from } of held) this.#take(message, from);
    this.#greet();
  }

  #greet() {
    this.#channel?.postMessage({ names: [...this.#names] });
  }

  #welcome() {
    const { state, opened, lastEventId } = this;
    this.#channel.postMessage({ welcome: { state, opened, lastEventId } });
  }

  // --- The page

  #listen(change) {
    for (const name of ["pagehide", "pageshow", "freeze", "resume", "online"]) globalThis[change]?.(name, this.#page, true);
  }

  #page = ({ type }) => {
    if (type === "pagehide" || type === "freeze") {
      this.#drop();
      this.#set("paused");
    } else if (this.state === "paused") this.#begin();
    // Do not sit out a long wait.
    else if (this.state === "connecting" && !this.#link && (this.#leader || this.#held || !this.#channel)) this.#open();
  };

  #unlink() {
    clearTimeout(this.#timer);
    this.#shut(this.#link);
    this.#shut(this.#next);
    this.#link = this.#next = null;
  }

  #drop() {
    this.#unlink();
    this.#leader = false;
    this.#held = null;
    this.#resign?.();
    this.#channel?.close();
    this.#channel = null;
  }
}

async function refusal(answer) {
  const { ok, status, statusText, headers } = answer;
  const problem = { status, title: ok ? "the answer is no event stream" : `${status} ${statusText}`.trim() };
  if (headers.get("Content-Type")?.includes("json")) Object.assign(problem, await answer.json().catch(() => null));
  return { status, problem, after: 1_000 * (Number(headers.get("Retry-After")) || 0) };
}

// A handler that throws harms neither the stream nor others; the page hears of it.
function tell(handler, ...said) {
  try {
    handler?.(...said);
  } catch (error) {
    queueMicrotask(() => {
      throw error;
    });
  }
}
