"""Who asks, and what they may."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.access import Access, Caller, check_user, own_topic
from app.event import EventError, covers, matches

# Few letters, so that patterns and topics meet.
TOPIC = st.text("us:er/a%n", min_size=1, max_size=6) | st.builds(
    "{}:{}".format, st.sampled_from(["user", "run"]), st.text("ab%", max_size=3)
)
SUBSCRIPTION = TOPIC | TOPIC.map(lambda topic: topic + "*") | st.just("*")


class TestCovers:
    """A pattern covers a subscription: all that it stands for."""

    @pytest.mark.parametrize(
        ("pattern", "subscription", "covered"),
        [
            ("orders/1", "orders/1", True),
            ("orders/*", "orders/1", True),
            ("orders/*", "orders/", True),
            ("orders/*", "orders/eu/*", True),
            ("orders/*", "orders/*", True),
            ("*", "orders/*", True),
            ("*", "*", True),
            ("user:a*", "user:ab", True),
            ("user:*", "user:*", True),
            ("order", "orders/1", False),
            ("orders", "orders/1", False),
            ("orders/", "orders/1", False),
            ("orders/1", "orders/*", False),
            ("orders/1", "orders/1*", False),
            ("orders/*", "orders*", False),
            ("orders/*", "*", False),
            ("orders/*", "ORDERS/1", False),
            ("orders/*", "orders%2F1", False),
            ("orders/é*", "orders/e", False),
            ("u*", "user:x", False),
            ("*", "user:x", False),
            ("user*", "user:*", False),
            ("*", "user:*", False),
            ("user:a*", "user:*", False),
            ("user:alice", "user:alice*", False),
            ("user:alice", "user:alice2", False),
            ("run:*", "run:x", True),
            ("run:*", "run:*", True),
            ("run:chat", "run:chat", True),
            ("*", "run:x", False),
            ("*", "run:*", False),
            ("run*", "run:x", False),
            ("ru*", "run*", True),
            ("run*", "run:*", False),
            ("r*", "running/1", True),
        ],
    )
    def test_cases(self, pattern, subscription, covered):
        """Neither a look-alike nor a part is enough, and what is private is named or not covered."""
        assert covered == covers(pattern, subscription)

    @given(SUBSCRIPTION, SUBSCRIPTION, TOPIC)
    def test_nothing_gets_past_a_pattern(self, pattern, subscription, topic):
        """What a covered subscription matches, its pattern matches: a grant needs no second look."""
        if covers(pattern, subscription) and matches(subscription, topic):
            assert matches(pattern, topic)


class TestCaller:
    """What a caller may."""

    def test_without_rights(self):
        """Everybody may read `broadcast` and their own topic, and publish nothing."""
        caller = Caller("zoë")

        assert caller.may_subscribe("broadcast")
        assert caller.may_subscribe("user:zo%C3%AB")
        assert not caller.may_subscribe("user:zo*")
        assert not caller.may_subscribe("broadcast*")
        assert not caller.may_publish("broadcast")
        assert not caller.may_publish("user:zo%C3%AB")

    def test_nobody_has_no_topic(self):
        """Who did not say who they are reads nobody's topic."""
        assert Caller().own_topic is None
        assert not Caller().may_subscribe("user:")
        assert not Caller().may_subscribe("user:None")

    def test_subscribing_is_not_publishing(self):
        """Each right stands for itself."""
        caller = Caller("a", subscribe=("in/*",), publish=("out/*",))

        assert (True, False) == (caller.may_subscribe("in/1"), caller.may_publish("in/1"))
        assert (False, True) == (caller.may_subscribe("out/1"), caller.may_publish("out/1"))

    @given(st.text(min_size=1, max_size=64), st.text(min_size=1, max_size=64))
    def test_own_topics_differ(self, one, other):
        """Two users never share a topic, and neither reads the other's."""
        if one != other:
            assert own_topic(one) != own_topic(other)
            assert not Caller(one, subscribe=("*",)).may_subscribe(own_topic(other))


class TestNone:
    """SSE_AUTH=none: for trying things out."""

    async def test_anybody(self):
        """Anybody may read, publish and start everything but read users' topics."""
        caller = await Access().caller({}, {})

        assert (None, "none", None) == (caller.user, caller.carrier, caller.expires_at)
        assert caller.may_subscribe("a/*")
        assert caller.may_publish("a")
        assert caller.may_publish("user:alice")
        assert caller.may_publish("run:chat")
        assert caller.may_subscribe("run:x")
        assert not caller.may_subscribe("user:alice")

    async def test_user(self):
        """`?user=` names a user."""
        caller = await Access().caller({}, {"user": "alice"})

        assert "alice" == caller.user
        assert caller.may_subscribe("user:alice")
        assert not caller.may_subscribe("user:bob")


class TestUser:
    """What a user id may be."""

    @pytest.mark.parametrize("user", ["", "u" * 65, "é" * 64, None, 7, ["a"], "a\ud800"])
    def test_refused(self, user):
        """An id is a string of 1 to 64 characters that fits into a topic."""
        with pytest.raises(EventError):
            check_user(user)
