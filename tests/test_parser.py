"""
The parser reads what the standard says, however the bytes were cut.

The cases follow the text of the standard; their names are those of the web-platform tests' files
`eventsource/format-*`, and of the examples in the standard's section on interpreting a stream.
Every case runs whole, byte by byte, and cut in two at every place.
https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.parser import EventTooLong, Parser, ServerSentEvent

examples = settings(max_examples=300)


@dataclass
class Case:
    body: bytes
    events: list[tuple[str, str, str]] = field(default_factory=list)
    last_event_id: str = ""
    retry_ms: int | None = None


def message(data: str, id: str = "") -> tuple[str, str, str]:
    return ("message", data, id)


def shared_cases() -> dict[str, Case]:
    """
    Return the cases, which the browser client's parser passes too.

    Bodies are bytes, so each stands there as a text of characters up to U+00FF.
    """
    listed = json.loads(Path(__file__).with_name("parser_cases.json").read_text())
    return {
        each["name"]: Case(
            each["body"].encode("latin-1"),
            [(event, data, id) for event, data, id in each["events"]],
            each["last_event_id"],
            each["retry_ms"],
        )
        for each in listed
    }


CASES = shared_cases()


def read(pieces: list[bytes], **limits: int) -> tuple[Parser, list[tuple[str, str, str]]]:
    parser = Parser(**limits)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return parser, [(event.event, event.data, event.id) for event in events]


def outcome(pieces: list[bytes]) -> Case:
    parser, events = read(pieces)
    return Case(b"".join(pieces), events, parser.last_event_id, parser.retry_ms)


@pytest.mark.parametrize("name", CASES)
class TestTheStandardsCases:
    def test_whole(self, name):
        """
        One feed holds the whole body.
        """
        case = CASES[name]

        assert case == outcome([case.body])

    def test_byte_by_byte(self, name):
        """
        Every feed holds one byte, with feeds of nothing between.
        """
        case = CASES[name]
        pieces = [piece for byte in case.body for piece in (bytes([byte]), b"")]

        assert case == outcome(pieces)

    def test_every_cut_in_two(self, name):
        """
        It does not matter where the network cuts the body.
        """
        case = CASES[name]

        for at in range(len(case.body) + 1):
            assert case == outcome([case.body[:at], case.body[at:]]), f"cut at {at}"


class TestFeed:
    def test_a_lone_cr_dispatches_at_once(self):
        """
        An event that ended in CR does not wait for a byte that may be its LF.
        """
        parser = Parser()

        assert [ServerSentEvent("message", "a", "")] == parser.feed(b"data: a\r\r")
        assert [] == parser.feed(b"\n")
        assert [ServerSentEvent("message", "b", "")] == parser.feed(b"data: b\r\n\r")
        assert [] == parser.feed(b"")
        assert [ServerSentEvent("message", "c", "")] == parser.feed(b"\ndata: c\n\n")

    def test_an_lf_after_crlf_is_a_line_of_its_own(self):
        """
        Only one LF belongs to a CR.
        """
        parser = Parser()
        parser.feed(b"data: a\r")

        assert [ServerSentEvent("message", "a", "")] == parser.feed(b"\n\n")

    def test_first_bytes_are_kept_back_only_while_they_may_be_a_bom(self):
        """
        A body that does not begin with a byte order mark is not delayed.
        """
        assert [ServerSentEvent("message", "", "")] == Parser().feed(b"data\n\n")
        parser = Parser()
        parser.feed(b"\r")
        assert [ServerSentEvent("message", "", "")] == parser.feed(b"data\n\n")

    def test_a_reconnected_stream_goes_on_with_its_id(self):
        """
        An event without an id carries the id that the client resumed from.
        """
        parser = Parser(last_event_id="41")

        assert "41" == parser.last_event_id
        assert [ServerSentEvent("message", "a", "41")] == parser.feed(b"data: a\n\n")

    def test_other_buffers(self):
        """
        What a transport hands out as bytearray is as good.
        """
        assert [ServerSentEvent("a", "b\nc", "1")] == Parser().feed(bytearray(b"event: a\nid: 1\ndata: b\ndata: c\n\n"))


class TestMaxEventBytes:
    BODY = b"id: 1\ndata: a\n\nid: 2\ndata: " + b"x" * 60 + b"\ndata: " + b"y" * 60 + b"\n\ndata: b\n\n"

    def whole(self, limit):
        parser = Parser(max_event_bytes=limit)
        try:
            return parser.feed(self.BODY), None
        except EventTooLong as error:
            return error.events, error

    def in_bytes(self, limit):
        parser, events = Parser(max_event_bytes=limit), []
        for byte in self.BODY:
            try:
                events += parser.feed(bytes([byte]))
            except EventTooLong as error:
                return events + error.events, error
        return events, None

    def test_over_the_limit(self):
        """
        The error names rule, value and cure, carries the events before it, and stays.
        """
        events, error = self.whole(100)

        assert [ServerSentEvent("message", "a", "1")] == events
        assert "event must fit into 100 bytes, got 127 bytes so far. Raise max_event_bytes" in str(error)
        parser = Parser(max_event_bytes=10)
        for body in (b"data: 0123456789\n\n", b"data: a\n\n"):
            with pytest.raises(EventTooLong):
                parser.feed(body)

    def test_same_for_any_cut(self):
        """
        The limit does not depend on how the bytes arrive.
        """
        for limit in range(1, 140):
            (whole, error), (cut, cut_error) = self.whole(limit), self.in_bytes(limit)
            assert whole == cut
            assert (error is None) == (cut_error is None), limit
        assert error is None

    @pytest.mark.parametrize("flood", [b"x" * 50, b":" + b"x" * 50, b"data\n" * 50, b"data: \n" * 50])
    def test_what_is_held_is_counted(self, flood):
        """
        A line without an end, a comment, or many empty lines cannot fill the memory.
        """
        parser = Parser(max_event_bytes=40)

        with pytest.raises(EventTooLong):
            parser.feed(flood)

    def test_what_is_not_held_is_not_counted(self):
        """
        Comments and events pass for ever under a small limit.
        """
        parser = Parser(max_event_bytes=40)

        for _ in range(100):
            parser.feed(b": still here\nid: 1\nevent: a\n")
        for _ in range(100):
            assert 1 == len(parser.feed(b"data: 0123456789\n\n"))


def seconds_of_cpu(pieces: list[bytes], count: int) -> float:
    """Least of three runs, so that a busy machine does not count."""
    least = float("inf")
    for _ in range(3):
        started = time.process_time()
        _, events = read(pieces)
        least = min(least, time.process_time() - started)
        assert count == len(events)
    return least


class TestTime:
    @pytest.mark.parametrize(("piece", "size"), [(1, 2**16), (4096, 2**22)])
    @pytest.mark.parametrize("line", [2**24, 256])
    def test_huge_event_in_small_pieces(self, piece, size, line):
        """
        Time is linear: four times the bytes take four times as long; were it quadratic, sixteen.
        """

        def seconds(size: int) -> float:
            lines = [b"data: %b\n" % (b"x" * min(line, size))] * max(1, size // line)
            body = b"".join(lines) + b"\n"
            pieces = [body[at : at + piece] for at in range(0, len(body), piece)]
            return seconds_of_cpu(pieces, 1)

        assert seconds(4 * size) < 9 * seconds(size)

    def test_many_small_events(self):
        """
        The load generator reads with this parser: under 10 µs for an event of 120 bytes.
        """
        block = b'id: k3f9a2b1:1763712000000-0\nevent: tick\ndata: {"sequence":1,"pad":"' + b"x" * 50 + b'"}\n\n'
        pieces = [block * 500] * 10

        assert seconds_of_cpu(pieces, 5000) / 5000 < 10e-6


# --- Against the standard, step by step ---


def decode_as_the_standard(data: bytes) -> str:
    """The WHATWG UTF-8 decoder, byte by byte; a stream that is cut never reaches its end step."""
    text, at = "", 0
    point = seen = needed = 0
    lower, upper = 0x80, 0xBF
    while at < len(data):
        byte = data[at]
        at += 1
        if needed == 0:
            if byte <= 0x7F:
                text += chr(byte)
            elif 0xC2 <= byte <= 0xDF:
                needed, point = 1, byte & 0x1F
            elif 0xE0 <= byte <= 0xEF:
                lower = 0xA0 if byte == 0xE0 else 0x80
                upper = 0x9F if byte == 0xED else 0xBF
                needed, point = 2, byte & 0xF
            elif 0xF0 <= byte <= 0xF4:
                lower = 0x90 if byte == 0xF0 else 0x80
                upper = 0x8F if byte == 0xF4 else 0xBF
                needed, point = 3, byte & 0x7
            else:
                text += "\ufffd"
        elif not lower <= byte <= upper:
            point = seen = needed = 0
            lower, upper = 0x80, 0xBF
            at -= 1
            text += "\ufffd"
        else:
            lower, upper = 0x80, 0xBF
            point = point << 6 | byte & 0x3F
            seen += 1
            if seen == needed:
                text += chr(point)
                point = seen = needed = 0
    return text


def interpret_as_the_standard(body: bytes) -> Case:
    """The standard's algorithm over the whole text, as plainly as it is written there."""
    case = Case(body)
    text = decode_as_the_standard(body).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    data = kind = id = ""
    for line in text.split("\n")[:-1]:
        name, colon, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            case.last_event_id = id
            if data:
                case.events.append((kind or "message", data.removesuffix("\n"), id))
            data = kind = ""
        elif colon and not name:
            pass
        elif name == "event":
            kind = value
        elif name == "data":
            data += value + "\n"
        elif name == "id" and "\0" not in value:
            id = value
        elif name == "retry" and value and all(c in "0123456789" for c in value):
            case.retry_ms = int(value)
    return case


