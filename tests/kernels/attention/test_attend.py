from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from cases import (
    CACHES,
    CHUNKS,
    CLUSTERS,
    DTYPES,
    LARGE_CARD,
    ON_GPU,
    TOLERANCE,
    dense_attention,
    full_lists,
    make_batch,
    nan_like,
    relative_error,
    to_fp8,
    tokens_of,
)
from s2o_vllm.kernels import paging
from s2o_vllm.kernels.attention import attend
from s2o_vllm.kernels.attention import reference as attention_reference
from s2o_vllm.kernels.attention.tile_ops import cast
from s2o_vllm.kernels.layout import (
    DENSE_START,
    DROPPED,
    DROPPED_UNIT,
    ELIGIBLE,
    HISTORY,
    LIST_LENGTH,
    NUM_COUNTERS,
    NUM_QUERIES,
    QUERY_START,
    SAMPLED,
    STOPPED,
    TILES,
    VISITED,
)
from s2o_vllm.kernels.selection import reference as selection_reference
from s2o_vllm.kernels.tiles import attend_tile
from s2o_vllm.kernels.tuning import ESTIMATE_TOKENS

GQA_AND_SIZES = [
    # heads, kv_heads, head_dim, page, head_major
    (4, 2, 64, 16, True),
    (7, 1, 96, 32, False),
    (3, 3, 128, 128, True),
    (12, 2, 128, 48, False),
    (2, 1, 256, 64, True),
    pytest.param(2, 1, 512, 16, False, marks=LARGE_CARD),
]


def stop_step(batch):
    """The kernel tests its early stop after two whole tiles at the least."""
    return 2 * attend_tile(batch.query.shape[2], batch.query.device).block_n


REGION, SPAN = 32, 32  # tokens; queries, so that a history has clusters
LONG = 8 if ON_GPU else 1  # histories of many steps, whatever a tile's size


def run(batch, lists, function=attend.attend, **options):
    """Attend to every request; ``lists`` pairs each work list with its lists."""
    out = nan_like(batch.query)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=out.device)
    tile = attend_tile(batch.query.shape[2], out.device)
    if function is attention_reference.attend:
        group = batch.query.shape[1] // batch.kv_cache.shape[1]
        options["queries_per_tile"] = tile.block_m // group
    else:
        options["tile"] = tile
    for work, own in lists:
        function(
            batch.query, batch.kv_cache, batch.block_table, work, own,
            attention_reference.summarise(
                batch.kv_cache, batch.block_table, work, batch.query.dtype, CLUSTERS, REGION
            ),
            out, counters, scale=batch.scale, v_scale=batch.v_scale, sinks=batch.sinks,
            **options,
        )  # fmt: skip
    return out, counters


def summarised_lists(batch, uneven=False):
    return full_lists(batch, uneven=uneven, summaries=True, span=SPAN)


def assert_same_counters(counters, wanted):
    """Equal, but for the dropped mass: it is a sum of rounded sums."""
    exact = [place for place in range(NUM_COUNTERS) if place != DROPPED]
    assert counters[exact].tolist() == wanted[exact].tolist()
    near = TOLERANCE * int(wanted[SAMPLED]) / DROPPED_UNIT
    assert abs(int(counters[DROPPED] - wanted[DROPPED])) <= int(wanted[TILES]) + near


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page", "head_major"), GQA_AND_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", CACHES)
def test_full_list_is_dense_attention(
    device, heads, kv_heads, head_dim, page, head_major, dtype, fp8
):
    """Promise 3: error against fp64 at most twice that of PyTorch in the same dtype."""
    batch = make_batch(
        device, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page,
        head_major=head_major, dtype=dtype, budget=1.0, fp8=fp8,
    )  # fmt: skip
    truth = dense_attention(batch)
    same_dtype = relative_error(dense_attention(batch, dtype), truth)
    out, counters = run(batch, summarised_lists(batch))
    assert relative_error(out, truth) <= 2 * max(same_dtype, 1e-7)
    assert counters[VISITED] == counters[ELIGIBLE], "a full list visits all that is eligible"
    assert counters[DROPPED] == 0, "nothing is left out"


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page", "head_major"), GQA_AND_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_list_with_sinks_is_dense_attention(
    device, heads, kv_heads, head_dim, page, head_major, dtype
):
    batch = make_batch(
        device, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page,
        head_major=head_major, dtype=dtype, budget=1.0, sinks=True,
    )  # fmt: skip
    truth = dense_attention(batch)
    same_dtype = relative_error(dense_attention(batch, dtype), truth)
    out, _ = run(batch, summarised_lists(batch))
    assert relative_error(out, truth) <= 2 * max(same_dtype, 1e-7)
    assert relative_error(dense_attention(replace(batch, sinks=None)), truth) > 0.1


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page", "head_major"), GQA_AND_SIZES)
@pytest.mark.parametrize("fp8", CACHES[1:])
def test_queries_in_fp8_are_multiplied_as_they_are(
    device, heads, kv_heads, head_dim, page, head_major, fp8
):
    batch = make_batch(
        device, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page=page,
        head_major=head_major, budget=1.0, fp8=fp8,
    )  # fmt: skip
    quantised = to_fp8(batch.query, 0.25)
    batch.query = quantised.to(batch.query.dtype)
    batch.softmax_scale *= 0.25
    given = {"query_e4m3": quantised} if ON_GPU else {}  # no such products in the interpreter
    truth = dense_attention(batch)
    same_dtype = relative_error(dense_attention(batch, batch.query.dtype), truth)
    out, _ = run(batch, summarised_lists(batch), **given)
    assert relative_error(out, truth) <= 2 * max(same_dtype, 1e-7)


