"""
Mint a bearer token per user, as the application asks for with SSE_AUTH=jwt.
"""

import json
import time
from typing import Any

import jwt

from loadtest.scenario import ScenarioError

LIFE_SECONDS = 3600


class Tokens:
    """
    The token of each user: one for all, one minted with *secret*, or none.

    Raises:
        ScenarioError: both are given, or *claims* is no JSON object.
    """

    def __init__(self, token: str = "", secret: str = "", claims: str = "") -> None:
        if token and secret:
            raise ScenarioError("--token and --secret must not be given both, got both. Give one.")
        try:
            more = json.loads(claims or "{}")
        except ValueError:
            more = None
        if not isinstance(more, dict):
            raise ScenarioError(f"--claims must be a JSON object, got {claims!r}.")
        self._token = token
        self._secret = secret
        self._more = more

    @property
    def named(self) -> bool:
        """Whether a token says who the user is; else the address does, `?user=`."""
        return bool(self._token or self._secret)

    @property
    def shared(self) -> bool:
        """Whether all streams are one user's, to the server."""
        return bool(self._token)

    def headers(self, user: str) -> dict[str, str]:
        """Return the header that names *user*; a minted token is as old as this call."""
        if self._token:
            return {"Authorization": f"Bearer {self._token}"}
        if not self._secret:
            return {}
        now = int(time.time())
        claims: dict[str, Any] = {
            "sub": user,
            "iat": now,
            "exp": now + LIFE_SECONDS,
            "sse": {"subscribe": ["*"], "publish": ["*", "user:*", "run:*"]},
        }
        return {"Authorization": f"Bearer {jwt.encode(claims | self._more, self._secret, 'HS256')}"}

    def expires_in(self) -> float | None:
        """Return the seconds that a given token is still valid for; None where it does not say."""
        if not self._token:
            return None
        try:
            expires = jwt.decode(self._token, options={"verify_signature": False}).get("exp")
        except jwt.InvalidTokenError:
            return None  # opaque; the server will say what it thinks of it
        return float(expires) - time.time() if isinstance(expires, int | float) else None
