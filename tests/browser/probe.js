/*
 * Does what the gate says with a native EventSource, and reports every event.
 */

let source = null;
let unsent = [];
let sending = false;

async function report(said) {
  unsent.push(said);
  if (sending) return;
  sending = true;
  while (unsent.length) {
    const batch = unsent;
    unsent = [];
    await fetch("report", { method: "POST", body: JSON.stringify(batch) });
  }
  sending = false;
}

function open({ number, url, names, characters }) {
  source?.close();
  source = new EventSource(url);
  source.onopen = () => report({ source: number, kind: "open" });
  for (const name of new Set(["message", ...names])) {
    source.addEventListener(name, (event) => report({
      source: number,
      kind: "event",
      event: event.type,
      data: event.data.slice(0, characters),
      id: event.lastEventId,
    }));
  }
  source.addEventListener("error", (event) => {
    if (event instanceof MessageEvent) return;
    report({ source: number, kind: "error", closed: event.target.readyState === EventSource.CLOSED });
  });
}

report({ kind: "ready", agent: navigator.userAgent });
for (let done = 0; ;) {
  const command = await (await fetch(`next?${done}`)).json();
  if (!command) continue;
  done = command.number;
  if (command.do === "open") open(command);
  else source?.close();
}
