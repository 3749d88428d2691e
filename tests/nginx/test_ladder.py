"""
Timeouts that must agree, read where they stand: settings, nginx's files, HAProxy's, Caddy's, Kubernetes'.

Each rule is one line of `RULES`; each is seen broken once.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings, load, variable
from app.stack import ROOT

NGINX = ROOT / "nginx"


def seconds(text: str) -> float:
    """Return a duration of nginx, HAProxy or Caddy in seconds."""
    number, unit = re.fullmatch(r"([0-9.]+)(ms|s|m|h|d|)", text).groups()
    return float(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}[unit]


def steps(*places: list[str]) -> list[float]:
    """Return the durations of several places in seconds."""
    return [seconds(value) for place in places for value in place]


def nginx(name: str, file: str = "*.conf") -> list[str]:
    """Return the values of the directive *name* in nginx's files of this name; there is one at least."""
    pattern = rf"(?m)^\s*{name}\s+([^;]+);"
    found = [value for path in sorted(NGINX.glob(f"**/{file}")) for value in re.findall(pattern, path.read_text())]
    assert found, f"{name} stands in none of nginx's files"
    return found


def haproxy(name: str) -> list[str]:
    """Return the values of a line of haproxy.cfg."""
    found = re.findall(rf"(?m)^\s*{name}\s+(\S+)", (NGINX / "haproxy/haproxy.cfg").read_text())
    assert found, f"{name} stands not in haproxy.cfg"
    return found


def caddy(name: str) -> list[str]:
    """Return the values of a line of the Caddyfile."""
    found = re.findall(rf"(?m)^\s*{name}\s+(\S+)", (NGINX / "caddy/Caddyfile").read_text())
    assert found, f"{name} stands not in the Caddyfile"
    return found


def said_bytes() -> list[int]:
    """Return the size of a body as HAProxy compares it, and as the refusals name it."""
    cfg, texts = (NGINX / "haproxy/haproxy.cfg").read_text(), (NGINX / "snippets/sse-problem.http.conf").read_text()
    found = re.findall(r"content-length\) gt (\d+)", cfg) + re.findall(r"at most (\d+) bytes", cfg + texts)
    assert len(found) >= 3, found
    return [*map(int, found)]


def keep_alive() -> float:
    """Return for how long the application keeps an idle connection."""
    text = (ROOT / "app/server.py").read_text()
    return float(re.search(r"keep_alive_timeout\s*=\s*([0-9.]+)", text)[1])


def values() -> dict[str, list[float]]:
    """Return every step of the ladder; several values where it stands in several files."""
    settings = [Settings(), *cluster_settings()]

    def of(name: str) -> list[float]:
        return [float(getattr(each, name)) for each in settings]

    sizes = {"k": 1024, "m": 1024**2, "": 1}
    bodies = [re.fullmatch(r"(\d+)([km]?)", text).groups() for text in nginx("client_max_body_size")]
    found = {
        "heartbeat": of("heartbeat_seconds"),
        "max_age": of("max_age_seconds"),
        "slow_consumer": of("slow_consumer_seconds"),
        # The lead time is part of the drain; runs may finish after it.
        "drain": [sum(each) for each in zip(of("drain_seconds"), of("run_finish_seconds"), strict=True)],
        "max_body": of("max_body_bytes"),
        "publish": of("publish_timeout_seconds"),
        "api_read_timeout": steps(nginx("proxy_read_timeout", "sse-api.conf"), caddy("response_header_timeout")),
        "read_timeout": steps(nginx("proxy_read_timeout", "sse-proxy.conf"), haproxy("timeout server"), caddy("read_timeout")),
        "connect_timeout": steps(nginx("proxy_connect_timeout"), haproxy("timeout connect"), caddy("dial_timeout")),
        "send_timeout": steps(nginx("send_timeout"), haproxy("timeout client")),
        "try_for": steps(nginx("proxy_next_upstream_timeout"), caddy("lb_try_duration")),
        "shutdown": steps(nginx("worker_shutdown_timeout"), haproxy("hard-stop-after"), caddy("grace_period")),
        "upstream_idle": steps(nginx("keepalive_timeout"), caddy("keepalive")),
        "app_idle": [keep_alive()],
        "user_limit": [float(each.limit_streams_per_user) for each in settings],
        "nginx_limit": [*map(float, nginx("limit_conn sse_streams_of_user")), *map(float, haproxy(r"acl too_many sc_conn_cur\(0\) gt"))],
        "all_streams": [*map(float, nginx("limit_conn sse_streams_of_nginx"))],
        "connections": [float(nginx("worker_processes")[0]) * float(nginx("worker_connections")[0])],
        "body_size": [*(int(number) * sizes[unit] for number, unit in bodies), *said_bytes()],
    }
    return found | cluster()


