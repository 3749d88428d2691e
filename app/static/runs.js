/*
 * The page's runs: a chat that streams, and a task with its progress.
 *
 * Both survive the loss of the process that they are read from; what the page
 * says about that is the client's `stream.open`.
 */

import { byId, element, showProblem } from "./parts.js";
import { run } from "./sse-client.js";
import { supply } from "./token.js";

// How often a question is asked in all, where processes are lost.
const MOST_ASKED = 3;

const messages = [];

byId("chat").addEventListener("submit", async (event) => {
  event.preventDefault();
  // By the keyboard it is submitted also while its button is off.
  if (!byId("chat-cancel").disabled) return;
  const prompt = byId("prompt").value.trim();
  if (!prompt) return byId("prompt").focus();
  byId("prompt").value = "";
  byId("chat-told").textContent = "";
  messages.push({ role: "user", content: prompt });
  const conversation = byId("conversation");
  const question = element("p", "asked", prompt);
  const shown = element("p", "answer");
  conversation.append(question, shown);
  conversation.scrollTop = conversation.scrollHeight;
  // A screen reader reads the answer when it is whole, not every word of it anew.
  conversation.setAttribute("aria-busy", "true");

  let text = "";
  const take = ({ event: name, data }) => {
    if (name !== "run.token") return;
    text += data.text;
    // Whoever has scrolled back to read stays there.
    const atEnd = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 40;
    shown.append(data.text);
    if (atEnd) conversation.scrollTop = conversation.scrollHeight;
  };
  for (let asked = 1; ; asked += 1) {
    const problem = await follow("chat", { kind: "chat", messages }, take);
    if (problem?.reason !== "process_lost" || asked === MOST_ASKED) break;
    // What its process had in hand is gone with it: another one answers anew.
    text = shown.textContent = "";
    showProblem(byId("chat-problem"), null);
    byId("chat-told").textContent = `Process ${problem.value} was lost. Asked again.`;
  }
  conversation.removeAttribute("aria-busy");
  // The next question is asked with what was answered so far.
  if (text) return messages.push({ role: "assistant", content: text });
  // Nothing was: the question goes back to where it can be asked again.
  messages.pop();
  question.remove();
  shown.remove();
  byId("prompt").value ||= prompt;
});

byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    byId("chat").requestSubmit();
  }
});

byId("task").addEventListener("submit", async (event) => {
  event.preventDefault();
  const bar = byId("progress");
  bar.value = 0;
  byId("result").hidden = true;
  const stage = byId("stage");
  stage.textContent = "";
  // Ten stages a second are to look at; a screen reader reads the last.
  stage.setAttribute("aria-busy", "true");
  const body = { kind: "task", task: "checksums", arguments: { path: byId("path").value } };
  await follow("task", body, ({ event: name, data }) => {
    if (name === "run.progress") {
      if (data.percent === null) bar.removeAttribute("value");
      else bar.value = data.percent;
      stage.textContent = data.stage;
    }
    if (name === "run.done") {
      byId("result").textContent = data.files.map(({ path, sha256 }) => `${sha256}  ${path}`).join("\n");
      byId("result").hidden = false;
    }
  });
  stage.removeAttribute("aria-busy");
});

async function follow(id, body, take) {
  const form = byId(id);
  const [start, cancel] = form.querySelectorAll("button");
  const told = byId("chat-told");
  showProblem(byId(`${id}-problem`), null);
  // The focus stays with whoever uses the keyboard.
  const hadFocus = document.activeElement === start;
  start.disabled = true;
  cancel.disabled = false;
  if (hadFocus) cancel.focus();
  if (id === "chat") told.append(" ");
  let opens = 0;
  const answer = run("runs", body, {
    token: supply(),
    on: {
      "stream.open": ({ process }) => {
        opens += 1;
        if (id === "chat") told.append(element("span", "", opens > 1 ? `Goes on by process ${process}. ` : `Read from process ${process}. `));
      },
    },
  });
  const stop = () => answer.cancel().catch(({ problem, message }) => {
    showProblem(byId(`${id}-problem`), { title: "The run could not be cancelled", detail: message, ...problem });
  });
  cancel.addEventListener("click", stop);
  try {
    for await (const event of answer) take(event);
    return null;
  } catch (error) {
    const problem = error.problem ?? { title: error.message };
    showProblem(byId(`${id}-problem`), { title: "The run failed", ...problem });
    return problem;
  } finally {
    cancel.removeEventListener("click", stop);
    const hasFocus = document.activeElement === cancel;
    start.disabled = false;
    cancel.disabled = true;
    if (hasFocus) start.focus();
  }
}
