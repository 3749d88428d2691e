"""The retained part of the log: what is owed, what is a position, what is let go."""

import gc
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import window as window_module
from app.event import Entry, matches
from app.log import Position
from app.window import AHEAD, LOST, Window


def entry(number: int, *topics: str, data: str = "") -> Entry:
    return Entry((number, 0), f"e:{number}-0", topics, data or f"{number}")


def filled(*rows: tuple[str, ...], max_bytes: int = 1 << 30) -> Window:
    """A window behind position 0 with one entry for each of *rows*, at 1, 2, 3..."""
    window = Window(max_bytes)
    window.reset("e", (0, 0), "e:0-0")
    for number, topics in enumerate(rows, 1):
        window.append(entry(number, *topics))
    return window


def everything(window: Window, topics: tuple[str, ...], cursor: int, max_bytes: int = 1) -> list[bytes]:
    """All pieces that *topics* are owed from *cursor* on, in the order of pulling."""
    pieces = []
    while cursor < window.end:
        data, after, events, last = window.pull(topics, cursor, max_bytes)
        assert cursor < after
        assert cursor <= last <= after
        assert (events > 0) == bool(data) == (last > cursor)
        if data:
            pieces.append(data)
        cursor = after
    assert cursor == window.end
    return pieces


class TestLocate:
    def test_entry(self):
        """
        The position of an entry leads behind it.
        """
        window = filled(("a",), ("b",), ("a",))

        assert [window.first + 1, window.first + 2, window.end] == [window.locate((n, 0)) for n in (1, 2, 3)]

    def test_boundary(self):
        """
        Whoever has seen the last entry before the window has missed nothing of it.
        """
        window = filled(("a",), ("b",), ("a",))
        window.trim_before((3, 0))

        assert window.first == window.locate((2, 0))

    def test_before_the_boundary(self):
        """
        What came before is lost.
        """
        window = filled(("a",), ("b",), ("a",))
        window.trim_before((3, 0))

        assert LOST == window.locate((1, 0))
        assert LOST == window.locate((0, 0))

    def test_between_entries(self):
        """
        A position that never was an entry is none: it may be of a history that was lost.
        """
        assert LOST == filled(("a",), ("b",)).locate((1, 5))

    def test_ahead(self):
        """
        Another process may have read further.
        """
        assert AHEAD == filled(("a",), ("b",)).locate((3, 0))

    def test_empty_window(self):
        """
        Its boundary is a position, later ones are ahead, and earlier ones lost.
        """
        window = Window(1000)
        window.reset("e", (5, 0), "e:5-0")

        assert window.end == window.locate((5, 0))
        assert AHEAD == window.locate((5, 1))
        assert LOST == window.locate((4, 0))

    def test_emptied_window(self):
        """
        The last entry that was let go is the boundary, however the window became empty.
        """
        window = filled(("a",), ("b",))
        window.trim_before((9, 0))

        assert 0 == len(window)
        assert window.end == window.locate((2, 0))
        assert LOST == window.locate((1, 0))
        assert AHEAD == window.locate((9, 0))


class TestIdAt:
    def test_behind_an_entry(self):
        """
        The id of a cursor is that of the entry before it, whether or not it was wanted.
        """
        window = filled(("a",), ("b",))

        assert ["e:1-0", "e:2-0"] == [window.id_at(window.first + 1), window.id_at(window.end)]

    def test_at_the_beginning(self):
        """
        At the beginning that is the boundary.
        """
        window = filled(("a",), ("b",), ("a",))
        window.trim_before((2, 0))

        assert "e:1-0" == window.id_at(window.first)

    def test_there_and_back(self):
        """
        The id of each cursor leads to that cursor again.
        """
        window = filled(*[("a",)] * 5)
        window.trim_before((3, 0))

        for cursor in range(window.first, window.end + 1):
            number = int(window.id_at(cursor).removeprefix("e:").removesuffix("-0"))
            assert cursor == window.locate((number, 0))


