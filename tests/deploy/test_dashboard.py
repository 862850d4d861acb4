"""The dashboard and the alerts: every metric they read is one that the server has."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2o_vllm.metrics import INFO, METRICS, SHARE
from s2o_vllm.support import DENSE_REASONS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/s2o.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"][0]["rules"]
NAME = re.compile(r"\b(?:vllm|s2o):[a-z0-9_]+")
HISTOGRAM_PARTS = ("_bucket", "_count", "_sum")


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def names() -> set[str]:
    lists = DASHBOARD["templating"]["list"]
    variables = [one["query"]["query"] for one in lists if one["type"] == "query"]
    sources = (DEPLOY / "loadtest").glob("*.py")
    text = "\n".join([*expressions(), *variables, *(path.read_text() for path in sources)])
    return set(NAME.findall(text))


def vllm_metrics() -> dict[str, str]:
    """Return the metrics that the installed vLLM declares, as the source names their kind."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "v1" / "metrics"
    text = "\n".join(path.read_text() for path in folder.glob("*.py"))
    found = re.findall(r"(gauge|counter|histogram)_cls\(\s*name=\"(vllm:\w+)\"", text)
    assert found, "vLLM declares its metrics in another way now"
    return {name: kind for kind, name in found}


def exposed() -> set[str]:
    """Return every series name that the server's /metrics can have."""
    series = {name + "_total" for name in METRICS} | {INFO}
    series |= {SHARE + part for part in HISTOGRAM_PARTS}
    for name, kind in vllm_metrics().items():
        if kind == "counter":
            series.add(name.removesuffix("_total") + "_total")
        elif kind == "histogram":
            series |= {name + part for part in HISTOGRAM_PARTS}
        else:
            series.add(name)
    return series


def test_only_metrics_that_exist():
    assert names() - exposed() == set()


def test_alerts_read_metrics_that_exist_or_are_recorded():
    read = {name for rule in RULES for name in NAME.findall(rule["expr"])}
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    assert recorded < read
    assert read - recorded - exposed() == set()


def test_the_reasons_that_alerts_leave_out_exist():
    text = (DEPLOY / "prometheus/rules.yml").read_text()
    (named,) = re.findall(r'reason!~"([^"]+)"', text)
    assert set(named.split("|")) < set(DENSE_REASONS)


def test_every_alert_says_what_to_look_at_and_is_documented():
    alerts = [rule for rule in RULES if "alert" in rule]
    documented = re.findall(r"^\| `(S2O\w+)` \|", (DEPLOY / "README.md").read_text(), re.M)
    assert documented == [rule["alert"] for rule in alerts]
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    for rule in alerts:
        description = rule["annotations"]["description"]
        assert not set(re.findall(r'"([A-Z][^"]+)"', description)) - set(titles)
        assert "$labels.instance" in rule["annotations"]["summary"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (package prometheus)")
@pytest.mark.parametrize(
    "words", [("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")]
)
def test_rules_fire_when_they_should_and_not_otherwise(words: tuple[str, ...]):
    done = subprocess.run(
        ["promtool", *words], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (package prometheus)")
def test_prometheus_reads_every_expression(tmp_path: Path):
    filled = [
        one.replace("$__rate_interval", "1m").replace("$instance", ".*") for one in expressions()
    ]
    rules = [{"record": f"panel:{number}", "expr": one} for number, one in enumerate(filled)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(rules)} rules found" in done.stdout


def test_compose_gives_prometheus_the_rules_that_it_loads():
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    volumes = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["prometheus"][
        "volumes"
    ]
    for name in config["rule_files"]:
        assert f"./prometheus/{name}:/etc/prometheus/{name}:ro" in volumes


@pytest.mark.parametrize("metric", METRICS)
def test_every_s2o_metric_is_shown(metric: str):
    assert metric + "_total" in names()


def test_no_counter_is_shown_without_a_rate():
    for expression in expressions():
        counters = re.findall(r"\S*_total\b", expression)
        assert expression.count("rate(") + expression.count("increase(") >= len(counters), (
            expression
        )


def test_quantiles_keep_the_bucket_label():
    for expression in expressions():
        if "histogram_quantile" in expression:
            assert "_bucket{" in expression
            assert "by (le)" in expression


def test_reasons_of_dense_rows_are_told_apart():
    told_apart, by_cost = [text for text in expressions() if "s2o:dense_rows_total" in text]
    assert "by (reason)" in told_apart
    (reason,) = set(re.findall(r'reason="(\w+)"', by_cost))
    assert reason in DENSE_REASONS


def test_panels_have_a_unique_id_a_source_and_an_explanation():
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert sources == [{"type": "prometheus", "uid": "${datasource}"}] * len(sources)
        assert panel["description"], panel["title"]
    assert DASHBOARD["templating"]["list"][0]["name"] == "datasource"


def test_layers_are_rows_of_colour_and_never_thirty_lines():
    by_layer = [
        panel for panel in DASHBOARD["panels"]
        if any("by (layer)" in target["expr"] for target in panel["targets"])
    ]  # fmt: skip
    assert len(by_layer) == 5
    for panel in by_layer:
        assert panel["type"] == "status-history" or (
            panel["type"] == "bargauge" and "topk(5," in panel["targets"][0]["expr"]
        )


def test_means_stand_beside_quantiles():
    for panel in DASHBOARD["panels"]:
        text = [target["expr"] for target in panel["targets"]]
        for name in {re.search(r"(\S+)_bucket", one)[1] for one in text if "_bucket" in one}:
            metric = name.rpartition("(")[2]
            assert any(f"{metric}_sum" in one and f"{metric}_count" in one for one in text)


def test_panels_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
