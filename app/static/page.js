/*
 * The demonstration page: one stream for all tabs, shown as it happens.
 *
 * Everything that came from outside is inserted as text, never as markup.
 * https://html.spec.whatwg.org/multipage/server-sent-events.html
 */

import { byId, clock, element, integers, readProblem, showProblem, wholeSeconds, words } from "./parts.js";
import { connect } from "./sse-client.js";
import { authorization, sharing, supply, takeToken } from "./token.js";

const DEFAULT_TOPICS = ["demo", "logs"];
const DEFAULT_ROWS = 200;
const MAX_ROWS = 5000;

// One event may be a megabyte: a row shows its beginning, unfolds to more, and
// says how much it leaves out.
const ROW_CHARACTERS = 400;
const UNFOLDED_CHARACTERS = 20000;
// What is longer is no line of an access log.
const ACCESS_CHARACTERS = 4000;

// Rows are inserted in batches: a busy log would otherwise lay the page out
// hundreds of times a second.
const FLUSH_MILLISECONDS = 50;

// The kit's own events, and what each tells a person. `stream.position` only
// moves the position, and `stream.open` is handled on its own.
const NOTICES = {
  "stream.reset": "History was lost, so events may be missing here. Fetch your state again.",
  "stream.draining": "This process is shutting down. The stream ends soon and continues on another.",
  "stream.evicted": "This stream was ended for another one, or by an administrator.",
  "stream.expiring": "The token expires soon.",
  "stream.expired": "The token expired.",
};
const STATES = {
  connecting: "Connecting",
  open: "Open",
  reconnecting: "Reconnecting",
  paused: "Paused",
  closed: "Closed",
};

// What the page shows, kept in its address: a reload and a shared link show
// the same.

const view = readView();

