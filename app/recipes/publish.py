"""
Publish events from Django, FastAPI or any other Python service by one XADD.

FastAPI:

    @app.post("/orders")
    async def order(order: Order):
        await run_in_threadpool(publish, redis, ["orders", user_topic(order.user)], order.model_dump(), "created")

Django, when the transaction has been kept:

    transaction.on_commit(lambda: publish(redis, ["orders"], {"id": order.pk}, "created"))
"""

import json
from typing import Any
from urllib.parse import quote


def publish(redis: Any, topics: list[str], data: Any, event: str = "", *, prefix: str = "sse") -> str:
    """
    Append one event to the log; return its place there.

    *redis* is a `redis.Redis`. A string in *data* is sent as it is, anything else as JSON.
    """
    text = data if isinstance(data, str) else json.dumps(data)
    fields = {"v": "1", "topics": " ".join(topics), "data": text}
    if event:
        fields["event"] = event
    place = redis.xadd(f"{{{prefix}}}:log", fields)
    return place.decode() if isinstance(place, bytes) else str(place)


def user_topic(user: str) -> str:
    """Return the topic that every stream of *user* carries, and nobody else's."""
    return "user:" + quote(user, safe="")
