import math

import pytest
import torch

from cases import CACHES, DTYPE, LIMITS, make_batch
from s2o_vllm.kernels import probes, reference_probes
from s2o_vllm.kernels.plan import DENSE_START, build_work_lists
from s2o_vllm.kernels.sampling import stratified
from s2o_vllm.kernels.tiles import SHARED_MEMORY
from s2o_vllm.kernels.tuning import (
    LEAST_SCORE,
    LSE_FIRST,
    LSE_LAST,
    LSE_SAMPLES,
    PROBES,
    pool_of,
)

SEGMENT = 64
CHUNK = 128
# Scores are kept in fp16; e4m3 products of the card sum in fp16, in another order.
TOLERANCE = 0.15 if torch.cuda.is_available() else 0.02


def scored(batch, work, *, segment=SEGMENT, chunk=CHUNK):
    heads, kv_heads, head_dim = batch.query.shape[1], batch.kv_cache.shape[1], batch.query.shape[2]
    longest = max(row.context + row.num_queries for row in batch.rows)
    space = probes.ProbeWorkspace(
        heads, kv_heads, head_dim, longest, work.num_items, segment, batch.query.device,
        chunk=chunk,
    )  # fmt: skip
    for part in (space.keys, space.mean, space.probes, space.lse):
        part.copy_(torch.full_like(part, float("nan"), dtype=torch.float32))
    chunks = -(-longest // chunk)
    device = batch.query.device
    scores = torch.full(
        (work.num_items, heads, chunks * chunk), float("nan"), dtype=torch.float16, device=device
    )
    bounds = torch.full((work.num_items * heads, chunks, 2), float("nan"), device=device)
    probes.probe_scores(
        batch.query, batch.kv_cache, batch.block_table, work, scores, bounds, space,
        scale=batch.scale, chunk=chunk,
    )  # fmt: skip
    return scores, bounds


def works(batch, segment=SEGMENT, min_context=0):
    return build_work_lists(batch.rows, segment, min_context, batch.query.device, LIMITS)


@pytest.mark.parametrize("fp8", CACHES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 3, "kv_heads": 1},
        {"heads": 2, "kv_heads": 2, "head_dim": 96},
        {"heads": 2, "kv_heads": 1, "head_major": False, "page": 32},
    ],
    ids=["group of 2", "group of 3", "no group, d 96", "tokens outside heads"],
)
def test_scores_are_those_of_the_reference(device, shape, fp8):
    batch = make_batch(device, chunks=((300, 150), (0, 70)), spread=2.0, fp8=fp8, **shape)
    for work in works(batch):
        scores, bounds = scored(batch, work)
        wanted = reference_probes.probe_scores(
            batch.query, batch.kv_cache, batch.block_table, work, scale=batch.scale
        )
        heads = batch.query.shape[1]
        for number, item in enumerate(work.items.tolist()):
            n = item[DENSE_START]
            got, truth = scores[number, :, :n].float(), wanted[number, :, :n].float()
            torch.testing.assert_close(got, truth, atol=TOLERANCE, rtol=2e-3)
            assert scores[number, :, n:].isnan().all()
            for first in range(0, n, CHUNK):
                part = got[:, first : first + CHUNK]
                own = bounds[number * heads : (number + 1) * heads, first // CHUNK]
                assert torch.equal(own[:, 0], part.amax(1))
                assert torch.equal(own[:, 1], part.amin(1))


@pytest.mark.parametrize("segment", [16, 40, 128, 512, 2048, 4096])
def test_any_segment_size(device, segment):
    batch = make_batch(device, chunks=((520, 300),), heads=2, kv_heads=1)
    (work,) = works(batch, segment)
    scores, _ = scored(batch, work, segment=segment, chunk=256)
    wanted = reference_probes.probe_scores(
        batch.query, batch.kv_cache, batch.block_table, work, scale=batch.scale
    )
    for number, item in enumerate(work.items.tolist()):
        n = item[DENSE_START]
        torch.testing.assert_close(
            scores[number, :, :n].float(), wanted[number, :, :n].float(), atol=TOLERANCE, rtol=2e-3
        )


@pytest.mark.parametrize(
    "tile", [tile for *_, tile in probes.SCORE_TILES], ids=lambda tile: "-".join(map(str, tile))
)
def test_every_tile_of_the_table_gives_the_same_scores(device, monkeypatch, tile):
    batch = make_batch(device, chunks=((300, 200),), heads=2, kv_heads=1)
    (work,) = works(batch)
    wanted, _ = scored(batch, work)
    monkeypatch.setattr(probes, "score_tile", lambda *_: tile)
    scores, _ = scored(batch, work)
    for number, item in enumerate(work.items.tolist()):
        n = item[DENSE_START]
        torch.testing.assert_close(
            scores[number, :, :n], wanted[number, :, :n], atol=TOLERANCE, rtol=2e-3
        )


@pytest.mark.parametrize("key_bytes", [64, 128, 256, 512])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_keys_and_probes_of_a_tile_fit(key_bytes, capability):
    """The compiler adds a few KiB, see test_compile.py."""
    block, stages = probes.score_tile(key_bytes, SHARED_MEMORY[capability])
    buffers = stages if capability in (90, 100) else stages - 1
    if key_bytes < 512 or capability < 89:  # from there on keys of head_dim 256 are in e4m3
        needed = (probes.SCORE_COLUMNS + buffers * block) * key_bytes
        assert needed <= SHARED_MEMORY[capability] - 10_000


def test_a_large_mean_key_changes_no_score(device):
    """Keys with a common part, as biases make them, are ranked as those without."""
    torch.manual_seed(0)
    batch = make_batch(device, chunks=((300, 64),))
    (work,) = works(batch)
    plain, _ = scored(batch, work)
    batch.kv_cache[..., : batch.query.shape[2]] += 30.0
    moved, _ = scored(batch, work)
    n = work.items[0, DENSE_START]
    difference = (moved - plain)[0, :, :n].float().abs()
    assert float(difference.max()) < 0.5  # what the cache's own dtype rounds away


def test_a_token_that_one_pool_wants_has_the_best_score(device):
    batch = make_batch(device, chunks=((320, 64),))
    needle = torch.nn.functional.normalize(torch.randn(64), dim=0).to(device, DTYPE)
    page = batch.kv_cache.shape[2]
    batch.kv_cache[int(batch.block_table[0, 123 // page]), :, 123 % page, :64] = needle * 40
    batch.query[40:44] += needle * 10
    (work,) = works(batch)
    scores, _ = scored(batch, work)
    assert (scores[0, :, :320].argmax(1) == 123).all()


def test_no_score_is_below_the_least(device):
    batch = make_batch(device, chunks=((300, 64),), spread=100.0)
    (work,) = works(batch)
    scores, bounds = scored(batch, work)
    n = int(work.items[0, DENSE_START])
    assert float(scores[0, :, :n].min()) == LEAST_SCORE == float(bounds[0, 0, 1])


def test_probes_are_means_of_neighbours():
    queries = torch.randn(19, 2, 4)
    means = reference_probes.probes_of(queries, 8)
    assert means.shape == (3, 2, 4)
    torch.testing.assert_close(means[1], queries[8:16].mean(0))
    torch.testing.assert_close(means[2], queries[16:].mean(0))


@pytest.mark.parametrize("segment", [16, 40, 100, 512, 4096])
def test_a_segment_has_no_more_probes_than_columns(segment):
    assert (PROBES - 1) * (pool_of(segment) - 1) < segment <= PROBES * pool_of(segment)


@pytest.mark.parametrize("n", [1, 64, 300, 700, 4000])
def test_a_log_sum_exp_counts_first_and_last_tokens_one_by_one(n):
    logits = torch.full((1, 1, n + 8), -3.0)
    logits[..., 0], logits[..., n - 1], logits[..., n + 4] = 9.0, 8.0, 50.0
    got = reference_probes.log_sum_exp(logits, torch.tensor([4]), n, n)
    exact = (logits[..., : n + 4] * math.log(2)).logsumexp(-1) / math.log(2)
    torch.testing.assert_close(got[0, 0, 0], exact[0, 0], atol=1e-3, rtol=0)


def test_a_log_sum_exp_is_not_misled_by_a_period():
    """Every 24th token of the middle holds all mass: a stride that divides 24 meets all or none."""
    n = 24 * 1024
    logits = torch.full((1, 1, n + 8), -30.0)
    logits[..., 4:n:24] = 0.0
    got = reference_probes.log_sum_exp(logits, torch.tensor([8]), n, n)
    assert abs(float(got) - math.log2(1024)) < 0.5


def test_a_sampled_key_that_holds_all_mass_counts_once():
    n = 20_000
    logits = torch.full((1, 1, n + 8), -30.0)
    middle = n - LSE_FIRST - LSE_LAST
    logits[..., LSE_FIRST + int(stratified(middle, -(-middle // LSE_SAMPLES))[100])] = 5.0
    got = reference_probes.log_sum_exp(logits, torch.tensor([8]), n, n)
    assert abs(float(got) - 5.0) < 0.1
