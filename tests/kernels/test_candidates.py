"""Candidates: a part of the history that lists are made from."""

from dataclasses import replace

import pytest
import torch

from cases import DTYPE, ON_GPU, make_batch
from s2o_vllm.kernels import basis, candidates, low_rank, plan, reference, reference_select, select
from s2o_vllm.kernels.plan import (
    CANDIDATES,
    DENSE_START,
    ESTIMATE_EVERY,
    FIT,
    HISTORY,
    LIST_LENGTH,
    NOT_LISTED,
    NUM_QUERIES,
    TIERS_UNORDERED,
    Limits,
    PrefillRow,
    build_work_lists,
    list_places,
)

CPU = torch.device("cpu")
LEAST = 100
LIMITS = Limits(1000, 10**7, LEAST)
SEGMENT = 32


def works_of(batch, limits=LIMITS, **changes):
    rows = [row._replace(**changes) for row in batch.rows]
    return build_work_lists(rows, SEGMENT, 0, batch.query.device, limits)


def batch_of(device, context=1900, queries=300, heads=4, kv_heads=2, budget=0.05):
    """Two fits: what comes before 2,048, and what comes after."""
    return make_batch(
        device, chunks=((context, queries),), heads=heads, kv_heads=kv_heads, budget=budget,
        head_major=False,
    )  # fmt: skip


def ranked(batch, work, chunk=4096):
    heads, head_dim = batch.query.shape[1:]
    kv_heads, device = batch.kv_cache.shape[1], batch.query.device
    space = low_rank.LowRankWorkspace(
        heads, kv_heads, head_dim, work.max_fit_tokens, work.num_items, SEGMENT,
        batch.query.dtype, device, least=LEAST,
    )  # fmt: skip
    places = work.num_items * list_places(work.max_list)
    selection = select.SelectWorkspace(
        work.num_items, kv_heads, work.max_fit_tokens, places, device, chunk
    )
    low_rank.low_rank_scores(
        batch.query, batch.kv_cache, batch.block_table, work, selection.scores, selection.bounds,
        space, scale=batch.scale, chunk=chunk,
    )  # fmt: skip
    return space, selection


def test_how_many_tokens_are_candidates():
    assert plan.candidates(30_000, 0.05, 16_384) == 16_384
    assert plan.candidates(120_000, 0.05, 16_384) == 40_000
    assert plan.candidates(120_000, 0.15, 16_384) == 54_000
    assert plan.candidates(120_000, 0.2, 16_384) == 120_000, "most of it: rank it all"
    assert plan.candidates(9_000, 0.05, 16_384) == 9_000
    assert plan.most_candidates(131_072, 16_384) == 65_536
    assert plan.most_candidates(20_000, 16_384) == 16_384


def test_a_fits_segments_rank_its_candidates_and_what_came_after():
    row = PrefillRow(3, 5, 300, 1900, 0.05)
    (work,) = build_work_lists([row], SEGMENT, 0, CPU, LIMITS)
    coarse = work.coarse
    assert coarse.shared == 1
    assert coarse.items.tolist() == [
        [3, 5, 148, 1900, 1900, 634, 0, 1900],
        [3, 153, 152, 2048, 2048, 683, 1, 2048],
    ]
    for item in work.items.tolist():
        _, _, _, before, _, chosen, _, _ = coarse.items.tolist()[item[FIT]]
        assert item[CANDIDATES] == chosen + item[HISTORY] - before
        assert item[LIST_LENGTH] == int(0.05 * item[HISTORY]), "a share of the whole history"
    assert work.max_history == max(work.items[:, CANDIDATES])


def test_segments_that_are_dense_have_no_candidates():
    (work,) = build_work_lists([PrefillRow(0, 0, 400, 800, 0.05)], SEGMENT, 1000, CPU, LIMITS)
    assert work.coarse.items[:, HISTORY].tolist() == [1024]
    assert work.coarse.items[:, NUM_QUERIES].tolist() == [176]
    for item in work.items.tolist():
        assert (item[CANDIDATES] == 0) == (item[DENSE_START] == 0)


