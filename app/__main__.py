"""
`python -m app` serves; `python -m app publish` and `listen` are its clients.
"""

import sys

_HELP = """\
usage: python -m app                    serve; settings come from SSE_… variables
       python -m app publish --help     publish standard input, line by line
       python -m app listen --help      follow a stream, resuming by itself
       python -m app token --help       make a token for trying things out
"""


def main(argv: list[str]) -> int:
    """Run what *argv* asks for; return the exit status."""
    if sys.version_info < (3, 13):  # noqa: UP036  started by hand with another Python
        version = ".".join(map(str, sys.version_info[:2]))
        print(f"Python must be 3.13 or newer, got {version}. `make up` makes one: .venv/bin/python", file=sys.stderr)
        return 2
    if argv and argv[0] in ("publish", "listen"):
        from app.command import main as command

        return command(argv)
    if argv and argv[0] == "token":
        from app.mint import main as mint

        return mint(argv[1:])
    if argv and argv[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if argv:
        print(f"command must be publish, listen, token or none, got {argv[0]!r}.\n{_HELP}", end="", file=sys.stderr)
        return 2
    from app.server import run
    from app.settings import SettingError, load

    try:
        return run(load())
    except SettingError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
