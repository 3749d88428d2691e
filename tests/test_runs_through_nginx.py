"""
A long answer, read through nginx by the browser's client while processes are restarted one after another.

The client runs in Node here; in Chromium it has tests/browser/test_client_in_chromium.py.
"""

import asyncio
import json
from pathlib import Path

import pytest

from app.stack import reserve_port
from tests.live import logged
from tests.scripted_server import Exchange, serving
from tests.test_runs import DONE, finish, token

CLIENT = Path(__file__).parent.parent / "app" / "static" / "sse-client.js"

# Prints a line for each token, so that the test knows how far it is, and then the whole.
READ = """
import { run } from %s;
const answer = run(process.argv[1] + "/runs", { kind: "chat", prompt: "two thousand" });
const opens = [];
answer.on("stream.open", ({ process }) => opens.push(process));
let text = "";
let tokens = 0;
let last;
for await (const { event, data, id } of answer) {
  if (event === "run.token") {
    text += data.text;
    console.log(JSON.stringify({ length: text.length }));
  }
  last = { event, data };
}
console.log(JSON.stringify({ text, opens, last }));
"""


@pytest.mark.timeout(360)  # 8 s of tokens and two restarts; on a busy machine minutes
async def test_two_thousand_tokens_while_processes_are_restarted(stack, require):
    """
    The text is byte for byte the upstream's, whichever processes come and go.
    """
    node = require("node")
    tokens = [f"token {number} é😀\r\n" if number % 7 else f"{number}\u2028" for number in range(2_000)]
    whole = "".join(tokens)
    port, holder = reserve_port()
    # The last tokens wait for it: else a slow machine's restarts would outlast the run.
    restarted = asyncio.Event()

    async def model(exchange: Exchange) -> bool:
        exchange.writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for number, each in enumerate(tokens):
            if number == 1_900:
                await restarted.wait()
            exchange.writer.write(token(each))
            await exchange.writer.drain()
            await asyncio.sleep(0.002)
        exchange.writer.write(finish() + DONE)
        await exchange.writer.drain()
        return False

    env = {
        "SSE_LLM_BASE_URL": f"http://127.0.0.1:{port}/v1",
        "SSE_DRAIN_SECONDS": "1",
        "SSE_DRAIN_LEAD_SECONDS": "0.5",
        "SSE_RETRY_MS": "50",
    }
    kit = await asyncio.to_thread(stack, apps=3, env=env)
    async with serving(model, port=port, seconds=300) as upstream:
        reading = await asyncio.create_subprocess_exec(
            node, "--input-type=module", "-e", READ % json.dumps(CLIENT.as_uri()), kit.url,
            stdout=asyncio.subprocess.PIPE, limit=1 << 24,
        )  # fmt: skip
        assert reading.stdout

        async def restart() -> None:
            # The process that makes the run ends when the run does; meanwhile its
            # reader is sent from one of the others to the next.
            [maker] = [app for app in kit.apps if logged(app, "run_started")]
            ending = asyncio.create_task(asyncio.to_thread(maker.restart))
            try:
                for app in [app for app in kit.apps if app is not maker]:
                    await asyncio.to_thread(app.restart)
            finally:
                restarted.set()
            await ending

        restarting = None
        line = b""
        while more := await reading.stdout.readline():
            line = more
            if restarting is None and json.loads(line).get("length", 0) > 500:
                restarting = asyncio.create_task(restart())
        assert 0 == await reading.wait()
        assert restarting is not None
        await restarting
    if holder:
        holder.close()

    told = json.loads(line)
    assert whole == told["text"]
    assert ("run.done", 2_000) == (told["last"]["event"], told["last"]["data"]["tokens"])
    assert 1 == len(upstream.requests)
    assert len(set(told["opens"])) >= 3
