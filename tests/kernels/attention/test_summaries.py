"""Means of regions: what they are, what they weigh, and that no segment sees a later token's."""

import pytest
import torch

from cases import (
    CACHES,
    DTYPE,
    DTYPES,
    LARGE_CARD,
    TOLERANCE,
    make_batch,
    nan_like,
    relative_error,
    tokens_of,
)
from s2o_vllm.kernels.attention import attend, summaries
from s2o_vllm.kernels.attention import reference as attention_reference
from s2o_vllm.kernels.attention.summary_table import Summaries, covariance_part, region_samples
from s2o_vllm.kernels.layout import NUM_COUNTERS
from s2o_vllm.kernels.prefill import SparsePrefill
from s2o_vllm.kernels.selection.selected import SelectedTokens
from s2o_vllm.kernels.shape import Shape
from s2o_vllm.kernels.tiles import attend_tile
from s2o_vllm.kernels.tuning import (
    COVARIANCE_GROUP,
    COVARIANCE_WEIGHT,
    REGION_TOKENS,
    REGION_VARIANCE,
    REGION_WEIGHT,
    REGION_WEIGHT_LIMIT,
    SAMPLE_SHARE,
)

NONE_LISTED = 1e-9  # a budget of no token at all


def averaged(batch, work, region):
    """The kernel's means, over room that held NaN."""
    kv_heads, _, width = batch.kv_cache.shape[1:]
    device = batch.kv_cache.device
    space = summaries.workspace(
        kv_heads, width // 2, 2 * work.max_history, batch.query.dtype, device, region
    )
    for part in (space.means, space.value_covariances, space.key_covariances, space.sums):
        part.fill_(float("nan"))
    summaries.summarise(batch.kv_cache, batch.block_table, work, space)
    return space


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "page", "region"),
    [(64, 16, 32), (96, 48, 128), pytest.param(512, 16, 128, marks=LARGE_CARD)],
)
@pytest.mark.parametrize("fp8", CACHES)
def test_means_are_those_of_evenly_spaced_tokens(device, dtype, head_dim, page, region, fp8):
    batch = make_batch(
        device, chunks=((300, 20),), head_dim=head_dim, page=page, dtype=dtype, fp8=fp8
    )
    (work,) = batch.work()
    means = averaged(batch, work, region).means
    count = work.max_seen // region
    assert torch.isnan(means[:, count:]).all(), "no region that is not whole"
    keys, values = tokens_of(batch, batch.rows[0])
    tokens = torch.cat([keys / batch.k_scale, values / batch.v_scale], -1)
    tokens = tokens[:, : count * region].double()  # in units of the cache
    samples = region_samples(work.whole_chunk, region)
    places = (torch.arange(samples, device=device) + 0.5) * region / samples
    wanted = tokens.unflatten(1, (count, region))[:, :, places.long()].mean(2)
    rounding = 4 * torch.finfo(dtype).eps
    assert relative_error(means[:, :count], wanted) < rounding
    own = attention_reference.summarise(
        batch.kv_cache, batch.block_table, work, dtype, region
    ).means
    assert relative_error(means[:, :count], own) < rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "page"), [(64, 16), (96, 48)])
@pytest.mark.parametrize("fp8", CACHES)
def test_slopes_are_covariances_of_what_comes_before_a_fit(device, dtype, head_dim, page, fp8):
    """Two fits of a chunk, the first begun before it; four samples of a part lie side by side."""
    region, cuts = 128, (2048, 4096)
    batch = make_batch(
        device, chunks=((4064, 64),), head_dim=head_dim, page=page, dtype=dtype, fp8=fp8
    )
    (work,) = batch.work(segment=32)
    assert work.span_table.shape[0] == 2
    span = covariance_part(work.whole_chunk, region)
    assert span == 4 * region
    got = averaged(batch, work, region)
    for covariances in (got.value_covariances, got.key_covariances):
        assert torch.isnan(covariances[2:]).all(), "no more than there are spans"
    keys, values = tokens_of(batch, batch.rows[0])
    keys, values = keys.double() / batch.k_scale, values.double() / batch.v_scale
    for number, cut in enumerate(cuts):
        groups = [x[:, 2:cut:4].unflatten(1, (-1, COVARIANCE_GROUP)) for x in (keys, values)]
        k, v = (x - x.mean(2, keepdim=True) for x in groups)
        of_values = COVARIANCE_WEIGHT * torch.einsum("hgsd,hgse->hde", k, v) / (cut / 4)
        of_keys = torch.einsum("hgsd,hgse->hde", k, k) / (cut / 4)
        pairs = ((got.value_covariances, of_values), (got.key_covariances, of_keys))
        for covariances, wanted in pairs:
            assert relative_error(covariances[number], wanted) < 40 * torch.finfo(dtype).eps
    own = attention_reference.summarise(batch.kv_cache, batch.block_table, work, dtype, region)
    for one, other in (
        (got.value_covariances, own.value_covariances),
        (got.key_covariances, own.key_covariances),
    ):
        assert relative_error(one[:2], other) < 40 * torch.finfo(dtype).eps


