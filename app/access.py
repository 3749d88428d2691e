"""
Who asks, and what they may: the one place where that is decided.

Every route asks `Access.caller` first, before anything is taken or spent for
the request. What a stream carries is granted once, when it begins: a prefix is
granted only where one pattern contains all of it, so that nothing that reaches
the stream later, replayed or live, has to be looked at again.
"""

from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import quote

from app.event import TOPIC_MAX_CHARACTERS, covers, matches
from app.problem import Problem

USER_MAX_CHARACTERS = 64
# Everybody reads it, without a right to it.
BROADCAST = "broadcast"


@dataclass(frozen=True, slots=True)
class Caller:
    """
    Who asks, and their rights.

    Attributes:
        user: their id, 1 to 64 characters; None where nobody said (SSE_AUTH=none).
        subscribe: topics and prefixes (`orders/*`) that may be subscribed to.
        publish: the same for publishing.
        admin: may see and end the streams of every user.
        expires_at: seconds since 1970 when all of this ends; None: never.
        carrier: how they said who they are.
        ticket: the hash of the ticket, where that is the carrier.
    """

    user: str | None = None
    subscribe: tuple[str, ...] = ()
    publish: tuple[str, ...] = ()
    admin: bool = False
    expires_at: float | None = None
    carrier: Literal["none", "bearer", "ticket", "cookie"] = "none"
    ticket: str | None = None

    @property
    def own_topic(self) -> str | None:
        """The topic that only this user reads, without a right to it."""
        return None if self.user is None else own_topic(self.user)

    def may_subscribe(self, subscription: str) -> bool:
        """Tell whether a stream of this caller may carry *subscription*, a topic or prefix."""
        if subscription in (BROADCAST, self.own_topic):
            return True
        return any(covers(pattern, subscription) for pattern in self.subscribe)

    def may_publish(self, topic: str) -> bool:
        """Tell whether this caller may publish to *topic*."""
        return any(matches(pattern, topic) for pattern in self.publish)


class Fields(Protocol):
    """Headers or arguments of a request."""

    def get(self, key: str, /) -> str | None:
        """Return the first value of *key*, or None."""


class Access:
    """Decides who asks."""

    async def caller(self, headers: Fields, query: Fields) -> Caller:
        """
        Return who sent a request with these *headers* and arguments.

        Raises:
            Problem: 400 or 401; nobody becomes somebody else, or nobody, by a mistake.
        """
        return _anybody(query.get("user"))


def own_topic(user: str) -> str:
    """Return the private topic of *user*."""
    return "user:" + quote(user, safe="")


def check_user(user: object, name: str = "user", status: int = 400, slug: str = "invalid") -> str:
    """Return *user* if it is an id that has a topic; raise a Problem where it is not."""
    if not isinstance(user, str) or not 1 <= len(user) <= USER_MAX_CHARACTERS:
        raise Problem(status, slug, name, f"must have 1 to {USER_MAX_CHARACTERS} characters", user, "Shorten it.")
    if user.encode(errors="replace") != user.encode(errors="surrogatepass"):
        raise Problem(status, slug, name, "must be text that UTF-8 can carry", user, "A surrogate stands alone.")
    most = TOPIC_MAX_CHARACTERS - len("user:")
    if len(quote(user, safe="")) > most:
        raise Problem(
            status,
            slug,
            name,
            f"must have at most {most} characters when percent-encoded",
            user,
            "It becomes the user's own topic; shorten it.",
        )
    return user


def _anybody(user: str | None) -> Caller:
    """Return who asks with SSE_AUTH=none: whoever they say, for trying things out."""
    if user is not None:
        check_user(user)
    # `*` never reaches the topics of users, so they are named.
    return Caller(user, subscribe=("*",), publish=("*", "user:*"), admin=True)
