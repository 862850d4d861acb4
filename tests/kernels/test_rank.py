import pytest
import torch

from cases import DTYPES, make_batch
from s2o_vllm.kernels import basis, low_rank, rank, reference
from s2o_vllm.kernels.plan import DENSE_START

SHAPES = [
    # heads, kv_heads, head_dim, page, head_major
    (4, 2, 64, 16, True),
    (7, 1, 96, 32, False),
    (3, 3, 128, 128, True),
    (12, 2, 64, 48, False),
]
ATOL = {torch.float32: 2e-4, torch.float16: 4e-2, torch.bfloat16: 0.3}  # in bits


def mean_query(batch, works, chunk=64):
    heads, head_dim = batch.query.shape[1:]
    for work in works:
        space = rank.RankWorkspace(
            work.num_items, heads, head_dim, work.max_history, batch.query.dtype,
            batch.query.device, chunk,
        )  # fmt: skip
        scores = empty_scores(batch, work)
        rank.mean_query_scores(*arguments(batch, work), scores, space, scale=batch.scale)
        wanted = reference.mean_query_scores(*arguments(batch, work), scale=batch.scale)
        yield work, scores, wanted


def every_query(batch, works):
    tokens, heads, _ = batch.query.shape
    kv_heads = batch.kv_cache.shape[1]
    history = max(work.max_history for work in works)
    space = low_rank.LowRankWorkspace(
        heads, kv_heads, history, tokens, batch.query.dtype, batch.query.device
    )
    for work in works:
        scores = empty_scores(batch, work)
        low_rank.low_rank_scores(*arguments(batch, work), scores, space, scale=batch.scale)
        yield work, scores, reference.low_rank_scores(*arguments(batch, work), scale=batch.scale)


def arguments(batch, work):
    return batch.query, batch.kv_cache, batch.block_table, work


def empty_scores(batch, work):
    shape = (work.num_items, batch.kv_cache.shape[1], work.max_history)
    return torch.full(shape, float("nan"), device=batch.query.device)


def assert_scores_match(results, tolerance):
    for work, scores, wanted in results:
        for number, item in enumerate(work.items.tolist()):
            n = item[DENSE_START]
            torch.testing.assert_close(
                scores[number, :, :n], wanted[number, :, :n], atol=tolerance, rtol=0
            )
            assert torch.isnan(scores[number, :, n:]).all(), "wrote beyond the history"


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page", "head_major"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranking", [mean_query, every_query])
def test_scores_match_the_reference(
    device, ranking, heads, kv_heads, head_dim, page, head_major, dtype
):
    batch = make_batch(
        device, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page,
        head_major=head_major, dtype=dtype,
    )  # fmt: skip
    assert_scores_match(ranking(batch, batch.work()), ATOL[dtype])


def test_more_segments_than_one_group_ranks(device):
    batch = make_batch(device, chunks=((64, 20 * 32),))
    (work,) = batch.work()
    assert work.groups.shape[0] == 2
    assert_scores_match(mean_query(batch, [work], chunk=256), ATOL[batch.query.dtype])


def test_more_rows_than_one_block_scores(device):
    """64 queries x 4 heads: 256 rows."""
    batch = make_batch(device, chunks=((256, 64),), heads=4, kv_heads=1)
    assert_scores_match(every_query(batch, batch.work(segment=64)), ATOL[batch.query.dtype])


def test_group_reduction_takes_the_largest_log_probability():
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    got = reference.group_log_probability(logits)[0]
    torch.testing.assert_close(got, logits[0].softmax(-1).amax(0).log2())


def low_rank_samples(kv_heads=2, samples=600, head_dim=64, rank=8, noise=0.0):
    """Queries and keys that live in a few common directions, plus noise."""
    directions = torch.randn(kv_heads, rank, head_dim)
    queries = torch.randn(kv_heads, samples, rank) @ directions
    keys = torch.randn(kv_heads, samples, rank) @ directions + 3.0
    return queries, keys + noise * torch.randn_like(keys)


def image_error(queries, keys, fitted):
    """Relative error of centred scores in the image."""
    wanted = queries @ (keys - keys.mean(1, keepdim=True)).mT
    image = (queries @ fitted.a) @ (keys @ fitted.b - fitted.offset[:, None]).mT
    return float((image - wanted).norm() / wanted.norm())


def test_basis_is_exact_where_the_scores_have_low_rank():
    queries, keys = low_rank_samples(rank=8)
    assert image_error(queries, keys, basis.fit(queries, keys, rank=16)) < 1e-3


def test_basis_is_nearly_the_best_of_its_rank():
    """Eckart–Young bounds the error of any rank; one step comes close on a falling spectrum."""
    spectrum = 0.9 ** torch.arange(64.0)
    queries = torch.randn(1, 2000, 64) * spectrum
    keys = torch.randn(1, 2000, 64)
    scores = queries[0] @ (keys - keys.mean(1, keepdim=True))[0].T
    values = torch.linalg.svdvals(scores)
    best = float(values[32:].norm() / values.norm())
    assert image_error(queries, keys, basis.fit(queries, keys, rank=32)) < 3 * best
    eight = basis.fit(queries, keys, rank=8)
    assert image_error(queries, keys, eight) > 3 * best, "the rank must matter here"


def test_basis_of_degenerate_samples_is_finite():
    for keys in (torch.zeros(1, 4, 64), torch.ones(1, 1, 64)):
        fitted = basis.fit(torch.randn(1, 3, 64), keys)
        assert all(torch.isfinite(part).all() for part in fitted)


def test_shift_is_the_log_sum_exp_of_normal_scores():
    queries, keys = torch.randn(1, 50, 64), torch.randn(1, 20_000, 64)
    fitted = basis.fit(queries, keys, rank=32)
    own = queries.transpose(0, 1)  # [n, heads, head_dim]
    images, shifts = basis.project_queries(own, fitted, 0.125)
    scores = images[:, 0] @ (keys[0] @ fitted.b[0] - fitted.offset[0]).T
    exact = torch.log2(torch.exp2(scores).mean(1))
    assert (shifts[:, 0] - exact).abs().max() < 0.05


def test_a_key_that_one_query_wants_ranks_first_in_every_list():
    """What a mean query cannot see: one of many queries matches one key."""
    torch.manual_seed(3)
    batch = make_batch(torch.device("cpu"), chunks=((512, 32),), heads=2, kv_heads=1,
                       dtype=torch.float32)  # fmt: skip
    key, page = 345, batch.kv_cache.shape[2]
    block = int(batch.block_table[0, key // page])
    batch.kv_cache[block, 0, key % page, :64] = 4 * batch.query[10, 1]
    (work,) = batch.work()
    wanted = reference.low_rank_scores(*arguments(batch, work), scale=batch.scale, rank=64)
    assert int(wanted[0, 0].argmax()) == key
    mean = reference.mean_query_scores(*arguments(batch, work), scale=batch.scale)
    assert int((mean[0, 0] > mean[0, 0, key]).sum()) > 10
