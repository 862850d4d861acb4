"""What holds of every work list, every selection and every attention, whatever is drawn."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from cases import (
    CLUSTERS,
    DTYPES,
    SEGMENT,
    TOLERANCE,
    full_lists,
    make_batch,
    nan_like,
    relative_error,
)
from s2o_vllm.kernels import layout, tuning
from s2o_vllm.kernels.attention import attend
from s2o_vllm.kernels.attention import reference as attention_reference
from s2o_vllm.kernels.layout import (
    DENSE_START,
    DROPPED,
    HISTORY,
    LIST_LENGTH,
    NUM_COUNTERS,
    NUM_QUERIES,
    QUERY_START,
    SLOT,
)
from s2o_vllm.kernels.selection import reference as selection_reference
from s2o_vllm.kernels.selection import select
from s2o_vllm.kernels.tiles import attend_tile
from s2o_vllm.kernels.tuning import TIERS, TIERS_UNORDERED
from s2o_vllm.kernels.work_list import (
    Limits,
    PrefillRow,
    build_work_lists,
    list_capacity,
    longest_list,
)

CPU = torch.device("cpu")
# A kernel in the interpreter takes a second: few examples, and no search for a smaller one.
SLOW = settings(max_examples=20, phases=(Phase.explicit, Phase.generate))

# -- work lists ------------------------------------------------------------------------------


@st.composite
def prefills(draw, most=9000):
    """Requests of a step, one after the other in the packed queries."""
    rows, start = [], 0
    for number in range(draw(st.integers(1, 3))):
        queries = draw(st.integers(1, most) | st.integers(1, 70))
        context = draw(st.integers(0, 40_000) | st.integers(0, 300))
        budget = draw(st.floats(1e-6, 1))
        target = draw(st.sampled_from([0.0, 0.1]))
        least = draw(st.sampled_from([0, 64, 5000]))
        rows.append(PrefillRow(number, start, queries, context, budget, target, least))
        start += queries
    return rows


segment_sizes = st.sampled_from([16, 32, 64, 100, 512, 4096])
contexts = st.integers(0, 20_000) | st.integers(0, 200)


@given(
    rows=prefills(), segment=segment_sizes, min_context=contexts,
    items=st.integers(1, 200), slots=st.integers(1, 10**7), shared=st.integers(1, 8),
)  # fmt: skip
def test_work_lists_hold_every_query_once_and_keep_to_their_limits(
    rows, segment, min_context, items, slots, shared
):
    limits = Limits(items, slots, shared)
    lists = build_work_lists(rows, segment, min_context, CPU, limits)
    seen: dict[int, list[tuple[int, int]]] = {row.row: [] for row in rows}
    for one in lists:
        row = rows[one.row]
        table = one.segments.tolist()
        assert 1 <= len(table) <= items
        assert one.target_error == row.target_error
        lengths = [longest_list(item, shared) for item in table]
        assert one.max_list == max(lengths)
        assert len(table) == 1 or len(table) * list_capacity(one.max_list) <= slots
        assert one.max_history == max(item[DENSE_START] for item in table)
        assert one.max_queries == max(item[NUM_QUERIES] for item in table)
        assert [item[HISTORY] for item in table] == sorted(
            (item[HISTORY] for item in table), reverse=True
        )
        assert one.dense_segments == sum(item[DENSE_START] == 0 for item in table)
        assert all(item[DENSE_START] == 0 for item in table[len(table) - one.dense_segments :])
        assert sum(count for _, count in one.groups.tolist()) == len(table)
        assert len(one.spans) <= tuning.CHUNK_SPANS
        for item in table:
            history, queries = item[HISTORY], item[NUM_QUERIES]
            assert item[QUERY_START] - row.query_start == history - row.context
            seen[one.row].append((history, history + queries))
            # Cuts lie at multiples in the sequence, or at the chunk's ends.
            for cut in (history, history + queries):
                assert cut % segment == 0 or cut in (row.context, row.context + row.num_queries)
            assert history // segment == (history + queries - 1) // segment
            # What it may visit, and where it begins to see everything.
            assert item[DENSE_START] in (0, history)
            assert 0 <= item[LIST_LENGTH] <= item[DENSE_START]
            if item[DENSE_START]:
                assert history >= min_context
                assert item[LIST_LENGTH] == max(int(row.budget * history), row.min_tokens)
            else:
                assert history < max(min_context, 1) or history <= row.min_tokens
            assert item[SLOT] == 0
            span = [span for span in one.spans if span.first <= item[QUERY_START]][-1]
            assert span.first <= item[QUERY_START]
            assert item[QUERY_START] + queries <= span.first + span.queries
            assert not item[DENSE_START] or history + queries <= span.tokens
    for row in rows:
        ends = [row.context, *(end for _, end in sorted(seen[row.row]))]
        assert [first for first, _ in sorted(seen[row.row])] == ends[:-1], "a gap, or an overlap"
        assert ends[-1] == row.context + row.num_queries
    for row in rows:
        of_row = [one for one in lists if one.row == row.row]
        chunks = {one.spans: one for one in reversed(of_row)}
        assert sum(one.first_of_chunk for one in of_row) == len(chunks)
        assert all(one.first_of_chunk for one in chunks.values())


@given(row=prefills(3000), segment=segment_sizes, min_context=contexts, data=st.data())
def test_whole_segments_do_not_depend_on_how_a_prompt_is_cut(row, segment, min_context, data):
    """Segments that no cut divides see the same history and have lists as long."""
    whole = row[0]._replace(query_start=0)
    cuts = data.draw(st.sets(st.integers(1, max(1, whole.num_queries - 1)), max_size=4))
    ends = [0, *sorted(cut for cut in cuts if cut < whole.num_queries), whole.num_queries]
    parts = [
        whole._replace(query_start=0, num_queries=stop - start, context=whole.context + start)
        for start, stop in pairwise(ends)
    ]

    def found(row):
        lists = build_work_lists([row], segment, min_context, CPU, Limits(10**6, 10**9))
        return {
            (item[HISTORY], item[NUM_QUERIES]): (item[DENSE_START], item[LIST_LENGTH])
            for one in lists
            for item in one.segments.tolist()
        }

    together = {key: value for part in parts for key, value in found(part).items()}
    inside = {whole.context + cut for cut in ends[1:-1]}
    for (first, queries), value in found(whole).items():
        if not any(first < cut < first + queries for cut in inside):
            assert together[first, queries] == value


# -- selection -------------------------------------------------------------------------------

KINDS = ["normal", "ties", "equal", "peaked", "lowest", "wide", "-inf", "inf", "nan", "all nan"]
FINITE = KINDS[:6]


def some_scores(shape, kind, device):
    scores = torch.randn(shape, device=device)
    if kind == "ties":
        scores = (2 * scores).round()
    elif kind == "equal":
        scores.fill_(-7)
    elif kind == "peaked":
        scores[..., ::17] += 30
    elif kind == "lowest":  # what a ranking clamps to
        scores[..., ::3] = torch.finfo(torch.half).min
    elif kind == "wide":
        scores *= 20_000
    elif kind == "all nan":
        scores.fill_(math.nan)
    elif kind != "normal":
        scores[..., ::5] = float(kind)
    limit = torch.finfo(torch.half).max
    return (scores if kind in ("inf", "-inf") else scores.clamp(-limit, limit)).half()


def select_both(batch, work, scores, tiers, counted, shared, chunk=64):
    """Lists of the kernels and of the reference; places that nobody wrote hold -7."""
    heads, page = scores.shape[1], batch.kv_cache.shape[2]
    space = select.SelectWorkspace(
        work.num_segments, heads, work.max_history,
        work.num_segments * list_capacity(work.max_list), scores.device, chunk,
    )  # fmt: skip
    space.scores.fill_(math.nan)
    space.scores[:, :, : scores.shape[2]] = scores
    space.bounds.fill_(math.nan)
    for number, item in enumerate(work.segments.tolist()):
        for head in range(heads if item[DENSE_START] else 0):
            parts = scores[number, head, : item[DENSE_START]].float().split(chunk)
            for place, part in enumerate(parts):
                bound = space.bounds[number * heads + head, place]
                bound[0], bound[1] = part.max(), part.min()
    for part in (space.slots, space.lengths, space.samples):
        part.fill_(-7)
    select.select(batch.block_table, work, page, space, tiers, counted, shared=shared)
    wanted = selection_reference.select(
        scores, batch.block_table, work, page, tiers, counted, chunk, shared
    )
    return space.lists(work), wanted


def assert_sound(batch, work, lists, shared):
    """Every list holds slots of its own request's history, once each, within its limits."""
    page = batch.kv_cache.shape[2]
    for number, item in enumerate(work.segments.tolist()):
        n = item[DENSE_START]
        positions = torch.arange(n, device=batch.block_table.device)
        own = set(
            (batch.block_table[item[0]][positions // page] * page + positions % page).tolist()
        )
        for group in lists.lengths[number].split(shared):
            assert int(group.sum()) <= len(group) * lists.slots.shape[2]
        for head, count in enumerate(lists.lengths[number].tolist()):
            assert 0 <= count <= list_capacity(work.max_list)
            slots = lists.slots[number, head, :count].tolist()
            assert len(set(slots)) == count
            assert set(slots) <= own


def request(device, context, queries, budget, page, heads=2, target=0.0):
    batch = make_batch(
        device, budget=budget, page=page, chunks=((context, queries),), heads=heads, kv_heads=heads
    )
    batch.rows = [row._replace(target_error=target) for row in batch.rows]
    return batch


@SLOW
@given(
    context=st.integers(1, 500), queries=st.integers(1, 40), budget=st.floats(0.01, 1),
    page=st.sampled_from([16, 48, 128]), kind=st.sampled_from(KINDS), shared=st.integers(1, 3),
    mode=st.sampled_from([(TIERS, 16384), (TIERS_UNORDERED, 150)]),
    heads=st.integers(1, 3),
)  # fmt: skip
@example(
    context=400, queries=40, budget=0.3, page=16, kind="nan", shared=2, mode=(TIERS, 16384), heads=2
)
@example(
    context=400, queries=40, budget=0.3, page=16, kind="inf", shared=2, mode=(TIERS, 16384), heads=2
)
def test_a_selection_is_sound_and_that_of_the_reference(
    device, context, queries, budget, page, kind, shared, mode, heads
):
    torch.manual_seed(context * 41 + queries)
    batch = request(device, context, queries, budget, page, heads)
    for work in batch.work(shared=shared):
        if work.max_list == 0:
            continue
        scores = some_scores((work.num_segments, heads, work.max_history), kind, device)
        got, wanted = select_both(batch, work, scores, *mode, shared)
        assert_sound(batch, work, wanted, shared)
        assert_sound(batch, work, got, shared)
        if kind not in FINITE:
            continue  # which of them is no matter: attention to such keys is no number either
        assert got.lengths.tolist() == wanted.lengths.tolist()
        for number, lengths in enumerate(wanted.lengths.tolist()):
            for head, count in enumerate(lengths):
                slots = got.slots[number, head]
                assert slots[:count].tolist() == wanted.slots[number, head, :count].tolist()
                assert (slots[count:] == -7).all(), "wrote beyond the list"


# -- attention -------------------------------------------------------------------------------


@st.composite
def batches(draw, device):
    """A batch of any shape, over tables that may name a page twice, with odd strides."""
    group, kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    chunk = st.tuples(st.integers(0, 150), st.integers(1, 50))
    chunks = tuple(draw(st.lists(chunk, min_size=1, max_size=2)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    batch = make_batch(
        device, heads=group * kv_heads, kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 96, 128])), page=draw(st.sampled_from([16, 48])),
        dtype=draw(st.sampled_from(DTYPES)), head_major=draw(st.booleans()), chunks=chunks,
        budget=draw(st.floats(0.05, 1)), spread=draw(st.sampled_from([0.0, 1.0, 8.0])),
    )  # fmt: skip
    if draw(st.booleans()):  # several requests on one page, or one request twice on it
        blocks = batch.kv_cache.shape[0]
        batch.block_table = torch.where(
            batch.block_table < 0,
            batch.block_table,
            torch.randint_like(batch.block_table, blocks),
        )
    gap = draw(st.sampled_from([0, 8, 64]))  # elements behind each token: 16 bytes are whole
    if gap:
        wide = torch.full(
            (*batch.kv_cache.shape[:3], batch.kv_cache.shape[3] + gap), math.nan,
            dtype=batch.kv_cache.dtype, device=device,
        )  # fmt: skip
        wide[..., :-gap] = batch.kv_cache
        batch.kv_cache = wide[..., :-gap]
        packed = torch.cat([batch.query, nan_like(batch.query)], 1)  # queries beside keys
        batch.query = packed[:, : batch.query.shape[1]]
    return batch


def run_both(batch, lists, softcap):
    """Outputs and counters of the kernel, and of the reference."""
    tile = attend_tile(batch.query.shape[2], batch.query.device)
    group = batch.query.shape[1] // batch.kv_cache.shape[1]
    results = []
    for function, shape in (
        (attend.attend, {"tile": tile}),
        (attention_reference.attend, {"queries_per_tile": tile.block_m // group}),
    ):
        out = nan_like(batch.query)
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=out.device)
        for work, own in lists:
            means = attention_reference.summarise(
                batch.kv_cache, batch.block_table, work, batch.query.dtype, CLUSTERS, 32
            )
            function(
                batch.query, batch.kv_cache, batch.block_table, work, own, means, out, counters,
                scale=batch.scale, softcap=softcap, **shape,
            )  # fmt: skip
        results.append((out, counters))
    return results


def visited(batch, lists):
    """Which tokens of the cache anything attends to, bool ``[blocks, kv_heads, page]``."""
    page = batch.kv_cache.shape[2]
    found = torch.zeros(batch.kv_cache.shape[:3], dtype=torch.bool)
    for work, own in lists:
        table = batch.block_table[work.row].cpu()
        for number, item in enumerate(work.segments.tolist()):
            dense = torch.arange(item[DENSE_START], item[HISTORY] + item[NUM_QUERIES])
            found[table[dense // page].long(), :, dense % page] = True
            for head, count in enumerate(own.lengths[number].tolist()):
                slots = own.slots[number, head, :count].cpu().long()
                found[slots // page, head, slots % page] = True
    return found.to(batch.kv_cache.device)


@SLOW
@given(data=st.data(), softcap=st.sampled_from([0.0, 5.0]), uneven=st.booleans())
def test_attention_is_that_of_the_reference_and_of_what_it_visits_alone(
    device, data, softcap, uneven
):
    batch = data.draw(batches(device))
    lists = full_lists(batch, uneven=uneven)
    (out, counters), (wanted, of_reference) = run_both(batch, lists, softcap)
    tolerance = 2e-3 if batch.query.dtype == torch.float16 else TOLERANCE
    assert torch.isfinite(out).all()
    assert relative_error(out, wanted) < tolerance
    exact = [place for place in range(NUM_COUNTERS) if place != DROPPED]
    assert counters[exact].tolist() == of_reference[exact].tolist()
    # NaN in all else: other requests' pages, what lies behind a sequence, what lists leave out.
    batch.kv_cache.masked_fill_(~visited(batch, lists)[..., None], math.nan)
    for (again, counted), before in zip(
        run_both(batch, lists, softcap), (out, wanted), strict=True
    ):
        assert torch.equal(again, before)
        assert counted[DROPPED] >= 0


@SLOW
@given(
    data=st.data(), what=st.sampled_from(["keys", "values", "queries"]),
    size=st.sampled_from([1e3, 1e4, 6e4]),
)  # fmt: skip
def test_huge_numbers_give_finite_attention(device, data, what, size):
    """As large as fp16 holds. Keys that are far apart leave one token of all."""
    batch = data.draw(batches(device))
    head_dim = batch.query.shape[2]
    if what == "queries":
        batch.query.clamp_(-1, 1).mul_(size)
    else:
        part = batch.kv_cache[..., :head_dim] if what == "keys" else batch.kv_cache[..., head_dim:]
        part.clamp_(-1, 1).mul_(size)
    (out, _), (wanted, _) = run_both(batch, full_lists(batch), 0.0)
    assert torch.isfinite(out).all()
    assert torch.isfinite(wanted).all()


# -- the operator ----------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["low_rank", "mean_query"])
@pytest.mark.parametrize("where", ["key", "value", "query"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_request_that_is_no_number_harms_itself_alone(device, ranking, where, value):
    """Overflow in a model, or weights that are broken: stock vLLM answers nonsense and lives."""
    from s2o_vllm.kernels.prefill import SparsePrefill
    from s2o_vllm.kernels.shape import Shape

    dtype = torch.bfloat16
    torch.manual_seed(0)
    batch = make_batch(device, chunks=((400, 64), (300, 40)), dtype=dtype)
    shape = Shape(4, 2, 64, 1024, 512, SEGMENT, ranking)

    def answer():
        operator = SparsePrefill(shape, dtype, device, scale=batch.softmax_scale)
        out = torch.zeros_like(batch.query)
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
        for work in batch.work():
            operator(batch.query, batch.kv_cache, batch.block_table, work, out, counters)
        return out, counters

    before, _ = answer()
    assert torch.isfinite(before).all()
    block = int(batch.block_table[0, 2])
    part = slice(0, 64) if where == "key" else slice(64, 128)
    if where == "query":
        batch.query[5] = value
    else:
        batch.kv_cache[block, :, 3, part] = value
    after, counters = answer()
    assert torch.equal(after[64:], before[64:]), "another request's answer"
    assert (counters >= 0).all()
    assert int(counters[layout.VISITED]) <= int(counters[layout.ELIGIBLE])
    if where == "query":
        assert torch.isfinite(after[SEGMENT:64]).all(), "segments without it"
