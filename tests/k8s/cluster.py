"""
Run rendered manifests as processes: a cluster of one node, small enough to read.

It takes nothing but the YAML. Each pod is a network namespace with its own
address; each container is a process with the command, environment, user,
read-only root and mounts that the YAML gives it; the files of ConfigMaps are
theirs. Probes, preStop, grace, rolling updates and scaling follow the YAML, and
a name server answers for Services from what probes found. A field that is not
in the two lists below is an error.

All times are the YAML's, times SCALE; so are the application's settings in
seconds and the two directives of nginx that belong to the ladder.

What it does not show: the container runtime, cgroups and limits, Pod Security's
admission, scheduling, kube-proxy (a Service's name is answered with its pods'
addresses), and images (programs are this machine's; the application is a folder).
"""

import contextlib
import copy
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from app.settings import rules, variable

SCALE = 1 / 20
# How long news of a pod takes to whoever connects to a Service.
NEWS_SECONDS = 3
# How long the name server keeps an answer. 30 in a cluster; but nginx, which asks
# again after 5 s there, can do so here after 1 s at the earliest, which is 20.
NAMES_SECONDS = 10
ROOT = Path(__file__).parent.parent.parent
NAME_SERVER = "10.77.0.1"
DOMAIN = "cluster.local"

Object = dict[str, Any]

# --- What is known. [] stands for each element, * for any name.

_POD = """
metadata.labels.* spec.restartPolicy
spec.serviceAccountName spec.enableServiceLinks spec.automountServiceAccountToken
spec.terminationGracePeriodSeconds
spec.securityContext.runAsUser spec.securityContext.runAsGroup spec.securityContext.fsGroup
spec.securityContext.sysctls[].name spec.securityContext.sysctls[].value
spec.volumes[].name spec.volumes[].configMap.name
spec.volumes[].secret.secretName spec.volumes[].secret.items[].key spec.volumes[].secret.items[].path
spec.volumes[].emptyDir.sizeLimit spec.volumes[].emptyDir.medium
"""
_CONTAINER = """
name image command[] envFrom[].configMapRef.name
env[].name env[].value env[].valueFrom.secretKeyRef.name env[].valueFrom.secretKeyRef.key
ports[].name ports[].containerPort
lifecycle.preStop.sleep.seconds securityContext.readOnlyRootFilesystem
volumeMounts[].name volumeMounts[].mountPath volumeMounts[].readOnly
"""
_PROBE = """
httpGet.path httpGet.port tcpSocket.port exec.command[] periodSeconds timeoutSeconds failureThreshold
"""
_WORKLOAD = """
apiVersion kind metadata.name metadata.namespace metadata.labels.* spec.replicas spec.selector.matchLabels.*
"""
ACTED = {
    "Deployment": _WORKLOAD + "spec.strategy.type spec.strategy.rollingUpdate.maxSurge "
    "spec.strategy.rollingUpdate.maxUnavailable spec.minReadySeconds spec.progressDeadlineSeconds",
    "StatefulSet": _WORKLOAD + "spec.volumeClaimTemplates[].metadata.name spec.serviceName spec.podManagementPolicy",
    "Job": _WORKLOAD + "spec.parallelism spec.completions spec.backoffLimit",
    "Service": """apiVersion kind metadata.name metadata.namespace metadata.labels.* spec.clusterIP
        spec.publishNotReadyAddresses spec.selector.* spec.ports[].name spec.ports[].port spec.ports[].targetPort""",
    "ConfigMap": "apiVersion kind metadata.name metadata.namespace metadata.labels.* data.*",
}
# Known, and without an effect here: policies.py looks at these.
IGNORED = {
    "*": """spec.revisionHistoryLimit spec.ports[].appProtocol spec.activeDeadlineSeconds spec.ttlSecondsAfterFinished
        spec.template.spec.affinity* spec.volumeClaimTemplates[]*
        spec.template.spec.topologySpreadConstraints[]* spec.template.spec.securityContext.runAsNonRoot
        spec.template.spec.securityContext.seccompProfile.type spec.template.spec.securityContext.fsGroupChangePolicy
        spec.template.spec.containers[].imagePullPolicy spec.template.spec.initContainers[].imagePullPolicy
        spec.template.spec.containers[].resources* spec.template.spec.initContainers[].resources*
        spec.template.spec.containers[].securityContext.allowPrivilegeEscalation
        spec.template.spec.initContainers[].securityContext.allowPrivilegeEscalation
        spec.template.spec.containers[].securityContext.capabilities.drop[]
        spec.template.spec.initContainers[].securityContext.capabilities.drop[]""",
    "Namespace": "*",
    "ServiceAccount": "*",
    "PodDisruptionBudget": "*",
}


