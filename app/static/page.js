/*
 * The demonstration page: one native EventSource, shown as it happens.
 *
 * Everything that came from outside is inserted as text, never as markup.
 * https://html.spec.whatwg.org/multipage/server-sent-events.html
 */

const DEFAULT_TOPICS = ["demo", "logs"];
// The name that `make up` and the README publish first.
const DEFAULT_NAMES = ["greeting"];
const DEFAULT_ROWS = 200;
const MAX_ROWS = 5000;

// One event may be a megabyte: a row shows its beginning, unfolds to more, and
// says how much it leaves out.
const ROW_CHARACTERS = 400;
const UNFOLDED_CHARACTERS = 20000;

// Rows are inserted in batches: a busy log would otherwise lay the page out
// hundreds of times a second.
const FLUSH_MILLISECONDS = 50;

// Between attempts of this page's own reconnect, which starts where the
// browser's ends for ever: at any answer that is not a stream.
const FIRST_BACKOFF_MILLISECONDS = 1000;
const LAST_BACKOFF_MILLISECONDS = 30000;

// The kit's own events, and what each tells a person. `stream.position` only
// moves the position, and `stream.open` is handled on its own.
const NOTICES = {
  "stream.reset": "History was lost, so events may be missing here. Fetch your state again.",
  "stream.draining": "This process is shutting down. The stream ends soon and continues on another.",
  "stream.evicted": "A newer stream of the same user took this stream's place.",
  "stream.expiring": "The token expires soon.",
  "stream.expired": "The token expired.",
};
const KIT_EVENTS = [
  "message", "run.token", "run.progress", "run.done", "run.failed",
  "stream.open", "stream.position", ...Object.keys(NOTICES),
];

const STATES = {
  connecting: "Connecting",
  open: "Open",
  reconnecting: "Reconnecting",
  closed: "Closed",
};

const byId = (id) => document.getElementById(id);
const words = (text) => [...new Set(text.split(/\s+/).filter(Boolean))];
const integers = new Intl.NumberFormat("en");
const wholeSeconds = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const clock = new Intl.DateTimeFormat("en-GB", {
  hour: "2-digit", minute: "2-digit", second: "2-digit", fractionalSecondDigits: 3,
});

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// What the page shows, kept in its address: a reload and a shared link show
// the same.

const view = readView();

function readView() {
  const query = new URLSearchParams(location.search);
  const topics = query.getAll("topic").flatMap(words);
  const names = query.getAll("name").flatMap(words);
  return {
    topics: topics.length ? topics : DEFAULT_TOPICS,
    names: names.length ? names : [...DEFAULT_NAMES],
    user: query.get("user") ?? "",
    filter: query.get("filter") ?? "",
    rows: rowsKept(query.get("rows")),
  };
}

function rowsKept(text) {
  const rows = Number.parseInt(text, 10);
  return Number.isNaN(rows) ? DEFAULT_ROWS : Math.min(Math.max(rows, 1), MAX_ROWS);
}

function writeView() {
  const query = new URLSearchParams();
  for (const topic of view.topics) query.append("topic", topic);
  for (const name of view.names) query.append("name", name);
  if (view.user) query.set("user", view.user);
  if (view.filter) query.set("filter", view.filter);
  if (view.rows !== DEFAULT_ROWS) query.set("rows", view.rows);
  history.replaceState(null, "", `?${query}`);
}

// The stream.

let source = null;
let position = ""; // the last event id seen, as the browser keeps it
let backoff = FIRST_BACKOFF_MILLISECONDS;
let retryTimer = 0;
let everOpen = false;
const listening = new Set();

function streamUrl(resume) {
  const query = new URLSearchParams();
  for (const topic of view.topics) query.append("topic", topic);
  if (view.user) query.set("user", view.user);
  if (resume) query.set("last_event_id", resume);
  return `events?${query}`;
}

function connect() {
  disconnect();
  everOpen = false;
  setState("connecting");
  showProblem(byId("stream-problem"), null);
  // A position is of the log, not of a subscription, so a stream with other
  // topics continues where this one stood. On later reconnects the browser
  // sends Last-Event-ID, which the server prefers.
  source = new EventSource(streamUrl(position));
  source.addEventListener("error", onError);
  listening.clear();
  listen([...KIT_EVENTS, ...view.names]);
}

