/*
 * The page's operator's view: figures of all processes, drawn from the kit's own stream.
 */

import { byId, element, integers, showProblem } from "./parts.js";
import { connect } from "./sse-client.js";
import { supply } from "./token.js";

const EVENT = "operator.figures";
// A process that told nothing for so long has gone.
const GONE_MILLISECONDS = 5_000;
const LATENCY = "sse_publish_to_write_seconds_bucket";

const processes = new Map(); // name: what it told last, and before
let stream = null;
let sweeping = 0;

byId("watch").addEventListener("click", () => {
  if (stream) stop();
  else start();
});

function start() {
  showProblem(byId("operator-problem"), null);
  byId("watch").textContent = "Stop watching";
  stream = connect("operator/events", {
    mode: "fetch",
    token: supply(() => stream.state === "open"),
    on: { [EVENT]: take },
    onerror: ({ problem }) => {
      showProblem(byId("operator-problem"), problem);
      stop();
    },
  });
  sweeping = setInterval(sweep, 1_000);
}

function stop() {
  stream?.close();
  stream = null;
  clearInterval(sweeping);
  processes.clear();
  byId("watch").textContent = "Watch";
  draw();
}

function take({ process, at, samples }) {
  const known = processes.get(process);
  const before = at > known?.now.at ? known.now : known?.before;
  processes.set(process, { now: { at, samples }, before, seen: performance.now() });
  draw();
}

function sweep() {
  for (const [process, { seen }] of processes) {
    if (performance.now() - seen > GONE_MILLISECONDS) processes.delete(process);
  }
  draw();
}

function draw() {
  const table = byId("figures");
  table.hidden = processes.size === 0;
  const rows = [...processes].sort().map(([process, { now, before }]) => {
    const row = element("tr");
    const head = element("th", "", process);
    head.scope = "row";
    const { samples } = now;
    row.append(
      head,
      cell("streams", counted(samples.sse_streams_open)),
      cell("opened", counted(samples.sse_streams_opened_total)),
      cell("deliveries", before ? integers.format(Math.round(rate(now, before, "sse_deliveries_total"))) : "…"),
      cell("half", within(samples, 0.5)),
      cell("most", within(samples, 0.99)),
      cell("runs", counted(samples.sse_runs_open)),
      cell("history", `${Math.round(samples.sse_window_seconds)} s`),
      cell("ended", reasons(samples)),
    );
    return row;
  });
  table.tBodies[0].replaceChildren(...rows);
}

function cell(name, text) {
  const made = element("td", "", text);
  made.dataset.figure = name;
  return made;
}

// During a rollout, another version of the kit may not have this figure.
function counted(count) {
  return count === undefined ? "–" : integers.format(count);
}

function rate(now, before, name) {
  return (now.samples[name] - before.samples[name]) / (now.at - before.at);
}

/** The bound below which this part of all deliveries so far stayed. */
function within(samples, part) {
  const bounds = [];
  for (const [name, count] of Object.entries(samples)) {
    const bound = name.startsWith(`${LATENCY}{`) && /le="([^"]+)"/.exec(name)?.[1];
    if (bound) bounds.push([bound === "+Inf" ? Infinity : Number(bound), count]);
  }
  bounds.sort(([a], [b]) => a - b);
  const all = bounds.at(-1)?.[1] ?? 0;
  if (!all) return "–";
  const [bound] = bounds.find(([, count]) => count >= part * all);
  return bound === Infinity ? "over all" : `${integers.format(bound * 1000)} ms`;
}

function reasons(samples) {
  const told = [];
  for (const [name, count] of Object.entries(samples)) {
    const reason = /^sse_streams_ended_total\{reason="([^"]+)"\}$/.exec(name)?.[1];
    if (reason && count) told.push(`${reason} ${integers.format(count)}`);
  }
  return told.join(", ") || "none";
}