def documents() -> list[dict[str, Any]]:
    found = []
    for path in sorted((ROOT / "k8s").glob("**/*.yaml")):
        found += [each for each in yaml.safe_load_all(path.read_text()) if isinstance(each, dict)]
    return found


def cluster_settings() -> list[Settings]:
    """Return the settings of each environment file of k8s/, without what is not the ladder's."""
    found = []
    for path in sorted((ROOT / "k8s").glob("**/*.env")):
        lines = [line.split("=", 1) for line in path.read_text().splitlines() if line.startswith("SSE_")]
        wanted = {variable(name) for name in Settings.__dataclass_fields__ if name.endswith(("_seconds", "_bytes"))}
        found.append(load({name: value for name, value in lines if name in wanted}))
    return found


def cluster() -> dict[str, list[float]]:
    """Return the graces of the pods that k8s/ describes, and what preStop takes of them."""
    found: dict[str, list[float]] = {"app_grace": [], "app_stop": [], "nginx_grace": [], "nginx_stop": []}
    for document in documents():
        if document.get("kind") != "Deployment":
            continue
        pod = document.get("spec", {}).get("template", {}).get("spec", {})
        if "terminationGracePeriodSeconds" not in pod:
            continue
        name = document["metadata"]["name"]
        which = "nginx" if "nginx" in name else "app" if name.endswith("app") else None
        if which:
            stops = [
                float(container["lifecycle"]["preStop"]["sleep"]["seconds"])
                for container in pod["containers"]
                if "preStop" in container.get("lifecycle", {})
            ]
            found[f"{which}_grace"].append(float(pod["terminationGracePeriodSeconds"]))
            found[f"{which}_stop"].append(max(stops, default=0.0))
    return found


Ladder = dict[str, list[float]]


def every(rule: Callable[..., bool], *names: str) -> Callable[[Ladder], bool]:
    """Hold *rule* against every combination of the values of *names*."""
    import itertools

    return lambda ladder: all(rule(*each) for each in itertools.product(*(ladder[name] for name in names)))


# What must hold, and a change that breaks it.
RULES: dict[str, tuple[Callable[[Ladder], bool], dict[str, float]]] = {
    "a read timeout is 4 to 5 heartbeats": (
        every(lambda beat, read: 4 * beat <= read <= 5 * beat, "heartbeat", "read_timeout"),
        {"read_timeout": 3600},
    ),
    "the application gives a publish up before the proxy does": (
        every(lambda publish, read: 2 * publish < read, "publish", "api_read_timeout"),
        {"api_read_timeout": 5},
    ),
    "one lost heartbeat ends no stream": (
        every(lambda beat, read: 2 * beat < read, "heartbeat", "read_timeout"),
        {"heartbeat": 60},
    ),
    "a stream ends by itself before a reload cuts it": (
        every(lambda age, shutdown: age + 30 <= shutdown, "max_age", "shutdown"),
        {"max_age": 540},
    ),
    "the application ends a slow consumer before the proxy does": (
        every(lambda slow, send: 2 * slow <= send, "slow_consumer", "send_timeout"),
        {"send_timeout": 5},
    ),
    "a vanished process costs seconds, and leaves time for another": (
        every(lambda connect, tries: 2 * connect < tries, "connect_timeout", "try_for"),
        {"connect_timeout": 60},
    ),
    "the proxy closes an idle connection before the application does": (
        every(lambda idle, app: idle + 10 <= app, "upstream_idle", "app_idle"),
        {"upstream_idle": 75},
    ),
    "the proxy refuses exactly the bodies that the application would": (
        every(lambda body, proxy: body == proxy, "max_body", "body_size"),
        {"body_size": 4_194_304},
    ),
    "the application makes room for a new stream before nginx refuses it": (
        every(lambda user, proxy: user < proxy, "user_limit", "nginx_limit"),
        {"user_limit": 20},
    ),
    "streams leave connections for the API": (
        every(lambda streams, connections: 2.5 * streams <= connections, "all_streams", "connections"),
        {"all_streams": 16_384},
    ),
    "an nginx pod outlives its streams": (
        every(lambda shutdown, stop, grace: stop + shutdown < grace, "shutdown", "nginx_stop", "nginx_grace"),
        {"nginx_grace": 540},
    ),
    "the cluster's autoscaler waits for an nginx pod": (
        every(lambda grace: grace < 600, "nginx_grace"),
        {"nginx_grace": 900},
    ),
    "an application pod outlives its drain": (
        # 4 s: the rest is aborted within 2 s, then Hypercorn and Redis end.
        every(lambda drain, stop, grace: stop + drain + 4 <= grace, "drain", "app_stop", "app_grace"),
        {"app_grace": 50},
    ),
}


