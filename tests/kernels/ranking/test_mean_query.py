import math

import pytest
import torch

from cases import CACHES, DTYPES, LARGE_CARD, ON_GPU, TOLERANCE, make_batch, relative_error
from s2o_vllm.kernels.layout import DENSE_START
from s2o_vllm.kernels.ranking import basis, low_rank
from s2o_vllm.kernels.ranking import reference as ranking_reference
from s2o_vllm.kernels.ranking.fit_basis import BasisWorkspace, find_bases, take_moments
from s2o_vllm.kernels.ranking.mean_query import MeanQueryWorkspace, mean_query_scores
from s2o_vllm.kernels.ranking.score import STORED
from s2o_vllm.kernels.sampling import stratified

SHAPES = [
    # heads, kv_heads, head_dim, page, head_major
    (4, 2, 64, 16, True),
    (7, 1, 96, 32, False),
    pytest.param(2, 1, 512, 16, True, marks=LARGE_CARD),
    (3, 3, 128, 128, True),
    (12, 2, 64, 48, False),
]
# In bits. Scores are fp16; projections are fp8 on the card, where a rounding may fall either way.
ATOL = {torch.float32: 3e-2, torch.float16: 0.5 if ON_GPU else 5e-2, torch.bfloat16: 0.5}


def mean_query(batch, works, chunk=64):
    heads, head_dim = batch.query.shape[1:]
    for work in works:
        space = MeanQueryWorkspace(
            work.num_segments, heads, head_dim, work.max_history, batch.query.dtype,
            batch.query.device, chunk,
        )  # fmt: skip
        results = empty_results(batch, work, chunk)
        mean_query_scores(*arguments(batch, work), *results, space, scale=batch.scale)
        wanted = ranking_reference.mean_query_scores(*arguments(batch, work), scale=batch.scale)
        yield work, *results, wanted


def every_query(batch, works, chunk=64, precision=basis.SERVED):
    heads, head_dim = batch.query.shape[1:]
    history = max(work.max_seen for work in works)
    segments = max(work.num_segments for work in works)
    segment = max(work.max_queries for work in works)
    space = low_rank.LowRankWorkspace(
        heads, heads, head_dim, history, segments, segment, batch.query.dtype, batch.query.device,
        precision=precision,
    )  # fmt: skip
    for work in works:
        results = empty_results(batch, work, chunk)
        low_rank.low_rank_scores(
            *arguments(batch, work), *results, space, scale=batch.scale, chunk=chunk
        )
        wanted = ranking_reference.low_rank_scores(
            *arguments(batch, work),
            scale=batch.scale,
            precision=precision,
            probe_rows=space.probe_rows,
        )
        yield work, *results, wanted


def retrieval_heads(batch, works, chunk=64):
    return every_query(batch, works, chunk, basis.RETRIEVAL)


def arguments(batch, work):
    return batch.query, batch.kv_cache, batch.block_table, work


