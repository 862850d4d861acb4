"""Attend: two passes over a paged cache, the second over a list of slots.

Pass 1 is dense and causal over the segment itself and starts the online softmax from a
stable state (S2O, section on the two passes). Pass 2 walks a list of physical slots from
most to least important and may stop on measured softmax mass. The list is a page table of
one-token pages: keys and values are never copied or moved. What was not visited is then attended
to as the means of whole regions of the history, whose values follow the query by a slope and whose
weights its spread. Of some segments a sample of the tokens that were not visited tells how much
softmax mass they hold (all ours).
"""

import math

import torch
import triton
import triton.language as tl

from ..columns import (
    DENSE_START,
    DROPPED,
    ELIGIBLE,
    HISTORY,
    NUM_QUERIES,
    QUERY_START,
    ROW,
    SAMPLED,
    SEGMENT_COLUMNS,
    SPAN,
    STOPPED,
    TILES,
    VISITED,
)
from ..layout import DROPPED_UNIT, LOG2E
from ..selection.selected import SelectedTokens
from ..tiles import AttendTile, input_precision
from ..tuning import (
    ESTIMATE_EVERY,
    ESTIMATE_STEP,
    ESTIMATE_TOKENS,
    REGION_VARIANCE,
    REGION_WEIGHT,
    REGION_WEIGHT_LIMIT,
    STOP_STEP_TOKENS,
)
from ..work_list import WorkList
from .split_kv import Parts
from .summary_pass import LN2, add_slopes, dropped_mass, region_lift, visit_rest
from .summary_table import Summaries
from .tile_ops import as_numbers, load_rows, online_softmax, scores, soft_cap, visit


