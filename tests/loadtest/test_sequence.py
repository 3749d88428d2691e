"""What a stream missed is told from the numbers, to the event."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.sequence import Counts, Published, Sequences, Words, prompt, sent_after, stamp


class Sender:
    """Numbers events of one key, one per second from second 1 on."""

    def __init__(self, key: str = "k") -> None:
        self.key = key

    def show(self, sequences: Sequences, counts: Counts, number: int) -> None:
        sequences.see(counts, self.key, number, max(1, number - 1), 1)


def judged(numbers: list[int], opened: float = 0) -> tuple[int, int, int]:
    """Lost, duplicate and out of order, after these numbers on one stream."""
    sequences, counts = Sequences(opened=opened), Counts()  # type: ignore[arg-type]
    for number in numbers:
        Sender().show(sequences, counts, number)
    return counts.lost, counts.duplicate, counts.out_of_order


class TestSequences:
    def test_nothing_wrong(self):
        assert (0, 0, 0) == judged([1, 2, 3, 4])

    def test_lost(self):
        assert (3, 0, 0) == judged([1, 3, 6])

    def test_lost_before_the_first(self):
        """A stream that was open before the first event misses those before the one it saw."""
        assert (4, 0, 0) == judged([5, 6])

    def test_opened_midway(self):
        """Opened after 3 and before 4 were sent: of 4 and 5, it should have had both."""
        assert (2, 0, 0) == judged([6, 7], opened=3.5)
        assert (0, 0, 0) == judged([4, 5], opened=3.5)
        assert (0, 0, 0) == judged([6, 7], opened=6.5)

    def test_duplicate(self):
        assert (0, 2, 0) == judged([1, 2, 2, 3, 1])

    def test_late(self):
        """An event that comes after a later one is out of order, and not lost."""
        assert (0, 0, 1) == judged([1, 3, 2, 4])
        assert (0, 0, 2) == judged([3, 2, 1])

    def test_late_and_again(self):
        assert (0, 1, 1) == judged([1, 3, 2, 2])

    def test_late_before_the_first(self):
        """An older event than the first, which nothing promised: late, not doubled."""
        assert (0, 0, 1) == judged([7, 6], opened=6.5)

    def test_keys_are_apart(self):
        sequences, counts = Sequences(), Counts()
        for key in ("a", "b"):
            for number in (1, 2, 4):
                Sender(key).show(sequences, counts, number)

        assert (2, 0) == (counts.lost, counts.duplicate)

    def test_announced_once(self):
        """After `stream.reset` the next gap of each key is announced, later ones are lost."""
        sequences, counts = Sequences(), Counts()
        for number in (1, 2):
            Sender().show(sequences, counts, number)
        sequences.reset()
        for number in (6, 8):
            Sender().show(sequences, counts, number)

        assert (3, 1) == (counts.announced, counts.lost)

    def test_behind(self):
        """What has not come at the end: after the highest number, or all of it."""
        sequences = Sequences(opened=0)
        Sender().show(sequences, Counts(), 1)

        assert 4 == sequences.behind("k", Published(5, 1, 5))
        assert 3 == sequences.behind("never seen", Published(3, 1, 3))
        assert 0 == sequences.behind("sent before it was open", Published(3, -3, -1))
        assert 0 == sequences.behind("k", Published(1, 1, 1))

    @given(st.lists(st.integers(1, 12), max_size=40))
    def test_as_counted_by_hand(self, numbers):
        """However events come, the counts are those of a list that remembers everything."""
        seen: set[int] = set()
        duplicate = late = 0
        for number in numbers:
            if number in seen:
                duplicate += 1
            elif seen and number < max(seen):
                late += 1
            seen.add(number)
        lost = max(seen) - len(seen) if seen else 0

        assert (lost, duplicate, late) == judged(numbers)


class TestSentAfter:
    @given(st.integers(1, 30), st.floats(-2, 35))
    def test_events_of_even_times(self, number, opened):
        """Sent at 1, 2, 3 and so on: exactly those later than the opening."""
        expected = sum(1 for at in range(1, number + 1) if at > opened)

        assert expected == sent_after(opened, number, 1, number)  # type: ignore[arg-type]


class TestStamp:
    def test_size(self):
        assert 200 == len(stamp("k", 1, 2, 3, 4, "m", 200))

    def test_words(self):
        """Seven words and the padding, whatever the size: the reader splits at spaces."""
        for size in (0, 500):
            assert ["sse1", "k", "1", "2", "3", "4", "m"] == stamp("k", 1, 2, 3, 4, "m", size).split(" ", 7)[:7]


class TestOtherClock:
    def test_slack(self):
        """What a clock that is a little ahead calls sent after the open is not owed; what is clearly later, is."""
        counts, sequences = Counts(), Sequences(opened=10_000)
        sequences.see(counts, "a", 3, previous=10_500, first=9_500, slack=1_000)
        behind = sequences.behind("b", Published(2, 10_100, 10_900), slack=1_000)
        assert (0, 0) == (counts.lost, behind)

        sequences.see(counts, "c", 3, previous=13_000, first=12_000, slack=1_000)
        assert (2, 2) == (counts.lost, sequences.behind("d", Published(2, 12_000, 13_000), slack=1_000))


class TestWords:
    """Of a run: an answer of two words of its own, then those of the prompt."""

    def counts(self, answer: str, asked: int = 5) -> tuple[int, int, int]:
        tally, words = Counter(), Words()
        for word in answer.split():
            words.see(tally, word)
        words.end(tally, asked, asked + 2)
        return tally["tokens_lost"], tally["tokens_duplicate"], tally["tokens_out_of_order"]

    @pytest.mark.parametrize(
        ("answer", "counts"),
        [
            ("You wrote: #0 #1 #2 #3 #4", (0, 0, 0)),
            ("You wrote: #1 #2 #4", (2, 0, 0)),
            ("You wrote: #0 #1 #2", (2, 0, 0)),
            ("wrote: #0 #1 #2 #3 #4", (1, 0, 0)),
            ("You wrote: wrote: #0 #1 #1 #2 #3 #4", (0, 2, 0)),
            ("You wrote: #0 #2 #1 #3 #4 #0", (0, 1, 1)),
            ("", (7, 0, 0)),
        ],
    )
    def test_exact(self, answer, counts):
        assert counts == self.counts(answer)

    def test_prompt(self):
        """What the prompt says is what is looked for."""
        assert (0, 0, 0) == self.counts(f"You wrote: {prompt(5)}")
