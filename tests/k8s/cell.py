"""
Become one container's process: its network, its file system, its user, its command.

    python cell.py SPEC.json

Run as root. The host's own file system lies below, unchanged; above it what the
container mounts. Nothing here knows Kubernetes; tests/k8s/cluster.py does.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

BIND, REC, RDONLY, REMOUNT, PRIVATE = 4096, 16384, 1, 32, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    if _libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {source} on {target}")


def contain() -> None:
    """
    Go on as the first process of a PID namespace, as a container's command does.

    When it ends, or whoever waits for it is killed, all that it started ends with
    it: nginx's workers too. The process that waits hands signals on.
    """
    os.unshare(os.CLONE_NEWPID)
    child = os.fork()
    if not child:
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, lambda n, _: os.kill(child, n))
    # Whoever started this is its life.
    _libc.prctl(1, signal.SIGKILL)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    contain()
    with Path(spec["netns"]).open() as netns:
        os.setns(netns.fileno(), os.CLONE_NEWNET)
    os.unshare(os.CLONE_NEWNS)
    mount("none", "/", flags=REC | PRIVATE)
    scratch = spec["scratch"]
    mount("tmpfs", scratch, "tmpfs")
    for name in ("upper", "work", "root"):
        Path(scratch, name).mkdir()
    root = f"{scratch}/root"
    mount("overlay", root, "overlay", data=f"lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work")
    for path in ("/proc", "/dev"):
        mount(path, root + path, flags=BIND | REC)
    for path in spec["passable"]:  # folders on the way to an interpreter in somebody's home
        Path(root + path).chmod(0o755)
    for path, text in spec["files"].items():
        Path(root + path).unlink(missing_ok=True)
        Path(root + path).write_text(text)
    for source, target, read_only in sorted(spec["binds"], key=lambda bind: bind[1]):
        place = Path(root + target)
        if not place.exists():
            place.mkdir(parents=True)
        mount(source, str(place), flags=BIND)
        if read_only:
            mount("none", str(place), flags=BIND | REMOUNT | RDONLY)
    for path, target in spec["links"].items():
        place = Path(root + path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)
    if spec["read_only"]:
        mount("none", root, flags=REMOUNT | RDONLY)
    os.chroot(root)
    os.chdir(spec["cwd"])
    os.setgroups(spec["groups"])
    os.setgid(spec["gid"])
    os.setuid(spec["uid"])
    # After the change of user, which takes it away.
    _libc.prctl(1, signal.SIGKILL)
    os.execvpe(spec["argv"][0], spec["argv"], spec["env"])


main()
