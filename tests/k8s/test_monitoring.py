"""
Alerts fire when they should and not before; dashboard and alerts ask for metrics that are there.
"""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.rendered import K8S, composed, pick
from tests.live import Site, ask

FOLDER = K8S / "components" / "monitoring"
P = 'namespace="sse", pod="sse-app-1"'
OURS = 'container="app", job="sse/sse-app"'


@pytest.fixture(scope="module")
def rules(require: Callable[..., str]) -> dict[str, Any]:
    require("kubectl")
    return dict(pick(composed(("monitoring",)), "PrometheusRule", "sse")["spec"])


def series(expression: str, values: str) -> dict[str, str]:
    return {"series": expression, "values": values}


def buckets(name: str, slow: int) -> list[dict[str, str]]:
    """A histogram of a thousand observations a minute, *slow* of them over 1 s and under 2.5."""
    rows = {"0.005": 1000 - slow, "0.1": 1000 - slow, "0.5": 1000 - slow, "1.0": 1000 - slow, "2.5": 1000, "+Inf": 1000}
    return [series(f'{name}_bucket{{{P}, le="{le}"}}', f"0+{count}x60") for le, count in rows.items()]


# For each alert: what makes it fire by the 30th minute, and the same world in order.
WORLDS: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = {
    "SseDown": (
        # One namespace of two.
        [series('up{namespace="sse", container="app", job="sse/sse-app"}', "0x60"), series('up{namespace="other", container="app", job="other/sse-app"}', "1x60")],
        [series('up{namespace="sse", pod="a", container="app", job="sse/sse-app"}', "1x60"), series('up{namespace="sse", pod="b", container="app", job="sse/sse-app"}', "0x60")],
    ),
    "SseLogAway": ([series(f"sse_log_connected{{{P}}}", "0x60")], [series(f"sse_log_connected{{{P}}}", "1x60")]),
    "SseLogGap": ([series(f"sse_log_gap_total{{{P}}}", "0x25 1x35")], [series(f"sse_log_gap_total{{{P}}}", "0x60")]),
    "SseStreamsFell": (
        [series(f"sse_streams_open{{{P}}}", "1000x28 500x30")],
        [series(f"sse_streams_open{{{P}}}", "1000x28 900x30")],
    ),
    "SseStreamErrors": (
        [series(f'sse_streams_ended_total{{{P}, reason="server_error"}}', "0x25 3x35")],
        [series(f'sse_streams_ended_total{{{P}, reason="client_gone"}}', "0x25 3x35")],
    ),
    "SseProcessFull": (
        [series(f"sse_streams_open{{{P}}}", "12500x60"), series(f"sse_streams_limit{{{P}}}", "15000x60")],
        [series(f"sse_streams_open{{{P}}}", "11000x60"), series(f"sse_streams_limit{{{P}}}", "15000x60")],
    ),
    "SseRefusing": (
        [series(f'sse_requests_refused_total{{{P}, status="429"}}', "0+120x60")],
        [series(f'sse_requests_refused_total{{{P}, status="400"}}', "0+120x60")],
    ),
    "SseDeliverySlow": (buckets("sse_publish_to_write_seconds", 50), buckets("sse_publish_to_write_seconds", 1)),
    "SseReaderBehind": (
        [series(f"sse_reader_lag_seconds{{{P}}}", "9x60")],
        [series(f"sse_reader_lag_seconds{{{P}}}", "1x60")],
    ),
    "SseLoopHeld": (buckets("sse_loop_lag_seconds", 50), buckets("sse_loop_lag_seconds", 1)),
    "SseSlowConsumers": (
        [
            series(f'sse_streams_ended_total{{{P}, reason="slow_consumer"}}', "0+20x60"),
            series(f'sse_streams_ended_total{{{P}, reason="client_gone"}}', "0+100x60"),
        ],
        [
            series(f'sse_streams_ended_total{{{P}, reason="slow_consumer"}}', "0+20x60"),
            series(f'sse_streams_ended_total{{{P}, reason="client_gone"}}', "0+1000x60"),
        ],
    ),
    "SseWindowNearlyFull": (
        [series(f"sse_window_bytes{{{P}}}", "130000000x60")],
        [series(f"sse_window_bytes{{{P}}}", "90000000x60")],
    ),
    "SseEntriesBroken": (
        [series(f"sse_log_entries_broken_total{{{P}}}", "0x25 1x35")],
        [series(f"sse_log_entries_broken_total{{{P}}}", "7x60")],
    ),
    "SseHandoffOff": ([series(f"sse_handoff{{{P}}}", "0x60")], [series(f"sse_handoff{{{P}}}", "1x60")]),
    "SseDescriptors": (
        [series(f'process_open_fds{{{P}, {OURS}}}', "90x60"), series(f'process_max_fds{{{P}, {OURS}}}', "100x60")],
        # Others' containers may be called `app`, too.
        [
            series(f'process_open_fds{{{P}, {OURS}}}', "10x60"), series(f'process_max_fds{{{P}, {OURS}}}', "100x60"),
            series('process_open_fds{namespace="shop", container="app", job="shop/web"}', "90x60"),
            series('process_max_fds{namespace="shop", container="app", job="shop/web"}', "100x60"),
        ],
    ),
}  # fmt: skip


