"""What the tests of the load test share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.loadtest.runs import RUNNING, Truth


@pytest.fixture
def server() -> Iterator[Callable[..., Truth]]:
    """Start a server that faults: topics to faults, with `__` for the slash."""
    servers: list[Truth] = []

    def start(**faults: Any) -> Truth:
        servers.append(Truth({name.replace("__", "/"): fault for name, fault in faults.items()}))
        return servers[-1]

    yield start
    while RUNNING:
        RUNNING.pop().close()
    for each in servers:
        each.close()
