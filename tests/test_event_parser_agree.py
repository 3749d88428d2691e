"""
What the encoder writes, the parser reads back: any text, any number of events, any cut.
"""

import itertools
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.event import encode
from app.parser import Parser

examples = settings(max_examples=150)

# Characters that have a meaning somewhere on the way come up often.
awkward = st.sampled_from(list("\r\n\0: \t\ufeff\x0b\x0c\x1c\x85\u2028\u2029😀é")) | st.characters(
    exclude_categories=["Cs"]
)
text = st.text(awkward, max_size=60) | st.sampled_from(
    [
        "data: forged",
        "id: 1\n\nid: 2",
        "\n",
        "\r",
        "\r\n",
        "\n\n",
        "\r\r",
        "\n\r",
        " ",
        ": ",
        "\ufeff",
    ]
)
plain = st.text(awkward.filter(lambda character: character not in "\r\n\0"), max_size=20)
event = st.fixed_dictionaries(
    {"data": text},
    optional={
        "id": plain,
        "event": plain,
        "retry": st.none() | st.integers(0, 86_400_000),
    },
)


def parse(body: bytes, cuts: list[int]) -> tuple[Parser, list[tuple[str, str, str]]]:
    at = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    parser = Parser()
    events = [event for a, b in itertools.pairwise(at) for event in parser.feed(body[a:b])]
    return parser, [(event.event, event.data, event.id) for event in events]


def expected(events: list[dict]) -> list[tuple[str, str, str]]:
    """An event without an id carries the one before; line ends are read as LF."""
    id, result = "", []
    for event in events:
        id = event.get("id") or id
        data = re.sub(r"\r\n|\r", "\n", event["data"])
        result.append((event.get("event") or "message", data, id))
    return result


class TestRoundTrip:
    @examples
    @given(event)
    @example({"data": ""})
    @example({"data": " a\n  b\r\r\n\n c\n"})
    @example({"data": "\n", "event": "message", "id": " 1", "retry": 0})
    def test_one_event(self, event):
        """
        One block is one event, with its name, id, data and retry.
        """
        parser, events = parse(encode(**event), [])

        assert expected([event]) == events
        assert (event.get("id") or "") == parser.last_event_id
        assert event.get("retry") == parser.retry_ms

    @examples
    @given(st.lists(event, max_size=8), st.lists(st.integers(0, 1000), max_size=20))
    def test_many_events_in_any_pieces(self, events, cuts):
        """
        Joined blocks stay apart, and it does not matter where the network cuts them.
        """
        _, parsed = parse(b"".join(encode(**event) for event in events), cuts)

        assert expected(events) == parsed

    @examples
    @given(st.lists(event, max_size=4))
    def test_byte_by_byte(self, events):
        """
        Nothing is lost when every byte comes alone.
        """
        body = b"".join(encode(**event) for event in events)

        _, parsed = parse(body, list(range(len(body))))

        assert expected(events) == parsed
