"""
`python -m app token`: make a token for trying things out, signed with a secret.
"""

import argparse
import sys
import time
from pathlib import Path

import jwt

from app.access import check_user
from app.event import EventError, check_subscription
from app.keys import KeysError, read_secret

_HELP = """\
Patterns are topics, or prefixes that end in *; separate several by spaces.
The token is one line on standard output:

  curl -N -H "Authorization: Bearer $(make token SUB=alice SUBSCRIBE='orders/*')" \\
       'http://localhost:8080/events?topic=orders/1'
"""
_LONGEST_SECONDS = 366 * 86_400


def main(argv: list[str]) -> int:
    """Print a token and return the exit code: 0, or 2 with one line that says what was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m app token",
        description="Make a token for trying things out.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--secret-file", required=True, metavar="FILE", help="the secret of SSE_JWT_SECRET_FILE")
    parser.add_argument("--sub", required=True, metavar="ID", help="the user, 1 to 64 characters")
    parser.add_argument("--subscribe", default="", metavar="PATTERNS", help="what the user may subscribe to")
    parser.add_argument("--publish", default="", metavar="PATTERNS", help="what the user may publish to")
    parser.add_argument("--admin", action="store_true", help="may see and end the streams of every user")
    parser.add_argument("--ttl", default="3600", metavar="SECONDS", help="how long it is valid (default: 3600)")
    parser.add_argument("--audience", default="", help="SSE_JWT_AUDIENCE, if that is set")
    parser.add_argument("--issuer", default="", help="SSE_JWT_ISSUER, if that is set")
    options = parser.parse_args(argv)
    try:
        print(_token(options))
    except (EventError, KeysError, OSError) as error:
        print(_line(error, options), file=sys.stderr)
        return 2
    return 0


def _token(options: argparse.Namespace) -> str:
    [key] = read_secret(Path(options.secret_file).read_bytes())
    claims = {
        "sub": check_user(options.sub, "SUB"),
        "iat": int(time.time()),
        "exp": int(time.time()) + _seconds(options.ttl),
        "sse": {
            "subscribe": [check_subscription(pattern) for pattern in options.subscribe.split()],
            "publish": [check_subscription(pattern) for pattern in options.publish.split()],
            "admin": options.admin,
        },
    }
    named = {"aud": options.audience, "iss": options.issuer}
    claims |= {name: value for name, value in named.items() if value}
    return jwt.encode(claims, key.material, key.algorithm)


def _seconds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= _LONGEST_SECONDS):
        raise EventError(
            "TTL", f"must be a whole number of seconds from 1 to {_LONGEST_SECONDS}", text, "Such as 3600."
        )
    return int(text)


def _line(error: Exception, options: argparse.Namespace) -> str:
    if isinstance(error, OSError):
        return (
            f"--secret-file must be a file that can be read, got {options.secret_file!r} ({error.strerror}). "
            "`make up AUTH=jwt` makes one for its stack."
        )
    if isinstance(error, KeysError):
        return f"--secret-file {error}, in {options.secret_file!r}."
    return str(error)
