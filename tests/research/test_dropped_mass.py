import pytest
import torch

from s2o_vllm.benchmarks.quality.measure import measure
from s2o_vllm.benchmarks.quality.methods import parse
from s2o_vllm.benchmarks.research.dropped_mass import SAMPLES, compare, judge, sampled


def test_all_columns_give_the_sum_itself():
    probability = torch.rand(3, 100)
    torch.testing.assert_close(sampled(probability, 1000), probability.sum(1))


def test_a_sample_is_even_and_scaled_up():
    probability = torch.arange(1000.0)[None]
    got = float(sampled(probability, 10))
    assert got == pytest.approx(float(probability.sum()), rel=1e-2)
    peak = torch.zeros(1, 1000)
    peak[0, 50] = 1.0
    assert float(sampled(peak, 10)) == 100.0, "column 50 is one of 50, 150, 250, …"


def test_within_the_factor_counts_both_sides():
    truth = torch.ones(4)
    found = compare(truth, torch.tensor([1.0, 1.4, 1.6, 0.5]))
    assert found["within_factor"] == 0.5
    assert found["estimate"] == pytest.approx(1.125)


def test_the_truth_is_what_the_measurement_says_was_dropped(make_segment):
    segment = make_segment(history=600, length=64)
    method = parse("served")
    rows = judge(segment, method, [0.1])
    assert [row["samples"] for row in rows] == list(SAMPLES)
    assert rows[0]["tiles"] == 4, "one unit of 64 queries for each of four heads"
    errors = measure(segment, method.selector(segment).select(0.1))
    assert rows[0]["dropped_mass"] == pytest.approx(errors.dropped_mass, abs=1e-3)
    assert rows[-1]["within_factor"] == 1.0, "more samples than tokens: the truth itself"
    assert rows[-1]["estimate"] == pytest.approx(rows[-1]["dropped_mass"], abs=1e-4)
