"""
Write lines for people, also when they have read enough (`| head`).
"""

import os
import sys


def say(text: str) -> None:
    """Print one or more lines; what nobody reads any more is dropped, and the run goes on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        stop_writing()


def stop_writing() -> None:
    """Let all further output go nowhere; the interpreter's last flush, too, which would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