class UnknownField(Exception):
    """The YAML says something that this cluster does not do."""


def check(objects: list[Object]) -> None:
    """Raise UnknownField for the first field that is in none of the lists."""
    known = [f"spec.template.{path}" for path in _POD.split()]
    for kind in ("containers", "initContainers"):
        known += [f"spec.template.spec.{kind}[].{path}" for path in _CONTAINER.split()]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            known += [f"spec.template.spec.{kind}[].{probe}.{path}" for path in _PROBE.split()]
    for o in objects:
        kind = o["kind"]
        paths = [*ACTED.get(kind, "").split(), *IGNORED.get(kind, "").split(), *IGNORED["*"].split()]
        if kind in ("Deployment", "StatefulSet", "Job"):
            paths += known
        pattern = re.compile("|".join(re.escape(p).replace(r"\*", ".*") for p in paths))
        for path in _paths(o):
            if not pattern.fullmatch(path):
                raise UnknownField(f"{kind} {o['metadata']['name']}: {path}")


def _paths(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _paths(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for inner in value:
            yield from _paths(inner, path + "[]")
    elif value != {}:
        yield path


# --- Programs in place of images


class Image:
    """What stands for one image: where its programs are, and which signal ends it."""

    def __init__(self, links: dict[str, str], binds: list[tuple[str, str]], cwd: str, stop: int) -> None:
        self.links, self.binds, self.cwd, self.stop = links, binds, cwd, stop


def app_image(tree: Path = ROOT) -> Image:
    """Return the application as a folder *tree* has it; its stop signal is the Dockerfile's."""
    dockerfile = (ROOT / "app" / "Dockerfile").read_text()
    stop = re.search(r"(?m)^STOPSIGNAL (SIG\w+)$", dockerfile)
    assert stop
    return Image(
        {},
        [(str(tree / "app"), "/srv/app"), (str(Path(sys.executable).parent.parent), "/image/venv")],
        "/srv",
        getattr(signal, stop[1]),
    )


def loadtest_image(folder: Path) -> Image:
    """Return the load test as its Dockerfile copies it into *folder*, and nothing beside it."""
    for words in re.findall(r"(?m)^COPY (?!--from)(.+ /srv/.*)$", (ROOT / "loadtest" / "Dockerfile").read_text()):
        *sources, target = words.split()
        for source in map(ROOT.joinpath, sources):
            place = folder / target.lstrip("/")
            if source.is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True)
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)
    binds = [(str(folder / "srv"), "/srv"), (str(Path(sys.executable).parent.parent), "/image/venv")]
    return Image({}, binds, "/srv", signal.SIGTERM)


def images(tree: Path, folder: Path) -> dict[str, Image]:
    """Return what stands for each image, by the beginning of its name; *folder* takes what is copied."""
    find = shutil.which
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    redis = find("valkey-server", path=path) or find("redis-server", path=path)
    cli = find("valkey-cli", path=path) or find("redis-cli", path=path)
    return {
        "sse-kit/app": app_image(tree),
        "sse-kit/loadtest": loadtest_image(folder / "image-loadtest"),
        "nginxinc/nginx-unprivileged": Image(
            {}, [(str(ROOT / ".cache/nginx"), "/image/nginx")], "/", signal.SIGQUIT
        ),
        "valkey/valkey": Image(
            {"/image/bin/valkey-server": str(redis), "/image/bin/valkey-cli": str(cli)}, [], "/", signal.SIGTERM
        ),
    }  # fmt: skip