class TestReset:
    def test_cursors_of_before(self):
        """
        Ordinals only grow, and `resets` tells that cursors of before mean nothing now.
        """
        window = filled(("a",), ("b",))
        before = window.end
        window.reset("f", (7, 0), "f:7-0")
        window.append(entry(8, "a"))

        assert window.first >= before
        assert 1 == window.resets - filled().resets
        assert "f" == window.epoch

    def test_positions_of_before(self):
        """
        Positions of before are not found.
        """
        window = filled(("a",), ("b",))
        window.reset("f", (7, 0), "f:7-0")

        assert LOST == window.locate((2, 0))
        assert 0 == window.bytes
        assert window.oldest() is None
        assert (7, 0) == window.newest()

    def test_topics_of_before(self):
        """
        Nothing of before is owed to anybody.
        """
        window = filled(("a",), ("b",))
        window.pull(("a",), window.first, 100)
        window.reset("f", (7, 0), "f:7-0")

        assert (b"", window.end, 0, window.end) == window.pull(("a",), window.end, 100)

    def test_memory_of_before(self):
        """
        Topics of before leave nothing behind, whether or not they are used again.
        """
        window = filled(("a",), ("b",), ("a", "c"))
        window.reset("f", (7, 0), "f:7-0")
        window.append(entry(8, "a"))
        window.trim_before((9, 0))

        assert {} == window._lines
        assert (0, 0) == (len(window), window.bytes)


