"""
The parser reads what the standard says, however the bytes were cut.

The cases follow the text of the standard; their names are those of the web-platform tests' files
`eventsource/format-*`, and of the examples in the standard's section on interpreting a stream.
Every case runs whole, byte by byte, and cut in two at every place.
https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

import itertools
import time
from dataclasses import dataclass, field

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


CASES = {
    "format-bom": Case(
        b"\xef\xbb\xbfdata: first\n\n\xef\xbb\xbfdata: not a field\n\ndata: second\n\n",
        [message("first"), message("second")],
    ),
    "format-bom before a comment": Case(b"\xef\xbb\xbf:\n\ndata: a\n\n", [message("a")]),
    "format-bom alone": Case(b"\xef\xbb\xbf"),
    "format-bom cut short by the end": Case(b"\xef\xbb"),
    "format-bom begun, then something else": Case(b"\xef\xbb\nid: 1\ndata: a\n\n", [message("a", "1")], "1"),
    "format-bom-2: only one is dropped": Case(
        b"\xef\xbb\xbf\xef\xbb\xbfdata: lost\n\ndata: kept\n\n", [message("kept")]
    ),
    "format-bom-2: inside a value it is text": Case(b"data: \xef\xbb\xbfa\n\n", [message("\ufeffa")]),
    "format-comments": Case(
        b": hello\ndata: a\r:\0\n:data: no\r\n:" + b"x" * 2100 + b"\n::\ndata: b\n: b\n\n",
        [message("a\nb")],
    ),
    "format-comments only": Case(b":\n\n: still here\r\n\r\n"),
    "format-data-before-final-empty-line": Case(b"data: a\n\nretry: 900\ndata: b\n", [message("a")], retry_ms=900),
    "format-data-before-final-empty-line, cut in the line": Case(b"data: a\n\ndata: b", [message("a")]),
    "format-field-data": Case(
        b"data:\n\ndata\ndata\n\ndata: a\ndata:\ndata: b\n\n",
        [message(""), message("\n"), message("a\n\nb")],
    ),
    "format-field-data: an event without data is none": Case(b"event: lost\n\ndata: a\n\n", [message("a")]),
    "format-field-event": Case(b"event: price\ndata: 1\n\ndata: 2\n\n", [("price", "1", ""), message("2")]),
    "format-field-event: the last one counts": Case(b"event: a\nevent: b\ndata: 1\n\n", [("b", "1", "")]),
    "format-field-event-empty": Case(b"event: a\nevent:\ndata: 1\n\nevent\ndata: 2\n\n", [message("1"), message("2")]),
    "format-field-event: one space is a name": Case(b"event:  \ndata: 1\n\n", [(" ", "1", "")]),
    "format-field-id": Case(b"id: 7\ndata: a\n\ndata: b\n\n", [message("a", "7"), message("b", "7")], "7"),
    "format-field-id-2: an empty id resets it": Case(
        b"id: 7\ndata: a\n\nid\ndata: b\n\nid: 8\nid:\ndata: c\n\n",
        [message("a", "7"), message("b"), message("c")],
    ),
    "format-field-id-3: a block of only an id counts": Case(b"id: 7\n\ndata: a\n\nid: 8\n\n", [message("a", "7")], "8"),
    "format-field-id-3: an id counts at its blank line": Case(
        b"id: 7\ndata: a\n\nid: 8\ndata: b\n", [message("a", "7")], "7"
    ),
    "format-field-id-null": Case(
        b"id: 7\ndata: a\n\nid: 8\0\ndata: b\n\nid:\0\ndata: c\n\n",
        [message("a", "7"), message("b", "7"), message("c", "7")],
        "7",
    ),
    "format-field-parsing": Case(
        b"data:\0\ndata:  two\rData: no\ndata\0: no\nDATA: no\r\n data: no\ndata : no\nda-ta: no\n"
        b"data_: no\ndata:a:b\rdata: c\rdata:\r\n\n",
        [message("\0\n two\na:b\nc\n")],
    ),
    "format-field-retry": Case(b"retry: 1500\ndata: a\n\n", [message("a")], retry_ms=1500),
    "format-field-retry: at once, without a blank line": Case(b"retry:0\n", retry_ms=0),
    "format-field-retry: leading zeros": Case(b"retry: 00000000000000000000250\n", retry_ms=250),
    "format-field-retry: more digits than a computer counts": Case(
        b"retry: " + b"9" * 5000 + b"\ndata: a\n\n", [message("a")], retry_ms=10**15
    ),
    "format-field-retry-bogus": Case(
        b"retry: 3000\nretry: 1e3\nretry: 10ms\nretry: +5\nretry: -5\nretry: 1_000\n"
        b"retry:  5\nretry: 5 \nretry: 1.5\nretry: 0x1f\n"
        b"retry: \xd9\xa3\nretry: \xc2\xb2\ndata: a\n\n",
        [message("a")],
        retry_ms=3000,
    ),
    "format-field-retry-empty": Case(b"retry: 700\nretry\nretry:\ndata: a\n\n", [message("a")], retry_ms=700),
    "format-field-unknown": Case(b"data: a\n data: b\ndata\ncolour: red\nI think\nid2: 9\n\n", [message("a\n")]),
    "format-leading-space": Case(b"data:\ta\rdata: a\ndata:  a\ndata:a \n\n", [message("\ta\na\n a\na ")]),
    "format-newlines": Case(
        b"data: a\r\ndata: b\ndata: c\r\rdata: d\r\n\r\ndata: e\n\ndata: f\n\r\ndata: g\r\n\rdata: h\r\n\n",
        [message("a\nb\nc"), *map(message, "defgh")],
    ),
    "format-newlines: only CR": Case(b"id: 1\rdata: a\r\rdata: b\r\r", [message("a", "1"), message("b", "1")], "1"),
    "format-newlines: none but CR, LF and CRLF": Case(
        "data: a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i\n\n".encode(),
        [message("a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i")],
    ),
    "format-newlines: blank lines dispatch nothing twice": Case(b"\n\r\n\rdata: a\n\n\n\r\r\n", [message("a")]),
    "format-null-character": Case(b"data: a\0b\n\nevent: \0\ndata:\0\n\n", [message("a\0b"), ("\0", "\0", "")]),
    "format-utf-8": Case(
        "data: ok … Grüße 漢字 😀\nevent: naïve\nid: ключ\n\n".encode(),
        [("naïve", "ok … Grüße 漢字 😀", "ключ")],
        "ключ",
    ),
    "format-utf-8: broken bytes become U+FFFD": Case(
        b"data: \xff|\xc3|\xe2\x82|\xf0\x9f\x98|\xed\xa0\x80|\xc0\xaf|\xf5\x80|\xe2\x82\ndata: \x80\n\n",
        [message("�|�|�|�|���|��|��|�\n�")],
    ),
    "format-utf-8: a broken field name is unknown": Case(b"d\xffta: a\ndata: b\n\n", [message("b")]),
    "format-utf-8: a cut sequence does not eat the colon": Case(
        b"data\xe2\x82: a\n\ndata:\xe2\x82 a\n\n", [message("� a")]
    ),
    "standard: three data lines make one event": Case(b"data: GRTS\ndata: -3\ndata: 12\n\n", [message("GRTS\n-3\n12")]),
    "standard: a comment, ids, and an id taken back": Case(
        b": test stream\n\ndata: one\nid: 1\n\ndata:two\nid\n\ndata:  three\n\n",
        [message("one", "1"), message("two"), message(" three")],
    ),
    "standard: two empty events, and one that the end drops": Case(
        b"data\n\ndata\ndata\n\ndata:", [message(""), message("\n")]
    ),
    "standard: the space after the colon is optional": Case(
        b"data:same\n\ndata: same\n\n", [message("same"), message("same")]
    ),
}


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
