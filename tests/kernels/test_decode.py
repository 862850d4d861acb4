"""Sparse decode: what a prompt's end leaves, what steps add to it, and what they attend to."""

import itertools

import pytest
import torch

from cases import (
    CACHES,
    CLUSTERS,
    DTYPES,
    FP8_CARD,
    LARGE_CARD,
    ON_GPU,
    SUMMARIES,
    TOLERANCE,
    dense_attention,
    far_away,
    make_batch,
    nan_like,
    relative_error,
)
from s2o_vllm.kernels import decode_reference, decode_step, paging
from s2o_vllm.kernels.attention import reference as attention_reference
from s2o_vllm.kernels.attention import summaries
from s2o_vllm.kernels.decode import SparseDecode
from s2o_vllm.kernels.decode_state import (
    DecodeRow,
    DecodeShape,
    DecodeTable,
    choose_snapshot,
    decode_line,
    store_summaries,
)
from s2o_vllm.kernels.layout import DENSE_START, ELIGIBLE, NUM_COUNTERS, STOPPED, VISITED
from s2o_vllm.kernels.ranking import basis
from s2o_vllm.kernels.ranking.project import append_keys
from s2o_vllm.kernels.selection import reference as selection_reference
from s2o_vllm.kernels.tuning import TIERS_UNORDERED
from s2o_vllm.kernels.work_list import PrefillRow

LONGEST = 768
CONTEXTS = (333, 600, 65)  # of requests in decode; the last has no history before its dense part
PROMPTS = (300, 598, 40)  # tokens that its prompt's last sparse chunk saw
REGION, SPAN = 64, 128  # tokens; queries of a span, so that prompts have clusters
CHUNK = 128  # of histories, for several programs a list
SIZES = [
    # heads, kv_heads, head_dim, page, head_major, an fp8 cache
    (4, 2, 64, 16, True, False),
    (5, 1, 96, 32, False, False),
    (3, 3, 128, 16, True, False),
    pytest.param((8, 2, 64, 48, False, True), marks=FP8_CARD),
    pytest.param((2, 1, 512, 16, True, False), marks=LARGE_CARD),
]
ULP = 2.0**-3 if ON_GPU else 2.0**-9  # of projections, as in test_low_rank.py


def make(device, heads=4, kv_heads=2, head_dim=64, page=16, head_major=True, fp8=False, **options):
    """Requests whose last token is a query, on shuffled pages."""
    return make_batch(
        device, chunks=[(context, 1) for context in CONTEXTS], heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, page=page, head_major=head_major, fp8=fp8, **options,
    )  # fmt: skip


def shape_of(batch, budget=0.25, requests=5):
    heads, head_dim = batch.query.shape[1:]
    return DecodeShape(heads, batch.kv_cache.shape[1], head_dim, LONGEST, requests, budget)


def prompt_of(batch, number):
    """A request's last chunk of its prompt: queries of it and the work list."""
    prompt = PROMPTS[number]
    row = PrefillRow(number, 0, 32, prompt - 32, 0.25)
    batch.rows, rows = [row], batch.rows
    (work,) = batch.work(segment=32, span=SPAN)
    batch.rows = rows
    generator = torch.Generator().manual_seed(number)
    query = torch.randn(32, *batch.query.shape[1:], generator=generator)
    return query.to(batch.query), work


def snapshots(batch, budget=0.25, slots=(3, 0, 1), by=None):
    """Slots that hold the ends of prompts, all else poisoned, and the decode list of the batch.

    ``by`` fills one: by default the references do, which take less time than the kernels.
    """
    shape, device = shape_of(batch, budget), batch.query.device
    scratch = decode_step.scratch(shape, device, chunk=CHUNK, summary_rows=SUMMARIES)
    space = decode_step.RequestStates(shape, batch.query.dtype, device, scratch, CLUSTERS, REGION)
    kind = torch.uint8 if ON_GPU else torch.int16
    space.projected_keys.view(kind).fill_(0x7F if ON_GPU else 0x7E00)  # NaN
    for number, slot in enumerate(slots):
        query, work = prompt_of(batch, number)
        (by or by_references)(batch, space, choose_snapshot(work, slot), query, work)
    rows = [
        DecodeRow(number, number, context, slots[number], PROMPTS[number])
        for number, context in enumerate(CONTEXTS)
    ]
    return space, listed(batch, rows, budget)


