"""
`make deploy` says in one sentence what is wrong, and changes nothing before.

kubectl is a script that answers as the cluster would; rendering is the real one's.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from k8s import deploy
from k8s.deploy import Failed, acl, containers, needed_secrets, secret_data, split_image
from loadtest.__main__ import _print_results
from tests.k8s.rendered import ROOT, composed, overlay
from tests.live import connect

# Answers by the first words of the question; what only renders goes to the real kubectl.
FAKE = '''#!{python} -SE
import json, os, sys
arguments = [a for a in sys.argv[1:] if not a.startswith("--context=")]
if arguments[0] in ("kustomize", "patch"):
    os.execv({kubectl!r}, [{kubectl!r}, *arguments])
world = json.load(open({world!r}))
line = " ".join(arguments)
with open({log!r}, "a") as log:
    log.write(line + "\\n")
    if "-f -" in line:
        log.write("<<< " + sys.stdin.read().replace("\\n", " ") + "\\n")
for words, (code, out, err) in world:
    if all(word in line for word in words.split()):
        sys.stdout.write(out)
        sys.stderr.write(err)
        sys.exit(code)
sys.stderr.write("nothing known of: " + line)
sys.exit(99)
'''
IMAGE = "registry.example.com:5000/sse/app:1.2"
Answer = tuple[str, tuple[int, str, str]]


def version(client: str = "v1.36.1", server: str | None = "v1.36.0") -> list[Answer]:
    answer: dict[str, Any] = {"clientVersion": {"gitVersion": client}}
    both = answer | ({"serverVersion": {"gitVersion": server}} if server else {})
    return [("version --client", (0, json.dumps(answer), "")), ("version -o", (0, json.dumps(both), ""))]


def secret(*keys: str) -> str:
    return json.dumps({"data": dict.fromkeys(keys, "eA==")})


SECRETS: list[Answer] = [
    ("get secret sse-redis", (0, secret("password", "users.acl", "url"), "")),
    ("get secret sse-jwt", (0, secret("secret"), "")),
    ("get secret sse-tls", (0, secret("tls.crt", "tls.key"), "")),
]
GOOD: list[Answer] = [
    ("config get-contexts", (0, "prod\nkind-kit\n", "")),
    ("config current-context", (0, "prod\n", "")),
    *version(),
    ("api-resources", (0, "something\n", "")),
    ("get namespace", (0, "{}", "")),
    *SECRETS,
    ("get deployment/ --show-managed-fields", (0, "", "")),
    ("diff", (1, "+  replicas: 3\n", "")),
    ("apply", (0, "deployment.apps/sse-app serverside-applied\n", "")),
    ("rollout status", (0, "successfully rolled out\n", "")),
    ("delete", (0, "deleted\n", "")),
]


class Run:
    """One call of deploy.py against a made-up cluster."""

    def __init__(self, folder: Path, kubectl: str) -> None:
        self.folder, self.kubectl = folder, kubectl

    def __call__(
        self, *arguments: str, world: list[Answer] | None = None, first: list[Answer] | None = None, env: dict[str, str] | None = None, fake: bool = True, tree: Path = ROOT
    ) -> "subprocess.CompletedProcess[str]":
        programs = self.folder / "programs"
        programs.mkdir(exist_ok=True)
        (self.folder / "log").write_text("")
        (self.folder / "world").write_text(json.dumps([*(first or []), *(GOOD if world is None else world)]))
        script = programs / "kubectl"
        if fake:
            script.write_text(FAKE.format(python=sys.executable, kubectl=self.kubectl, world=str(self.folder / "world"), log=str(self.folder / "log")))
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
        else:
            script.unlink(missing_ok=True)
        for tool in ("openssl",):
            if not (programs / tool).exists() and shutil.which(tool):
                (programs / tool).symlink_to(str(shutil.which(tool)))
        return subprocess.run(
            [sys.executable, str(tree / "k8s/deploy.py"), *arguments],
            env={"PATH": str(programs), "HOME": str(self.folder)} | (env or {}), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    @property
    def asked(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def run(tmp_path: Path, require: Callable[..., str]) -> Run:
    return Run(tmp_path, require("kubectl"))


def replica_set(revision: str, image: str, restarted: str) -> dict[str, Any]:
    annotations = {"kubectl.kubernetes.io/restartedAt": restarted} if restarted else {}
    labels = {"app.kubernetes.io/name": "x", "pod-template-hash": f"h{revision}"}
    template: dict[str, Any] = {"metadata": {"labels": labels} | ({"annotations": annotations} if annotations else {}), "spec": {"image": image}}
    return {"metadata": {"annotations": {"deployment.kubernetes.io/revision": revision}}, "spec": {"template": template}}


# A rollout that is not over, and nothing to see.
WAITING: list[Answer] = [
    ("rollout status deployment/sse-app", (1, "", "error: timed out waiting for the condition")),
    ("get deployment/sse --show-managed-fields", (0, "", "")),
    ("get deployment/", (0, "{}", "")),
    ("get events", (0, "", "")),
    ("logs", (0, "", "")),
]
DEPLOY = ("deploy", "--overlay", "staging", "--image", IMAGE, "--yes", "--no-smoke")


class TestWhatIsWrong:
    """Each failure is one sentence that names what to do; nothing is applied."""

    @pytest.mark.parametrize(
        ("arguments", "first", "sentence"),
        [
            (DEPLOY, version(client="v1.31.9"), "kubectl must be 1.32 or newer, got 1.31. "),
            (DEPLOY, [("config current-context", (1, "", "error: current-context is not set"))], "kubectl must have a current context, has none. "),
            ((*DEPLOY, "--context", "prd"), [], "CONTEXT must be one that kubectl knows (prod, kind-kit), got 'prd'."),
            (("deploy", "--yes"), [], "The overlay local must go to a laptop's cluster (kind, minikube, …), got the context 'prod'"),
            (DEPLOY, [*version()[:1], ("version -o", (1, '{"clientVersion": {}}', "Unable to connect to the server: dial tcp 192.0.2.1:6443: i/o timeout"))], "The cluster of context prod must answer, said: Unable to connect to the server"),
            (DEPLOY, version(server="v1.32.0"), "The cluster must be Kubernetes 1.33 or newer, got 1.32."),
            (("deploy", "--overlay", "staging", "--yes"), [], "The overlay staging must name an image that its cluster can pull, has sse-kit/app:0.1.0. "),
            (("smoke", "--overlay", "staging"), [], "The overlay staging must name an image that its cluster can pull, has sse-kit/app:0.1.0. "),
            (("deploy", "--overlay", "staging", "--image", "registry.example.com/app"), [], "IMAGE must be NAME:TAG or NAME@sha256:…, got 'registry.example.com/app'."),
            (DEPLOY, [("get secret sse-redis", (0, "", ""))], "Secret sse-redis must be in namespace sse of prod, is not. Make it: make secrets OVERLAY=staging"),
            (DEPLOY, [("get secret sse-redis", (0, secret("url"), ""))], "Secret sse-redis must be in namespace sse of prod, has no password, users.acl. "),
            (DEPLOY, [("api-resources monitoring.coreos.com", (0, "", ""))], "The cluster must know PodMonitor, PrometheusRule (monitoring.coreos.com), does not. "),
            (("deploy", "--overlay", "stage"), [], "OVERLAY must be one of local, production, staging, got 'stage'."),
            (("deploy", "--overlay", "staging", "--image", IMAGE), [], "Somebody must confirm to apply this to namespace sse (prod), but there is nobody to ask. Give YES=1."),
        ],
    )  # fmt: skip
    def test_before_anything_changes(self, run, arguments, first, sentence):
        """No cluster, a wrong context, a missing secret, a missing image, an old kubectl, and more."""
        done = run(*arguments, first=first)

        assert 1 == done.returncode, done.stderr
        assert sentence in done.stderr
        assert 1 == done.stderr.count("\n"), done.stderr
        assert "Traceback" not in done.stderr
        assert "apply" not in run.asked.split()

    def test_no_kubectl(self, run):
        """Where there is no kubectl at all."""
        done = run(*DEPLOY, fake=False)

        assert 1 == done.returncode
        assert "kubectl 1.32 or newer must be on PATH, found none." in done.stderr

    def test_versions_that_are_far_apart(self, run):
        """A skew that Kubernetes does not support is said, and does not stop anything."""
        done = run(*DEPLOY, first=version(client="v1.32.4"))

        assert 0 == done.returncode, done.stderr
        assert "kubectl 1.32 and the cluster 1.36 are more than one version apart" in done.stdout

    def test_an_image_that_cannot_be_pulled(self, run, monkeypatch):
        """The reason that a person needs, events and log lines, and the way back."""
        status = {"initContainerStatuses": [], "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{IMAGE}"'}}}]}
        pods = {"items": [{"metadata": {"name": "sse-app-1"}, "status": status}]}
        first: list[Answer] = [
            ("get pods", (0, json.dumps(pods), "")),
            ("get events", (0, "LAST SEEN  REASON\n1s  Failed to pull image\n", "")),
            *WAITING,
        ]  # fmt: skip
        done = run(*DEPLOY, first=first, env={"SSE_KIT_STUCK_SECONDS": "0"})

        assert 1 == done.returncode
        assert f'deployment/sse-app must come up, but sse-app-1 does not: ImagePullBackOff: Back-off pulling image "{IMAGE}"' in done.stderr
        assert "Failed to pull image" in done.stderr
        assert "To go back: make rollback OVERLAY=staging" in done.stderr

    def test_a_redis_that_does_not_start(self, run):
        """The application waits for it, and is waited for first: the reason comes at once all the same."""
        status = {"conditions": [{"reason": "Unschedulable", "message": "pod has unbound immediate PersistentVolumeClaims"}]}
        pods = {"items": [{"metadata": {"name": "sse-redis-0"}, "status": status}]}
        late: list[Answer] = [("rollout status", (1, "", 'error: deployment "sse-app" exceeded its progress deadline'))]
        first: list[Answer] = [*late, *WAITING, ("get pods name=sse-redis", (0, json.dumps(pods), "")), ("get pods", (0, '{"items": []}', ""))]
        done = run(*DEPLOY, first=first, env={"SSE_KIT_STUCK_SECONDS": "0"})

        assert 1 == done.returncode
        assert "statefulset/sse-redis must come up, but sse-redis-0 does not: no node has room: pod has unbound immediate PersistentVolumeClaims" in done.stderr

    def test_pods_that_may_not_be_made(self, run):
        """A quota or a policy refuses them: there is no pod to look at, but the Deployment knows."""
        refused = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": 'pods "sse-app-1" is forbidden: failed quota: team: must specify limits.cpu'}
        live = {"status": {"conditions": [refused]}}
        first: list[Answer] = [("get deployment/ --show-managed-fields", (0, "", "")), ("get deployment/sse-app", (0, json.dumps(live), "")), *WAITING, ("get pods", (0, '{"items": []}', ""))]
        done = run(*DEPLOY, first=first, env={"SSE_KIT_STUCK_SECONDS": "0"})

        assert 1 == done.returncode
        assert "deployment/sse-app must come up, but deployment/sse-app does not: FailedCreate: pods" in done.stderr
        assert "must specify limits.cpu" in done.stderr

    def test_a_pod_that_is_not_ready(self, run):
        """It may become so, but a wrong password does not go away: what it says is shown, once."""
        pods = {"items": [{"metadata": {"name": "sse-app-1"}, "status": {"containerStatuses": [{"started": True, "ready": False, "state": {"running": {}}}]}}]}
        late: list[Answer] = [("rollout status", (1, "Waiting for 1 of 3\n", 'error: deployment "sse-app" exceeded its progress deadline'))]
        first: list[Answer] = [*late, ("logs", (0, '{"event": "log_unavailable", "error": "invalid password"}\n', "")), ("get pods", (0, json.dumps(pods), "")), *WAITING]
        done = run(*DEPLOY, first=first, env={"SSE_KIT_STUCK_SECONDS": "0"})

        assert 1 == done.returncode
        assert 'sse-app-1 runs and is not ready. Its last log lines:\n  {"event": "log_unavailable", "error": "invalid password"}\n' in done.stdout
        assert "Waiting for 1 of 3" in done.stdout
        assert "exceeded its progress deadline" in done.stderr

    def test_a_cluster_that_grows(self, monkeypatch):
        """A pod that no node has room for is waited for longer: a new node takes minutes."""
        now, reasons = [0.0], {"pod": deploy.NO_NODE + "0/3 nodes are available"}
        monkeypatch.setattr(deploy, "stuck_pods", lambda *_: iter(reasons.items()))
        monkeypatch.setattr(deploy, "explain", lambda *_: None)
        monkeypatch.setattr(deploy.time, "monotonic", lambda: now[0])
        watch = deploy.Watch(deploy.Kubectl(), "sse", ["deployment/sse-app"], "")
        for now[0] in (0, 60, 300):
            watch.look()
        now[0] = 400
        with pytest.raises(Failed, match="no node has room: 0/3 nodes are available"):
            watch.look()

        reasons["pod"] = "ImagePullBackOff: x"
        watch = deploy.Watch(deploy.Kubectl(), "sse", ["deployment/sse-app"], "")
        watch.look()
        now[0] += 60
        with pytest.raises(Failed, match="ImagePullBackOff"):
            watch.look()

    def test_fields_of_another_manager(self, run):
        """A conflict is shown, never forced."""
        first: list[Answer] = [("apply", (1, "", 'Apply failed with 1 conflict: conflict with "hpa": .spec.replicas\n'))]
        done = run(*DEPLOY, first=first)

        assert 1 == done.returncode
        assert ".spec.replicas" in done.stderr
        assert "No one else may own these fields" in done.stderr
        assert "kubectl apply --server-side --field-manager=sse-kit --force-conflicts" in done.stderr
        assert not any("--force-conflicts" in line for line in run.asked.splitlines() if line.startswith("apply"))


class TestWhatIsDone:
    def test_deploy(self, run):
        """Diff first, then one server-side apply of exactly what is rendered, then each workload is waited for."""
        done = run(*DEPLOY)
        lines = [line for line in run.asked.splitlines() if not line.startswith("<<<")]
        order = [next(i for i, line in enumerate(lines) if word in line) for word in ("version", "secret sse-redis", "diff", "apply", "rollout status")]

        assert 0 == done.returncode, done.stderr
        assert sorted(order) == order
        assert "+  replicas: 3" in done.stdout
        assert "--server-side --field-manager=sse-kit" in next(line for line in lines if line.startswith("apply"))
        assert f"image: {IMAGE}" in run.asked
        assert {"deployment/sse-app", "deployment/sse-nginx", "statefulset/sse-redis"} == set(re.findall(r"rollout status (\S+)", run.asked))

    def test_what_an_earlier_overlay_brought(self, run):
        """It stays, and is named with the command that deletes it; what the overlay has is not."""
        items = [{"kind": "HorizontalPodAutoscaler", "metadata": {"name": "sse-app"}}, {"kind": "Service", "metadata": {"name": "sse-app"}}]
        done = run(*DEPLOY, first=[("get horizontalpodautoscaler -l app.kubernetes.io/part-of=sse-kit", (0, json.dumps({"items": items}), ""))])

        assert 0 == done.returncode, done.stderr
        assert "still there. If nobody needs it: kubectl -n sse delete horizontalpodautoscaler/sse-app\n" in done.stdout
        assert not any("delete" in line.split() for line in run.asked.splitlines() if not line.startswith("<<<"))

    def test_an_autoscaler_is_new(self, run):
        """The number of pods that is there stays: somebody else owns it before we let go of it."""
        owner = {"manager": "sse-kit", "operation": "Apply", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
        live = {"metadata": {"managedFields": [owner]}, "spec": {"replicas": 6}}
        first: list[Answer] = [("get deployment/ --show-managed-fields", (0, json.dumps(live), ""))]
        done = run("deploy", "--overlay", "production", "--image", IMAGE, "--yes", "--no-smoke", first=first)
        applied = [line for line in run.asked.splitlines() if line.startswith("apply")]
        (number, *_) = (json.loads(line[4:]) for line in run.asked.splitlines() if line.startswith('<<< {"apiVersion": "apps/v1"'))

        assert 0 == done.returncode, done.stderr
        assert ["sse-kit-autoscaler", "sse-kit-autoscaler", "sse-kit"] == [line.partition("--field-manager=")[2].split()[0] for line in applied]
        assert {"replicas": 6} == number["spec"]

    def test_an_autoscaler_was_there(self, run):
        """Then the number is its own, and nothing is handed over."""
        live = {"metadata": {"managedFields": [{"manager": "kube-controller-manager", "fieldsV1": {"f:spec": {"f:replicas": {}}}}]}, "spec": {"replicas": 6}}
        done = run("deploy", "--overlay", "production", "--image", IMAGE, "--yes", "--no-smoke", first=[("get deployment/ --show-managed-fields", (0, json.dumps(live), ""))])

        assert 0 == done.returncode, done.stderr
        assert "sse-kit-autoscaler" not in run.asked

    def test_nothing_changes(self, run):
        """Without a difference nothing is applied, and nobody is asked."""
        done = run(*(a for a in DEPLOY if a != "--yes"), first=[("diff", (0, "", ""))])

        assert 0 == done.returncode, done.stderr
        assert "Nothing changes." in done.stdout
        assert "apply" not in run.asked.split()

    def test_rollback(self, run):
        """
        Both Deployments go back to the version of before, which a restart is not. We alone apply it: what
        `kubectl rollout undo` changes has another owner beside us from then on, and the next deploy a conflict.
        """
        revisions = [("1", "old", ""), ("2", "new", ""), ("3", "new", "2026-11-21T15:00:00Z")]
        sets = {"items": [replica_set(*each) for each in revisions]}
        live = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x", "namespace": "sse", "labels": {}, "managedFields": []}}
        live |= {"spec": {"replicas": 7, "minReadySeconds": 5, "template": replica_set("3", "new", "x")["spec"]["template"]}, "status": {}}
        first: list[Answer] = [("get replicasets", (0, json.dumps(sets), "")), ("get deployment/", (0, json.dumps(live), ""))]
        done = run("rollback", "--overlay", "staging", "--yes", first=first)
        changes = [line for line in run.asked.splitlines() if not line.startswith("<<<") and {"apply", "undo", "patch", "set"} & set(line.split())]
        (owned, *others) = (json.loads(line[4:]) for line in run.asked.splitlines() if line.startswith("<<< "))

        assert 0 == done.returncode, done.stderr
        assert "deployment/sse-app goes back to revision 1." in done.stdout
        assert "deployment/sse-nginx goes back to revision 1." in done.stdout
        assert 2 == len(changes) == 1 + len(others)
        assert all("apply --server-side --field-manager=sse-kit --force-conflicts" in line for line in changes)
        assert {"name": "x", "namespace": "sse", "labels": {}} == owned["metadata"]
        assert {"apiVersion", "kind", "metadata", "spec"} == set(owned)
        assert {"replicas": 7, "minReadySeconds": 5, "template": {"metadata": {"labels": {"app.kubernetes.io/name": "x"}}, "spec": {"image": "old"}}} == owned["spec"]

    def test_rollback_of_autoscaled_pods(self, run):
        """Their number stays the autoscaler's."""
        live = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x", "namespace": "sse", "labels": {}}}
        live |= {"spec": {"replicas": 7, "template": replica_set("1", "old", "")["spec"]["template"]}}
        sets = {"items": [replica_set("1", "old", ""), replica_set("2", "new", "")]}
        first: list[Answer] = [("get replicasets", (0, json.dumps(sets), "")), ("get deployment/", (0, json.dumps(live), ""))]
        done = run("rollback", "--overlay", "production", "--yes", first=first)

        assert 0 == done.returncode, done.stderr
        assert all("replicas" not in json.loads(line[4:])["spec"] for line in run.asked.splitlines() if line.startswith("<<< "))

    def test_rollback_of_the_first_version(self, run):
        """Where there is none before, it is said."""
        sets = {"items": [replica_set("1", "new", ""), replica_set("2", "new", "2026-11-21T15:00:00Z")]}
        done = run("rollback", "--overlay", "staging", "--yes", first=[("get replicasets", (0, json.dumps(sets), "")), ("get deployment/", (0, "{}", ""))])

        assert 0 == done.returncode, done.stderr
        assert "deployment/sse-app has no version of before, and stays." in done.stdout
        assert "apply" not in run.asked.split()

    def test_undeploy_keeps_secrets_and_volumes(self, run):
        """The namespace with Secrets and volumes stays."""
        done = run("undeploy", "--overlay", "staging", "--yes")
        deleted = json.loads(run.asked.split("<<< ", 1)[1].splitlines()[0])["items"]

        assert 0 == done.returncode, done.stderr
        assert {"Namespace", "Secret", "PersistentVolumeClaim"}.isdisjoint({o["kind"] for o in deleted})
        assert {"Deployment", "StatefulSet", "Service", "ConfigMap"} <= {o["kind"] for o in deleted}

    def test_render(self, run):
        """What is printed is what would be applied."""
        done = run("render", "--overlay", "staging", "--image", IMAGE)

        assert f"image: {IMAGE}" in done.stdout
        assert "sse-kit/app" not in done.stdout


