"""
A run through nginx, by the answer to the POST that starts it: tokens come as they are made, over every way.

The model waits for the reader at each step: were anything held back, both would
wait for each other, and the test would fail.
"""

import asyncio
import json

import pytest

from app.stack import ROOT
from tests.nginx.ways import Way, way
from tests.scripted_server import Exchange, serving
from tests.test_runs import CHAT, DONE, JSON, finish, token

BODY = json.dumps(CHAT).encode()


@pytest.fixture
def kit(stack, model_port):
    """Start the kit in front of that model, with these options of nginx."""

    async def start(**nginx_options):
        env = {"SSE_LLM_BASE_URL": f"http://127.0.0.1:{model_port}/v1"}
        return await asyncio.to_thread(stack, apps=1, redis=False, env=env, nginx_options=nginx_options)

    return start


def text(answer) -> str:
    return "".join(json.loads(event.data)["text"] for event in answer.events if event.event == "run.token")


async def told_step_by_step(front: Way, port: int) -> None:
    """Fail unless the head is read before the first token is made, and that token before the second is."""
    order = []
    head_read, first_read = asyncio.Event(), asyncio.Event()

    async def model(exchange: Exchange) -> bool:
        say = exchange.writer.write
        say(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for read, piece in ((head_read, token("first")), (first_read, token(" second") + finish() + DONE)):
            await read.wait()
            order.append("made")
            say(piece)
            await exchange.writer.drain()
        return False

    async with serving(model, port=port, seconds=60):
        answer = await front.ask("/runs", JSON, method="POST", body=BODY)
        await answer.until(lambda answer: [event.event for event in answer.events] == ["stream.open"])
        order.append("head")
        head_read.set()
        await answer.until(lambda answer: text(answer) == "first")
        order.append("first")
        first_read.set()
        await answer.until(lambda answer: answer.ended)

    assert (200, "clean", "first second") == (answer.status, answer.ended, text(answer))
    assert ["head", "made", "first", "made"] == order


async def test_first_tokens(kit, model_port, tls, way_name):
    """
    The head is read before the first token is made, and the first token before the second is.
    """
    nginx = (await kit(tls=None if way_name == "plain" else tls)).nginx
    async with way(way_name, nginx.port) as front:
        await told_step_by_step(front, model_port)


async def test_model_that_thinks(kit, model_port):
    """
    A model may be silent for longer than nginx waits for an answer of the API.
    """
    api = (ROOT / "nginx/snippets/sse-api.conf").read_text()
    assert "proxy_read_timeout 15s;" in api

    async def model(exchange: Exchange) -> bool:
        say = exchange.writer.write
        say(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        await exchange.writer.drain()
        await asyncio.sleep(1.7)
        say(token("thought") + finish() + DONE)
        await exchange.writer.drain()
        return False

    files = {"snippets/sse-api.conf": api.replace("proxy_read_timeout 15s;", "proxy_read_timeout 1s;")}
    nginx = (await kit(files=files)).nginx
    async with serving(model, port=model_port, seconds=60), way("plain", nginx.port) as front:
        answer = await front.ask("/runs", JSON, method="POST", body=BODY)
        await answer.until(lambda answer: answer.ended)

    assert ("clean", "thought") == (answer.ended, text(answer))