@pytest.mark.parametrize(
    ("limits", "changes"),
    [
        (LIMITS._replace(least=None), {}),
        (LIMITS, {"context": LEAST, "num_queries": 50}),
        (LIMITS, {"budget": 0.2}),
        (LIMITS, {"target_error": 0.1}),
    ],
)
def test_where_every_token_is_ranked(limits, changes):
    row = PrefillRow(0, 0, 300, 1900, 0.05)._replace(**changes)
    for work in build_work_lists([row], SEGMENT, 0, CPU, limits):
        assert work.coarse is None
        assert (work.items[:, CANDIDATES] == work.items[:, DENSE_START]).all()


@pytest.mark.parametrize("kind", ["normal", "few values", "equal"])
def test_positions_come_in_order(device, kind):
    """The selection without pages: the best, the last bucket cut short where the list is full."""
    batch = batch_of(device)
    (work,) = works_of(batch)
    coarse, heads = work.coarse, 2
    scores = torch.randn(coarse.num_items, heads, 2048, device=device)
    scores = {"normal": scores, "few values": scores.round(), "equal": 0 * scores}[kind].half()
    space = select.SelectWorkspace(
        coarse.num_items, heads, 2048, 2 * list_places(coarse.max_list), device, 64
    )
    space.scores[:] = scores
    parts = scores.float().unflatten(2, (-1, 64))
    for number, item in enumerate(coarse.items.tolist()):
        seen = parts[number].flatten(1).clone()
        seen[:, item[HISTORY] :] = float("nan")
        seen = seen.unflatten(1, (-1, 64))
        bounds = space.bounds.view(coarse.num_items, heads, -1, 2)
        bounds[number, ..., 0] = seen.nan_to_num(nan=-1e4).amax(2)
        bounds[number, ..., 1] = seen.nan_to_num(nan=1e4).amin(2)
    space.slots.fill_(-7)
    select.select(coarse.items, coarse, 0, space, TIERS_UNORDERED)
    lists = space.lists(coarse)
    for number, item in enumerate(coarse.items.tolist()):
        assert lists.lengths[number].tolist() == [item[LIST_LENGTH]] * heads
        for head in range(heads):
            own = scores[number, head, : item[HISTORY]]
            wanted = reference_select.select_positions(own, item[LIST_LENGTH], TIERS_UNORDERED)
            got = lists.slots[number, head]
            assert got[: len(wanted)].tolist() == wanted.sort().values.tolist()
            assert (got[len(wanted) :] == -7).all(), "wrote beyond the list"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (5, 1), (2, 2)])
def test_the_best_by_a_sample_of_rows_are_found(device, heads, kv_heads):
    batch = batch_of(device, heads=heads, kv_heads=kv_heads)
    (work,) = works_of(batch)
    space, _ = ranked(batch, work)
    found = space.candidates.lists(work)
    for item in work.coarse.items.tolist():
        fit, count, before = item[FIT], item[LIST_LENGTH], item[HISTORY]
        own = basis.Basis(*(part[fit].float() for part in fitted_of(space)))
        images = space.images[fit].float()
        wanted = reference.candidates(batch.query, images, item, own, space.images.dtype)
        for head in range(kv_heads):
            got = found.slots[fit, head, :count].tolist()
            assert got == sorted(set(got)), "in order, without repeats"
            assert got[-1] < before
            common = len(set(got) & set(wanted[head].tolist()))
            assert common >= (0.97 if ON_GPU else 0.995) * count, "rounding moves a few"
            rows = [*got, *range(before, before + item[NUM_QUERIES])]
            gathered = space.candidates.images[fit, head, : len(rows)]
            assert torch.equal(gathered.float(), images[head, rows])


def fitted_of(space):
    rank = basis.RANK
    return space.fit.a[..., :rank], space.fit.b[..., :rank], space.fit.offset[..., :rank]


