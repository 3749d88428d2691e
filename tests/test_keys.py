"""Keys that change, keys that are away, and keys that are none."""

import asyncio
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jwt
import pytest

from app.keys import FileKeys, Key, KeysError, UrlKeys, load_keys, read_jwks, read_secret
from app.settings import JWKS_ALGORITHMS, SettingError, Settings
from tests.inside import Inside
from tests.live import ask
from tests.signing import SECRET, bearer, jwk, jwks, private_key, sign_by


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class TestSecret:
    def test_line_end(self):
        """The line end that an editor leaves is none of the secret; spaces are."""
        assert [Key("HS256", b" " + SECRET.encode())] == read_secret(b" " + SECRET.encode() + b"\r\n")

    @pytest.mark.parametrize(
        "data", [b"", b"short", b"s" * 31 + b"\n", b"-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----\n"]
    )
    def test_none(self, data):
        """Too short a secret is none, and a public key, which everybody has, is no secret."""
        with pytest.raises(KeysError):
            read_secret(data)

    def test_no_key_of_a_set(self):
        """A JWK in the place of a secret is a mistake that nobody would notice."""
        with pytest.raises(KeysError, match="must be a secret"):
            read_secret(json.dumps(jwk("RS256")).encode())


class TestJwks:
    def test_all_types(self):
        """Each key has the one algorithm of its type."""
        found = read_jwks(jwks().encode())

        assert [(name, f"{name}-one") for name in JWKS_ALGORITHMS] == [(key.algorithm, key.kid) for key in found]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"use": "enc"},
            {"alg": "RS512"},
            {"alg": "HS256"},
            {"key_ops": ["sign"]},
            {"key_ops": "verify"},
            {"d": "AQAB"},
            {"n": "AQAB"},
            {"n": 7},
            {"kty": "oct", "k": "c2VjcmV0"},
            {"kty": "EC"},
            {"kty": ["RSA"]},
            {"kid": 7},
        ],
    )
    def test_passed_over(self, wrong):
        """A key for something else, too short, private or broken is passed over; the others count."""
        found = read_jwks(jwks(jwk("RS256", **wrong), jwk("ES256")).encode())

        assert ["ES256-one"] == [key.kid for key in found]

    @pytest.mark.parametrize("algorithm", JWKS_ALGORITHMS)
    def test_private(self, algorithm):
        """A private key is not published by anybody who means it, and is not used."""
        written = jwt.get_algorithm_by_name(algorithm).to_jwk(private_key(algorithm), as_dict=True)
        written.pop("key_ops", None)
        with pytest.raises(KeysError):
            read_jwks(jwks({**written, "kid": "private"}).encode())

    def test_other_curves(self):
        """Only the curve of ES256 verifies ES256."""
        with pytest.raises(KeysError):
            read_jwks(jwks(jwk("ES256", crv="P-384")).encode())

    @pytest.mark.parametrize(
        "data", [b"", b"{}", b"[]", b'{"keys": {}}', b'{"keys": []}', b'{"keys": [7, null]}', b"[" * 100_000, b"\xff"]
    )
    def test_none(self, data):
        """What holds no key says so, whatever it is."""
        with pytest.raises(KeysError):
            read_jwks(data)


class TestFind:
    def keys(self, tmp_path: Path, *keys: dict) -> FileKeys:
        path = tmp_path / "keys"
        path.write_text(jwks(*keys))
        return FileKeys(JWKS_ALGORITHMS, str(path), read_jwks)

    def test_by_name(self, tmp_path):
        """The name and the algorithm say which."""
        keys = self.keys(tmp_path, jwk("RS256"), jwk("RS256", "two"), jwk("ES256"))

        assert "RS256-two" == keys.find("RS256", "RS256-two").kid
        assert keys.find("ES256", "RS256-two") is None
        assert keys.find("HS256", "RS256-two") is None

    def test_without_a_name(self, tmp_path):
        """A token that names none means the only one there is of its type."""
        keys = self.keys(tmp_path, jwk("RS256"), jwk("RS256", "two"), jwk("ES256"))

        assert "ES256-one" == keys.find("ES256", None).kid
        assert keys.find("RS256", None) is None

    def test_allowed(self, tmp_path):
        """Of an algorithm that is not allowed no key is taken."""
        path = tmp_path / "keys"
        path.write_text(jwks())
        keys = FileKeys(["ES256"], str(path), read_jwks)

        assert keys.find("RS256", "RS256-one") is None
        path.write_text(jwks(jwk("RS256")))
        with pytest.raises(KeysError, match="no key for ES256"):
            FileKeys(["ES256"], str(path), read_jwks)


