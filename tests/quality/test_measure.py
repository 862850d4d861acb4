import pytest
import torch

from s2o_vllm.benchmarks.quality.measure import early_stop, measure
from s2o_vllm.benchmarks.quality.selection import Selection, Summaries
from s2o_vllm.benchmarks.quality.units import Unit


def select(segment, unit, tokens, summaries=None):
    rows = Unit.parse(unit).rows(segment)
    return Selection(rows, [torch.as_tensor(tokens)] * len(rows.rows), summaries)


@pytest.mark.parametrize("unit", ["32xhead", "64xkv", "32xkv-sorted"])
def test_visiting_everything_has_no_error(make_segment, unit):
    segment = make_segment()
    errors = measure(segment, select(segment, unit, torch.arange(256)))
    assert errors.density == 1
    assert errors.relative_mse < 1e-10
    assert errors.dropped_mass_max < 1e-5


def test_dense_output_is_causal_attention(make_segment):
    segment = make_segment(length=32)
    k = torch.cat([segment.k, segment.own_k], 1).repeat_interleave(2, 0)
    v = torch.cat([segment.v, segment.own_v], 1).repeat_interleave(2, 0)
    mask = torch.ones(32, 288, dtype=torch.bool).tril(256)
    wanted = torch.nn.functional.scaled_dot_product_attention(segment.q, k, v, attn_mask=mask)
    torch.testing.assert_close(segment.dense.out, wanted, atol=1e-5, rtol=1e-4)


def test_dropped_mass_is_the_softmax_mass_of_what_is_skipped(make_segment):
    segment = make_segment()
    kept = torch.arange(0, 256, 2)
    errors = measure(segment, select(segment, "64xhead", kept))
    s = segment.q @ segment.k.repeat_interleave(2, 0).transpose(1, 2) * segment.scale
    skipped = (s - segment.dense.lse[..., None]).exp()[..., 1::2].sum(2)
    assert errors.density == pytest.approx(0.5)
    assert errors.dropped_mass == pytest.approx(float(skipped.mean()), rel=1e-4)
    assert errors.dropped_mass_max == pytest.approx(float(skipped.max()), rel=1e-4)
    assert errors.relative_mse > 1e-3


def test_mean_term_is_exact_where_skipped_tokens_are_alike(make_segment):
    k, v = torch.ones(2, 256, 16) * 0.3, torch.ones(2, 256, 16)
    segment = make_segment(k=k, v=v)
    mean = Summaries(k[0, :1], v[0, :1], torch.tensor([255.0]))
    bare = measure(segment, select(segment, "64xhead", [0]))
    corrected = measure(segment, select(segment, "64xhead", [0], [mean] * 4))
    assert bare.relative_mse > 0.1
    assert corrected.relative_mse < 1e-10
    assert corrected.dropped_mass == bare.dropped_mass  # the visited mass is the same


def test_early_stop_ends_where_the_gain_falls_under_tau(one_direction):
    # Steps of 10 tokens: the first brings nearly all mass, each later one about 1e-3 of it.
    segment = one_direction([8.0] * 10 + [1.0] * 90)
    lists = select(segment, "32xhead", torch.arange(100))
    never, late, first = early_stop(segment, lists, [0.0, 1e-2, 2.0], step=10)
    assert never.density == pytest.approx(1)
    assert never.relative_mse < 1e-10
    assert late.density == pytest.approx(0.2)  # the second step's gain is the first under tau
    assert first.density == pytest.approx(0.1)
    assert first.dropped_mass > late.dropped_mass > never.dropped_mass


def test_early_stop_waits_for_the_row_that_gains_most(one_direction):
    segment = one_direction([8.0] * 10 + [1.0] * 90)
    segment.q[0, 5, 0] *= -1  # this row wants the other tokens
    lists = select(segment, "32xhead", torch.arange(100))
    (errors,) = early_stop(segment, lists, [1e-2], step=10)
    assert errors.density == pytest.approx(1)


def test_a_tile_stops_alone(make_segment):
    segment = make_segment(heads=2, kv_heads=1, length=64)
    segment.q[:, 32:] *= 20
    lists = select(segment, "64xkv", torch.arange(256))
    together, *_ = early_stop(segment, lists, [0.05], step=16, tile=128)
    apart, *_ = early_stop(segment, lists, [0.05], step=16, tile=64)
    assert apart.density <= together.density