def by_references(batch, space, one, query, work):
    """Fill a slot as the references would."""
    cache, table, slot, rank = batch.kv_cache, batch.block_table, one.slot, basis.RANK
    span, bases = work.spans[one.span], cache.shape[1]
    fitted = basis.fit_span(query, cache, table, work.row, span, bases, batch.scale)
    for own, part in zip(space.basis, fitted, strict=True):
        own[slot, ..., :rank] = part
    space.basis.offset[slot, :, rank:] = -torch.tensor(basis.LSE_FACTORS, device=query.device)
    positions = torch.arange(one.tokens, device=query.device)
    places = paging.physical_slots(positions, table[work.row], cache.shape[2])
    keys, _ = paging.load_tokens(cache, places, query.shape[2])
    projected = basis.project_keys(
        keys, basis.Basis(*(part[slot] for part in basis_of(space))), space.projected_keys.dtype
    )
    space.projected_keys[slot, :, : one.tokens] = projected.to(space.projected_keys.dtype)
    found = attention_reference.summarise(cache, table, work, query.dtype, CLUSTERS, REGION)
    store_summaries(space.summaries, found, slot, work.max_seen)


def by_kernels(batch, space, one, query, work):
    """Fill a slot as a server does on a card."""
    shape, device, dtype = shape_of(batch), query.device, query.dtype
    backend = decode_step.DecodeKernels(shape, dtype, device)
    ranked, _ = decode_step.basis_scratch(shape, dtype, device)
    sizes = (shape.kv_heads, shape.head_dim, LONGEST)
    averaged = summaries.workspace(*sizes, dtype, device, CLUSTERS, REGION)
    backend.states, backend.basis_scratch = space, (ranked, averaged)
    operator = SparseDecode(shape, dtype, device, scale=batch.softmax_scale)
    operator.backend = backend
    operator.take(one, query, batch.kv_cache, batch.block_table, work, k_scale=batch.k_scale)


def listed(batch, rows, budget=0.25, segments=None):
    """A step's work list, by default without segments to spare."""
    table = DecodeTable(shape_of(batch, budget), len(CONTEXTS), batch.query.device)
    return table.fill(rows, len(rows) if segments is None else segments)


def run(batch, rows, space, function=decode_step.decode, **options):
    out = nan_like(batch.query)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=out.device)
    function(
        batch.query, batch.kv_cache, batch.block_table, rows, space, out, counters,
        scale=batch.scale, v_scale=batch.v_scale, sinks=batch.sinks, **options,
    )  # fmt: skip
    return out, counters


