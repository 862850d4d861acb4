import pytest
import torch

from s2o_vllm.benchmarks.quality.methods import parse
from s2o_vllm.benchmarks.quality.reductions import LSE_ESTIMATES, Reduction
from s2o_vllm.benchmarks.research import basis as bases
from s2o_vllm.benchmarks.research.low_rank import LowRankScores, to_fp8

KINDS = ["eigen", "pivoted", "random2", "keys2", "previous1"]


@pytest.fixture
def spread(make_segment):
    """Segment whose queries and keys have spectra that fall off, each in its own rotation."""
    generator = torch.Generator().manual_seed(1)
    segment = make_segment(history=2048, dim=16)
    fall = torch.diag(0.75 ** torch.arange(16.0) * 4)
    for name in ("q", "k", "past_q"):
        turn = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
        setattr(segment, name, getattr(segment, name) @ fall @ turn + 0.5)
    return segment


def exact(segment):
    k = segment.k.repeat_interleave(segment.group, 0)
    return segment.q @ k.transpose(1, 2) * segment.scale


def error(segment, kind, rank, chunk=0):
    """Mean squared error of the image's scores for the queries that the basis was fitted to."""
    scores = LowRankScores(segment, rank, chunk, kind)
    q = segment.past_q[:, -256:]
    wanted = q @ segment.k.repeat_interleave(segment.group, 0).transpose(1, 2) * segment.scale
    found = torch.stack([scores(h, q[h]) for h in range(segment.heads)])
    return float((found - wanted).square().mean())


@pytest.mark.parametrize("kind", [*KINDS, "pca_k", "pca_q"])
@pytest.mark.parametrize("chunk", [0, 1024])
def test_full_rank_is_exact(spread, kind, chunk):
    scores = LowRankScores(spread, 16, chunk, kind)
    found = torch.stack([scores(h, spread.q[h]) for h in range(spread.heads)])
    wanted = exact(spread)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02  # what the ridge costs


@pytest.mark.parametrize("kind", KINDS)
def test_cheap_bases_are_near_the_best(spread, kind):
    best = error(spread, "eigen", 4)
    assert best <= error(spread, kind, 4) * 1.001
    assert error(spread, kind, 4) < 1.6 * best


@pytest.mark.parametrize("kind", ["pca_k", "pca_q", "random0"])
def test_bases_that_ignore_one_side_are_worse(spread, kind):
    assert error(spread, kind, 4) > 1.2 * error(spread, "eigen", 4)


def test_more_directions_are_better(spread):
    errors = [error(spread, "eigen", rank) for rank in (2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_chunk_is_not_changed_by_later_tokens(spread):
    before = bases.fit_chunks(spread, "previous1", 4, 1024)[1][0]
    spread.k[:, 1024:] += 3
    spread.memo("other", lambda: 0)
    spread._memo.clear()
    after = bases.fit_chunks(spread, "previous1", 4, 1024)[1][0]
    torch.testing.assert_close(before.a, after.a)
    torch.testing.assert_close(before.b, after.b)


def test_a_basis_can_be_fitted_to_the_queries_that_are_scored(spread):
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(5))).Q
    spread.q = spread.q @ turn  # unlike the queries of the history
    wanted = exact(spread)

    def missed(queries):
        scores = LowRankScores(spread, 4, 0, "eigen", queries)
        found = torch.stack([scores(h, spread.q[h]) for h in range(spread.heads)])
        return float((found - wanted).square().mean())

    assert missed(64) < 0.8 * missed(0)


def test_unknown_bases_are_refused(spread):
    with pytest.raises(ValueError, match="unknown basis magic"):
        bases.fit_chunks(spread, "magic", 4, 0)


def test_low_rank_finds_what_a_single_query_wants(make_segment):
    segment = make_segment(heads=1, kv_heads=1, history=512, dim=16)
    segment.q[0, 7] = 12 * segment.k[0, 99]
    method = parse("lowrank:unit=64xhead,rank=16")
    assert method.selector(segment).select(1 / 512).tokens[0].tolist() == [99]
    mean = parse("mean_query:unit=64xhead").ranking(segment).scores[0]
    assert int((mean > mean[99]).sum()) < 256  # seen by the mean query too, but not first