def test_keys_may_spread_further_than_their_dtype(device):
    """Of fp16 keys of some hundreds: what is too much counts as the most that there is."""
    batch = make_batch(device, chunks=((2048, 32),), dtype=torch.float16)
    batch.kv_cache *= 400
    (work,) = batch.work(segment=32)
    own = attention_reference.summarise(batch.kv_cache, batch.block_table, work, torch.float16, 128)
    got = averaged(batch, work, 128)
    for one in (got, own):
        assert one.key_covariances[0].isfinite().all()
        assert (one.key_covariances[0].diagonal(dim1=1, dim2=2) == 65504).all()


def test_a_history_shorter_than_a_part_has_no_slope(device):
    """And nothing is read behind it: the sums keep what they held."""
    batch = make_batch(device, chunks=((90, 10),))
    (work,) = batch.work()
    own = averaged(batch, work, 128)
    assert torch.isnan(own.sums).all()
    wanted = attention_reference.summarise(batch.kv_cache, batch.block_table, work, DTYPE, 128)
    for one in (own, wanted):
        assert (one.value_covariances[0] == 0).all()
        assert (one.key_covariances[0] == 0).all()


@pytest.mark.parametrize(("history", "span"), [(100, 32), (16 * 32 + 31, 32), (17 * 32, 64)])
def test_a_slope_has_at_most_so_many_parts_of_whole_regions(history, span):
    assert covariance_part(history, 32) == span


def test_pieces_of_a_history_do_not_depend_on_how_a_prompt_is_cut(device):
    """Whichever part of a chunk comes, its means and covariances are those of the whole chunk."""
    batch = make_batch(device, chunks=((4000, 400),))
    (row,) = batch.rows
    (whole,) = batch.work(segment=32)
    own = averaged(batch, whole, 128)
    for start, count in ((0, 90), (96, 304), (390, 10)):
        batch.rows = [
            row._replace(query_start=start, num_queries=count, context=row.context + start)
        ]
        (part,) = batch.work(segment=32)
        cut = averaged(batch, part, 128)
        seen = part.max_seen // 128
        assert torch.equal(cut.means[:, :seen], own.means[:, :seen])
        fits = part.span_table.shape[0]
        of_whole = slice(2 - fits, 2) if start else slice(0, 1)
        assert torch.equal(cut.value_covariances[:fits], own.value_covariances[of_whole])
        assert torch.equal(cut.key_covariances[:fits], own.key_covariances[of_whole])


@pytest.mark.parametrize(("regions", "samples"), [(1, 256), (64, 256), (100, 128), (128, 128),
                                                  (256, 128), (2000, 128)])  # fmt: skip
def test_means_of_long_histories_are_told_by_fewer_tokens(regions, samples):
    assert region_samples(regions * REGION_TOKENS + 5) == samples
    assert region_samples(regions * 32, 32) == 32, "all, where a region has no more"


def attended(batch, work, own):
    """Attend without any listed token."""
    device, kv_heads = batch.query.device, batch.kv_cache.shape[1]
    slots, lengths, samples = (
        torch.zeros(shape, dtype=torch.int32, device=device)
        for shape in (
            (work.num_segments, kv_heads, 1),
            (work.num_segments, kv_heads),
            (1, kv_heads, 256),
        )
    )
    weights = torch.zeros(slots.shape, dtype=torch.float16, device=device)
    out = nan_like(batch.query)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
    selected = SelectedTokens(slots, weights, lengths, samples)
    attend.attend(
        batch.query, batch.kv_cache, batch.block_table, work, selected, own, out, counters,
        scale=batch.scale, tile=attend_tile(batch.query.shape[2], device),
    )  # fmt: skip
    return out


def test_a_region_of_one_key_counts_as_its_tokens_and_more(device):
    """Where all keys of a region are alike, its mean key gives the very mass of its tokens."""
    region, own_tokens = 32, 7
    batch = make_batch(
        device, chunks=((3 * region, own_tokens),), budget=NONE_LISTED, kv_heads=2, page=region
    )
    head_dim = batch.query.shape[2]
    batch.kv_cache[..., :head_dim] = batch.kv_cache[:, :, :1, :head_dim].clone()  # one key a page
    (work,) = batch.work(segment=region)
    out = attended(batch, work, averaged(batch, work, region))
    keys, values = (x.double().repeat_interleave(2, 0) for x in tokens_of(batch, batch.rows[0]))
    queries = batch.query.double().transpose(0, 1)
    scores = queries @ keys.mT * batch.scale
    scores[..., : 3 * region] += torch.tensor(REGION_WEIGHT * (1 - SAMPLE_SHARE)).log()
    future = torch.ones(own_tokens, own_tokens, device=device).triu(1).bool()
    scores[..., 3 * region :].masked_fill_(future, float("-inf"))
    wanted = (scores.softmax(-1) @ values).transpose(0, 1)
    assert relative_error(out, wanted) < TOLERANCE
    empty = torch.empty(2, 1, 2 * head_dim, device=device, dtype=DTYPE)
    none = Summaries(empty, empty, empty, 2**20)
    assert relative_error(attended(batch, work, none), wanted) > 0.1


