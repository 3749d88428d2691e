"""
The rendered manifests run: rollouts, scaling and deaths, with an audience that misses nothing.

cluster.py says what this does not show. The last part changes one line of the
YAML at a time and sees the damage: what runs is the YAML.
"""

import copy
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from k8s.deploy import MASTER, acl, loadtest_objects, parser, unpack
from tests.k8s.cluster import NEWS_SECONDS, Cluster, UnknownField, check
from tests.k8s.rendered import ROOT, overlay, pick
from tests.k8s.stage import Stage
from tests.loadtest.runs import PATIENT

Objects = list[dict[str, Any]]
APP, NGINX, REDIS = "sse-app", "sse-nginx", "sse-redis"
SECRETS = {REDIS: {"password": "of-this-test", "users.acl": acl("of-this-test")}}

# What must not be lost is looked at again and again; all of it is one story.
pytestmark = pytest.mark.timeout(480)


@pytest.fixture(scope="module")
def before() -> Iterator[Path]:
    """The tree of the commit before this one; without git, a copy of this one."""
    with tempfile.TemporaryDirectory(prefix="sse-before-") as folder:
        Path(folder).chmod(0o755)
        archive = subprocess.run(["git", "archive", "HEAD~1", "app", "k8s"], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode == 0:
            subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        else:
            for name in ("app", "k8s"):
                shutil.copytree(ROOT / name, Path(folder) / name)
        yield Path(folder)


@pytest.fixture(scope="module")
def stage(require: Callable[..., str], before: Path) -> Iterator[Stage]:
    """Everything of the overlay local, in the version of the commit before."""
    for tool in ("kubectl", "ip", "unshare"):
        require(tool)
    require("redis-server", "valkey-server")
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    subprocess.run(["sh", str(ROOT / ".make/nginx.sh")], check=True, capture_output=True)
    objects = copy.deepcopy(overlay("local"))
    # Its own settings: an older application refuses those that it does not know.
    lines = (before / "k8s/base/app.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    next(o for o in objects if o["metadata"]["name"].startswith("sse-app-") and o["kind"] == "ConfigMap")["data"] = settings
    made = Stage(objects, SECRETS, before, (REDIS, APP, NGINX))
    yield made
    made.close()


@pytest.fixture
def cluster(stage: Stage) -> Iterator[Cluster]:
    """The cluster of all tests; at the end of each, nothing in it has failed unseen."""
    yield stage.cluster
    assert [] == stage.cluster.faults


def changed(*edits: Callable[[Objects], Any]) -> Objects:
    objects = copy.deepcopy(overlay("local"))
    for edit in edits:
        edit(objects)
    return objects


class TestNothingIsLost:
    """One story, told in the order of this file; each part leaves the cluster whole."""

    def test_from_the_version_before_to_this_one(self, stage, cluster):
        """Both versions side by side, four pods and two nginx replaced one by one: no client notices."""

        def story() -> list[str]:
            cluster.apply(overlay("local"), ROOT)
            cluster.wait(APP, NGINX, REDIS, seconds=200)
            cluster.gone()
            return stage.audience.checked()

        assert 4 == len(cluster.of(APP)) == 2 * len(cluster.of(NGINX))
        versions = {pod.version for pod in cluster.of(APP)}
        wrong = stage(story)

        # Redis itself may have been replaced, if its manifest is another one; that is another promise.
        assert [] == wrong
        assert versions.isdisjoint({pod.version for pod in cluster.of(APP)})
        assert stage.audience.published > 50

    def test_more_pods_and_fewer(self, stage, cluster):
        """Scaling up and down moves streams, and loses none."""

        def story() -> list[str]:
            opened = stage.audience.opened
            cluster.scale(APP, 5)
            cluster.wait(APP)
            cluster.scale(APP, 3)
            cluster.wait(APP)
            cluster.gone()
            assert stage.audience.opened > opened
            return stage.audience.checked()

        assert [] == stage(story)
        assert not any(pod.killed_at_grace for pod in cluster.pods)

    def test_a_killed_process(self, stage, cluster):
        """SIGKILL cuts its streams; they come back elsewhere and have missed nothing. A POST on its way is repeated."""

        def story() -> list[str]:
            pod = cluster.of(APP)[0]
            pod.kill()
            stage.audience.until(lambda: pod.restarts == 1)
            cluster.wait(APP)
            return stage.audience.checked()

        wrong = stage(story)

        assert [] == [w for w in wrong if not w.startswith(("cut: ", "publisher: "))]
        assert any(w.startswith("cut: ") for w in wrong)

    def test_redis_comes_back_with_what_it_had(self, stage, cluster):
        """A Redis that is moved elsewhere with its volume: streams stay open, and nothing that was acknowledged is lost."""

        def story() -> list[str]:
            cluster.of(REDIS)[0].delete()
            cluster.gone()
            cluster.wait(REDIS, APP)
            published = stage.audience.published
            stage.audience.until(lambda: stage.audience.published > published + 20)
            return stage.audience.checked()

        assert [] == [w for w in stage(story) if not w.startswith("publisher: ")]


class TestTheLoadTestRuns:
    def test_one_report_of_all_workers(self, stage, cluster):
        """
        Its Jobs, as `make loadtest-cluster` makes them: two workers find their master, and one report is in its log.

        With nginx's own port: nobody is here who turns a Service's 80 into it.
        """
        given = ["--workers=2", "--seconds=3", PATIENT, "--options=--host=http://sse-nginx:8080"]
        options = parser().parse_args(["loadtest-cluster", *given])
        items = loadtest_objects(overlay("local"), options)
        jobs = [o["metadata"]["name"] for o in items if o["kind"] == "Job"]

        def story() -> dict[str, tuple[list[int], str]]:
            cluster.apply(items)
            stage.audience.until(lambda: any(p.exit_codes for p in cluster.of(MASTER)), seconds=90)
            (master,) = cluster.of(MASTER)
            # Without one, workers look for it for five minutes.
            assert [0] == master.exit_codes, master.log()
            stage.audience.until(lambda: sum(bool(p.exit_codes) for name in jobs for p in cluster.of(name)) == 3)
            ended = {p.name: (p.exit_codes, p.log()) for name in jobs for p in cluster.of(name)}
            cluster.withdraw(items)
            cluster.gone()
            return ended

        ended = stage(story)
        (log,) = (text for name, (_, text) in ended.items() if name.startswith("sse-loadtest-master"))
        results = unpack(log.splitlines())
        assert results, log
        found = json.loads(results["result.json"])
        figures = found["figures"]

        assert 3 == len(ended)
        assert {0} == {code for codes, _ in ended.values() for code in codes}, ended
        assert ("passed", 2, 0) == (found["verdict"], found["workers"], found["exit_code"])
        assert 20 == figures["streams_most"]
        assert 0 == figures["lost"] == figures["duplicate"] == figures["gave_up"]
        assert figures["deliveries"] > figures["published"] > 0
        assert b"<html" in results["report.html"]
        assert log.splitlines()[-1].startswith("passed: ")
        assert [] == stage(stage.audience.checked)


def app(objects: Objects) -> Any:
    return pick(objects, "Deployment", APP)["spec"]["template"]["spec"]


def nginx(objects: Objects) -> Any:
    return pick(objects, "Deployment", NGINX)["spec"]["template"]["spec"]


class TestTheYamlIsWhatRuns:
    """Each slip does the damage that its line is there to prevent."""

    def stalls(self, stage: Stage, edit: Callable[[Objects], Any]) -> None:
        """*edit* keeps new pods from getting ready; the old ones serve on."""

        def story() -> list[str]:
            cluster = stage.cluster
            cluster.apply(changed(edit, few))
            with pytest.raises(TimeoutError):
                cluster.wait(APP, seconds=6)
            assert 1 <= sum(pod.ready for pod in cluster.of(APP))
            cluster.apply(changed(few))
            cluster.wait(APP)
            cluster.gone()
            return stage.audience.checked()

        assert [] == stage(story)

    def damages(self, stage: Stage, edit: Callable[[Objects], Any], workload: str, news_seconds: float = NEWS_SECONDS) -> list[str]:
        """Replace pods that *edit* made by right ones; return what the audience saw."""

        def story() -> list[str]:
            cluster = stage.cluster
            cluster.apply(changed(edit, few))
            cluster.wait(workload)
            if workload == APP:
                cluster.gone()  # else streams of those before may not be with the edited one yet
            stage.audience.checked()
            cluster.news_seconds = news_seconds
            cluster.apply(changed(few))
            cluster.wait(workload)
            cluster.gone()
            cluster.news_seconds = NEWS_SECONDS
            return stage.audience.checked()

        return stage(story)

    def test_command(self, stage, cluster):
        """Another command does not serve."""
        self.stalls(stage, lambda o: app(o)["containers"][0].update(command=["python", "-m", "app", "serve"]))

    def test_probe(self, stage, cluster):
        """A probe of a path that is not there holds the rollout."""
        self.stalls(stage, lambda o: app(o)["containers"][0]["readinessProbe"]["httpGet"].update(path="/ready"))

    def test_environment(self, stage, cluster):
        """A drain that is longer than the grace cuts streams."""
        env = {"name": "SSE_DRAIN_SECONDS", "value": "300"}
        wrong = self.damages(stage, lambda o: app(o)["containers"][0]["env"].append(env), APP)

        assert any(w.startswith("cut: ") for w in wrong), wrong

    def test_grace(self, stage, cluster):
        """A grace that ends with preStop cuts streams."""
        wrong = self.damages(stage, lambda o: app(o).update(terminationGracePeriodSeconds=41), APP)

        assert any(w.startswith("cut: ") for w in wrong), wrong

    def test_pre_stop(self, stage, cluster):
        """An nginx that does not wait for the news refuses clients; 15 s are under the 20 that it should wait."""
        wrong = self.damages(stage, lambda o: nginx(o)["containers"][0].pop("lifecycle"), NGINX, news_seconds=15)

        assert any("ConnectionRefused" in w for w in wrong), wrong


def few(objects: Objects) -> None:
    """One pod of each: less to wait for."""
    for name in (APP, NGINX):
        pick(objects, "Deployment", name)["spec"]["replicas"] = 1


class TestNothingIsOverlooked:
    @pytest.mark.parametrize(
        ("edit", "path"),
        [
            (lambda o: app(o).update(hostAliases=[{"ip": "10.0.0.1"}]), "spec.template.spec.hostAliases[].ip"),
            (lambda o: app(o)["containers"][0].update(args=["x"]), "spec.template.spec.containers[].args[]"),
            (lambda o: app(o)["containers"][0]["lifecycle"].update(preStop={"exec": {"command": ["x"]}}), "lifecycle.preStop.exec.command[]"),
            (lambda o: app(o)["containers"][0]["readinessProbe"].update(successThreshold=2), "readinessProbe.successThreshold"),
            (lambda o: o.append({"kind": "CronJob", "apiVersion": "batch/v1", "metadata": {"name": "x"}}), "CronJob x"),
        ],
    )  # fmt: skip
    def test_a_field_that_it_does_not_know(self, edit, path, require):
        """What the harness would pass over in silence is an error instead."""
        require("kubectl")
        check(overlay("local"))
        with pytest.raises(UnknownField) as error:
            check(changed(edit))

        assert path in str(error.value)


