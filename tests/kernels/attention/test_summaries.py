"""Clusters and regions: what they hold, what they weigh, and that no segment sees a later token."""

import pytest
import torch

from cases import (
    CACHES,
    CLUSTERS,
    DTYPE,
    DTYPES,
    LARGE_CARD,
    SUMMARIES,
    TOLERANCE,
    make_batch,
    nan_like,
    relative_error,
    tokens_of,
)
from s2o_vllm.kernels.attention import attend, summaries
from s2o_vllm.kernels.attention import reference as attention_reference
from s2o_vllm.kernels.attention.summary_table import TENSORS, history_before_chunk
from s2o_vllm.kernels.layout import NUM_COUNTERS
from s2o_vllm.kernels.prefill import SparsePrefill
from s2o_vllm.kernels.selection import reference as selection_reference
from s2o_vllm.kernels.selection.selected import SelectedTokens
from s2o_vllm.kernels.shape import Shape
from s2o_vllm.kernels.tiles import attend_tile
from s2o_vllm.kernels.tuning import (
    COVARIANCE_WEIGHT,
    REGION_TOKENS,
    SUMMARY_VARIANCE,
    SUMMARY_WEIGHT_LIMIT,
)

NONE_LISTED = 1e-9  # a budget of no token at all
REGION, SPAN = 32, 64  # tokens of a region; queries of a span: chunks of eight regions


def summarised(batch, work, clusters=CLUSTERS, region=REGION):
    """The kernels' summaries, over room that held NaN and 77."""
    kv_heads, _, width = batch.kv_cache.shape[1:]
    device = batch.kv_cache.device
    space = summaries.workspace(
        kv_heads, width // 2, work.max_seen + 9, batch.query.dtype, device, clusters, region
    )
    for part in (*(getattr(space, name) for name in TENSORS), *space.scratch):
        part.fill_(float("nan") if part.is_floating_point() else 77)
    summaries.summarise(batch.kv_cache, batch.block_table, work, space)
    return space


