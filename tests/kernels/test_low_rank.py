"""Each step of the low-rank ranking against the one before it, as the kernels left it.

`test_rank.py` compares the end with the reference; here a step that goes wrong is named.
"""

from types import SimpleNamespace

import pytest
import torch

from cases import DTYPE, FP8_CARD, ON_GPU, make_batch
from s2o_vllm.kernels import basis, low_rank, reference
from s2o_vllm.kernels.fit import find_bases, take_moments
from s2o_vllm.kernels.plan import (
    DENSE_START,
    FIT,
    NUM_QUERIES,
    ROW_STEP,
    Limits,
    PrefillRow,
    build_work_lists,
)
from s2o_vllm.kernels.sampling import stratified
from s2o_vllm.kernels.score import score_rows

SHAPES = [
    # heads, kv_heads, head_dim, segment, an fp8 cache: scored rows of a whole segment
    (2, 2, 128, 32, False),  # 16
    (4, 2, 64, 32, False),  # 32
    (5, 1, 64, 64, False),  # 160
    (6, 1, 96, 64, False),  # 192
    (8, 2, 128, 64, False),  # 128
    pytest.param((5, 1, 96, 64, True), marks=FP8_CARD),  # 160
]
ULP = 2.0**-3 if ON_GPU else 2.0**-9  # of images, relative: e4m3 on the card, fp16 on the CPU


@pytest.fixture(params=SHAPES, ids=str, scope="module")
def ranked(request, device, fresh_seed):
    """A batch of one request and what the kernels made of it; the tests only read it."""
    fresh_seed()
    heads, kv_heads, head_dim, segment, fp8 = request.param
    batch = make_batch(
        device, chunks=((700, 150),), heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        head_major=False, fp8=fp8,
    )  # fmt: skip
    (work,) = batch.work(segment=segment)
    space = low_rank.LowRankWorkspace(
        heads, kv_heads, head_dim, 850, work.num_items, segment, DTYPE, device
    )
    for part in (space.images, space.rows):
        part.view(torch.uint8 if ON_GPU else torch.int16).fill_(0x3C)  # what was there before
    space.chosen.fill_(2**30)
    scores = torch.full((work.num_items, kv_heads, 850), float("nan"), device=device).half()
    bounds = torch.empty(work.num_items * kv_heads, 1, 2, device=device)
    low_rank.low_rank_scores(
        batch.query, batch.kv_cache, batch.block_table, work, scores, bounds, space,
        scale=batch.scale,
    )  # fmt: skip
    return batch, work, space, scores


