"""bf16 and fp16 on the card, at the tile shapes that serve."""

import pytest
import torch

from cases import (
    CACHES,
    CLUSTERS,
    dense_attention,
    full_lists,
    make_batch,
    nan_like,
    relative_error,
)
from s2o_vllm.config import RANKINGS as SEGMENTS
from s2o_vllm.kernels import paging
from s2o_vllm.kernels.attention import attend
from s2o_vllm.kernels.attention import reference as attention_reference
from s2o_vllm.kernels.layout import DENSE_START, ELIGIBLE, LIST_LENGTH, NUM_COUNTERS, ROW, VISITED
from s2o_vllm.kernels.prefill import SparsePrefill
from s2o_vllm.kernels.ranking import RANKINGS, low_rank, mean_query
from s2o_vllm.kernels.ranking import reference as ranking_reference
from s2o_vllm.kernels.selection import reference as selection_reference
from s2o_vllm.kernels.selection import select
from s2o_vllm.kernels.shape import Shape
from s2o_vllm.kernels.tiles import HEAD_DIMS, attend_tile
from s2o_vllm.kernels.tuning import HEADS_SHARED
from s2o_vllm.kernels.work_list import build_work_lists, list_capacity

CHUNKS = ((3000, 700), (0, 300), (1777, 1), (500, 64))


def gpu_batch(**options):
    return make_batch(torch.device("cuda"), chunks=CHUNKS, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (12, 2), (7, 1), (4, 4)])
@pytest.mark.parametrize("fp8", CACHES)
def test_full_list_is_dense_attention(dtype, head_dim, heads, kv_heads, fp8):
    """Promise 3: error against fp64 at most twice that of PyTorch in the same dtype.

    Of an fp8 cache, both attend to what it stands for.
    """
    batch = gpu_batch(
        dtype=dtype, head_dim=head_dim, heads=heads, kv_heads=kv_heads, budget=1.0,
        head_major=False, fp8=fp8,
    )  # fmt: skip
    out = nan_like(batch.query)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device="cuda")
    truth = dense_attention(batch)
    same_dtype = relative_error(dense_attention(batch, dtype), truth)
    for work, lists in full_lists(batch, summaries=True):
        own = attention_reference.summarise(
            batch.kv_cache, batch.block_table, work, dtype, CLUSTERS
        )
        attend.attend(
            batch.query, batch.kv_cache, batch.block_table, work, lists, own, out, counters,
            scale=batch.scale, v_scale=batch.v_scale, tile=attend_tile(head_dim, out.device),
        )  # fmt: skip
    assert relative_error(out, truth) <= 2 * same_dtype


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("fp8", CACHES)
def test_lists_agree_with_the_reference(ranking, fp8):
    """The same tokens up to rounding: bf16 scores may swap tokens at the edge of a list.

    A mean query's attention to random keys is so flat that one step of fp16 holds a tenth of a
    list: keys that are larger tell more tokens apart.
    """
    spread = 4.0 if ranking == "mean_query" else 1.0
    batch = gpu_batch(heads=32, kv_heads=8, head_dim=128, budget=0.1, spread=spread, fp8=fp8)
    (heads, head_dim), device = batch.query.shape[1:], batch.query.device
    for work in batch.work(segment=64):
        if work.max_list == 0:
            continue
        places = work.num_segments * list_capacity(work.max_list)
        selection = select.SelectWorkspace(work.num_segments, 8, work.max_history, places, device)
        arguments = (batch.query, batch.kv_cache, batch.block_table, work)
        results = (selection.scores, selection.bounds)
        if ranking == "mean_query":
            space = mean_query.MeanQueryWorkspace(
                work.num_segments, heads, head_dim, work.max_history, batch.query.dtype, device
            )
            mean_query.mean_query_scores(*arguments, *results, space, scale=batch.scale)
            wanted = ranking_reference.mean_query_scores(*arguments, scale=batch.scale)
        else:
            space = low_rank.LowRankWorkspace(
                heads, heads, head_dim, work.max_seen, work.num_segments, 64,
                batch.query.dtype, device,
            )  # fmt: skip
            low_rank.low_rank_scores(*arguments, *results, space, scale=batch.scale)
            wanted = ranking_reference.low_rank_scores(
                *arguments, scale=batch.scale, probe_rows=space.probe_rows
            )
        page = batch.kv_cache.shape[2]
        select.select(batch.block_table, work, page, selection)
        lists = selection_reference.select(wanted, batch.block_table, work, page)
        own = selection.lists(work)
        for number, item in enumerate(work.segments.tolist()):
            # A threshold is linear inside a bucket, where scores are not spread evenly.
            listed, budget = int(own.lengths[number].sum()), 8 * item[LIST_LENGTH]
            assert abs(listed - budget) <= 4 * budget**0.5 + 0.02 * budget
            # Of a budget that a pair shares rounding moves a bucket from one list to the other.
            pairs, likewise = (
                of.lengths[number].unflatten(0, (-1, HEADS_SHARED)).sum(1) for of in (own, lists)
            )
            few = 0.1 * likewise + 2
            assert ((pairs - likewise).abs() <= few).all(), "rounding moves few tokens"
            table_row = batch.block_table[item[ROW]]
            for head, count in enumerate(own.lengths[number].tolist()):
                got = set(own.slots[number, head, :count].tolist())
                assert len(got) == count, "a list is full and has no repeats"
                scored = int(0.7 * count)
                best = wanted[number, head, : item[DENSE_START]].topk(scored).indices
                slots = paging.physical_slots(best, table_row, page)
                common = len(got & set(slots.tolist()))
                assert common >= 0.9 * scored - 2, "an edge has few tokens, however short a list"


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("fp8", CACHES)
def test_operator_runs_at_a_servers_sizes(ranking, fp8):
    """32K of history, an 8K chunk, workspaces of a 128K server; every row a mean of many values."""
    batch = make_batch(
        torch.device("cuda"), chunks=((32768, 8192),), heads=32, kv_heads=8, head_dim=128,
        head_major=False, budget=0.05, fp8=fp8,
    )  # fmt: skip
    shape = Shape(32, 8, 128, 131072, 8192, SEGMENTS[ranking], ranking)
    scale, scales = batch.softmax_scale, {"k_scale": batch.k_scale, "v_scale": batch.v_scale}
    operator = SparsePrefill(shape, batch.query.dtype, batch.query.device, scale=scale)
    out = nan_like(batch.query)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device="cuda")
    for work in build_work_lists(batch.rows, shape.segment, 0, batch.query.device, shape.limits):
        operator(batch.query, batch.kv_cache, batch.block_table, work, out, counters, **scales)
    # Means of many random values: small beside one of them, and not nothing. 8K of history give
    # 0.03 on a CPU, more tokens less.
    values = batch.kv_cache[..., 128:].float().std() * batch.v_scale
    assert 0.003 < out.float().std() / values < 0.1
    assert counters[VISITED] / counters[ELIGIBLE] == pytest.approx(0.05, rel=0.1)
