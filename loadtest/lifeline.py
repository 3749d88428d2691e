"""
End a process with the one that started it, however that one ended.

Linux does it by itself (PR_SET_PDEATHSIG, prctl(2)). Elsewhere the process that leads
a run ends its whole group; only its own SIGKILL leaves the others to themselves there.
"""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def follow(parent: int, number: int) -> None:
    """Get signal *number* when *parent* ends, which started this process; end now if it has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def take_children_along(number: int) -> None:
    """Let every process that is forked from now on get signal *number* when its parent ends."""
    parent = 0

    def before() -> None:
        nonlocal parent
        parent = os.getpid()

    os.register_at_fork(before=before, after_in_child=lambda: follow(parent, number))
