import pytest
import torch

from s2o_vllm.benchmarks.quality.methods import parse
from s2o_vllm.benchmarks.research.row_mass import judge, summarise


def test_a_shift_common_to_a_tile_is_bias_and_no_spread():
    error = torch.full((2, 256), 3.0)
    error[:, 128:] = 5.0
    assert summarise(error) == pytest.approx((4.0, 0.0, 0.0))


def test_spread_is_measured_inside_tiles():
    error = torch.tensor([1.0, -1.0]).repeat(128)[None] + 7
    assert summarise(error) == pytest.approx((7.0, 1.0, 1.0))


def test_full_rank_knows_the_row_mass(make_segment):
    segment = make_segment(history=1024, length=128)
    rows = judge(segment, parse("lowrank:rank=16,chunk=0,basis=eigen,queries=0"))
    found = {(row["shift"], row["against"]): row for row in rows}
    assert abs(found["lse", "full"]["bias"]) < 1e-2
    assert found["lse", "full"]["spread"] < 1e-2
    assert found["top", "full"]["bias"] < -1
    assert found["max16", "low_rank"]["spread"] < found["top", "low_rank"]["spread"]
