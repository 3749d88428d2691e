"""
Number what is published, and tell from the numbers what a stream missed.

A published event says its key (a topic of one publisher), its number there, when it
was sent, when the one before it was, and when the first was. So a stream knows what it
should have had, across reconnects and from the moment it was first open.
The words of a run's prompt are numbered, too: who repeats them shows what was lost.
Pure: no sockets, no clock.
"""

from collections import Counter
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
    """Of one key: how many events were acknowledged, when the first and last were sent, and by whose clock."""

    number: int
    first: int
    last: int
    machine: str = ""


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

    def see(self, counts: Counts, key: str, number: int, previous: int, first: int, slack: int = 0) -> None:
        """Judge one event; what was sent within *slack* µs of the first open is not owed."""
        at = self.seen.get(key)
        if at is None:
            gap = sent_after(self.opened + slack, number - 1, first, previous)
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

    def behind(self, key: str, published: Published, slack: int = 0) -> int:
        """Return how many events of *key* have not come yet, of those after the highest seen."""
        at = self.seen.get(key)
        if at is None:
            return sent_after(self.opened + slack, published.number, published.first, published.last)
        return max(0, published.number - at[0])


# In front of the number of each word of a prompt.
WORD = "#"


def prompt(words: int) -> str:
    """Return a prompt of so many numbered words."""
    return " ".join(f"{WORD}{number}" for number in range(words))


@dataclass(slots=True)
class Words:
    """
    The words of one answer: some of its maker's own, then the prompt's, repeated.

    Attributes:
        own: How many of the first kind were read.
        following: The number that comes next.
    """

    own: int = 0
    following: int = 0
    missing: set[int] = field(default_factory=set)

    def see(self, tally: Counter[str], word: str) -> None:
        """Judge one word."""
        text = word.removeprefix(WORD)
        if text == word or not text.isdigit():
            self.own += 1
            return
        number = int(text)
        if number >= self.following:
            self.missing.update(range(self.following, number))
            tally["tokens_lost"] += number - self.following
            self.following = number + 1
        elif number in self.missing:
            self.missing.discard(number)
            tally["tokens_lost"] -= 1
            tally["tokens_out_of_order"] += 1
        else:
            tally["tokens_duplicate"] += 1

    def end(self, tally: Counter[str], asked: int, told: int) -> None:
        """The answer is over: *asked* words were in the prompt, *told* in the whole answer, says its maker."""
        tally["tokens_lost"] += asked - self.following
        # Its own words have no numbers: too few of them are lost, too many came twice.
        missing = told - asked - self.own
        tally["tokens_lost" if missing > 0 else "tokens_duplicate"] += abs(missing)