@triton.jit(do_not_specialize=["first_item"])
def _attend_kernel(
    p_q, p_q_e4m3, p_kv, p_out, p_items, p_slots, p_lengths, p_samples, p_means,
    p_value_covariances, p_key_covariances, p_table, p_counters, p_mass, p_known,
    first_item, scale, v_scale, softcap, stop_threshold,
    stride_q_token, stride_q_head, stride_o_token, stride_o_head,
    stride_block, stride_head, stride_token,
    stride_slots_item, stride_slots_head, stride_means_fit, stride_means, stride_table,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    LIST_PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STOP_STEP: tl.constexpr,
    DENSE: tl.constexpr, EARLY_STOP: tl.constexpr, SOFTCAP: tl.constexpr,
    EVERY: tl.constexpr, SAMPLES: tl.constexpr, SAMPLE_STEP: tl.constexpr,
    DROPPED_PER_ROW: tl.constexpr, PARTS: tl.constexpr,
    REGION: tl.constexpr, LIFT_LEAST: tl.constexpr, LIFT_SPREAD: tl.constexpr,
    LIFT_MOST: tl.constexpr,
    LIFT_BLOCK: tl.constexpr, SLOPE_BLOCK: tl.constexpr,
    E4M3: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows (queries x GROUP heads) of one segment and KV head.

    With DENSE all segments have one list, the slots of the sequence, and visit their history's part
    of it. With PARTS a segment has one tile, and so many programs share its list: :class:`Parts`.
    """
    # Neighbours in the grid are segments of one head: their lists overlap, and meet in L2.
    i_tile, i_item = tl.program_id(0), (first_item + tl.program_id(1)).to(tl.int64)
    i_head = tl.program_id(2)
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    p_item = p_items + i_item * SEGMENT_COLUMNS
    row = tl.load(p_item + ROW).to(tl.int64)
    query_start = tl.load(p_item + QUERY_START).to(tl.int64)
    num_queries = tl.load(p_item + NUM_QUERIES)
    history = tl.load(p_item + HISTORY)
    p_list = p_slots
    if DENSE:
        dense_start, count = history, history
    else:
        dense_start = tl.load(p_item + DENSE_START)
        count = tl.load(p_lengths + i_item * tl.num_programs(2) + i_head)
        p_list += i_item * stride_slots_item + i_head * stride_slots_head
    first = i_tile * QUERIES
    listed = count
    i_part = 0
    if PARTS:
        i_part = i_tile
        first = 0
        share = tl.cdiv(count, PARTS * BLOCK_N) * BLOCK_N
        p_list += i_part * share
        count = tl.minimum(tl.maximum(count - i_part * share, 0), share)
    if first >= num_queries:
        return

    # Slots are read one tile ahead: a gather whose addresses are at hand can be started early.
    # What is ahead is not used behind the loop, or it is loaded a second time for there.
    full = count // BLOCK_N
    tail = count % BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    slot = tl.load(p_list + o_n, o_n < full * BLOCK_N, 0)
    of_tail = tl.load(p_list + full * BLOCK_N + o_n, o_n < tail, 0)

    o_row = tl.arange(0, BLOCK_M)
    o_query = first + o_row // GROUP
    m_row = (o_row < QUERIES * GROUP) & (o_query < num_queries)
    o_d = tl.arange(0, D_PAD)
    # Within a segment 32 bits do: these take registers until the output is stored.
    p_q += query_start * stride_q_token + (i_head * GROUP).to(tl.int64) * stride_q_head
    o_q = o_query * stride_q_token + o_row % GROUP * stride_q_head
    q = load_rows(p_q, o_q, m_row, o_d, True, D, D_PAD)
    # What is multiplied by keys. Loaded a second time and not converted: the tensor core then finds
    # it in shared memory, which takes no registers.
    q_k = q
    if E4M3:
        p_q_e4m3 += query_start * stride_q_token + (i_head * GROUP).to(tl.int64) * stride_q_head
        q_k = load_rows(p_q_e4m3, o_q, m_row, o_d, True, D, D_PAD)

    # Before anything is visited: registers are free here.
    lift = tl.zeros([BLOCK_M], tl.float32)
    if (dense_start >= REGION) & (i_part == 0) & (not DENSE):
        p_key_covariances += (tl.load(p_item + SPAN) * tl.num_programs(2) + i_head).to(tl.int64) * (
            D * D
        )
        lift = region_lift(
            q, p_q, o_q, m_row, p_key_covariances, o_d, scale,
            D, D_PAD, LIFT_BLOCK, LIFT_LEAST, LIFT_SPREAD, LIFT_MOST, PRECISION,
        )  # fmt: skip
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    p_k = p_kv + i_head.to(tl.int64) * stride_head
    p_v = p_k + D

    # Pass 1: dense and causal, from dense_start to the tile's last query.
    end = history + tl.max(tl.where(m_row, o_query, 0)) + 1
    if PARTS:  # the first part has all that is not of the list
        end = tl.where(i_part == 0, end, dense_start)
    p_table += row * stride_table
    page_ahead = tl.load(p_table + (dense_start + o_n) // PAGE, dense_start + o_n < end, 0)
    for start in range(dense_start, end, BLOCK_N):
        position = start + o_n
        m_n = position < end
        page = page_ahead.to(tl.int64)
        page_ahead = tl.load(p_table + (position + BLOCK_N) // PAGE, position + BLOCK_N < end, 0)
        o_kv = page * stride_block + (position % PAGE) * stride_token
        k = load_rows(p_k, o_kv, m_n, o_d, True, D, D_PAD)
        v = as_numbers(load_rows(p_v, o_kv, m_n, o_d, True, D, D_PAD), q.dtype)
        s = scores(q, q_k, k, PRECISION)
        scale_own = scale
        if SOFTCAP:
            s = soft_cap(s * scale, softcap)
            scale_own = 1.0
        s = tl.where(position[None, :] <= history + o_query[:, None], s, float("-inf"))
        m, mass, acc = online_softmax(s, v, m, mass, acc, scale_own, PRECISION)

    # Pass 2: the listed slots, each visible to every query of the segment.
    seen = 0
    # fp16 has no room for probabilities in units that later scores may exceed.
    SETTLED: tl.constexpr = p_q.dtype.element_ty != tl.float16
    m_before, mass_before = m, mass
    if SETTLED and full > 0:
        ahead = tl.load(p_list + tl.minimum(1, full - 1) * BLOCK_N + o_n)
        m, mass, acc = visit(
            q, q_k, p_k, p_v, slot, m, mass, acc, o_d, scale, softcap,
            stride_block, stride_token, LIST_PAGE, D, D_PAD, SOFTCAP, PRECISION, False,
        )  # fmt: skip
        slot = ahead
        seen = 1
        mass_before *= tl.exp2(m_before - m)
        m_before = m
    if EARLY_STOP:
        while seen < full:
            stop = tl.minimum((seen // STOP_STEP + 1) * STOP_STEP, full)
            for tile in range(seen, stop):
                ahead = tl.load(p_list + tl.minimum(tile + 1, full - 1) * BLOCK_N + o_n)
                m, mass, acc = visit(
                    q, q_k, p_k, p_v, slot, m, mass, acc, o_d, scale, softcap,
                    stride_block, stride_token, LIST_PAGE, D, D_PAD, SOFTCAP, PRECISION, SETTLED,
                )  # fmt: skip
                slot = ahead
            seen = stop
            # The largest relative gain of any row decides: no row loses mass unseen.
            if not SETTLED:
                mass_before *= tl.exp2(m_before - m)
                m_before = m
            if stop % STOP_STEP == 0:
                # Without a division: what it takes is what lets products overlap.
                grown = m_row & (mass - mass_before >= stop_threshold * mass)
                if tl.max(grown.to(tl.int32)) == 0:
                    full = stop
                    tail = 0
            mass_before = mass
    else:
        for tile in range(seen, full):
            ahead = tl.load(p_list + tl.minimum(tile + 1, full - 1) * BLOCK_N + o_n)
            m, mass, acc = visit(
                q, q_k, p_k, p_v, slot, m, mass, acc, o_d, scale, softcap,
                stride_block, stride_token, LIST_PAGE, D, D_PAD, SOFTCAP, PRECISION, SETTLED,
            )  # fmt: skip
            slot = ahead
        seen = full
    visited = seen * BLOCK_N + tail

    fit = tl.load(p_item + SPAN).to(tl.int64)
    p_means += fit * stride_means_fit + i_head.to(tl.int64) * stride_means
    if not PARTS:
        listed = visited
    missing = tl.maximum(1.0 - listed / tl.maximum(dense_start, 1), 0.0)
    regions = tl.where((listed < dense_start) & (i_part == 0), dense_start // REGION, 0)
    if PARTS:
        regions = tl.minimum(regions, tl.load(p_known + fit))
    lift += tl.log2(REGION * missing)
    m, mass, tokens, acc = visit_rest(
        q, p_k, p_means, of_tail, tail, regions, lift, m, mass, acc, o_n, o_d, scale, softcap,
        stride_block, stride_token, LIST_PAGE, D, D_PAD, BLOCK_N, SOFTCAP, PRECISION,
    )  # fmt: skip

    if PARTS:
        mass = tl.maximum(mass, 1e-37)  # of a part without tokens
    unit = 1.0 / mass
    if regions > 0:
        p_value_covariances += (fit * tl.num_programs(2) + i_head) * (D * D)
        # A row's slope counts by its mass of regions; scale is in base 2. It is the other summand
        # that is divided by it, so that queries are multiplied as they are at hand.
        lean = tl.maximum((1.0 - tokens * unit) * (scale * LN2), 1e-20)
        acc *= (unit / lean)[:, None]
        acc = add_slopes(
            acc, q, p_q, o_q, m_row, p_value_covariances, o_d, D, D_PAD, SLOPE_BLOCK, PRECISION
        )
        unit = lean
    acc *= unit[:, None]
    if p_kv.dtype.element_ty != p_q.dtype.element_ty:  # a quantised cache
        acc *= v_scale
    if PARTS:
        o_part = ((i_item * tl.num_programs(2) + i_head) * PARTS + i_part) * GROUP
        tl.store(p_mass + o_part + o_row, m + tl.log2(mass), m_row)
        p_out += o_part * D
        o_o = o_row * D
    else:
        p_out += query_start * stride_o_token + (i_head * GROUP).to(tl.int64) * stride_o_head
        o_o = o_query * stride_o_token + o_row % GROUP * stride_o_head
    tl.store(
        p_out + o_o[:, None] + o_d[None, :],
        acc.to(p_out.dtype.element_ty),
        m_row[:, None] & (o_d < D)[None, :],
    )

    rows = tl.sum(m_row.to(tl.int32)).to(tl.int64)
    if PARTS:
        tl.atomic_add(p_counters + VISITED, rows * visited)
        if i_part > 0:
            return
        visited = 0
    tl.atomic_add(p_counters + VISITED, rows * (visited + history - dense_start))
    tl.atomic_add(p_counters + ELIGIBLE, rows * history)
    tl.atomic_add(p_counters + TILES, 1)
    if PARTS:
        return  # none stops early, and none knows the mass of all
    tl.atomic_add(p_counters + STOPPED, (visited < count).to(tl.int64))
    if i_item % EVERY == 0:
        if (dense_start > 0) & (not DENSE):
            p_places = p_samples + (i_item // EVERY * tl.num_programs(2) + i_head) * SAMPLES
            dropped = dropped_mass(
                q, q_k, p_k, p_table, p_places, visited, dense_start,
                m, tokens, o_n, o_d, scale, softcap, stride_block, stride_token,
                PAGE, D, D_PAD, BLOCK_N, SAMPLES, SAMPLE_STEP, SOFTCAP, PRECISION,
            )  # fmt: skip
            dropped = tl.sum(tl.where(m_row, dropped, 0.0)) * DROPPED_PER_ROW
            tl.atomic_add(p_counters + DROPPED, (dropped + 0.5).to(tl.int64))
        tl.atomic_add(p_counters + SAMPLED, rows)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    lists: SelectedTokens,
    regions: Summaries,
    out: torch.Tensor,
    counters: torch.Tensor,
    *,
    scale: float,
    v_scale: float = 1.0,
    stop_threshold: float = 0.0,
    stop_step: int = STOP_STEP_TOKENS,
    softcap: float = 0.0,
    parts: Parts | None = None,
    query_e4m3: torch.Tensor | None = None,
    tile: AttendTile,
) -> None:
    """Run both passes for every segment of a work list.

    Args:
        query: ``[tokens, heads, head_dim]``, fp16, bf16 (fp32 in the interpreter).
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, any strides of
            whole 16 bytes with the last dimension contiguous; a token's value follows its key.
            Same dtype as ``query``, or float8_e4m3fn, which ``query``'s dtype holds exactly.
        block_table: int32 ``[rows, max_blocks]``.
        work: the segments.
        lists: what the segments visit of their histories.
        regions: means of the request's whole regions, in units of the cache and ``query``'s
            dtype, at least of those in any history here, and the covariances of its spans; what a
            segment does not visit of its history counts as them, several times, see
            :mod:`tuning`. Covariances take the soft cap for linear.
        out: ``[tokens, heads, head_dim]``; only the rows of the segments are written.
        counters: int64 ``[NUM_COUNTERS]``, added to: history tokens visited and eligible
            (summed over queries and heads), tiles, tiles stopped early, and of every
            ``ESTIMATE_EVERY``-th segment the estimated softmax mass of what was not visited,
            summed over queries and heads in ``DROPPED_UNIT``, and how many those are.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        v_scale: what one unit of the cache's values stands for; 1 unless it is fp8.
        stop_threshold: a tile ends once no row's softmax mass grew by this share over the
            last ``stop_step`` tokens; 0 visits whole lists.
        stop_step: tokens between two tests of the threshold, at least two tiles of keys.
        softcap: cap of the scaled scores, 0 for none.
        parts: written to instead of ``out``; without an early stop, and with no estimate of the
            mass that was not visited. Summaries that are each request's own go with it.
        query_e4m3: the same numbers as ``query`` in e4m3, with the same strides, where a layer
            quantises its queries as it does its cache: keys are multiplied as they are then. Not
            in the interpreter; see `tiles.fp8_products`.
        tile: tile shape, see :mod:`tiles`.

    Source: S2O, two passes and early stop; packing the GQA group into a tile and what stands
    for the tokens that are not visited are ours.
    """
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    group = query.shape[1] // kv_heads
    queries_per_tile = tile.block_m // group
    even = kv_cache.stride(0) == page * kv_cache.stride(2)
    shares = 0 if parts is None else parts.mass.shape[2]
    tiles = shares or -(-work.max_queries // queries_per_tile)
    pad = triton.next_power_of_2(head_dim)
    ranked = work.num_items - work.dense_items
    for first, items in ((0, ranked), (ranked, work.dense_items)):
        if items == 0:
            continue
        dense = first == ranked
        slots = history_slots(block_table, work, page) if dense else lists.slots
        _attend_kernel[(tiles, items, kv_heads)](
            query, query if query_e4m3 is None else query_e4m3, kv_cache,
            out if parts is None else parts.out, work.items, slots, lists.lengths, lists.samples,
            regions.means, regions.value_covariances, regions.key_covariances, block_table,
            counters,
            counters if parts is None else parts.mass,
            counters if regions.known is None else regions.known,
            first, scale * LOG2E, v_scale, softcap * LOG2E, stop_threshold,
            query.stride(0), query.stride(1), out.stride(0), out.stride(1),
            kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
            lists.slots.stride(0), lists.slots.stride(1),
            0 if regions.known is None else regions.means.stride(0), regions.means.stride(-3),
            block_table.stride(0),
            GROUP=group, D=head_dim, D_PAD=pad, PAGE=page,
            LIST_PAGE=0 if even else page, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            STOP_STEP=max(2, stop_step // tile.block_n), DENSE=dense,
            EARLY_STOP=stop_threshold > 0 and not dense, SOFTCAP=softcap > 0,
            EVERY=ESTIMATE_EVERY, SAMPLES=ESTIMATE_TOKENS, SAMPLE_STEP=ESTIMATE_STEP,
            DROPPED_PER_ROW=1 / DROPPED_UNIT, PARTS=shares,
            REGION=regions.region_tokens, LIFT_LEAST=math.log2(REGION_WEIGHT),
            LIFT_SPREAD=REGION_VARIANCE, LIFT_MOST=math.log2(REGION_WEIGHT_LIMIT),
            LIFT_BLOCK=min(pad, 64 if query_e4m3 is None else 32),
            SLOPE_BLOCK=pad if pad <= 128 else 32, E4M3=query_e4m3 is not None,
            PRECISION=input_precision(query.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.registers,
        )  # fmt: skip


def history_slots(block_table: torch.Tensor, work: WorkList, page: int) -> torch.Tensor:
    """Return the slots of the longest history that is visited as it is: int32, first to last."""
    blocks = block_table[work.row, : -(-work.max_dense // page), None]
    return (blocks * page + torch.arange(page, dtype=torch.int32, device=blocks.device)).flatten()
