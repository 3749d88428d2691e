"""What stands behind make: finding Python, locks, CI's rule against skips."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make_clone(folder: Path) -> Path:
    """Make a clone whose locks are empty, so that an environment takes seconds."""
    clone = folder / "clone"
    shutil.copytree(ROOT / ".make", clone / ".make")
    for name in ("app", "tests"):
        (clone / name).mkdir()
        (clone / name / "requirements.txt").write_text("# nothing\n")
    return clone


def start(clone: Path) -> subprocess.Popen[str]:
    """Run python.sh with the programs beside the clone before those of the system."""
    environment = {"PATH": f"{clone.parent / 'bin'}:/usr/bin:/bin", "HOME": str(clone.parent)}
    return subprocess.Popen(
        [".make/python.sh", "run"],
        cwd=clone,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


class TestPython:
    @pytest.mark.timeout(300)  # it makes an environment, and installs into it twice
    def test_two_at_once_behind_a_dead_shim(self, tmp_path: Path):
        """
        A shim that only prints an error is passed over for pyenv's versions, one of two makes
        does the work, and only another lock is work again.
        """
        clone = make_clone(tmp_path)
        program(tmp_path / "bin/python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
        program(tmp_path / ".pyenv/versions/3.13.9/bin/python3.13", f'exec {sys.executable} "$@"')

        shells = [start(clone) for _ in range(2)]
        said = [shell.communicate()[0] for shell in shells]
        again = start(clone).communicate()[0]
        (clone / "app/requirements.txt").write_text("# nothing, in other words\n")
        changed = start(clone).communicate()[0]

        assert [0, 0] == [shell.returncode for shell in shells], said
        assert 1 == sum("Making .venv with Python 3.13" in text for text in said), said
        assert "" == again
        assert "Installing the packages of app/requirements.txt into .venv.\n" == changed

    def test_no_python_at_all(self, tmp_path: Path):
        """Without any Python, a sentence says what to install."""
        clone = make_clone(tmp_path)
        for name in ("python3.13", "python3", "python"):
            program(tmp_path / "bin" / name, "exit 1")
        # Only what the script itself needs, so that the system's own is out of reach.
        for name in ("sh", "dirname", "cat", "cmp"):
            (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
        script = clone / ".make/python.sh"
        script.write_text(script.read_text().replace("/usr/bin/python3", "/nonexistent/python3"))

        run = subprocess.run(
            [".make/python.sh", "run"],
            cwd=clone,
            env={"PATH": str(tmp_path / "bin"), "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            check=False,
        )

        assert 1 == run.returncode
        assert "Python 3.13 must be on this machine, found none" in run.stderr


class TestSkips:
    @pytest.mark.parametrize(
        ("ci", "options", "body", "code"),
        [
            ("true", "", "import pytest\ndef test_a(): pytest.skip('zebra is not installed')", 1),
            ("true", "-pxdist -n1", "import pytest\npytestmark = pytest.mark.skip\ndef test_a(): pass", 1),
            ("true", "", "import pytest\npytest.importorskip('zebra')", 1),
            ("true", "", "def test_a(): pass", 0),
            ("", "", "import pytest\ndef test_a(): pytest.skip('zebra is not installed')", 0),
        ],
        ids=["call", "mark behind xdist", "import", "none", "not CI"],
    )
    def test_skip(self, tmp_path: Path, ci, options, body, code):
        """Under CI=true a skip makes the run red, whatever way it was written."""
        shutil.copy(ROOT / "tests/conftest.py", tmp_path)
        (tmp_path / "test_it.py").write_text(body + "\n")

        run = subprocess.run(
            [sys.executable, "-m", "pytest", "--rootdir", str(tmp_path), "-c", os.devnull, *options.split(), str(tmp_path)],
            # Without plugins, which take seconds to load and have no part in it.
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
            | {"CI": ci, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

        assert code == run.returncode, run.stdout
        assert bool(code) == ("CI=true allows no skips, got 1" in run.stdout)
