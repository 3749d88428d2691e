"""
Runs of the kind `task`: long work that tells how far it is. And how to write your own.

A task is a coroutine function that gets the request's arguments and a teller,
tells its progress, and returns what `run.done` carries:

    from app.task import task, wrong

    @task("report")
    async def report(arguments, teller):
        months = arguments.get("months", 12)
        if not 1 <= months <= 24:
            raise wrong("months", "must be 1 to 24", months, "Leave it out for 12.")
        for month in range(months):
            await teller.progress(100 * month / months, f"month {month + 1}")
            await asyncio.to_thread(add_up, month)
        return {"rows": 1200}

Name its module in SSE_TASK_MODULES. Work that computes goes into a thread, as
here: a run shares its process with thousands of streams. To cancel a run is to
cancel the coroutine; whatever else it raises becomes `run.failed`.
"""

import asyncio
import hashlib
import importlib
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from app.problem import Problem
from app.runs import RunFailure, Teller, Work
from app.settings import SettingError

Task = Callable[[dict[str, Any], Teller], Awaitable[dict[str, Any]]]

_FIELDS = frozenset({"kind", "task", "arguments"})
# Read at once: small enough that cancelling is quick, large enough for the disk.
_PIECE_BYTES = 4 * 1_048_576
_MOST_FILES = 1_000

_tasks: dict[str, Task] = {}


def task(name: str) -> Callable[[Task], Task]:
    """Offer a coroutine function as the task *name*."""

    def offer(function: Task) -> Task:
        _tasks[name] = function
        return function

    return offer


def wrong(name: str, rule: str, value: object, cure: str) -> RunFailure:
    """Return the failure of a task that was given wrong arguments; raise it."""
    return RunFailure("invalid", name, rule, value, cure)


class Tasks:
    """
    All tasks of this process.

    Args:
        root: the folder below which `checksums` may read; empty: it is not offered.
        modules: names of Python modules, separated by spaces or commas, that offer more.
    """

    def __init__(self, root: str, modules: str) -> None:
        for module in modules.replace(",", " ").split():
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise SettingError(
                    "SSE_TASK_MODULES", f"modules that can be imported ({error})", modules, "Put them on PYTHONPATH."
                ) from None
        self._tasks = dict(_tasks)
        if root:
            self._tasks["checksums"] = Checksums(Path(root).resolve())

    def prepare(self, body: dict[str, Any]) -> Work:
        """Return the work that *body* asks for; raise a Problem where it asks for none."""
        for name in body:
            if name not in _FIELDS:
                raise Problem(
                    400, "invalid", name, "is not a field of a task", body[name], "Fields: kind, task, arguments."
                )
        chosen = self._tasks.get(body["task"]) if isinstance(body.get("task"), str) else None
        if chosen is None:
            offered = ", ".join(sorted(self._tasks)) or "none; set SSE_TASK_ROOT or SSE_TASK_MODULES"
            raise Problem(400, "invalid", "task", "must be one that is offered here", body.get("task"), f"Offered: {offered}.")
        arguments = body.get("arguments", {})
        if not isinstance(arguments, dict):
            raise Problem(400, "invalid", "arguments", "must be an object", arguments, 'Such as {"path": "."}.')
        return lambda teller: chosen(arguments, teller)


class Checksums:
    """
    The task `checksums`: SHA-256 of a file, or of all files of a folder.

    ``{"path": "backups"}`` is below the root. Links that lead out of it are refused.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    async def __call__(self, arguments: dict[str, Any], teller: Teller) -> dict[str, Any]:
        if arguments.keys() - {"path"}:
            raise wrong("arguments", "must be `path` alone", json.dumps(arguments), 'Such as {"path": "."}.')
        path = arguments.get("path", ".")
        files = await asyncio.to_thread(self._files, path)
        total = sum(size for _, size in files)
        done = 0
        sums = []
        for file, _ in files:
            name = str(file.relative_to(self._root))
            digest = hashlib.sha256()
            read = 0
            with await asyncio.to_thread(_open, file) as source:
                while True:
                    await teller.progress(100 * done / total if total else 100, name, done=done, total=total)
                    piece = await asyncio.to_thread(_add, source, digest)
                    if not piece:
                        break
                    read += piece
                    done = min(total, done + piece)
            sums.append({"path": name, "bytes": read, "sha256": digest.hexdigest()})
        await teller.progress(100, "done", done=total, total=total)
        return {"files": sums, "bytes": sum(each["bytes"] for each in sums)}

    def _files(self, path: object) -> list[tuple[Path, int]]:
        """Return the files at *path*, with their sizes."""
        if not isinstance(path, str) or "\0" in path:
            raise wrong("path", "must be a text", path, "A path below SSE_TASK_ROOT.")
        start = self._resolved(self._root / path, path)
        if not start.exists():
            raise wrong("path", "must exist", path, "A path below SSE_TASK_ROOT.")
        found = [start] if start.is_file() else []
        for folder, folders, names in os.walk(start):
            folders.sort()
            found += [Path(folder, name) for name in sorted(names) if not Path(folder, name).is_symlink()]
            if len(found) > _MOST_FILES:
                raise wrong("path", f"must hold at most {_MOST_FILES} files", path, "Ask folder by folder.")
        return [(file, file.stat().st_size) for file in found if file.is_file()]

    def _resolved(self, path: Path, asked: str) -> Path:
        resolved = path.resolve()
        if not resolved.is_relative_to(self._root):
            raise wrong("path", "must be below SSE_TASK_ROOT", asked, "Links must not lead out of it either.")
        return resolved


def _open(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise wrong("path", f"must be readable ({error.strerror})", file.name, "Check its permissions.") from None


def _add(source: Any, digest: Any) -> int:
    """Hash the next piece; return its size."""
    piece = source.read(_PIECE_BYTES)
    digest.update(piece)
    return len(piece)
