"""Each step of the low-rank ranking against the one before it, as the kernels left it.

`test_mean_query.py` compares the end with the reference; here a step that goes wrong is named.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cases import DTYPE, FP8_CARD, LARGE_CARD, ON_GPU, make_batch
from s2o_vllm.kernels import paging
from s2o_vllm.kernels.layout import DENSE_START, NUM_QUERIES
from s2o_vllm.kernels.ranking import basis, low_rank, row_lse
from s2o_vllm.kernels.ranking.fit_basis import find_bases, take_moments
from s2o_vllm.kernels.ranking.score import STORED, bases_together, key_capacity, score_history
from s2o_vllm.kernels.sampling import stratified
from s2o_vllm.kernels.tuning import PROBE_STEP
from s2o_vllm.kernels.work_list import Limits, PrefillRow, build_work_lists

SHAPES = [
    # heads, kv_heads, head_dim, segment, an fp8 cache, precision: probes of a whole segment
    (2, 2, 128, 32, False, basis.SERVED),  # 16
    (4, 2, 64, 32, False, basis.SERVED),  # 32
    (5, 1, 64, 64, False, basis.SERVED),  # 160
    (6, 1, 96, 64, False, basis.SERVED),  # 192
    (8, 2, 128, 64, False, basis.SERVED),  # 128
    (4, 2, 64, 32, False, basis.RETRIEVAL),  # 64
    (6, 1, 128, 64, False, basis.RETRIEVAL),  # 384
    pytest.param((5, 1, 96, 64, True, basis.SERVED), marks=FP8_CARD),  # 160
    pytest.param((2, 1, 512, 32, False, basis.SERVED), marks=LARGE_CARD),
    pytest.param((2, 1, 512, 32, False, basis.RETRIEVAL), marks=LARGE_CARD),
]
ULP = 2.0**-3 if ON_GPU else 2.0**-9  # of projections, relative: e4m3 on the card, fp16 on the CPU


@pytest.fixture(params=SHAPES, ids=str, scope="module")
def ranked(request, device, fresh_seed):
    """A batch of one request and what the kernels made of it; the tests only read it."""
    fresh_seed()
    heads, kv_heads, head_dim, segment, fp8, precision = request.param
    batch = make_batch(
        device, chunks=((700, 150),), heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        head_major=False, fp8=fp8,
    )  # fmt: skip
    (work,) = batch.work(segment=segment)
    space = low_rank.LowRankWorkspace(
        heads, heads, head_dim, 850, work.num_segments, segment, DTYPE, device, precision=precision
    )
    for part in (space.projected_keys, space.projected_probes):
        part.view(torch.uint8 if ON_GPU else torch.int16).fill_(0x3C)  # of an earlier list
    space.probe_rows.fill_(2**30)
    scores = torch.full((work.num_segments, kv_heads, 856), float("nan"), device=device).half()
    bounds = torch.empty(work.num_segments * kv_heads, 1, 2, device=device)
    low_rank.low_rank_scores(
        batch.query, batch.kv_cache, batch.block_table, work, scores, bounds, space,
        scale=batch.scale,
    )  # fmt: skip
    return batch, work, space, scores


def each_segment(work, space):
    """Number, line, history and probes of every segment, which all have the same bases here."""
    for number, segment in enumerate(work.segments.tolist()):
        count = -(-segment[NUM_QUERIES] // space.probe_step)
        yield number, segment, segment[DENSE_START], space.probe_rows[number, :, :count].long()


def rows_of(batch, segment):
    """A segment's rows: ``[heads, queries, head_dim]``."""
    return paging.segment_queries(batch.query, segment, batch.query.shape[1]).flatten(1, 2)


def assert_rounded(got, wanted):
    """Equal up to one rounding, which may fall either way, and what the product itself loses."""
    got, wanted = got.float(), wanted.float()
    assert ((got - wanted).abs() <= ULP * wanted.abs() + 2e-2).all()


def test_projected_keys(ranked):
    batch, work, space, _ = ranked
    head_dim, page = batch.query.shape[2], batch.kv_cache.shape[2]
    seen = work.max_seen
    positions = torch.arange(seen, device=batch.query.device)
    slots = paging.physical_slots(positions, batch.block_table[work.row], page)
    keys, _ = paging.load_tokens(batch.kv_cache, slots, head_dim, batch.query.shape[1])
    wanted = keys @ space.basis.b.float() - space.basis.offset[:, None]
    assert_rounded(space.projected_keys[:, :seen], wanted)
    factors = torch.tensor(basis.LSE_FACTORS, device=keys.device)
    assert (space.projected_keys[:, :seen, space.basis.rank :].float() == factors).all()