# --- The cluster


class Cluster:
    """
    One node. Enter it with `with`: the calling thread is then in the node's network.

    Args:
        objects: what `kubectl kustomize` rendered.
        secrets: name and key to value, as `make secrets` would have made them.
        tree: the application's source, for `apply` of another version too.
    """

    def __init__(self, objects: list[Object], secrets: dict[str, dict[str, str]], tree: Path = ROOT) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sse-cluster-"))
        self.folder.chmod(0o755)
        self.lock = threading.RLock()
        self.pods: list[Pod] = []
        self.secrets = secrets
        self.prefix = f"ssek{os.getpid()}x{random.randrange(10**6)}"
        self.objects: dict[tuple[str, str], Object] = {}
        self.images = images(tree, self.folder)
        self.faults: list[str] = []
        self.news_seconds = float(NEWS_SECONDS)
        self.stopping = threading.Event()
        self._numbers = itertools.count(2)
        self._threads: list[threading.Thread] = []
        self._first = objects
        self._home: Any = None

    def __enter__(self) -> Self:
        check(self._first)
        self._home = Path("/proc/thread-self/ns/net").open()
        ip("netns", "add", self.prefix)
        with Path(f"/run/netns/{self.prefix}").open() as node:
            os.setns(node.fileno(), os.CLONE_NEWNET)
        ip("link", "set", "lo", "up")
        ip("link", "add", "br0", "type", "bridge")
        ip("addr", "add", f"{NAME_SERVER}/16", "dev", "br0")
        ip("link", "set", "br0", "up")
        # Threads made from here on are in the node's network too.
        self.start(NameServer(self).run)
        self.apply(self._first)
        self.start(self._control)
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        for pod in list(self.pods):
            pod.kill()
        for thread in self._threads:
            thread.join(20)
        os.setns(self._home.fileno(), os.CLONE_NEWNET)
        self._home.close()
        for pod in list(self.pods):
            pod.remove()
        ip("netns", "del", self.prefix)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, work: Callable[[], None]) -> None:
        """Run *work* in a thread of its own; what it raises fails the test."""

        def guarded() -> None:
            try:
                work()
            except Exception as error:
                if not self.stopping.is_set():
                    self.faults.append(f"{work}: {error!r}")
                    raise

        thread = threading.Thread(target=guarded, daemon=True)
        self._threads.append(thread)
        thread.start()

    # --- what a person does

    def apply(self, objects: list[Object], tree: Path | None = None) -> None:
        """Take *objects* as what shall be, as `kubectl apply` does; *tree* is the application's image."""
        check(objects)
        with self.lock:
            if tree is not None:
                self.images = images(tree, self.folder)
            for o in objects:
                self.objects[o["kind"], o["metadata"]["name"]] = scaled(o)

    def scale(self, name: str, replicas: int) -> None:
        """Do what `kubectl scale` does."""
        with self.lock:
            self.objects["Deployment", name]["spec"]["replicas"] = replicas

    def restart(self, name: str) -> None:
        """Do what `kubectl rollout restart` does."""
        with self.lock:
            (o,) = (o for (kind, each), o in self.objects.items() if each == name and kind in ("Deployment", "StatefulSet"))
            labels = o["spec"]["template"]["metadata"]["labels"]
            labels["restarted"] = str(time.monotonic_ns())

    def of(self, workload: str) -> "list[Pod]":
        """Return the workload's pods that are not on their way out."""
        with self.lock:
            return [p for p in self.pods if p.workload == workload and not p.deleting]

    def settled(self, workload: str) -> bool:
        """Return whether *workload* is as it shall be: `kubectl rollout status`."""
        with self.lock:
            o = next(o for (kind, name), o in self.objects.items() if name == workload and kind in ("Deployment", "StatefulSet"))
            mine, wanted = self.of(workload), fingerprint(o, self)
            return len(mine) == o["spec"].get("replicas", 1) and all(p.version == wanted and p.available(o) for p in mine)

    def wait(self, *workloads: str, seconds: float = 120) -> None:
        """Wait until all are settled. Raises TimeoutError with what the pods wrote."""
        deadline = time.monotonic() + seconds
        while not all(self.settled(w) for w in workloads):
            if self.faults:
                raise RuntimeError(self.faults[0])
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(f"{p.name} ready={p.ready} restarts={p.restarts}: {p.log()[-600:]}" for w in workloads for p in self.of(w)))
            time.sleep(0.02)

    def gone(self, seconds: float = 120) -> None:
        """Wait until every pod that was deleted has ended."""
        deadline = time.monotonic() + seconds
        while any(p.deleting for p in self.pods):
            if time.monotonic() > deadline:
                raise TimeoutError(f"still there: {[p.name for p in self.pods if p.deleting]}")
            time.sleep(0.02)

    # --- what Services say

    def addresses(self, service: str, pod: str = "") -> list[str] | None:
        """Return what the name server answers, for one *pod* or all; None where there is no such name now."""
        with self.lock:
            o = self.objects.get(("Service", service))
            if o is None:
                return None
            chosen = [p for p in self.pods if p.address and o["spec"]["selector"].items() <= p.labels.items()]
            # Pods of a StatefulSet have names below the Service that it names.
            chosen = [p for p in chosen if not pod or (p.name == pod and p.subdomain == service)]
            every = o["spec"].get("publishNotReadyAddresses", False)
            return [p.address for p in chosen if every or p.known_ready(NAMES_SECONDS)] or None

    def connect_to(self, service: str) -> tuple[str, int]:
        """Return one of the Service's pods and the port there, as kube-proxy chooses."""
        with self.lock:
            o = self.objects["Service", service]
            ready = [p for p in self.pods if o["spec"]["selector"].items() <= p.labels.items() and p.known_ready()]
            if not ready:
                raise ConnectionRefusedError(f"{service} has no ready pod")
            pod = random.choice(ready)
            return pod.address, pod.port(o["spec"]["ports"][0]["targetPort"])

    def address(self) -> str:
        """Return an address that was never used."""
        number = next(self._numbers)
        return f"10.77.{number // 250}.{number % 250 + 2}"

    # --- the controllers

    def _control(self) -> None:
        while not self.stopping.wait(0.02):
            with self.lock:
                for (kind, _), o in list(self.objects.items()):
                    if kind == "Deployment":
                        self._deployment(o)
                    elif kind == "StatefulSet":
                        self._stateful(o)
                    elif kind == "Job":
                        self._job(o)

    def _deployment(self, o: Object) -> None:
        spec, name = o["spec"], o["metadata"]["name"]
        wanted, version = spec.get("replicas", 1), fingerprint(o, self)
        mine = self.of(name)
        new, old = [p for p in mine if p.version == version], [p for p in mine if p.version != version]
        update = spec["strategy"]["rollingUpdate"]
        available = sum(p.available(o) for p in mine)
        if len(new) < wanted and len(mine) < wanted + update["maxSurge"]:
            self.pods.append(Pod(self, o, name, version))
        elif len(new) > wanted:
            min(new, key=lambda p: (p.ready, p.born)).delete()
        elif old:
            victim = min(old, key=lambda p: (p.ready, p.born))
            if not victim.available(o) or available > wanted - update["maxUnavailable"]:
                victim.delete()

    def _stateful(self, o: Object) -> None:
        name, version = o["metadata"]["name"], fingerprint(o, self)
        every = {p.name: p for p in self.pods if p.workload == name}
        ordered = o["spec"].get("podManagementPolicy", "OrderedReady") == "OrderedReady"
        wanted = [f"{name}-{ordinal}" for ordinal in range(o["spec"].get("replicas", 1))]
        for each in wanted:
            if each not in every:
                self.pods.append(Pod(self, o, name, version, ordinal=each.rpartition("-")[2]))
            if ordered and not (each in every and every[each].ready):
                break
        # An update begins with the last one, and waits for each.
        for each in reversed(wanted):
            pod = every.get(each)
            if pod is None or pod.version != version:
                if pod is not None:
                    pod.delete()
                break
            if not pod.ready:
                break

    def _job(self, o: Object) -> None:
        name = o["metadata"]["name"]
        there = sum(p.workload == name for p in self.pods)
        # Once, as backoffLimit 0 says: a pod that has ended stays.
        for _ in range(o["spec"].get("parallelism", 1) - there):
            self.pods.append(Pod(self, o, name, "once"))

    def withdraw(self, objects: list[Object]) -> None:
        """Do what `kubectl delete` does, for workloads."""
        with self.lock:
            for o in objects:
                self.objects.pop((o["kind"], o["metadata"]["name"]), None)
                for pod in self.of(o["metadata"]["name"]):
                    pod.delete()


