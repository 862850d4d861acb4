"""Each step of the low-rank ranking against the one before it, as the kernels left it.

`test_mean_query.py` compares the end with the reference; here a step that goes wrong is named.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cases import DTYPE, FP8_CARD, ON_GPU, make_batch
from s2o_vllm.kernels import paging
from s2o_vllm.kernels.layout import DENSE_START, NUM_QUERIES
from s2o_vllm.kernels.ranking import basis, low_rank, rows
from s2o_vllm.kernels.ranking.fit import find_bases, take_moments
from s2o_vllm.kernels.ranking.score import STORED, bases_together, image_room, score_rows
from s2o_vllm.kernels.sampling import stratified
from s2o_vllm.kernels.tuning import ROW_STEP
from s2o_vllm.kernels.work_list import Limits, PrefillRow, build_work_lists

SHAPES = [
    # heads, kv_heads, head_dim, segment, an fp8 cache, precision: scored rows of a whole segment
    (2, 2, 128, 32, False, basis.SERVED),  # 16
    (4, 2, 64, 32, False, basis.SERVED),  # 32
    (5, 1, 64, 64, False, basis.SERVED),  # 160
    (6, 1, 96, 64, False, basis.SERVED),  # 192
    (8, 2, 128, 64, False, basis.SERVED),  # 128
    (4, 2, 64, 32, False, basis.WIDE),  # 64
    (6, 1, 128, 64, False, basis.WIDE),  # 384
    pytest.param((5, 1, 96, 64, True, basis.SERVED), marks=FP8_CARD),  # 160
]
ULP = 2.0**-3 if ON_GPU else 2.0**-9  # of images, relative: e4m3 on the card, fp16 on the CPU


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
    for part in (space.images, space.rows):
        part.view(torch.uint8 if ON_GPU else torch.int16).fill_(0x3C)  # what was there before
    space.chosen.fill_(2**30)
    scores = torch.full((work.num_segments, kv_heads, 856), float("nan"), device=device).half()
    bounds = torch.empty(work.num_segments * kv_heads, 1, 2, device=device)
    low_rank.low_rank_scores(
        batch.query, batch.kv_cache, batch.block_table, work, scores, bounds, space,
        scale=batch.scale,
    )  # fmt: skip
    return batch, work, space, scores


def each_item(work, space):
    """Number, history and chosen rows of every segment, which all have one fit here."""
    for number, item in enumerate(work.segments.tolist()):
        kept = -(-item[NUM_QUERIES] // space.row_step)
        yield number, item, item[DENSE_START], space.chosen[number, :, :kept].long()


def rows_of(batch, item):
    """A segment's rows: ``[heads, queries, head_dim]``."""
    return paging.segment_queries(batch.query, item, batch.query.shape[1]).flatten(1, 2)


def assert_rounded(got, wanted):
    """Equal up to one rounding, which may fall either way, and what the product itself loses."""
    got, wanted = got.float(), wanted.float()
    assert ((got - wanted).abs() <= ULP * wanted.abs() + 2e-2).all()


def test_images_of_keys(ranked):
    batch, work, space, _ = ranked
    head_dim, page = batch.query.shape[2], batch.kv_cache.shape[2]
    seen = work.max_seen
    positions = torch.arange(seen, device=batch.query.device)
    slots = paging.physical_slots(positions, batch.block_table[work.row], page)
    keys, _ = paging.load_tokens(batch.kv_cache, slots, head_dim, batch.query.shape[1])
    wanted = keys @ space.fit.b.float() - space.fit.offset[:, None]
    assert_rounded(space.images[:, :seen], wanted)
    factors = torch.tensor(basis.SHIFT_FACTORS, device=keys.device)
    assert (space.images[:, :seen, space.fit.rank :].float() == factors).all()


def test_chosen_rows_are_the_farthest_from_their_mean(ranked):
    batch, work, space, _ = ranked
    for _, item, _, chosen in each_item(work, space):
        images = rows_of(batch, item) @ space.fit.a[:, :, : space.fit.rank].float()
        wanted = basis.scored_rows(images, space.row_step)
        assert chosen.shape == wanted.shape
        assert (chosen.diff() > 0).all(), "each once, in their order"
        size = (images - images.mean(1, keepdim=True)).square().sum(-1)
        # Of sizes that are equal but for rounding either may be chosen.
        smallest, asked = size.gather(1, chosen).amin(1), size.gather(1, wanted).amin(1)
        torch.testing.assert_close(smallest, asked, rtol=2e-2 if ON_GPU else 1e-4, atol=0)


def test_images_of_rows(ranked):
    batch, work, space, _ = ranked
    for number, item, _, chosen in each_item(work, space):
        images = rows_of(batch, item) @ space.fit.a[:, :, : space.fit.rank].float()
        wanted = images.gather(1, chosen[..., None].expand(-1, -1, space.fit.rank))
        assert_rounded(space.rows[number, :, : wanted.shape[1], : space.fit.rank], wanted)


def test_shifts_of_rows(ranked):
    batch, work, space, _ = ranked
    factors = torch.tensor(basis.SHIFT_FACTORS, device=batch.query.device)
    for number, item, history, chosen in each_item(work, space):
        rows = space.rows[number, :, : chosen.shape[1]].float()
        images = space.images[..., : space.fit.rank].float()
        places = stratified(history, basis.SHIFT_STEP).to(images.device)
        scores = rows[..., : space.fit.rank] @ images[:, places].mT
        own = rows[..., : space.fit.rank] @ images[:, history : history + item[2]].mT
        future = torch.arange(item[2], device=own.device) > chosen[..., None]
        own = own.masked_fill(future, float("-inf"))
        mass = scores.double().exp2().mean(-1) * history + own.double().exp2().sum(-1)
        got = -(rows[..., space.fit.rank :] @ factors)
        # Rough exponentials have up to 6 % too much, images of shifts are rounded.
        torch.testing.assert_close(got, mass.log2().float(), atol=0.1, rtol=0)


