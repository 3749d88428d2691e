"""
The rules that every rendered set of manifests keeps, each a function that names what breaks it.

Schemas say what Kubernetes accepts; these say what the kit promises.
"""

import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from app.settings import SettingError, Settings, load

Object = dict[str, Any]
Rule = Callable[[list[Object]], Iterator[str]]
ROOT = Path(__file__).parent.parent.parent
RULES: dict[str, Rule] = {}

# What restricted Pod Security allows, and what each Secret of `make secrets` is called.
VOLUMES = {"configMap", "emptyDir", "secret", "projected", "downwardAPI", "persistentVolumeClaim"}
SYSCTLS = {"net.ipv4.ip_local_port_range"}
SECRETS = {"sse-redis", "sse-redis-ca", "sse-jwt", "sse-tls"}
WORKLOADS = ("Deployment", "StatefulSet", "Job")


def rule(function: Rule) -> Rule:
    RULES[function.__name__] = function
    return function


def broken(objects: list[Object]) -> list[str]:
    """Return every rule that *objects* break, with where."""
    return [f"{name}: {fault}" for name, check in RULES.items() for fault in check(objects)]


# --- Looking things up


def of(objects: list[Object], *kinds: str) -> Iterator[Object]:
    yield from (o for o in objects if o["kind"] in kinds)


def title(o: Object) -> str:
    return f"{o['kind']}/{o['metadata']['name']}"


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Each workload's title and pod template."""
    yield from ((title(o), o["spec"]["template"]) for o in of(objects, *WORKLOADS))


