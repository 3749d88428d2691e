"""
The keys that tokens are verified with: a secret, or the public keys of a JWKS.

A file is looked at again when it may have changed (Kubernetes replaces symbolic
links), a URL every SSE_JWKS_REFRESH_SECONDS, and sooner, at a bounded rate,
when a token names a key that is not known. What was loaded once stays in use
while the file or the URL is away. Nothing here blocks the event loop: a file is
one small local read, a URL is fetched by a task of its own.

Rule: a key verifies one algorithm, the one of its type. A token chooses a key,
never an algorithm (RFC 8725, section 3.1).
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx2
import jwt
import structlog

from app.settings import JWKS_ALGORITHMS, SECRET_ALGORITHMS, SECRET_MIN_BYTES, SettingError, Settings

# A file is looked at no more often than this.
_LOOK_SECONDS = 1.0
# Whoever waits for a fetch waits no longer than this, and so does the fetch.
_FETCH_SECONDS = 4.0
# The largest set that is read; a real one has a few kilobytes.
_MOST_BYTES = 1 << 20
# Shorter RSA keys are not safe any more (NIST SP 800-131A).
_RSA_LEAST_BITS = 2048


class KeysError(ValueError):
    """What was given holds no key that can be used. The text says why, and never what."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key, its one algorithm, and its name in a token's header."""

    algorithm: str
    material: Any
    kid: str | None = None


class Keys:
    """
    The keys of one source.

    Attributes:
        generation: grows whenever the keys become others.
        algorithms: what a token may be signed with.
    """

    def __init__(self, algorithms: Iterable[str], keys: Sequence[Key] = ()) -> None:
        self.generation = 0
        self.algorithms = frozenset(algorithms)
        self._keys: tuple[Key, ...] = ()
        if keys:
            self._take(keys)

    @property
    def known(self) -> bool:
        """Whether there are keys at all."""
        return bool(self._keys)

    def look(self) -> None:
        """Take note of what has changed; cheap, for every request."""

    async def ask_again(self) -> None:
        """Return when keys that were not known may be, or when that would be too soon."""

    def find(self, algorithm: str, kid: str | None) -> Key | None:
        """
        Return the key of a token, None where there is none or it is not clear which.

        A secret has no name, so that any token may mean it.
        """
        found = [key for key in self._keys if key.algorithm == algorithm]
        if kid is not None:
            found = [key for key in found if key.kid == kid or key.algorithm in SECRET_ALGORITHMS][:1]
        return found[0] if len(found) == 1 else None

    def _take(self, keys: Sequence[Key]) -> None:
        usable = tuple(key for key in keys if key.algorithm in self.algorithms)
        if not usable:
            raise KeysError(f"holds no key for {', '.join(sorted(self.algorithms))}")
        self._keys = usable
        self.generation += 1


class FileKeys(Keys):
    """The keys of a file, which may be replaced at any time."""

    def __init__(
        self,
        algorithms: Iterable[str],
        path: str,
        read: Callable[[bytes], Sequence[Key]],
        *,
        clock: Callable[[], float] = time.monotonic,
        logger: structlog.typing.FilteringBoundLogger | None = None,
    ) -> None:
        super().__init__(algorithms)
        self._path = Path(path)
        self._read = read
        self._clock = clock
        self._logger = logger or structlog.get_logger()
        self._mark = _mark(self._path)
        self._look_at = clock() + _LOOK_SECONDS
        self._take(read(_content(self._path)))

    def look(self) -> None:
        if self._clock() < self._look_at:
            return
        self._look_at = self._clock() + _LOOK_SECONDS
        mark = _mark(self._path)
        if mark == self._mark:
            return
        try:
            self._take(self._read(_content(self._path)))
        except (KeysError, OSError) as error:
            if mark != (0, 0, 0):
                self._mark = mark  # once for each change, not once a second
            self._logger.warning(
                "keys_unreadable", path=str(self._path), why=_why(error), note="The keys of before stay in use."
            )
            return
        self._mark = mark
        self._logger.info("keys_loaded", path=str(self._path), keys=len(self._keys))


class _Fetch(Protocol):
    async def __call__(self) -> bytes:
        """Return the set's bytes; raise OSError, httpx2.HTTPError or KeysError."""


class UrlKeys(Keys):
    """The keys of a JWKS URL. Empty until the first fetch succeeded."""

    def __init__(
        self,
        algorithms: Iterable[str],
        fetch: _Fetch,
        *,
        refresh_seconds: float,
        cooldown_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        logger: structlog.typing.FilteringBoundLogger | None = None,
    ) -> None:
        super().__init__(algorithms)
        self._fetch = fetch
        self._refresh = refresh_seconds
        self._cooldown = cooldown_seconds
        self._clock = clock
        self._logger = logger or structlog.get_logger()
        self._last: bytes = b""
        self._ask_at = 0.0  # sooner than this nobody makes us fetch
        self._asked = asyncio.Event()
        self._fetched: asyncio.Future[None] | None = None

    async def ask_again(self) -> None:
        # Until the next fetch has ended, all wait for the same one.
        if self._fetched is None:
            if self._clock() < self._ask_at:
                return
            self._fetched = asyncio.get_running_loop().create_future()
            self._asked.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FETCH_SECONDS):
                await asyncio.shield(self._fetched)

    async def run(self) -> None:
        """Keep the keys fresh, for ever."""
        failures = 0
        while True:
            if self._fetched is None:
                self._fetched = asyncio.get_running_loop().create_future()
            failures = 0 if await self._load() else failures + 1
            self._ask_at = self._clock() + self._cooldown
            fetched, self._fetched = self._fetched, None
            fetched.set_result(None)
            pause = min(self._refresh, 2.0 ** min(failures, 16) / 2) if failures else self._refresh
            self._asked.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._asked.wait()

    async def _load(self) -> bool:
        try:
            async with asyncio.timeout(_FETCH_SECONDS):
                data = await self._fetch()
            if data != self._last:
                self._take(read_jwks(data))
                self._last = data
                self._logger.info("keys_loaded", keys=len(self._keys))
        except Exception as error:  # whatever it is, the process goes on with the keys it has
            self._logger.warning(
                "keys_unavailable",
                why=_why(error),
                note="The keys of before stay in use." if self.known else "Every token is answered 503 until then.",
            )
            return False
        return True