class TestPull:
    def test_one_topic(self):
        """
        A topic's entries come in order, and the cursor goes to the end past all others.
        """
        window = filled(("a",), ("b",), ("a",), ("b",))

        data, cursor, events, last = window.pull(("a",), window.first, 1000)

        assert entry(1, "a").block + entry(3, "a").block == data
        assert (window.end, 2, window.first + 3) == (cursor, events, last)

    def test_several_topics(self):
        """
        Entries of several topics come in the order of the log.
        """
        window = filled(("b",), ("a",), ("c",), ("b",), ("a",))

        data, *_ = window.pull(("a", "b"), window.first, 1000)

        assert b"".join(entry(n).block for n in (1, 2, 4, 5)) == data

    def test_entry_on_two_of_the_topics(self):
        """
        One event on two of a stream's topics arrives once.
        """
        window = filled(("a", "b"), ("b", "a"))

        data, _, events, _ = window.pull(("a", "b"), window.first, 1000)

        assert entry(1).block + entry(2).block == data
        assert 2 == events

    def test_topic_and_prefix_that_cover_the_same(self):
        """
        The same holds for a topic and a prefix.
        """
        window = filled(("a/1",), ("a/2",))

        data, _, events, _ = window.pull(("a/*", "a/1", "*"), window.first, 1000)

        assert entry(1).block + entry(2).block == data
        assert 2 == events

    def test_prefix_and_users(self):
        """
        A prefix brings no user's own topic.
        """
        window = filled(("user:ann",), ("use",), ("user:ann", "b"))

        assert entry(2).block + entry(3).block == window.pull(("*",), window.first, 1000)[0]
        assert entry(1).block + entry(3).block == window.pull(("user:a*",), window.first, 1000)[0]

    def test_nothing_owed(self):
        """
        The cursor moves past what others are owed.
        """
        window = filled(("a",), ("b",))

        assert (b"", window.end, 0, window.first) == window.pull(("c",), window.first, 1000)

    def test_limit(self):
        """
        A piece ends with the event that reaches the limit.
        """
        window = filled(("a",), ("a",), ("a",))
        size = len(entry(1).block)

        data, cursor, events, last = window.pull(("a",), window.first, size + 1)

        assert entry(1).block + entry(2).block == data
        assert (window.first + 2, 2, window.first + 2) == (cursor, events, last)

    def test_event_larger_than_the_limit(self):
        """
        A piece has at least one event if one is owed.
        """
        window = filled()
        window.append(entry(1, "a", data="x" * 5000))
        window.append(entry(2, "a"))

        data, cursor, events, _ = window.pull(("a",), window.first, 100)

        assert entry(1, data="x" * 5000).block == data
        assert (window.first + 1, 1) == (cursor, events)

    def test_many_pieces_of_several_topics(self, monkeypatch):
        """
        Where one topic's part of a piece is cut off, no later entry of another topic comes first.
        """
        monkeypatch.setattr(window_module, "_LINE_ENTRIES", 2)
        rows = [("a",)] * 7 + [("b",)] + [("a", "b")] * 3 + [("c",), ("b",)] * 3
        window = filled(*rows)

        pieces = everything(window, ("a", "b"), window.first, 1 << 20)

        owed = [n for n, topics in enumerate(rows, 1) if topics != ("c",)]
        assert b"".join(entry(n).block for n in owed) == b"".join(pieces)

    def test_many_pieces_of_a_prefix(self, monkeypatch):
        """
        A prefix looks at so many entries in a piece, and moves on where none matched.
        """
        monkeypatch.setattr(window_module, "_SCAN_ENTRIES", 3)
        window = filled(*[("b",)] * 10, ("a/1",), *[("b",)] * 10)

        assert [entry(11).block] == everything(window, ("a/*",), window.first)

    def test_piece_of_a_prefix_ends_by_entries(self, monkeypatch):
        """
        A replay of a prefix that matches nothing looks at so many entries at a time, not at the whole window.
        """
        monkeypatch.setattr(window_module, "_SCAN_ENTRIES", 100)
        window = filled(*[("b",)] * 350)

        ends, cursor = [], window.first
        while cursor < window.end:
            data, cursor, _, _ = window.pull(("a/*",), cursor, 1 << 20)
            assert b"" == data
            ends.append(cursor - window.first)

        assert [100, 200, 300, 350] == ends

    @pytest.mark.parametrize("on", [1, 5, 50], ids=lambda on: f"on {on} topics")
    @pytest.mark.parametrize("of", [1, 5, 50], ids=lambda of: f"of {of} prefixes")
    def test_piece_of_a_prefix_ends_by_comparisons(self, monkeypatch, of, on):
        """
        Where events and subscriptions have many topics, a piece ends after so many comparisons, and loses nothing.
        """
        monkeypatch.setattr(window_module, "_SCAN_TOPICS", 500)
        compared = 0

        def counting(subscription: str, topic: str) -> bool:
            nonlocal compared
            compared += 1
            return matches(subscription, topic)

        monkeypatch.setattr(window_module, "matches", counting)
        rows = [tuple(f"b/{n}/{m}" for m in range(on)) for n in range(60)]
        rows[33] = ("a/49/x",)
        window = filled(*rows)

        worst, found, cursor = 0, b"", window.first
        while cursor < window.end:
            compared = 0
            data, after, _, _ = window.pull(tuple(f"a/{n}/*" for n in range(50 - of, 50)), cursor, 1 << 20)
            assert cursor < after
            worst, found, cursor = max(worst, compared), found + data, after

        assert entry(34, "a/49/x").block == found
        # The entry that reaches the bound is looked at as a whole.
        assert worst <= 500 + of * on

    def test_topics_of_many_entries_count(self, monkeypatch):
        """
        An entry counts with all its topics, also where all were compared before: each is looked up.
        """
        monkeypatch.setattr(window_module, "_SCAN_TOPICS", 500)
        window = filled(*[tuple(f"b/{m}" for m in range(50))] * 60)

        ends, cursor = [], window.first
        while cursor < window.end:
            _, cursor, _, _ = window.pull(("a/*",), cursor, 1 << 20)
            ends.append(cursor)

        # The first entry is compared (50) and looked up (50), eight more are looked up.
        assert [9] * 6 + [6] == [end - begin for begin, end in pairwise([window.first, *ends])]

    def test_topics_that_come_again_are_compared_once(self, monkeypatch):
        """
        A piece compares a topic with the subscriptions once, however many entries are on it.
        """
        calls: list[str] = []
        monkeypatch.setattr(window_module, "matches", lambda _, topic: calls.append(topic))
        window = filled(*[("b", "c")] * 500)

        assert window.end == window.pull(("a/*",), window.first, 1 << 20)[1]
        assert ["b", "c"] == calls

    def test_storm(self):
        """
        Streams that ask for the same get the same bytes object.
        """
        window = filled(("a",), ("a",))

        first, second = (window.pull(("a",), window.first, 1000)[0] for _ in range(2))

        assert first is second

    def test_piece_after_an_append(self):
        """
        What was pulled before does not hide what came after.
        """
        window = filled(("a",))
        window.pull(("a",), window.first, 1000)
        window.append(entry(2, "a"))

        assert entry(1).block + entry(2).block == window.pull(("a",), window.first, 1000)[0]

    def test_end_after_an_append(self):
        """
        The end that was pulled before is not the end any more.
        """
        window = filled(("a",))
        window.pull(("b",), window.end, 1000)
        window.append(entry(2, "a"))

        assert window.end == window.pull(("b",), window.end - 1, 1000)[1]

    def test_memory_of_a_storm(self):
        """
        Shared pieces are not kept without bound.
        """
        window = filled(*[("a",)] * 600)
        for cursor in range(window.first, window.end):
            window.pull(("a",), cursor, 100)

        assert len(window._memo) <= 256

    def test_memory_of_a_storm_of_large_events(self):
        """
        Nor are they where each is large: they are copies, over and above SSE_WINDOW_MAX_BYTES.
        """
        window = filled()
        for number in range(1, 61):
            window.append(entry(number, "a", data="x" * (1_000_000 if number % 2 else 100)))
        for cursor in range(window.first, window.end):
            window.pull(("a",), cursor, 65_536)

        assert 1 < len(window._memo)
        assert sum(len(piece) for piece, *_ in window._memo.values()) <= 16_000_000