NAMES = [b"data", b"event", b"id", b"retry", b":", b": ", b" ", b"\0", b"12", b"x"]
LINES = [b"\n", b"\n\n", b"\r", b"\r\n", b"data: a\n", b"id: 9\r\n", b":\r\r"]
UTF_8 = [b"\xef\xbb\xbf", "é😀".encode(), b"\xe2\x82", b"\xf0\x9f", b"\x80"]
fragments = st.lists(st.sampled_from([*NAMES, *LINES, *UTF_8]) | st.binary(max_size=4), max_size=40).map(b"".join)


class TestAnyBytes:
    @examples
    @given(st.binary(max_size=12) | fragments)
    def test_decoder(self, data):
        """
        Broken UTF-8 becomes as many U+FFFD as the WHATWG decoder makes of it.
        """
        _, events = read([b"data:x", data.replace(b"\n", b"").replace(b"\r", b""), b"\n\n"])

        expected = decode_as_the_standard(b"x" + data.replace(b"\n", b"").replace(b"\r", b"") + b"\n")
        assert [message(expected[:-1])] == events

    @examples
    @given(fragments, st.lists(st.integers(0, 400), max_size=12))
    def test_any_bytes_in_any_pieces(self, body, cuts):
        """
        Whatever the bytes and the cuts, the outcome is the standard's.
        """
        at = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
        pieces = [body[a:b] for a, b in itertools.pairwise(at)]

        assert interpret_as_the_standard(body) == outcome(pieces)
