import pytest
import torch

from cases import (
    CACHES,
    CHUNKS,
    ON_GPU,
    SEGMENT,
    TOLERANCE,
    dense_attention,
    make_batch,
    nan_like,
    relative_error,
)
from s2o_vllm.kernels.layout import ELIGIBLE, NUM_COUNTERS, VISITED
from s2o_vllm.kernels.prefill import SparsePrefill
from s2o_vllm.kernels.ranking import RANKINGS
from s2o_vllm.kernels.shape import WORKSPACE_BYTES, Shape
from s2o_vllm.kernels.side_stream import IN_TURN
from s2o_vllm.kernels.tuning import HEADS_SHARED
from s2o_vllm.kernels.work_list import build_work_lists


def operator_for(batch, ranking="low_rank", **options):
    heads, head_dim = batch.query.shape[1:]
    shape = Shape(heads, batch.kv_cache.shape[1], head_dim, 4096, 512, SEGMENT, ranking)
    scale = batch.softmax_scale
    return SparsePrefill(shape, batch.query.dtype, batch.query.device, scale=scale, **options)


def run(batch, works, **options):
    out = nan_like(batch.query)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=out.device)
    operator = operator_for(batch, **options)
    for work in works:
        operator(
            batch.query, batch.kv_cache, batch.block_table, work, out, counters,
            k_scale=batch.k_scale, v_scale=batch.v_scale,
        )  # fmt: skip
    return out, counters


def works_of(batch, operator):
    """As a server makes them: within the operator's limits."""
    shape = operator.shape
    return build_work_lists(batch.rows, shape.segment, 0, batch.query.device, shape.limits)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (7, 1), (3, 3)])
def test_density_is_about_the_budget(device, ranking, heads, kv_heads):
    batch = make_batch(device, budget=0.25, heads=heads, kv_heads=kv_heads)
    works = works_of(batch, operator_for(batch, ranking))
    _, counters = run(batch, works, ranking=ranking)
    assert 0.2 < counters[VISITED] / counters[ELIGIBLE] < 0.27, "a sample has no fixed size"


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("fp8", CACHES)
def test_a_budget_of_nearly_everything_is_nearly_dense_attention(device, ranking, fp8):
    """Heads of a group that share a budget cannot have more than the history."""
    batch = make_batch(device, heads=6, budget=0.999, fp8=fp8)
    works = works_of(batch, operator_for(batch, ranking))
    out, _ = run(batch, works, ranking=ranking)
    assert relative_error(out, dense_attention(batch)) < 0.2


@pytest.mark.parametrize("fp8", CACHES)
def test_dense_segments_are_exact(device, fp8):
    batch = make_batch(device, budget=0.1, fp8=fp8)
    out, _ = run(batch, batch.work(min_context=10_000))
    assert relative_error(out, dense_attention(batch)) < TOLERANCE


def test_dense_segments_beside_ranked_ones_are_exact(device):
    batch = make_batch(device, budget=0.1, chunks=((90, 3 * SEGMENT), (0, 40)))
    first, other = batch.work(min_context=100)
    assert (first.num_segments, first.dense_segments, first.max_dense) == (4, 2, 96)
    assert (other.num_segments, other.dense_segments, other.max_dense) == (2, 2, SEGMENT)
    out, counters = run(batch, [first, other], stop_threshold=1e-30)
    dense = SEGMENT + 96 - 90  # queries of the first one's two dense segments
    exact = dense_attention(batch)
    for part in (slice(0, dense), slice(3 * SEGMENT, None)):
        assert relative_error(out[part], exact[part]) < TOLERANCE
    assert relative_error(out[dense : 3 * SEGMENT], exact[dense : 3 * SEGMENT]) > TOLERANCE
    assert counters[VISITED] < counters[ELIGIBLE]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("fp8", CACHES)
def test_error_falls_as_the_budget_rises(device, ranking, fp8):
    torch.manual_seed(0)
    batch = make_batch(device, spread=2.0, fp8=fp8)
    truth = dense_attention(batch)
    errors = []
    for budget in (0.1, 0.5, 0.999):
        batch.rows = [row._replace(budget=budget) for row in batch.rows]
        errors.append(relative_error(run(batch, batch.work(), ranking=ranking)[0], truth))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.2


@pytest.mark.parametrize("ranking", RANKINGS)
def test_finds_the_token_that_every_query_wants(device, ranking):
    """A needle: with 5 % of the history the output is that of dense attention."""
    batch = make_batch(device, chunks=((600, 32),), budget=0.05)
    needle = torch.nn.functional.normalize(torch.randn(64), dim=0).to(device) * 40
    page = batch.kv_cache.shape[2]
    block = int(batch.block_table[0, 333 // page])
    batch.kv_cache[block, :, 333 % page, :64] = needle
    batch.query += needle
    out, _ = run(batch, batch.work(), ranking=ranking)
    assert relative_error(out, dense_attention(batch)) < max(1e-3, TOLERANCE)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_request_does_not_depend_on_its_neighbours(device, ranking):
    batch = make_batch(device)
    together, _ = run(batch, batch.work(), ranking=ranking)
    batch.rows = batch.rows[:1]
    alone, _ = run(batch, batch.work(), ranking=ranking)
    first = CHUNKS[0][1]
    torch.testing.assert_close(alone[:first], together[:first], atol=0, rtol=0)


def test_refuses_an_unknown_head_dim(device):
    batch = make_batch(device, head_dim=32)
    with pytest.raises(ValueError, match="head_dim is 32"):
        operator_for(batch)


def test_refuses_an_unknown_ranking(device):
    with pytest.raises(ValueError, match="ranking is 'best', must be one of low_rank, mean_query"):
        operator_for(make_batch(device), ranking="best")


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("fp8", CACHES)
def test_warm_up_touches_nothing(device, ranking, fp8):
    batch = make_batch(device, fp8=fp8)
    before = [x.clone() for x in (batch.query, batch.kv_cache, batch.block_table)]
    operator_for(batch, ranking).warm_up(batch.query, batch.kv_cache, batch.block_table)
    after = (batch.query, batch.kv_cache, batch.block_table)
    assert all(torch.equal(x.float(), y.float()) for x, y in zip(before, after, strict=True))


def test_one_launch_takes_a_chunk_and_a_quarter_of_its_history():
    assert Shape(32, 8, 128, 131072, 8192, 64).limits == (128, 32 * 131072, HEADS_SHARED)
    assert Shape(32, 8, 128, 131072, 8192, 512, "mean_query").limits.segments == 16
    assert Shape(32, 8, 128, 131072, 8192, 4096, "mean_query").limits.segments == 2


def test_scratch_is_bounded():
    for ranking in RANKINGS:
        items, slots, _ = Shape(32, 32, 128, 1_000_000, 8192, 64, ranking).limits
        assert (2 * items * 1_000_000 + 4 * slots) * 32 <= WORKSPACE_BYTES


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has one stream")
def test_a_second_stream_changes_nothing(device):
    """Chunks and layers follow one another without a pause, as in a server."""
    batch = make_batch(device, chunks=((3000, 512), (700, 300)))
    operator, results = operator_for(batch, "low_rank"), []  # which alone has one
    works = works_of(batch, operator)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
    for side_stream in [IN_TURN] + 20 * [operator.space.side_stream]:
        operator.space = operator.space._replace(side_stream=side_stream)
        out = nan_like(batch.query)
        for work in works:
            operator(batch.query, batch.kv_cache, batch.block_table, work, out, counters)
        results.append(out)
    for out in results[1:]:
        torch.testing.assert_close(out, results[0], atol=0, rtol=0)
