"""Retrieval heads: which they are, and that ranking them again is what the reference says."""

import pytest
import torch

from cases import CACHES, DTYPE, ON_GPU, make_batch
from s2o_vllm.kernels.layout import DENSE_START
from s2o_vllm.kernels.ranking import find_heads, low_rank, reference, retrieval
from s2o_vllm.kernels.ranking.score import STORED

SHAPES = [(4, 2), (3, 1), (2, 2), (6, 1)]  # heads, KV heads
SEEKERS = {(4, 2): [1], (3, 1): [2], (2, 2): [0], (6, 1): [0, 2, 4]}


@pytest.fixture(autouse=True)
def far_is_near(monkeypatch):
    """Histories of tests are short."""
    monkeypatch.setattr(retrieval, "RECENT", 16)
    monkeypatch.setattr(retrieval, "SINK", 8)


def seeking_batch(device, heads, kv_heads, history=400, queries=96):
    """Each query of some heads wants one key of its own."""
    batch = make_batch(
        device, chunks=((history, queries),), heads=heads, kv_heads=kv_heads, dtype=DTYPE
    )
    page = batch.kv_cache.shape[2]
    batch.query *= 0.3
    for head in SEEKERS[heads, kv_heads]:
        for number in range(queries):
            place = 20 + (number * 7 + head) % (history - 60)
            block = batch.block_table[0, place // page].long()
            key = batch.kv_cache[block, head * kv_heads // heads, place % page, :64].float()
            wanted = 14 * key / (key.square().sum() * batch.scale)
            batch.query[number, head] = wanted.to(DTYPE)
    return batch


def workspace(batch, work, segment=32):
    heads, head_dim = batch.query.shape[1:]
    sizes = (heads, heads, head_dim, work.max_seen, work.num_segments, segment)
    space = low_rank.LowRankWorkspace(*sizes, batch.query.dtype, batch.query.device)
    space.retrieval = low_rank.RetrievalWorkspace(space, batch.kv_cache.shape[1], segment)
    for one in (space, space.retrieval.ranking):
        for part in (one.projected_keys, one.projected_probes):
            part.view(torch.uint8 if ON_GPU else torch.int16).fill_(0x3C)  # of an earlier list
    return space


def ranked(batch, work, space, chunk=128):
    kv_heads = batch.kv_cache.shape[1]
    room = work.max_history + STORED.value
    scores = torch.full((work.num_segments, kv_heads, room), float("nan")).half()
    chunks = -(-work.max_history // chunk)
    bounds = torch.full((work.num_segments * kv_heads, chunks, 2), float("nan"))
    scores, bounds = scores.to(batch.query.device), bounds.to(batch.query.device)
    low_rank.low_rank_scores(
        batch.query, batch.kv_cache, batch.block_table, work, scores, bounds, space,
        scale=batch.scale, chunk=chunk,
    )  # fmt: skip
    return scores, bounds


def found(space):
    return sorted(n for n in space.retrieval.heads.tolist() if n >= 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_whose_queries_want_keys_of_their_own_are_found(device, shape):
    batch = seeking_batch(device, *shape)
    (work,) = batch.work(segment=32)
    space = workspace(batch, work)
    ranked(batch, work, space)
    assert found(space) == SEEKERS[shape]
    assert (space.retrieval.far_mass == 0).all(), "the next chunk counts anew"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_are_those_of_the_reference(device, shape):
    batch = seeking_batch(device, *shape)
    (work,) = batch.work(segment=32)
    space = workspace(batch, work)
    scores, bounds = ranked(batch, work, space)
    arguments = (batch.query, batch.kv_cache, batch.block_table, work)
    serving = reference.LowRank()
    wanted = serving(*arguments, scale=batch.scale)
    assert serving.heads.tolist() == SEEKERS[shape]
    once = reference.low_rank_scores(*arguments, scale=batch.scale, probe_rows=space.probe_rows)
    gained = 0.0
    for number, segment in enumerate(work.segments.tolist()):
        n = segment[DENSE_START]
        got = scores[number, :, :n].float()
        # e4m3 may round either way on the card, and rows of equal distance may change places.
        atol = 1.0 if ON_GPU else 0.1
        torch.testing.assert_close(got, wanted[number, :, :n].float(), atol=atol, rtol=0)
        assert torch.isnan(scores[number, :, n + STORED.value - 1 :]).all()
        gained = max(gained, float((got - once[number, :, :n].float()).max()))
        for head in range(got.shape[0]):
            for place, part in enumerate(got[head].split(128)):
                own = bounds[number * got.shape[0] + head, place]
                assert own.tolist() == [float(part.max()), float(part.min())]
    assert gained > 2, "29 directions and a quarter of the queries miss keys"


def test_without_retrieval_heads_scores_are_those_of_all_heads(device, monkeypatch):
    monkeypatch.setattr(retrieval, "FAR_MASS", 1e3)
    batch = seeking_batch(device, 4, 2)
    (work,) = batch.work(segment=32)
    space = workspace(batch, work)
    scores, bounds = ranked(batch, work, space)
    assert found(space) == []
    space.retrieval = None
    for one, other in zip((scores, bounds), ranked(batch, work, space), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_a_later_list_of_a_chunk_ranks_the_heads_that_the_first_one_found(device):
    batch = seeking_batch(device, 4, 2)
    whole, *_ = batch.work(segment=32)
    space = workspace(batch, whole)
    scores, _ = ranked(batch, whole, space)
    lists = batch.work(segment=32, segments=2)
    assert len(lists) == -(-whole.num_segments // 2)
    assert len(lists) > 1
    space = workspace(batch, lists[0])
    parts = [ranked(batch, work, space)[0] for work in lists]
    assert found(space) == SEEKERS[4, 2]
    for number, segment in enumerate(whole.segments.tolist()):
        part = parts[number // 2][number % 2, :, : segment[DENSE_START]]
        torch.testing.assert_close(
            part, scores[number, :, : segment[DENSE_START]], atol=0 if ON_GPU else 2e-3, rtol=0
        )


@pytest.mark.parametrize("share", [1, 2, 3, 8])
def test_half_of_a_groups_heads_are_picked_at_most(device, share):
    """Those of the largest far mass; of equal ones the first."""
    kv_heads, capacity = 2, retrieval.capacity(share)
    generator = torch.Generator().manual_seed(share)
    far_mass = torch.randint(0, 4, (kv_heads, share), generator=generator)
    heads = torch.full((kv_heads * capacity,), 77, dtype=torch.int32, device=device)
    on_device = far_mass.flatten().int().to(device)
    find_heads.pick(on_device, heads, kv_heads, 2)
    assert (on_device == 0).all()
    for head in range(kv_heads):
        order = sorted(range(share), key=lambda number: (-far_mass[head, number], number))
        wanted = [head * share + n for n in order[:capacity] if far_mass[head, n] >= 2]
        got = heads.tolist()[head * capacity : (head + 1) * capacity]
        assert got == wanted + [-1] * (capacity - len(wanted))


def test_keys_that_are_near_or_first_or_unlikely_do_not_count():
    histories = torch.full((retrieval.SEGMENTS,), 200)
    scores = torch.full((retrieval.SEGMENTS, 2, 220), -20.0)
    scores[:, :, 3:5] = 0  # sink
    scores[:, :, 190:195] = 0  # recent
    scores[:, :, 210:] = 0  # not history
    scores[:, :, 100] = 0  # in a block that does not count
    assert not retrieval.retrieval_heads(scores, histories, 2).any()
    scores[:, 1, 50] = 0  # counts twice
    assert retrieval.retrieval_heads(scores, histories, 2).tolist() == [False, True]
    scores[0, 1, 50] = -1
    assert not retrieval.retrieval_heads(scores, histories, 2).any(), "in the mean of segments"
    scores[:, 1, 50] = -20
    scores[:, 1, 10:60] = -8  # 50 of 1/256
    assert not retrieval.retrieval_heads(scores, histories, 2).any()


@pytest.mark.parametrize("fp8", CACHES)
@pytest.mark.parametrize(("head_dim", "page"), [(64, 16), (96, 48), (128, 32)])
def test_the_far_mass_is_that_of_the_reference(device, monkeypatch, head_dim, page, fp8):
    """To a few parts in a thousand, above the threshold and below."""
    heads, kv_heads = 4, 2
    batch = make_batch(
        device, chunks=((5000, 96),), heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page,
        dtype=DTYPE, fp8=fp8,
    )  # fmt: skip
    batch.query[:, 1] *= 2  # more of its keys count
    (work,) = batch.work(segment=32)
    space = workspace(batch, work)
    copied = torch.zeros(heads, dtype=torch.int32, device=device)
    monkeypatch.setattr(find_heads, "pick", lambda far_mass, *_: copied.copy_(far_mass))
    ranked(batch, work, space, chunk=4096)
    sampled = retrieval.sampled_segments(work.num_segments)
    arguments = (batch.query, batch.kv_cache, batch.block_table, work)
    keys = reference.fit_and_project(*arguments, scale=batch.scale)
    scores = reference.exact_probe_scores(*arguments, keys, sampled, scale=batch.scale)
    sums = []
    monkeypatch.setattr(retrieval, "UNIT", retrieval.UNIT)
    for least in torch.linspace(0.01, 4, 400).tolist():
        monkeypatch.setattr(retrieval, "FAR_MASS", least)
        monkeypatch.setattr(retrieval, "capacity", lambda share: share)
        histories = work.segments[sampled, DENSE_START]
        sums.append(retrieval.retrieval_heads(scores, histories, kv_heads))
    wanted = torch.stack(sums).sum(0) * 0.01  # the last threshold that each head reaches
    got = copied.float() / (retrieval.UNIT * retrieval.SEGMENTS)
    assert (got > 0.05).any(), "some head has far mass"
    torch.testing.assert_close(got.clamp(max=4), wanted.to(got), atol=0.1, rtol=0.1)
