"""
The register of runs: who started each, which process makes it, and whether it is over.

Two backends: `redis_register` (several processes) and the one in memory here.
A process that has runs in the making is alive as long as it renews; when it has
not for `LIVE_SECONDS`, any other process takes its runs over, to declare them
failed. Nobody takes a run over to go on with it: what its maker had in hand is
gone.
"""

from dataclasses import dataclass
from typing import Protocol

# A maker that has not renewed for so long is taken for dead.
LIVE_SECONDS = 3.0
# How often a maker renews, and every process looks for dead ones. While nobody
# makes a run, every LIVE_SECONDS: who begins meanwhile cannot be dead before.
LOOK_SECONDS = 0.75


@dataclass(frozen=True, slots=True)
class Record:
    """
    What is known of one run.

    Attributes:
        user: who started it; None where nobody said (SSE_AUTH=none).
        process: which process makes it.
        fingerprint: of the request, to tell a repeated POST from another one.
        ended: the id of its last event, "" while it goes on.
    """

    id: str
    kind: str
    user: str | None
    process: str
    fingerprint: str
    ended: str = ""


class Register(Protocol):
    """All runs of all processes. Every method raises `LogUnavailable` when it cannot be reached."""

    async def start(self, record: Record, keep_seconds: float) -> Record | None:
        """Enter *record*; return the one that has its id already, and enter nothing then."""

    async def get(self, id: str) -> Record | None:
        """Return the record of the run *id*, None where there is none or no longer one."""

    async def end(self, record: Record, event_id: str, keep_seconds: float) -> None:
        """Note that *event_id* was the last event of a run that this process had in hand."""

    async def renew(self) -> bool:
        """Stay alive; False if this process was taken for dead, and has lost its runs."""

    async def orphans(self) -> tuple[list[Record], bool]:
        """
        Take over and return the runs of dead processes.

        Returns:
            The runs, and whether any process makes runs now.
        """

    async def close(self) -> None:
        """Let go of all connections."""


class MemoryRegister:
    """See `Register`. For one process: nobody else can die."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    async def start(self, record: Record, keep_seconds: float) -> Record | None:
        known = self._records.get(record.id)
        if known is None:
            self._records[record.id] = record
        return known

    async def get(self, id: str) -> Record | None:
        return self._records.get(id)

    async def end(self, record: Record, event_id: str, keep_seconds: float) -> None:
        self._records[record.id] = Record(
            record.id, record.kind, record.user, record.process, record.fingerprint, event_id
        )
        # Enough for a process that is for trying things out.
        while len(self._records) > 1_000:
            self._records.pop(next(iter(self._records)))

    async def renew(self) -> bool:
        return True

    async def orphans(self) -> tuple[list[Record], bool]:
        return [], False

    async def close(self) -> None:
        pass
