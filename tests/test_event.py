"""What an event may be, and the bytes it becomes."""

import pytest

from app.event import (
    HEARTBEAT,
    NAME_MAX_CHARACTERS,
    RETRY_MAX_MS,
    TOPIC_MAX_CHARACTERS,
    Entry,
    EventError,
    Piece,
    check_name,
    check_retry,
    check_subscription,
    check_topic,
    encode,
    matches,
)


class TestEncode:
    def test_every_field(self):
        """
        The order is id, event, data, retry; one blank line closes the block.
        """
        block = encode(id="e:1-0", event="price", data="3", retry=5)

        assert b"id: e:1-0\nevent: price\ndata: 3\nretry: 5\n\n" == block

    def test_data_alone(self):
        """
        What was not given is not written.
        """
        assert b"data: 3\n\n" == encode(data="3")

    def test_no_data(self):
        """
        An event without data has one empty `data:` line: a block without any is no event.
        """
        assert b"id: e:1-0\nevent: stream.position\ndata:\n\n" == encode(id="e:1-0", event="stream.position")

    def test_message(self):
        """
        `message` is what an event without a name is called; it is left out.
        """
        assert encode(data="x") == encode(event="message", data="x")

    @pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
    def test_line_ends_in_data(self, end):
        """
        Each line of data becomes a field of its own, whatever ended it.
        """
        assert b"data: a\ndata:\ndata: b\ndata:\n\n" == encode(data=f"a{end}{end}b{end}")

    def test_characters_that_only_python_takes_for_line_ends(self):
        """
        Only CR, LF and CRLF end a line; vertical tab, NEL and U+2028 are text.
        """
        text = "a\x0bb\x0cc\x1cd\x85e\u2028f"

        assert b"data: %b\n\n" % text.encode() == encode(data=text)

    def test_leading_space_in_data(self):
        """
        A client removes one space after the colon, so a space of the data stays.
        """
        assert b"data:  x\n\n" == encode(data=" x")

    def test_forged_fields_in_data(self):
        """
        Data cannot become another field.
        """
        assert b"data: x\ndata: id: 7\ndata:\ndata: event: y\n\n" == encode(data="x\nid: 7\n\nevent: y")

    @pytest.mark.parametrize("field", ["id", "event"])
    @pytest.mark.parametrize("character", ["\r", "\n", "\0"])
    def test_line_end_in_id_or_event(self, field, character):
        """
        An id or name that would inject a field is refused, not repaired.
        """
        with pytest.raises(EventError) as caught:
            encode(**{field: f"1{character}data: forged"}, data="x")

        assert field == caught.value.name
        assert "must not contain CR, LF or NUL" == caught.value.rule


class TestEventError:
    def test_text(self):
        """
        The text is name, rule, value and cure.
        """
        error = EventError("topic", "must be short", "a\nb", "Shorten it.")

        assert "topic must be short, got 'a\\nb'. Shorten it." == str(error)

    def test_huge_value(self):
        """
        The value is shown in part, so that the line stays one that people read.
        """
        text = str(EventError("data", "must be less", "x" * 1_000_000, "Shorten it."))

        assert len(text) < 200

    def test_attributes(self):
        """
        An answer by HTTP is built from the parts.
        """
        error = EventError("topic", "must be short", "a", "Shorten it.")

        assert ("topic", "must be short", "a", "Shorten it.") == (error.name, error.rule, error.value, error.cure)


class TestCheckTopic:
    @pytest.mark.parametrize("topic", ["a", "orders/1", "user:al%20x", "A.b_c~d:e/f@g-h%", "x" * TOPIC_MAX_CHARACTERS])
    def test_topic(self, topic):
        """
        1 to 255 characters that need no encoding in a URL's path.
        """
        assert topic == check_topic(topic)

    @pytest.mark.parametrize(
        "topic",
        ["", "x" * (TOPIC_MAX_CHARACTERS + 1), "a b", "a*", "a\n", "ä", "a,b", "a?b", "a\0", None, 3, ["a"], b"a"],
    )
    def test_no_topic(self, topic):
        """
        Anything else is refused with its rule.
        """
        with pytest.raises(EventError, match=r"topic must be 1 to 255 characters of A-Z"):
            check_topic(topic)


class TestCheckSubscription:
    @pytest.mark.parametrize("topic", ["*", "orders/*", "user:*", "a", "a" * 255 + "*"])
    def test_subscription(self, topic):
        """
        A topic, or a prefix that ends in a star.
        """
        assert topic == check_subscription(topic)

    @pytest.mark.parametrize("topic", ["", "**", "a*b", "a b*", "*a", None, 1, "a" * 256 + "*"])
    def test_no_subscription(self, topic):
        """
        A star stands at the end only.
        """
        with pytest.raises(EventError):
            check_subscription(topic)