def containers(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Each container with its place and its pod's spec."""
    for name, template in pods(objects):
        spec = template["spec"]
        for c in [*spec.get("initContainers", []), *spec["containers"]]:
            yield f"{name}/{c['name']}", c, spec


def servers(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """The containers that serve, with their pods' specs."""
    for o in of(objects, "Deployment", "StatefulSet"):
        spec = o["spec"]["template"]["spec"]
        for c in spec["containers"]:
            yield f"{title(o)}/{c['name']}", c, spec


def selects(selector: Object, labels: Object) -> bool:
    return all(labels.get(k) == v for k, v in selector.items())


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|h)?", text).groups()  # type: ignore[union-attr]
    return int(number) * {"ms": 0.001, "s": 1, None: 1, "m": 60, "h": 3600}[unit]


def environment(objects: list[Object], c: Object) -> dict[str, str]:
    """What the container's process sees; secrets are `secret`, references expanded."""
    env: dict[str, str] = {}
    for source in c.get("envFrom", []):
        name = source["configMapRef"]["name"]
        for o in of(objects, "ConfigMap"):
            if o["metadata"]["name"] == name:
                env |= o["data"]
    for entry in c.get("env", []):
        if "valueFrom" in entry:
            key = entry["valueFrom"]["secretKeyRef"]["key"]
            env[entry["name"]] = {"url": "rediss://sse:secret@redis.example.com:6380/0"}.get(key, "secret")
        else:
            env[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda m: env[m[1]], entry["value"])
    return env


def settings(objects: list[Object]) -> Settings:
    """The application's settings as its container gets them."""
    (c,) = (c for where, c, _ in containers(objects) if where == "Deployment/sse-app/app")
    return load(environment(objects, c))


def nginx_value(objects: list[Object], directive: str, value: str = r"\s(\w+);") -> list[float]:
    """All values of a directive in nginx's deployed files, in seconds."""
    values = []
    for o in of(objects, "ConfigMap"):
        if o["metadata"]["name"].startswith("sse-nginx"):
            for text in o["data"].values():
                values += re.findall(rf"(?m)^\s*{directive}{value}", text)
    return [seconds(value) for value in values]


# --- Pod Security, and more


@rule
def restricted(objects: list[Object]) -> Iterator[str]:
    """The profile `restricted` of https://kubernetes.io/docs/concepts/security/pod-security-standards."""
    for where, template in pods(objects):
        spec = template["spec"]
        context = spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True:
            yield f"{where} must not run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{where} must have the runtime's seccomp profile"
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(field):
                yield f"{where} must not have {field}"
        for volume in spec.get("volumes", []):
            if not set(volume) - {"name"} <= VOLUMES:
                yield f"{where} has a volume that is not allowed: {volume['name']}"
        for sysctl in context.get("sysctls", []):
            if sysctl["name"] not in SYSCTLS:
                yield f"{where} sets {sysctl['name']}, which is not allowed"
    for where, c, _ in containers(objects):
        context = c.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{where} must not gain privileges"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{where} must drop all capabilities"
        if context.get("privileged"):
            yield f"{where} must not be privileged"
        if any("hostPort" in port for port in c.get("ports", [])):
            yield f"{where} must not take a port of the host"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for handler in ("httpGet", "tcpSocket"):
                if "host" in c.get(probe, {}).get(handler, {}):
                    yield f"{where} must not set host in its {probe}"


@rule
def namespaces_enforce(objects: list[Object]) -> Iterator[str]:
    for o in of(objects, "Namespace"):
        labels = o["metadata"].get("labels", {})
        for mode in ("enforce", "warn", "audit"):
            if labels.get(f"pod-security.kubernetes.io/{mode}") != "restricted":
                yield f"{title(o)} must {mode} restricted"
        if labels.get("pod-security.kubernetes.io/enforce-version") != "v1.33":
            yield f"{title(o)} must enforce the profile of the kit's floor"


@rule
def read_only_root(objects: list[Object]) -> Iterator[str]:
    for where, c, _ in containers(objects):
        if c.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{where} must have a read-only root"


@rule
def numbered_user(objects: list[Object]) -> Iterator[str]:
    """A name in an image cannot be checked by the kubelet."""
    for where, template in pods(objects):
        context = template["spec"].get("securityContext", {})
        if not context.get("runAsUser", 0) > 0 or not context.get("runAsGroup", 0) > 0:
            yield f"{where} must name its user and group by number"


@rule
def no_token(objects: list[Object]) -> Iterator[str]:
    accounts = {o["metadata"]["name"]: o for o in of(objects, "ServiceAccount")}
    for where, template in pods(objects):
        spec = template["spec"]
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{where} must not get a token"
        if spec.get("serviceAccountName") not in accounts:
            yield f"{where} must have an account of its own"
    for o in accounts.values():
        if o.get("automountServiceAccountToken") is not False:
            yield f"{title(o)} must not give a token"


@rule
def no_service_links(objects: list[Object]) -> Iterator[str]:
    for where, template in pods(objects):
        if template["spec"].get("enableServiceLinks") is not False:
            yield f"{where} must not have service links"


@rule
def resources(objects: list[Object]) -> Iterator[str]:
    """Memory is reserved in full; CPU is reserved and never throttled."""
    for where, c, _ in containers(objects):
        have = c.get("resources", {})
        requests, limits = have.get("requests", {}), have.get("limits", {})
        if "memory" not in limits or requests.get("memory") != limits["memory"]:
            yield f"{where} must request as much memory as it may use"
        if "cpu" not in requests or "cpu" in limits:
            yield f"{where} must request CPU and have no limit of it"


@rule
def images(objects: list[Object]) -> Iterator[str]:
    for where, c, _ in containers(objects):
        name = c["image"].rpartition("/")[2]
        if "@sha256:" not in name and (":" not in name or name.endswith(":latest")):
            yield f"{where} must name a version of its image, has {c['image']}"
        if c.get("imagePullPolicy") != "IfNotPresent":
            yield f"{where} must say when its image is pulled"


@rule
def no_secrets(objects: list[Object]) -> Iterator[str]:
    for o in of(objects, "Secret"):
        yield f"{title(o)}: secrets are made by `make secrets`, never rendered"
    for where, c, _ in containers(objects):
        for entry in c.get("env", []):
            if re.search(r"PASSWORD|SECRET$|TOKEN|KEY$", entry["name"]) and "value" in entry:
                yield f"{where} has {entry['name']} in clear"


# --- Lifetime


@rule
def probes(objects: list[Object]) -> Iterator[str]:
    for where, c, _ in servers(objects):
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            if name not in c:
                yield f"{where} must have a {name}"
        path = c.get("livenessProbe", {}).get("httpGet", {}).get("path")
        if path == "/readyz":
            yield f"{where} must not be restarted for being not ready"
        live = c.get("livenessProbe", {})
        if live.get("periodSeconds", 10) * live.get("failureThreshold", 3) < 60:
            yield f"{where} must not be restarted within a minute: it costs every stream"


@rule
def pre_stop(objects: list[Object]) -> Iterator[str]:
    """Whoever is in a Service serves on until the last node knows that it goes."""
    for o in of(objects, "Deployment"):
        for c in o["spec"]["template"]["spec"]["containers"]:
            if "ports" in c and not c.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0) >= 5:
                yield f"{title(o)}/{c['name']} must sleep in preStop"