class TestTrim:
    def test_by_bytes(self):
        """
        The oldest entries go before memory passes its limit; the newest always stays.
        """
        window = Window(10 * entry(1, "a").size)
        window.reset("e", (0, 0), "e:0-0")
        for number in range(1, 31):
            window.append(entry(number, "a"))
            assert window.bytes <= window.max_bytes

        assert 10 >= len(window) >= 9
        assert (30, 0) == window.newest()

    def test_event_larger_than_the_window(self):
        """
        An event that is larger than all memory allowed is still delivered.
        """
        window = filled(("a",), max_bytes=2000)
        window.append(entry(2, "a", data="x" * 10_000))

        assert 1 == len(window)
        assert [entry(2, data="x" * 10_000).block] == everything(window, ("a",), window.first)

    def test_topics_that_have_no_entries_left(self):
        """
        A topic that was used once leaves nothing behind: topics may be made by the million.
        """
        window = filled(*[(f"once/{n}",) for n in range(100)])
        window.trim_before((101, 0))

        assert {} == window._lines
        assert 0 == window.bytes

    def test_entries_without_topics(self):
        """
        A broken entry keeps its place and reaches nobody.
        """
        window = filled(("a",), (), ("a",))

        assert window.first + 2 == window.locate((2, 0))
        assert entry(1).block + entry(3).block == window.pull(("a",), window.first, 1000)[0]
        assert entry(1).block + entry(3).block == window.pull(("*",), window.first, 1000)[0]

    def test_long_life(self):
        """
        Lists are moved up now and then: their length follows what is kept, not what ever was.
        """
        window = Window(1 << 30)
        window.reset("e", (0, 0), "e:0-0")
        for number in range(1, 20_001):
            window.append(entry(number, "all", f"{number % 7}"))
            if number > 500:
                window.trim_before((number - 499, 0))

        assert 500 == len(window)
        assert len(window._entries) <= 4096
        assert all(len(line.ordinals) <= 2048 for line in window._lines.values())
        assert window.first + 1 == window.locate((19_501, 0))
        assert b"".join(entry(n).block for n in range(19_501, 20_001)) == b"".join(
            everything(window, ("all",), window.first)
        )


