import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString

from s2o_vllm import metrics
from s2o_vllm.kernels.layout import ELIGIBLE, NUM_COUNTERS, VISITED
from s2o_vllm.kernels.output_error import NUM_ERRORS
from s2o_vllm.support import DENSE_REASONS


def samples(folder):
    """The values of the exposition by name with labels."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    lines = generate_latest(registry).decode().splitlines()
    split = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in split}


def test_device_and_host_counts_reach_the_exposition(tmp_path):
    worker = metrics.WorkerCounters(str(tmp_path))
    one = torch.tensor([10, 100, 5, 2, 1_500_000, 30])
    worker.watch(one, 0)
    worker.watch(torch.tensor([1, 2, 3, 4, 250_000, 10]), 7)
    worker.watch(torch.tensor([4_500_000, 20]), 7, metrics.SHADOW_METRICS)
    worker.watch(torch.tensor([500_000, 1]), 3, metrics.SHADOW_METRICS)
    assert worker.sums(metrics.SHADOW_METRICS) == [5_000_000, 21]
    worker.start()
    worker.add("s2o:dense_rows", 2, "short_history")
    worker.publish()
    one[:4] += 1  # as a kernel would
    worker.publish()
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    text = generate_latest(registry).decode()
    assert 's2o:history_tokens_visited_total{layer="0"} 11.0' in text
    assert 's2o:history_tokens_visited_total{layer="7"} 1.0' in text
    assert 's2o:history_tokens_eligible_total{layer="0"} 101.0' in text
    assert 's2o:dropped_mass_total{layer="0"} 1.5' in text, "a row's whole mass is 1"
    assert 's2o:dropped_mass_total{layer="7"} 0.25' in text
    assert 's2o:dropped_mass_rows_total{layer="0"} 30.0' in text
    assert 's2o:shadow_error_total{layer="7"} 4.5' in text
    assert 's2o:shadow_rows_total{layer="7"} 20.0' in text
    assert 's2o:dense_rows_total{reason="short_history"} 2.0' in text


def test_every_series_is_there_before_anything_is_counted(tmp_path):
    worker = metrics.WorkerCounters(str(tmp_path))
    assert worker.start({"version": "1.2", "ranking": "low_rank"})
    assert not worker.start({"version": "other"}), "the first call holds"
    worker.expect(7)
    worker.publish()
    found = samples(tmp_path)
    assert found.pop('s2o:info{ranking="low_rank",version="1.2"}') == 1
    unlabelled = {f"{name}_total" for name in metrics.METRICS if name not in metrics.LABELS}
    reasons = {f's2o:dense_rows_total{{reason="{reason}"}}' for reason in DENSE_REASONS}
    by_layer = ("history_tokens_visited", "history_tokens_eligible", "dropped_mass",
                "dropped_mass_rows", "shadow_error", "shadow_rows")  # fmt: skip
    layer = {f's2o:{name}_total{{layer="7"}}' for name in by_layer}
    assert found == dict.fromkeys(unlabelled | reasons | layer | histogram(), 0.0)


def histogram():
    """The series of the histogram of prompts' shares."""
    buckets = {
        f'{metrics.SHARE}_bucket{{le="{floatToGoString(most)}"}}' for most in metrics.SHARE_BUCKETS
    }
    return {f"{metrics.SHARE}_count", f"{metrics.SHARE}_sum"} | buckets


def test_shares_of_prompts_are_a_histogram_over_all_workers(tmp_path, monkeypatch):
    for pid, shares in ((11, (0.01, 0.1, 0.11)), (12, (1.0, 0.5))):
        monkeypatch.setattr(metrics.os, "getpid", lambda pid=pid: pid)
        worker = metrics.WorkerCounters(str(tmp_path))
        worker.start()
        for share in shares:
            worker.observe_share(share)
        worker.publish()
        worker.publish()
    found = samples(tmp_path)
    assert found["s2o:request_work_share_count"] == 5
    assert found["s2o:request_work_share_sum"] == pytest.approx(1.72)
    buckets = [
        found[f's2o:request_work_share_bucket{{le="{le}"}}'] for le in (0.05, 0.1, 0.15, 0.5)
    ]
    assert buckets == [1, 2, 3, 4]


def test_every_series_has_the_labels_of_vllms(tmp_path):
    worker = metrics.WorkerCounters(str(tmp_path))
    worker.start({"version": "1.2"}, {"model_name": "a/b", "engine": "3"})
    worker.expect(0)
    worker.publish()
    found = samples(tmp_path)
    assert 's2o:dense_rows_total{engine="3",model_name="a/b",reason="short_history"}' in found
    assert 's2o:info{engine="3",model_name="a/b",version="1.2"}' in found
    assert all('engine="3",' in name and 'model_name="a/b"' in name for name in found)


def test_the_settings_of_several_workers_are_one_series(tmp_path, monkeypatch):
    for pid in (11, 12):
        monkeypatch.setattr(metrics.os, "getpid", lambda pid=pid: pid)
        metrics.WorkerCounters(str(tmp_path)).start({"version": "1.2"})
    assert samples(tmp_path)['s2o:info{version="1.2"}'] == 1
    assert len(list(tmp_path.glob("gauge_*"))) == 2


def test_skipped_work_never_falls(tmp_path):
    """Half of a copy of a layer's counters may have arrived when they are read."""
    worker = metrics.WorkerCounters()
    counters = torch.tensor([10, 100, 0, 0, 0, 0])
    worker.watch(counters, 0)
    skipped = ("s2o:attention_tokens_skipped", "")
    assert worker.totals()[skipped] == 90
    counters[ELIGIBLE] = 300
    assert worker.totals()[skipped] == 290
    counters[VISITED] = 50
    assert worker.totals()[skipped] == 290
    counters[ELIGIBLE] = 400
    assert worker.totals()[skipped] == 350


def test_there_is_a_metric_for_every_device_counter():
    assert len(metrics.DEVICE_METRICS) == NUM_COUNTERS
    assert len(metrics.SHADOW_METRICS) == NUM_ERRORS


def test_without_a_folder_nothing_is_written(monkeypatch):
    monkeypatch.delenv(metrics.DIRECTORY, raising=False)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    worker = metrics.WorkerCounters()
    worker.start()
    worker.add("s2o:sparse_requests", 3)
    worker.publish()
    assert worker.totals()["s2o:sparse_requests", ""] == 3