def load_keys(settings: Settings) -> Keys:
    """
    Return the keys that *settings* name.

    Raises:
        SettingError: a file cannot be used; start-up ends with it.
    """
    secret = settings.jwt_secret or settings.jwt_secret_file
    named = [name for name in settings.jwt_algorithms.replace(",", " ").split() if name]
    algorithms = named or (SECRET_ALGORITHMS if secret else JWKS_ALGORITHMS)
    if settings.jwks_url:
        return UrlKeys(
            algorithms,
            _fetch(settings.jwks_url),
            refresh_seconds=settings.jwks_refresh_seconds,
            cooldown_seconds=settings.jwks_cooldown_seconds,
        )
    try:
        if settings.jwt_secret:
            return Keys(algorithms, read_secret(settings.jwt_secret.encode()))
        if settings.jwt_secret_file:
            return FileKeys(algorithms, settings.jwt_secret_file, read_secret)
        return FileKeys(algorithms, settings.jwks_file, read_jwks)
    except (KeysError, OSError) as error:
        name, path = (
            ("SSE_JWT_SECRET_FILE", settings.jwt_secret_file)
            if settings.jwt_secret_file
            else ("SSE_JWKS_FILE", settings.jwks_file)
            if settings.jwks_file
            else ("SSE_JWT_SECRET", "…")
        )
        raise SettingError(name, "a key that can be used", path, f"It {_why(error)}.") from None


def read_secret(data: bytes) -> list[Key]:
    """Return the secret in *data*, without the line end that an editor leaves."""
    secret = data.rstrip(b"\r\n")
    if len(secret) < SECRET_MIN_BYTES:
        raise KeysError(f"must have at least {SECRET_MIN_BYTES} bytes (RFC 7518, section 3.2), has {len(secret)}")
    try:
        jwt.get_algorithm_by_name("HS256").prepare_key(secret)
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise KeysError("must be a secret, not a key pair, a certificate or a JWK") from None
    return [Key("HS256", secret)]


def read_jwks(data: bytes) -> list[Key]:
    """
    Return the usable public keys of a JWK Set (RFC 7517).

    Keys of other types, for encryption, too short or private are passed over.
    """
    try:
        found = json.loads(data)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise KeysError('must be JSON with an array "keys" (RFC 7517)')
    keys = [key for jwk in found[:100] if isinstance(jwk, dict) and (key := _key(jwk))]
    if not keys:
        raise KeysError("holds no public key for RS256 (2,048 bits), ES256 (P-256) or EdDSA (Ed25519)")
    return keys


def _key(jwk: dict[str, Any]) -> Key | None:
    """Return the key of *jwk*, None where it is not one of ours."""
    kid = jwk.get("kid")
    types: dict[tuple[Any, Any], str] = {
        ("RSA", None): "RS256",
        ("EC", "P-256"): "ES256",
        ("OKP", "Ed25519"): "EdDSA",
    }
    kty, crv = jwk.get("kty"), jwk.get("crv")
    if not all(name is None or isinstance(name, str) for name in (kid, kty, crv)):
        return None
    algorithm = types.get((kty, None if kty == "RSA" else crv))
    operations = jwk.get("key_ops", ["verify"])
    if (
        algorithm is None
        or jwk.get("alg", algorithm) not in (algorithm, "Ed25519" if algorithm == "EdDSA" else algorithm)
        or jwk.get("use", "sig") != "sig"
        or not isinstance(operations, list)
        or "verify" not in operations
        or "d" in jwk
    ):
        return None
    try:
        material = jwt.PyJWK(jwk, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError):
        return None
    if algorithm == "RS256" and material.key_size < _RSA_LEAST_BITS:
        return None
    return Key(algorithm, material, kid)


def _fetch(url: str) -> _Fetch:
    async def fetch() -> bytes:
        # A client each time: once in minutes, and it follows a moved name.
        async with httpx2.AsyncClient() as client, client.stream("GET", url) as response:
            if response.status_code != 200:
                raise KeysError(f"was answered with status {response.status_code}")
            data = b""
            async for piece in response.aiter_bytes():
                data += piece
                if len(data) > _MOST_BYTES:
                    raise KeysError(f"has more than {_MOST_BYTES} bytes")
            return data

    return fetch


def _mark(path: Path) -> tuple[int, int, int]:
    """Return what tells one state of a file from another; symbolic links are followed."""
    try:
        found = os.stat(path)  # noqa: PTH116  a third of the time
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_ino, found.st_size)


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise KeysError(f"has more than {_MOST_BYTES} bytes")
    return data


def _why(error: Exception) -> str:
    """Return *error* without what may be secret in it."""
    if isinstance(error, KeysError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"cannot be had ({type(error).__name__})"