class TestBytes:
    """`bytes` bounds the memory of a process: too low an estimate is a process that is killed."""

    @pytest.mark.parametrize("topics", [1, 50], ids=["one topic", "50 topics"])
    @pytest.mark.parametrize(
        "data",
        [
            "",
            "x" * 10,
            "x" * 5_000,
            "ä" * 5_000,
            "€" * 5_000,
            "\U0001f600" * 5_000,
            "x" * 5_000 + "\U0001f600",
            "\n" * 5_000,
            "\r" * 5_000,
            "\r\n" * 5_000,
            "a\n" * 5_000,
        ],
        ids=lambda data: f"{len(data)} {data[-2:]!a}",
    )
    def test_what_python_really_takes(self, data: str, topics: int):
        """
        The estimate is at least what entries with their blocks and topics take, and at most a few times that.
        """
        rows = 16
        window = filled()
        # As decoded from a reply, so that no two entries share their text.
        raw = data.encode()
        gc.collect()
        tracemalloc.start()
        try:
            for n in range(rows):
                ms = 1_763_712_000_000 + n
                names = tuple(f"orders/{n}/{m}" for m in range(topics))
                window.append(Entry(Position(ms, 0), f"k3f9a2b1:{ms}-0", names, raw.decode(), "created"))
            for each in window._entries:
                assert each.block.startswith(b"id: k3f9a2b1:")
            # What threads of other tests in this process take meanwhile is not this test's matter.
            ours = [tracemalloc.Filter(True, path) for path in ("*/app/*", __file__)]
            found = tracemalloc.take_snapshot().filter_traces(ours).statistics("filename")
        finally:
            tracemalloc.stop()
        real = sum(each.size for each in found)

        assert real <= window.bytes <= 3 * real


topics = st.sampled_from(["a", "b", "a/1", "a/2", "user:ann", "c"])
subscriptions = st.lists(
    st.sampled_from(["a", "b", "a/1", "a/*", "*", "user:*", "user:ann", "nobody"]), min_size=1, max_size=4, unique=True
).map(tuple)
rows = st.lists(st.lists(topics, max_size=3, unique=True).map(tuple), max_size=40)


class TestModel:
    @given(rows, subscriptions, st.integers(0, 40), st.integers(0, 45), st.integers(1, 400), st.integers(1, 5))
    def test_pull_gives_what_matches(self, rows, wanted, start, trimmed, max_bytes, bound):
        """
        For any log, trim, subscription and limit, pieces are what matches, once, in order.
        """
        line_entries, scan_entries = window_module._LINE_ENTRIES, window_module._SCAN_ENTRIES
        window_module._LINE_ENTRIES = window_module._SCAN_ENTRIES = bound
        try:
            window = filled(*rows)
            begin = window.first
            window.trim_before((trimmed, 0))
            cursor = min(max(window.first, begin + start), window.end)

            pieces = everything(window, wanted, cursor, max_bytes)
        finally:
            window_module._LINE_ENTRIES, window_module._SCAN_ENTRIES = line_entries, scan_entries

        owed = [
            entry(number).block
            for number, on in enumerate(rows, 1)
            if begin + number - 1 >= cursor and any(matches(w, topic) for w in wanted for topic in on)
        ]
        assert b"".join(owed) == b"".join(pieces)

    @given(st.lists(st.integers(0, 3000), min_size=1, max_size=60), st.integers(1000, 8000))
    def test_bytes(self, sizes, limit):
        """
        The estimate is the sum of what is kept, and never above the limit but for one entry.
        """
        window = Window(limit)
        window.reset("e", (0, 0), "e:0-0")
        for number, size in enumerate(sizes, 1):
            window.append(entry(number, "a", data="x" * size))

            kept = window._entries[window._start :]
            assert sum(e.size for e in kept) == window.bytes
            assert window.bytes <= limit or len(window) == 1
            assert all(a.position < b.position for a, b in pairwise(kept))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_length(count):
    """
    The length of a window is the number of its entries.
    """
    assert count == len(filled(*[("a",)] * count))