def test_probes_are_the_rows_farthest_from_their_mean(ranked):
    batch, work, space, _ = ranked
    for _, segment, _, probes in each_segment(work, space):
        rows = rows_of(batch, segment) @ space.basis.a[:, :, : space.basis.rank].float()
        wanted = basis.farthest_rows(rows, space.probe_step)
        assert probes.shape == wanted.shape
        assert (probes.diff() > 0).all(), "each once, in their order"
        distance = (rows - rows.mean(1, keepdim=True)).square().sum(-1)
        # Of distances that are equal but for rounding either may be chosen.
        nearest, limit = distance.gather(1, probes).amin(1), distance.gather(1, wanted).amin(1)
        torch.testing.assert_close(nearest, limit, rtol=2e-2 if ON_GPU else 1e-4, atol=0)


def test_projected_probes(ranked):
    batch, work, space, _ = ranked
    rank = space.basis.rank
    for number, segment, _, probes in each_segment(work, space):
        rows = rows_of(batch, segment) @ space.basis.a[:, :, :rank].float()
        wanted = rows.gather(1, probes[..., None].expand(-1, -1, rank))
        assert_rounded(space.projected_probes[number, :, : wanted.shape[1], :rank], wanted)


def test_row_log_sum_exps(ranked):
    batch, work, space, _ = ranked
    rank = space.basis.rank
    factors = torch.tensor(basis.LSE_FACTORS, device=batch.query.device)
    keys = space.projected_keys[..., :rank].float()
    for number, segment, history, probes in each_segment(work, space):
        projected = space.projected_probes[number, :, : probes.shape[1]].float()
        positions = stratified(history, basis.LSE_STEP).to(keys.device)
        scores = projected[..., :rank] @ keys[:, positions].mT
        count = segment[NUM_QUERIES]
        own = projected[..., :rank] @ keys[:, history : history + count].mT
        future = torch.arange(count, device=own.device) > probes[..., None]
        own = own.masked_fill(future, float("-inf"))
        mass = scores.double().exp2().mean(-1) * history + own.double().exp2().sum(-1)
        got = -(projected[..., rank:] @ factors)
        # Approximate exponentials have up to 6 % too much; the three parts are rounded.
        torch.testing.assert_close(got, mass.log2().float(), atol=0.1, rtol=0)