function disconnect() {
  clearTimeout(retryTimer);
  source?.close();
  source = null;
}

function listen(names) {
  for (const name of names) {
    if (listening.has(name)) continue;
    listening.add(name);
    source?.addEventListener(name, onEvent);
  }
}

function onEvent(event) {
  // The browser's own `open` and `error` look like events of these names.
  if (!(event instanceof MessageEvent)) return;
  if (event.lastEventId && event.lastEventId !== position) {
    position = event.lastEventId;
    byId("position").textContent = position;
  }
  if (event.type === "stream.position") return;
  if (event.type === "stream.open") return onOpen(event);
  if (event.type in NOTICES) {
    const told = parseObject(event.data)?.reason;
    return add(notice(event.type, NOTICES[event.type], told ?? event.data));
  }
  received += 1;
  add(row(event));
}

function onOpen(event) {
  const opened = parseObject(event.data) ?? {};
  const process = String(opened.process ?? "–");
  byId("process").textContent = process;
  byId("stream").textContent = String(opened.stream ?? "–");
  // Only this event makes the stream open: an answer 200 may also be the
  // server's way to say "come back later".
  backoff = FIRST_BACKOFF_MILLISECONDS;
  setState("open");
  add(notice("stream.open", `${everOpen ? "Opened again" : "Opened"} by process ${process}.`));
  everOpen = true;
}

function onError(event) {
  if (event instanceof MessageEvent) return; // published under that name
  if (source.readyState === EventSource.CONNECTING) {
    setState("reconnecting");
    return;
  }
  // Closed for ever by the browser, which hides the reason from EventSource.
  // Ask for it by an ordinary request.
  disconnect();
  setState("reconnecting");
  explain();
}

async function explain() {
  const headers = { Accept: "application/problem+json" };
  try {
    // HEAD first: it takes none of the user's streams if all is well again.
    const head = await fetch(streamUrl(""), { method: "HEAD", headers });
    if (!head.ok) {
      const answer = await fetch(streamUrl(""), { headers });
      if (answer.ok) {
        await answer.body?.cancel();
      } else {
        showProblem(byId("stream-problem"), await readProblem(answer));
        // The client's own mistake stays one; everything else may pass.
        if (answer.status < 500 && answer.status !== 429) {
          setState("closed");
          return;
        }
      }
    }
  } catch {
    // No answer at all: try again, as for an answer of 500 and above.
  }
  retryTimer = setTimeout(connect, backoff * (0.5 + Math.random() / 2));
  backoff = Math.min(backoff * 2, LAST_BACKOFF_MILLISECONDS);
}

function setState(state) {
  const shown = byId("state");
  if (shown.dataset.state === state && shown.textContent === STATES[state]) return;
  shown.dataset.state = state;
  shown.textContent = STATES[state];
}

// Rows.

const feed = byId("feed");
let received = 0;
let paused = false;
let waiting = []; // rows not yet in the feed, oldest first
let flushTimer = 0;

function row(event) {
  const item = element("li", "event");
  item.dataset.event = event.type;
  item.dataset.id = event.lastEventId;
  item.title = event.lastEventId;
  item.append(time(), element("span", "name", event.type), body(event.data));
  return item;
}

function notice(name, text, detail) {
  const item = element("li", "notice");
  item.dataset.event = name;
  const told = element("div", "data", text);
  if (detail) told.append(" ", element("span", "detail", detail));
  item.append(time(), element("span", "name", name), told);
  return item;
}

function time() {
  const now = new Date();
  const shown = element("time", "", clock.format(now));
  shown.dateTime = now.toISOString();
  return shown;
}

function body(data) {
  if (data === "") return element("div", "data none", "no data");
  const access = accessLogLine(data);
  if (access) return access;
  return text(data);
}

