"""
Event streams with sse-starlette, as its README shows: EventSourceResponse over a generator.

Only the open comment (so that the load client knows when a stream is subscribed)
and a publish route are added.
"""

import asyncio
import itertools
import os

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PING_SECONDS = int(os.environ.get("PING_SECONDS", "15"))
queues: dict[str, set[asyncio.Queue]] = {}
numbers = itertools.count(1763712000001)


async def events(request: Request) -> EventSourceResponse:
    """
    One stream.
    """
    topic = request.query_params["topic"]

    async def send():
        queue: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        queues.setdefault(topic, set()).add(queue)
        try:
            yield {"comment": "open"}
            while True:
                data, number = await queue.get()
                yield {"data": data, "id": str(number)}
        finally:
            queues[topic].discard(queue)

    return EventSourceResponse(send(), ping=PING_SECONDS)


async def publish(request: Request) -> Response:
    """
    Give the events of one burst to every stream of the topic.
    """
    body = await request.json()
    for data in body["burst"]:
        number = next(numbers)
        for queue in queues.get(body["topic"], ()):
            queue.put_nowait((data, number))
    return Response(status_code=201)


async def healthz(request: Request) -> Response:
    """
    Say that the loop runs.
    """
    return Response(status_code=204)


app = Starlette(
    routes=[
        Route("/events", events),
        Route("/publish", publish, methods=["POST"]),
        Route("/healthz", healthz),
    ]
)
