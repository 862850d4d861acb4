import pytest
import torch

from cases import make_batch
from s2o_vllm.kernels import reference, select
from s2o_vllm.kernels.plan import (
    BUCKETS,
    CHUNK,
    DENSE_START,
    LIST_LENGTH,
    TIERS,
    TIERS_UNORDERED,
    list_places,
)


def select_with_kernel(batch, work, scores, chunk=64, tiers=TIERS):
    space = select.SelectWorkspace(
        work.num_items,
        scores.shape[1],
        work.max_history,
        work.num_items * list_places(work.max_list),
        scores.device,
        chunk,
    )
    space.scores[:, :, : scores.shape[2]] = scores
    set_bounds(space, work, scores)
    space.slots.fill_(-7)
    select.select(batch.block_table, work, batch.kv_cache.shape[2], space, tiers)
    return space.lists(work)


def set_bounds(space, work, scores):
    """What a ranking writes beside the scores."""
    space.bounds.fill_(float("nan"))
    for number, item in enumerate(work.items.tolist()):
        for head in range(scores.shape[1] if item[DENSE_START] else 0):
            parts = scores[number, head, : item[DENSE_START]].float().split(space.chunk)
            for place, part in enumerate(parts):
                bound = space.bounds[number * scores.shape[1] + head, place]
                bound[0], bound[1] = part.max(), part.min()


def random_scores(work, kv_heads, device, kind):
    shape = (work.num_items, kv_heads, work.max_history)
    if kind == "equal":
        return torch.full(shape, -3.0, device=device).half()
    scores = torch.randn(shape, device=device)
    if kind == "peaked":
        scores[..., ::17] += 30
    if kind == "few values":
        scores = scores.round()
    return scores.half()


@pytest.mark.parametrize("kind", ["normal", "peaked", "few values", "equal"])
@pytest.mark.parametrize(("budget", "page"), [(0.05, 16), (0.4, 48), (0.99, 128)])
@pytest.mark.parametrize("tiers", [TIERS, TIERS_UNORDERED])
def test_lists_match_the_reference(device, kind, budget, page, tiers):
    batch = make_batch(device, budget=budget, page=page, chunks=((400, 40), (0, 10), (129, 3)))
    for work in batch.work():
        scores = random_scores(work, 2, device, kind)
        slots = select_with_kernel(batch, work, scores, tiers=tiers)
        wanted = reference.select(scores, batch.block_table, work, page, tiers)
        for number, item in enumerate(work.items.tolist()):
            count = item[LIST_LENGTH]
            torch.testing.assert_close(slots[number, :, :count], wanted[number, :, :count])
            assert (slots[number, :, count:] == -7).all(), "wrote beyond the list"


@pytest.mark.parametrize("kind", ["normal", "equal"])
@pytest.mark.parametrize("tiers", [TIERS, TIERS_UNORDERED])
def test_chunks_of_a_servers_size(device, kind, tiers):
    """Whole chunks of one tier: its count fills all the bits that a count has."""
    batch = make_batch(device, budget=0.97, chunks=((2 * CHUNK + 100, 3),))
    (work,) = batch.work()
    scores = random_scores(work, 2, device, kind)
    slots = select_with_kernel(batch, work, scores, CHUNK, tiers)
    wanted = reference.select(scores, batch.block_table, work, 16, tiers)
    torch.testing.assert_close(slots[..., : work.max_list], wanted)


def test_page_table_is_the_only_indirection(device):
    """The same scores over another placement of the blocks select the same tokens."""
    batch = make_batch(device, chunks=((300, 20),))
    (work,) = batch.work()
    scores = random_scores(work, 2, device, "normal")
    moved = make_batch(device, chunks=((300, 20),))
    page = batch.kv_cache.shape[2]
    position = {}
    for name, one in (("a", batch), ("b", moved)):
        slots = select_with_kernel(one, work, scores)
        table = one.block_table[0].tolist()
        count = work.items[0, LIST_LENGTH]
        position[name] = [
            table.index(slot // page) * page + slot % page for slot in slots[0, 0, :count].tolist()
        ]
    assert not torch.equal(batch.block_table, moved.block_table)
    assert position["a"] == position["b"]


def test_selection_keeps_the_best_up_to_one_bucket():
    scores = torch.randn(5000)
    taken = reference.select_positions(scores, 500)
    assert len(set(taken.tolist())) == 500
    width = float(scores.max() - scores.min()) / BUCKETS
    left = torch.ones(5000, dtype=torch.bool)
    left[taken] = False
    assert scores[taken].min() >= scores[left].max() - width


def test_order_is_by_tier_and_by_address_inside_one():
    scores = torch.tensor([0.0, 9.0, 1.0, 10.0, 2.0, 8.0, 3.0, 9.5])
    taken = reference.select_positions(scores, 4).tolist()
    assert set(taken) == {1, 3, 5, 7}
    assert taken[0] == 3, "the best comes first"
    assert taken[-1] == 5, "the bucket that fills the list comes last"


def test_every_list_is_full_and_without_repeats(device):
    batch = make_batch(device, budget=0.3, chunks=((400, 64),))
    (work,) = batch.work()
    slots = select_with_kernel(batch, work, random_scores(work, 2, device, "few values"))
    for number, item in enumerate(work.items.tolist()):
        assert item[DENSE_START] > 0
        for head in range(2):
            chosen = slots[number, head, : item[LIST_LENGTH]].tolist()
            assert len(set(chosen)) == item[LIST_LENGTH]
