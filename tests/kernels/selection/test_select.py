import pytest
import torch

from cases import make_batch
from s2o_vllm.kernels.attention.summary_table import NO_SUMMARY, REGIONS, Summaries
from s2o_vllm.kernels.layout import DENSE_START, LIST_LENGTH
from s2o_vllm.kernels.selection import reference as selection_reference
from s2o_vllm.kernels.selection import select
from s2o_vllm.kernels.tuning import (
    CHUNK,
    COUNTED,
    ESTIMATE_EVERY,
    HEADS_SHARED,
    MEAN_OF_MAX,
    TIERS,
    TIERS_UNORDERED,
)
from s2o_vllm.kernels.work_list import list_capacity, longest_list


def select_with_kernel(
    batch, work, scores, chunk=64, tiers=TIERS, counted=COUNTED, shared=HEADS_SHARED, summaries=None
):
    space = select.SelectWorkspace(
        work.num_segments,
        scores.shape[1],
        work.max_history,
        work.num_segments * list_capacity(work.max_list),
        scores.device,
        chunk,
        12 if summaries is None else summaries.sizes.shape[2],
    )
    space.scores[:, :, : scores.shape[2]] = scores
    set_bounds(space, work, scores)
    for part in (space.slots, space.lengths, space.samples):
        part.fill_(-7)
    select.select(
        batch.block_table, work, batch.kv_cache.shape[2], space, tiers, counted, shared=shared,
        summaries=summaries,
    )  # fmt: skip
    return space.lists(work)


def set_bounds(space, work, scores):
    """What a ranking writes beside the scores."""
    space.bounds.fill_(float("nan"))
    for number, item in enumerate(work.segments.tolist()):
        for head in range(scores.shape[1] if item[DENSE_START] else 0):
            parts = scores[number, head, : item[DENSE_START]].float().split(space.chunk)
            for place, part in enumerate(parts):
                bound = space.bounds[number * scores.shape[1] + head, place]
                bound[0], bound[1] = part.max(), part.min()


def random_scores(work, kv_heads, device, kind):
    shape = (work.num_segments, kv_heads, work.max_history)
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
@pytest.mark.parametrize(("tiers", "counted"), [(TIERS, COUNTED), (TIERS_UNORDERED, 150)])
def test_lists_match_the_reference(device, kind, budget, page, tiers, counted):
    """All scores are counted, or one of three."""
    batch = make_batch(device, budget=budget, page=page, chunks=((400, 40), (0, 10), (129, 3)))
    for work in batch.work():
        scores = random_scores(work, 2, device, kind)
        got = select_with_kernel(batch, work, scores, tiers=tiers, counted=counted)
        wanted = selection_reference.select(
            scores, batch.block_table, work, page, tiers, counted, chunk=64
        )
        assert_same_lists(work, got, wanted)