def test_a_row_lse_does_not_depend_on_the_segment_that_shares_its_tile(device, monkeypatch):
    """Neighbours of one sampling stride and of two, one without a neighbour, one that is dense."""
    monkeypatch.setattr(basis, "LSE_SAMPLES", 8)
    monkeypatch.setattr(row_lse, "LSE_BLOCK", 16)  # two segments of 16, half of whose rows count
    row = PrefillRow(0, 0, 150, 48, 0.1)
    (work,) = build_work_lists([row], 16, 64, device, Limits(16, 2**20))
    segments, bases, count = work.num_segments, 2, 8
    histories = work.segments[:, DENSE_START].tolist()
    assert segments % 2 == 0
    assert [history > 0 for history in histories[-2:]] == [True, False]
    steps = [max(basis.LSE_STEP, -(-history // 8)) for history in histories]
    pairs = set(zip(steps[::2], steps[1::2], strict=True))
    assert {one == other for one, other in pairs} == {True, False}
    dtype = basis.projection_dtype(device)
    keys = torch.randn(bases, key_capacity(256), basis.WIDTH, device=device)
    keys[..., basis.RANK :] = torch.tensor(basis.LSE_FACTORS, device=device)
    drawn = torch.randn(segments, bases, count, basis.WIDTH, device=device)
    drawn[..., basis.RANK :] = 0
    probe_rows = (2 * torch.arange(count, device=device)).int()
    spaces = [
        SimpleNamespace(
            projected_keys=keys.to(dtype),
            projected_probes=drawn.to(dtype),
            probe_rows=probe_rows.expand(segments, bases, -1).contiguous(),
            probe_step=2,
            heads=None,
            basis=SimpleNamespace(a=torch.empty(bases, 64, 32)),
        )
        for _ in range(2)
    ]
    query = torch.empty(150, bases, 64, device=device)
    row_lse.estimate_row_lse(query, work, spaces[0], block_n=16)
    for number in range(segments):
        one = replace(work, segments=work.segments[number : number + 1])
        space = SimpleNamespace(**vars(spaces[1]))
        space.projected_probes = space.projected_probes[number:]
        space.probe_rows = space.probe_rows[number:]
        row_lse.estimate_row_lse(query, one, space, block_n=16)
    together, alone = (space.projected_probes.float() for space in spaces)
    assert (together[1:-1, ..., basis.RANK :] != 0).any(-1).all(), "of whole segments"
    # NumPy sums rows in another order by where they are.
    torch.testing.assert_close(together, alone, atol=0 if ON_GPU else 1e-4, rtol=0)


def test_scores_are_the_largest_products(ranked):
    batch, work, space, scores = ranked
    for number, _, history, probes in each_segment(work, space):
        projected = space.projected_probes[number, :, : probes.shape[1]].float()
        by_head = (projected @ space.projected_keys[:, :history].float().mT).amax(1)
        wanted = by_head.unflatten(0, (batch.kv_cache.shape[1], -1)).amax(1)
        torch.testing.assert_close(
            scores[number, :, :history].float(), wanted, atol=0.1 if ON_GPU else 3e-2, rtol=0
        )
        assert torch.isnan(scores[number, :, history + STORED.value - 1 :]).all()


@pytest.mark.parametrize(
    ("segment", "share"), [(16, 1), (32, 2), (32, 3), (64, 6), (700, 2)], ids=str
)
def test_neighbours_that_share_loads_score_as_single_ones(device, segment, share):
    """Whatever the bases of a KV head and the probes: many take several passes."""
    row = PrefillRow(0, 0, 138 if segment < 100 else 1400, 2000, 0.1)
    (work,) = build_work_lists([row], segment, 512, device, Limits(16, 2**20))
    dtype, probes = basis.projection_dtype(device), -(-segment // PROBE_STEP)
    segments, bases = work.num_segments, 2 * share
    keys = torch.randn(bases, key_capacity(3400), basis.WIDTH, device=device)
    drawn = torch.randn(segments, bases, probes, basis.WIDTH, device=device)
    space = SimpleNamespace(
        projected_keys=keys.to(dtype),
        projected_probes=drawn.to(dtype),
        probe_step=PROBE_STEP,
        heads=None,
    )
    results = []
    for shared in (False, True):
        scores = torch.full((segments, 2, 4096), float("nan"), device=device).half()
        bounds = torch.full((segments * 2, 4, 2), float("nan"), device=device)
        score_history(work, scores, bounds, space, 1, chunk=1024, shared=shared)
        results.append((scores, bounds))
    (scores, bounds), (shared_scores, shared_bounds) = results
    for number, line in enumerate(work.segments.tolist()):
        history, count = line[DENSE_START], -(-line[NUM_QUERIES] // PROBE_STEP)
        projected = space.projected_probes[number, :, :count].float()
        by_basis = projected @ space.projected_keys[:, :history].float().mT
        wanted = by_basis.amax(1).unflatten(0, (2, -1)).amax(1)
        got = scores[number, :, :history].float()
        torch.testing.assert_close(got, wanted, atol=0.1 if ON_GPU else 3e-2, rtol=0)
        assert torch.isnan(shared_scores[number, :, history + STORED.value - 1 :]).all()
        for head in range(2):
            for start in range(0, history, 1024):
                part = scores[number, head, start : min(start + 1024, history)].float()
                own = bounds[number * 2 + head, start // 1024]
                assert own.tolist() == [float(part.max()), float(part.min())]
    torch.testing.assert_close(shared_scores, scores, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(shared_bounds, bounds, atol=0, rtol=0, equal_nan=True)


def test_a_pass_repeats_as_few_bases_as_it_can():
    assert [bases_together(share, 4) for share in (1, 2, 3, 4, 5, 6, 7, 8)] == [
        1,
        2,
        4,
        4,
        2,
        2,
        4,
        4,
    ]
    assert [bases_together(share, 2) for share in (1, 2, 3, 8)] == [1, 2, 2, 2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bases_are_the_references_and_the_same_twice(device, shape):
    heads, kv_heads, head_dim, segment, fp8, precision = shape
    batch = make_batch(device, chunks=((700, 150),), heads=heads, kv_heads=kv_heads,
                       head_dim=head_dim, fp8=fp8)  # fmt: skip
    (work,) = batch.work(segment=segment)
    arguments = (batch.query, batch.kv_cache, batch.block_table, work.row, work.chunk)
    spaces = []
    for _ in range(2):
        space = low_rank.LowRankWorkspace(
            heads, heads, head_dim, 850, 4, segment, DTYPE, device, precision=precision
        )
        take_moments(*arguments, space.basis)
        find_bases(space.basis, scale=batch.scale)
        spaces.append(space.basis)
    one, other = spaces
    for name in ("moments", "means", "a", "b", "offset"):
        assert torch.equal(getattr(one, name), getattr(other, name)), f"{name} differs"
    wanted = basis.fit_span(*arguments, heads, batch.scale, precision.rank)
    product = one.a.float() @ one.b.float().mT
    truth = wanted.a @ wanted.b.mT
    assert float((product - truth).norm() / truth.norm()) < (0.05 if ON_GPU else 1e-3)