function text(data) {
  if (data.length <= ROW_CHARACTERS) return element("pre", "data", data);
  const said = `${integers.format(data.length)} characters`;
  const cut = data.length > UNFOLDED_CHARACTERS ? `, the first ${integers.format(UNFOLDED_CHARACTERS)} shown` : "";
  const beginning = `${data.slice(0, ROW_CHARACTERS / 2)}… `;
  const summary = element("summary", "", beginning);
  summary.append(element("span", "detail", said + cut));
  return folded("long", summary, element("pre", "", data.slice(0, UNFOLDED_CHARACTERS)));
}

function folded(className, summary, content) {
  const shown = element("details", `data ${className}`);
  shown.append(summary, content);
  return shown;
}

function accessLogLine(data) {
  const line = parseObject(data);
  // The kit's own nginx.conf writes path and seconds; others keep nginx's words.
  const path = line?.path ?? line?.uri;
  if (path === undefined || !("status" in line && "method" in line)) return null;
  const status = String(line.status);
  const summary = element("summary");
  summary.append(
    element("span", `status status-${status.charAt(0)}`, status), " ",
    element("span", "method", String(line.method)), " ",
    element("span", "path", String(path)),
  );
  const seconds = Number.parseFloat(line.seconds ?? line.request_time);
  if (!Number.isNaN(seconds)) summary.append(" ", element("span", "detail", duration(seconds)));
  const logged = new Date(line.time);
  if (!Number.isNaN(logged.getTime())) {
    summary.append(" ", element("span", "detail", `at ${wholeSeconds.format(logged)}`));
  }
  return folded("access", summary, element("pre", "", JSON.stringify(line, null, 2)));
}

function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

function parseObject(text) {
  if (!text.startsWith("{")) return null;
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function add(item) {
  waiting.push(item);
  // Older ones would be dropped by the limit anyway.
  if (waiting.length > view.rows) waiting.shift();
  if (!paused && !flushTimer) flushTimer = setTimeout(flush, FLUSH_MILLISECONDS);
  if (paused) showCount();
}

function flush() {
  flushTimer = 0;
  if (paused) return;
  for (const item of waiting) item.hidden = !matches(item);
  feed.prepend(...waiting.reverse());
  waiting = [];
  trim();
  showCount();
}

function trim() {
  while (feed.children.length > view.rows) feed.lastElementChild.remove();
}

function matches(item) {
  // Notices are about the stream itself, so no filter hides them.
  if (!view.filter || item.className === "notice") return true;
  return item.textContent.toLowerCase().includes(view.filter.toLowerCase());
}

function showCount() {
  const events = feed.querySelectorAll("li.event").length;
  const shown = feed.querySelectorAll("li.event:not([hidden])").length;
  const parts = [`${integers.format(received)} received`, `${integers.format(shown)} shown`];
  if (shown < events) parts.push(`${integers.format(events - shown)} filtered out`);
  if (paused) parts.push(`${integers.format(waiting.length)} waiting while paused`);
  byId("count").textContent = parts.join(" · ");
  byId("waiting").hidden = received > 0;
}

// Problems (RFC 9457): what was wrong, which value, and what to do.

async function readProblem(answer) {
  const title = `${answer.status} ${answer.statusText}`.trim();
  const type = answer.headers.get("content-type") ?? "";
  if (!type.includes("json")) return { title };
  try {
    return { title, ...(await answer.json()) };
  } catch {
    return { title };
  }
}

function showProblem(place, problem) {
  place.replaceChildren();
  place.hidden = !problem;
  if (!problem) return;
  const status = problem.status ? `${problem.status} ` : "";
  const title = String(problem.title ?? "The request failed");
  place.append(element("strong", "", title.startsWith(status) ? title : status + title));
  const { name, rule, value, cure, detail } = problem;
  if (name !== undefined && rule !== undefined) {
    const said = element("p");
    said.append(element("code", "", String(name)), ` ${rule}`);
    if (value !== undefined) said.append(", got ", element("code", "", shortened(value)));
    said.append(".");
    place.append(said);
  } else if (detail) {
    place.append(element("p", "", String(detail)));
  }
  if (cure) place.append(element("p", "", String(cure)));
}

function shortened(value) {
  const said = typeof value === "string" ? value : JSON.stringify(value);
  return said.length > 200 ? `${said.slice(0, 200)}…` : said;
}

// Publishing.

async function publish() {
  // Sent as typed: the server refuses what is wrong and says why.
  const topic = byId("publish-topic").value;
  const name = byId("publish-event").value;
  const said = { topics: [topic], data: byId("publish-data").value };
  if (name) said.event = name;

  // Listen before the request: the event may arrive before the answer.
  if (name) listen([name]);
  byId("published").textContent = "";
  showProblem(byId("publish-problem"), null);
  for (const field of ["topic", "event", "data"]) {
    byId(`publish-${field}`).removeAttribute("aria-invalid");
  }

  let answer;
  try {
    answer = await fetch("publish", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(said),
    });
  } catch (error) {
    return showProblem(byId("publish-problem"), {
      title: "No answer from the server",
      detail: String(error.message),
    });
  }
  if (!answer.ok) {
    const problem = await readProblem(answer);
    for (const field of ["topic", "event", "data"]) {
      if (new RegExp(`\\b${field}`).test(String(problem.name ?? ""))) {
        byId(`publish-${field}`).setAttribute("aria-invalid", "true");
      }
    }
    return showProblem(byId("publish-problem"), problem);
  }
  const { ids = [] } = await answer.json();
  const told = [`Published as ${ids.join(", ")}.`];
  if (!view.topics.includes(topic)) {
    told.push("This page does not follow that topic: add it to Topics to see the event.");
  }
  if (name && !KIT_EVENTS.includes(name) && !view.names.includes(name)) {
    view.names.push(name);
    byId("names").value = view.names.join(" ");
    writeView();
  }
  byId("published").textContent = told.join(" ");
}