class TestLadder:
    @pytest.mark.parametrize("rule", RULES)
    def test_holds(self, rule):
        """As all files are shipped."""
        ladder = values()

        assert RULES[rule][0](ladder), {name: sorted(set(found)) for name, found in ladder.items()}

    @pytest.mark.parametrize("rule", RULES)
    def test_is_seen_broken(self, rule):
        """One other value in one file breaks the rule."""
        holds, change = RULES[rule]
        ((name, value),) = change.items()
        ladder = values()

        assert not holds(ladder | {name: [*ladder[name], value]})

    def test_every_step_was_found(self):
        """A step that is read nowhere would hold against everything."""
        found = values()

        assert [] == [name for name, steps in found.items() if not steps]

    def test_readme(self):
        """The README's list names the steps with the values that the files have."""
        section = (ROOT / "README.md").read_text().split("### Timeouts that must agree", 1)[1].split("\n## ", 1)[0]
        said = {(name, value) for name, value in re.findall(r"`([A-Za-z_-]+)`(?:'s| of [a-z ]+)? \((\d+)(?: s| MiB)?\)", section)}

        places = {
            "proxy_read_timeout": "sse-proxy.conf",
            "send_timeout": "sse-proxy.conf",
            "worker_shutdown_timeout": "nginx.conf",
        }
        for name, value in said:
            if name.startswith("SSE_"):
                assert float(value) == getattr(Settings(), name.removeprefix("SSE_").lower()), name
            elif name in places:
                assert {float(value)} == {seconds(found) for found in nginx(name, places[name])}, name
        assert {"SSE_HEARTBEAT_SECONDS", "SSE_MAX_AGE_SECONDS", "proxy_read_timeout", "worker_shutdown_timeout"} <= {
            name for name, _ in said
        }

    def test_readme_of_nginx(self):
        """Its table has every step once, with the values that the files and the settings have."""
        section = (NGINX / "README.md").read_text().split("### Timeouts", 1)[1].split("\n### ", 1)[0]
        rows = dict(re.findall(r"(?m)^\| (.+?) \| (\d+) (?:s|MiB) \|", section))
        places = {
            "`proxy_read_timeout` of streams": nginx("proxy_read_timeout", "sse-proxy.conf"),
            "`proxy_read_timeout` of other requests": nginx("proxy_read_timeout", "sse-api.conf"),
            "`worker_shutdown_timeout`": nginx("worker_shutdown_timeout"),
            "`send_timeout`": nginx("send_timeout"),
            "upstream `keepalive_timeout`": nginx("keepalive_timeout"),
        }

        assert {rows.pop("`client_max_body_size`") + "m"} == set(nginx("client_max_body_size"))
        assert {name: {float(value)} for name, value in rows.items()} == {
            name: set(map(seconds, found)) for name, found in places.items()
        }
        named = re.findall(r"`(SSE_[A-Z_]+)` \((\d+)\)", section)
        assert 4 == len(named)
        for name, value in named:
            assert float(value) == getattr(Settings(), name.removeprefix("SSE_").lower()), name


def test_paths():
    """The files that are read are those of the tree."""
    assert Path(NGINX / "nginx.conf").exists()
