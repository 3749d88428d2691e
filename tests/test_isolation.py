"""
A user's events never reach another: random users, tokens, subscriptions and events, replayed and live.

Through HTTP, from the token to the last byte; what should be is said here anew,
without a function of the application.
"""

import json
import re
from contextlib import ExitStack
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.inside import Inside
from tests.signing import SECRET, bearer, token
from tests.wire import Reader, post

USERS = {"a": "user:a", "b": "user:b", "ab": "user:ab", "a b": "user:a%20b", "*": "user:%2A"}
TOPICS = [
    "a",
    "ab",
    "a/b",
    "a/b/c",
    "A",
    "us",
    "users",
    "user",
    "user/a",
    "broadcasts",
    *USERS.values(),
    "user:",
    "user:c",
]
# Every beginning of a topic as a prefix: also those that end within `user:`.
PREFIXES = sorted({topic[:length] + "*" for topic in TOPICS for length in range(len(topic) + 1)})
SUBSCRIPTIONS = st.lists(st.sampled_from(TOPICS) | st.sampled_from(PREFIXES), max_size=3)
# Half of the callers ask for what they may have; what is left of their rights is chance.
CALLERS = st.tuples(st.sampled_from(sorted(USERS)), SUBSCRIPTIONS, SUBSCRIPTIONS, st.booleans()).map(
    lambda drawn: (drawn[0], drawn[1] + (drawn[2] if drawn[3] else []), drawn[2])
)
EVENTS = st.lists(st.lists(st.sampled_from([*TOPICS, "broadcast"]), min_size=1, max_size=2), max_size=6)


@pytest.fixture(scope="module", params=["auto", "off"])
def server(request):
    with Inside(handoff=request.param, auth="jwt", jwt_secret=SECRET, limit_streams_per_user=0) as server:
        yield server


def stands_for(pattern: str, topic: str) -> bool:
    """Say what a pattern means: itself, or all that begins so, of users' topics only where it names them."""
    if not pattern.endswith("*"):
        return pattern == topic
    expression = re.escape(pattern[:-1]) + ".*"
    return re.fullmatch(expression if pattern.startswith("user:") else f"(?!user:){expression}", topic) is not None


def contains(pattern: str, subscription: str) -> bool:
    """Say whether all topics that a subscription can stand for are ones of the pattern, by trying them."""
    if not subscription.endswith("*"):
        return stands_for(pattern, subscription)
    ends = ["", "x", "/", "user:x", "r:x", "er:x", "ser:x", ":x", "0" * 9]
    tried = [subscription[:-1] + end for end in ends] + TOPICS
    return pattern.endswith("*") and all(
        stands_for(pattern, topic) for topic in tried if topic and stands_for(subscription, topic)
    )


def publish(server: Inside, events: list[list[str]], name: str) -> list[str]:
    """Publish one event for each of *events*, its data its name and place; return their ids."""
    if events:
        drafts = [{"topics": topics, "data": f"{name}{at}"} for at, topics in enumerate(events)]
        status, answer = post(server.port, drafts, PUBLISHER)
        assert 201 == status, answer
        return json.loads(answer)["ids"]
    return []


PUBLISHER = bearer(token("publisher", seconds=36_000, publish=["*", "user:*"]))


class TestIsolation:
    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(CALLERS, min_size=1, max_size=4),
        EVENTS,
        EVENTS,
    )
    def test_streams(self, server, callers, before, after):
        """Each stream is let in or refused as its token says, and reads all that it asked for and may read, and no more."""
        [position] = publish(server, [["broadcast"]], "mark")
        publish(server, before, "before")
        with ExitStack() as stack:
            streams = []
            for user, patterns, asked in callers:
                headers = bearer(token(user, subscribe=patterns))
                stream = stack.enter_context(
                    Reader.open(server.port, *map(quote, asked), resume=position, headers=headers)
                )
                own = USERS[user]
                right = all(
                    topic in ("broadcast", own) or any(contains(pattern, topic) for pattern in patterns)
                    for topic in asked
                )
                assert (200 if right else 403) == stream.status, (user, patterns, asked)
                if right:
                    streams.append((stream, own, patterns, {*asked, "broadcast", own}))
            publish(server, [*after, ["broadcast"]], "after")
            everything = [(topics, f"before{at}") for at, topics in enumerate(before)]
            everything += [(topics, f"after{at}") for at, topics in enumerate([*after, ["broadcast"]])]
            last = everything[-1][1]
            for stream, own, patterns, carried in streams:
                got = stream.until(lambda stream: last in stream.data).data
                allowed = [
                    data
                    for topics, data in everything
                    if any(
                        topic in ("broadcast", own) or any(stands_for(p, topic) for p in patterns) for topic in topics
                    )
                ]
                wanted = [
                    data
                    for topics, data in everything
                    if any(stands_for(subscription, topic) for subscription in carried for topic in topics)
                ]

                assert set(got) <= set(allowed)
                assert wanted == got
