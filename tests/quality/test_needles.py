import pytest
import torch

from s2o_vllm.benchmarks.quality import needles
from s2o_vllm.benchmarks.quality.methods import parse


def test_a_key_that_one_query_wants_is_a_needle(make_segment, monkeypatch):
    monkeypatch.setattr(needles, "LAST", 64)
    history, wanted = 512, {3: 5, 40: 200, 60: 490}  # a sink, a needle, a neighbour
    q = torch.zeros(1, 64, 16)
    k = torch.randn(1, history, 16) * 0.01
    for place, (query, key) in enumerate(wanted.items()):
        q[0, query, place] = 40.0
        k[0, key, place] = 5.0  # beyond what the segment's own random keys reach
    segment = make_segment(heads=1, kv_heads=1, history=history, q=q, k=k)
    rows, keys, probability = needles.needles(segment)
    assert (rows.tolist(), keys.tolist()) == ([40], [200])
    assert float(probability[0]) > 0.8


def test_what_all_queries_want_is_no_needle(make_segment):
    k = torch.randn(1, 2048, 16) * 0.01
    k[0, 300] = 2.0
    segment = make_segment(heads=1, kv_heads=1, history=2048, q=torch.ones(1, 64, 16) * 2, k=k)
    assert len(needles.needles(segment)[0]) == 0


def test_recall_is_of_the_unit_whose_query_wants_the_key(make_segment, monkeypatch):
    """The oracle holds all; a mean query misses what one query wants and the others do not."""
    monkeypatch.setattr(needles, "LAST", 64)
    torch.manual_seed(0)
    q, k = torch.randn(2, 64, 16), torch.randn(1, 1024, 16)
    q[0, :, 0], q[0, 7, 0], k[0, 500, 0] = -1.0, 20.0, 5.0
    segment = make_segment(heads=2, kv_heads=1, history=1024, q=q, k=k)
    found = {
        spec: needles.judge(segment, parse(spec), [0.01])[0]
        for spec in ("token_oracle:unit=64xhead", "mean_query:unit=64xhead")
    }
    oracle, mean = found.values()
    assert oracle["needles"] == mean["needles"] > 0
    assert oracle["held"] == pytest.approx(oracle["probability"])
    assert mean["held"] < mean["probability"]