class TestSecrets:
    def made(self, run: Run) -> dict[str, Any]:
        objects = [json.loads(line[4:]) for line in run.asked.splitlines() if line.startswith("<<< ")]
        return {o["metadata"]["name"]: o["data"] for o in objects if o["kind"] == "Secret"}

    def test_at_random(self, run):
        """All that the overlay needs, with every key, none of it on a command line or on the screen."""
        done = run("secrets", "--overlay", "staging", "--yes", first=[(words, (0, "", "")) for words, _ in SECRETS])
        made = self.made(run)

        assert 0 == done.returncode, done.stderr
        assert {"sse-redis": {"password", "users.acl"}, "sse-jwt": {"secret"}, "sse-tls": {"tls.crt", "tls.key"}} == {k: set(v) for k, v in made.items()}
        assert needed_secrets(overlay("staging")) == {k: set(v) for k, v in made.items()}
        for data in made.values():
            for value in data.values():
                assert value not in done.stdout + done.stderr
        assert all("data" not in line for line in run.asked.splitlines() if not line.startswith("<<<"))

    def test_what_is_there_stays(self, run):
        """A second call makes nothing new."""
        done = run("secrets", "--overlay", "staging", "--yes")

        assert {} == self.made(run)
        assert "Secret sse-jwt is there, and stays. REPLACE=sse-jwt makes a new one." in done.stdout

    def test_one_anew(self, run, tmp_path):
        """A new certificate is no new key of tokens, and no new password."""
        done = run("secrets", "--overlay", "staging", "--yes", "--replace", "sse-tls")

        assert 0 == done.returncode, done.stderr
        assert {"sse-tls"} == set(self.made(run))
        assert "rollout restart" not in done.stdout

    def test_all_anew(self, run):
        """What pods read only when they start is named, with the way to have them read it."""
        done = run("secrets", "--overlay", "staging", "--yes", "--replace", "1")

        assert 0 == done.returncode, done.stderr
        assert {"sse-redis", "sse-jwt", "sse-tls"} == set(self.made(run))
        assert ["Pods read it when they start: kubectl -n sse rollout restart statefulset/sse-redis deployment/sse-app"] == [line for line in done.stdout.splitlines() if "restart" in line]

    def test_one_that_is_not_needed(self, run):
        """A slip in a name is said, and nothing is made."""
        done = run("secrets", "--overlay", "staging", "--yes", "--replace", "sse-tsl")

        assert 1 == done.returncode
        assert "REPLACE must be 1 for all, or some of sse-jwt, sse-redis, sse-tls, got 'sse-tsl'." in done.stderr
        assert {} == self.made(run)

    def test_from_outside(self, run, tmp_path):
        """An address of a Redis and a key of tokens that are given are taken as they are."""
        (tmp_path / "key").write_text("k" * 40 + "\n")
        nothing: list[Answer] = [(words, (0, "", "")) for words, _ in SECRETS]
        env = {"REDIS_URL": "rediss://sse:pw@redis.example.com:6380/0", "JWT_SECRET_FILE": str(tmp_path / "key")}
        done = run("secrets", "--overlay", "production", "--yes", first=nothing, env=env)
        made = self.made(run)

        assert 0 == done.returncode, done.stderr
        assert "cmVkaXNzOi8vc3NlOnB3QHJlZGlzLmV4YW1wbGUuY29tOjYzODAvMA==" == made["sse-redis"]["url"]
        assert "a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2traw==" == made["sse-jwt"]["secret"]

    def test_of_another_component(self, run):
        """A Secret without the keys that are needed now is not passed over in silence."""
        done = run("secrets", "--overlay", "staging", "--yes", first=[("get secret sse-redis", (0, secret("url"), ""))])

        assert 1 == done.returncode
        assert "Secret sse-redis must have password, users.acl, has not: another component made it. Delete it" in done.stderr
        assert "apply" not in run.asked.split()

    @pytest.mark.parametrize(
        ("env", "sentence"),
        [
            ({}, "REDIS_URL must be the address of your Redis (rediss://USER:PASSWORD@HOST:PORT/0), got none."),
            ({"REDIS_URL": "http://x"}, "got another scheme."),
            ({"REDIS_URL": "redis://x", "JWT_SECRET_FILE": "/none"}, "JWT_SECRET_FILE must be a file that can be read, got '/none'"),
            ({"REDIS_URL": "redis://x", "TLS_CERT": "/none"}, "TLS_CERT and TLS_KEY must both be given, or neither."),
        ],
    )
    def test_what_is_missing(self, run, env, sentence):
        """One sentence, and nothing is made."""
        nothing: list[Answer] = [(words, (0, "", "")) for words, _ in SECRETS]
        done = run("secrets", "--overlay", "production", "--yes", first=nothing, env=env)

        assert 1 == done.returncode
        assert sentence in done.stderr
        assert "apply" not in run.asked.split()

    def test_of_sentinels(self, run):
        """Each speaks with a password of its own, and the files say by hash whose it is."""
        keys = needed_secrets(composed(("redis-sentinel",)))["sse-redis"]
        made = secret_data("sse-redis", keys)
        passwords = {made[key] for key in ("password", "replica-password", "sentinel-password")}

        assert keys == set(made)
        assert 3 == len(passwords)
        for password in passwords:
            assert password.isalnum()
            assert password not in made["users.acl"] + made["sentinel.acl"]
        for name, key in (("sse", "password"), ("replica", "replica-password"), ("sentinel", "sentinel-password")):
            assert f"user {name} on #{hashlib.sha256(made[key].encode()).hexdigest()} " in made["users.acl"]

    def test_rights_in_redis(self, redis_factory):
        """The application may do all but administration, on its own keys; others may only PING."""
        server = redis_factory()
        for line in reversed(acl("right").splitlines()):  # `default` last: that is who we are
            connect(server).execute_command("ACL", "SETUSER", *line.split()[1:])

        def may(user: str, password: str, *command: str) -> bool:
            with redis.Redis(port=server.port, username=user, password=password) as client:
                try:
                    client.execute_command(*command)
                except (redis.AuthenticationError, redis.exceptions.NoPermissionError):
                    return False
            return True

        add = ("XADD", "{sse}:log", "*", "a", "b")
        assert not may("default", "", "PING")
        assert not may("sse", "wrong", "PING")
        assert may("probe", "none", "PING")
        assert not may("probe", "none", *add)
        for command in (add, ("PING",), ("INFO",), ("CONFIG", "GET", "maxmemory-policy")):
            assert may("sse", "right", *command), command
        for command in (("XADD", "other", "*", "a", "b"), ("FLUSHALL",), ("CONFIG", "SET", "maxmemory", "1"), ("KEYS", "*"), ("SHUTDOWN",)):
            assert not may("sse", "right", *command), command


