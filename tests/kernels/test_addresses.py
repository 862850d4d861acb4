"""A cache of more than 2^31 elements, as an H200 holds: every kernel finds what lies at its end.

On the CPU the interpreter computes addresses in the widths that the kernels ask for, and the pages
before the batch's are reserved, not touched.
"""

import pytest
import torch

from cases import CACHES, CLUSTERS, far_away, full_lists, make_batch, nan_like
from s2o_vllm.kernels.attention import attend, summaries
from s2o_vllm.kernels.attention import reference as attention_reference
from s2o_vllm.kernels.layout import NUM_COUNTERS
from s2o_vllm.kernels.ranking import low_rank, mean_query
from s2o_vllm.kernels.tiles import attend_tile
from s2o_vllm.kernels.tuning import CHUNK

REGION, SPAN = 32, 32


def by_low_rank(batch, work):
    """Basis, projections, row sums and scores of a history."""
    heads, head_dim = batch.query.shape[1:]
    space = low_rank.LowRankWorkspace(
        heads, heads, head_dim, work.max_seen, work.num_segments, 32, batch.query.dtype,
        batch.query.device,
    )  # fmt: skip
    return scored(low_rank.low_rank_scores, batch, work, space)


def by_mean_query(batch, work):
    heads, head_dim = batch.query.shape[1:]
    space = mean_query.MeanQueryWorkspace(
        work.num_segments, heads, head_dim, work.max_history, batch.query.dtype, batch.query.device
    )
    return scored(mean_query.mean_query_scores, batch, work, space)


def scored(function, batch, work, space):
    heads = batch.kv_cache.shape[1]
    chunks = -(-work.max_history // CHUNK)
    scores = torch.zeros(work.num_segments, heads, chunks * CHUNK, device=batch.query.device).half()
    bounds = torch.zeros(work.num_segments * heads, chunks, 2, device=batch.query.device)
    function(
        batch.query, batch.kv_cache, batch.block_table, work, scores, bounds, space,
        scale=batch.scale,
    )  # fmt: skip
    return scores


def by_summaries(batch, work):
    kv_heads, _, width = batch.kv_cache.shape[1:]
    space = summaries.workspace(
        kv_heads, width // 2, work.max_seen, batch.query.dtype, batch.query.device, CLUSTERS, REGION
    )
    summaries.summarise(batch.kv_cache, batch.block_table, work, space)
    parts = (space.means, space.value_covariances, space.key_covariances, space.labels)
    return torch.cat([part.float().flatten() for part in parts])


def by_attention(batch, work):
    """The dense pass, lists, what was not visited, and the estimate of its mass."""
    torch.manual_seed(1)
    ((_, lists),) = full_lists(batch, summaries=True, span=SPAN)
    out = nan_like(batch.query)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=out.device)
    attend.attend(
        batch.query, batch.kv_cache, batch.block_table, work, lists,
        attention_reference.summarise(
            batch.kv_cache, batch.block_table, work, batch.query.dtype, CLUSTERS, REGION
        ),
        out, counters, scale=batch.scale, v_scale=batch.v_scale,
        tile=attend_tile(batch.query.shape[2], out.device),
    )  # fmt: skip
    return torch.cat([out.float().flatten(), counters.float()])


@pytest.mark.parametrize("kernel", [by_low_rank, by_mean_query, by_summaries, by_attention])
@pytest.mark.parametrize("head_major", [True, False])
@pytest.mark.parametrize("fp8", CACHES)
def test_a_cache_beyond_32_bits_gives_the_same(device, kernel, head_major, fp8):
    batch = make_batch(device, chunks=((150, 40),), head_major=head_major, fp8=fp8)
    far = far_away(batch)
    (work,) = batch.work(span=SPAN)
    wanted, got = kernel(batch, work), kernel(far, work)
    assert torch.isfinite(wanted).all()
    assert torch.equal(got, wanted)
