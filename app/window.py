"""
The retained part of the log in this process's memory, indexed by topic.

Every replay is served from here, so that ten thousand clients that come back
at once cost Redis nothing. Entries are counted by *ordinals*: whole numbers of
this process, never used again. A stream's cursor is the ordinal of the next
entry it has not looked at.

Rule: an id is a valid position only if it is an entry of the window or its
trim boundary, the entry before the first.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from app.event import RUN_ENDS, Entry, matches

# Answers of `locate` that are not a cursor.
AHEAD = -1
LOST = -2

# A subscription with a prefix looks at this many entries per piece.
_SCAN_ENTRIES = 2_000
# … or at this many topics: an event of 50 and a subscription of 50 are 2,500
# comparisons, and a piece must not hold the event loop.
_SCAN_TOPICS = 5_000
# Entries taken from one topic per piece, before the limit in bytes.
_LINE_ENTRIES = 1_000
# Pieces kept for the next who asks for the same. They are copies, and not in
# `Window.bytes`; without the limit in bytes, large events made them 270 MB.
_MEMO_PIECES = 256
_MEMO_BYTES = 16_000_000


class _Line:
    """The ordinals of one topic's entries; `start` hides the ones trimmed away."""

    __slots__ = ("ordinals", "start")

    def __init__(self) -> None:
        self.ordinals: list[int] = []
        self.start = 0