def stored(tokens):
    """Scores are stored in whole groups."""
    return -(-tokens // STORED.value) * STORED.value


def empty_results(batch, work, chunk):
    """Scores and bounds full of NaN."""
    kv_heads = batch.kv_cache.shape[1]
    sizes = ((work.num_segments, kv_heads, stored(work.max_history)),
             (work.num_segments * kv_heads, -(-work.max_history // chunk), 2))  # fmt: skip
    dtypes = (torch.float16, torch.float32)
    return [
        torch.full(size, float("nan"), dtype=dtype, device=batch.query.device)
        for size, dtype in zip(sizes, dtypes, strict=True)
    ]


def assert_scores_match(results, tolerance, chunk=64):
    for work, scores, bounds, wanted in results:
        for number, segment in enumerate(work.segments.tolist()):
            n = segment[DENSE_START]
            if n == 0:
                continue
            torch.testing.assert_close(
                scores[number, :, :n], wanted[number, :, :n], atol=tolerance, rtol=0
            )
            assert torch.isnan(scores[number, :, stored(n) :]).all(), "wrote beyond the history"
            for head in range(scores.shape[1]):
                own = bounds[number * scores.shape[1] + head]
                for place, part in enumerate(scores[number, head, :n].float().split(chunk)):
                    assert own[place].tolist() == [part.max(), part.min()]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page", "head_major"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranking", [mean_query, every_query, retrieval_heads])
@pytest.mark.parametrize("fp8", CACHES)
def test_scores_match_the_reference(
    device, ranking, heads, kv_heads, head_dim, page, head_major, dtype, fp8
):
    batch = make_batch(
        device, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page,
        head_major=head_major, dtype=dtype, fp8=fp8,
    )  # fmt: skip
    # Twice as many terms are summed in fp16, by the interpreter one at a time: where partial sums
    # pass 128 a rounding is 0.06, and several may fall one way.
    atol = max(ATOL[dtype], 0.25) if ranking is retrieval_heads else ATOL[dtype]
    assert_scores_match(ranking(batch, batch.work()), atol)


@pytest.mark.parametrize("ranking", [mean_query, every_query])
def test_scores_of_an_fp8_cache_are_those_of_what_it_stands_for(device, ranking):
    batch = make_batch(device, chunks=((200, 40),), dtype=DTYPES[-1], fp8=True)
    quantised = [scores for _, scores, *_ in ranking(batch, batch.work())]
    head_dim = batch.query.shape[2]
    batch.kv_cache = batch.kv_cache.to(batch.query.dtype)
    batch.kv_cache[..., :head_dim] *= batch.k_scale
    batch.k_scale = 1.0
    for one, (_, other, *_) in zip(quantised, ranking(batch, batch.work()), strict=True):
        torch.testing.assert_close(one, other, atol=0.5, rtol=0, equal_nan=True)
        assert (one - other).nanmean().abs() < 0.05


def test_more_segments_than_one_group_ranks(device):
    batch = make_batch(device, chunks=((64, 20 * 32),))
    (work,) = batch.work()
    assert work.groups.shape[0] == 2
    results = mean_query(batch, [work], chunk=256)
    assert_scores_match(results, ATOL[batch.query.dtype], chunk=256)


def test_more_rows_than_one_block_scores(device):
    """64 queries x 6 heads: 96 of 384 rows are probes."""
    batch = make_batch(device, chunks=((256, 64),), heads=6, kv_heads=1)
    assert_scores_match(every_query(batch, batch.work(segment=64)), ATOL[batch.query.dtype])


@pytest.mark.parametrize("context", [1, 3, 8, 9, 24, 25])
def test_histories_of_few_samples(device, context):
    """The row log-sum-exp samples one key at least, wherever the history ends: without it, bits.

    Of as few keys as directions the last ones have next to no moment, and either basis has others:
    of 400 draws one in a hundred is 0.1 bits off, the worst 0.16.
    """
    batch = make_batch(device, chunks=((context, 5),), heads=5, kv_heads=1)
    tolerance = max(0.4, 3 * ATOL[batch.query.dtype])
    assert_scores_match(every_query(batch, batch.work()), tolerance)


@pytest.mark.parametrize("context", [399, 400, 401])
def test_the_sample_of_a_long_history_is_bounded(device, monkeypatch, context):
    """Other keys are sampled than one of ``LSE_STEP``, and the kernel takes the same."""
    batch = make_batch(device, chunks=((context, 5),), heads=5, kv_heads=1)
    ((_, unbounded, *_),) = every_query(batch, batch.work())
    monkeypatch.setattr(basis, "LSE_SAMPLES", 10)
    ((work, scores, bounds, wanted),) = every_query(batch, batch.work())
    assert_scores_match([(work, scores, bounds, wanted)], ATOL[batch.query.dtype])
    assert (scores - unbounded)[0].abs().mean() > 3 * ATOL[batch.query.dtype] / 10


def test_the_farthest_rows_are_far_from_their_mean():
    rows = torch.zeros(2, 9, 4)
    rows[..., 0] = 7.0  # which all have in common
    rows[0, :, 1] = torch.tensor([3.0, -1.0, 4.0, 1.0, 0.1, -5.0, 9.0, -9.0, -2.0])
    rows[1, :, 2] = -rows[0, :, 1]
    assert basis.farthest_rows(rows, 2).tolist() == 2 * [[0, 2, 5, 6, 7]]
    assert basis.farthest_rows(rows, 4).tolist() == 2 * [[5, 6, 7]]
    assert basis.farthest_rows(torch.zeros(1, 6, 3), 2).tolist() == [[0, 1, 2]], (
        "the first of equal ones"
    )


def test_approximate_exponentials_are_within_their_bounds():
    most = torch.randn(50, 1)
    x = torch.linspace(-35.9, 120, 4001).expand(50, -1)
    ratio = basis.approximate_exp2(x + most, most) / torch.exp2(x - basis.EXP2_OFFSET)
    assert ratio.min() > 0.999
    assert ratio.max() < 1.063
    assert float(ratio.mean()) == pytest.approx(2**basis.EXP2_OFFSET / basis.EXP2_UNIT, abs=1e-3)
    small = basis.approximate_exp2(torch.tensor([-1e4, float("-inf")]), torch.zeros(1))
    assert (small == 0).all()
    assert basis.approximate_exp2(torch.tensor([1e4]), torch.zeros(1)) == 2.0**127


def test_group_reduction_takes_the_largest_log_probability():
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    got = ranking_reference.group_log_probability(logits)[0]
    torch.testing.assert_close(got, logits[0].softmax(-1).amax(0).log2())


def low_rank_samples(kv_heads=2, samples=600, head_dim=64, rank=8, noise=0.0):
    """Queries and keys that live in a few common directions, plus noise."""
    directions = torch.randn(kv_heads, rank, head_dim)
    queries = torch.randn(kv_heads, samples, rank) @ directions
    keys = torch.randn(kv_heads, samples, rank) @ directions + 3.0
    return queries, keys + noise * torch.randn_like(keys)


def score_error(queries, keys, fitted):
    """Relative error of centred scores by a basis."""
    wanted = queries @ (keys - keys.mean(1, keepdim=True)).mT
    scores = (queries @ fitted.a) @ (keys @ fitted.b - fitted.offset[:, None]).mT / basis.LOG2E
    return float((scores - wanted).norm() / wanted.norm())


def test_basis_is_exact_where_the_scores_have_low_rank():
    queries, keys = low_rank_samples(rank=8)
    assert score_error(queries, keys, basis.fit(queries, keys, 1.0, rank=16)) < 1e-3


def test_basis_is_nearly_the_best_of_its_rank():
    """Eckart–Young bounds the error of any rank; one step comes close on a falling spectrum."""
    spectrum = 0.9 ** torch.arange(64.0)
    queries = torch.randn(1, 2000, 64) * spectrum
    keys = torch.randn(1, 2000, 64)
    # Singular values of their product, from what is left of each without a rotation.
    parts = (torch.linalg.qr(one[0], "r").R for one in (queries, keys - keys.mean(1, keepdim=True)))
    values = torch.linalg.svdvals(next(parts) @ next(parts).T)
    best = float(values[32:].norm() / values.norm())
    assert score_error(queries, keys, basis.fit(queries, keys, 1.0, rank=32)) < 3 * best
    eight = basis.fit(queries, keys, 1.0, rank=8)
    assert score_error(queries, keys, eight) > 3 * best, "the rank must matter here"


def test_by_a_basis_of_degenerate_samples_all_keys_are_alike():
    for keys in (torch.zeros(1, 4, 64), torch.ones(1, 1, 64)):
        queries = torch.randn(1, 3, 64)
        fitted = basis.fit(queries, keys, 1.0)
        scores = (queries @ fitted.a) @ (keys @ fitted.b - fitted.offset[:, None]).mT
        torch.testing.assert_close(scores, torch.zeros_like(scores), atol=1e-3, rtol=0)


LSE_ATOL = 0.1  # bits: an approximate exponential has up to 6 % too much


def log2_mass(scores, visible=True):
    """Log2 of the mass that scores in bits hold, of what is visible."""
    scores = scores.double().masked_fill(~torch.as_tensor(visible), float("-inf"))
    return (scores * math.log(2)).logsumexp(-1) / math.log(2)


def test_scores_are_log_probabilities_over_a_sample_and_the_own_segment():
    queries, keys = torch.randn(1, 50, 64), torch.randn(1, 20_000, 64)
    fitted = basis.fit(queries, keys, 0.125, rank=basis.RANK)
    projected = basis.project_keys(keys, fitted, torch.float32)
    own = basis.project_keys(torch.randn(1, 50, 64) * 2, fitted, torch.float32)
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    scores, own_scores = ((queries @ fitted.a) @ k[..., : basis.RANK].mT for k in (projected, own))

    def row_lse(history):
        rows = basis.project_queries(queries, fitted, history, own, causal, torch.float32)
        return -(rows[..., basis.RANK :] @ torch.tensor(basis.LSE_FACTORS)).double()

    exact = torch.logaddexp2(log2_mass(scores), log2_mass(own_scores, causal))
    assert (row_lse(projected) - exact).abs().median() < 0.2, "1,250 of 20,000 keys"
    repeated = projected[:, :40].repeat_interleave(basis.LSE_STEP, 1)
    history = log2_mass(scores[..., :40]) + math.log2(basis.LSE_STEP)
    exact = torch.logaddexp2(history, log2_mass(own_scores, causal))
    assert (row_lse(repeated) - exact).abs().max() < LSE_ATOL
    assert (exact - history).mean() > 0.05, "the own segment must matter here"


def test_large_log_sum_exps_survive_fp8():
    queries = torch.randn(1, 500, 64) * torch.linspace(0.1, 12, 500)[:, None]
    keys = torch.randn(1, 2000, 64)
    fitted = basis.fit(queries, keys, 0.125)
    projected = basis.project_keys(keys, fitted, torch.float8_e4m3fn)
    own, visible = projected[:, :1], torch.ones(500, 1, dtype=torch.bool)
    rows = basis.project_queries(queries, fitted, projected, own, visible, torch.float8_e4m3fn)
    sample = projected[:, stratified(2000, basis.LSE_STEP), : basis.RANK]
    past, own_scores = (
        log2_mass(rows[..., : basis.RANK] @ k[..., : basis.RANK].mT) for k in (sample, own)
    )
    wanted = torch.logaddexp2(past + math.log2(2000 / sample.shape[1]), own_scores)
    assert wanted.max() > 40
    got = -rows[..., basis.RANK :] @ torch.tensor(basis.LSE_FACTORS)
    assert (got - wanted).abs().max() < LSE_ATOL


@pytest.mark.parametrize("head_dim", [64, 96, pytest.param(512, marks=LARGE_CARD)])
def test_fitted_bases_match_the_reference(device, head_dim):
    """Directions are known up to their sign: products q·k are compared, and the offset."""
    batch = make_batch(device, chunks=((500, 300),), head_dim=head_dim, heads=4, kv_heads=2)
    batch.kv_cache[..., :head_dim] *= torch.linspace(0.3, 3, head_dim, device=device)
    batch.kv_cache[..., :head_dim] += 40.0  # a mean far larger than the deviation
    (work,) = batch.work()
    space = BasisWorkspace(2, head_dim, batch.query.dtype, device)
    space.a.fill_(float("nan"))
    span = (batch.query, batch.kv_cache, batch.block_table, work.row, work.chunk)
    take_moments(*span, space)
    find_bases(space, scale=batch.scale)
    wanted = basis.fit_span(*span, 2, batch.scale)
    a, b = space.a.float(), space.b.float()
    rank = basis.RANK
    product = wanted.a @ wanted.b.mT
    assert relative_error(a[..., :rank] @ b[..., :rank].mT, product) < TOLERANCE * 3
    sign = (a[..., :rank] * wanted.a).sum(-2).sign()
    offset = space.offset
    assert relative_error(offset[..., :rank] * sign, wanted.offset) < TOLERANCE * 3
    assert (a[..., rank:] == 0).all()
    assert (b[..., rank:] == 0).all()
    factors = torch.tensor(basis.LSE_FACTORS, device=device).expand(2, -1)
    torch.testing.assert_close(-offset[..., rank:], factors)


def test_by_fitted_bases_of_degenerate_keys_all_keys_are_alike(device):
    for value in (0.0, 1.0):
        batch = make_batch(device, chunks=((70, 64),))
        batch.kv_cache[..., :64] = value
        (work,) = batch.work()
        space = BasisWorkspace(2, 64, batch.query.dtype, device)
        take_moments(batch.query, batch.kv_cache, batch.block_table, work.row, work.chunk, space)
        find_bases(space, scale=batch.scale)
        rank = basis.RANK
        queries = batch.query.float().transpose(0, 1).unflatten(0, (2, -1)).flatten(1, 2)
        key = torch.full((1, 64), value, device=device)
        projected = key @ space.b[..., :rank].float() - space.offset[:, None, :rank]
        scores = (queries @ space.a[..., :rank].float()) @ projected.mT
        torch.testing.assert_close(scores, torch.zeros_like(scores), atol=2e-2, rtol=0)


def test_a_key_that_one_query_wants_ranks_first_in_every_list():
    """What a mean query cannot see: one of many queries, always scored, matches one key."""
    torch.manual_seed(3)
    batch = make_batch(torch.device("cpu"), chunks=((512, 32),), heads=2, kv_heads=1,
                       dtype=torch.float32)  # fmt: skip
    key, page = 346, batch.kv_cache.shape[2]
    # One that the sample of the row log-sum-exp holds would count as all of its stratum.
    assert key not in stratified(512, basis.LSE_STEP).tolist()
    block = int(batch.block_table[0, key // page])
    means = batch.query.mean(0).T  # the key has nothing of them
    own = means @ torch.linalg.lstsq(means, batch.query[12, 0, :, None]).solution
    batch.kv_cache[block, 0, key % page, :64] = 3 * (batch.query[12, 0] - own[:, 0])
    (work,) = batch.work()
    wanted = ranking_reference.low_rank_scores(
        *arguments(batch, work), scale=batch.scale, precision=basis.Precision(67)
    )
    assert int(wanted[0, 0].argmax()) == key
    mean = ranking_reference.mean_query_scores(*arguments(batch, work), scale=batch.scale)
    assert int((mean[0, 0] > mean[0, 0, key]).sum()) > 10
