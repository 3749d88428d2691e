"""
Bring an overlay to a cluster by kubectl: check first, show what changes, apply, wait, test.

    python3 k8s/deploy.py deploy --overlay staging

Needs kubectl, Python 3.9 and no package. Everything that can be known beforehand is
checked before anything is changed; each failure is one sentence with a cure.
`make` has a target per command.
"""

# Python 3.9, as macOS has it, cannot evaluate `str | None`.
from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MANAGER = "sse-kit"
KUBECTL_MIN = (1, 32)
SERVER_MIN = (1, 33)
# Names of contexts that are a laptop's; `local` is open to anybody and goes nowhere else.
LAPTOP = re.compile(r"^(kind-.*|minikube.*|k3d-.*|docker-desktop|rancher-desktop|orbstack|colima.*)$")
# A pod that waits for one of these will not start by waiting longer.
STUCK = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CrashLoopBackOff", "CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
STUCK_SECONDS = float(os.environ.get("SSE_KIT_STUCK_SECONDS", "45"))
# A cluster that grows brings a node within some minutes.
NODE_SECONDS = 8 * STUCK_SECONDS
NO_NODE = "no node has room: "
UNREADY = "runs and is not ready"
# Longer than the grace of the application's pods.
HOLD_SECONDS = 300
# What `kubectl rollout restart` writes into pods.
RESTARTED = "kubectl.kubernetes.io/restartedAt"
# Who brings kinds that are not Kubernetes' own.
INSTALL = {
    "monitoring.coreos.com": "the Prometheus Operator, or take the component monitoring out",
    "keda.sh": "KEDA, or take the component autoscaling-keda out",
    "gateway.networking.k8s.io": "the Gateway API, or take the component out",
    "gateway.envoyproxy.io": "Envoy Gateway, or take the component out",
}

Object = dict[str, Any]


class Failed(Exception):
    """What is wrong and what to do, in one sentence or two."""


# --- kubectl


class Kubectl:
    """kubectl with one context."""

    def __init__(self, context: str = "") -> None:
        self.context = context

    def run(self, *arguments: str, text: str | None = None, quiet: bool = True) -> subprocess.CompletedProcess[str]:
        """Run it; its answer is captured unless not *quiet*."""
        command = ["kubectl", *([f"--context={self.context}"] if self.context else []), *arguments]
        try:
            return subprocess.run(command, input=text, text=True, check=False, stdout=subprocess.PIPE if quiet else None, stderr=subprocess.PIPE if quiet else None)
        except FileNotFoundError:
            raise Failed(f"kubectl {_dotted(KUBECTL_MIN)} or newer must be on PATH, found none. See https://kubernetes.io/docs/tasks/tools/.") from None

    def ask(self, *arguments: str, text: str | None = None) -> str:
        """Return what it prints; a failure is ours, with its last line."""
        run = self.run(*arguments, text=text)
        if run.returncode:
            raise Failed(f"kubectl {' '.join(arguments[:3])} must succeed, said: {_last(run.stderr)}")
        return run.stdout

    def lines(self, *arguments: str) -> Iterator[str]:
        """Yield what it prints, line by line, as it comes; an error of its own is silence."""
        command = ["kubectl", *([f"--context={self.context}"] if self.context else []), *arguments]
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout
            for line in process.stdout:
                yield line.rstrip("\n")

    def get(self, *arguments: str) -> Object | None:
        """Return an object or a list, or None where there is none."""
        answer = self.ask("get", *arguments, "--ignore-not-found", "-o", "json")
        return json.loads(answer) if answer.strip() else None


