"""The dashboard: every metric it shows is one that the server has."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from s2o_vllm.metrics import METRICS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/s2o.json").read_text())
NAME = re.compile(r"\b(?:vllm|s2o):[a-z0-9_]+")
HISTOGRAM_PARTS = ("_bucket", "_count", "_sum")


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def names() -> set[str]:
    variables = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]
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
    series = {name + "_total" for name in METRICS}
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


@pytest.mark.parametrize("metric", METRICS)
def test_every_s2o_metric_is_shown(metric: str):
    assert metric + "_total" in names()


def test_no_counter_is_shown_without_a_rate():
    for expression in expressions():
        counters = re.findall(r"\S*_total\b", expression)
        assert expression.count("rate(") >= len(counters), expression


def test_quantiles_keep_the_bucket_label():
    for expression in expressions():
        if "histogram_quantile" in expression:
            assert "_bucket{" in expression
            assert "by (le)" in expression


def test_reasons_of_dense_rows_are_told_apart():
    (dense,) = [text for text in expressions() if "s2o:dense_rows_total" in text]
    assert "by (reason)" in dense


def test_panels_have_a_unique_id_a_source_and_an_explanation():
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "prometheus"}
        assert panel["description"], panel["title"]


def test_panels_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
