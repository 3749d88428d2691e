"""
What every overlay and every promised set of components keeps; and that each rule sees what breaks it.
"""

import argparse
import copy
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from k8s.deploy import containers, loadtest_objects, smoke_objects
from tests.k8s.policies import RULES, broken
from tests.k8s.rendered import GROUPS, K8S, OVERLAYS, ROOT, combinations, composed, load_test, overlay, pick

Objects = list[dict[str, Any]]
BASE: tuple[str, ...] = ("redis", "jwt", "network-policy", "autoscaling-keda", "gateway-api", "monitoring")


def options(**given: Any) -> argparse.Namespace:
    names = dict.fromkeys(("streams", "seconds", "rate", "thresholds", "options"), "")
    return argparse.Namespace(**names | {"overlay": "local", "workers": 1, "scenario": "smoke", "loadtest_image": "registry.example.com/loadtest:1"} | given)


@pytest.fixture(scope="module", autouse=True)
def _kubectl(require: Callable[..., str]) -> None:
    require("kubectl")


class TestAllKeepTheRules:
    @pytest.mark.parametrize("name", OVERLAYS)
    def test_overlay(self, name):
        """Every overlay keeps every rule."""
        assert [] == broken(overlay(name))

    @pytest.mark.parametrize("name", OVERLAYS)
    def test_smoke_test(self, name):
        """The smoke test's Job, fitted to an overlay, keeps every rule beside it."""
        items = smoke_objects(copy.deepcopy(overlay(name)))

        assert {"Job", "ConfigMap"} == {o["kind"] for o in items}
        assert [] == broken(overlay(name) + items)

    @pytest.mark.parametrize("name", OVERLAYS)
    def test_load_test(self, name):
        """The load test's Jobs, fitted to an overlay, keep every rule beside it; master and workers agree on their number."""
        items = loadtest_objects(overlay(name), options(overlay=name, workers=3, streams="100"))
        master, worker = (pick(items, "Job", f"sse-loadtest-{which}")["spec"] for which in ("master", "worker"))
        command = master["template"]["spec"]["containers"][0]["command"]

        assert [] == broken(overlay(name) + items)
        assert 3 == worker["parallelism"] == worker["completions"]
        assert {"--expect-workers=3", "--scenario=smoke", "--streams=100"} <= set(command)
        assert ("--insecure" in command) == ("--host=https://sse-nginx" in command) == (name != "local")

    @pytest.mark.parametrize(("name", "way"), [("staging", "tls"), ("production", "tls"), ("", "plain")])
    def test_nginx_has_room_for_the_streams_that_it_lets_in(self, name, way):
        """nginx refuses before its memory is full: killed for memory it would cut them all."""
        objects = overlay(name) if name else composed(("redis",))
        limit = nginx(objects)["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        most = int(re.findall(r"(?m)^limit_conn sse_streams_of_nginx (\d+);", (ROOT / "nginx/snippets/sse-limits.conf").read_text())[0])
        run = subprocess.run([sys.executable, str(ROOT / "nginx/size.py"), str(most), f"--way={way}", "--workers=2"], capture_output=True, text=True, check=True)
        needed = int(re.findall(r"(?m)^([\d,]+) MiB of memory", run.stdout)[0].replace(",", ""))

        assert needed < {"Mi": 1, "Gi": 1024}[limit[-2:]] * int(limit[:-2])

    def test_keda_scales_both(self):
        """Away from the component autoscaling, nginx must not fall back to the base's one pod."""
        objects = composed(("autoscaling-keda", "redis"))

        assert {"sse-app", "sse-nginx"} == {o["spec"]["scaleTargetRef"]["name"] for o in objects if o["kind"] == "ScaledObject"}
        assert "replicas" not in nginx(objects)

    def test_fitted_to_tokens_and_registry(self):
        """Smoke and load test make the tokens that the overlay asks for, and pull with its secret."""
        objects = copy.deepcopy(overlay("staging"))
        one(objects)["env"] += [{"name": "SSE_JWT_AUDIENCE", "value": "sse"}, {"name": "SSE_JWT_ISSUER", "value": "us"}]
        pick(objects, "ServiceAccount", "sse-app")["imagePullSecrets"] = [{"name": "registry"}]
        items = loadtest_objects(objects, options(overlay="staging"))
        (smoke,) = (c for name, c, _ in containers(smoke_objects(objects)) if "smoke" in name)
        master = pick(items, "Job", "sse-loadtest-master")["spec"]["template"]["spec"]["containers"][0]

        assert {"SMOKE_JWT_AUDIENCE": "sse", "SMOKE_JWT_ISSUER": "us"}.items() <= {e["name"]: e["value"] for e in smoke["env"]}.items()
        assert '--claims={"aud": "sse", "iss": "us"}' in master["command"]
        assert [{"name": "registry"}] == pick(items, "ServiceAccount", "sse-loadtest")["imagePullSecrets"]

    def test_every_pair_of_components(self):
        """Whatever README.md lets be combined, alone and two by two, keeps every rule."""
        rows = combinations()
        assert len(rows) > 15
        for row in rows:
            assert [] == broken(composed(row)), row

    def test_groups_are_those_of_the_readme(self):
        """k8s/README.md promises these components, and which exclude each other."""
        table = (K8S / "README.md").read_text().split("## Components", 1)[1].split("\n## ", 1)[0]
        promised = [tuple(re.findall(r"\[([a-z0-9-]+)\]\(components/", line)) for line in table.splitlines() if line.startswith("| [")]

        assert sorted(GROUPS) == sorted(promised)

    def test_every_component_is_in_a_group(self):
        """No component is without a test and without a README."""
        names = {path.parent.relative_to(K8S / "components").as_posix() for path in (K8S / "components").glob("*/kustomization.yaml")}

        assert {name for group in GROUPS for name in group} == names
        for name in names:
            assert (K8S / "components" / name / "README.md").exists(), name


def app(objects: Objects) -> Any:
    return pick(objects, "Deployment", "sse-app")["spec"]


def nginx(objects: Objects) -> Any:
    return pick(objects, "Deployment", "sse-nginx")["spec"]


def pod(objects: Objects) -> Any:
    return app(objects)["template"]["spec"]


def one(objects: Objects) -> Any:
    return pod(objects)["containers"][0]


def entry(objects: Objects, name: str) -> Any:
    return next(e for e in one(objects)["env"] if e["name"] == name)


def config(objects: Objects, prefix: str) -> Any:
    return next(o for o in objects if o["kind"] == "ConfigMap" and re.fullmatch(prefix + "-[a-z0-9]{10}", o["metadata"]["name"]))["data"]


def without(kind: str, name: str) -> Callable[[Objects], None]:
    def edit(objects: Objects) -> None:
        objects.remove(pick(objects, kind, name))

    return edit


def setting(name: str, value: str) -> Callable[[Objects], None]:
    return lambda o: one(o)["env"].append({"name": name, "value": value})


# What breaks each rule: small slips that somebody could make in a patch.
SLIPS: list[tuple[str, Callable[[Objects], Any]]] = [
    ("restricted", lambda o: pod(o)["securityContext"].pop("runAsNonRoot")),
    ("restricted", lambda o: pod(o)["securityContext"].pop("seccompProfile")),
    ("restricted", lambda o: pod(o).update(hostNetwork=True)),
    ("restricted", lambda o: pod(o)["volumes"].append({"name": "h", "hostPath": {"path": "/"}})),
    ("restricted", lambda o: nginx(o)["template"]["spec"]["securityContext"]["sysctls"].append({"name": "net.core.somaxconn", "value": "9"})),
    ("restricted", lambda o: one(o)["securityContext"].update(allowPrivilegeEscalation=True)),
    ("restricted", lambda o: one(o)["securityContext"]["capabilities"].update(add=["NET_ADMIN"])),
    ("restricted", lambda o: one(o)["securityContext"].update(privileged=True)),
    ("restricted", lambda o: one(o)["ports"][0].update(hostPort=80)),
    ("restricted", lambda o: one(o)["livenessProbe"]["httpGet"].update(host="example.com")),
    ("restricted", lambda o: nginx(o)["template"]["spec"]["initContainers"][0].pop("securityContext")),
    ("namespaces_enforce", lambda o: pick(o, "Namespace", "sse")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce")),
    ("namespaces_enforce", lambda o: pick(o, "Namespace", "sse")["metadata"]["labels"].update({"pod-security.kubernetes.io/enforce-version": "latest"})),
    ("read_only_root", lambda o: one(o)["securityContext"].pop("readOnlyRootFilesystem")),
    ("numbered_user", lambda o: pod(o)["securityContext"].pop("runAsUser")),
    ("numbered_user", lambda o: pod(o)["securityContext"].update(runAsGroup=0)),
    ("no_token", lambda o: pod(o).pop("automountServiceAccountToken")),
    ("no_token", lambda o: pod(o).pop("serviceAccountName")),
    ("no_token", lambda o: pick(o, "ServiceAccount", "sse-app").pop("automountServiceAccountToken")),
    ("no_service_links", lambda o: pod(o).pop("enableServiceLinks")),
    ("resources", lambda o: one(o)["resources"]["requests"].update(memory="1Mi")),
    ("resources", lambda o: one(o)["resources"]["limits"].update(cpu="1")),
    ("resources", lambda o: one(o)["resources"]["requests"].pop("cpu")),
    ("images", lambda o: one(o).update(image="registry.example.com:5000/sse/app")),
    ("images", lambda o: one(o).update(image="sse-kit/app:latest")),
    ("images", lambda o: one(o).pop("imagePullPolicy")),
    ("no_secrets", lambda o: o.append({"kind": "Secret", "metadata": {"name": "x", "namespace": "sse", "labels": {"app.kubernetes.io/part-of": "sse-kit"}}})),
    ("no_secrets", lambda o: one(o)["env"].append({"name": "REDIS_PASSWORD", "value": "x"})),
    ("probes", lambda o: one(o).pop("startupProbe")),
    ("probes", lambda o: one(o).pop("readinessProbe")),
    ("probes", lambda o: one(o)["livenessProbe"]["httpGet"].update(path="/readyz")),
    ("probes", lambda o: one(o)["livenessProbe"].update(failureThreshold=3)),
    ("pre_stop", lambda o: one(o)["lifecycle"].pop("preStop")),
    ("pre_stop", lambda o: nginx(o)["template"]["spec"]["containers"][0]["lifecycle"].update(preStop={"exec": {"command": ["sleep", "20"]}})),
    ("ladder", setting("SSE_HEARTBEAT_SECONDS", "30")),
    ("ladder", setting("SSE_MAX_AGE_SECONDS", "540")),
    ("ladder", setting("SSE_DRAIN_SECONDS", "100")),
    ("ladder", setting("SSE_RUN_FINISH_SECONDS", "31")),
    ("ladder", lambda o: pod(o).update(terminationGracePeriodSeconds=120)),
    ("ladder", lambda o: pod(o).pop("terminationGracePeriodSeconds")),
    ("ladder", lambda o: one(o)["lifecycle"]["preStop"]["sleep"].update(seconds=30)),
    ("ladder", lambda o: nginx(o)["template"]["spec"].update(terminationGracePeriodSeconds=600)),
    ("ladder", lambda o: nginx(o)["template"]["spec"].update(terminationGracePeriodSeconds=560)),
    ("rollout", lambda o: app(o)["strategy"].update(rollingUpdate={"maxSurge": "25%", "maxUnavailable": "25%"})),
    ("rollout", lambda o: nginx(o).pop("progressDeadlineSeconds")),
    ("rollout", lambda o: app(o).pop("minReadySeconds")),
    ("spread", lambda o: pod(o)["topologySpreadConstraints"].pop()),
    ("spread", lambda o: pod(o)["topologySpreadConstraints"][0].pop("matchLabelKeys")),
    ("disruption", without("PodDisruptionBudget", "sse-app")),
    ("disruption", lambda o: pick(o, "PodDisruptionBudget", "sse-app")["spec"].pop("unhealthyPodEvictionPolicy")),
    ("autoscaled", lambda o: app(o).update(replicas=3)),
    ("autoscaled", lambda o: o.append(pick(o, "ScaledObject", "sse-app"))),
    ("autoscaled", lambda o: pick(o, "ScaledObject", "sse-app")["spec"]["triggers"][0]["metadata"].update(query="sum(sse_streams_open)")),
    ("names_resolve", lambda o: one(o)["envFrom"][0]["configMapRef"].update(name="sse-app")),
    ("names_resolve", lambda o: one(o)["readinessProbe"]["httpGet"].update(port="web")),
    ("names_resolve", lambda o: one(o)["volumeMounts"][0].update(name="none")),
    ("names_resolve", lambda o: entry(o, "REDIS_PASSWORD")["valueFrom"]["secretKeyRef"].update(name="none")),
    ("names_resolve", lambda o: nginx(o)["template"]["spec"]["volumes"][0]["configMap"].update(name="none")),
    ("services_reach_pods", lambda o: pick(o, "Service", "sse-nginx")["spec"]["selector"].update(tier="web")),
    ("services_reach_pods", lambda o: pick(o, "Service", "sse-app")["spec"]["ports"][0].update(targetPort="web")),
    ("services_reach_pods", lambda o: pick(o, "HTTPRoute", "sse")["spec"]["rules"][0]["backendRefs"][0].update(port=8080)),
    ("headless", lambda o: pick(o, "Service", "sse-app-headless")["spec"].update(publishNotReadyAddresses=True)),
    ("headless", lambda o: pick(o, "Service", "sse-app-headless")["spec"].pop("clusterIP")),
    ("one_namespace", lambda o: pick(o, "Service", "sse-app")["metadata"].update(namespace="default")),
    ("labelled", lambda o: pick(o, "Service", "sse-app")["metadata"]["labels"].pop("app.kubernetes.io/part-of")),
    ("labelled", lambda o: app(o)["template"]["metadata"]["labels"].pop("app.kubernetes.io/part-of")),
    ("starts", setting("SSE_HOST", "127.0.0.1")),
    ("starts", setting("SSE_HEARTBEAT", "15")),
    ("starts", setting("SSE_PORT", "8001")),
    ("starts", setting("SSE_AUTH", "none")),
    ("shared_log", lambda o: (one(o)["env"].remove(entry(o, "SSE_REDIS_URL")), o.remove(pick(o, "ScaledObject", "sse-app")), app(o).update(replicas=2))),
    ("nginx_files", lambda o: config(o, "sse-nginx").update({"nginx.conf": config(o, "sse-nginx")["nginx.conf"] + " "})),
    ("nginx_files", lambda o: config(o, "sse-nginx-snippets").pop("sse-proxy.conf")),
    ("ways_are_open", without("NetworkPolicy", "sse-default-deny")),
    ("ways_are_open", without("NetworkPolicy", "sse-dns")),
    ("ways_are_open", without("NetworkPolicy", "sse-redis")),
    ("ways_are_open", without("NetworkPolicy", "sse-nginx")),
    ("ways_are_open", lambda o: pick(o, "NetworkPolicy", "sse-app")["spec"]["ingress"][0]["ports"][0].update(port=9000)),
    ("ways_are_open", without("NetworkPolicy", "sse-loadtest")),
    ("ways_are_open", lambda o: pick(o, "NetworkPolicy", "sse-loadtest")["spec"]["egress"].pop()),
    ("jobs_end", lambda o: pick(o, "Job", "sse-loadtest-master")["spec"].pop("activeDeadlineSeconds")),
    ("jobs_end", lambda o: pick(o, "Job", "sse-loadtest-worker")["spec"].pop("ttlSecondsAfterFinished")),
    ("jobs_end", lambda o: pick(o, "Job", "sse-loadtest-worker")["spec"].update(backoffLimit=6)),
    ("jobs_end", lambda o: pick(o, "Job", "sse-loadtest-master")["spec"]["template"]["spec"].update(restartPolicy="OnFailure")),
    ("services_reach_pods", lambda o: pick(o, "Service", "sse-loadtest")["spec"]["selector"].update({"app.kubernetes.io/name": "sse-loadtest"})),
    ("nginx_files", lambda o: config(o, "sse-nginx").update({"exempt.conf": "0.0.0.0/0 1;\n"})),
]  # fmt: skip


def copies(objects: Objects) -> Any:
    return pick(objects, "StatefulSet", "sse-redis")["spec"]


def replaced(prefix: str, name: str, old: str, new: str) -> Callable[[Objects], None]:
    def edit(objects: Objects) -> None:
        data = config(objects, prefix)
        assert old in data[name]
        data[name] = data[name].replace(old, new)

    return edit


# The same for the set with Sentinels.
WITH_SENTINELS: tuple[str, ...] = ("redis-sentinel", "network-policy")
SLIPS_OF_SENTINELS: list[tuple[str, Callable[[Objects], Any]]] = [
    ("sentinels", lambda o: copies(o).update(replicas=2)),
    ("sentinels", lambda o: copies(o).update(replicas=5)),
    ("sentinels", lambda o: copies(o)["template"]["spec"]["containers"].pop()),
    ("sentinels", replaced("sse-redis", "sentinel.sh", "6379 2", "6379 1")),
    ("sentinels", lambda o: one(o)["env"].remove(entry(o, "SSE_PUBLISH_WAIT_REPLICAS"))),
    ("sentinels", lambda o: entry(o, "SSE_PUBLISH_WAIT_REPLICAS").update(value="2")),
    ("sentinels", replaced("sse-redis", "valkey.conf", "\nmin-replicas-to-write 1", "")),
    ("sentinels", replaced("sse-redis", "valkey.conf", "replica-serve-stale-data no", "replica-serve-stale-data yes")),
    ("sentinels", replaced("sse-redis", "sentinel.conf", "announce-hostnames yes", "announce-hostnames no")),
    ("sentinels", lambda o: entry(o, "SSE_REDIS_URL").update(value=entry(o, "SSE_REDIS_URL")["value"].replace(",sse-redis-2.sse-redis:26379", ""))),
    ("sentinels", lambda o: copies(o)["template"]["spec"].pop("affinity")),
    ("sentinels", lambda o: copies(o).update(podManagementPolicy="OrderedReady")),
    ("sentinels", lambda o: pick(o, "Service", "sse-redis")["spec"].pop("publishNotReadyAddresses")),
    ("sentinels", lambda o: copies(o).update(serviceName="redis")),
    ("sentinels", without("PodDisruptionBudget", "sse-redis")),
    ("sentinels", lambda o: copies(o).pop("volumeClaimTemplates")),
    ("ways_are_open", lambda o: pick(o, "NetworkPolicy", "sse-redis")["spec"].pop("egress")),
    ("ways_are_open", lambda o: pick(o, "NetworkPolicy", "sse-redis")["spec"]["ingress"][0]["from"].pop()),
    ("ways_are_open", lambda o: pick(o, "NetworkPolicy", "sse-redis")["spec"]["ingress"][0]["ports"].pop()),
    ("ways_are_open", lambda o: pick(o, "NetworkPolicy", "sse-app")["spec"]["egress"][0]["ports"].pop()),
]  # fmt: skip


class TestEachRuleSees:
    def test_every_rule_has_a_slip(self):
        """A rule that was never seen failing may be no rule."""
        assert set(RULES) == {name for name, _ in SLIPS + SLIPS_OF_SENTINELS}

    @pytest.mark.parametrize(("name", "slip"), SLIPS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(SLIPS)])
    def test_slip(self, name, slip):
        """Each slip is seen, by the rule that is there for it."""
        objects = copy.deepcopy(composed(BASE) + load_test())
        assert [] == broken(objects)
        slip(objects)

        assert name in {fault.split(":")[0] for fault in broken(objects)}

    @pytest.mark.parametrize(("name", "slip"), SLIPS_OF_SENTINELS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(SLIPS_OF_SENTINELS)])
    def test_slip_with_sentinels(self, name, slip):
        """The same where Sentinels choose the master."""
        objects = copy.deepcopy(composed(WITH_SENTINELS))
        assert [] == broken(objects)
        slip(objects)

        assert name in {fault.split(":")[0] for fault in broken(objects)}


