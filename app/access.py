"""
Who asks, and what they may: the one place where that is decided.

Every route asks `Access.caller` first, before anything is taken or spent for
the request. What a stream carries is granted once, when it begins: a prefix is
granted only where one pattern contains all of it, so that nothing that reaches
the stream later, replayed or live, has to be looked at again.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Literal, NoReturn, Protocol
from urllib.parse import quote

from app.event import TOPIC_MAX_CHARACTERS, USER_TOPICS, EventError, covers, matches
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
    """
    Decides who asks.

    Args:
        verify: returns whom a token names, or raises a Problem; None lets
            anybody in (SSE_AUTH=none).
        find: returns whom a ticket stands for.
        origins: of other sites' pages whose cookies count.
    """

    def __init__(
        self,
        verify: Callable[[str], Awaitable[Caller]] | None = None,
        find: Callable[[str], Awaitable[Caller | None]] | None = None,
        origins: tuple[str, ...] = (),
    ) -> None:
        self._verify = verify
        self._find = find
        self._origins = frozenset(origins)

    async def caller(self, headers: Fields, query: Fields) -> Caller:
        """
        Return who sent a request with these *headers* and arguments.

        One carrier counts: `Authorization`, else the ticket, else the cookie. A
        bad one is refused, and the next is not looked at.

        Raises:
            Problem: 400, 401, 403 or 503; nobody becomes somebody else, or
                nobody, by a mistake.
        """
        if self._verify is not None and (authorization := headers.get("Authorization")) is not None:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer":
                # Without its value: with the scheme forgotten, that is the token.
                refuse("Authorization", "must be `Bearer` and a token")
            return await self._verify(token.strip())
        if (ticket := query.get("ticket")) is not None:
            return await self._of_ticket(ticket)
        if self._verify is None:
            return _anybody(query.get("user"))
        tokens = _cookies(headers.get("Cookie") or "", "session")
        if not tokens:
            refuse("token", "must come as `Authorization: Bearer`, as a ticket or as the cookie `session`")
        if len(tokens) > 1:
            # A neighbouring host may have planted the other one.
            refuse("cookie", "`session` must be sent once", len(tokens))
        self._check_origin(headers)
        return replace(await self._verify(tokens[0]), carrier="cookie")

    async def _of_ticket(self, ticket: str) -> Caller:
        caller = None if self._find is None else await self._find(ticket)
        if caller is None:
            refuse_ticket()
        return caller

    def _check_origin(self, headers: Fields) -> None:
        """
        Refuse a cookie that a foreign page makes the browser send.

        Browsers say where a request comes from, and no page can make them lie:
        `Sec-Fetch-Site` with every request over TLS or to localhost, `Origin`
        with requests across origins. An `<img>` sends no `Origin`, so that
        nothing at all is no permission.
        """
        origin = headers.get("Origin")
        if origin in self._origins:
            return
        if headers.get("Sec-Fetch-Site") not in ("same-origin", "none"):
            raise Problem(
                403,
                "forbidden",
                "Origin",
                "must be this site or one of SSE_CORS_ORIGINS for a cookie to count",
                origin,
                "Use Authorization or a ticket, or let the origin be allowed.",
            )


def refuse(name: str, rule: str, value: object = None, cure: str = "Get a new token.") -> NoReturn:
    """
    Raise the Problem of a caller who is not known: 401.

    *value* must never be a token or a ticket: answers are logged, by us and by others.
    """
    challenge = "Bearer" if name == "token" and value is None else 'Bearer error="invalid_token"'
    raise Problem(401, "unauthorized", name, rule, value, cure, {"WWW-Authenticate": challenge}) from None


def refuse_ticket() -> NoReturn:
    """Raise the Problem of a ticket that is none, or none any more."""
    refuse(
        "ticket",
        "must be one that was used soon after it was made, is not over and was not revoked",
        cure="Get a new one: POST /tickets.",
    )


def own_topic(user: str) -> str:
    """Return the private topic of *user*."""
    return USER_TOPICS + quote(user, safe="")


def check_user(user: object, name: str = "user") -> str:
    """Return *user* if it is an id that has a topic of its own; raise EventError where it is not."""
    if not isinstance(user, str) or not 1 <= len(user) <= USER_MAX_CHARACTERS:
        raise EventError(name, f"must have 1 to {USER_MAX_CHARACTERS} characters", user, "Such as `alice`.")
    if user.encode(errors="replace") != user.encode(errors="surrogatepass"):
        raise EventError(name, "must be text that UTF-8 can carry", user, "A surrogate stands alone.")
    most = TOPIC_MAX_CHARACTERS - len(USER_TOPICS)
    if len(quote(user, safe="")) > most:
        raise EventError(
            name,
            f"must have at most {most} characters when percent-encoded",
            user,
            "It becomes the user's own topic; shorten it.",
        )
    return user


def _anybody(user: str | None) -> Caller:
    """Return who asks with SSE_AUTH=none: whoever they say, for trying things out."""
    if user is not None:
        try:
            check_user(user)
        except EventError as error:
            raise Problem.of(error) from None
    # `*` never reaches what is private, so that is named: users' topics to publish to alone.
    return Caller(user, subscribe=("*", "run:*"), publish=("*", "user:*", "run:*"), admin=True)


def _cookies(header: str, name: str) -> list[str]:
    """Return the values of the cookie *name*, in the order they came (RFC 6265, section 4.2)."""
    found = []
    for pair in header.split(";"):
        key, _, value = pair.strip().partition("=")
        if key == name:
            found.append(value.strip('"'))
    return found