class TestFile:
    def mount(self, folder: Path, version: str, secret: str) -> Path:
        """Replace a secret as Kubernetes does: a new folder, and one symbolic link renamed over another."""
        (folder / version).mkdir(parents=True)
        (folder / version / "secret").write_text(secret)
        (folder / "..tmp").symlink_to(version)
        (folder / "..tmp").rename(folder / "..data")
        link = folder / "secret"
        if not link.is_symlink():
            link.symlink_to("..data/secret")
        return link

    def test_replaced(self, tmp_path):
        """A new secret counts within a second of its coming, and the old one no more."""
        clock = Clock()
        keys = FileKeys(["HS256"], str(self.mount(tmp_path, "..1", SECRET)), read_secret, clock=clock)
        self.mount(tmp_path, "..2", SECRET + " anew")
        keys.look()
        assert SECRET.encode() == keys.find("HS256", None).material  # looked at just now
        clock.now += 1
        keys.look()

        assert f"{SECRET} anew".encode() == keys.find("HS256", None).material
        assert 2 == keys.generation

    def test_away_or_broken(self, tmp_path):
        """While the file is away or broken the old secret stays; the next good one counts."""
        clock = Clock()
        path = tmp_path / "secret"
        path.write_text(SECRET)
        keys = FileKeys(["HS256"], str(path), read_secret, clock=clock)
        for state in (None, "short", None):
            path.unlink(missing_ok=True)
            if state:
                path.write_text(state)
            clock.now += 1
            keys.look()
            assert SECRET.encode() == keys.find("HS256", None).material
        path.write_text(SECRET * 2)
        clock.now += 1
        keys.look()

        assert (SECRET * 2).encode() == keys.find("HS256", None).material

    @pytest.mark.parametrize("name", ["jwt_secret_file", "jwks_file"])
    @pytest.mark.parametrize("content", [None, "tell nobody"])
    def test_at_the_start(self, tmp_path, name, content):
        """What cannot be used at the start is one line that names the setting, and shows no content."""
        path = tmp_path / "keys"
        if content:
            path.write_text(content)
        with pytest.raises(SettingError) as caught:
            load_keys(Settings(auth="jwt", **{name: str(path)}))

        assert f"SSE_{name.upper()} must be a key that can be used" in str(caught.value)
        assert "tell nobody" not in str(caught.value)
        assert "\n" not in str(caught.value)


class Source:
    """Something to fetch from, that counts."""

    def __init__(self) -> None:
        self.fetches = 0
        self.answer: str | Exception = jwks(jwk("RS256"))
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> bytes:
        self.fetches += 1
        await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer.encode()


