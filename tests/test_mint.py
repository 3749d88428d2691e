"""`make token` and `make up AUTH=jwt`: tokens for trying things out."""

import json
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from app import stack as module
from app.keys import Keys, read_secret
from app.mint import main
from app.stack import ROOT
from app.tokens import Tokens
from tests.signing import SECRET
from tests.test_stack import feeding, run, until  # noqa: F401  fixtures


@pytest.fixture
def secret(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    return str(path)


class TestToken:
    async def test_valid(self, secret, capsys):
        """It is one line, and a process with the same secret and names lets it in, as it says."""
        who = ["--sub", "zoë", "--subscribe", "orders/* chat", "--publish", "chat", "--admin"]
        what = ["--ttl", "60", "--audience", "sse", "--issuer", "me"]
        code = main(["--secret-file", secret, *who, *what])
        [line] = capsys.readouterr().out.splitlines()
        keys = Keys(["HS256"], read_secret(SECRET.encode()))
        caller = await Tokens(keys, audience="sse", issuer="me").caller(line)

        assert 0 == code
        assert ("zoë", ("orders/*", "chat"), ("chat",), True) == (
            caller.user,
            caller.subscribe,
            caller.publish,
            caller.admin,
        )

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--sub", ""], "SUB must have 1 to 64 characters"),
            (["--sub", "a", "--subscribe", "a/*/b"], "topic must be 1 to 255"),
            (["--sub", "a", "--publish", "a b,c"], "topic must be 1 to 255"),
            (["--sub", "a", "--ttl", ""], "TTL must be a whole number of seconds"),
            (["--sub", "a", "--ttl", "1e3"], "TTL must be a whole number of seconds"),
            (["--sub", "a", "--ttl", "999999999"], "TTL must be a whole number of seconds"),
            (["--sub", "a", "--secret-file", "/nonexistent"], "`make up AUTH=jwt` makes one"),
            (["--sub", "a", "--secret-file", os.devnull], "at least 32 bytes"),
        ],
    )
    def test_mistakes(self, secret, capsys, arguments, said):
        """One line that names the mistake, and no token."""
        code = main(["--secret-file", secret, *arguments])
        out, error = capsys.readouterr()

        assert (2, "") == (code, out)
        assert 1 == error.count("\n")
        assert said in error


class TestStack:
    def test_printed_commands(self, run: Path, free_port: int):  # noqa: F811
        """The commands that `up` prints work as printed; without a token nobody gets in."""
        text = module.up(free_port, 1, {}, "jwt")
        lines = [line.strip() for line in text.splitlines() if line.startswith("  ")]
        # `make` looks into the folder of the clone; the test's stack is in one of its own.
        secret_file = run / str(free_port) / "jwt-secret"
        mint = [sys.executable, "-m", "app", "token", "--secret-file", str(secret_file), "--sub", "alice"]
        made = subprocess.run(
            [*mint, "--subscribe", "demo", "--publish", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        listen, send = (shlex.split(line.replace("$TOKEN", made.stdout.strip())) for line in lines[1:])
        with subprocess.Popen(listen, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as curl:
            while b"event: stream.open\n" != curl.stdout.readline():
                pass
            sent = json.loads(subprocess.run(send, capture_output=True, check=True).stdout)
            received = b""
            while b"data: hello\n" not in received:
                received += curl.stdout.readline()
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"http://127.0.0.1:{free_port}/events?topic=demo", timeout=10)
            module.down(free_port)

        assert f"TOKEN=$(make -s token PORT={free_port} SUB=alice SUBSCRIBE=demo PUBLISH=demo)" == lines[0]
        assert f"id: {sent['ids'][0]}\n".encode() in received

    def test_files_are_private(self, run: Path, free_port: int):  # noqa: F811
        """Only their owner reads the secret and the feed's token; `listen` sends the token of a file."""
        module.up(free_port, 1, {}, "jwt")
        folder = run / str(free_port)
        mint = [sys.executable, "-m", "app", "token", "--secret-file", str(folder / "jwt-secret"), "--sub", "bob"]
        made = subprocess.run([*mint, "--subscribe", "logs"], cwd=ROOT, capture_output=True, text=True, check=True)
        token_file = folder / "token"
        token_file.write_text(made.stdout)
        url = f"http://127.0.0.1:{free_port}"
        command = [sys.executable, "-m", "app", "listen", "--url", url, "--topic", "logs", "--count", "1"]
        with (
            feeding(run, free_port),
            subprocess.Popen([*command, "--token-file", str(token_file)], cwd=ROOT, stdout=subprocess.PIPE) as listen,
        ):

            def asked() -> bool:
                with urllib.request.urlopen(f"{url}/healthz", timeout=5):
                    return listen.poll() is not None

            until(asked, 90)
            line = json.loads(listen.stdout.read())
            modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}

        assert "/healthz" == line["path"]
        assert (0o600, 0o600) == (modes["jwt-secret"], modes["feed-token"])

    def test_wrong_mode(self, run: Path, capsys):  # noqa: F811
        """AUTH is one of two words."""
        assert 1 == module.main(["up", "--auth", "basic"])
        assert "AUTH must be none or jwt, got 'basic'" in capsys.readouterr().err