def each_item(work, space, group):
    """Number, history and chosen rows of every segment, which all have one fit here."""
    for number, item in enumerate(work.items.tolist()):
        kept = -(-item[2] * group // ROW_STEP)
        yield number, item, item[DENSE_START], space.chosen[number, :, :kept].long()


def rows_of(batch, item):
    """A segment's rows, query by query: ``[kv_heads, rows, head_dim]``."""
    queries = reference.segment_queries(batch.query, item, batch.kv_cache.shape[1])
    return queries.transpose(1, 2).flatten(1, 2)


def assert_rounded(got, wanted):
    """Equal up to one rounding, which may fall either way, and what the product itself loses."""
    got, wanted = got.float(), wanted.float()
    assert ((got - wanted).abs() <= ULP * wanted.abs() + 2e-2).all()


def test_images_of_keys(ranked):
    batch, work, space, _ = ranked
    head_dim, page = batch.query.shape[2], batch.kv_cache.shape[2]
    seen = work.max_fit_tokens
    positions = torch.arange(seen, device=batch.query.device)
    slots = reference.physical_slots(positions, batch.block_table[work.row], page)
    keys, _ = reference.load_tokens(batch.kv_cache, slots, head_dim)
    wanted = keys @ space.fit.b[0].float() - space.fit.offset[0, :, None]
    assert_rounded(space.images[0, :, :seen], wanted)
    factors = torch.tensor(basis.SHIFT_FACTORS, device=keys.device)
    assert (space.images[0, :, :seen, basis.RANK :].float() == factors).all()


def test_chosen_rows_have_the_largest_images(ranked):
    batch, work, space, _ = ranked
    group = batch.query.shape[1] // batch.kv_cache.shape[1]
    for _, item, _, chosen in each_item(work, space, group):
        images = rows_of(batch, item) @ space.fit.a[0, :, :, : basis.RANK].float()
        wanted = basis.scored_rows(images, group)
        assert chosen.shape == wanted.shape
        assert (chosen.diff() > 0).all(), "each once, in their order"
        size = images.square().sum(-1)
        # Of sizes that are equal but for rounding either may be chosen.
        smallest, asked = size.gather(1, chosen).amin(1), size.gather(1, wanted).amin(1)
        torch.testing.assert_close(smallest, asked, rtol=2e-2 if ON_GPU else 1e-4, atol=0)


def test_images_of_rows(ranked):
    batch, work, space, _ = ranked
    group = batch.query.shape[1] // batch.kv_cache.shape[1]
    for number, item, _, chosen in each_item(work, space, group):
        images = rows_of(batch, item) @ space.fit.a[0, :, :, : basis.RANK].float()
        wanted = images.gather(1, chosen[..., None].expand(-1, -1, basis.RANK))
        assert_rounded(space.rows[number, :, : wanted.shape[1], : basis.RANK], wanted)


def test_shifts_of_rows(ranked):
    batch, work, space, _ = ranked
    group = batch.query.shape[1] // batch.kv_cache.shape[1]
    factors = torch.tensor(basis.SHIFT_FACTORS, device=batch.query.device)
    for number, item, history, chosen in each_item(work, space, group):
        rows = space.rows[number, :, : chosen.shape[1]].float()
        images = space.images[0, ..., : basis.RANK].float()
        places = stratified(history, basis.SHIFT_STEP).to(images.device)
        scores = rows[..., : basis.RANK] @ images[:, places].mT
        own = rows[..., : basis.RANK] @ images[:, history : history + item[2]].mT
        future = torch.arange(item[2], device=own.device) > chosen[..., None] // group
        own = own.masked_fill(future, float("-inf"))
        mass = scores.double().exp2().mean(-1) * history + own.double().exp2().sum(-1)
        got = -(rows[..., basis.RANK :] @ factors)
        # Rough exponentials have up to 6 % too much, images of shifts are rounded.
        torch.testing.assert_close(got, mass.log2().float(), atol=0.1, rtol=0)


def test_scores_are_the_largest_products(ranked):
    batch, work, space, scores = ranked
    group = batch.query.shape[1] // batch.kv_cache.shape[1]
    for number, _, history, chosen in each_item(work, space, group):
        rows = space.rows[number, :, : chosen.shape[1]].float()
        wanted = (rows @ space.images[0, :, :history].float().mT).amax(1)
        torch.testing.assert_close(
            scores[number, :, :history].float(), wanted, atol=0.1 if ON_GPU else 3e-2, rtol=0
        )
        assert torch.isnan(scores[number, :, history:]).all()


def test_neighbours_that_share_loads_score_as_single_ones(device):
    row = PrefillRow(0, 0, 138, 2000, 0.1)
    (work,) = build_work_lists([row], 32, 512, device, Limits(8, 2**14))
    # The longest history first: one group lacks its first segment, the next one its last two.
    assert work.items[:, FIT].tolist() == [1, 1, 1, 0, 0]
    assert work.first_fit_items == 3
    kind = basis.image_dtype(device)
    space = SimpleNamespace(
        images=torch.randn(2, 2, 2138, basis.WIDTH, device=device).to(kind),
        rows=torch.randn(5, 2, 32, basis.WIDTH, device=device).to(kind),
    )
    results = []
    for shared in (False, True):
        scores = torch.full((5, 2, 3072), float("nan"), device=device).half()
        bounds = torch.full((10, 3, 2), float("nan"), device=device)
        score_rows(work, scores, bounds, space, 2, chunk=1024, shared=shared)
        results.append((scores, bounds))
    (scores, bounds), (shared_scores, shared_bounds) = results
    for number, item in enumerate(work.items.tolist()):
        fit, history, kept = item[FIT], item[DENSE_START], item[NUM_QUERIES] * 2 // ROW_STEP
        wanted = (
            space.rows[number, :, :kept].float() @ space.images[fit, :, :history].float().mT
        ).amax(1)
        got = scores[number, :, :history].float()
        torch.testing.assert_close(got, wanted, atol=0.1 if ON_GPU else 3e-2, rtol=0)
        assert torch.isnan(shared_scores[number, :, history:]).all()
    torch.testing.assert_close(shared_scores, scores, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(shared_bounds, bounds, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fit_is_the_references_and_the_same_twice(device, shape):
    heads, kv_heads, head_dim, segment, fp8 = shape
    batch = make_batch(device, chunks=((700, 150),), heads=heads, kv_heads=kv_heads,
                       head_dim=head_dim, fp8=fp8)  # fmt: skip
    (work,) = batch.work(segment=segment)
    arguments = (batch.query, batch.kv_cache, batch.block_table, work)
    spaces = []
    for _ in range(2):
        space = low_rank.LowRankWorkspace(heads, kv_heads, head_dim, 850, 4, segment, DTYPE, device)
        take_moments(*arguments, space.fit)
        find_bases(arguments[-1], space.fit, scale=batch.scale)
        spaces.append(space.fit)
    one, other = spaces
    for name in ("moments", "means", "a", "b", "offset"):
        first, second = getattr(one, name)[:1], getattr(other, name)[:1]
        assert torch.equal(first, second), f"{name} differs from run to run"
    wanted = basis.fit_work(*arguments, batch.scale)
    product = one.a[:1].float() @ one.b[:1].float().mT
    truth = wanted.a @ wanted.b.mT
    assert float((product - truth).norm() / truth.norm()) < (0.05 if ON_GPU else 1e-3)