class TestUrl:
    @pytest.fixture
    async def source(self):
        return Source()

    @pytest.fixture
    async def clock(self):
        return Clock()

    @pytest.fixture
    async def keys(self, source, clock):
        keys = UrlKeys(JWKS_ALGORITHMS, source, refresh_seconds=300, cooldown_seconds=10, clock=clock)
        task = asyncio.create_task(keys.run())
        yield keys
        task.cancel()

    async def test_at_the_start(self, source, keys):
        """Whoever asks before the first answer waits for it; all for the same one."""
        await asyncio.gather(*(keys.ask_again() for _ in range(10)))

        assert keys.known
        assert 1 == source.fetches

    async def test_unknown_name(self, keys, source, clock):
        """An unknown key has the set fetched again, but not more often than the cooldown allows."""
        await keys.ask_again()
        source.answer = jwks(jwk("RS256", "two"))
        for _ in range(10):
            await keys.ask_again()
        assert (1, None) == (source.fetches, keys.find("RS256", "RS256-two"))
        clock.now += 10
        await asyncio.gather(*(keys.ask_again() for _ in range(10)))

        assert 2 == source.fetches
        assert keys.find("RS256", "RS256-two")
        assert keys.find("RS256", "RS256-one") is None

    @pytest.mark.parametrize("wrong", [OSError("away"), KeysError("status 500"), "{}", "not json", RuntimeError("odd")])
    async def test_away(self, keys, source, clock, wrong):
        """The old keys stay in use while the URL is away, or answers nonsense."""
        await keys.ask_again()
        source.answer = wrong
        clock.now += 10
        await keys.ask_again()

        assert 2 == source.fetches
        assert keys.find("RS256", "RS256-one")
        assert 1 == keys.generation

    async def test_same_set(self, keys, source, clock):
        """A set that has not changed leaves what was verified with it alone."""
        await keys.ask_again()
        clock.now += 10
        await keys.ask_again()

        assert (2, 1) == (source.fetches, keys.generation)

    async def test_slow(self, keys, source, clock):
        """While a fetch takes its time, tokens of known keys are verified all the same."""
        await keys.ask_again()
        source.gate.clear()
        clock.now += 10
        waiting = asyncio.create_task(keys.ask_again())
        await asyncio.sleep(0)

        assert keys.find("RS256", "RS256-one")
        assert not waiting.done()
        source.gate.set()
        await waiting

    async def test_back_again(self, source, clock):
        """A URL that was away at the start is asked again soon, by itself."""
        source.answer = OSError("away")
        keys = UrlKeys(JWKS_ALGORITHMS, source, refresh_seconds=0.05, cooldown_seconds=10, clock=clock)
        task = asyncio.create_task(keys.run())
        await keys.ask_again()
        assert not keys.known
        source.answer = jwks()
        async with asyncio.timeout(10):
            while not keys.known:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        task.cancel()

    def test_from_settings(self):
        """The settings say where the keys are."""
        keys = load_keys(Settings(auth="jwt", jwks_url="https://id.example/keys", jwt_algorithms="ES256,EdDSA"))

        assert isinstance(keys, UrlKeys)
        assert {"ES256", "EdDSA"} == keys.algorithms
        assert private_key("ES256")


class Jwks(BaseHTTPRequestHandler):
    """Answers as its path says."""

    def do_GET(self):
        status, body = {
            "/keys": (200, jwks()),
            "/away": (503, jwks()),
            "/moved": (302, ""),
            "/endless": (200, "[" * 3_000_000),
            "/html": (200, "<html>"),
        }[self.path]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/keys")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Jwks)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


class TestHttp:
    """The URL itself, over HTTP."""

    @pytest.mark.parametrize(
        ("path", "known"), [("/keys", True), ("/away", False), ("/moved", False), ("/endless", False), ("/html", False)]
    )
    async def test_answers(self, address, path, known):
        """Keys come with 200 from the very address, whole and not endless; nothing else ends the task."""
        keys = load_keys(Settings(auth="jwt", jwks_url=address + path))
        task = asyncio.create_task(keys.run())
        await keys.ask_again()

        assert known == keys.known
        assert not task.done()
        task.cancel()

    async def test_nobody_listens(self):
        """A port where nobody listens is one that is away."""
        keys = load_keys(Settings(auth="jwt", jwks_url="http://127.0.0.1:9/keys"))
        task = asyncio.create_task(keys.run())
        await keys.ask_again()

        assert (False, False) == (keys.known, task.done())
        task.cancel()

    async def test_whole_way(self, address):
        """A process whose keys are behind the URL lets in, and refuses, as with a file."""
        with Inside(auth="jwt", jwks_url=f"{address}/keys") as server:
            for name, status in (("one", 200), ("two", 401)):
                text = sign_by("ES256", name, subscribe=["t"])
                answer = await ask(server.port, "HEAD", "/events?topic=t", headers=bearer(text))
                assert status == answer.status
