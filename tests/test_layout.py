"""Where things stand, who imports what, and who reads the environment."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def tracked() -> list[str]:
    """Return the paths that belong to the project."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):  # an archive: everything here
        return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.splitlines() if (ROOT / path).exists()]


class TestTopLevel:
    def test_entries(self):
        """The top level holds what the README explains, and nothing else."""
        allowed = {"app", "nginx", "k8s", "loadtest", "tests", "Makefile", "pyproject.toml", "README.md"}
        allowed |= {"LICENSE", "CHANGELOG.md"}

        entries = {path.split("/")[0] for path in tracked()}

        assert set() == {entry for entry in entries if not entry.startswith(".")} - allowed


class TestImports:
    def test_contracts(self):
        """The contracts of pyproject.toml hold; `make lint` shows the same."""
        command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

        assert 0 == run.returncode, run.stdout + run.stderr

    def test_environment(self):
        """Settings reads the environment; the stack hands it on; nobody else touches it."""
        readers = set()
        for path in (ROOT / "app").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                name = getattr(node, "attr", None) or getattr(node, "name", None)
                if name in {"environ", "environb", "getenv", "getenvb"}:
                    readers.add(path.name)

        assert {"settings.py", "stack.py"} == readers


class TestLocks:
    def test_versions_and_hashes_alone(self):
        """A lock names no server and no folder, so that it installs the same from anywhere."""
        line = re.compile(r"^([A-Za-z0-9._-]+==[^ /:]+( ; [^/:]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?|\s*#[^/]*)$")
        locks = [path for path in tracked() if path.endswith("requirements.txt")]
        assert {"app/requirements.txt", "tests/requirements.txt"} <= set(locks)
        for lock in locks:
            strange = [text for text in (ROOT / lock).read_text().splitlines() if not line.match(text)]

            assert [] == strange, lock

    def test_the_tests_lock_holds_the_applications(self):
        """What is tested is what runs: same versions, so installing one never changes the other."""

        def versions(lock: str) -> set[str]:
            return set(re.findall(r"(?m)^[A-Za-z0-9._-]+==\S+", (ROOT / lock).read_text()))

        assert set() == versions("app/requirements.txt") - versions("tests/requirements.txt")


class TestMakefile:
    def test_targets_are_listed(self):
        """`make` alone lists every target that people call, by section."""
        environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout

        targets = set(re.findall(r"(?m)^  ([a-z0-9-]+) ", listed))

        expected = {"help", "up", "down", "status", "logs", "run", "feed", "test", "lint", "lock", "bench", "clean"}
        assert set() == expected - targets

    def test_variables_have_one_default(self):
        """The second of two defaults would never count: a load test without SECONDS= once lasted as long as `make fuzz`."""
        names = re.findall(r"(?m)^(\w+) [?:]=", (ROOT / "Makefile").read_text())

        assert sorted(set(names)) == sorted(names)

    def test_recipes_are_short(self):
        """A recipe of more than five lines is a script or a module."""
        recipes = re.findall(r"(?m)^[a-z-]+:.*\n((?:\t.*\n?)+)", (ROOT / "Makefile").read_text())

        assert 5 >= max(recipe.count("\n") for recipe in recipes)
