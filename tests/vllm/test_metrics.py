import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from s2o_vllm import metrics
from s2o_vllm.kernels.plan import NUM_COUNTERS


def test_device_and_host_counts_reach_the_exposition(tmp_path):
    worker = metrics.WorkerCounters(str(tmp_path))
    one = torch.tensor([10, 100, 5, 2, 1_500_000, 30])
    worker.watch(one, 0)
    worker.watch(torch.tensor([1, 2, 3, 4, 250_000, 10]), 7)
    worker.start()
    worker.add("s2o:dense_rows", 2, "short_history")
    worker.publish()
    one[:4] += 1  # as a kernel would
    worker.publish()
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    text = generate_latest(registry).decode()
    assert "s2o:history_tokens_visited_total 12.0" in text
    assert "s2o:history_tokens_eligible_total 103.0" in text
    assert 's2o:dropped_mass_total{layer="0"} 1.5' in text, "a row's whole mass is 1"
    assert 's2o:dropped_mass_total{layer="7"} 0.25' in text
    assert 's2o:dropped_mass_rows_total{layer="0"} 30.0' in text
    assert 's2o:dense_rows_total{reason="short_history"} 2.0' in text


def test_there_is_a_metric_for_every_device_counter():
    assert len(metrics.DEVICE_METRICS) == NUM_COUNTERS


def test_without_a_folder_nothing_is_written(monkeypatch):
    monkeypatch.delenv(metrics.DIRECTORY, raising=False)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    worker = metrics.WorkerCounters()
    worker.start()
    worker.add("s2o:sparse_requests", 3)
    worker.publish()
    assert worker.totals()["s2o:sparse_requests", ""] == 3
