"""
Read a token (a JWT): its signature, its times, its claims. Nothing is believed by its type.

https://www.rfc-editor.org/rfc/rfc7519, https://www.rfc-editor.org/rfc/rfc8725
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jwt

from app.access import Caller, check_user, refuse
from app.event import EventError, check_subscription
from app.keys import Key, Keys
from app.problem import Problem

# Longer ones would not fit into the header lines of most servers anyway.
TOKEN_MAX_CHARACTERS = 8_192
PATTERNS_MAX = 500
# Verifying costs 20 to 100 µs, finding a verified one 2: a reconnect storm and a
# busy publisher bring the same tokens again and again.
_REMEMBERED = 10_000
# Strict: no padding, no line ends, nothing that two readers could read differently.
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
# The last second of the year 9999: what is later was meant in milliseconds.
_LATEST = 253_402_300_799


class Tokens:
    """
    Verifies tokens with the keys of one source, and remembers the verified ones.

    Args:
        clock: seconds since 1970.
    """

    def __init__(
        self,
        keys: Keys,
        *,
        audience: str = "",
        issuer: str = "",
        leeway: float = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.keys = keys
        self._audience = audience
        self._issuer = issuer
        self._leeway = leeway
        self._clock = clock
        self._jws = jwt.PyJWS(algorithms=sorted(keys.algorithms))
        self._verified: dict[bytes, Caller] = {}
        self._generation = keys.generation

    async def caller(self, token: str) -> Caller:
        """
        Return whom *token* names, with the rights it gives.

        Raises:
            Problem: 401 where it is not valid, 503 where that cannot be known yet.
        """
        self.keys.look()
        if self._generation != self.keys.generation:
            self._verified.clear()
            self._generation = self.keys.generation
        # The hash: a token is not kept in memory longer than its request.
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        known = self._verified.get(digest)
        if known is not None and known.expires_at is not None and self._clock() < known.expires_at:
            return known
        caller = self._read(token, await self._key(token))
        while len(self._verified) >= _REMEMBERED:
            del self._verified[next(iter(self._verified))]
        self._verified[digest] = caller
        return caller

    async def _key(self, token: str) -> Key:
        """Return the key that *token* says it was signed with."""
        if len(token) > TOKEN_MAX_CHARACTERS:
            refuse("token", f"must have at most {TOKEN_MAX_CHARACTERS} characters", len(token))
        if not _COMPACT.fullmatch(token):
            refuse("token", "must be a signed JWT: three parts in base64url, joined by dots")
        try:
            header = self._jws.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError):
            refuse("token", "must have a header that is a JSON object, without critical extensions")
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in self.keys.algorithms:
            refuse("alg", f"must be one of {', '.join(sorted(self.keys.algorithms))}", _short(algorithm))
        if kid is not None and not isinstance(kid, str):
            refuse("kid", "must be a string", _short(kid))
        key = self.keys.find(algorithm, kid)
        if key is None:
            await self.keys.ask_again()
            key = self.keys.find(algorithm, kid)
        if key is None and not self.keys.known:
            raise Problem(
                503,
                "keys-unavailable",
                "keys",
                "could not be had yet",
                None,
                "Try again in some seconds. SSE_JWKS_URL does not answer, or not with keys; the log says which.",
                {"Retry-After": "5"},
            )
        if key is None:
            refuse("kid", f"must name one key that verifies {algorithm}", _short(kid))
        return key

    def _read(self, token: str, key: Key) -> Caller:
        try:
            # The key's algorithm, not the token's: they are equal, or this fails.
            payload = self._jws.decode_complete(token, key.material, algorithms=[key.algorithm])["payload"]
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            refuse("token", "must have a signature that its key verifies")
        try:
            claims = json.loads(payload.decode(), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            claims = None
        if not isinstance(claims, dict):
            refuse("token", "must hold claims that are a JSON object")
        return self._caller(claims)

    def _caller(self, claims: dict[str, Any]) -> Caller:
        now = self._clock()
        expires = _time(claims, "exp")
        if expires is None:
            refuse("exp", "must be there")
        if now >= expires + self._leeway:
            refuse("exp", "must not be over: the token has expired", expires)
        for name in ("nbf", "iat"):
            begins = _time(claims, name)
            if begins is not None and now < begins - self._leeway:
                refuse(name, "must not be in the future: the token is not valid yet", begins)
        self._check_audience(claims.get("aud"))
        if self._issuer and claims.get("iss") != self._issuer:
            refuse("iss", "must be SSE_JWT_ISSUER", _short(claims.get("iss")))
        try:
            user = check_user(claims.get("sub"), "sub")
        except EventError as error:
            refuse("sub", error.rule, _short(error.value), error.cure)
        rights = claims.get("sse", {})
        if not isinstance(rights, dict):
            refuse("sse", "must be an object", _short(rights))
        admin = rights.get("admin", False)
        if not isinstance(admin, bool):
            refuse("sse.admin", "must be true or false", _short(admin))
        return Caller(
            user=user,
            subscribe=_patterns(rights, "subscribe"),
            publish=_patterns(rights, "publish"),
            admin=admin,
            expires_at=expires + self._leeway,
            carrier="bearer",
        )

    def _check_audience(self, found: object) -> None:
        named = [found] if isinstance(found, str) else [] if found is None else found
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            refuse("aud", "must be a string or an array of strings", _short(found))
        # RFC 7519, section 4.1.3: who is not in it must refuse the token.
        if self._audience and self._audience not in named:
            refuse("aud", "must contain SSE_JWT_AUDIENCE", _short(found))
        if not self._audience and named:
            refuse("aud", "must be absent, as SSE_JWT_AUDIENCE is empty", _short(found))


def _time(claims: dict[str, Any], name: str) -> float | None:
    """Return a claim that is a time, in seconds since 1970."""
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LATEST:
        refuse(name, "must be a number of seconds since 1970", _short(value))
    return float(value)


def _patterns(rights: dict[str, Any], name: str) -> tuple[str, ...]:
    value = rights.get(name, [])
    if not isinstance(value, list) or len(value) > PATTERNS_MAX:
        refuse(f"sse.{name}", f"must be an array of at most {PATTERNS_MAX} topics or prefixes", _short(value))
    try:
        return tuple(dict.fromkeys([check_subscription(pattern) for pattern in value]))
    except EventError as error:
        refuse(f"sse.{name}", f"must hold topics, or prefixes that end in *: each {error.rule}", _short(error.value))


def _short(value: object) -> object:
    """Return *value* if a person could want to see it in a refusal."""
    return value if value is None or isinstance(value, str | int | float | bool) else type(value).__name__


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
