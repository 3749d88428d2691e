"""
Build the kit's images and push them, with whichever of docker, podman and buildah answers.

    python3 k8s/images.py build --tag 0.1.0
    python3 k8s/images.py push --tag 0.1.0 --registry registry.example.com/sse
"""

# Python 3.9, as macOS has it, is enough.
from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = {"app": "app/Dockerfile", "loadtest": "loadtest/Dockerfile"}
# Each with a question that only a working one answers: a docker client without
# its engine is on many machines.
TOOLS = {"docker": ["docker", "info"], "podman": ["podman", "info"], "buildah": ["buildah", "info"]}
# Build arguments that are taken from the environment, where they are set.
ARGUMENTS = ("PYTHON_IMAGE", "PYTHON_VERSION", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST")


class Failed(Exception):
    """What is wrong and what to do, in one sentence or two."""


def tool() -> str:
    """Return the first tool that works."""
    for name, question in TOOLS.items():
        try:
            if subprocess.run(question, capture_output=True, check=False, timeout=30).returncode == 0:
                return name
        except (OSError, subprocess.TimeoutExpired):
            continue
    raise Failed("One of docker, podman and buildah must answer, none does. Start Docker, or install podman or buildah.")


def names(registry: str, tag: str) -> dict[str, str]:
    """Return each image's name with the Dockerfile that makes it."""
    prefix = registry.rstrip("/") or "sse-kit"
    return {f"{prefix}/{name}:{tag}": file for name, file in IMAGES.items() if (ROOT / file).exists()}


def build(registry: str, tag: str) -> None:
    """Build all images, for PLATFORM or this machine's kind of processor."""
    command = tool()
    for name, file in names(registry, tag).items():
        arguments = [f"--build-arg={key}={os.environ[key]}" for key in ARGUMENTS if os.environ.get(key)]
        arguments += [f"--platform={os.environ['PLATFORM']}"] if os.environ.get("PLATFORM") else []
        arguments += [f"--build-arg=VERSION={tag}", f"--build-arg=REVISION={revision()}"]
        _run([command, "build", "-f", file, "-t", name, *arguments, "."])
        print(f"Image {name} is there, made by {command}.", flush=True)


def push(registry: str, tag: str) -> None:
    """Push all images to *registry*."""
    if not registry:
        raise Failed("REGISTRY must be where your cluster pulls from, as in REGISTRY=registry.example.com/sse, got none.")
    command = tool()
    for name in names(registry, tag):
        _run([command, "push", name])
        print(f"Image {name} is pushed.", flush=True)
    (app,) = (name for name, file in names(registry, tag).items() if file == IMAGES["app"])
    print(f"Deploy it: make deploy IMAGE={app} OVERLAY=staging", flush=True)


def revision() -> str:
    """Return the commit that is built, or `unknown`."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def _run(command: list[str]) -> None:
    if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise Failed(f"{' '.join(command[:2])} must succeed, ended with {status} (see above).")


def main(argv: list[str]) -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(prog="images.py", description="Build and push the kit's images.")
    parser.add_argument("command", choices=["build", "push"])
    parser.add_argument("--registry", default="", help="where they go, as registry.example.com/sse")
    parser.add_argument("--tag", default="0.1.0", help="their version")
    options = parser.parse_args(argv)
    try:
        (build if options.command == "build" else push)(options.registry, options.tag)
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