def refer(batch, work, clusters=CLUSTERS, region=REGION):
    return attention_reference.summarise(
        batch.kv_cache, batch.block_table, work, batch.query.dtype, clusters, region
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("context", "queries", "head_dim", "page", "clusters"),
    [
        (300, 50, 64, 16, 8),
        (520, 20, 96, 48, 40),
        (90, 10, 64, 16, 8),
        (256, 256, 64, 16, 1),
        pytest.param(260, 20, 512, 16, 8, marks=LARGE_CARD),
    ],
)
@pytest.mark.parametrize("fp8", CACHES)
def test_the_kernels_cluster_as_the_reference_does(
    device, dtype, context, queries, head_dim, page, clusters, fp8
):
    batch = make_batch(
        device, chunks=((context, queries),), head_dim=head_dim, page=page, dtype=dtype, fp8=fp8
    )
    (work,) = batch.work(span=SPAN)
    got, wanted = summarised(batch, work, clusters), refer(batch, work, clusters)
    assert got.starts.tolist() == wanted.starts.tolist() == [context // 256 * 256]
    # Rounding decides between centres that are equally near; one token in a hundred at the most.
    labels = got.labels[..., : work.max_seen]
    differ = float((labels != wanted.labels).float().mean())
    assert differ <= (0.01 if dtype == torch.bfloat16 else 0)
    assert (got.labels[..., work.max_seen :] == 77).all(), "nothing is written behind"
    assert int((got.sizes - wanted.sizes).abs().sum()) <= 2 * differ * labels.numel() + 0.5
    assert got.means.isfinite().all()
    rounding = (4 if differ == 0 else 40) * torch.finfo(dtype).eps
    assert relative_error(got.means, wanted.means) < rounding
    for name in ("value_covariances", "key_covariances"):
        one, other = getattr(got, name), getattr(wanted, name)
        assert one.isfinite().all()
        assert (one - other).norm() <= 40 * torch.finfo(dtype).eps * other.norm()


def test_clusters_are_those_of_k_means(device):
    """By hand, in fp64, from the very tokens that the clusters begin with; values weigh as keys."""
    batch = make_batch(device, chunks=((300, 50),))
    (work,) = batch.work(span=SPAN)
    own = refer(batch, work)
    keys, values = (x.double()[:, :256] for x in tokens_of(batch, batch.rows[0]))
    for head in range(len(keys)):
        first = attention_reference.initial_positions(256, CLUSTERS)
        both = torch.cat([keys[head], values[head]], 1)
        of_keys, of_values = (x[head, first].var(0).sum() for x in (keys, values))
        scaled = torch.cat([keys[head], values[head] * (of_keys / of_values).sqrt()], 1)
        centres = scaled[first]
        for _ in range(2):
            label = torch.cdist(scaled, centres).argmin(1)
            centres = torch.stack([scaled[label == i].mean(0) for i in range(CLUSTERS)])
        assert (own.labels[0, head, :256] == label).float().mean() > 0.99
        means = torch.stack([both[label == i].mean(0) for i in range(CLUSTERS)])
        assert relative_error(own.means[0, head, :CLUSTERS], means) < 0.02
        k, v = (both - means[label]).chunk(2, 1)
        covariance = COVARIANCE_WEIGHT * k.T @ v / 256
        assert relative_error(own.value_covariances[0, head], covariance) < 0.05
        assert relative_error(own.key_covariances[0, head], k.T @ k / 256) < 0.05


def test_regions_are_means_of_neighbours(device):
    batch = make_batch(device, chunks=((300, 180),))
    (work,) = batch.work(span=SPAN)
    own = summarised(batch, work)
    tokens = torch.cat(tokens_of(batch, batch.rows[0]), -1)[:, 256:480]
    wanted = tokens.double().unflatten(1, (7, REGION)).mean(2)
    found = own.means[0, :, CLUSTERS : CLUSTERS + 7]
    assert relative_error(found, wanted) < 4 * torch.finfo(DTYPE).eps
    assert (own.sizes[0, :, CLUSTERS:] == torch.tensor([REGION] * 7 + [0], device=device)).all()
    assert int(own.sizes.sum()) == 2 * 480, "every token of either head belongs to one"


@pytest.mark.parametrize(
    ("tokens", "start"), [(0, 0), (1, 0), (8192, 0), (8193, 8192), (100_000, 98_304)]
)
def test_a_chunk_begins_at_a_multiple(tokens, start):
    assert history_before_chunk(tokens, 2048) == start


def test_keys_may_spread_further_than_their_dtype(device):
    """Of fp16 keys of some hundreds: what is too much counts as the most that there is."""
    batch = make_batch(device, chunks=((512, 32),), dtype=torch.float16)
    batch.kv_cache *= 400
    (work,) = batch.work(span=SPAN)
    for one in (summarised(batch, work, 1), refer(batch, work, 1)):
        assert one.key_covariances.isfinite().all()
        assert (one.key_covariances[0].diagonal(dim1=1, dim2=2) == 65504).all()


def test_a_first_chunk_has_the_covariances_of_its_first_region(device):
    """Whoever sees any region sees that one."""
    batch = make_batch(device, chunks=((90, 10),))
    (work,) = batch.work(span=SPAN)
    keys, values = (x.double()[:, :REGION] for x in tokens_of(batch, batch.rows[0]))
    k, v = (x - x.mean(1, keepdim=True) for x in (keys, values))
    rounding = 40 * torch.finfo(DTYPE).eps
    for one in (summarised(batch, work), refer(batch, work)):
        of_values = COVARIANCE_WEIGHT * k.mT @ v / REGION
        assert relative_error(one.value_covariances[0], of_values) < rounding
        assert relative_error(one.key_covariances[0], k.mT @ k / REGION) < rounding
        assert (one.sizes[..., :CLUSTERS] == 0).all()


def test_summaries_do_not_depend_on_how_a_prompt_is_cut(device):
    """Whichever part of a chunk comes, its summaries are those of the whole chunk, to the bit."""
    batch = make_batch(device, chunks=((256, 250),))
    (row,) = batch.rows
    (whole,) = batch.work(span=SPAN)
    own = summarised(batch, whole)
    for start, count in ((0, 90), (96, 104), (230, 20)):
        batch.rows = [
            row._replace(query_start=start, num_queries=count, context=row.context + start)
        ]
        (part,) = batch.work(span=SPAN)
        cut = summarised(batch, part)
        seen = part.max_seen
        rows = CLUSTERS + (seen - 256) // REGION
        assert torch.equal(cut.means[:, :, :rows], own.means[:, :, :rows])
        assert torch.equal(cut.sizes[:, :, :rows], own.sizes[:, :, :rows])
        assert torch.equal(cut.labels[..., :seen], own.labels[..., :seen])
        assert torch.equal(cut.value_covariances, own.value_covariances)
        assert torch.equal(cut.key_covariances, own.key_covariances)


def attended(batch, work, own, summarise=True):
    """Attend without any listed token; without summaries, too, if asked."""
    device, kv_heads, n = batch.query.device, batch.kv_cache.shape[1], work.num_segments
    slots, lengths, samples = (
        torch.zeros(shape, dtype=torch.int32, device=device)
        for shape in ((n, kv_heads, 1), (n, kv_heads), (1, kv_heads, 256))
    )
    left = None
    if summarise:
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        left = torch.stack(
            [
                torch.stack(
                    [
                        selection_reference.left_out(nothing, own, head, line[4])
                        for head in range(kv_heads)
                    ]
                )
                for line in work.segments.tolist()
            ]
        )
    out = nan_like(batch.query)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
    selected = SelectedTokens(slots, lengths, samples, left)
    attend.attend(
        batch.query, batch.kv_cache, batch.block_table, work, selected, own, out, counters,
        scale=batch.scale, tile=attend_tile(batch.query.shape[2], device),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("context", [3 * REGION, 8 * REGION])
def test_summaries_of_one_key_count_as_their_tokens(device, context):
    """Where the tokens of a summary have one key, its mean gives the very mass of all of them."""
    own_tokens = 7
    batch = make_batch(
        device, chunks=((context, own_tokens),), budget=NONE_LISTED, kv_heads=2, page=REGION
    )
    head_dim = batch.query.shape[2]
    batch.kv_cache[..., :head_dim] = batch.kv_cache[:, :, :1, :head_dim].clone()  # one key a page
    (work,) = batch.work(segment=REGION, span=SPAN)
    own = summarised(batch, work)
    assert (own.key_covariances.abs() < 1e-3).all(), "a page is a cluster"
    out = attended(batch, work, own)
    keys, values = (x.double().repeat_interleave(2, 0) for x in tokens_of(batch, batch.rows[0]))
    queries = batch.query.double().transpose(0, 1)
    scores = queries @ keys.mT * batch.scale
    future = torch.ones(own_tokens, own_tokens, device=device).triu(1).bool()
    scores[..., context:].masked_fill_(future, float("-inf"))
    wanted = (scores.softmax(-1) @ values).transpose(0, 1)
    assert relative_error(out, wanted) < TOLERANCE
    assert relative_error(attended(batch, work, own, summarise=False), wanted) > 0.1


def test_a_mean_value_follows_the_query(device):
    """Values that are linear in their keys: their covariance has most of what a mean lacks."""
    heads = 4
    batch = make_batch(device, chunks=((2048, 1),), budget=NONE_LISTED, kv_heads=2)
    head_dim = batch.query.shape[2]
    keys = batch.kv_cache[..., :head_dim]
    batch.kv_cache[..., head_dim:] = keys.flip(-1)  # of covariance one, a permutation
    (work,) = batch.work(segment=64, span=SPAN)
    own = summarised(batch, work)
    k, v = (x.double().repeat_interleave(heads // 2, 0) for x in tokens_of(batch, batch.rows[0]))
    queries = batch.query.double().transpose(0, 1)
    wanted = ((queries @ k.mT * batch.scale).softmax(-1) @ v).transpose(0, 1)
    without = own._replace(value_covariances=torch.zeros_like(own.value_covariances))
    errors = [float(relative_error(attended(batch, work, one), wanted)) for one in (own, without)]
    assert errors[0] < 0.6 * errors[1], errors


@pytest.mark.parametrize("size", [0.2, 1.0, 30.0])
def test_a_cluster_counts_more_where_scores_spread(device, size):
    """By the variance of each query's scores, up to a bound: the own token's share falls."""
    batch = make_batch(device, chunks=((2048, 1),), budget=NONE_LISTED, kv_heads=2)
    head_dim, page = batch.query.shape[2], batch.kv_cache.shape[2]
    batch.query *= size
    (row,) = batch.rows
    batch.kv_cache[..., head_dim:] = 0.0
    own_token = batch.kv_cache[
        batch.block_table[row.row, row.context // page], :, row.context % page
    ]
    own_token[:, :head_dim], own_token[:, head_dim:] = 0.0, 1.0
    (work,) = batch.work(segment=64, span=SPAN)
    own = summarised(batch, work)
    keys, _ = tokens_of(batch, row)
    label = own.labels[0, :, :2048].long()
    means = own.means[0, ..., :head_dim].double()
    centred = keys[:, :2048].double() - means.gather(1, label[..., None].expand(-1, -1, head_dim))
    own.means[..., :head_dim] = 0.0  # a score of zero, as the own token has it
    own = own._replace(value_covariances=torch.zeros_like(own.value_covariances))
    out = attended(batch, work, own)
    queries = batch.query.double().transpose(0, 1)
    variance = (queries @ centred.repeat_interleave(2, 0).mT * batch.scale).square().mean(-1)
    weight = (SUMMARY_VARIANCE * variance).exp().clamp(max=SUMMARY_WEIGHT_LIMIT)
    found = out.double().transpose(0, 1)[..., 0]
    assert (found * (1 + 2048 * weight)).log().abs().max() < 0.05
    assert (weight == SUMMARY_WEIGHT_LIMIT).all() == (size == 30.0)


def test_no_segment_sees_a_mean_of_later_tokens(device):
    """Two segments of one chunk: the first one's output is that of a chunk that ends with it."""
    segment = 16
    batch = make_batch(device, chunks=((336, 48),), budget=NONE_LISTED)
    (work,) = batch.work(segment=segment, span=SPAN)
    assert work.max_history // REGION > 336 // REGION, "the chunk itself fills a region"
    out = attended(batch, work, summarised(batch, work))
    batch.rows = [batch.rows[0]._replace(num_queries=segment)]
    (alone,) = batch.work(segment=segment, span=SPAN)
    first = attended(batch, alone, summarised(batch, alone))
    assert torch.equal(out[:segment], first[:segment])


@pytest.mark.parametrize("ranking", ["low_rank", "mean_query"])
def test_the_operator_attends_to_summaries(device, ranking):
    """Like values in all the history: an output without a mean would hold little of them."""
    heads, kv_heads, head_dim, queries = 4, 2, 64, 8
    batch = make_batch(device, chunks=((REGION_TOKENS, queries),), budget=0.01)
    batch.kv_cache[..., head_dim:] = 1.0
    own = batch.block_table[0, REGION_TOKENS // 16 :][:1].long()
    batch.kv_cache[own, :, :, head_dim:] = -1.0
    shape = Shape(heads, kv_heads, head_dim, 2048, queries, 64, ranking)
    operator = SparsePrefill(shape, DTYPE, device, scale=batch.scale)
    for span in (2048, 64):  # the history is a region, or clusters
        out = nan_like(batch.query)
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
        (work,) = batch.work(segment=64, span=span)
        operator(batch.query, batch.kv_cache, batch.block_table, work, out, counters)
        assert (out > 0.7).all(), "1,024 tokens outweigh eight, though ten of them are visited"


def test_summaries_have_rows_for_a_chunk_of_regions():
    assert SUMMARIES == CLUSTERS + 8