class TestLoadTest:
    RUN = ("loadtest-cluster", "--overlay", "staging", "--image", IMAGE, "--yes")

    def world(self, tmp_path: Path, code: int, packed: bool = True) -> list[Answer]:
        """A master that has run, with its report in its log."""
        result = {"began": "2026-11-21T15:22:33+00:00", "scenario": "smoke", "exit_code": code}
        (tmp_path / "result.json").write_text(json.dumps(result))
        (tmp_path / "report.html").write_text("<html>")
        with contextlib.redirect_stdout(io.StringIO()) as text:
            _print_results(tmp_path)
        log = "     0 s  smoke: 20 streams\n" + text.getvalue() * packed + "FAILED: lost is 1, must be exactly 0\n"
        status = json.dumps({"status": {"failed" if code else "succeeded": 1}})
        return [("get jobs", (0, '{"items": []}', "")), ("get job ", (0, status, "")), ("logs -f", (0, log, ""))]

    @pytest.mark.parametrize("code", [0, 1])
    def test_run(self, run, tmp_path, code):
        """Progress, the report on the disk, the verdict last, and its exit status."""
        done = run(*self.RUN, "--results", str(tmp_path / "results"), "--workers=4", first=self.world(tmp_path, code))
        folder = tmp_path / "results" / "20261121-152233-smoke"
        items = next(json.loads(line[4:])["items"] for line in run.asked.splitlines() if line.startswith("<<< "))

        assert code == done.returncode, done.stderr
        assert "     0 s  smoke: 20 streams\n" in done.stdout
        assert "--- results" not in done.stdout
        assert "FAILED: lost is 1, must be exactly 0" == done.stdout.splitlines()[-1]
        assert "<html>" == (folder / "report.html").read_text()
        assert code == json.loads((folder / "result.json").read_text())["exit_code"]
        assert {"registry.example.com:5000/sse/loadtest:1.2"} == {c["image"] for _, c, _ in containers(items)}
        # The one before is removed first.
        assert run.asked.index("delete job") < run.asked.index("apply")
        (master,) = (c for name, c, _ in containers(items) if name == "sse-loadtest-master")
        assert [("SSE_LOADTEST_SECRET", {"name": "sse-jwt", "key": "secret"})] == [(e["name"], e["valueFrom"]["secretKeyRef"]) for e in master["env"]]

    @pytest.mark.parametrize(
        ("arguments", "first", "sentence"),
        [
            ((*RUN, "--workers=0"), [], "PROCESSES must be from 1 to 100, got 0."),
            ((*RUN, "--scenario=stress"), [], "The overlay staging must have the component load-test for more than SCENARIO=smoke"),
            ((*RUN, "--streams=5000"), [], "The overlay staging must have the component load-test"),
            ((*RUN[:3], "--image", "registry.example.com/x@sha256:" + "0" * 64, "--yes"), [], "LOADTEST_IMAGE must be given where the application's image is not …/app:TAG"),
            (RUN, [("get jobs", (0, '{"items": [{"status": {"active": 1}}]}', ""))], "One load test must run at a time, but another one runs in namespace sse."),
            (RUN[:-1], [("get jobs", (0, '{"items": []}', ""))], "Somebody must confirm to load https://sse-nginx in namespace sse (prod)"),
        ],
    )  # fmt: skip
    def test_what_is_wrong(self, run, arguments, first, sentence):
        """One sentence, and nothing is begun."""
        done = run(*arguments, first=first)

        assert 1 == done.returncode
        assert sentence in done.stderr
        assert 1 == done.stderr.count("\n"), done.stderr
        assert "apply" not in run.asked.split()

    def test_without_a_report(self, run, tmp_path):
        """A master that could not run at all says why, and so do we."""
        done = run(*self.RUN, first=self.world(tmp_path, 2, packed=False))

        assert 1 == done.returncode
        assert "The load test must hand over its results, did not. Its last line: FAILED: lost is 1" in done.stderr

    def test_workers_that_do_not_start(self, run):
        """As with `make deploy`: the reason, after a while."""
        status = {"conditions": [{"reason": "Unschedulable", "message": "0/3 nodes are available"}]}
        pods = {"items": [{"metadata": {"name": "sse-loadtest-worker-1"}, "status": status}]}
        first: list[Answer] = [
            ("get pods job-name=sse-loadtest-worker", (0, json.dumps(pods), "")), ("get pods", (0, '{"items": []}', "")), ("get events", (0, "", "")),
            ("get jobs", (0, '{"items": []}', "")), ("get job ", (0, "{}", "")), ("logs", (1, "", "")),
        ]  # fmt: skip
        done = run(*self.RUN, first=first, env={"SSE_KIT_STUCK_SECONDS": "0"})

        assert 1 == done.returncode
        assert "job/sse-loadtest-worker must come up, but sse-loadtest-worker-1 does not: no node has room: 0/3 nodes are available" in done.stderr