class Pod:
    """One pod: its network, its processes, its probes, its end."""

    def __init__(self, cluster: Cluster, o: Object, workload: str, version: str, ordinal: str = "") -> None:
        self.cluster, self.workload, self.version = cluster, workload, version
        self.spec = copy.deepcopy(o["spec"]["template"]["spec"])
        self.labels: dict[str, str] = dict(o["spec"]["template"]["metadata"]["labels"])
        self.namespace = o["metadata"]["namespace"]
        self.images = cluster.images
        self.name = f"{workload}-{ordinal or os.urandom(3).hex()}"
        self.subdomain = o["spec"].get("serviceName", "")
        self.claims = [c["metadata"]["name"] for c in o["spec"].get("volumeClaimTemplates", [])]
        self.maps = {k[1]: v["data"] for k, v in cluster.objects.items() if k[0] == "ConfigMap"}
        self.address = cluster.address()
        self.born = time.monotonic()
        self.ready = False
        self.ready_at = 0.0
        self.news: list[tuple[float, bool]] = []
        self.deleting = False
        self.deleted_at = 0.0
        self.restarts = 0
        self.killed_at_grace = False
        self.lost = False
        # Of a pod that runs once: what its containers ended with.
        self.exit_codes: list[int] = []
        self.folder = cluster.folder / f"{self.name}-{self.born}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._removed = False
        cluster.start(self._run)

    def delete(self) -> None:
        """Do what `kubectl delete pod` does."""
        if not self.deleting:
            self.deleted_at = time.monotonic()
            self.deleting = True
            self._tell(self.ready)

    def kill(self) -> None:
        """Kill all processes at once, as a machine's failure does."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def lose(self) -> None:
        """Take its machine away: nobody answers, not even that nobody is there, and nothing is started again."""
        self.lost = True
        ip("link", "set", self._outside, "down")
        self.kill()

    def available(self, o: Object) -> bool:
        """Return whether it has been ready for minReadySeconds."""
        return self.ready and time.monotonic() - self.ready_at >= o["spec"].get("minReadySeconds", 0)

    def known_ready(self, more_seconds: float = 0) -> bool:
        """Return whether those who connect to its Service take it for ready: news travel."""
        until = time.monotonic() - (self.cluster.news_seconds + more_seconds) * SCALE
        return next((ready for at, ready in reversed(self.news) if at <= until), False)

    def port(self, name: str) -> int:
        """Return the number of a named port."""
        return next(int(p["containerPort"]) for c in self.spec["containers"] for p in c.get("ports", []) if p["name"] == name)

    def log(self) -> str:
        """Return what its processes wrote."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))

    def remove(self) -> None:
        """Take its network away."""
        if not self._removed:
            self._removed = True
            for process in self.processes.values():
                process.wait()
            subprocess.run(["ip", "netns", "del", self._netns], capture_output=True, check=False)

    # --- inside

    def _tell(self, ready: bool) -> None:
        self.news.append((time.monotonic(), ready and not self.deleting))

    @property
    def _netns(self) -> str:
        return f"{self.cluster.prefix}p{self.address.replace('.', '_')}"

    @property
    def _outside(self) -> str:
        """Its end of the cable, on the node."""
        return f"v{self.address.replace('.', '')[3:]}"

    def _run(self) -> None:
        self.folder.mkdir()
        self._network()
        for c in self.spec.get("initContainers", []):
            process = self._spawn(c)
            if process.wait() and not self.cluster.stopping.is_set():
                raise RuntimeError(f"{self.name}/{c['name']} ended with {process.returncode}: {self.log()}")
        keepers: list[Keeper] = []
        if self.spec.get("restartPolicy") == "Never":
            self._once()
        else:
            keepers = [Keeper(self, c) for c in self.spec["containers"]]
        while not self.deleting and not self.cluster.stopping.is_set():
            for keeper in keepers:
                if not self.lost:
                    keeper.turn()
            ready = bool(keepers) and not self.lost and all(keeper.ready for keeper in keepers)
            if ready != self.ready:
                self.ready, self.ready_at = ready, time.monotonic()
                self._tell(ready)
            time.sleep(0.01)
        if not self.cluster.stopping.is_set():
            self._end()
            # Its address is refused, not forgotten, until the news have reached those who connect.
            self.kill()
            self.cluster.stopping.wait(max(0.0, self.deleted_at + self.cluster.news_seconds * SCALE - time.monotonic()))
        self.kill()
        self.remove()
        with self.cluster.lock:
            self.cluster.pods.remove(self)

    def _once(self) -> None:
        for c in self.spec["containers"]:
            self.processes[c["name"]] = self._spawn(c)
        self._tell(True)
        while any(process.poll() is None for process in self.processes.values()):
            if self.deleting or self.cluster.stopping.wait(0.02):
                return
        self._tell(False)
        self.exit_codes = [process.returncode for process in self.processes.values()]

    def _end(self) -> None:
        deadline = self.deleted_at + self.spec.get("terminationGracePeriodSeconds", 30) * SCALE
        for c in self.spec["containers"]:
            sleep = c.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0) * SCALE
            time.sleep(max(0.0, min(self.deleted_at + sleep, deadline) - time.monotonic()))
            self.processes[c["name"]].send_signal(self._image(c).stop)
        for process in self.processes.values():
            try:
                process.wait(max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.killed_at_grace = True

    def _network(self) -> None:
        inside = "eth0"
        ip("netns", "add", self._netns)
        ip("link", "add", self._outside, "type", "veth", "peer", "name", inside, "netns", self._netns)
        ip("link", "set", self._outside, "master", "br0", "up")
        batch = f"link set lo up\naddr add {self.address}/16 dev {inside}\nlink set {inside} up\nroute add default via {NAME_SERVER}\n"
        subprocess.run(["ip", "-n", self._netns, "-batch", "-"], input=batch, text=True, check=True)
        for sysctl in self.spec.get("securityContext", {}).get("sysctls", []):
            path = "/proc/sys/" + sysctl["name"].replace(".", "/")
            ip("netns", "exec", self._netns, "sh", "-c", f"echo {sysctl['value']} > {path}")

    def _image(self, c: Object) -> Image:
        return next(image for name, image in self.images.items() if c["image"].startswith(name + ":"))

    def _spawn(self, c: Object, argv: list[str] | None = None) -> "subprocess.Popen[bytes]":
        image = self._image(c)
        context = self.spec.get("securityContext", {})
        scratch = Path(tempfile.mkdtemp(prefix="root-", dir=self.folder))
        spec = {
            "netns": f"/run/netns/{self._netns}",
            "scratch": str(scratch),
            "passable": [str(p) for p in Path(os.path.realpath(sys.executable)).parents if str(p) != "/"],
            "files": {"/etc/resolv.conf": f"nameserver {NAME_SERVER}\nsearch {self.namespace}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}\noptions ndots:5\n"},
            "binds": [[s, t, True] for s, t in image.binds] + [[str(self._volume(m["name"])), m["mountPath"], m.get("readOnly", False)] for m in c.get("volumeMounts", [])],
            "links": image.links,
            "read_only": c.get("securityContext", {}).get("readOnlyRootFilesystem", False),
            "cwd": image.cwd,
            "uid": context["runAsUser"], "gid": context["runAsGroup"], "groups": [context["fsGroup"]] if "fsGroup" in context else [],
            "argv": argv or c["command"],
            "env": {"PATH": "/image/bin:/image/venv/bin:/image/nginx:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "HOSTNAME": self.name} | self._environment(c),
        }  # fmt: skip
        (scratch.with_suffix(".json")).write_text(json.dumps(spec))
        log = self.folder / f"{c['name']}.log"
        with log.open("ab") as output:
            log.chmod(0o666)
            return subprocess.Popen(
                [sys.executable, "-S", "-E", str(Path(__file__).with_name("cell.py")), str(scratch.with_suffix(".json"))],
                stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def _volume(self, name: str) -> Path:
        folder = self.folder / f"volume-{name}"
        if name in self.claims:
            folder = self.cluster.folder / f"claim-{name}-{self.name}"
        if folder.exists():
            return folder
        folder.mkdir()
        folder.chmod(0o777)
        for v in self.spec.get("volumes", []):
            if v["name"] == name and "configMap" in v:
                _write(folder, self.maps[v["configMap"]["name"]])
            elif v["name"] == name and "secret" in v:
                data = self.cluster.secrets[v["secret"]["secretName"]]
                items = v["secret"].get("items") or [{"key": k, "path": k} for k in data]
                _write(folder, {item["path"]: data[item["key"]] for item in items})
        return folder

    def _environment(self, c: Object) -> dict[str, str]:
        env: dict[str, str] = {}
        for source in c.get("envFrom", []):
            env |= self.maps[source["configMapRef"]["name"]]
        for entry in c.get("env", []):
            if "valueFrom" in entry:
                reference = entry["valueFrom"]["secretKeyRef"]
                env[entry["name"]] = self.cluster.secrets[reference["name"]][reference["key"]]
            else:
                env[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda m: env.get(m[1], m[0]), entry["value"])
        return env


class Keeper:
    """Keeps one container running, and asks its probes."""

    def __init__(self, pod: Pod, c: Object) -> None:
        self.pod, self.c = pod, c
        self.ready = False
        self._begin()

    def _begin(self) -> None:
        self.pod.processes[self.c["name"]] = self.pod._spawn(self.c)
        self.began = time.monotonic()
        self.started, self.ready = "startupProbe" not in self.c, False
        self.failures = dict.fromkeys(("startupProbe", "readinessProbe", "livenessProbe"), 0)
        self.next = dict.fromkeys(self.failures, 0.0)

    def turn(self) -> None:
        """Look once."""
        process = self.pod.processes[self.c["name"]]
        if process.poll() is not None:
            self.pod.restarts += 1
            self.ready = False
            self._begin()
            return
        for name in ("startupProbe",) if not self.started else ("readinessProbe", "livenessProbe"):
            probe = self.c.get(name)
            if probe is None:
                self.ready = self.ready or name == "readinessProbe"
                continue
            now = time.monotonic()
            if now < self.next[name]:
                continue
            # A container for each question costs 50 ms of CPU here.
            self.next[name] = now + max(probe.get("periodSeconds", 10) * SCALE, 0.5 if "exec" in probe else 0)
            good = self._asks(probe)
            self.failures[name] = 0 if good else self.failures[name] + 1
            if good and name == "startupProbe":
                self.started = True
            elif name == "readinessProbe":
                if good:
                    self.ready = True
                elif self.failures[name] >= probe.get("failureThreshold", 3):
                    self.ready = False
            elif name == "startupProbe":
                # Not scaled: a program starts as fast as it starts.
                if now - self.began > probe.get("failureThreshold", 3) * probe.get("periodSeconds", 10):
                    process.kill()
            elif self.failures[name] >= probe.get("failureThreshold", 3):
                process.kill()

    def _asks(self, probe: Object) -> bool:
        # Not scaled: this machine is not twenty times as fast.
        seconds = probe.get("timeoutSeconds", 1)
        try:
            if "exec" in probe:
                return self.pod._spawn(self.c, probe["exec"]["command"]).wait(seconds) == 0
            handler = probe.get("httpGet") or probe["tcpSocket"]
            port = self.pod.port(handler["port"])
            if "tcpSocket" in probe:
                socket.create_connection((self.pod.address, port), seconds).close()
                return True
            connection = http.client.HTTPConnection(self.pod.address, port, timeout=seconds)
            try:
                connection.request("GET", handler["path"])
                return 200 <= connection.getresponse().status < 400
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, subprocess.TimeoutExpired):
            return False


class NameServer:
    """Answers A questions for Services. A name without an address does not exist, as in CoreDNS."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def run(self) -> None:
        """Serve until the cluster stops."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind((NAME_SERVER, 53))
            server.settimeout(0.2)
            while not self.cluster.stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    question, client = server.recvfrom(512)
                    server.sendto(self._answer(question), client)

    def _answer(self, question: bytes) -> bytes:
        labels, at = [], 12
        while question[at]:
            labels.append(question[at + 1 : at + 1 + question[at]].decode())
            at += 1 + question[at]
        (kind,) = struct.unpack("!H", question[at + 1 : at + 3])
        asked = question[12 : at + 5]
        name = re.fullmatch(rf"(?:([\w-]+)\.)?([\w-]+)\.\w+\.svc\.{DOMAIN}", ".".join(labels).lower())
        found = self.cluster.addresses(name[2], name[1] or "") if name else None
        answers = found if found and kind == 1 else []
        head = question[:2] + struct.pack("!HHHHH", 0x8180 if found else 0x8183, 1, len(answers), 0, 0)
        rows = [b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 5, 4) + socket.inet_aton(a) for a in answers]
        return head + asked + b"".join(rows)


# --- Small things


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o644)


