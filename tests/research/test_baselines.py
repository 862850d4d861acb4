"""What each baseline selects on a case that can be followed by hand."""

import pytest
import torch

from s2o_vllm.benchmarks.quality.methods import parse
from s2o_vllm.benchmarks.research.baselines.pbs import key_order
from s2o_vllm.benchmarks.research.baselines.xattention import antidiagonal_scores


def first_list(segment, spec, density):
    return parse(spec).selector(segment).select(density).tokens[0].tolist()


def blocks_of(tokens, block=4):
    return sorted({token // block for token in tokens})


# Five blocks of four tokens. Block 2 holds the one largest token among small ones, block 4 the
# largest mean, block 1 has two good tokens.
LOGITS = [0, 0, 0, 0, 3, 3, -9, -9, 9, -9, -9, -9, -1, -1, -1, -1, 2, 2, 2, 2]


def test_mean_blocks_follow_the_mean(one_direction):
    segment = one_direction(LOGITS)
    spec = "block_mean:unit=32xhead,block=4,sink=0"
    assert blocks_of(first_list(segment, spec, 0.2)) == [4]
    assert blocks_of(first_list(segment, spec, 0.6)) == [0, 3, 4]


def test_the_sink_block_is_forced(one_direction):
    segment = one_direction([-5.0] * 4 + LOGITS[4:])
    spec = "block_mean:unit=32xhead,block=4"
    assert blocks_of(first_list(segment, spec, 0.4)) == [0, 4]
    assert blocks_of(first_list(segment, spec + ",sink=0", 0.4)) == [3, 4]


def test_flexprefill_spends_where_mass_is_spread(make_segment):
    # Tile 0 sees one block, tile 1 four alike: by mass the second gets more of the budget.
    q = torch.zeros(1, 64, 4)
    q[0, :32, 0], q[0, 32:, 1] = 4.0, 4.0
    k = torch.zeros(1, 16, 4)
    k[0, 4:8, 0] = 4.0
    segment = make_segment(heads=1, kv_heads=1, history=16, dim=4, q=q, k=k)
    method = parse("flexprefill:unit=32xhead,block=4,sink=0")
    peaked, flat = method.selector(segment).select(0.5).tokens
    assert blocks_of(peaked.tolist()) == [1]
    assert len(blocks_of(flat.tolist())) == 3


def test_block_oracle_finds_the_block_with_the_largest_mass(one_direction):
    segment = one_direction(LOGITS)
    assert blocks_of(first_list(segment, "block_oracle:unit=32xhead,block=4", 0.2)) == [2]
    assert blocks_of(first_list(segment, "block_oracle:unit=32xhead,block=4", 0.4)) == [1, 2]


def test_token_oracle_orders_tokens_by_mass(one_direction):
    segment = one_direction(LOGITS)
    assert first_list(segment, "token_oracle:unit=32xhead", 0.15) == [8, 4, 5]


def test_token_oracle_hears_a_single_query(make_segment):
    q = torch.zeros(1, 32, 4)
    q[0, 7, 0] = 20.0  # the mean query hardly points at token 3
    k = torch.zeros(1, 64, 4)
    k[0, 3, 0], k[0, 9, 1] = 4.0, 1.0
    q[0, :, 1] = 0.5
    segment = make_segment(heads=1, kv_heads=1, history=64, length=32, dim=4, q=q, k=k)
    assert first_list(segment, "token_oracle:unit=32xhead", 1 / 64) == [3]


def test_pbs_sorts_keys_inside_their_segment_only():
    importance = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0, 0.9, 0.8])
    assert key_order(importance, 4).tolist() == [1, 3, 2, 0, 5, 6, 4]


def test_pbs_gathers_good_tokens_of_a_segment_into_one_block(one_direction):
    # Two key segments of eight; the good tokens are strewn over the first.
    segment = one_direction([5, 0, 0, 5, 0, 5, 0, 5] + [1] * 8)
    spec = "pbs:unit=32xhead,block=4,key_segment=8,sink=0"
    assert sorted(first_list(segment, spec, 0.25)) == [0, 3, 5, 7]
    # Without the permutation both halves of the segment have the same mean.
    assert first_list(segment, "block_mean:unit=32xhead,block=4,sink=0", 0.25) == [0, 1, 2, 3]


def test_pbs_refuses_lists_of_kv_heads(make_segment):
    with pytest.raises(ValueError, match="xhead"):
        parse("pbs:unit=32xkv").ranking(make_segment())


def test_antidiagonals_meet_every_query_and_key_of_a_square_once():
    q, k = torch.zeros(4, 4), torch.zeros(8, 4)
    q[1, 0] = 2.0  # query 1 meets key 2 of each square: 4 - 1 - 1
    k[2, 0], k[5, 0] = 3.0, 7.0
    torch.testing.assert_close(antidiagonal_scores(q, k, 4, 1.0), torch.tensor([[1.5, 0.0]]))


