import pytest
import torch
from cases import DTYPES, TOLERANCE, make_batch

from s2o_vllm.kernels import rank, reference
from s2o_vllm.kernels.plan import DENSE_START


def scores_of(batch, work, chunk=64):
    heads, head_dim = batch.query.shape[1:]
    kv_heads = batch.kv_cache.shape[1]
    scores = torch.full(
        (work.num_items, kv_heads, work.max_history), float("nan"), device=batch.query.device
    )
    space = rank.RankWorkspace(
        work.num_items, heads, head_dim, work.max_history, batch.query.dtype,
        batch.query.device, chunk,
    )  # fmt: skip
    rank.mean_query_scores(
        batch.query, batch.kv_cache, batch.block_table, work, scores, space, scale=batch.scale
    )
    return scores


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page", "head_major"),
    [(4, 2, 64, 16, True), (7, 1, 96, 32, False), (3, 3, 128, 128, True), (12, 2, 64, 48, False)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_match_the_reference(device, heads, kv_heads, head_dim, page, head_major, dtype):
    batch = make_batch(
        device, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page,
        head_major=head_major, dtype=dtype,
    )  # fmt: skip
    work = batch.work()
    scores = scores_of(batch, work)
    wanted = reference.mean_query_scores(
        batch.query, batch.kv_cache, batch.block_table, work, scale=batch.scale
    )
    for number, item in enumerate(work.items.tolist()):
        n = item[DENSE_START]
        tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}[dtype]
        torch.testing.assert_close(
            scores[number, :, :n], wanted[number, :, :n], atol=tolerance, rtol=0
        )
        assert torch.isnan(scores[number, :, n:]).all(), "wrote beyond the history"


def test_more_segments_than_one_group_ranks(device):
    batch = make_batch(device, chunks=((64, 20 * 32),))
    work = batch.work()
    assert work.groups.shape[0] == 2
    scores = scores_of(batch, work, chunk=256)
    wanted = reference.mean_query_scores(
        batch.query, batch.kv_cache, batch.block_table, work, scale=batch.scale
    )
    for number, item in enumerate(work.items.tolist()):
        torch.testing.assert_close(
            scores[number, :, : item[4]], wanted[number, :, : item[4]], atol=max(1e-4, 10 * TOLERANCE), rtol=0
        )


def test_group_reduction_takes_the_largest_log_probability():
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    got = reference.group_log_probability(logits)[0]
    p = logits[0].softmax(-1)
    torch.testing.assert_close(got, p.amax(0).log2())
