"""
The servers of the benchmark, one module each, all with the face of `Peer`.
"""

from .application import (
    ApplicationBehindNginx,
    ApplicationInMemory,
    ApplicationOff,
    ApplicationOn,
    ApplicationWithTokens,
)
from .base import Absent, Peer, Running
from .floor import Floor
from .nchan import Nchan
from .pushpin import Pushpin
from .quart_recipe import QuartRecipe
from .sse_starlette import SseStarlette, SseStarletteUvloop

# In the order of the table.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Floor(),
        ApplicationOn(),
        ApplicationWithTokens(),
        ApplicationInMemory(),
        ApplicationOff(),
        ApplicationBehindNginx(),
        Nchan(),
        Pushpin(),
        QuartRecipe(),
        SseStarlette(),
        SseStarletteUvloop(),
    )
}

__all__ = ["PEERS", "Absent", "Peer", "Running"]
