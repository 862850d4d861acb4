import pytest
import torch

from s2o_vllm.benchmarks.quality.methods import parse
from s2o_vllm.benchmarks.research.selection_loss import STEPS, judge


def test_the_best_tokens_drop_least_and_the_selection_hardly_more(make_segment):
    torch.manual_seed(0)
    segment = make_segment(history=2000, length=64)
    rows = judge(segment, parse("served"), [0.1])
    assert [row["step"] for row in rows] == list(STEPS)
    best, every, *sampled = rows
    assert abs(every["dropped_mass"] - best["dropped_mass"]) < 0.02, "a part is a sample"
    assert all(row["dropped_mass"] < best["dropped_mass"] + 0.03 for row in sampled)
    assert best["density"] == pytest.approx(0.1)
    # At the largest step 19 scores tell where the best 150 of these 2,000 tokens end.
    assert all(row["density"] == pytest.approx(0.1, rel=0.25) for row in rows)
