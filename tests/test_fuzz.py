"""
Everything that reads what strangers write, fed with what no stranger would think of.

20 seconds in all; `make fuzz SECONDS=600` takes its time. Each case is one that
Hypothesis makes, and a failure is printed as the smallest that it finds.
"""

# ruff: noqa: PT017  most cases are refused, and some are not

import asyncio
import copy
import json
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from app.access import Access, Caller, own_topic
from app.event import (
    TOPIC_MAX_CHARACTERS,
    Draft,
    Entry,
    EventError,
    check_name,
    check_open_topic,
    check_subscription,
    check_topic,
    covers,
    encode,
    matches,
)
from app.keys import Keys, KeysError, read_jwks, read_secret
from app.log import from_fields, from_notice_fields, is_marked, mark_id, read_id, to_fields, write_id
from app.parser import Parser
from app.problem import Problem
from app.tickets import read_ticket, write_ticket
from app.tokens import Tokens
from tests.signing import SECRET, claims, jwk, jwks, sign

# All targets together.
SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))

TEXT = st.text() | st.text(st.characters(codec=None), max_size=300)  # surrogates, too
NEAR_TOPIC = st.text("aA09._~:/@%-*u ser\n\x00é", max_size=TOPIC_MAX_CHARACTERS + 5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def spoilt(text: str, draw: Any) -> str:
    """Return *text* with some places changed, taken out or put in."""
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.text(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    return text


@st.composite
def near(draw: Any, *good: str) -> str:
    """Return one of *good*, or nearly one."""
    return spoilt(draw(st.sampled_from(good)), draw)


def run[T](work: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it must not wait")


# One round; a target takes as many as there is time for, each with another seed.
round_of = settings(
    max_examples=300,
    database=None,
    deadline=None,
    derandomize=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

# --- Targets


@round_of
@given(TEXT | near("k3f9a2b1:1763712000000-0", "e:0-0", mark_id("e:1-2"), "e:18446744073709551615-1"))
def ids(text: str) -> None:
    """An id is read back as it was written, or it is none; a mark changes no position."""
    read = read_id(text)
    is_marked(text)
    if read is not None:
        plain = write_id(*read)
        assert read == read_id(plain)
        assert read == read_id(mark_id(plain))
        assert is_marked(mark_id(plain))
        assert plain.isascii()
        assert encode(id=text, data="x").count(b"\n") == 3


@round_of
@given(TEXT | NEAR_TOPIC | JSON)
def topics(text: Any) -> None:
    """What is a topic survives the log, a URL and a line; what is none is refused by EventError alone."""
    for check in (check_topic, check_open_topic, check_subscription, check_name):
        try:
            check(text)
        except EventError as error:
            assert "\n" not in str(error)
            continue
        assert isinstance(text, str)
        if check is check_open_topic:
            assert text.isascii()
            assert 1 <= len(text) <= TOPIC_MAX_CHARACTERS
            assert not set(text) & set(" *\r\n\0\"'<>,;?#&+")
            fields = to_fields(Draft((text,), "x"))
            named = {k.encode(): v.encode() for k, v in zip(fields[::2], fields[1::2], strict=True)}
            assert (text,) == from_fields("e", read_id("e:1-0")[1], named, 5, 100).topics


@round_of
@given(NEAR_TOPIC, NEAR_TOPIC, NEAR_TOPIC, st.text(max_size=64))
def patterns(pattern: str, subscription: str, topic: str, user: str) -> None:
    """What a pattern covers it matches; no pattern reaches a user's topic that does not name users."""
    if covers(pattern, subscription) and matches(subscription, topic):
        assert matches(pattern, topic)
    if matches(pattern, topic):
        assert topic == pattern or (pattern.endswith("*") and topic.startswith(pattern[:-1]))
    own = own_topic(user)
    if not pattern.startswith("user:"):
        assert not matches(pattern, own)
        assert not covers(pattern, own)
        assert not Caller("somebody", subscribe=(pattern,)).may_subscribe(own) or user == "somebody"


TOKENS = Tokens(Keys(["HS256"], read_secret(SECRET.encode())), leeway=1)
GOOD = sign(claims(seconds=1e6, subscribe=["orders/*"]))
CLAIMS = claims(seconds=1e6, subscribe=["orders/*"], publish=["a"], admin=False) | {"nbf": 0, "iat": 0}


@round_of
@given(TEXT | near(GOOD, GOOD[:-1], "a.b.c"))
def tokens(text: str) -> None:
    """Only the very token that was signed lets anybody in."""
    try:
        caller = run(TOKENS.caller(text))
    except Problem as problem:
        assert 401 == problem.status
        json.dumps(problem.fields())
        assert GOOD not in json.dumps(problem.fields())
    else:
        assert (GOOD, "alice") == (text, caller.user)


@round_of
@given(st.data())
def signed_claims(data: st.DataObject) -> None:
    """Whatever is signed, a caller is whole, or there is none."""
    payload: Any = copy.deepcopy(CLAIMS)
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(
            st.sampled_from([*CLAIMS, "aud", "iss", "sse.subscribe", "sse.publish", "sse.admin", "sse.more"])
        )
        inside, _, last = name.rpartition(".")
        holder = payload.get("sse") if inside else payload
        if isinstance(holder, dict):
            holder[last] = data.draw(JSON | st.lists(TEXT | NEAR_TOPIC, max_size=3))
    if data.draw(st.integers(0, 20)) == 0:
        payload = data.draw(JSON | st.binary())
    header = {"alg": "HS256"} | (data.draw(st.dictionaries(TEXT, JSON, max_size=2)) if data.draw(st.booleans()) else {})
    try:
        caller = run(TOKENS.caller(sign(payload, header=header)))
    except Problem as problem:
        assert problem.status in (401, 403)
        json.dumps(problem.fields()).encode()
    else:
        assert isinstance(caller.user, str)
        assert 1 <= len(caller.user) <= 64
        check_topic(caller.own_topic)
        for pattern in (*caller.subscribe, *caller.publish):
            check_subscription(pattern)
        assert type(caller.admin) is bool
        assert time.time() < caller.expires_at < 1e12


WHO = Access(TOKENS.caller, None, ("https://a.example",))
FIELDS = st.dictionaries(
    st.sampled_from(["Authorization", "Cookie", "Origin", "Sec-Fetch-Site"]),
    near(f"Bearer {GOOD}", f"session={GOOD}", "https://a.example", "same-origin", "cross-site") | TEXT,
)


@round_of
@given(FIELDS, st.dictionaries(st.sampled_from(["ticket", "user"]), TEXT, max_size=1))
def carriers(headers: dict[str, str], query: dict[str, str]) -> None:
    """However it is carried, a caller is the one of the good token, or nobody."""
    try:
        caller = run(WHO.caller(headers, query))
    except Problem as problem:
        assert problem.status in (401, 403)
    else:
        assert "alice" == caller.user
        assert GOOD in headers.get("Authorization", "") + headers.get("Cookie", "")


SETS = near(jwks(), jwks(jwk("RS256")), json.dumps({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "AA"}]}))


@round_of
@given(SETS.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary() | st.data())
def key_sets(data: Any) -> None:
    """A set of keys is read, or refused by KeysError alone; so is a secret."""
    if not isinstance(data, bytes):
        key = jwk(data.draw(st.sampled_from(["RS256", "ES256", "EdDSA"])))
        key[data.draw(st.sampled_from([*key, "alg", "d", "key_ops"]))] = data.draw(JSON)
        data = json.dumps({"keys": [key]}).encode()
    for read in (read_jwks, read_secret):
        try:
            assert all(key.algorithm in ("RS256", "ES256", "EdDSA", "HS256") for key in read(data))
        except KeysError as error:
            assert "\n" not in str(error)


@round_of
@given(TEXT | near(write_ticket(b"salt", "alice")))
def tickets(text: str) -> None:
    """A ticket has one hash; what is none has no key."""
    read = read_ticket(text)
    if read is not None:
        assert 76 == len(text)
        assert all(part.isascii() and part.isalnum() for part in read)


FIELD = st.sampled_from([b"v", b"topics", b"event", b"data", b"retry", b"kind", b"run"]) | st.binary(max_size=6)
VALUE = st.sampled_from([b"1", b"a b", b"a", b"0", b"stream.open"]) | st.binary(max_size=40)


@round_of
@given(st.dictionaries(FIELD, VALUE, max_size=6))
def log_fields(fields: dict[bytes, bytes]) -> None:
    """An entry of the log that another service wrote is whole, or reaches nobody."""
    entry = from_fields("e", read_id("e:1-0")[1], dict(fields), 5, 30)
    from_notice_fields(dict(fields))
    assert isinstance(entry, Entry)
    for topic in entry.topics:
        check_topic(topic)
    events = Parser().feed(entry.block)
    assert 1 == len(events)
    assert "e:1-0" == events[0].id


TARGETS: list[Callable[..., None]] = [
    ids,
    topics,
    patterns,
    tokens,
    signed_claims,
    carriers,
    key_sets,
    tickets,
    log_fields,
]


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_fuzz(target):
    """No input makes a parser fail in a way that it does not document."""
    until = time.monotonic() + SECONDS / len(TARGETS)
    rounds = 0
    while rounds == 0 or time.monotonic() < until:
        seed(rounds)(target)()
        rounds += 1


def test_waiting_is_noticed():
    """The tool itself: a coroutine that waits is no parser."""
    with pytest.raises(AssertionError, match="must not wait"):
        run(asyncio.sleep(0))