OWN = """
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: sse
resources: [../../base, priority.yaml]
components: [../../components/external-redis, ../../components/jwt]
images:
  - {name: sse-kit/app, newName: registry.example.com/team/sse, newTag: "1.0"}
patches:
  - patch: '{apiVersion: v1, kind: Namespace, metadata: {name: sse}, $patch: delete}'
  - target: {kind: Deployment, name: sse-app}
    patch: |-
      apiVersion: apps/v1
      kind: Deployment
      metadata: {name: sse-app}
      spec:
        template:
          spec:
            containers:
              - name: app
                env:
                  - {name: SSE_JWT_SECRET_FILE, $patch: delete}
                  - {name: SSE_JWKS_URL, value: "https://id.example.com/keys"}
"""


class TestOwnOverlay:
    """An overlay as teams write them: an image of their own, an identity provider, a namespace of somebody else, an object of none."""

    @pytest.fixture
    def own(self, tmp_path: Path) -> Path:
        for name in ("k8s", "nginx"):
            shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
        folder = tmp_path / "tree/k8s/overlays/own"
        folder.mkdir()
        (folder / "kustomization.yaml").write_text(OWN)
        (folder / "priority.yaml").write_text("{apiVersion: scheduling.k8s.io/v1, kind: PriorityClass, metadata: {name: sse}, value: 1000}")
        return tmp_path / "tree"

    @pytest.mark.parametrize("image", [IMAGE, "registry.example.com/team/sse:1.1", "registry.example.com/x@sha256:" + "0" * 64])
    def test_image(self, run, own, image):
        """IMAGE= counts, whatever the overlay calls the image."""
        done = run("render", "--overlay", "own", "--image", image, tree=own)

        assert f"image: {image}\n" in done.stdout, done.stderr
        assert "registry.example.com/team/sse:1.0" not in done.stdout

    def test_deploy(self, run, own):
        """It is deployed without a look at the namespace; the smoke test, which has no key to make tokens with, says that it is left out."""
        done = run("deploy", "--overlay", "own", "--yes", first=[("get namespace", (1, "", "Error from server (Forbidden)"))], tree=own)

        assert 0 == done.returncode, done.stderr
        assert "serverside-applied" in done.stdout
        assert "only your identity provider can make them. It is left out." in done.stdout
        assert "create" not in run.asked.split()

    def test_smoke(self, run, own):
        """Asked for by name, it is an error."""
        done = run("smoke", "--overlay", "own", "--yes", tree=own)

        assert 1 == done.returncode
        assert "make loadtest-cluster OPTIONS='--token=…'" in done.stderr

    def test_secrets(self, run, own):
        """They are made without touching the namespace."""
        nothing: list[Answer] = [(words, (0, "", "")) for words, _ in SECRETS]
        done = run("secrets", "--overlay", "own", "--yes", first=[("get namespace", (1, "", "Error from server (Forbidden)")), *nothing], env={"REDIS_URL": "redis://x"}, tree=own)

        assert 0 == done.returncode, done.stderr
        assert "Secret sse-redis made: url." in done.stdout
        assert "Namespace" not in run.asked

    def test_load_test(self, run, own):
        """A token of the provider's goes alone: with a key beside it the load test would refuse both."""
        run("loadtest-cluster", "--overlay", "own", "--loadtest-image", "x:1", "--options=--token=t", "--yes", first=[("get jobs", (0, '{"items": []}', "")), ("get job ", (0, '{"status": {"failed": 1}}', "")), ("logs -f", (0, "", ""))], tree=own)
        items = next(json.loads(line[4:])["items"] for line in run.asked.splitlines() if line.startswith("<<< "))
        (master,) = (c for name, c, _ in containers(items) if name == "sse-loadtest-master")

        assert "--token=t" in master["command"]
        assert "env" not in master

    def test_another_name_for_everything(self, run, own):
        """A prefix would break the names that the parts know each other by: one sentence."""
        file = own / "k8s/overlays/own/kustomization.yaml"
        file.write_text(file.read_text() + "namePrefix: a-\n")
        done = run("deploy", "--overlay", "own", "--yes", tree=own)

        assert 1 == done.returncode
        assert "The overlay must have the Deployment sse-app with its container app, has not. Take namePrefix and nameSuffix out" in done.stderr