def test_a_shift_does_not_depend_on_the_segment_it_shares_a_tile_with(device, monkeypatch):
    """Neighbours of one sampling stride and of two, one without a neighbour, one that is dense."""
    monkeypatch.setattr(basis, "SHIFT_SAMPLES", 8)
    monkeypatch.setattr(rows, "SHIFT_BLOCK", 16)  # two segments of 16, half of whose rows count
    row = PrefillRow(0, 0, 150, 48, 0.1)
    (work,) = build_work_lists([row], 16, 64, device, Limits(16, 2**20))
    items, bases, kept = work.num_segments, 2, 8
    histories = work.segments[:, DENSE_START].tolist()
    assert items % 2 == 0
    assert [history > 0 for history in histories[-2:]] == [True, False]
    steps = [max(basis.SHIFT_STEP, -(-history // 8)) for history in histories]
    pairs = set(zip(steps[::2], steps[1::2], strict=True))
    assert {one == other for one, other in pairs} == {True, False}
    kind = basis.image_dtype(device)
    images = torch.randn(bases, image_room(256), basis.WIDTH, device=device)
    images[..., basis.RANK :] = torch.tensor(basis.SHIFT_FACTORS, device=device)
    drawn = torch.randn(items, bases, kept, basis.WIDTH, device=device)
    drawn[..., basis.RANK :] = 0
    chosen = (2 * torch.arange(kept, device=device)).int().expand(items, bases, -1).contiguous()
    spaces = [
        SimpleNamespace(
            images=images.to(kind),
            rows=drawn.to(kind),
            chosen=chosen,
            row_step=2,
            numbers=None,
            fit=SimpleNamespace(a=torch.empty(bases, 64, 32)),
        )
        for _ in range(2)
    ]
    query = torch.empty(150, bases, 64, device=device)
    rows.shift_rows(query, work, spaces[0], block_n=16)
    for number in range(items):
        one = replace(work, segments=work.segments[number : number + 1])
        space = SimpleNamespace(**vars(spaces[1]))
        space.rows, space.chosen = space.rows[number:], space.chosen[number:]
        rows.shift_rows(query, one, space, block_n=16)
    together, alone = spaces[0].rows.float(), spaces[1].rows.float()
    assert (together[1:-1, ..., basis.RANK :] != 0).any(-1).all(), "of whole segments"
    # NumPy sums rows in another order by where they are.
    torch.testing.assert_close(together, alone, atol=0 if ON_GPU else 1e-4, rtol=0)


def test_scores_are_the_largest_products(ranked):
    batch, work, space, scores = ranked
    for number, _, history, chosen in each_item(work, space):
        rows = space.rows[number, :, : chosen.shape[1]].float()
        by_head = (rows @ space.images[:, :history].float().mT).amax(1)
        wanted = by_head.unflatten(0, (batch.kv_cache.shape[1], -1)).amax(1)
        torch.testing.assert_close(
            scores[number, :, :history].float(), wanted, atol=0.1 if ON_GPU else 3e-2, rtol=0
        )
        assert torch.isnan(scores[number, :, history + STORED.value - 1 :]).all()


@pytest.mark.parametrize(
    ("segment", "share"), [(16, 1), (32, 2), (32, 3), (64, 6), (700, 2)], ids=str
)
def test_neighbours_that_share_loads_score_as_single_ones(device, segment, share):
    """Whatever the bases of a KV head and the rows: of many there are several passes."""
    row = PrefillRow(0, 0, 138 if segment < 100 else 1400, 2000, 0.1)
    (work,) = build_work_lists([row], segment, 512, device, Limits(16, 2**20))
    kind, rows = basis.image_dtype(device), -(-segment // ROW_STEP)
    items, bases = work.num_segments, 2 * share
    space = SimpleNamespace(
        images=torch.randn(bases, image_room(3400), basis.WIDTH, device=device).to(kind),
        rows=torch.randn(items, bases, rows, basis.WIDTH, device=device).to(kind),
        row_step=ROW_STEP,
        numbers=None,
    )
    results = []
    for shared in (False, True):
        scores = torch.full((items, 2, 4096), float("nan"), device=device).half()
        bounds = torch.full((items * 2, 4, 2), float("nan"), device=device)
        score_rows(work, scores, bounds, space, 1, chunk=1024, shared=shared)
        results.append((scores, bounds))
    (scores, bounds), (shared_scores, shared_bounds) = results
    for number, item in enumerate(work.segments.tolist()):
        history, kept = item[DENSE_START], -(-item[NUM_QUERIES] // ROW_STEP)
        by_basis = space.rows[number, :, :kept].float() @ space.images[:, :history].float().mT
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
def test_the_fit_is_the_references_and_the_same_twice(device, shape):
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
        take_moments(*arguments, space.fit)
        find_bases(space.fit, scale=batch.scale)
        spaces.append(space.fit)
    one, other = spaces
    for name in ("moments", "means", "a", "b", "offset"):
        assert torch.equal(getattr(one, name), getattr(other, name)), f"{name} differs"
    wanted = basis.fit_span(*arguments, heads, batch.scale, precision.rank)
    product = one.a.float() @ one.b.float().mT
    truth = wanted.a @ wanted.b.mT
    assert float((product - truth).norm() / truth.norm()) < (0.05 if ON_GPU else 1e-3)