function readView() {
  const query = new URLSearchParams(location.search);
  const topics = query.getAll("topic").flatMap(words);
  return {
    topics: topics.length ? topics : DEFAULT_TOPICS,
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
  if (view.user) query.set("user", view.user);
  if (view.filter) query.set("filter", view.filter);
  if (view.rows !== DEFAULT_ROWS) query.set("rows", view.rows);
  history.replaceState(null, "", `?${query}`);
}

// The stream.

let stream = null;
let position = ""; // the last event id seen
let everOpen = false;
let connects = 0;

async function connectStream() {
  const number = ++connects;
  stream?.close();
  everOpen = false;
  showProblem(byId("stream-problem"), null);
  const url = new URL("events", location.href);
  if (view.user) url.searchParams.set("user", view.user);
  const share = await sharing(`${url} ${view.topics}`);
  if (number !== connects) return; // connected anew meanwhile
  stream = connect(url, {
    topics: view.topics,
    // By fetch, so that events of every name are heard.
    mode: "fetch",
    share,
    token: supply(() => stream.state === "open"),
    // A position is of the log, not of a subscription, so a stream with other
    // topics continues where this one stood.
    lastEventId: position,
    onstate: (state, { opened }) => {
      setState(state === "connecting" && everOpen ? "reconnecting" : state);
      if (state === "open") showOpened(opened);
    },
    onerror: ({ problem }) => showProblem(byId("stream-problem"), problem),
    on: { "*": onEvent },
  });
}

function showOpened(opened) {
  byId("process").textContent = String(opened?.process ?? "–");
  byId("stream").textContent = String(opened?.stream ?? "–");
}

function onEvent(data, event) {
  if (event.id && event.id !== position) {
    position = event.id;
    byId("position").textContent = position;
  }
  if (event.event === "stream.position") return;
  if (event.event === "stream.open") return onOpen(data);
  if (Object.hasOwn(NOTICES, event.event)) {
    add(notice(event.event, NOTICES[event.event], data?.reason ?? event.text));
    return;
  }
  if (event.event === "notification") notified(data);
  received += 1;
  add(row(event));
}

function onOpen(opened) {
  showOpened(opened);
  add(notice("stream.open", `${everOpen ? "Opened again" : "Opened"} by process ${opened.process}.`));
  everOpen = true;
}

function notified(data) {
  const text = [data?.text, data, JSON.stringify(data)].find((each) => typeof each === "string").slice(0, UNFOLDED_CHARACTERS);
  const list = byId("notifications");
  list.prepend(element("li", "", text));
  while (list.children.length > 10) list.lastElementChild.remove();
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
  item.dataset.event = event.event;
  item.dataset.id = event.id;
  item.title = event.id;
  item.append(time(), element("span", "name", event.event), body(event.text));
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

// Whoever may publish chooses the types: an object may have a `toString` that is none.
const plain = (value) => (["string", "number"].includes(typeof value) ? value : undefined);

function accessLogLine(data) {
  if (data.length > ACCESS_CHARACTERS) return null;
  const line = parseObject(data);
  // The kit's own nginx.conf writes path and seconds; others keep nginx's words.
  const path = plain(line?.path ?? line?.uri);
  if ([path, plain(line?.status), plain(line?.method)].includes(undefined)) return null;
  const status = String(line.status);
  const summary = element("summary");
  summary.append(
    element("span", `status status-${status.charAt(0)}`, status), " ",
    element("span", "method", String(line.method)), " ",
    element("span", "path", String(path)),
  );
  const seconds = Number.parseFloat(plain(line.seconds ?? line.request_time));
  if (!Number.isNaN(seconds)) summary.append(" ", element("span", "detail", duration(seconds)));
  const logged = new Date(plain(line.time));
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

// Publishing.

async function publish() {
  // Sent as typed: the server refuses what is wrong and says why.
  const topic = byId("publish-topic").value;
  const name = byId("publish-event").value;
  const said = { topics: [topic], data: byId("publish-data").value };
  if (name) said.event = name;

  byId("published").textContent = "";
  showProblem(byId("publish-problem"), null);
  for (const field of ["topic", "event", "data"]) {
    byId(`publish-${field}`).removeAttribute("aria-invalid");
  }

  let answer;
  try {
    answer = await fetch("publish", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...authorization() },
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
  byId("published").textContent = told.join(" ");
}

// Wiring.

function showView() {
  byId("topics").value = view.topics.join(" ");
  byId("user").value = view.user;
  byId("filter").value = view.filter;
  byId("rows").value = view.rows;
  showCommands();
}

function showCommands() {
  const base = new URL("./", location.href).href;
  const query = new URLSearchParams();
  for (const topic of view.topics) query.append("topic", topic);
  const first = JSON.stringify({ topics: view.topics.slice(0, 1), data: "hello" });
  // A variable of the shell: the token itself stays where it is.
  const token = authorization().Authorization ? '-H "Authorization: Bearer $TOKEN" ' : "";
  byId("curl-listen").textContent = `curl -N ${token}${quoted(`${base}events?${query}`)}`;
  byId("curl-publish").textContent =
    `curl ${base}publish \\\n  ${token}-H content-type:application/json \\\n  -d ${quoted(first)}`;
}

function quoted(text) {
  // For a shell: a topic from this page's address must not become a command.
  return `'${text.replaceAll("'", "'\\''")}'`;
}

byId("subscription").addEventListener("submit", (event) => {
  event.preventDefault();
  const before = String([view.topics, view.user]);
  const topics = words(byId("topics").value);
  view.topics = topics.length ? topics : DEFAULT_TOPICS;
  view.user = byId("user").value.trim();
  writeView();
  // With a new token alone, an open stream goes on as it is.
  const goesOn = takeToken() && stream?.state === "open" && before === String([view.topics, view.user]);
  showView();
  if (!goesOn) connectStream();
});

byId("notify").addEventListener("submit", async (event) => {
  event.preventDefault();
  const user = byId("notify-user").value;
  byId("notified").textContent = "";
  showProblem(byId("notify-problem"), null);
  try {
    const answer = await fetch("publish", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...authorization() },
      body: JSON.stringify({
        topics: [`user:${encodeURIComponent(user)}`],
        event: "notification",
        data: { text: byId("notify-text").value },
      }),
    });
    if (!answer.ok) return showProblem(byId("notify-problem"), await readProblem(answer));
    byId("notified").textContent = `${user} is notified.`;
  } catch (error) {
    showProblem(byId("notify-problem"), { title: "No answer from the server", detail: String(error.message) });
  }
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

byId("publish-topic").value = view.topics[0];
showView();
connectStream();