class TestCheckName:
    @pytest.mark.parametrize(
        "name", ["", "message", "price", "streams", "Stream.open", "run", "x" * NAME_MAX_CHARACTERS, "ä b"]
    )
    def test_name(self, name):
        """
        A name is any line of text of 255 characters.
        """
        assert name == check_name(name)

    @pytest.mark.parametrize("name", ["stream.open", "stream.", "run.done", "run."])
    def test_name_of_the_kit(self, name):
        """
        Subscribers must be able to trust `stream.*` and `run.*`.
        """
        with pytest.raises(EventError, match=r"must not begin with `stream\.` or `run\.`"):
            check_name(name)

    @pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\0b", "x" * (NAME_MAX_CHARACTERS + 1), None, 7])
    def test_no_name(self, name):
        """
        What would break the framing, or is no text, is refused.
        """
        with pytest.raises(EventError):
            check_name(name)


class TestCheckRetry:
    @pytest.mark.parametrize("retry", [0, 1, RETRY_MAX_MS])
    def test_retry(self, retry):
        """
        Whole milliseconds, up to a day.
        """
        assert retry == check_retry(retry)

    @pytest.mark.parametrize("retry", [-1, RETRY_MAX_MS + 1, 2**31, 1.5, True, "5", None])
    def test_no_retry(self, retry):
        """
        More overflows the timers of some clients, which then reconnect without end.
        """
        with pytest.raises(EventError, match="retry must be a whole number of milliseconds from 0 to 86400000"):
            check_retry(retry)


class TestMatches:
    @pytest.mark.parametrize(
        ("subscription", "topic"),
        [
            ("a", "a"),
            ("*", "a"),
            ("orders/*", "orders/7"),
            ("orders/*", "orders/"),
            ("user:*", "user:ann"),
            ("user:a*", "user:ann"),
            ("use*", "useful"),
            ("run:*", "run:x"),
            ("ru*", "running"),
        ],
    )
    def test_match(self, subscription, topic):
        """
        A topic matches itself; a prefix matches what begins with it.
        """
        assert matches(subscription, topic)

    @pytest.mark.parametrize(
        ("subscription", "topic"),
        [
            ("a", "ab"),
            ("ab*", "a"),
            ("orders/*", "orders"),
            ("*", "user:ann"),
            ("u*", "user:ann"),
            ("user*", "user:ann"),
            ("user:b*", "user:ann"),
            ("*", "run:x"),
            ("run*", "run:x"),
            ("run:y*", "run:x"),
        ],
    )
    def test_no_match(self, subscription, topic):
        """
        A prefix never reaches a user's own topic unless it begins with `user:`.
        """
        assert not matches(subscription, topic)


class TestPiece:
    def test_chunk(self):
        """
        A piece is one HTTP chunk: its length in hexadecimal, and the bytes.
        """
        piece = Piece(b"data: 0123456789\n\n")

        assert b"12\r\ndata: 0123456789\n\n\r\n" == piece.chunk
        assert b"data: 0123456789\n\n" == piece.raw
        assert 18 == piece.size

    def test_head(self):
        """
        The first piece of a stream can carry the head; `raw` and `size` are without it.
        """
        piece = Piece(b"data:\n\n", b"HTTP/1.1 200 OK\r\n\r\n")

        assert b"HTTP/1.1 200 OK\r\n\r\n7\r\ndata:\n\n\r\n" == piece.chunk
        assert b"data:\n\n" == piece.raw
        assert 7 == piece.size

    def test_heartbeat(self):
        """
        A heartbeat is a comment: it wakes nothing in the client.
        """
        assert b":\n\n" == HEARTBEAT.raw


class TestEntry:
    def test_block(self):
        """
        The bytes are made once, and are the same object for every stream.
        """
        entry = Entry((1, 0), "e:1-0", ("a",), "x", "price", 9)

        assert b"id: e:1-0\nevent: price\ndata: x\nretry: 9\n\n" == entry.block
        assert entry.block is entry.block

    def test_size(self):
        """
        What an entry costs grows with its data, and is never nothing.
        """
        small, large = (Entry((1, 0), "e:1-0", ("a",), "x" * n) for n in (0, 1_000_000))

        assert small.size > 0
        assert large.size - small.size >= 2_000_000