@triton.jit
def _numbers_kernel(p_x, p_out):
    o = tl.arange(0, 256)
    tl.store(p_out + o, cast(tl.load(p_x + o), p_out.dtype.element_ty))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_e4m3_is_itself(device, dtype):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    out = torch.full((256,), float("nan"), dtype=dtype, device=device)
    _numbers_kernel[(1,)](codes, out)
    number = ~torch.isnan(codes.float())
    assert number.sum() == 254
    assert torch.equal(out[number].float(), codes[number].float())
    assert torch.equal(torch.signbit(out[number]), torch.signbit(codes[number].float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stop_threshold", [0.0, 1e-30])
def test_a_score_far_above_all_before_it(device, dtype, stop_threshold):
    """400 nats above the scores that a list's maximum is taken from: its value is the answer."""
    batch = make_batch(device, chunks=((384, 20),), heads=2, kv_heads=1, dtype=dtype, budget=1.0)
    batch.query.fill_(1.0)
    key, page, place = 123, batch.kv_cache.shape[2], stop_step(batch) + 3
    token = batch.kv_cache[int(batch.block_table[0, key // page]), 0, key % page]
    token[: batch.query.shape[2]] = 400 / (batch.softmax_scale * batch.query.shape[2])
    ((work, own),) = lists = full_lists(batch)
    slots = own.slots[0, 0]
    slot = int(batch.block_table[0, key // page]) * page + key % page
    slots[slots == slot] = slots[place].clone()
    slots[place] = slot
    assert work.num_segments == 1
    out, _ = run(batch, lists, stop_threshold=stop_threshold)
    wanted = token[batch.query.shape[2] :].expand_as(out)
    torch.testing.assert_close(out.float(), wanted.float(), rtol=1e-2, atol=1e-2)


# Relative room that a threshold needs on both sides. Gains are made of fp32 sums on every
# device and differ by some 1e-5; a wider margin than this refuses nearly every batch.
STOP_MARGIN = 1e-3


def stopping_case(device, stop_threshold, softcap=0.0, summaries=False, **shape):
    """A batch whose tiles stop where the reference says, whatever is rounded.

    The higher the threshold, the earlier every tile stops: if as much is visited a little
    under it as over it, every tile does the same at all thresholds between.
    """
    for _ in range(20):
        batch = make_batch(device, spread=3.0, **shape)
        lists = summarised_lists(batch, uneven=True) if summaries else full_lists(batch)
        options = {"stop_step": stop_step(batch), "softcap": softcap}
        (_, under), (wanted, over) = (
            run(
                batch,
                lists,
                attention_reference.attend,
                stop_threshold=near * stop_threshold,
                **options,
            )
            for near in (1 - STOP_MARGIN, 1 + STOP_MARGIN)
        )
        if torch.equal(under, over) and (not stop_threshold or over[STOPPED] > 0):
            return batch, lists, options, wanted, over
    pytest.fail("every case stopped where rounding decides, or none did")


@pytest.mark.parametrize("stop_threshold", [0.0, 0.5])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("fp8", CACHES)
@pytest.mark.parametrize("sinks", [False, True])
def test_matches_the_reference(device, stop_threshold, softcap, fp8, sinks):
    chunks = ((400 * LONG, 40), (0, 10), (129 * LONG, 3))
    case = stopping_case(
        device, stop_threshold, softcap, summaries=True, chunks=chunks,
        fp8=fp8, sinks=sinks,
    )  # fmt: skip
    batch, lists, options, wanted, wanted_counters = case
    out, counters = run(batch, lists, stop_threshold=stop_threshold, **options)
    assert relative_error(out, wanted) < TOLERANCE
    assert_same_counters(counters, wanted_counters)
    if stop_threshold:
        assert counters[STOPPED] > 0, "the case must exercise early stop"


@pytest.mark.parametrize("fp8", CACHES)
def test_softcap_is_that_of_dense_attention(device, fp8):
    batch = make_batch(device, budget=1.0, spread=4.0, fp8=fp8)
    out, _ = run(batch, full_lists(batch), softcap=3.0)
    assert relative_error(out, dense_attention(batch, softcap=3.0)) < TOLERANCE
    assert relative_error(out, dense_attention(batch)) > 1e-2


def test_order_of_visiting_does_not_change_the_result(device):
    batch = make_batch(device, budget=0.5)
    lists = full_lists(batch)
    one, _ = run(batch, lists)
    shuffled = [(work, own._replace(slots=own.slots.clone())) for work, own in lists]
    for work, (slots, *_) in shuffled:
        for number, item in enumerate(work.segments.tolist()):
            count = item[LIST_LENGTH]
            order = torch.randperm(count, device=device)
            slots[number, :, :count] = slots[number, :, order]
    assert not torch.equal(lists[0][1].slots, shuffled[0][1].slots)
    assert relative_error(one, run(batch, shuffled)[0]) < TOLERANCE


def test_early_stop_never_drops_a_tile_that_still_gains(device):
    """Whatever is left out after a stop, the last step visited gained less than the threshold.

    Recomputed from the scores alone, for every tile and row.
    """
    threshold = 0.2
    batch, lists, options, _, _ = stopping_case(
        device, threshold, chunks=((500 * LONG, 16),), heads=2, kv_heads=1, budget=1.0
    )
    step = options["stop_step"]
    ((work, (slots, *_)),) = lists
    out, counters = run(batch, lists, stop_threshold=threshold, **options)
    assert counters[STOPPED] > 0
    head_dim, page = batch.query.shape[2], batch.kv_cache.shape[2]
    queries_per_tile = attend_tile(head_dim, device).block_m // 2
    start = 0
    for item in sorted(work.segments.tolist(), key=lambda item: item[1]):
        number = work.segments.tolist().index(item)
        listed = slots[number, 0, : item[LIST_LENGTH]].long()
        for first in range(0, item[2], queries_per_tile):
            count = min(queries_per_tile, item[2] - first)
            rows = batch.query[start + first : start + first + count].double()
            keys = batch.kv_cache[listed // page, 0, listed % page].double()
            position = torch.arange(item[3], item[3] + item[2], device=device)
            blocks = batch.block_table[item[0]][position // page].long()
            own = batch.kv_cache[blocks, 0, position % page].double()
            k = torch.cat([own, keys])[:, :head_dim]
            v = torch.cat([own, keys])[:, head_dim:]
            scores = torch.einsum("qhd,nd->qhn", rows, k) * batch.scale
            future = torch.arange(item[2], device=device) > torch.arange(
                first, first + count, device=device
            ).unsqueeze(1)
            scores[:, :, : item[2]].masked_fill_(future[:, None], float("-inf"))
            p = scores.exp()
            visited = 0
            while visited + step <= len(listed):
                visited += step
                total = p[..., : item[2] + visited].sum(-1)
                gain = p[..., item[2] + visited - step : item[2] + visited].sum(-1) / total
                if gain.max() < threshold:
                    break
            else:
                visited = len(listed)
            p = p[..., : item[2] + visited]
            wanted = torch.einsum("qhn,nd->qhd", p / p.sum(-1, keepdim=True), v[: p.shape[-1]])
            assert relative_error(out[start + first : start + first + count], wanted) < TOLERANCE
        start += item[2]


def test_rows_outside_the_work_list_are_not_written(device):
    batch = make_batch(device, budget=1.0)
    truth = dense_attention(batch)
    batch.rows = batch.rows[1:]
    out, _ = run(batch, full_lists(batch))
    first = CHUNKS[0][1]
    assert torch.isnan(out[:first]).all()
    assert relative_error(out[first:], truth[first:]) < TOLERANCE


def test_empty_list_attends_to_the_own_segment(device):
    batch = make_batch(device, budget=1e-9)
    assert all(work.max_list == 0 for work in batch.work())
    out, counters = run(batch, full_lists(batch))
    assert counters[VISITED] == 0
    for row, work in zip(batch.rows, batch.work(), strict=True):
        keys, values = (part.double().repeat_interleave(2, 0) for part in tokens_of(batch, row))
        for line in work.segments.tolist():
            start, count, first = line[QUERY_START], line[NUM_QUERIES], line[DENSE_START]
            seen = slice(first, line[HISTORY] + count)
            queries = batch.query[start : start + count].double().transpose(0, 1)
            scores = queries @ keys[:, seen].mT * batch.softmax_scale
            own = line[HISTORY] - first + torch.arange(count, device=device)[:, None]
            future = torch.arange(scores.shape[2], device=device) > own
            wanted = scores.masked_fill(future, float("-inf")).softmax(-1) @ values[:, seen]
            assert relative_error(out[start : start + count].transpose(0, 1), wanted) < TOLERANCE


def test_unknown_head_dim_is_refused(device):
    with pytest.raises(ValueError, match="head_dim is 80, must be one of"):
        attend_tile(80, device)


@pytest.mark.parametrize("stop_threshold", [0.0, 1 - 1e-6])  # which ends every tile at once
@pytest.mark.parametrize("budget", [1e-9, 0.9])  # none, or more than a step of any tile
@pytest.mark.parametrize("fp8", CACHES)
def test_the_dropped_mass_is_that_of_what_was_not_visited(
    device, monkeypatch, budget, stop_threshold, fp8
):
    """A history that the sample holds whole: the estimate is the truth, early stop included."""
    for module in (attend, selection_reference):
        monkeypatch.setattr(module, "ESTIMATE_STEP", 1)
    batch = make_batch(
        device, chunks=((ESTIMATE_TOKENS, 20),), head_dim=128, budget=budget, spread=2.0, fp8=fp8
    )  # of a head_dim whose tiles are so short that a list has two
    ((work, own),) = lists = full_lists(batch)
    assert work.num_segments == 1
    options = {"stop_threshold": stop_threshold, "stop_step": stop_step(batch)}
    _, counters = run(batch, lists, **options)
    _, visited = run(batch, lists, attention_reference.attend, **options)
    assert counters[:DROPPED].tolist() == visited[:DROPPED].tolist()
    count = int(own.lengths.max())
    if stop_threshold and count:
        assert counters[STOPPED] == counters[TILES]
        count = stop_step(batch)
    keys, _ = tokens_of(batch, batch.rows[0])
    queries = batch.query.double().unflatten(1, (2, 2))
    scores = torch.einsum("qhgd,hnd->qhgn", queries, keys.double()) * batch.softmax_scale
    future = torch.arange(276, device=device) > 256 + torch.arange(20, device=device)[:, None]
    p = scores.masked_fill(future[:, None, None], float("-inf")).softmax(-1)
    position = {int(slot): place for place, slot in enumerate(all_slots(batch, 256))}
    dropped = 0.0
    for head in range(2):
        left = torch.ones(256, dtype=torch.bool, device=device)
        left[[position[slot] for slot in own.slots[0, head, :count].tolist()]] = False
        dropped += float(p[:, head, :, :256][..., left].sum())
    assert counters[SAMPLED] == 20 * 4
    estimate = int(counters[DROPPED]) * DROPPED_UNIT
    assert estimate == pytest.approx(dropped, rel=20 * TOLERANCE, abs=1e-4)


def all_slots(batch, count):
    """The slots of the first tokens of the first request."""
    positions = torch.arange(count, device=batch.query.device)
    return paging.physical_slots(positions, batch.block_table[0], batch.kv_cache.shape[2])