def assert_same_lists(work, got, wanted):
    assert got.lengths.tolist() == wanted.lengths.tolist()
    for number, lengths in enumerate(wanted.lengths.tolist()):
        for head, count in enumerate(lengths):
            slots = got.slots[number, head]
            assert slots[:count].tolist() == wanted.slots[number, head, :count].tolist()
            assert (slots[count:] == -7).all(), "wrote beyond the list"
            if count and number % ESTIMATE_EVERY == 0:
                history = int(work.segments[number, DENSE_START])
                samples = len(selection_reference.sample_positions(history, "cpu"))
                one = got.samples[number // ESTIMATE_EVERY, head]
                other = wanted.samples[number // ESTIMATE_EVERY, head]
                assert one[:samples].tolist() == other[:samples].tolist()
                assert (one[samples:] == -7).all(), "wrote beyond the samples"


@pytest.mark.parametrize("shared", [1, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "equal"])
@pytest.mark.parametrize(("tiers", "counted"), [(TIERS, COUNTED), (TIERS_UNORDERED, 150)])
def test_as_many_lists_share_a_budget_as_are_asked_for(device, shared, kind, tiers, counted):
    """Five lists by threes or fours: the last share among fewer."""
    batch = make_batch(device, budget=0.3, chunks=((224, 20), (0, 10)), heads=5, kv_heads=5)
    for work in batch.work(shared=shared):
        scores = random_scores(work, 5, device, kind).float()
        scores += torch.tensor([0.0, 2, 1, 5, 0], device=device)[:, None]
        got = select_with_kernel(
            batch, work, scores.half(), tiers=tiers, counted=counted, shared=shared
        )
        wanted = selection_reference.select(
            scores.half(), batch.block_table, work, 16, tiers, counted, chunk=64, shared=shared
        )
        assert_same_lists(work, got, wanted)
        for lengths, item in zip(got.lengths.split(1), work.segments.tolist(), strict=True):
            assert int(lengths.max()) <= list_capacity(longest_list(item, shared))
            for group in lengths[0].split(shared):
                planned = len(group) * item[LIST_LENGTH]
                assert int(group.sum()) <= planned + 4 * planned**0.5


@pytest.mark.parametrize("shared", [3, 4])
def test_one_likely_list_may_take_what_all_that_share_can_spare(device, shared):
    batch = make_batch(device, budget=0.1, chunks=((704, 32),), heads=2 * shared)
    (work,) = batch.work(shared=shared)
    count = int(work.segments[0, LIST_LENGTH])
    scores = torch.randn(1, 2 * shared, 704, device=device)
    scores[0, 1] += 20
    lists = select_with_kernel(batch, work, scores.half(), 256, TIERS_UNORDERED, shared=shared)
    lengths = lists.lengths[0].tolist()
    most = shared * count - (shared - 1) * ((count + 1) // 2)
    assert most == work.max_list
    assert 0.9 * most <= lengths[1] <= 1.05 * most
    assert all(length <= 0.6 * count + 4 for length in (lengths[0], *lengths[2:shared]))
    assert 0.87 * shared * count <= sum(lengths[:shared]) <= 1.13 * shared * count
    others = lengths[shared:]
    assert 0.87 * shared * count <= sum(others) <= 1.13 * shared * count, "another has its own"
    assert max(others) < 1.5 * count


@pytest.mark.parametrize("target", [0.5, 0.02, 1e-6])
@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_a_target_error_ends_lists_where_the_reference_does(device, target, kind):
    batch = make_batch(device, budget=0.6, chunks=((400, 40),), kv_heads=4)
    batch.rows = [row._replace(target_error=target) for row in batch.rows]
    (work,) = batch.work()
    scores = random_scores(work, 4, device, kind).float() - 8
    scores += torch.linspace(0, 4, 4, device=device)[:, None]
    got = select_with_kernel(batch, work, scores.half()).lengths
    wanted = selection_reference.select(scores.half(), batch.block_table, work, 16).lengths
    assert (got - wanted).abs().max() <= 2, "rounding may need a token more"
    whole = torch.tensor([[item[LIST_LENGTH]] for item in work.segments.tolist()], device=device)
    assert (got.sum(1) < 0.75 * 4 * whole[:, 0]).all() == (target == 0.5)


def test_lists_of_likelier_tokens_are_longer(device):
    """Pairs of heads share the budget of a segment by probability, within bounds."""
    batch = make_batch(device, budget=0.2, chunks=((704, 32),), heads=5, kv_heads=5)
    (work,) = batch.work()
    count = int(work.segments[0, LIST_LENGTH])
    scores = torch.randn(1, 5, 704, device=device)
    scores[0, 0] += 0.3
    scores[0, 2] += 9
    one, other, most, least, alone = select_with_kernel(batch, work, scores.half()).lengths[0]
    assert count * 1.5 > one > other > count / 2
    most_of_two, least_of_two = 2 * count - (count + 1) // 2, (count + 1) // 2
    assert 0.93 * 2 * count <= one + other <= 1.07 * 2 * count
    assert 0.93 * most_of_two <= most <= 1.07 * most_of_two
    assert 0.9 * least_of_two <= least <= 1.1 * least_of_two
    assert 0.9 * count <= alone <= 1.1 * count, "an odd head keeps its budget"


def test_equal_heads_have_equal_lists(device):
    batch = make_batch(device, budget=0.2, chunks=((704, 32),))
    (work,) = batch.work()
    scores = torch.randn(1, 1, 704, device=device).half().expand(-1, 2, -1)
    one, other = select_with_kernel(batch, work, scores).lengths[0].tolist()
    assert one == other
    assert 0.9 < one / int(work.segments[0, LIST_LENGTH]) < 1.1


@pytest.mark.parametrize(("p", "share"), [(1.0, 1.0), (100.0, MEAN_OF_MAX)])
def test_a_target_error_leaves_out_what_it_allows(p, share):
    """Scores that add up to 1, as where all rows are alike, or to much more."""
    p = p * torch.randn(2, 3000).mul(2).softmax(-1).sort(descending=True).values
    for target in (0.1, 0.01):
        lengths = selection_reference.list_lengths(p.log2(), 2900, target).tolist()
        for row, count in zip(p, lengths, strict=True):
            assert 0 < count < 2900
            assert row[count:].sum() * share <= 1.1 * target
            assert row[int(0.9 * count) :].sum() * share > target


def test_a_target_error_takes_as_many_of_equal_tokens_as_it_needs():
    scores = torch.full((2, 1000), -9.96578)  # a thousandth each
    assert selection_reference.list_lengths(scores, 900, 0.3).tolist() == [700, 700]


def test_neither_the_first_nor_the_last_tokens_are_cut_off():
    """Of equal scores a sample is listed: what has no room lies before the last two chunks."""
    listed = sorted(positions(torch.zeros(1000), 700, chunk=10).tolist())
    taken = positions(torch.zeros(1000), 700, capacity=500, chunk=10).tolist()
    assert len(listed) == pytest.approx(700, abs=60)
    last = [token for token in listed if token >= 980]
    assert sorted(taken) == listed[: 500 - len(last)] + last


def test_a_sink_stays_listed_where_all_else_is_recent():
    """Scores inside a bucket are not spread evenly: more than planned may reach a threshold."""
    torch.manual_seed(0)
    for _ in range(20):
        scores = torch.randn(16_000) - 25
        scores[0] = -2.0
        scores[12_000:] += 9 * torch.linspace(0, 1, 4000) ** 2
        assert 0 in positions(scores.half().float(), 400, capacity=608).tolist()


@pytest.mark.parametrize("step", [1, 2, 4, 8])
def test_lists_of_a_text_that_repeats_itself(device, step):
    """The likely tokens come every 24 tokens, as in variable tracking: a stride of 8 misses all.

    A sample of few tokens is short of the count by more than this for one seed in some.
    """
    torch.manual_seed(0)
    batch = make_batch(device, budget=0.03, chunks=((12_000, 5),), heads=2, kv_heads=1)
    (work,) = batch.work()
    n = int(work.segments[0, DENSE_START])
    scores = torch.randn(1, 1, n, device=device) - 12
    scores[..., 5::24] += 16
    counted = -(-n // step)
    lists = select_with_kernel(batch, work, scores.half(), CHUNK, TIERS_UNORDERED, counted=counted)
    count = int(work.segments[0, LIST_LENGTH])
    length = int(lists.lengths[0, 0])
    slots = lists.slots[0, 0, :length].long()
    page = batch.kv_cache.shape[2]
    place = torch.full((int(batch.block_table.max()) + 1,), -1, device=device)
    place[batch.block_table[0, : n // page].long()] = torch.arange(n // page, device=device)
    listed = place[slots // page] * page + slots % page
    ordered = listed.sort().values  # the best are likely ones, and so is the sample of the rest
    assert (ordered % 24 == 5).float().mean() > 0.98, "unlikely tokens are listed"
    assert abs(length - count) < 4 * (count * step) ** 0.5


@pytest.mark.parametrize("kind", ["normal", "equal"])
@pytest.mark.parametrize("tiers", [TIERS, TIERS_UNORDERED])
def test_chunks_of_a_servers_size(device, kind, tiers):
    """Whole chunks of one tier: its count fills all the bits that a count has."""
    batch = make_batch(device, budget=0.97, chunks=((2 * CHUNK + 100, 3),))
    (work,) = batch.work()
    scores = random_scores(work, 2, device, kind)
    got = select_with_kernel(batch, work, scores, CHUNK, tiers)
    wanted = selection_reference.select(scores, batch.block_table, work, 16, tiers)
    assert_same_lists(work, got, wanted)


def test_page_table_is_the_only_indirection(device):
    """The same scores over another placement of the blocks select the same tokens."""
    batch = make_batch(device, chunks=((300, 20),))
    (work,) = batch.work()
    scores = random_scores(work, 2, device, "normal")
    moved = make_batch(device, chunks=((300, 20),))
    page = batch.kv_cache.shape[2]
    position = {}
    for name, one in (("a", batch), ("b", moved)):
        slots, lengths, *_ = select_with_kernel(one, work, scores)
        table = one.block_table[0].tolist()
        position[name] = [
            table.index(slot // page) * page + slot % page
            for slot in slots[0, 0, : lengths[0, 0]].tolist()
        ]
    assert not torch.equal(batch.block_table, moved.block_table)
    assert position["a"] == position["b"]


def positions(scores, length, tiers=TIERS, step=1, capacity=None, chunk=CHUNK):
    """What the reference lists."""
    return selection_reference.select_positions(
        scores, length, capacity or len(scores), tiers, step, chunk
    )


@pytest.mark.parametrize("step", [1, 4, 16])
@pytest.mark.parametrize("tiers", [TIERS, TIERS_UNORDERED])
def test_a_list_is_as_long_as_planned_on_average(step, tiers):
    torch.manual_seed(0)
    lengths = [len(positions(torch.randn(20000), 1000, tiers, step)) for _ in range(50)]
    assert sum(lengths) / 50 == pytest.approx(1000, rel=0.02)
    unsure = (1000 * step) ** 0.5
    assert max(abs(length - 1000) for length in lengths) < 5 * unsure
    assert max(lengths) <= 1250


def test_a_list_of_nearly_all_tokens_leaves_out_hardly_any():
    torch.manual_seed(0)
    for tiers in (TIERS, TIERS_UNORDERED):
        assert len(positions(torch.randn(1400), 1399, tiers)) >= 1390
        assert len(positions(torch.randn(1400), 1400, tiers)) == 1400


@pytest.mark.parametrize("tiers", [TIERS, TIERS_UNORDERED])
def test_selection_keeps_the_best(tiers):
    torch.manual_seed(0)
    scores = torch.randn(5000)
    taken = positions(scores, 500, tiers).tolist()
    assert 450 <= len(taken) == len(set(taken)) <= 550
    assert set(scores.topk(len(taken)).indices.tolist()) == set(taken), "all others are worse"


def summarised(device, tokens, head_count, start, rows=12, region=32):
    """Summaries of a history: random labels of clusters up to a start, then regions."""
    clusters = rows - REGIONS
    place = (torch.arange(tokens) - start) // region
    labels = torch.randint(0, clusters, (head_count, tokens))
    labels = torch.where(place < 0, labels, clusters + place)
    sizes = torch.stack([one.bincount(minlength=rows)[:rows] for one in labels])
    empty = torch.empty(0, device=device)
    labels[labels >= rows] = NO_SUMMARY
    return Summaries(
        empty, sizes[None].int().to(device), labels[None].to(device, torch.uint8),
        torch.tensor([start], dtype=torch.int32, device=device), empty, empty, clusters, region,
    )  # fmt: skip


@pytest.mark.parametrize("tiers", [TIERS, TIERS_UNORDERED])
@pytest.mark.parametrize(("budget", "start"), [(0.05, 128), (0.4, 256), (1.0, 0)])
def test_what_a_list_leaves_out_of_each_summary_is_counted(device, tiers, budget, start):
    batch = make_batch(device, budget=budget, chunks=((400, 40),))
    (work,) = batch.work()
    own = summarised(device, 440, 2, start)
    scores = random_scores(work, 2, device, "normal")
    got = select_with_kernel(batch, work, scores, tiers=tiers, summaries=own)
    wanted = selection_reference.select(
        scores, batch.block_table, work, 16, tiers, chunk=64, summaries=own
    )
    assert_same_lists(work, got, wanted)
    torch.testing.assert_close(got.left, wanted.left)
    page, table = 16, batch.block_table[0].tolist()
    for number, item in enumerate(work.segments.tolist()):
        n = item[DENSE_START]
        for head in range(2):
            count = int(got.lengths[number, head])
            listed = {
                table.index(slot // page) * page + slot % page
                for slot in got.slots[number, head, :count].tolist()
            }
            labels = own.labels[0, head, :n].tolist()
            left = [0] * 12
            for position in set(range(n)) - listed:
                whole = position < start or (labels[position] - 3) * 32 + start <= n
                if labels[position] != NO_SUMMARY and whole:
                    left[labels[position]] += 1
            assert got.left[number, head].exp2().round().tolist() == left


def test_without_summaries_nothing_is_counted(device):
    batch = make_batch(device, budget=0.2, chunks=((400, 40),))
    (work,) = batch.work()
    scores = random_scores(work, 2, device, "normal")
    assert selection_reference.select(scores, batch.block_table, work, 16).left is None


def test_order_is_by_tier_and_by_address_inside_one():
    scores = torch.tensor([0.0, 9.0, 1.0, 10.0, 2.0, 8.0, 3.0, 9.5] + [-9.0] * 24)
    taken = positions(scores, 8).tolist()
    assert set(taken) >= {1, 3, 5, 7}
    assert taken[:2] == [3, 7], "the best come first"
    assert taken[2:4] == [1, 5], "then the second tier"


def test_lists_are_nearly_full_and_without_repeats(device):
    batch = make_batch(device, budget=0.3, chunks=((400, 64),))
    (work,) = batch.work()
    slots, lengths, *_ = select_with_kernel(
        batch, work, random_scores(work, 2, device, "few values")
    )
    for number, of_item in enumerate(lengths.tolist()):
        # Of equal scores all are taken or none.
        assert sum(of_item) > 0.4 * 2 * int(work.segments[number, LIST_LENGTH])
        for head, count in enumerate(of_item):
            chosen = slots[number, head, :count].tolist()
            assert len(set(chosen)) == count