class Window:
    """
    Entries of the log, oldest first.

    Attributes:
        epoch: the history of the log that the entries are of.
        first: ordinal of the oldest entry.
        end: ordinal that the next entry will get.
        bytes: estimated memory of all entries.
        resets: how often it was filled anew; cursors of before mean nothing after.
    """

    def __init__(self, max_bytes: int) -> None:
        self.epoch = ""
        self.first = 0
        self.end = 0
        self.bytes = 0
        self.resets = 0
        self.max_bytes = max_bytes
        self._entries: list[Entry] = []
        self._start = 0  # index of `first` in _entries; what is before it is gone
        self._lines: dict[str, _Line] = {}
        self._ends: dict[str, int] = {}  # topics of runs that are over: ordinal of the end
        self._boundary: Any = None
        self._boundary_id = ""
        self._memo: dict[tuple[Any, ...], tuple[bytes, int, int, int]] = {}
        self._memo_bytes = 0

    def __len__(self) -> int:
        return self.end - self.first

    def reset(self, epoch: str, boundary: Any, boundary_id: str) -> None:
        """Forget all entries; the next one follows *boundary* in the history *epoch*."""
        self.epoch = epoch
        self.resets += 1
        self._entries = []
        self._start = 0
        self._ends = {}
        self._lines = {}
        self._memo = {}
        self.bytes = 0
        self.first = self.end
        self._boundary = boundary
        self._boundary_id = boundary_id

    def append(self, entry: Entry) -> None:
        """Add the log's next entry; trims the oldest where memory would pass `max_bytes`."""
        for topic in entry.topics:
            line = self._lines.get(topic)
            if line is None:
                line = self._lines[topic] = _Line()
            line.ordinals.append(self.end)
        if entry.event in RUN_ENDS:
            # The first one counts: a process that was taken for dead may go on a little.
            for topic in entry.topics:
                self._ends.setdefault(topic, self.end)
        self._entries.append(entry)
        self.end += 1
        self.bytes += entry.size
        if self._memo:
            self._memo = {}
        while self.bytes > self.max_bytes and len(self) > 1:
            self._drop_first()

    def trim_before(self, position: Any) -> None:
        """Drop the entries before *position*: the log no longer has them."""
        while self.first < self.end and self._entries[self._start].position < position:
            self._drop_first()

    def newest(self) -> Any:
        """Return the position of the newest entry, or of the boundary in an empty window."""
        return self._entries[-1].position if self.end > self.first else self._boundary

    def oldest(self) -> Entry | None:
        """Return the oldest entry."""
        return self._entries[self._start] if self.end > self.first else None

    def id_at(self, cursor: int) -> str:
        """Return the id that says: everything before *cursor* was seen."""
        if cursor <= self.first:
            return self._boundary_id
        return self._entries[self._start + cursor - 1 - self.first].id

    def end_of(self, topic: str) -> int | None:
        """Return the ordinal of the event that ended the run with this topic, None while it goes on."""
        return self._ends.get(topic)

    def has(self, topic: str) -> bool:
        """Tell whether an entry of *topic* is kept."""
        return topic in self._lines

    def locate(self, position: Any) -> int:
        """Return the cursor behind *position*, or AHEAD, or LOST."""
        if position == self._boundary:
            return self.first
        if position > self.newest():
            return AHEAD
        at = bisect_left(self._entries, position, lo=self._start, key=_position)
        if at < len(self._entries) and self._entries[at].position == position:
            return self.first + at - self._start + 1
        return LOST

    def pull(self, topics: tuple[str, ...], cursor: int, max_bytes: int) -> tuple[bytes, int, int, int]:
        """
        Return a bounded piece of what *topics* are owed from *cursor* on.

        The piece holds at least one event if one is owed, even where that is
        larger than *max_bytes*. Streams that ask for the same get the same
        bytes object.

        Returns:
            The joined blocks, the next cursor, the number of events, and the
            cursor behind the last of them.
        """
        key = (topics, cursor, max_bytes)
        known = self._memo.get(key)
        if known is not None:
            return known
        ordinals, behind = self._owed(topics, cursor)
        blocks: list[bytes] = []
        size = 0
        last = cursor
        base = self._start - self.first
        for ordinal in ordinals:
            entry = self._entries[base + ordinal]
            blocks.append(entry.block)
            last = ordinal + 1
            size += len(blocks[-1])
            if size >= max_bytes:
                behind = last
                break
        piece = (b"".join(blocks), behind, len(blocks), last)
        if not self._memo:
            self._memo_bytes = 0
        self._memo_bytes += len(piece[0])
        if len(self._memo) >= _MEMO_PIECES or self._memo_bytes > _MEMO_BYTES:
            self._memo = {}
            self._memo_bytes = len(piece[0])
        self._memo[key] = piece
        return piece

    def count(self, topics: tuple[str, ...], cursor: int) -> int:
        """Return how many events *topics* are owed from *cursor* on."""
        count = 0
        cursor = max(cursor, self.first)
        while cursor < self.end:
            ordinals, cursor = self._owed(topics, cursor)
            count += len(ordinals)
        return count

    def _owed(self, topics: tuple[str, ...], cursor: int) -> tuple[Sequence[int], int]:
        """Return ordinals of owed entries in order, and the cursor that they reach."""
        if any(topic.endswith("*") for topic in topics):
            return self._scan(topics, cursor)
        behind = self.end
        found: list[Sequence[int]] = []
        for topic in topics:
            line = self._lines.get(topic)
            if line is None or line.ordinals[-1] < cursor:
                continue
            at = bisect_left(line.ordinals, cursor, lo=line.start)
            part = line.ordinals[at : at + _LINE_ENTRIES]
            if at + _LINE_ENTRIES < len(line.ordinals):
                behind = min(behind, part[-1] + 1)
            found.append(part)
        if not found:
            return (), behind
        if len(found) == 1:
            return found[0], behind
        merged = sorted({ordinal for part in found for ordinal in part if ordinal < behind})
        return merged, behind

    def _scan(self, topics: tuple[str, ...], cursor: int) -> tuple[Sequence[int], int]:
        behind = min(self.end, cursor + _SCAN_ENTRIES)
        base = self._start - self.first
        found: list[int] = []
        known: dict[str, bool] = {}
        left = _SCAN_TOPICS
        for ordinal in range(cursor, behind):
            entry = self._entries[base + ordinal]
            left -= len(entry.topics)
            for topic in entry.topics:
                wanted = known.get(topic)
                if wanted is None:
                    left -= len(topics)
                    wanted = known[topic] = any(matches(subscription, topic) for subscription in topics)
                if wanted:
                    found.append(ordinal)
                    break
            if left <= 0:
                return found, ordinal + 1
        return found, behind

    def _drop_first(self) -> None:
        entry = self._entries[self._start]
        self._boundary = entry.position
        self._boundary_id = entry.id
        self.bytes -= entry.size
        for topic in entry.topics:
            line = self._lines[topic]
            line.start += 1
            if line.start == len(line.ordinals):
                del self._lines[topic]
                self._ends.pop(topic, None)
            elif line.start >= 64 and line.start * 2 > len(line.ordinals):
                del line.ordinals[: line.start]
                line.start = 0
        self._entries[self._start] = _GONE
        self._start += 1
        self.first += 1
        if self._memo:
            self._memo = {}
        # Moving the list costs its length: do it when half of it is gone.
        if self._start >= 1_024 and self._start * 2 > len(self._entries):
            del self._entries[: self._start]
            self._start = 0


_GONE: Any = None


def _position(entry: Entry) -> Any:
    return entry.position
