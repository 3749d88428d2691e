"""
Each fault once, on real processes, a real nginx and a real Redis: nothing is lost, nothing comes twice.

`make test-faults` does the same with more streams, and prints the table.
"""

import pytest

from tests.faults.matrix import FAULTS, complaints, possible, run
from tests.faults.trial import Size


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FAULTS)
async def test_fault(name: str, require):
    """Every stream has every event once, in order, or was told; the fault's own promises are beside it."""
    require("nginx")
    require("redis-server", "valkey-server")
    if why := possible(name):
        pytest.skip(why)
    row = await run(name, Size())

    assert complaints(row) == []
