"""
Render what k8s/ holds: the base, every overlay, every component, and sets of components.
"""

import functools
import itertools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
K8S = ROOT / "k8s"
OVERLAYS = ("local", "staging", "production")

# k8s/README.md promises: of each group one or none, in any combination.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("redis", "redis-sentinel", "external-redis"),
    ("autoscaling", "autoscaling-keda"),
    ("tls", "gateway-api", "nginx-ingress-f5", "envoy-gateway"),
    ("jwt",),
    ("network-policy",),
    ("monitoring",),
    ("load-test",),
)

Object = dict[str, Any]


def kustomize(folder: Path) -> list[Object]:
    """Return what `kubectl kustomize` makes of *folder*."""
    run = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return list(yaml.load_all(run.stdout, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@functools.cache
def overlay(name: str) -> list[Object]:
    """Return the objects of one overlay. Callers must not change them."""
    return kustomize(K8S / "overlays" / name)


@functools.cache
def load_test() -> list[Object]:
    """Return the objects of one run of the load test. Callers must not change them."""
    return kustomize(K8S / "components" / "load-test" / "run")


@functools.cache
def composed(components: tuple[str, ...]) -> list[Object]:
    """Return the objects of the base with *components*. Callers must not change them."""
    with tempfile.TemporaryDirectory(prefix="k8s-", dir=_scratch()) as folder:
        lines = ["namespace: sse", "resources:", f"- {os.path.relpath(K8S / 'base', folder)}"]
        if components:
            lines += ["components:", *(f"- {os.path.relpath(K8S / 'components' / c, folder)}" for c in components)]
        (Path(folder) / "kustomization.yaml").write_text("\n".join(lines))
        return kustomize(Path(folder))


def _scratch() -> Path:
    # Within the tree: kustomize follows no absolute paths.
    folder = ROOT / ".cache"
    folder.mkdir(exist_ok=True)
    # Itself, not a link to it: `..` leads from there to another tree.
    return folder.resolve()


def combinations() -> list[tuple[str, ...]]:
    """
    Return sets of components in which every pair that is promised occurs together.

    All of them would be some five hundred; what breaks a patch is another patch.
    """
    choices = [(None, *group) for group in GROUPS]
    wanted = {
        frozenset({a, b})
        for one, other in itertools.combinations(choices, 2)
        for a in one
        for b in other
        if a and b
    }
    rows: list[tuple[str, ...]] = [()] + [(c,) for group in GROUPS for c in group]
    every = list(itertools.product(*choices))
    while wanted:
        best = max(every, key=lambda row: len(wanted & _pairs(row)))
        wanted -= _pairs(best)
        rows.append(tuple(c for c in best if c))
    return rows


def _pairs(row: tuple[str | None, ...]) -> set[frozenset[str | None]]:
    return {frozenset(pair) for pair in itertools.combinations([c for c in row if c], 2)}


def pick(objects: list[Object], kind: str, name: str) -> Object:
    """Return the one object of that kind and name."""
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    assert len(found) == 1, f"{kind} {name}: {len(found)}"
    return found[0]
