"""
Number what is published, and tell from the numbers what a stream missed.

A published event says its key (a topic of one publisher), its number there, when it
was sent, when the one before it was, and when the first was. So a stream knows what it
should have had, across reconnects and from the moment it was first open.
Pure: no sockets, no clock.
"""

from dataclasses import dataclass, field

# In front of every event of ours; others are not judged.
MARK = "sse1"
MICROSECONDS = 1_000_000


def stamp(key: str, number: int, sent: int, previous: int, first: int, machine: str, size: int) -> str:
    """
    Return the `data` of one event, at least *size* characters; times in µs since 1970.

    *machine* names whose clock the times are of: latency is only taken on the same one.
    """
    text = f"{MARK} {key} {number} {sent} {previous} {first} {machine} "
    return text + "." * max(0, size - len(text))


@dataclass(slots=True)
class Counts:
    """What all streams of one process missed, read twice, or read in a wrong order."""

    lost: int = 0
    announced: int = 0
    duplicate: int = 0
    out_of_order: int = 0


def sent_after(opened: int, number: int, first: int, last: int) -> int:
    """
    Return how many of *number* events, sent evenly from *first* to *last*, were sent after *opened*.

    Exact at both ends: all of them, if the first was; none, if not even the last was.
    """
    if number == 0 or last <= opened:
        return 0
    if first > opened:
        return number
    # Here first <= opened < last, so there are at least two.
    period = (last - first) / (number - 1)
    return max(1, number - 1 - int((opened - first) / period))


@dataclass(slots=True)
class Published:
    """Of one key: how many events were acknowledged, and when the first and last were sent."""

    number: int
    first: int
    last: int


@dataclass(slots=True)
class Sequences:
    """
    The numbers that one stream has seen, through all of its reconnects.

    Attributes:
        opened: When it was first open, µs since 1970: what was sent later, it must get.
    """

    opened: int = 0
    # Key -> [highest number, number it began with].
    seen: dict[str, list[int]] = field(default_factory=dict)
    # Numbers that were passed over, by key; they may still come, late.
    missing: dict[str, set[int]] | None = None
    # Keys whose history the server said was lost: their next gap is announced.
    told: set[str] | None = None

    def see(self, counts: Counts, key: str, number: int, previous: int, first: int) -> None:
        """Judge one event."""
        at = self.seen.get(key)
        if at is None:
            gap = sent_after(self.opened, number - 1, first, previous)
            self.seen[key] = [number, number - gap]
            if gap:
                self._miss(counts, key, number - gap, number)
            return
        highest = at[0]
        if number == highest + 1:
            at[0] = number
            if self.told is not None:
                self.told.discard(key)
        elif number > highest:
            self._miss(counts, key, highest + 1, number)
            at[0] = number
        elif self.missing is not None and number in self.missing.get(key, ()):
            self.missing[key].discard(number)
            counts.lost -= 1
            counts.out_of_order += 1
        elif number < at[1]:
            at[1] = number
            counts.out_of_order += 1
        else:
            counts.duplicate += 1

    def reset(self) -> None:
        """The server said that history was lost."""
        self.told = set(self.seen)

    def _miss(self, counts: Counts, key: str, start: int, stop: int) -> None:
        if self.told is not None and key in self.told:
            self.told.discard(key)
            counts.announced += stop - start
            return
        counts.lost += stop - start
        if self.missing is None:
            self.missing = {}
        self.missing.setdefault(key, set()).update(range(start, stop))

    def behind(self, key: str, published: Published) -> int:
        """Return how many events of *key* have not come yet, of those after the highest seen."""
        at = self.seen.get(key)
        if at is None:
            return sent_after(self.opened, published.number, published.first, published.last)
        return max(0, published.number - at[0])
