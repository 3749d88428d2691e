"""What is remembered of tokens; what they may hold stands in tests/test_refusals.py."""

import time
from pathlib import Path

import pytest

from app.keys import FileKeys, Keys, UrlKeys, read_secret
from app.problem import Problem
from app.settings import JWKS_ALGORITHMS
from app.tokens import Tokens
from tests.signing import SECRET, sign, sign_by, token


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


class TestMemory:
    """A token that was verified is not verified again, as long as that would give the same."""

    async def test_same_caller(self):
        """Whoever comes again is the same object: its memory is shared."""
        tokens = Tokens(Keys(["HS256"], read_secret(SECRET.encode())))
        text = token()

        assert await tokens.caller(text) is await tokens.caller(text)

    async def test_expired(self):
        """Being remembered is no second life; the leeway counts."""
        clock = Clock()
        tokens = Tokens(Keys(["HS256"], read_secret(SECRET.encode())), leeway=5, clock=clock)
        text = token(exp=clock.now + 10)
        clock.now += 14.9
        assert await tokens.caller(text)
        clock.now += 0.1

        with pytest.raises(Problem, match="exp"):
            await tokens.caller(text)

    async def test_new_secret(self, tmp_path: Path):
        """With the secret go all that it verified."""
        clock = Clock()
        path = tmp_path / "secret"
        path.write_text(SECRET)
        tokens = Tokens(FileKeys(["HS256"], str(path), read_secret, clock=clock))
        text = token()
        await tokens.caller(text)
        path.write_text(SECRET[::-1])
        clock.now += 1

        with pytest.raises(Problem, match="signature"):
            await tokens.caller(text)
        assert await tokens.caller(sign({"sub": "a", "exp": clock.now + 10}, secret=SECRET[::-1]))

    async def test_bounded(self, monkeypatch):
        """Many users do not grow it without end; the oldest are forgotten."""
        monkeypatch.setattr("app.tokens._REMEMBERED", 10)
        tokens = Tokens(Keys(["HS256"], read_secret(SECRET.encode())))
        for number in range(50):
            assert f"u{number}" == (await tokens.caller(token(f"u{number}"))).user

        assert 10 == len(tokens._verified)


class TestNoKeys:
    async def test_later(self):
        """As long as no key could be had, nobody can say that a token is wrong: 503, not 401."""

        async def away() -> bytes:
            raise OSError("away")

        keys = UrlKeys(JWKS_ALGORITHMS, away, refresh_seconds=300, cooldown_seconds=10)
        keys._ask_at = float("inf")
        with pytest.raises(Problem) as caught:
            await Tokens(keys).caller(sign_by("ES256"))

        assert (503, "keys-unavailable") == (caught.value.status, caught.value.slug)
