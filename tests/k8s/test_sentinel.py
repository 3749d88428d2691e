"""
The component redis-sentinel runs: its Valkeys and Sentinels, with the very files and commands of the manifests.

A master whose machine is gone is replaced, and comes back as a replica; nothing
that was acknowledged is lost. Sentinels take their times as they are: five
seconds of silence, whatever the cluster's scale.
"""

import copy
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from k8s.deploy import needed_secrets, secret_data
from tests.k8s.cluster import Pod
from tests.k8s.rendered import ROOT, composed, pick
from tests.k8s.stage import Stage

APP, NGINX, REDIS = "sse-app", "sse-nginx", "sse-redis"
OBJECTS: tuple[str, ...] = ("redis-sentinel",)

pytestmark = pytest.mark.timeout(240)


class Watched(Stage):
    """A stage with Sentinels, and questions to them."""

    def asked(self, pod: Pod, *question: str) -> Any:
        """Return a Sentinel's answer."""
        password = self.cluster.secrets[REDIS]["sentinel-password"]
        with redis.Redis(pod.address, 26379, username="sentinel", password=password, decode_responses=True, socket_timeout=2) as client:
            return client.execute_command("SENTINEL", *question)

    def whole(self) -> bool:
        """Tell whether every Sentinel knows both others, and a master with two replicas that are well."""
        try:
            told = [fields(self.asked(pod, "MASTER", "sse")) for pod in self.cluster.of(REDIS)]
            replicas = [fields(each) for each in self.asked(self.cluster.of(REDIS)[0], "REPLICAS", "sse")]
        except (redis.RedisError, OSError):
            return False
        counted = all((each["num-other-sentinels"], each["num-slaves"], each["flags"]) == ("2", "2", "master") for each in told)
        return counted and ["slave", "slave"] == [each["flags"] for each in replicas]

    def master(self) -> Pod:
        """Return the pod that the Sentinels take for the master."""
        somebody = next(pod for pod in self.cluster.of(REDIS) if not pod.lost)
        host, _ = self.asked(somebody, "GET-MASTER-ADDR-BY-NAME", "sse")
        return next(pod for pod in self.cluster.of(REDIS) if pod.name == host.partition(".")[0])


def fields(answer: Any) -> dict[str, str]:
    """Return what Redis 7 says as a list, and newer ones as a map."""
    return answer if isinstance(answer, dict) else dict(zip(answer[::2], answer[1::2], strict=True))


@pytest.fixture(scope="module")
def stage(require: Callable[..., str]) -> Iterator[Watched]:
    """Two application pods, one nginx, and three Valkeys with a Sentinel each."""
    for tool in ("kubectl", "ip", "unshare"):
        require(tool)
    require("redis-server", "valkey-server")
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    subprocess.run(["sh", str(ROOT / ".make/nginx.sh")], check=True, capture_output=True)
    objects = copy.deepcopy(composed(OBJECTS))
    pick(objects, "Deployment", APP)["spec"]["replicas"] = 2
    secrets = {REDIS: secret_data(REDIS, needed_secrets(objects)[REDIS])}
    made = Watched(objects, secrets, ROOT, (REDIS, APP, NGINX))
    yield made
    made.close()


def test_a_lost_master(stage):
    """
    The master's machine is gone: another one is master within seconds, no stream ends, and nothing is lost.

    It comes back as a replica, though it went as the master.
    """
    cluster, audience = stage.cluster, stage.audience

    def lost() -> tuple[list[str], float, str, str]:
        audience.until(stage.whole, seconds=60)
        audience.until(lambda: audience.published > 20)
        assert [] == audience.checked()
        old = stage.master()
        began, before = time.monotonic(), audience.published
        old.lose()
        # One may be on its way that was acknowledged before.
        audience.until(lambda: audience.published > before + 1, seconds=60)
        seconds = time.monotonic() - began
        audience.until(lambda: audience.published > before + 20, seconds=60)
        return audience.checked(), seconds, old.name, stage.master().name

    def back() -> list[str]:
        next(pod for pod in cluster.of(REDIS) if pod.lost).delete()
        cluster.gone()
        cluster.wait(REDIS)
        audience.until(stage.whole, seconds=60)
        before = audience.published
        audience.until(lambda: audience.published > before + 20)
        return audience.checked()

    wrong, seconds, old, new = stage(lost)
    print(f"published again {seconds:.1f} s after the loss of {old}, to {new}")
    assert [] == [w for w in wrong if not w.startswith("publisher: ")]
    assert old != new
    assert [] == stage(back)
    assert new == stage(stage.master).name
    assert [] == cluster.faults


def test_a_rolling_update(stage):
    """All three Valkeys are replaced, each when the one before has all data again: nothing is lost."""
    cluster, audience = stage.cluster, stage.audience

    def story() -> list[str]:
        before = {pod.born for pod in cluster.of(REDIS)}
        cluster.restart(REDIS)
        cluster.wait(REDIS, seconds=90)
        assert before.isdisjoint({pod.born for pod in cluster.of(REDIS)})
        audience.until(stage.whole, seconds=60)
        published = audience.published
        audience.until(lambda: audience.published > published + 20)
        return audience.checked()

    assert [] == [w for w in stage(story) if not w.startswith("publisher: ")]
    assert [] == cluster.faults


def test_what_the_application_may_ask(stage):
    """At a Sentinel it learns who the master is, and can change nothing."""
    password = stage.cluster.secrets[REDIS]["password"]
    (address, *_) = (pod.address for pod in stage.cluster.of(REDIS))

    def may(*command: str) -> bool:
        with redis.Redis(address, 26379, username="sse", password=password, socket_timeout=2) as client:
            try:
                client.execute_command(*command)
            except redis.exceptions.NoPermissionError:
                return False
        return True

    def story() -> list[bool]:
        asked = [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "sse"), ("SENTINEL", "MASTERS"), ("PING",)]
        refused = [("SENTINEL", "FAILOVER", "sse"), ("SENTINEL", "SET", "sse", "quorum", "1"), ("SHUTDOWN",), ("ACL", "LIST")]
        return [may(*words) for words in asked + refused]

    assert [True] * 3 + [False] * 4 == stage(story)