class TestAlerts:
    def test_check(self, rules, require, tmp_path):
        """promtool accepts the rules."""
        (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
        run = subprocess.run(
            [require("promtool"), "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
        )

        assert run.returncode == 0, run.stderr
        assert f"{len(WORLDS)} rules found" in run.stdout

    def test_each_fires_and_each_is_silent(self, rules, require, tmp_path):
        """Every alert fires in the world that it is for, with its text filled in, and not in the other."""
        found = {rule["alert"]: rule for rule in rules["groups"][0]["rules"]}
        assert set(WORLDS) == set(found)
        # promtool compares whole alerts, so silence is an empty list and noise is a difference.
        tests = [
            {"interval": "1m", "input_series": world, "alert_rule_test": [{"eval_time": "30m", "alertname": name, "exp_alerts": []}]}
            for name, worlds in WORLDS.items()
            for world in worlds
        ]  # fmt: skip
        outputs = []
        (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
        for number, test in enumerate(tests):
            (tmp_path / f"test{number}.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [test]}))
            run = subprocess.run(
                [require("promtool"), "test", "rules", f"test{number}.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
            )  # fmt: skip
            outputs.append(run.stdout + run.stderr)
        for number, name in enumerate(WORLDS):
            fires, silent = outputs[2 * number], outputs[2 * number + 1]
            assert f'alertname="{name}"' in fires, (name, fires)
            assert f'severity="{found[name]["labels"]["severity"]}"' in fires, name
            assert "{{" not in fires, fires
            assert "SUCCESS" in silent, (name, silent)

    def test_nobody_is_there(self, rules, require, tmp_path):
        """SseDown fires, too, where Prometheus knows no process at all."""
        test = {"interval": "1m", "input_series": [], "alert_rule_test": [{"eval_time": "30m", "alertname": "SseDown", "exp_alerts": []}]}
        (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
        (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [test]}))
        run = subprocess.run([require("promtool"), "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False)

        assert 'alertname="SseDown"' in run.stdout + run.stderr

    def test_runbook(self, rules):
        """Every alert leads to a section that says what it means and what to do."""
        readme = (FOLDER / "README.md").read_text()
        for rule in rules["groups"][0]["rules"]:
            path, _, anchor = rule["annotations"]["runbook"].partition("#")

            assert FOLDER / "README.md" == K8S.parent / path
            assert rule["alert"].lower() == anchor
            section = readme.split(f"### {rule['alert']}\n", 1)[1].split("\n### ", 1)[0]
            assert "\nDo: " in section


class TestMetricsAreThere:
    async def test_every_metric_that_is_asked_for(self, rules):
        """Alerts and dashboard name no metric that the application does not have."""
        with Site() as site:
            app = site.app("", log_format="json")
            page = (await ask(app.metrics_port, "GET", "/metrics")).body.decode()
        families = set(re.findall(r"(?m)^# TYPE (\S+)", page))
        have = families | {f"{name}_bucket" for name in families}
        dashboard = json.loads((FOLDER / "dashboard.json").read_text())
        texts = [rule["expr"] for rule in rules["groups"][0]["rules"]]
        texts += [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
        asked = {name for text in texts for name in re.findall(r"\b((?:sse|process)_[a-z_]+)", text)}

        assert len(asked) > 25
        assert set() == asked - have

    def test_dashboard_expressions(self, require, tmp_path):
        """promtool can read every expression of the dashboard."""
        dashboard = json.loads((FOLDER / "dashboard.json").read_text())
        expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
        rules = [{"record": "x", "expr": e.replace("$__rate_interval", "1m"), "labels": {"n": str(i)}} for i, e in enumerate(expressions)]
        file: Path = tmp_path / "rules.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        run = subprocess.run([require("promtool"), "check", "rules", str(file)], capture_output=True, text=True, check=False)

        assert run.returncode == 0, run.stderr

    def test_dashboard_panels(self):
        """Panels have numbers of their own and do not lie over each other."""
        panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
        places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]

        assert len({p["id"] for p in panels}) == len(panels) == len(set(places))
        assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels)
