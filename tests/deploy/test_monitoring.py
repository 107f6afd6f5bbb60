"""Prometheus rules and the Grafana dashboard: each alert is proven, each metric is one the product exports."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from control_plane.services import Services

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "sortline.rules.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "sortline-fleet.json"
BUILT_IN = {"up"}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def promtool(*arguments: str, folder: Path = PROMETHEUS) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, cwd=folder, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules() -> list[dict]:
    return [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [expression.replace("$agent", ".*") for expression in found]


def metrics_in(expression: str) -> set[str]:
    """Names of metrics: words outside quotes and braces that are no functions, labels or operators."""
    bare = re.sub(r'"[^"]*"', "", re.sub(r"\{[^{}]*\}", "", expression))
    return set(re.findall(r"\b(?:sortline_\w+|up)\b(?!\s*\()", re.sub(r"\b(?:by|on)\s*\([^)]*\)", "", bare)))


def exported(services: Services) -> set[str]:
    """Every metric that `/metrics` declares, with the names its samples have."""
    from fastapi.testclient import TestClient

    from control_plane.app import create_app

    with TestClient(create_app(services)) as client:
        text = client.get("/metrics").text
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        found |= {name, name if kind != "counter" or name.endswith("_total") else f"{name}_total"}
    return found | {name.removesuffix("_info") + "_info" for name in found}


@needs_promtool
def test_prometheus_accepts_its_configuration_and_the_rules() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", RULES.name)
    # The rules lie elsewhere in a container: the syntax of the configuration is what is checked.
    promtool("check", "config", "--syntax-only", "prometheus.yml")


@needs_promtool
def test_each_alert_fires_on_its_cause_and_not_otherwise() -> None:
    assert "SUCCESS" in promtool("test", "rules", "sortline.test.yml")
    tests = yaml.safe_load((PROMETHEUS / "sortline.test.yml").read_text(encoding="utf-8"))["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    for rule in rules():
        mine = [check for check in checks if check["alertname"] == rule["alert"]]
        assert any(check["exp_alerts"] for check in mine), f"nothing shows that {rule['alert']} fires"
        assert any(not check["exp_alerts"] for check in mine), f"nothing shows that {rule['alert']} keeps still"


def test_each_alert_says_what_is_wrong_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert set(rule["annotations"]) == {"summary", "action"}


@pytest.mark.parametrize("services", ["sqlite"], indirect=True)
def test_rules_and_dashboard_use_only_metrics_that_exist(services: Services) -> None:
    known = exported(services) | BUILT_IN
    for expression in [rule["expr"] for rule in rules()] + dashboard_expressions():
        used = metrics_in(expression)
        assert used, expression
        assert used <= known, f"{expression} uses {sorted(used - known)}"


def test_states_and_counters_in_rules_and_dashboard_exist() -> None:
    from control_plane.monitoring.status import State

    text = "\n".join([rule["expr"] for rule in rules()] + dashboard_expressions())
    assert set(re.findall(r'sortline_agent_state="([^"]+)"', text)) <= set(State)
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "control_plane").rglob("*.py"))
    for name in re.findall(r'what="([^"]+)"', text):
        assert f'counters["{name}"]' in sources, f"no counter is called {name}"


@needs_promtool
def test_every_expression_of_the_dashboard_parses(tmp_path: Path) -> None:
    recorded = [{"record": f"panel:{n}", "expr": text} for n, text in enumerate(dashboard_expressions())]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}), encoding="utf-8")
    promtool("check", "rules", "--lint=none", path.name, folder=tmp_path)


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)\}?", DASHBOARD.read_text(encoding="utf-8"))) - {"__all"} <= variables