def _last(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _version(text: str) -> tuple[int, int]:
    found = re.match(r"v?(\d+)\.(\d+)", text)
    if not found:
        raise Failed(f"A version must be like v1.36.0, got {text!r}.")
    return int(found[1]), int(found[2])


# --- Checks, in the order in which they can be made


def check_client(kubectl: Kubectl) -> tuple[int, int]:
    """Return kubectl's version. Raises Failed where it is too old."""
    version = _version(json.loads(kubectl.ask("version", "--client", "-o", "json"))["clientVersion"]["gitVersion"])
    if version < KUBECTL_MIN:
        raise Failed(f"kubectl must be {_dotted(KUBECTL_MIN)} or newer, got {_dotted(version)}. Older ones render and compare differently; install a newer one.")
    return version


def check_context(kubectl: Kubectl, overlay: str) -> None:
    """Settle which context is meant."""
    known = kubectl.run("config", "get-contexts", "-o", "name").stdout.split()
    if kubectl.context:
        if kubectl.context not in known:
            raise Failed(f"CONTEXT must be one that kubectl knows ({', '.join(known) or 'it knows none'}), got {kubectl.context!r}.")
        return
    current = kubectl.run("config", "current-context")
    if current.returncode or not current.stdout.strip():
        raise Failed("kubectl must have a current context, has none. Set one with `kubectl config use-context NAME`, or give CONTEXT=NAME.")
    name = current.stdout.strip()
    if overlay == "local" and not LAPTOP.match(name):
        raise Failed(f"The overlay local must go to a laptop's cluster (kind, minikube, …), got the context {name!r}: it lets anybody in. Give CONTEXT={name} if you mean it.")
    kubectl.context = name


def check_server(kubectl: Kubectl, client: tuple[int, int]) -> None:
    """See that the cluster answers and is of a version that fits."""
    run = kubectl.run("version", "-o", "json", "--request-timeout=10s")
    version = json.loads(run.stdout or "{}").get("serverVersion") if run.returncode == 0 else None
    if not version:
        raise Failed(f"The cluster of context {kubectl.context} must answer, said: {_last(run.stderr)} Is it running, and are you logged in?")
    server = _version(version["gitVersion"])
    if server < SERVER_MIN:
        raise Failed(f"The cluster must be Kubernetes {_dotted(SERVER_MIN)} or newer, got {_dotted(server)}.")
    if abs(server[1] - client[1]) > 1:
        say(f"kubectl {_dotted(client)} and the cluster {_dotted(server)} are more than one version apart, which Kubernetes does not support.")


def check_images(objects: list[Object], overlay: str) -> None:
    """Refuse the name without a registry, which only a laptop's cluster can have."""
    for _, container, _ in containers(objects):
        if container["image"].startswith("sse-kit/") and overlay != "local":
            raise Failed(f"The overlay {overlay} must name an image that its cluster can pull, has {container['image']}. Give IMAGE=registry.example.com/sse/app:1.0, or set `images` in k8s/overlays/{overlay}/kustomization.yaml.")


def check_kinds(kubectl: Kubectl, objects: list[Object]) -> None:
    """See that the cluster knows all kinds."""
    for group, cure in INSTALL.items():
        kinds = sorted({o["kind"] for o in objects if o["apiVersion"].startswith(group + "/")})
        if kinds and not kubectl.run("api-resources", f"--api-group={group}", "-o", "name").stdout.strip():
            raise Failed(f"The cluster must know {', '.join(kinds)} ({group}), does not. Install {cure} of the overlay.")


def needed_secrets(objects: list[Object]) -> dict[str, set[str]]:
    """Return which Secrets the pods need, with the keys."""
    needed: dict[str, set[str]] = {}
    for _, container, spec in containers(objects):
        for entry in container.get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            if reference and not reference.get("optional"):
                needed.setdefault(reference["name"], set()).add(reference["key"])
        for volume in spec.get("volumes", []):
            secret = volume.get("secret")
            if secret and not secret.get("optional"):
                needed.setdefault(secret["secretName"], set()).update(item["key"] for item in secret.get("items", []))
    if "sse-tls" in needed:
        needed["sse-tls"] |= {"tls.crt", "tls.key"}
    return needed


def check_secrets(kubectl: Kubectl, objects: list[Object], overlay: str) -> None:
    """See that every Secret is there, with its keys."""
    namespace = namespace_of(objects)
    for name, keys in needed_secrets(objects).items():
        secret = kubectl.get("-n", namespace, "secret", name)
        missing = keys - set((secret or {}).get("data", {}))
        if secret is None or missing:
            what = f"has no {', '.join(sorted(missing))}" if secret else "is not"
            raise Failed(f"Secret {name} must be in namespace {namespace} of {kubectl.context}, {what}. Make it: make secrets OVERLAY={overlay}")


# --- What is rendered


def render(overlay: str, image: str = "") -> str:
    """Return the overlay's YAML, with *image* for the application's."""
    folder = HERE / "overlays" / overlay
    if not (folder / "kustomization.yaml").exists():
        known = ", ".join(sorted(path.parent.name for path in (HERE / "overlays").glob("*/kustomization.yaml")))
        raise Failed(f"OVERLAY must be one of {known}, got {overlay!r}.")
    if not image:
        return Kubectl().ask("kustomize", str(folder))
    name, tag, digest = split_image(image)
    # An overlay may have another name in the place of sse-kit/app, and kustomize knows
    # an image by the name that it has.
    _, container = application(parse(Kubectl().ask("kustomize", str(folder))))
    instead_of, _, _ = parts_of(container["image"])
    (ROOT / ".cache").mkdir(exist_ok=True)
    # Within the tree: kustomize follows no absolute paths, and `..` of a link leads elsewhere.
    with tempfile.TemporaryDirectory(prefix="deploy-", dir=(ROOT / ".cache").resolve()) as scratch:
        override = {"name": instead_of, "newName": name} | ({"digest": digest} if digest else {"newTag": tag})
        around = {"resources": [os.path.relpath(folder, scratch)], "images": [override]}
        (Path(scratch) / "kustomization.yaml").write_text(json.dumps(around))
        return Kubectl().ask("kustomize", scratch)


def parts_of(image: str) -> tuple[str, str, str]:
    """Return name, tag and digest."""
    name, _, digest = image.partition("@")
    head, slash, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    return head + slash + last, tag, digest


def split_image(image: str) -> tuple[str, str, str]:
    """Return name, tag and digest. Raises Failed where neither a tag nor a digest is there."""
    name, tag, digest = parts_of(image)
    if not name or name.endswith("/") or not (tag or digest) or (digest and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest)):
        raise Failed(f"IMAGE must be NAME:TAG or NAME@sha256:…, got {image!r}.")
    return name, tag, digest


def parse(text: str) -> list[Object]:
    """Return the objects of rendered YAML. kubectl reads it, so that no package is needed."""
    output = Kubectl().ask("patch", "--local", "--type=merge", "-p", "{}", "-f", "-", "-o", "json", text=text)
    decoder, objects, at = json.JSONDecoder(), [], 0
    while output[at:].strip():
        at += len(output[at:]) - len(output[at:].lstrip())
        value, at = decoder.raw_decode(output, at)
        objects.append(value)
    return objects