def test_xattention_takes_the_blocks_of_the_antidiagonal_sums(one_direction):
    # All queries alike: an antidiagonal sums a square's keys, so block 1 (sum 12) wins.
    segment = one_direction([1, 1, 1, 1, 0, 0, 6, 6, 2, 2, 2, 2, 5, -5, 5, -5])
    spec = "xattention:unit=32xhead,block=4,stride=4,sink=0"
    assert blocks_of(first_list(segment, spec, 0.25)) == [1]
    assert blocks_of(first_list(segment, spec, 0.5)) == [1, 2]


def test_vecattention_takes_what_is_near_the_best(make_segment):
    # Head 0 has one token within reach of its best, head 1 has five.
    q = torch.zeros(2, 32, 4)
    q[..., 0] = 2.0
    k = torch.zeros(2, 8, 4)
    k[0, :, 0] = torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1])
    k[1, :, 0] = torch.tensor([4.0, 3.9, 3.8, 3.7, 3.6, 0, 0, 0])
    segment = make_segment(heads=2, kv_heads=2, history=8, length=32, dim=4, q=q, k=k)
    peaked, flat = parse("vecattention:unit=32xhead").selector(segment).select(3 / 8).tokens
    assert peaked.tolist() == [0]
    assert flat.tolist() == [0, 1, 2, 3, 4]


def test_flashprefill_cuts_at_a_share_of_the_best_and_keeps_a_mean_of_the_rest(make_segment):
    q = torch.zeros(2, 32, 4)
    q[..., 0] = 2.0
    k = torch.zeros(1, 16, 4)
    k[0, :4, 0], k[0, 4:8, 0], k[0, 8:12, 0] = 5.0, 4.8, 1.0
    segment = make_segment(heads=2, kv_heads=1, history=16, length=32, dim=4, q=q, k=k)
    selection = parse("flashprefill:unit=32xkv,block=4").selector(segment).select(0.5)
    assert len(selection.tokens) == 1  # one list for both heads
    assert blocks_of(selection.tokens[0].tolist()) == [0, 1]
    mean = selection.summaries[0]
    assert mean.count.tolist() == [4, 4]
    torch.testing.assert_close(mean.k[0], k[0, 8])
    torch.testing.assert_close(mean.v[1], segment.v[0, 12:].mean(0))


def test_s2o_paper_ranks_tokens_by_the_mean_query_of_the_segment(make_segment):
    # Queries 0..31 want token 5, queries 32..63 token 9, all of them mildly token 2.
    q = torch.zeros(1, 64, 4)
    q[0, :32, 0], q[0, 32:, 1], q[0, :, 2] = 2.0, 2.0, 2.0
    k = torch.zeros(1, 16, 4)
    k[0, 5, 0], k[0, 9, 1], k[0, 2, 2] = 3.0, 2.0, 2.5
    segment = make_segment(heads=1, kv_heads=1, history=16, length=64, dim=4, q=q, k=k)
    assert first_list(segment, "s2o_paper:unit=64xhead", 3 / 16) == [2, 5, 9]


@pytest.mark.parametrize(
    ("reduce", "first"),
    [
        ("max-none", 0),  # head 0 has the largest logit
        ("max-lse", 1),  # but head 1 gives its best a larger probability
        ("mean-lse", 1),
        ("pooled", 2),  # the mean of both queries sees what both like
    ],
)
def test_a_group_can_share_a_list_in_several_ways(make_segment, reduce, first):
    q = torch.zeros(2, 32, 4)
    q[0, :, 0], q[1, :, 1] = 2.0, 2.0
    k = torch.zeros(1, 16, 4)
    k[0, :, 0] = 5.6
    k[0, 0, 0], k[0, 1], k[0, 2] = 6.0, torch.tensor([0, 5.5, 0, 0]), torch.tensor([5.7, 4.0, 0, 0])
    segment = make_segment(heads=2, kv_heads=1, history=16, length=32, dim=4, q=q, k=k)
    assert first_list(segment, f"mean_query:unit=32xkv,reduce={reduce}", 1 / 16) == [first]


def test_a_group_scores_by_the_largest_log_probability_of_a_heads_mean_query(make_segment):
    segment = make_segment(heads=2, kv_heads=1, history=16, length=32, dim=4)
    logits = segment.q.mean(1) @ segment.k[0].T * segment.scale
    (scores,) = parse("mean_query:unit=32xkv").ranking(segment).scores
    torch.testing.assert_close(scores, logits.log_softmax(1).amax(0))
