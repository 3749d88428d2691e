"""
Compile the benchmark's two C files, once per content and compiler.

Programs go to a cache outside the tree: BENCH_CACHE, else the user's cache folder.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-O2", "-Wall", "-Wextra")


class CompileError(RuntimeError):
    """
    The compiler refused one of our C files.
    """


def cache_folder() -> Path:
    """
    Return the folder of compiled programs and of the peers' environments.
    """
    given = os.environ.get("BENCH_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sse-bench"


def find_compiler() -> str | None:
    """
    Return the C compiler ($CC, else cc, gcc, clang), or None where none is.
    """
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    return None


def build(name: str) -> Path | None:
    """
    Return the program made of *name*.c, or None where no compiler is.
    """
    compiler = find_compiler()
    if compiler is None or sys.platform != "linux":
        return None
    source = HERE / f"{name}.c"
    mark = hashlib.sha256(source.read_bytes() + repr((compiler, FLAGS)).encode()).hexdigest()[:16]
    program = cache_folder() / f"{name}-{mark}"
    if program.exists():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    # Two runs may compile at once: each makes its own file and renames it.
    fresh = program.with_name(f"{program.name}.{os.getpid()}")
    done = subprocess.run(
        [compiler, *FLAGS, "-o", str(fresh), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CompileError(f"{source.name} must compile, {compiler} said:\n{done.stderr}")
    fresh.rename(program)
    return program
