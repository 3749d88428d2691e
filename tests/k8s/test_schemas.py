"""
What Kubernetes itself would accept: every rendered object against the schemas of its version.
"""

import copy
import json
import os
import subprocess
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pytest

from tests.k8s.rendered import OVERLAYS, ROOT, combinations, composed, load_test, overlay, pick

# The floor of the kit, what it will meet first, and the newest that is known.
VERSIONS = ("1.33.0", "1.36.0", kubernetes_validate.latest_version())


@pytest.fixture(scope="module", autouse=True)
def _kubectl(require: Callable[..., str]) -> None:
    require("kubectl")


@pytest.fixture(scope="module")
def schemas(require: Callable[..., str]) -> str:
    """The folder with the published types of custom resources."""
    require("node")
    require("npm")
    folder = str(ROOT / ".cache" / "schemas")
    subprocess.run(["sh", str(ROOT / "tests/k8s/schemas.sh"), folder], check=True)
    return folder


def sets() -> dict[str, list[dict[str, Any]]]:
    return {name: overlay(name) for name in OVERLAYS} | {"load-test/run": load_test()} | {"+".join(row) or "base": composed(row) for row in combinations()}


def is_custom(o: dict[str, Any]) -> bool:
    group = o["apiVersion"].rpartition("/")[0]
    return ("." in group and not group.endswith(".k8s.io")) or group == "gateway.networking.k8s.io"


def custom_faults(folder: str, objects: list[dict[str, Any]]) -> str:
    run = subprocess.run(
        ["node", str(ROOT / "tests/k8s/custom.cjs"), folder],
        input=json.dumps(objects), capture_output=True, text=True, check=False, env=os.environ | {"NODE_NO_WARNINGS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


class TestBuiltIn:
    @pytest.mark.parametrize("version", VERSIONS)
    def test_strict(self, version):
        """Every object of every set is valid, without a field that Kubernetes does not know."""
        seen: set[str] = set()
        for name, objects in sets().items():
            for o in objects:
                text = json.dumps(o, sort_keys=True)
                if is_custom(o) or text in seen:
                    continue
                seen.add(text)
                try:
                    kubernetes_validate.validate(o, version, strict=True)
                except kubernetes_validate.ValidationError as error:
                    pytest.fail(f"{name}: {o['kind']} {o['metadata']['name']}: {error.message}")
        assert len(seen) > 40

    def test_a_misspelt_field_is_seen(self):
        """The check that finds nothing above does find something."""
        o = copy.deepcopy(pick(overlay("local"), "Deployment", "sse-app"))
        o["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}

        with pytest.raises(kubernetes_validate.ValidationError, match="livenessProb"):
            kubernetes_validate.validate(o, VERSIONS[0], strict=True)


class TestCustom:
    def test_published_schemas(self, schemas):
        """Custom resources are what their makers published: names, types and values."""
        unique = {json.dumps(o, sort_keys=True): o for objects in sets().values() for o in objects if is_custom(o)}
        assert {"PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "BackendTrafficPolicy", "ClientTrafficPolicy"} == {
            o["kind"] for o in unique.values()
        }

        assert "" == custom_faults(schemas, list(unique.values()))

    def test_slips_are_seen(self, schemas):
        """A misspelt field, a wrong type and a wrong value."""
        route = copy.deepcopy(pick(composed(("envoy-gateway",)), "HTTPRoute", "sse"))
        route["spec"]["rules"][0]["timeouts"] = {"request": "0 seconds"}
        keda = copy.deepcopy(pick(composed(("autoscaling-keda",)), "ScaledObject", "sse-app"))
        keda["spec"]["minReplicas"] = 2
        monitor = copy.deepcopy(pick(composed(("monitoring",)), "PodMonitor", "sse-app"))
        monitor["spec"]["podMetricsEndpoints"] = {"port": "metrics"}
        faults = custom_faults(schemas, [route, keda, monitor])

        assert "HTTPRoute sse: " in faults
        assert "ScaledObject sse-app: " in faults
        assert "minReplicas" in faults
        assert "PodMonitor sse-app: " in faults
