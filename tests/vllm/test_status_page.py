"""The page on the API server: what it has and has not, and that it is opt-in."""

import re
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from vllm.v1.metrics import loggers
from vllm.v1.metrics import prometheus as vllm_prometheus

from s2o_vllm import status_page
from s2o_vllm.config import S2OConfig
from s2o_vllm.metrics import METRICS

SETTINGS = S2OConfig(sparsity_budget=0.2, status_page=True)


class Counted:
    """A collector: two engines, two layers."""

    def collect(self):
        labels = ["engine", "layer"]
        counts = {
            "s2o:history_tokens_visited": 10.0, "s2o:history_tokens_eligible": 100.0,
            "s2o:dropped_mass": 3.0, "s2o:dropped_mass_rows": 60.0,
            "s2o:shadow_error": 0.0, "s2o:shadow_rows": 0.0,
        }  # fmt: skip
        for name, value in counts.items():
            family = CounterMetricFamily(name, "", labels=labels)
            for engine in ("0", "1"):
                for layer in ("10", "2"):
                    family.add_metric([engine, layer], value)
            yield family
        dense = CounterMetricFamily("s2o:dense_rows", "", labels=["reason"])
        dense.add_metric(["short_history"], 4.0)
        dense.add_metric(["alibi"], 0.0)
        yield dense
        yield CounterMetricFamily("s2o:attention_tokens", "", value=200.0)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "", value=5.0)


@pytest.fixture
def client(monkeypatch):
    registry = CollectorRegistry()
    registry.register(Counted())
    monkeypatch.setattr(vllm_prometheus, "get_prometheus_registry", lambda: registry)
    monkeypatch.setattr(loggers.PrometheusStatLogger, "record", lambda *_: "recorded")
    monkeypatch.setattr(status_page, "_settings", None)
    status_page._requests.clear()
    status_page.enable(SETTINGS)
    app = FastAPI()
    status_page.attach(app)
    return TestClient(app)


def test_the_page_is_there_only_if_asked_for(monkeypatch):
    monkeypatch.setattr(status_page, "_settings", None)
    for settings in (None, S2OConfig()):
        if settings is not None:
            status_page.enable(settings)
        app = FastAPI()
        status_page.attach(app)
        assert TestClient(app).get("/s2o").status_code == 404


def test_counters_are_summed_over_engines_and_layers_are_in_order(client):
    found = client.get("/s2o/data").json()
    assert [layer["layer"] for layer in found["layers"]] == [2, 10]
    assert found["layers"][0] == {
        "layer": 2, "visited": 20.0, "eligible": 200.0, "dropped": 6.0, "dropped_rows": 120.0,
        "error": 0.0, "error_rows": 0.0,
    }  # fmt: skip
    assert (found["work"], found["waiting"], found["running"]) == (200.0, 5.0, 0.0)
    assert found["reasons"] == {"short_history": 4.0}
    assert found["settings"]["sparsity_budget"] == 0.2
    assert found["requests"] == []


def test_last_requests_are_lengths_and_times_and_nothing_else(client):
    done = [
        SimpleNamespace(
            num_prompt_tokens=1000 + number, num_cached_tokens=64, num_generation_tokens=7,
            queued_time=0.5, prefill_time=1.5, decode_time=2.5, finish_reason="length",
            request_id="a user's own name", prompt="what they said",
        )
        for number in range(30)
    ]  # fmt: skip
    for one in done:
        step = SimpleNamespace(finished_requests=[one])
        assert loggers.PrometheusStatLogger.record(None, None, step) == "recorded"
    assert loggers.PrometheusStatLogger.record(None, None, None) == "recorded"
    answer = client.get("/s2o/data")
    found = answer.json()["requests"]
    assert [one["prompt_tokens"] for one in found] == list(range(1010, 1030))
    assert (found[0]["queue_s"], found[0]["prefill_s"], found[0]["decode_s"]) == (0.5, 1.5, 2.5)
    assert "user" not in answer.text
    assert "said" not in answer.text


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/s2o")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert re.findall(r"(?:https?:)?//[a-z]", answer.text) == []
    assert re.findall(r"\b(?:src|href)=", answer.text) == []
    assert "innerHTML" not in answer.text, "what the server says is text"


def test_names_of_metrics_are_those_of_the_workers():
    own = {name for name in [*status_page.OF_LAYERS, *status_page.SUMS, status_page.REASONS]
           if name.startswith("s2o:")}  # fmt: skip
    assert own <= {f"{name}_total" for name in METRICS}