def fingerprint(o: Object, cluster: Cluster) -> str:
    """Return what a pod template is known by; another image is another template."""
    template = o["spec"]["template"]
    used = [image.binds for name, image in cluster.images.items() if f'"{name}:' in json.dumps(template)]
    text = json.dumps(template, sort_keys=True) + repr(used)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


_IN_SECONDS = {variable(name) for name, rule in rules() if rule.kind == "seconds"}
# Timeouts that guard against this machine's own slowness stay as they are.
_UNSCALED = {"SSE_REDIS_TIMEOUT_SECONDS", "SSE_PUBLISH_TIMEOUT_SECONDS", "SSE_HISTORY_SECONDS"}


def scaled(o: Object) -> Object:
    """Return *o* with the ladder's times inside of ConfigMaps and environments scaled."""
    o = copy.deepcopy(o)
    if o["kind"] == "ConfigMap":
        for key, text in o["data"].items():
            o["data"][key] = _setting(key, _directives(key, text))
    for kind in ("containers", "initContainers"):
        for c in o.get("spec", {}).get("template", {}).get("spec", {}).get(kind, []):
            for entry in c.get("env", []):
                if "value" in entry:
                    entry["value"] = _setting(entry["name"], entry["value"])
    return o


def _setting(name: str, value: str) -> str:
    return f"{float(value) * SCALE:g}" if name in _IN_SECONDS - _UNSCALED else value


def _directives(file: str, text: str) -> str:
    if file == "sse-api.conf":
        return text  # longer than SSE_PUBLISH_TIMEOUT_SECONDS, which is not scaled
    text = re.sub(r"(worker_shutdown_timeout|proxy_read_timeout) (\d+)s;", lambda m: f"{m[1]} {int(int(m[2]) * SCALE * 1000)}ms;", text)
    # nginx counts these in whole seconds.
    return re.sub(r"\bvalid=\d+s", "valid=1s", text)