def test_a_mean_value_follows_the_query(device):
    """Values that are linear in their keys: their covariance has most of what a mean lacks."""
    region, own_tokens, heads = 256, 1, 4
    batch = make_batch(device, chunks=((9 * region, own_tokens),), budget=NONE_LISTED, kv_heads=2)
    head_dim = batch.query.shape[2]
    keys = batch.kv_cache[..., :head_dim]
    batch.kv_cache[..., head_dim:] = keys.flip(-1)  # of covariance one, a permutation
    (work,) = batch.work(segment=64)
    own = averaged(batch, work, region)
    k, v = (x.double().repeat_interleave(heads // 2, 0) for x in tokens_of(batch, batch.rows[0]))
    queries = batch.query.double().transpose(0, 1)
    wanted = ((queries @ k.mT * batch.scale).softmax(-1) @ v).transpose(0, 1)
    errors = [
        float(relative_error(attended(batch, work, regions), wanted))
        for regions in (
            own,
            own._replace(value_covariances=torch.zeros_like(own.value_covariances)),
        )
    ]
    assert errors[0] < 0.6 * errors[1], errors


@pytest.mark.parametrize("size", [0.2, 1.0, 30.0])
def test_a_region_counts_more_where_scores_spread(device, size):
    """By the variance of each query's scores, up to a bound: the own token's share falls."""
    region, regions_of = 128, 16
    batch = make_batch(device, chunks=((regions_of * region, 1),), budget=NONE_LISTED, kv_heads=2)
    head_dim, page = batch.query.shape[2], batch.kv_cache.shape[2]
    batch.query *= size
    (row,) = batch.rows
    batch.kv_cache[..., head_dim:] = 0.0
    own_token = batch.kv_cache[
        batch.block_table[row.row, row.context // page], :, row.context % page
    ]
    own_token[:, :head_dim], own_token[:, head_dim:] = 0.0, 1.0
    (work,) = batch.work(segment=64)
    own = averaged(batch, work, region)
    own.means[..., :head_dim] = 0.0  # a score of zero, as the own token has it
    out = attended(
        batch, work, own._replace(value_covariances=torch.zeros_like(own.value_covariances))
    )
    keys, _ = tokens_of(batch, row)
    groups = keys[:, : row.context].double().unflatten(1, (-1, region))
    centred = (groups - groups.mean(2, keepdim=True)).flatten(1, 2).repeat_interleave(2, 0)
    queries = batch.query.double().transpose(0, 1)
    variance = (queries @ centred.mT * batch.scale).square().mean(-1)
    weight = (REGION_WEIGHT * (REGION_VARIANCE * variance).exp()).clamp(max=REGION_WEIGHT_LIMIT)
    wanted = 1 / (1 + regions_of * region * weight * (1 - SAMPLE_SHARE))
    found = out.double().transpose(0, 1)[..., 0]
    assert (found / wanted).log().abs().max() < 0.3, "a sample tells the covariance"
    assert (weight == REGION_WEIGHT_LIMIT).all() == (size == 30.0)


def test_no_segment_sees_a_mean_of_later_tokens(device):
    """Two segments of one chunk: the first one's output is that of a chunk that ends with it."""
    region, segment = 32, 16
    batch = make_batch(device, chunks=((80, 48),), budget=NONE_LISTED)
    (work,) = batch.work(segment=segment)
    assert work.max_history // region > 80 // region, "the chunk itself fills a region"
    out = attended(batch, work, averaged(batch, work, region))
    batch.rows = [batch.rows[0]._replace(num_queries=segment)]
    (alone,) = batch.work(segment=segment)
    first = attended(batch, alone, averaged(batch, alone, region))
    assert torch.equal(out[:segment], first[:segment])


@pytest.mark.parametrize("ranking", ["low_rank", "mean_query"])
def test_the_operator_attends_to_regions(device, ranking):
    """Like values in all the history: an output without a mean would hold little of them."""
    heads, kv_heads, head_dim, queries = 4, 2, 64, 8
    batch = make_batch(device, chunks=((REGION_TOKENS, queries),), budget=0.01)
    batch.kv_cache[..., head_dim:] = 1.0
    own = batch.block_table[0, REGION_TOKENS // 16 :][:1].long()
    batch.kv_cache[own, :, :, head_dim:] = -1.0
    shape = Shape(heads, kv_heads, head_dim, 2048, queries, 64, ranking)
    operator = SparsePrefill(shape, DTYPE, device, scale=batch.scale)
    out = nan_like(batch.query)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
    (work,) = batch.work(segment=64)
    operator(batch.query, batch.kv_cache, batch.block_table, work, out, counters)
    assert (out > 0.7).all(), "1,024 tokens outweigh eight, though ten of them are visited"
