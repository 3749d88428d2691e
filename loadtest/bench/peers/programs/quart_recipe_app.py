"""
The usual way to serve event streams with Quart: a generator and a queue per stream.

Written as tutorials teach it; only the open comment (so that the load client knows
when a stream is subscribed) and a publish route are added. `/chat` hands a model's
tokens on as they come; whoever loses that stream has lost the answer.
"""

import asyncio
import itertools
import json
import os
from dataclasses import dataclass

import httpx2
from quart import Quart, make_response, request

app = Quart(__name__)
queues: dict[str, set[asyncio.Queue]] = {}
numbers = itertools.count(1763712000001)


@dataclass(slots=True)
class Event:
    """
    One event, encoded by each stream for itself.
    """

    data: str
    id: int

    def encode(self) -> bytes:
        """
        Return the block.
        """
        return f"id: {self.id}\ndata: {self.data}\n\n".encode()


@app.get("/events")
async def events():
    """
    One stream.
    """
    topic = request.args["topic"]

    async def send():
        queue: asyncio.Queue[Event] = asyncio.Queue()
        queues.setdefault(topic, set()).add(queue)
        try:
            yield b": open\n\n"
            while True:
                yield (await queue.get()).encode()
        finally:
            queues[topic].discard(queue)

    response = await make_response(send(), {"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    response.timeout = None
    return response


@app.post("/chat")
async def chat():
    """
    One answer of the model.
    """
    prompt = (await request.get_json())["prompt"]
    question = {"model": "any", "stream": True, "messages": [{"role": "user", "content": prompt}]}

    async def send():
        async with app.client.stream("POST", os.environ["UPSTREAM"] + "/chat/completions", json=question) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text = json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
                    if text:
                        yield f"data: {json.dumps({'text': text})}\n\n".encode()
        yield b"data: [DONE]\n\n"

    response = await make_response(send(), {"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    response.timeout = None
    return response


@app.before_serving
async def open_client():
    """
    Keep one client, and its connections, for all answers.
    """
    app.client = httpx2.AsyncClient(timeout=None)


@app.post("/publish")
async def publish():
    """
    Give the events of one burst to every stream of the topic.
    """
    body = await request.get_json()
    for data in body["burst"]:
        number = next(numbers)
        event = Event(data, number)
        for queue in queues.get(body["topic"], ()):
            queue.put_nowait(event)
    return "", 201


@app.get("/healthz")
async def healthz():
    """
    Say that the loop runs.
    """
    return "", 204