class TestNamesOfImages:
    @pytest.mark.parametrize(
        ("image", "parts"),
        [
            ("registry.example.com:5000/a/b:1", ("registry.example.com:5000/a/b", "1", "")),
            ("b:1", ("b", "1", "")),
            ("a/b@sha256:" + "0" * 64, ("a/b", "", "sha256:" + "0" * 64)),
            ("a/b:1@sha256:" + "0" * 64, ("a/b", "1", "sha256:" + "0" * 64)),
        ],
    )
    def test_parts(self, image, parts):
        """A port is no tag; a digest stands after a tag or instead of it."""
        assert parts == split_image(image)

    @pytest.mark.parametrize("image", ["registry.example.com:5000/a/b", "b", ":1", "a@sha256:12", ""])
    def test_without_a_version(self, image):
        """An image without a version is another one tomorrow."""
        with pytest.raises(Failed):
            split_image(image)


def test_no_dependency():
    """deploy.py and images.py run where nothing is installed but Python."""
    for name in ("deploy.py", "images.py"):
        run = subprocess.run([sys.executable, "-S", "-I", str(ROOT / "k8s" / name), "--help"], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": ""})

        assert run.returncode == 0, run.stderr
        assert "usage: " in run.stdout


def test_python_of_a_laptop():
    """macOS has Python 3.9, which knows neither `match` nor an annotation `str | None` that is evaluated."""
    files = [str(ROOT / "k8s" / name) for name in ("deploy.py", "images.py")]
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--target-version=py39", "--select=FA102", *files], capture_output=True, text=True, check=False)

    assert 0 == run.returncode, run.stdout