def basis_of(space):
    """The slots' bases without the columns that hold log-sum-exps."""
    return basis.Basis(*(part[..., : basis.RANK].float() for part in space.basis))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_new_keys_are_projected_by_the_slots_basis(device, size):
    batch = make(device, *size)
    space, rows = snapshots(batch, by=by_kernels)
    append_keys(batch.kv_cache, batch.block_table, rows, space)
    head_dim, page = batch.query.shape[2], batch.kv_cache.shape[2]
    factors = torch.tensor(basis.LSE_FACTORS, device=device)
    for row in rows.rows:
        positions = torch.arange(row.context + 1, device=device)
        slots = paging.physical_slots(positions, batch.block_table[row.row], page)
        keys, _ = paging.load_tokens(batch.kv_cache, slots, head_dim)
        wanted = keys @ space.basis.b[row.slot].float() - space.basis.offset[row.slot][:, None]
        got = space.projected_keys[row.slot, :, : row.context + 1].float()
        assert ((got - wanted).abs() <= ULP * wanted.abs() + 2e-2).all()
        assert (got[..., basis.RANK :] == factors).all()
        assert torch.isnan(space.projected_keys[row.slot, :, row.context + 1 :].float()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_a_full_list_is_dense_attention(device, size, dtype, sinks):
    batch = make(device, *size, dtype=dtype, sinks=sinks)
    space, rows = snapshots(batch, budget=1.0)
    out, counters = run(batch, rows, space)
    floor = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert relative_error(out, dense_attention(batch)) < floor
    assert counters[VISITED] == counters[ELIGIBLE]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scores_are_the_references(device, size):
    batch = make(device, *size, spread=2.0)
    space, rows = snapshots(batch)
    run(batch, rows, space)
    wanted = decode_reference.scores(batch.query, space.projected_keys, basis_of(space), rows.work)
    got = space.selection.scores[: rows.work.num_segments]
    for number, segment in enumerate(rows.work.segments.tolist()):
        n = segment[DENSE_START]
        # Approximate exponentials, and log-sum-exps in three parts that are rounded.
        torch.testing.assert_close(
            got[number, :, :n].float(), wanted[number, :, :n].float(), atol=0.15, rtol=0
        )


@pytest.mark.parametrize(("softcap", "sinks"), [(0.0, False), (5.0, False), (0.0, True)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lists_and_outputs_are_the_references(device, size, softcap, sinks):
    batch = make(device, *size, spread=2.0, sinks=sinks)
    space, rows = snapshots(batch)
    out, counters = run(batch, rows, space, softcap=softcap)
    work, page = rows.work, batch.kv_cache.shape[2]
    got = space.selection.lists(work)
    scores = space.selection.scores[: work.num_segments, :, : work.max_history]
    lists = selection_reference.select(
        scores,
        batch.block_table,
        work,
        page,
        TIERS_UNORDERED,
        chunk=CHUNK,
        summaries=space.summaries,
    )
    assert torch.equal(got.lengths, lists.lengths)
    for number, head in itertools.product(range(work.num_segments), range(scores.shape[1])):
        count = int(lists.lengths[number, head])
        assert torch.equal(got.slots[number, head, :count], lists.slots[number, head, :count])
    wanted = nan_like(batch.query)
    counted = torch.zeros_like(counters)
    attention_reference.attend(
        batch.query, batch.kv_cache, batch.block_table, work, lists, space.summaries, wanted,
        counted, scale=batch.scale, v_scale=batch.v_scale, softcap=softcap, sinks=batch.sinks,
        queries_per_tile=1,
    )  # fmt: skip
    assert relative_error(out, wanted) < TOLERANCE
    # None stops early, and no mass is estimated.
    assert counters[: STOPPED + 1].tolist() == counted[: STOPPED + 1].tolist()
    assert counters[STOPPED + 1 :].tolist() == [0, 0]


@pytest.mark.parametrize("head_major", [True, False])
def test_a_cache_beyond_32_bits_gives_the_same(device, head_major):
    batch = make(device, head_major=head_major)
    results = [
        run(one, rows, space)
        for one in (batch, far_away(batch))
        for space, rows in [snapshots(one, by=by_kernels)]
    ]
    (out, counters), (far, counted) = results
    assert torch.isfinite(far).all()
    assert torch.equal(far, out)
    assert torch.equal(counted, counters)


def test_a_request_does_not_depend_on_its_neighbours(device):
    batch = make(device)
    space, rows = snapshots(batch)
    together, _ = run(batch, rows, space)
    out, _ = run(batch, listed(batch, [rows.rows[1]]), space)
    assert torch.equal(out[1], together[1])
    assert torch.isnan(out[[0, 2]]).all()


def test_finds_the_token_that_the_query_wants(device):
    batch = make(device)
    needle = torch.nn.functional.normalize(torch.randn(64), dim=0).to(device) * 40
    block = int(batch.block_table[1, 333 // 16])
    batch.kv_cache[block, :, 333 % 16, :64] = needle
    batch.query[1] += needle
    space, rows = snapshots(batch, budget=0.05)
    out, _ = run(batch, rows, space)
    assert relative_error(out[1], dense_attention(batch)[1]) < max(1e-3, TOLERANCE)


@pytest.mark.parametrize("fp8", CACHES)
def test_the_operator_keeps_and_decodes(device, fp8):
    batch = make(device, fp8=fp8)
    operator = SparseDecode(
        shape_of(batch, 1.0), batch.query.dtype, device, scale=batch.softmax_scale
    )
    operator.warm_up(batch.query, batch.kv_cache, batch.block_table)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
    kv_scales = {"k_scale": batch.k_scale}
    rows = []
    for number, context in enumerate(CONTEXTS):
        query, work = prompt_of(batch, number)
        arguments = (query, batch.kv_cache, batch.block_table, work)
        operator.take(choose_snapshot(work, number), *arguments, **kv_scales)
        rows.append(DecodeRow(number, number, context, number, work.max_seen))
    assert [row.covered for row in rows] == list(PROMPTS)
    for budget, limit in ((1.0, TOLERANCE), (0.5, 0.7)):
        out = nan_like(batch.query)
        operator(
            batch.query, batch.kv_cache, batch.block_table,
            listed(batch, rows, budget), out, counters, v_scale=batch.v_scale, **kv_scales,
        )  # fmt: skip
        assert relative_error(out, dense_attention(batch)) < limit


def test_the_dense_part_is_recent_and_whole_tokens_of_it():
    starts = [decode_line(DecodeRow(0, 0, n, 0, 0), 0.1)[DENSE_START] for n in range(700)]
    assert starts[127] == 0
    assert all(64 <= n - start <= 127 for n, start in enumerate(starts) if n >= 128)
    assert decode_line(DecodeRow(4, 7, 1000, 2, 0), 0.1) == (4, 7, 1, 1000, 896, 89, 2)


def test_the_step_lists_what_its_slots_lack():
    rows = [DecodeRow(1, 0, 500, 2, 440), DecodeRow(0, 1, 300, 0, 300), DecodeRow(2, 2, 9, 1, 10)]
    table = DecodeTable(DecodeShape(4, 2, 64, 700, 5, 0.1), 6, torch.device("cpu"))
    made = table.fill(rows, 4)
    assert made.appends.tolist() == [[1, 2, 440, 61], [0, 0, 300, 1], [2, 1, 10, 0], [0, 0, 0, 0]]
    assert made.work.segments[:, DENSE_START].tolist() == [384, 192, 0, 0]
    assert table.limits[:3].tolist() == [1, 1, 1]
    assert (table.limits[3:] > 10**9).all()
    assert (made.work.max_history, made.work.max_list) == (700, 105)

    after = table.fill([], 5)
    assert (after.work.segments.any() or after.appends.any()) == 0, "nothing of the step before"
    assert (table.limits > 10**9).all()


def test_every_step_is_in_the_same_place_and_of_the_same_shape():
    """A graph of one step serves all of as many segments: it knows addresses and grids."""
    table = DecodeTable(DecodeShape(4, 2, 64, 700, 5, 0.1), 6, torch.device("cpu"))
    one = table.fill([DecodeRow(1, 0, 500, 2, 440)], 3)
    other = table.fill([DecodeRow(0, 0, 90, 1, 1), DecodeRow(1, 1, 700, 0, 0)], 3)
    for name in ("segments", "max_history", "max_list", "max_queries", "target_error"):
        a, b = getattr(one.work, name), getattr(other.work, name)
        assert a.data_ptr() == b.data_ptr() if name == "segments" else a == b
    assert one.appends.data_ptr() == other.appends.data_ptr()
    # Alignment is part of what a kernel is compiled for.
    assert all(x.data_ptr() % 16 == 0 for x in (table.segments, table.appends, table.limits))


def test_segments_to_spare_write_nothing(device):
    batch = make(device)
    space, rows = snapshots(batch)
    run(batch, rows, space)
    some = rows.rows[1:]
    wanted, counted = run(batch, listed(batch, some), space)
    projected, lists = (
        space.projected_keys.clone(),
        space.selection.lists(listed(batch, some, segments=5).work),
    )
    got, again = run(batch, listed(batch, some, segments=5), space)
    assert torch.equal(got[1:], wanted[1:])
    assert torch.isnan(got[0]).all()
    assert torch.equal(again, counted)
    assert (lists.lengths[len(some) :] == 0).all()
    kind = torch.uint8 if ON_GPU else torch.int16
    assert torch.equal(space.projected_keys.view(kind), projected.view(kind))

    nothing, counters = run(batch, listed(batch, [], segments=5), space)
    assert torch.isnan(nothing).all()
    assert not counters.any()
    decode_reference.decode(
        batch.query, batch.kv_cache, batch.block_table, listed(batch, [], segments=5), None,
        nothing, counters, scale=batch.scale,
    )  # fmt: skip
    assert torch.isnan(nothing).all()


def test_room_for_the_lists_of_all_slots():
    shape = DecodeShape(32, 8, 128, 131072, 4, 0.05)
    assert shape.slots == 4 * 9840
    full = DecodeShape(32, 8, 128, 131072, 4, 1.0)
    assert full.slots == 4 * (131072 + 64)