def containers(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Return each container with its workload's name and its pod's spec."""
    for o in objects:
        if o["kind"] in ("Deployment", "StatefulSet", "Job"):
            spec = o["spec"]["template"]["spec"]
            for container in [*spec.get("initContainers", []), *spec["containers"]]:
                yield o["metadata"]["name"], container, spec


def application(objects: list[Object]) -> tuple[Object, Object]:
    """Return the application's Deployment and its container."""
    for o in objects:
        if o["kind"] == "Deployment" and o["metadata"]["name"] == "sse-app":
            for container in o["spec"]["template"]["spec"]["containers"]:
                if container["name"] == "app":
                    return o, container
    raise Failed("The overlay must have the Deployment sse-app with its container app, has not. Take namePrefix and nameSuffix out: another `namespace` keeps two kits apart.")


def namespace_of(objects: list[Object]) -> str:
    """Return the application's namespace. An overlay may have objects of other ones, and of none."""
    return str(application(objects)[0]["metadata"]["namespace"])


def setting(objects: list[Object], name: str) -> str:
    """Return what the application gets as *name*, or nothing."""
    _, container = application(objects)
    sources = [source["configMapRef"]["name"] for source in container.get("envFrom", []) if "configMapRef" in source]
    values = {key: value for o in objects if o["kind"] == "ConfigMap" and o["metadata"]["name"] in sources for key, value in o["data"].items()}
    return str((values | {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}).get(name, ""))


# --- Commands


def deploy(kubectl: Kubectl, options: argparse.Namespace) -> None:
    """Check, show, apply, wait, test."""
    text, objects = prepared(kubectl, options)
    namespace = namespace_of(objects)
    check_images(objects, options.overlay)
    check_kinds(kubectl, objects)
    check_secrets(kubectl, objects, options.overlay)
    numbers = to_hand_over(kubectl, objects)
    if show_diff(kubectl, text, objects):
        for o in numbers:
            say(f"deployment/{o['metadata']['name']} keeps its {o['spec']['replicas']} pods, whatever stands above: its autoscaler takes the number over.")
        confirm(kubectl, options, f"apply this to namespace {namespace}")
        for o in numbers:
            kubectl.ask("apply", "--server-side", f"--field-manager={MANAGER}-autoscaler", "--validate=false", "-f", "-", text=json.dumps(o))
        apply(kubectl, text)
    wait_for_all(kubectl, objects, options.overlay)
    say_leftovers(kubectl, objects)
    if not options.no_smoke:
        smoke(kubectl, options)


def say_leftovers(kubectl: Kubectl, objects: list[Object]) -> None:
    """Name what an earlier overlay brought and this one has no more. Nothing is deleted but by a person."""
    namespace = namespace_of(objects)
    kinds = "deployment,statefulset,service,serviceaccount,poddisruptionbudget,networkpolicy,horizontalpodautoscaler"
    run = kubectl.run("-n", namespace, "get", kinds, "-l", "app.kubernetes.io/part-of=sse-kit,app.kubernetes.io/component!=loadtest", "-o", "json")
    there = json.loads(run.stdout)["items"] if run.returncode == 0 else []
    rendered = {(o["kind"], o["metadata"]["name"]) for o in objects}
    names = " ".join(f"{o['kind'].lower()}/{o['metadata']['name']}" for o in there if (o["kind"], o["metadata"]["name"]) not in rendered)
    if names:
        say(f"No longer in the overlay, and still there. If nobody needs it: kubectl -n {namespace} delete {names}")


def prepared(kubectl: Kubectl, options: argparse.Namespace) -> tuple[str, list[Object]]:
    """Make the checks of every command that goes to a cluster; return what is rendered."""
    client = check_client(kubectl)
    text = render(options.overlay, options.image)
    check_context(kubectl, options.overlay)
    check_server(kubectl, client)
    say(f"Overlay {options.overlay}, context {kubectl.context}.")
    return text, parse(text)


def show_diff(kubectl: Kubectl, text: str, objects: list[Object]) -> bool:
    """Print what would change; return whether anything would."""
    namespace = namespace_of(objects)
    # Without it in the overlay, the namespace is somebody else's, and we may not even look.
    if any(o["kind"] == "Namespace" for o in objects) and kubectl.get("namespace", namespace) is None:
        say(f"Namespace {namespace} is new, and all that is in it.")
        return True
    # It changes nothing; whose fields these are is for `apply` to say.
    run = kubectl.run("diff", "--server-side", "--force-conflicts", f"--field-manager={MANAGER}", "-f", "-", text=text)
    print(run.stdout, end="", flush=True)
    if run.returncode > 1:
        raise Failed(f"kubectl diff must succeed, said: {_last(run.stderr)}")
    if run.returncode == 0:
        say("Nothing changes.")
    return run.returncode == 1


def apply(kubectl: Kubectl, text: str) -> None:
    """Apply on the server, as one manager of fields."""
    run = kubectl.run("apply", "--server-side", f"--field-manager={MANAGER}", "-f", "-", text=text)
    print(run.stdout, end="", flush=True)
    if run.returncode and "conflict" in run.stderr.lower():
        print(run.stderr, file=sys.stderr, end="")
        raise Failed(
            "No one else may own these fields (see above). Take them out of the overlay; or, where somebody changed them by hand, take them over: "
            f"make render OVERLAY=… IMAGE=… | kubectl apply --server-side --field-manager={MANAGER} --force-conflicts -f -"
        )
    if run.returncode:
        raise Failed(f"kubectl apply must succeed, said: {_last(run.stderr)}")


def to_hand_over(kubectl: Kubectl, objects: list[Object]) -> list[Object]:
    """
    Return the numbers of pods that we own still, and an autoscaler shall: as they are now.

    Somebody must own them before we let go. A field that only we own and no longer
    apply is reset, here to one pod:
    https://kubernetes.io/docs/reference/using-api/server-side-apply/#transferring-ownership
    """
    numbers = []
    for o in objects:
        if o["kind"] != "Deployment" or "replicas" in o["spec"]:
            continue
        name, namespace = o["metadata"]["name"], o["metadata"]["namespace"]
        live = kubectl.get("-n", namespace, f"deployment/{name}", "--show-managed-fields")
        owners = (live or {"metadata": {}})["metadata"].get("managedFields", [])
        if live and any(each["manager"] == MANAGER and "f:replicas" in each.get("fieldsV1", {}).get("f:spec", {}) for each in owners):
            numbers.append({
                "apiVersion": o["apiVersion"], "kind": o["kind"], "metadata": {"name": name, "namespace": namespace},
                "spec": {"replicas": live["spec"]["replicas"]},
            })  # fmt: skip
    return numbers


def wait_for_all(kubectl: Kubectl, objects: list[Object], overlay: str) -> None:
    """Wait until every workload runs as rendered. Raises Failed with the reason that a person needs."""
    namespace = namespace_of(objects)
    deadlines = {f"{o['kind'].lower()}/{o['metadata']['name']}": o["spec"].get("progressDeadlineSeconds", 900) for o in objects if o["kind"] in ("Deployment", "StatefulSet")}
    for workload, seconds in deadlines.items():
        # Among all of them: the application waits for a Redis that does not start.
        wait_for(kubectl, namespace, workload, time.monotonic() + seconds, overlay, among=list(deadlines))


def wait_for(kubectl: Kubectl, namespace: str, workload: str, deadline: float, overlay: str, among: list[str]) -> None:
    """Wait for one workload; give up early on pods, *among* several workloads', that waiting does not help."""
    watch, said = Watch(kubectl, namespace, among, overlay), ""
    while True:
        run = kubectl.run("-n", namespace, "rollout", "status", workload, "--timeout=10s")
        if run.returncode == 0:
            say(_last(run.stdout))
            return
        watch.look()
        if run.stdout.strip() and _last(run.stdout) != said:
            said = _last(run.stdout)
            say(said)
        if time.monotonic() > deadline or "exceeded its progress deadline" in run.stderr:
            explain(kubectl, namespace, watch.suspect(), overlay)
            raise Failed(f"{workload} must come up in time, said: {_last(run.stderr)}")


class Watch:
    """Looks at the pods of workloads, and says for how long they have not been what they should."""

    def __init__(self, kubectl: Kubectl, namespace: str, workloads: list[str], overlay: str) -> None:
        self.kubectl, self.namespace, self.workloads, self.overlay = kubectl, namespace, workloads, overlay
        self._since: dict[tuple[str, str], float] = {}
        self._said: set[str] = set()

    def look(self) -> None:
        """Say what takes long. Raises Failed where a pod does not start and will not."""
        now = time.monotonic()
        found = {(workload, pod): reason for workload in self.workloads for pod, reason in stuck_pods(self.kubectl, self.namespace, workload)}
        self._since = {key: self._since.get(key, now) for key in found}
        for key, since in self._since.items():
            (workload, pod), reason = key, found[key]
            if reason == UNREADY:
                if now - since >= STUCK_SECONDS and pod not in self._said:
                    self._said.add(pod)
                    lines = self.kubectl.run("-n", self.namespace, "logs", pod, "--all-containers", "--tail=5").stdout.splitlines()
                    say("\n".join([f"{pod} runs and is not ready. Its last log lines:", *(f"  {line}" for line in lines)]))
            elif now - since >= (NODE_SECONDS if reason.startswith(NO_NODE) else STUCK_SECONDS):
                explain(self.kubectl, self.namespace, pod if pod != workload else "", self.overlay)
                raise Failed(f"{workload} must come up, but {pod} does not: {reason}")

    def suspect(self) -> str:
        """Return a pod that is not what it should be, or nothing."""
        return next((pod for workload, pod in self._since if pod != workload), "")


def stuck_pods(kubectl: Kubectl, namespace: str, workload: str) -> Iterator[tuple[str, str]]:
    """Return the workload's pods that are not what they should be, each with the reason; itself, if it may not make any."""
    kind, _, name = workload.partition("/")
    selector = ("batch.kubernetes.io/job-name=" if kind == "job" else "app.kubernetes.io/name=") + name
    pods = kubectl.get("-n", namespace, "pods", "-l", selector) or {"items": []}
    for pod in pods["items"]:
        status = pod.get("status", {})
        for each in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
            waiting = each.get("state", {}).get("waiting", {})
            if waiting.get("reason") in STUCK:
                yield pod["metadata"]["name"], f"{waiting['reason']}: {waiting.get('message') or each.get('image', '')}"
        for condition in status.get("conditions", []):
            if condition.get("reason") == "Unschedulable":
                yield pod["metadata"]["name"], NO_NODE + condition.get("message", "")
        going = "deletionTimestamp" in pod["metadata"] or kind == "job"
        if not going and any(each.get("started") and not each.get("ready") for each in status.get("containerStatuses", [])):
            yield pod["metadata"]["name"], UNREADY
    if kind == "deployment":
        # A quota, a policy, a webhook: there are no pods to look at.
        live = kubectl.get("-n", namespace, workload) or {}
        for condition in live.get("status", {}).get("conditions", []):
            if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
                yield workload, f"{condition.get('reason', '')}: {condition.get('message', '')}"


def explain(kubectl: Kubectl, namespace: str, pod: str, overlay: str) -> None:
    """Print the last events and log lines, and how to go back."""
    about = [f"--field-selector=involvedObject.name={pod}"] if pod else []
    events = kubectl.run("-n", namespace, "get", "events", "--sort-by=.lastTimestamp", *about).stdout.splitlines()
    print("\n".join(["Last events:", *(f"  {line}" for line in events[-8:])]), file=sys.stderr)
    if pod:
        for extra in ([], ["--previous"]):
            lines = kubectl.run("-n", namespace, "logs", pod, "--all-containers", "--tail=10", *extra).stdout.splitlines()
            if lines:
                print("\n".join(["Last log lines:", *(f"  {line}" for line in lines)]), file=sys.stderr)
    if overlay:
        print(f"To go back: make rollback OVERLAY={overlay}", file=sys.stderr)


def diff(kubectl: Kubectl, options: argparse.Namespace) -> None:
    """Show what `deploy` would change."""
    text, objects = prepared(kubectl, options)
    show_diff(kubectl, text, objects)


def rollback(kubectl: Kubectl, options: argparse.Namespace) -> None:
    """
    Bring each Deployment's version of before back. The ConfigMaps of before are still there.

    Not by `kubectl rollout undo`: what it changes belongs to another manager of fields
    from then on, beside us even if we apply the same, and the next deploy meets a conflict.
    """
    _, objects = prepared(kubectl, options)
    namespace = namespace_of(objects)
    confirm(kubectl, options, f"bring the version of before back in namespace {namespace}")
    for o in objects:
        if o["kind"] == "Deployment":
            name = o["metadata"]["name"]
            live = kubectl.get("-n", namespace, f"deployment/{name}")
            before = version_before(kubectl, namespace, name)
            if live is None or before is None:
                say(f"deployment/{name} has no version of before, and stays.")
                continue
            number, template = before
            spec = live["spec"] | {"template": template}
            if "replicas" not in o["spec"]:
                spec.pop("replicas", None)  # an autoscaler's
            mine = {
                "apiVersion": live["apiVersion"], "kind": live["kind"], "spec": spec,
                "metadata": {key: live["metadata"][key] for key in ("name", "namespace", "labels")},
            }  # fmt: skip
            kubectl.ask("apply", "--server-side", f"--field-manager={MANAGER}", "--force-conflicts", "-f", "-", text=json.dumps(mine))
            say(f"deployment/{name} goes back to revision {number}.")
    wait_for_all(kubectl, objects, options.overlay)


def version_before(kubectl: Kubectl, namespace: str, name: str) -> tuple[int, Object] | None:
    """
    Return the newest revision of a Deployment that is not what runs now, and its pods' template.

    kubectl's own choice would be the revision before the last: after a smoke test,
    whose restart is a revision too, that is the version that runs.
    """
    sets = (kubectl.get("-n", namespace, "replicasets", "-l", f"app.kubernetes.io/name={name}") or {"items": []})["items"]
    versions = sorted(((int(s["metadata"].get("annotations", {}).get("deployment.kubernetes.io/revision", 0)), template_of(s)) for s in sets), key=lambda version: -version[0])
    return next((version for version in versions if version[1] != versions[0][1]), None)


def template_of(replica_set: Object) -> Object:
    """Return what a ReplicaSet's pods are, whatever they are called and however often they were restarted."""
    template: Object = json.loads(json.dumps(replica_set["spec"]["template"]))
    metadata = template["metadata"]
    metadata.get("labels", {}).pop("pod-template-hash", None)
    metadata.get("annotations", {}).pop(RESTARTED, None)
    metadata.pop("creationTimestamp", None)
    if not metadata.get("annotations"):
        metadata.pop("annotations", None)
    return template


def undeploy(kubectl: Kubectl, options: argparse.Namespace) -> None:
    """Delete all but the namespace, its Secrets and volumes."""
    _, objects = prepared(kubectl, options)
    namespace = namespace_of(objects)
    confirm(kubectl, options, f"delete the kit in namespace {namespace}; its Secrets and volumes stay")
    mine = {"apiVersion": "v1", "kind": "List", "items": [o for o in objects if o["kind"] != "Namespace"]}
    print(kubectl.ask("delete", "--ignore-not-found", "-f", "-", text=json.dumps(mine)), end="")
    # Those of earlier versions, and of load tests.
    print(kubectl.ask("-n", namespace, "delete", "configmap,job,service,serviceaccount", "-l", "app.kubernetes.io/part-of=sse-kit"), end="")
    say(f"What stays can go with: kubectl delete namespace {namespace}")


def confirm(kubectl: Kubectl, options: argparse.Namespace, what: str) -> None:
    """Have a person say yes, unless --yes did."""
    if options.yes:
        return
    if not sys.stdin.isatty():
        raise Failed(f"Somebody must confirm to {what} ({kubectl.context}), but there is nobody to ask. Give YES=1.")
    if input(f"Context {kubectl.context}: {what}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Failed("Nothing was changed.")


# --- Secrets


def make_secrets(kubectl: Kubectl, options: argparse.Namespace) -> None:
    """Make the Secrets that the overlay needs and that are not there, or that are to be replaced: from the environment, or at random."""
    _, objects = prepared(kubectl, options)
    namespace = namespace_of(objects)
    wanted = needed_secrets(objects)
    named = set(wanted) if options.replace == "1" else set(re.split(r"[,\s]+", options.replace)) - {""}
    if named - set(wanted):
        raise Failed(f"REPLACE must be 1 for all, or some of {', '.join(sorted(wanted)) or 'none'}, got {options.replace!r}.")
    there = {name: secret for name in wanted if (secret := kubectl.get("-n", namespace, "secret", name))}
    made = {name: secret_data(name, keys) for name, keys in wanted.items() if name not in there or name in named}
    for name in sorted(set(wanted) - set(made)):
        missing = wanted[name] - set(there[name].get("data", {}))
        if missing:
            raise Failed(f"Secret {name} must have {', '.join(sorted(missing))}, has not: another component made it. Delete it, and call this again: kubectl -n {namespace} delete secret {name}")
        say(f"Secret {name} is there, and stays. REPLACE={name} makes a new one.")
    if not made:
        return
    confirm(kubectl, options, " and ".join(filter(None, (_listed("make", set(made) - set(there)), _listed("replace", set(made) & set(there))))) + f" in namespace {namespace}")
    for o in objects:
        if o["kind"] == "Namespace":
            apply(kubectl, json.dumps(o))
    for name, data in sorted(made.items()):
        # Through standard input: arguments of processes can be seen by others.
        secret = {
            "apiVersion": "v1", "kind": "Secret",
            "type": "kubernetes.io/tls" if name == "sse-tls" else "Opaque",
            "metadata": {"name": name, "namespace": namespace},
            "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
        }  # fmt: skip
        kubectl.ask("apply", "--server-side", f"--field-manager={MANAGER}", "--force-conflicts", "-f", "-", text=json.dumps(secret))
        say(f"Secret {name} made: {', '.join(sorted(data))}.")
        # Keys of tokens and certificates are files that are read again; the rest is not.
        if name in there and name not in ("sse-jwt", "sse-tls"):
            readers = [f"{o['kind'].lower()}/{o['metadata']['name']}" for o in objects if o["kind"] in ("Deployment", "StatefulSet") and name in needed_secrets([o])]
            say(f"Pods read it when they start: kubectl -n {namespace} rollout restart {' '.join(sorted(readers, reverse=True))}")


def _listed(verb: str, names: set[str]) -> str:
    return f"{verb} {', '.join(sorted(names))}" if names else ""


def secret_data(name: str, keys: set[str]) -> dict[str, str]:
    """Return the keys and values of one Secret."""
    environ = os.environ
    if name == "sse-redis" and "url" in keys:
        url = environ.get("REDIS_URL", "")
        if not re.match(r"rediss?(\+sentinel)?://.", url):
            raise Failed("REDIS_URL must be the address of your Redis (rediss://USER:PASSWORD@HOST:PORT/0), got " + ("another scheme." if url else "none."))
        return {"url": url}
    if name == "sse-redis":
        password, replica, sentinel = (secrets.token_urlsafe(32).replace("-", "a").replace("_", "b") for _ in range(3))
        if "sentinel.acl" not in keys:
            return {"password": password, "users.acl": acl(password)}
        return {
            "password": password, "users.acl": acl(password) + acl_among(replica, sentinel), "replica-password": replica,
            "sentinel.acl": acl_of_sentinels(password, sentinel), "sentinel-password": sentinel,
        }  # fmt: skip
    if name == "sse-jwt":
        path = environ.get("JWT_SECRET_FILE", "")
        return {"secret": read(path, "JWT_SECRET_FILE").strip() if path else secrets.token_urlsafe(48)}
    if name == "sse-tls":
        cert, key = environ.get("TLS_CERT", ""), environ.get("TLS_KEY", "")
        if bool(cert) != bool(key):
            raise Failed("TLS_CERT and TLS_KEY must both be given, or neither.")
        return {"tls.crt": read(cert, "TLS_CERT"), "tls.key": read(key, "TLS_KEY")} if cert else self_signed()
    raise Failed(f"Secret {name} is none that `make secrets` can make. Make it with kubectl create secret.")


def acl(password: str) -> str:
    """
    Return Valkey's users: the application may do all but administration, the probes PING.

    Nobody can be `default`, but it keeps all rights: Valkey reads its append-only
    file as that user, and leaves out transactions that it may not do.
    """
    return (
        "user default off resetpass allkeys allchannels allcommands\n"
        "user probe on nopass resetkeys resetchannels -@all +ping\n"
        f"user sse on #{_digest(password)} resetkeys ~{{sse}}* &* +@all -@admin -@dangerous +info +config|get\n"
    )


def acl_among(replica: str, sentinel: str) -> str:
    """Return Valkey's users for its replicas and for Sentinels, with the rights that each needs."""
    return (
        f"user replica on #{_digest(replica)} resetkeys resetchannels -@all +psync +replconf +ping\n"
        f"user sentinel on #{_digest(sentinel)} resetkeys allchannels -@all +ping +info +role +multi +exec +slaveof +replicaof "
        "+config|rewrite +publish +subscribe +client|setname +client|kill +script|kill\n"
    )


def acl_of_sentinels(password: str, sentinel: str) -> str:
    """Return the Sentinels' users: the application may ask who the master is, they themselves may do all."""
    return (
        "user default off resetpass\n"
        f"user sse on #{_digest(password)} resetkeys resetchannels -@all +@connection -@dangerous +sentinel|masters +sentinel|get-master-addr-by-name +sentinel|replicas\n"
        f"user sentinel on #{_digest(sentinel)} resetkeys allchannels +@all\n"
    )


def _digest(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()


def read(path: str, name: str) -> str:
    """Return the text of the file that the variable *name* points to."""
    try:
        return Path(path).read_text()
    except OSError as error:
        raise Failed(f"{name} must be a file that can be read, got {path!r}: {error.strerror}.") from None


def self_signed() -> dict[str, str]:
    """Return a certificate for a first try, good for a year."""
    say("No TLS_CERT: a self-signed certificate for sse-nginx, which browsers will warn of.")
    with tempfile.TemporaryDirectory() as folder:
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "365",
                   "-subj", "/CN=sse-nginx", "-addext", "subjectAltName=DNS:sse-nginx,DNS:localhost",
                   "-keyout", f"{folder}/tls.key", "-out", f"{folder}/tls.crt"]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            raise Failed("openssl must make a certificate, could not. Give TLS_CERT and TLS_KEY.") from None
        return {name: (Path(folder) / name).read_text() for name in ("tls.crt", "tls.key")}


# --- The smoke test


def smoke(kubectl: Kubectl, options: argparse.Namespace) -> None:
    """Run the smoke test's Job, and a rolling restart under its streams. Raises Failed if it found anything."""
    _, objects = prepared(kubectl, options)
    namespace = namespace_of(objects)
    if setting(objects, "SSE_AUTH") == "jwt" and not setting(objects, "SSE_JWT_SECRET_FILE"):
        why = "The smoke test makes its own tokens with the key in SSE_JWT_SECRET_FILE, and the overlay has none: only your identity provider can make them."
        if options.command == "smoke":
            raise Failed(f"{why} Test with a token of its: make loadtest-cluster OPTIONS='--token=…'")
        say(f"{why} It is left out.")
        return
    items = smoke_objects(objects)
    check_images(items, options.overlay)
    (job,) = (o for o in items if o["kind"] == "Job")
    name = job["metadata"]["name"]
    kubectl.ask("create", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    say(f"Smoke test {name} runs.")
    try:
        if follow(kubectl, namespace, name, until="holding"):
            say("Restarting the application under its streams.")
            kubectl.ask("-n", namespace, "rollout", "restart", "deployment/sse-app")
            wait_for(kubectl, namespace, "deployment/sse-app", time.monotonic() + 1800, options.overlay, among=["deployment/sse-app"])
            # The rollout is over when the new pods are ready; the old ones only begin to drain.
            wait_for_old(kubectl, namespace, "sse-app", HOLD_SECONDS)
            kubectl.ask("-n", namespace, "exec", f"job/{name}", "--", "touch", "/tmp/stop")
        follow(kubectl, namespace, name, until="")
        print(kubectl.ask("-n", namespace, "logs", f"job/{name}", "--tail=-1"), end="", flush=True)
        status = (kubectl.get("-n", namespace, "job", name) or {}).get("status", {})
        if not status.get("succeeded"):
            raise Failed(f"The smoke test must pass, did not (see above). To go back: make rollback OVERLAY={options.overlay}")
    finally:
        kubectl.run("-n", namespace, "delete", "configmap", name, "--ignore-not-found")


def wait_for_old(kubectl: Kubectl, namespace: str, name: str, seconds: float) -> None:
    """Wait until pods that were told to end have ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pods = kubectl.get("-n", namespace, "pods", "-l", f"app.kubernetes.io/name={name}") or {"items": []}
        if not any("deletionTimestamp" in pod["metadata"] for pod in pods["items"]):
            return
        time.sleep(1)
    raise Failed(f"Pods of {name} that were told to end must end within {seconds:g} s, did not.")


def smoke_objects(objects: list[Object]) -> list[Object]:
    """Return the smoke test's Job and its ConfigMap, fitted to what *objects* deploy."""
    items = parse(Kubectl().ask("kustomize", str(HERE / "smoke")))
    namespace = namespace_of(objects)
    _, app = application(objects)
    name = f"sse-smoke-{secrets.token_hex(3)}"
    for o in items:
        o["metadata"] |= {"namespace": namespace, "name": name}
        if o["kind"] != "Job":
            continue
        spec = o["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        container["image"] = app["image"]
        container["env"].append({"name": "SMOKE_URL", "value": way_in(objects)})
        if exempts(objects):
            container["env"].append({"name": "SMOKE_EXEMPT", "value": "1"})
        for volume in spec["volumes"]:
            if "configMap" in volume:
                volume["configMap"]["name"] = name
        if any(secret == "sse-jwt" for secret in needed_secrets(objects)):
            container["env"].append({"name": "SMOKE_JWT_SECRET_FILE", "value": "/sse/jwt/secret"})
            for each in ("AUDIENCE", "ISSUER"):
                container["env"] += [{"name": f"SMOKE_JWT_{each}", "value": value} for value in [setting(objects, f"SSE_JWT_{each}")] if value]
            container["volumeMounts"].append({"name": "jwt", "mountPath": "/sse/jwt", "readOnly": True})
            spec["volumes"].append({"name": "jwt", "secret": {"secretName": "sse-jwt"}})
    return items


def way_in(objects: list[Object]) -> str:
    """Return nginx's address inside of the cluster."""
    (service,) = (o for o in objects if o["kind"] == "Service" and o["metadata"]["name"] == "sse-nginx")
    return f"{service['spec']['ports'][0]['name']}://sse-nginx"


def exempts(objects: list[Object]) -> bool:
    """Return whether nginx leaves addresses out of its limits: the component load-test."""
    files = [o["data"].get("exempt.conf", "") for o in objects if o["kind"] == "ConfigMap"]
    return any(line.strip() and not line.startswith("#") for text in files for line in text.splitlines())


def follow(kubectl: Kubectl, namespace: str, job: str, until: str, seconds: float = 900) -> bool:
    """Wait for a line *until* in the Job's log; return False if the Job ended before."""
    deadline = time.monotonic() + seconds
    watch = Watch(kubectl, namespace, [f"job/{job}"], "")
    while time.monotonic() < deadline:
        status = (kubectl.get("-n", namespace, "job", job) or {}).get("status", {})
        if until and until in kubectl.run("-n", namespace, "logs", f"job/{job}", "--tail=-1").stdout.split():
            return True
        if status.get("succeeded") or status.get("failed"):
            return False
        watch.look()
        time.sleep(1)
    raise Failed(f"Job {job} must come to its end in {seconds:g} s, did not.")


# --- The load test

MASTER, WORKER = "sse-loadtest-master", "sse-loadtest-worker"
# How loadtest/__main__.py frames them in its log.
RESULTS_BEGIN, RESULTS_END = "--- results, tar.gz in base64 ---", "--- end of results ---"


def loadtest(kubectl: Kubectl, options: argparse.Namespace) -> int:
    """Run the load test's Jobs, show their progress, bring the report here; return the run's exit status."""
    _, objects = prepared(kubectl, options)
    namespace = namespace_of(objects)
    items = loadtest_objects(objects, options)
    check_images(items, options.overlay)
    jobs = (kubectl.get("-n", namespace, "jobs", "-l", "app.kubernetes.io/component=loadtest") or {"items": []})["items"]
    if any(job.get("status", {}).get("active") for job in jobs):
        raise Failed(f"One load test must run at a time, but another one runs in namespace {namespace}. End it: kubectl -n {namespace} delete job {MASTER} {WORKER}")
    remove = ("-n", namespace, "delete", "job", MASTER, WORKER, "--ignore-not-found", "--cascade=foreground")
    confirm(kubectl, options, f"load {way_in(objects)} in namespace {namespace}")
    kubectl.ask(*remove)
    apply(kubectl, json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    try:
        lines = follow_log(kubectl, namespace, options.overlay)
    except KeyboardInterrupt:
        kubectl.run(*remove)
        say("Ended, without a report.")
        raise
    results = unpack(lines)
    if results is None:
        kubectl.run(*remove[:4], WORKER, "--ignore-not-found")  # they would look for a master for minutes
        raise Failed(f"The load test must hand over its results, did not. Its last line: {_last(chr(10).join(lines))}")
    found = json.loads(results["result.json"])
    folder = Path(options.results) / (re.sub(r"[-:]|[+].*", "", found["began"]).replace("T", "-") + "-" + found["scenario"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in results.items():
        (folder / name).write_bytes(content)
    say(f"Written: {os.path.relpath(folder)}/result.json, {os.path.relpath(folder)}/report.html")
    say(lines[-1])
    return int(found["exit_code"])


def loadtest_objects(objects: list[Object], options: argparse.Namespace) -> list[Object]:
    """Return the load test's Jobs and what they need, fitted to what *objects* deploy."""
    if not 1 <= options.workers <= 100:
        raise Failed(f"PROCESSES must be from 1 to 100, got {options.workers}.")
    if not exempts(objects) and (options.scenario != "smoke" or int(options.streams or 0) > 200):
        raise Failed(
            f"The overlay {options.overlay} must have the component load-test for more than SCENARIO=smoke: nginx refuses the 401st stream of one address, "
            f"and a worker has one. Add ../../components/load-test to k8s/overlays/{options.overlay}/kustomization.yaml, and deploy it."
        )
    items = parse(Kubectl().ask("kustomize", str(HERE / "components" / "load-test" / "run")))
    namespace = namespace_of(objects)
    _, app = application(objects)
    # Who may pull the one image may pull the other: from the same registry.
    pull = next((o["imagePullSecrets"] for o in objects if o["kind"] == "ServiceAccount" and o["metadata"]["name"] == "sse-app" and "imagePullSecrets" in o), None)
    image = loadtest_image(app["image"], options.loadtest_image)
    for o in items:
        o["metadata"]["namespace"] = namespace
        if o["kind"] == "ServiceAccount" and pull:
            o["imagePullSecrets"] = pull
        if o["kind"] != "Job":
            continue
        o["spec"]["activeDeadlineSeconds"] += int(float(options.seconds or 0))
        (container,) = o["spec"]["template"]["spec"]["containers"]
        container["image"] = image
        if o["metadata"]["name"] == WORKER:
            o["spec"]["parallelism"] = o["spec"]["completions"] = options.workers
            continue
        fitted = {"--expect-workers": options.workers, "--host": way_in(objects)}
        command = [f"{flag}={fitted.get(flag, value)}" if value else flag for flag, _, value in (word.partition("=") for word in container["command"])]
        for name in ("scenario", "streams", "seconds", "rate", "thresholds"):
            command += [f"--{name}={getattr(options, name)}"] if getattr(options, name) else []
        # The certificate may be one of `make secrets`.
        command += ["--insecure"] if fitted["--host"].startswith("https:") else []
        claims = {"aud": setting(objects, "SSE_JWT_AUDIENCE"), "iss": setting(objects, "SSE_JWT_ISSUER")}
        claims = {name: value for name, value in claims.items() if value}
        command += [f"--claims={json.dumps(claims)}"] if claims else []
        container["command"] = command + shlex.split(options.options)
        # The Secret's volume may be left where an identity provider's keys are in its place.
        if setting(objects, "SSE_JWT_SECRET_FILE") and "sse-jwt" in needed_secrets(objects):
            key = {"secretKeyRef": {"name": "sse-jwt", "key": "secret"}}
            container["env"] = [{"name": "SSE_LOADTEST_SECRET", "valueFrom": key}]
    return items


def loadtest_image(app: str, given: str) -> str:
    """Return the load test's image: the one beside the application's, if none is *given*."""
    if given:
        split_image(given)
        return given
    folder, _, last = app.rpartition("/")
    if not last.startswith("app:") or "@" in last:
        raise Failed(f"LOADTEST_IMAGE must be given where the application's image is not …/app:TAG, got {app} and none. `make image push` makes both.")
    return f"{folder}/loadtest:{last.partition(':')[2]}"


def follow_log(kubectl: Kubectl, namespace: str, overlay: str) -> list[str]:
    """Show the master's log while it grows, without the packed results; return all of it when its Job is over."""
    lines: list[str] = []
    watch = Watch(kubectl, namespace, [f"job/{MASTER}", f"job/{WORKER}"], "")
    packed = False
    while True:
        status = (kubectl.get("-n", namespace, "job", MASTER) or {}).get("status", {})
        over = bool(status.get("succeeded") or status.get("failed"))
        for number, line in enumerate(kubectl.lines("-n", namespace, "logs", "-f", f"job/{MASTER}", "--tail=-1")):
            if number < len(lines):
                continue  # the connection broke, and this was shown before
            lines.append(line)
            # What follows them is the verdict, once more; it is said when they are on the disk.
            packed = packed or line == RESULTS_BEGIN
            if not packed and not line.startswith("Written: "):
                say(line)
        if over:
            return lines
        watch.look()
        time.sleep(1)


def unpack(lines: list[str]) -> dict[str, bytes] | None:
    """Return the files that a log ends with, or None."""
    if RESULTS_BEGIN not in lines or RESULTS_END not in lines:
        return None
    text = "".join(lines[lines.index(RESULTS_BEGIN) + 1 : lines.index(RESULTS_END)])
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(text)), mode="r:gz") as archive:
        # By their names: an archive may hold others.
        opened = {name: archive.extractfile(name) for name in ("result.json", "report.html")}
        return {name: content.read() for name, content in opened.items() if content}


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, flush=True)


COMMANDS: dict[str, Callable[[Kubectl, argparse.Namespace], int | None]] = {"deploy": deploy, "diff": diff, "smoke": smoke, "rollback": rollback, "undeploy": undeploy, "secrets": make_secrets, "loadtest-cluster": loadtest}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="deploy.py", description="Bring an overlay of k8s/overlays to a cluster.")
    parser.add_argument("command", choices=["render", *COMMANDS])
    parser.add_argument("--overlay", default="local", help="a folder of k8s/overlays (default: local)")
    parser.add_argument("--context", default="", help="kubectl's context (default: the current one)")
    parser.add_argument("--image", default="", help="the application's image, NAME:TAG or NAME@sha256:…")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--no-smoke", action="store_true", help="leave the smoke test out")
    parser.add_argument("--replace", default="", help="secrets: make new ones for these that are there, names with commas; 1: for all")
    run = parser.add_argument_group("loadtest-cluster")
    run.add_argument("--workers", type=int, default=1, help="pods that hold streams (default: 1)")
    run.add_argument("--loadtest-image", default="", help="the load test's image (default: the one beside the application's)")
    for name in ("scenario", "streams", "seconds", "rate", "thresholds", "options"):
        run.add_argument(f"--{name}", default="smoke" if name == "scenario" else "", help="as `make loadtest` takes it")
    run.add_argument("--results", default=str(ROOT / ".run" / "loadtest"), help="folder for the report (default: .run/loadtest)")
    return parser


def main(argv: list[str]) -> int:
    """Run one command; return the exit status."""
    options = parser().parse_args(argv)
    try:
        if options.command == "render":
            check_client(Kubectl())
            print(render(options.overlay, options.image), end="")
        else:
            return COMMANDS[options.command](Kubectl(options.context), options) or 0
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