@rule
def ladder(objects: list[Object]) -> Iterator[str]:
    """The timeouts that must agree, over application, nginx and Kubernetes."""
    try:
        s = settings(objects)
    except SettingError:
        return  # the rule `starts` says so
    grace = {title(o): o["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30) for o in of(objects, "Deployment")}
    sleep = {
        title(o): o["spec"]["template"]["spec"]["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        for o in of(objects, "Deployment")
    }  # fmt: skip
    (shutdown,) = nginx_value(objects, "worker_shutdown_timeout")
    app, nginx = "Deployment/sse-app", "Deployment/sse-nginx"
    longest = max(nginx_value(objects, "proxy_read_timeout"), default=0)
    if not 4 * s.heartbeat_seconds <= longest <= 5 * s.heartbeat_seconds:
        yield f"proxy_read_timeout ({longest:g}) must be 4 to 5 heartbeats ({s.heartbeat_seconds:g})"
    if not s.max_age_seconds < shutdown:
        yield f"SSE_MAX_AGE_SECONDS ({s.max_age_seconds:g}) must be under worker_shutdown_timeout ({shutdown:g})"
    if not sleep[nginx] + shutdown < grace[nginx] < 600:
        yield f"nginx's grace ({grace[nginx]}) must be over preStop + worker_shutdown_timeout, and under 600"
    # 30: how long CoreDNS keeps an answer, as kubeadm and most clusters configure it.
    valid = max(nginx_value(objects, "resolver .* valid=", r"(\d+s)"), default=0)
    if not 30 + valid <= sleep[app]:
        yield f"the application's preStop ({sleep[app]}) must be over the name server's 30 s + nginx's valid ({valid:g})"
    # 15: what is left is cut, Hypercorn ends, and a process may be slow to hear.
    if not sleep[app] + s.drain_seconds + s.run_finish_seconds + 15 <= grace[app]:
        yield f"the application's grace ({grace[app]}) must be preStop + SSE_DRAIN_SECONDS + SSE_RUN_FINISH_SECONDS + 15 at least"


@rule
def rollout(objects: list[Object]) -> Iterator[str]:
    for o in of(objects, "Deployment"):
        spec = o["spec"]
        if spec.get("strategy", {}).get("rollingUpdate") != {"maxSurge": 1, "maxUnavailable": 0}:
            yield f"{title(o)} must replace one pod at a time, the new one first"
        if spec.get("progressDeadlineSeconds", 600) <= spec["template"]["spec"].get("terminationGracePeriodSeconds", 30) * 2:
            yield f"{title(o)} must give a rollout the time that its graces take"
        if not spec.get("minReadySeconds"):
            yield f"{title(o)} must see a pod ready for some seconds"


@rule
def spread(objects: list[Object]) -> Iterator[str]:
    for o in of(objects, "Deployment"):
        constraints = o["spec"]["template"]["spec"].get("topologySpreadConstraints", [])
        if {c["topologyKey"] for c in constraints} != {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}:
            yield f"{title(o)} must spread over zones and nodes"
        if any(c.get("matchLabelKeys") != ["pod-template-hash"] for c in constraints):
            yield f"{title(o)} must spread each version by itself"


@rule
def disruption(objects: list[Object]) -> Iterator[str]:
    budgets = list(of(objects, "PodDisruptionBudget"))
    for o in of(objects, "Deployment"):
        if o["metadata"]["labels"].get("app.kubernetes.io/component") not in ("app", "nginx"):
            continue
        labels = o["spec"]["template"]["metadata"]["labels"]
        mine = [b for b in budgets if selects(b["spec"]["selector"]["matchLabels"], labels)]
        if len(mine) != 1:
            yield f"{title(o)} must have one PodDisruptionBudget"
        elif mine[0]["spec"].get("unhealthyPodEvictionPolicy") != "AlwaysAllow" or mine[0]["spec"].get("maxUnavailable") != 1:
            yield f"{title(mine[0])} must let one pod go, and sick ones always"


@rule
def sentinels(objects: list[Object]) -> Iterator[str]:
    """Three Valkeys, each with a Sentinel: one of them may be lost, and no acknowledged event."""
    files = {name: text for o in of(objects, "ConfigMap") if re.fullmatch("sse-redis-[a-z0-9]{10}", o["metadata"]["name"]) for name, text in o["data"].items()}
    if "sentinel.conf" not in files:
        return
    (o,) = (o for o in of(objects, "StatefulSet") if o["metadata"]["name"] == "sse-redis")
    spec, pod, copies = o["spec"], o["spec"]["template"]["spec"], o["spec"].get("replicas", 1)
    quorum = int(re.findall(r"sentinel monitor sse sse-redis-0\.sse-redis\.\$domain 6379 (\d+)", files["sentinel.sh"])[0])
    if copies < 3 or copies % 2 == 0 or quorum != copies // 2 + 1:
        yield f"{title(o)} must have three pods or another odd number ({copies}), which decide by majority ({quorum})"
    if {c["name"] for c in pod["containers"]} != {"redis", "sentinel"}:
        yield f"{title(o)} must have a Sentinel beside each Valkey"
    wait = int(next((e["value"] for _, c, _ in containers(objects) for e in c.get("env", []) if e["name"] == "SSE_PUBLISH_WAIT_REPLICAS"), 0))
    # With the master, a majority of the copies: whoever is cut off with fewer acknowledges nothing.
    if wait + 1 != copies // 2 + 1:
        yield f"a publish must be acknowledged by a majority of {copies}: SSE_PUBLISH_WAIT_REPLICAS is {wait}"
    for name, line in (
        ("valkey.conf", "min-replicas-to-write 1"), ("valkey.conf", "replica-serve-stale-data no"), ("valkey.conf", "appendonly yes"),
        ("valkey.conf", "maxmemory-policy noeviction"), ("sentinel.conf", "sentinel resolve-hostnames yes"), ("sentinel.conf", "sentinel announce-hostnames yes"),
    ):  # fmt: skip
        if line not in files[name].splitlines():
            yield f"{name} must have: {line}"
    labels = spec["template"]["metadata"]["labels"]
    required = pod.get("affinity", {}).get("podAntiAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", [])
    if not any(t["topologyKey"] == "kubernetes.io/hostname" and selects(t["labelSelector"]["matchLabels"], labels) for t in required):
        yield f"{title(o)} must never have two pods on one node"
    if spec.get("podManagementPolicy") != "Parallel":
        yield f"{title(o)}: its pods must not wait for each other"
    if spec.get("serviceName") != "sse-redis" or not any(s["metadata"]["name"] == "sse-redis" and s["spec"].get("publishNotReadyAddresses") for s in of(objects, "Service")):
        yield f"{title(o)}: its pods must have names, ready or not"
    budgets = [b for b in of(objects, "PodDisruptionBudget") if selects(b["spec"]["selector"]["matchLabels"], labels)]
    if len(budgets) != 1 or budgets[0]["spec"].get("maxUnavailable") != 1:
        yield f"{title(o)} must have one PodDisruptionBudget, of one pod"
    if not spec.get("volumeClaimTemplates"):
        yield f"{title(o)} must keep what it knows"
    try:
        url = settings(objects).redis_url
    except SettingError:
        return  # the rule `starts` says so
    hosts = re.findall(r"[@,]([^@,/]+)", url.partition("://")[2].rpartition("/0?")[0])
    if hosts != [f"sse-redis-{n}.sse-redis:26379" for n in range(copies)]:
        yield f"SSE_REDIS_URL must name every Sentinel, names {hosts}"


@rule
def jobs_end(objects: list[Object]) -> Iterator[str]:
    """A Job runs once, ends by itself, and goes."""
    for o in of(objects, "Job"):
        spec = o["spec"]
        if spec.get("backoffLimit") != 0 or spec["template"]["spec"].get("restartPolicy") != "Never":
            yield f"{title(o)} must run once: a second try hides what the first one found"
        if not spec.get("activeDeadlineSeconds") or not spec.get("ttlSecondsAfterFinished"):
            yield f"{title(o)} must end by itself, and be deleted"


@rule
def autoscaled(objects: list[Object]) -> Iterator[str]:
    """Who owns the number of pods, and that only one does."""
    owned: list[str] = []
    for o in of(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = o["spec"]["scaleTargetRef"]
        owned.append(target["name"])
        for d in of(objects, "Deployment"):
            if d["metadata"]["name"] == target["name"] and "replicas" in d["spec"]:
                yield f"{title(d)} must leave its number to {title(o)}"
    for name in set(owned):
        if owned.count(name) > 1:
            yield f"Deployment/{name} must have one autoscaler"
    for o in of(objects, "ScaledObject"):
        for trigger in o["spec"]["triggers"]:
            if f'namespace="{o["metadata"]["namespace"]}"' not in trigger["metadata"]["query"]:
                yield f"{title(o)} must count the streams of its own namespace"


# --- What refers to what


@rule
def names_resolve(objects: list[Object]) -> Iterator[str]:
    """Every ConfigMap, Secret, port and label that is referred to is there."""
    maps = {o["metadata"]["name"]: set(o["data"]) for o in of(objects, "ConfigMap")}
    for where, template in pods(objects):
        spec = template["spec"]
        volumes = {v["name"] for v in spec.get("volumes", [])}
        if where.startswith("StatefulSet"):
            (o,) = (o for o in of(objects, "StatefulSet") if title(o) == where)
            volumes |= {v["metadata"]["name"] for v in o["spec"].get("volumeClaimTemplates", [])}
        for volume in spec.get("volumes", []):
            if "configMap" in volume and volume["configMap"]["name"] not in maps:
                yield f"{where} mounts ConfigMap {volume['configMap']['name']}, which is not there"
            if "secret" in volume and volume["secret"]["secretName"] not in SECRETS:
                yield f"{where} mounts Secret {volume['secret']['secretName']}, which `make secrets` does not make"
        for c in [*spec.get("initContainers", []), *spec["containers"]]:
            ports = {p["name"] for p in c.get("ports", [])}
            for mount in c.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{where}/{c['name']} mounts {mount['name']}, which is no volume"
            for source in c.get("envFrom", []):
                if source["configMapRef"]["name"] not in maps:
                    yield f"{where}/{c['name']} takes {source['configMapRef']['name']}, which is not there"
            for entry in c.get("env", []):
                if "valueFrom" in entry and entry["valueFrom"]["secretKeyRef"]["name"] not in SECRETS:
                    yield f"{where}/{c['name']} takes a Secret that `make secrets` does not make"
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                for handler in ("httpGet", "tcpSocket"):
                    port = c.get(probe, {}).get(handler, {}).get("port")
                    if port is not None and port not in ports:
                        yield f"{where}/{c['name']}: its {probe} asks port {port}, which it has not"


@rule
def services_reach_pods(objects: list[Object]) -> Iterator[str]:
    templates = [template for _, template in pods(objects)]
    for o in of(objects, "Service"):
        chosen = [t for t in templates if selects(o["spec"]["selector"], t["metadata"]["labels"])]
        if len(chosen) != 1:
            yield f"{title(o)} must choose the pods of one workload, chooses {len(chosen)}"
            continue
        named = {p["name"] for c in chosen[0]["spec"]["containers"] for p in c.get("ports", [])}
        for port in o["spec"]["ports"]:
            if port["targetPort"] not in named:
                yield f"{title(o)} leads to port {port['targetPort']}, which its pods have not"
    services = {o["metadata"]["name"]: {p["port"] for p in o["spec"]["ports"]} | {p["name"] for p in o["spec"]["ports"]} for o in of(objects, "Service")}
    for o in of(objects, "HTTPRoute"):
        for r in o["spec"]["rules"]:
            for b in r["backendRefs"]:
                if b["port"] not in services.get(b["name"], set()):
                    yield f"{title(o)} leads to {b['name']}:{b['port']}, which is no Service's port"
    for o in of(objects, "Ingress"):
        for r in o["spec"]["rules"]:
            for p in r["http"]["paths"]:
                s = p["backend"]["service"]
                if s["port"]["name"] not in services.get(s["name"], set()):
                    yield f"{title(o)} leads to {s['name']}:{s['port']['name']}, which is no Service's port"


@rule
def headless(objects: list[Object]) -> Iterator[str]:
    """nginx must hear of every pod by itself, and of none that goes."""
    for o in of(objects, "Service"):
        if o["metadata"]["name"] == "sse-app-headless" and (
            o["spec"].get("clusterIP") != "None" or o["spec"].get("publishNotReadyAddresses")
        ):
            yield f"{title(o)} must have no address, and publish only those that are ready"


@rule
def one_namespace(objects: list[Object]) -> Iterator[str]:
    names = {o["metadata"].get("namespace") for o in objects if o["kind"] != "Namespace"}
    names |= {o["metadata"]["name"] for o in of(objects, "Namespace")}
    if len(names) != 1 or None in names:
        yield f"all objects must be in one namespace, are in {sorted(map(str, names))}"


@rule
def labelled(objects: list[Object]) -> Iterator[str]:
    """`kubectl delete -l app.kubernetes.io/part-of=sse-kit` finds everything."""
    for o in objects:
        if o["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") != "sse-kit":
            yield f"{title(o)} must be labelled as a part of sse-kit"
    for where, template in pods(objects):
        if template["metadata"]["labels"].get("app.kubernetes.io/part-of") != "sse-kit":
            yield f"{where}'s pods must be labelled as a part of sse-kit"


# --- What is inside


@rule
def starts(objects: list[Object]) -> Iterator[str]:
    """The application would start with this environment, and listen where Services lead."""
    try:
        s = settings(objects)
    except Exception as error:
        yield str(error)
        return
    if s.host not in ("0.0.0.0", "::") or s.metrics_host not in ("0.0.0.0", "::"):
        yield "the application must listen on the pod's addresses"
    for where, c, _ in containers(objects):
        if where == "Deployment/sse-app/app":
            ports = {p["name"]: p["containerPort"] for p in c["ports"]}
            if ports != {"http": s.port, "metrics": s.metrics_port}:
                yield f"{where} must name the ports that the application listens on"


@rule
def shared_log(objects: list[Object]) -> Iterator[str]:
    """A log in memory is for one process."""
    if any(o["spec"]["scaleTargetRef"]["name"] == "sse-app" for o in of(objects, "HorizontalPodAutoscaler", "ScaledObject")):
        return  # their READMEs say that they need a log that is shared
    try:
        alone = not settings(objects).redis_url
    except SettingError:
        return  # the rule `starts` says so
    for o in of(objects, "Deployment"):
        if o["metadata"]["name"] == "sse-app" and o["spec"].get("replicas", 1) > 1 and alone:
            yield f"{title(o)} must have one pod, or a log that all share"


@rule
def nginx_files(objects: list[Object]) -> Iterator[str]:
    """Byte for byte those of nginx/, which its own tests have run."""
    deployed: dict[str, str] = {}
    for o in of(objects, "ConfigMap"):
        name = o["metadata"]["name"]
        if name.startswith("sse-nginx-snippets"):
            deployed |= {f"snippets/{key}": text for key, text in o["data"].items()}
        elif re.fullmatch(r"sse-nginx-[a-z0-9]{10}", name):
            deployed |= o["data"]
    folder = ROOT / "nginx"
    wanted = {str(p.relative_to(folder)): p.read_text() for p in [*folder.rglob("*.conf"), folder / "upstream.sh"]}
    wanted = {k: v for k, v in wanted.items() if k != "upstream.conf" and not fnmatch(k, "templates/*")}
    # The form for a name stands in the usual one's place.
    wanted["snippets/sse-sticky.conf"] = wanted.pop("snippets/sse-sticky.resolve.conf")
    # The one file that an overlay may fill: the component load-test does.
    if deployed.get("exempt.conf") == (ROOT / "k8s/components/load-test/exempt.conf").read_text():
        wanted["exempt.conf"] = deployed["exempt.conf"]
    for name in sorted(set(wanted) | set(deployed)):
        if wanted.get(name) != deployed.get(name):
            yield f"{name} must be deployed as it is in nginx/"


@rule
def ways_are_open(objects: list[Object]) -> Iterator[str]:
    """With network policies: everything is closed, and what the kit needs is open."""
    policies = list(of(objects, "NetworkPolicy"))
    if not policies:
        return
    if not any(p["spec"]["podSelector"] == {} and set(p["spec"]["policyTypes"]) == {"Ingress", "Egress"} and not {"ingress", "egress"} & set(p["spec"]) for p in policies):
        yield "there must be a NetworkPolicy that denies everything"
    labels = {where: template["metadata"]["labels"] for where, template in pods(objects)}

    def may(direction: str, one: str, other: str | None, port: int) -> bool:
        peer = "to" if direction == "egress" else "from"
        for p in policies:
            if selects(p["spec"]["podSelector"].get("matchLabels", {}), labels[one]):
                for r in p["spec"].get(direction, []):
                    ports = [q for q in r.get("ports", []) if q["port"] <= port <= q.get("endPort", q["port"])]
                    peers = r.get(peer)
                    if ports and (peers is None or (other and any(selects(x.get("podSelector", {"matchLabels": {"no": "one"}}).get("matchLabels", {}), labels[other]) for x in peers))):
                        return True
        return False

    ways = [("Deployment/sse-nginx", "Deployment/sse-app", 8000), ("Deployment/sse-app", "StatefulSet/sse-redis", 6379)]
    if any("sentinel.conf" in o["data"] for o in of(objects, "ConfigMap")):
        ways += [(one, "StatefulSet/sse-redis", 26379) for one in ("Deployment/sse-app", "StatefulSet/sse-redis")]
        ways += [("StatefulSet/sse-redis", "StatefulSet/sse-redis", 6379)]
    ways += [("Job/sse-loadtest-worker", "Job/sse-loadtest-master", 5557)]
    ways += [(f"Job/{one}", "Deployment/sse-nginx", 8080) for one in ("sse-loadtest-master", "sse-loadtest-worker")]
    for one, other, port in ways:
        if {one, other} <= set(labels) and not (may("egress", one, other, port) and may("ingress", other, one, port)):
            yield f"{one} must reach {other} on {port}"
    for one in labels:
        if not may("egress", one, None, 53):
            yield f"{one} must reach the name server"
    for where, c, _ in servers(objects):
        if where.startswith("Deployment/sse-nginx"):
            for port in (p["containerPort"] for p in c["ports"] if p["name"] in ("http", "https")):
                if not may("ingress", "Deployment/sse-nginx", None, port):
                    yield f"clients must reach nginx on {port}"