// Wiring.

function showView() {
  byId("topics").value = view.topics.join(" ");
  byId("names").value = view.names.join(" ");
  byId("filter").value = view.filter;
  byId("rows").value = view.rows;
  showCommands();
}

function showCommands() {
  const base = new URL("./", location.href).href;
  const query = new URLSearchParams();
  for (const topic of view.topics) query.append("topic", topic);
  const first = JSON.stringify({ topics: view.topics.slice(0, 1), data: "hello" });
  byId("curl-listen").textContent = `curl -N ${quoted(`${base}events?${query}`)}`;
  byId("curl-publish").textContent =
    `curl ${base}publish \\\n  -H content-type:application/json \\\n  -d ${quoted(first)}`;
}

function quoted(text) {
  // For a shell: a topic from this page's address must not become a command.
  return `'${text.replaceAll("'", "'\\''")}'`;
}

byId("subscription").addEventListener("submit", (event) => {
  event.preventDefault();
  const topics = words(byId("topics").value);
  view.topics = topics.length ? topics : DEFAULT_TOPICS;
  view.names = words(byId("names").value);
  writeView();
  showView();
  connect();
});

byId("publish").addEventListener("submit", (event) => {
  event.preventDefault();
  publish();
});

byId("publish-data").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    byId("publish").requestSubmit();
  }
});

byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").textContent = paused ? "Continue" : "Pause";
  feed.classList.toggle("paused", paused);
  if (paused) showCount();
  else flush();
});

byId("clear").addEventListener("click", () => {
  waiting = [];
  feed.replaceChildren();
  showCount();
});

byId("filter").addEventListener("input", () => {
  view.filter = byId("filter").value;
  for (const item of feed.children) item.hidden = !matches(item);
  writeView();
  showCount();
});

byId("rows").addEventListener("change", () => {
  view.rows = rowsKept(byId("rows").value);
  byId("rows").value = view.rows;
  trim();
  writeView();
  showCount();
});

byId("announce").addEventListener("change", () => {
  feed.setAttribute("aria-live", byId("announce").checked ? "polite" : "off");
});

// A page in the back-forward cache holds no stream; a page that comes back
// from it continues where it stood.
addEventListener("pagehide", disconnect);
addEventListener("pageshow", (event) => {
  if (event.persisted) connect();
});

byId("publish-topic").value = view.topics[0];
showView();
connect();