def test_full_rank_low_rank_is_the_oracle(make_segment):
    segment = make_segment(history=1024)
    ours = parse("lowrank:rank=16,unit=32xkv,reduce=mean-lse-own").ranking(segment).scores
    oracle = parse("token_oracle:unit=32xkv").ranking(segment).scores
    torch.testing.assert_close(ours, oracle, atol=1e-5, rtol=1e-2)


def test_fp8_keeps_three_bits_of_mantissa():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    relative = ((to_fp8(x) - x) / x).abs()
    assert relative.max() < 0.07
    assert relative.max() > 0.03


SCORES = torch.tensor([[4.0, 0.0, 0.0, 3.0], [1.0, 1.2, 1.0, 1.0]])
OWN = torch.tensor([0.0, 9.0])  # the second row looks at its own segment


@pytest.mark.parametrize(
    ("text", "best"),
    [
        ("max-none", 0),
        ("max-top", 0),  # a tie of both rows' best, the first wins
        ("mean-lse", 0),
        ("mean-none", 0),
        ("square-lse-own", 0),
    ],
)
def test_reductions_pick(text, best):
    assert int(Reduction.parse(text).apply(SCORES, OWN, 2)[0].argmax()) == best


def test_own_mass_silences_rows_that_look_at_themselves():
    bare = Reduction.parse("mean-lse").apply(SCORES, OWN, 2)[0]
    own = Reduction.parse("mean-lse-own").apply(SCORES, OWN, 2)[0]
    assert bare.argsort(descending=True).tolist()[1] == 3
    assert float(own[1] / own[0]) < 0.1 < float(bare[1] / bare[0])


def test_peak_is_the_largest_probability_of_a_block():
    p = SCORES.softmax(1)
    found = Reduction.parse("peak-lse").apply(SCORES, OWN, 2)
    torch.testing.assert_close(found, p.amax(0, keepdim=True))


def test_max_of_log_probabilities_needs_no_probabilities():
    shifted = SCORES - SCORES.logsumexp(1, keepdim=True)
    wanted = shifted.amax(0, keepdim=True)
    torch.testing.assert_close(Reduction.parse("max-lse").apply(SCORES, OWN, 2), wanted)


@pytest.mark.parametrize("name", sorted(LSE_ESTIMATES))
def test_estimates_bound_or_meet_the_log_sum_exp(name):
    s = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    error = LSE_ESTIMATES[name](s) - s.logsumexp(1)
    assert error.shape == (64,)
    if name in ("top", "max16", "max64"):
        assert float(error.max()) <= 1e-5  # never above
    else:
        assert float(error.abs().max()) < 0.7  # of normal scores every estimate is near


@pytest.mark.parametrize("text", ["mean", "sum-lse", "max-best", "max-lse-all"])
def test_bad_reductions_are_refused(text):
    with pytest.raises(ValueError, match="reduction must be"):
        Reduction.parse(text)


def test_one_query_of_a_group_can_have_a_list_of_its_own(spread):
    """As decode would: its scores are those of its heads alone, at full rank the oracle's."""
    found = parse("lowrank:unit=1xkv,rank=16,chunk=0,reduce=mean-lse").ranking(spread)
    wanted = parse("token_oracle:unit=1xkv,reduce=mean-lse").ranking(spread)
    assert found.rows.rows.shape == (spread.kv_heads * spread.length, spread.group)
    assert float((found.scores - wanted.scores).norm() / wanted.scores.norm()) < 0.05
    heads = exact(spread).softmax(2).unflatten(0, (spread.kv_heads, spread.group)).mean(1)
    torch.testing.assert_close(wanted.scores, heads.flatten(0, 1))


def test_the_served_ranking_has_lists_of_groups_only(spread):
    with pytest.raises(ValueError, match="share the lists"):
        parse("served:unit=64xhead").ranking(spread)
