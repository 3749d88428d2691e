"""
Follow orders from Python, typed: what a type checker believes of an event is checked when it comes.

    python -m app.recipes.follow http://localhost:8080 orders

Copy app/client.py, app/typed.py and app/parser.py with it; it needs the package httpx2.
"""

import asyncio
import sys
from contextlib import aclosing
from dataclasses import dataclass

from app.client import StreamReset, listen
from app.typed import Events, WrongData


@dataclass
class Created:
    """An order was placed."""

    id: int
    customer: str = "nobody"


@dataclass
class Deleted:
    """An order is gone."""

    id: int


ORDERS = Events().on("created", Created).on("deleted", Deleted)


def wrong(error: WrongData) -> None:
    """Say what a publisher sent that is no order, and go on."""
    print(f"left out: {error}", file=sys.stderr)


async def follow(url: str, topic: str) -> None:
    """Print orders as they come, across restarts and bad networks."""
    async with aclosing(ORDERS.read(listen(url, topic), on_wrong=wrong)) as events:
        async for event in events:
            if isinstance(event, StreamReset):
                print(f"orders were missed ({event.reason}): fetch them all again")
                continue
            match event.data:
                case Created(id=number, customer=customer):
                    print(f"{customer} ordered {number}", flush=True)
                case Deleted(id=number):
                    print(f"order {number} is gone", flush=True)
                case text:  # str: of a name that ORDERS does not know
                    print(f"{event.event}: {text}", flush=True)


if __name__ == "__main__":
    asyncio.run(follow(*sys.argv[1:3]))
