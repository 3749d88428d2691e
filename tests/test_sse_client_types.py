"""
The browser client's types promise what the client does: a TypeScript program that uses all of them.
"""

import re
import shutil
import subprocess

import pytest

from tests.test_sse_client_parser import ROOT, node

STATIC = ROOT / "app" / "static"
TYPES = (STATIC / "sse-client.d.ts").read_text()
TYPESCRIPT = "typescript@7.0.2"

PROGRAM = """
import { connect, follow, run, Parser, Stream, StreamError, type Message, type Problem } from "./sse-client.js";

interface Events { created: { id: number; customer?: string }; note: string }

const stream: Stream<Events> = connect<Events>("/events", {
  topics: new Set(["orders"]),
  token: async ({ renew }) => (renew ? "new" : undefined),
  share: "ann",
  on: { created: ({ id }) => id.toFixed(), "stream.reset": ({ reason }) => reason.trim() },
  onstate: (state, it) => void [state === "paused", it.opened?.topics.length],
  onerror: ({ problem }) => problem.cure?.trim(),
});
const undo: () => void = stream.on("note", (text, message) => void [text.trim(), message.id.trim(), message.event]);
stream.on("*", (data: unknown, message: Message) => void [data, message.text.trim()]);
stream.on("stream.expiring", ({ seconds }) => seconds.toFixed());
stream.on("stream.evicted", ({ reason }) => reason.trim());
connect(new URL("https://example.com/events"), { topics: "orders" }).close();
// @ts-expect-error a name that nobody sends
stream.on("creatd", () => {});
// @ts-expect-error data of another type
stream.on("created", ({ total }) => total);
// @ts-expect-error topics are texts
connect("/events", { topics: [7] });

async function chat(): Promise<string> {
  let text = "";
  const answer = run("/runs", { kind: "chat", prompt: "Hello" }, { headers: { "X-From": "here" } });
  try {
    for await (const { event, data } of answer) {
      if (event === "run.token") text += data.text;
      if (event === "run.progress") text += data.percent?.toFixed() ?? data.stage;
      // @ts-expect-error the loop gives none of the stream's own events
      if (event === "stream.open") text += data.stream;
    }
  } catch (error) {
    if (error instanceof StreamError) text += (error.problem satisfies Problem).detail;
  }
  await answer.cancel();
  undo();
  return text;
}

const parser = new Parser("e:1");
for (const { event, text, id } of parser.feed(new Uint8Array())) event + text + id;
void [chat, follow("/runs/r/events", { lastEventId: "earliest" }), parser.retry?.toFixed(), stream.error?.message];
"""


@pytest.fixture(scope="module")
def tsc(require) -> str:
    """The compiler, fetched once."""
    require("npm")
    folder = ROOT / ".cache" / "typescript"
    command = folder / "node_modules" / ".bin" / "tsc"
    if not command.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Two at the same time: the second waits. No scripts of strangers.
        install = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", TYPESCRIPT]
        subprocess.run(["flock", str(folder), "timeout", "150", *install], check=True, capture_output=True, timeout=200)
    return str(command)


def test_a_program(tsc, tmp_path):
    """
    What the types allow is allowed, and what they are there to refuse is refused.
    """
    for name in ("sse-client.js", "sse-client.d.ts"):
        shutil.copy(STATIC / name, tmp_path)
    (tmp_path / "program.ts").write_text(PROGRAM)
    command = [tsc, "--noEmit", "--strict", "--target", "es2022", "--lib", "es2022,esnext.disposable,dom,dom.iterable"]
    command += ["--module", "esnext", "--moduleResolution", "bundler", "--types", "", "program.ts"]

    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)

    assert "" == run.stdout
    assert 0 == run.returncode


def test_exports(require):
    """
    They name all that the file exports, and nothing else.
    """
    promised = set(re.findall(r"(?m)^export declare (?:function|class) (\w+)", TYPES))

    assert promised == set(node(require, "console.log(Object.keys(client).join(' '));").split())