@pytest.mark.parametrize("chunk", [64, 4096])
def test_lists_are_the_best_of_the_candidates(device, chunk):
    batch = batch_of(device)
    (work,) = works_of(batch)
    space, selection = ranked(batch, work, chunk)
    found = space.candidates.lists(work)
    page = batch.kv_cache.shape[2]
    select.select(batch.block_table, work, page, selection, TIERS_UNORDERED, found)
    lists = selection.lists(work)
    # What the reference makes of the same scores, put where they belong.
    items = work.items.tolist()
    longest = max(item[DENSE_START] for item in items)
    shape = (work.num_items, 2, longest)
    scores = torch.full(shape, float("-inf"), dtype=torch.half, device=device)
    for number, item in enumerate(items):
        coarse = work.coarse.items.tolist()[item[FIT]]
        after = torch.arange(coarse[HISTORY], item[HISTORY], device=device)
        for head in range(2):
            chosen = found.slots[item[FIT], head, : coarse[LIST_LENGTH]]
            places = torch.cat([chosen.long(), after])
            assert len(places) == item[CANDIDATES]
            scores[number, head, places] = selection.scores[number, head, : len(places)]
    wanted = reference_select.select(scores, batch.block_table, work, page, TIERS_UNORDERED)
    assert lists.lengths.tolist() == wanted.lengths.tolist()
    for number, lengths in enumerate(wanted.lengths.tolist()):
        for head, count in enumerate(lengths):
            slots = lists.slots[number, head, :count].tolist()
            assert slots == wanted.slots[number, head, :count].tolist()
            if number % ESTIMATE_EVERY == 0:
                own = lists.samples[number // ESTIMATE_EVERY, head].tolist()
                assert own == wanted.samples[number // ESTIMATE_EVERY, head].tolist()
    assert (wanted.samples == NOT_LISTED).any()
    assert (wanted.samples < NOT_LISTED).any()


def test_the_reference_ranks_the_same(device):
    batch = batch_of(device)
    (work,) = works_of(batch)
    space, selection = ranked(batch, work)
    page = batch.kv_cache.shape[2]
    found = space.candidates.lists(work)
    select.select(batch.block_table, work, page, selection, TIERS_UNORDERED, found)
    lists = selection.lists(work)
    arguments = (batch.query, batch.kv_cache, batch.block_table, work)
    scores = reference.low_rank_scores(*arguments, scale=batch.scale)
    assert ((scores > float("-inf")).sum(2) == work.items[:, None, CANDIDATES]).all()
    wanted = reference_select.select(scores, batch.block_table, work, page, TIERS_UNORDERED)
    for number, lengths in enumerate(wanted.lengths.tolist()):
        for head, count in enumerate(lengths):
            got = set(lists.slots[number, head, : lists.lengths[number, head]].tolist())
            common = len(got & set(wanted.slots[number, head, :count].tolist()))
            assert common >= 0.9 * count - 2


def test_with_every_token_a_candidate_lists_are_those_without(device):
    batch = batch_of(device)
    (whole,) = works_of(batch, LIMITS._replace(least=None))
    # Candidates that are all of the history: what `coarse_item` makes of a share of 1.
    (work,) = works_of(batch)
    items = work.coarse.items.clone()
    items[:, LIST_LENGTH] = items[:, HISTORY]
    coarse = replace(work.coarse, items=items, max_list=int(items[:, HISTORY].max()))
    work = replace(whole, coarse=coarse)
    page = batch.kv_cache.shape[2]
    lists = []
    for one in (whole, work):
        space, selection = roomy(batch, one)
        found = space.candidates.lists(one)
        select.select(batch.block_table, one, page, selection, TIERS_UNORDERED, found)
        lists.append(selection.lists(one))
    assert torch.equal(lists[0].lengths, lists[1].lengths)
    for number, lengths in enumerate(lists[0].lengths.tolist()):
        for head, count in enumerate(lengths):
            one, other = (of.slots[number, head, :count].tolist() for of in lists)
            assert one == other
    assert torch.equal(lists[0].samples, lists[1].samples)


def roomy(batch, work):
    """As :func:`ranked`, with room for every token among the candidates."""
    made = candidates.most_candidates
    candidates.most_candidates = lambda history, least: history
    try:
        return ranked(batch, work)
    finally:
        candidates.most_candidates = made


def test_what_a_workspace_holds():
    space = low_rank.LowRankWorkspace(8, 2, 64, 131_072, 128, 64, DTYPE, torch.device("meta"))
    found = space.candidates
    assert found.rows.shape[2] == plan.COARSE_ROWS
    assert found.images.shape[2] == 65_536 + plan.FIT_QUERIES
