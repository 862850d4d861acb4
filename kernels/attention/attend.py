"""Attend: two passes over a paged cache, the second over a list of slots.

Pass 1 is dense and causal over the segment itself and starts the online softmax from a stable state
(S2O, section on the two passes). Pass 2 walks a list of physical slots from most to least important
and may stop on measured softmax mass. The list is a page table of one-token pages: keys and values
are never copied or moved. Epilogues attend to summaries of the skipped tokens, and estimate for
some segments how much softmax mass was dropped (ours).
"""

import torch
import triton
import triton.language as tl

from .. import tuning
from ..columns import (
    DENSE_START,
    DROPPED,
    DROPPED_UNITS,
    ELIGIBLE,
    HISTORY,
    LN2,
    NUM_QUERIES,
    QUERY_START,
    ROW,
    SAMPLED,
    SEGMENT_COLUMNS,
    SLOT,
    STOPPED,
    TILES,
    VISITED,
)
from ..layout import LOG2E
from ..selection.selected import SelectedTokens
from ..tiles import AttendTile, input_precision
from ..tuning import ESTIMATE_STEP, STOP_STEP_TOKENS
from ..work_list import WorkList
from .dropped_mass import dropped_mass
from .split_kv import Parts
from .summary_pass import add_regression, log_mass_correction, summary_pass
from .summary_table import Summaries, slot_stride
from .tile_ops import cast, gather_attend, load_rows, online_softmax, scores, soft_cap

EVERY = tl.constexpr(tuning.ESTIMATE_EVERY)
SAMPLES = tl.constexpr(tuning.ESTIMATE_TOKENS)


@triton.jit(do_not_specialize=["first_segment"])
def _attend_kernel(
    queries, cache, output, selected, summaries, p_segments, p_table, stride_table, p_counters,
    first_segment, scale, v_scale, softcap, stop_threshold,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    LIST_PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STOP_STEP: tl.constexpr,
    DENSE: tl.constexpr, SOFTCAP: tl.constexpr, SAMPLE_STEP: tl.constexpr, PARTS: tl.constexpr,
    SUMMARIES: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output = softmax(own | selected | summary | sink scores) (own | ... values | 0).

    One program: BLOCK_M rows (queries x GROUP heads) of one segment and KV head. The first five
    arguments are tuples, taken apart below. With DENSE all segments have one list, the slots of the
    sequence, and visit their history's part of it. With PARTS a segment has one tile, and PARTS
    programs share its list: :class:`split_kv.Parts`. STOP_STEP is 0 without an early stop.
    """
    p_q, p_q_e4m3, p_sinks, stride_q_token, stride_q_head = queries
    p_kv, stride_block, stride_head, stride_token = cache
    p_out, p_lse, stride_o_token, stride_o_head = output
    p_slots, p_lengths, p_samples, p_left, stride_slots_segment, stride_slots_head = selected
    p_means, p_value_cov, p_key_cov, stride_means, stride_covariances = summaries
    # Neighbours in the grid are segments of one head: their lists overlap, and meet in L2.
    i_tile, i_head = tl.program_id(0), tl.program_id(2)
    i_segment = (first_segment + tl.program_id(1)).to(tl.int64)
    kv_heads = tl.num_programs(2)
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    p_segment = p_segments + i_segment * SEGMENT_COLUMNS
    row = tl.load(p_segment + ROW).to(tl.int64)
    query_start = tl.load(p_segment + QUERY_START).to(tl.int64)
    num_queries = tl.load(p_segment + NUM_QUERIES)
    history = tl.load(p_segment + HISTORY)
    o_list = i_segment * 0
    if DENSE:
        dense_start, count = history, history
    else:
        dense_start = tl.load(p_segment + DENSE_START)
        count = tl.load(p_lengths + i_segment * kv_heads + i_head)
        o_list = i_segment * stride_slots_segment + i_head * stride_slots_head
    first = i_tile * QUERIES
    rows = tl.where(count < dense_start, SUMMARIES, 0)
    i_part = 0
    if PARTS:
        i_part = i_tile
        first = 0
        share = tl.cdiv(count, PARTS * BLOCK_N) * BLOCK_N
        o_list += i_part * share
        count = tl.minimum(tl.maximum(count - i_part * share, 0), share)
        rows = tl.where(i_part == 0, rows, 0)
    if first >= num_queries:
        return

    # Slots are read one tile ahead: a gather whose addresses are at hand starts early. The last
    # loop's read ahead is not used after it, or the compiler would load it a second time.
    full = count // BLOCK_N
    tail = count % BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    p_list = p_slots + o_list
    list_slot = tl.load(p_list + o_n, o_n < full * BLOCK_N, 0)
    tail_slot = tl.load(p_list + full * BLOCK_N + o_n, o_n < tail, 0)

    o_row = tl.arange(0, BLOCK_M)
    o_query = first + o_row // GROUP
    m_row = (o_row < QUERIES * GROUP) & (o_query < num_queries)
    o_d = tl.arange(0, D_PAD)
    # Within a segment 32 bits do: these take registers until the output is stored.
    p_q += query_start * stride_q_token + (i_head * GROUP).to(tl.int64) * stride_q_head
    o_q = o_query * stride_q_token + o_row % GROUP * stride_q_head
    q = load_rows(p_q, o_q, m_row, o_d, True, D, D_PAD)
    # The operand for keys. Loaded a second time and not converted: the tensor core then finds it in
    # shared memory, which takes no registers.
    q_k = q
    if p_q_e4m3 is not None:
        p_q_e4m3 += query_start * stride_q_token + (i_head * GROUP).to(tl.int64) * stride_q_head
        q_k = load_rows(p_q_e4m3, o_q, m_row, o_d, True, D, D_PAD)

    # Before anything is visited: registers are free here.
    correction = tl.zeros([BLOCK_M], tl.float32)
    if SUMMARIES > 0 and rows > 0:
        p_key_cov += tl.load(p_segment + SLOT).to(tl.int64) * stride_covariances
        p_key_cov += i_head.to(tl.int64) * (D * D)
        correction = log_mass_correction(
            q, p_q, o_q, m_row, p_key_cov, o_d, scale, D, D_PAD, KEY_BLOCK, PRECISION
        )
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    if p_sinks is not None:
        # As if a token without a value came first: the loops take no more registers.
        sink = tl.load(p_sinks + i_head * GROUP + o_row % GROUP).to(tl.float32) / LN2
        mass += 1.0
        m = sink
        if PARTS:  # the first part has it; a mass of 1 at a maximum of -inf is none
            m = tl.where(i_part == 0, sink, float("-inf"))
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    p_k = p_kv + i_head.to(tl.int64) * stride_head
    p_v = p_k + D

    # Pass 1: dense and causal, from dense_start to the tile's last query.
    end = history + tl.max(tl.where(m_row, o_query, 0)) + 1
    if PARTS:  # the first part has the dense pass
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
        v = cast(load_rows(p_v, o_kv, m_n, o_d, True, D, D_PAD), q.dtype)
        s = scores(q, q_k, k, PRECISION)
        own_scale = scale
        if SOFTCAP:
            s = soft_cap(s * scale, softcap)
            own_scale = 1.0
        s = tl.where(position[None, :] <= history + o_query[:, None], s, float("-inf"))
        m, mass, acc = online_softmax(s, v, m, mass, acc, own_scale, PRECISION)

    # Pass 2: the selected slots, each visible to every query of the segment.
    seen = 0
    # fp16 has no room for probabilities over a maximum that later scores exceed.
    FROZEN: tl.constexpr = p_q.dtype.element_ty != tl.float16
    m_before, mass_before = m, mass
    if FROZEN and full > 0:
        ahead = tl.load(p_list + tl.minimum(1, full - 1) * BLOCK_N + o_n)
        m, mass, acc = gather_attend(
            q, q_k, p_k, p_v, list_slot, m, mass, acc, o_d, scale, softcap,
            stride_block, stride_token, LIST_PAGE, D, D_PAD, SOFTCAP, PRECISION, False,
        )  # fmt: skip
        list_slot = ahead
        seen = 1
        mass_before *= tl.exp2(m_before - m)
        m_before = m
    if STOP_STEP > 0:
        while seen < full:
            stop = tl.minimum((seen // STOP_STEP + 1) * STOP_STEP, full)
            for tile in range(seen, stop):
                ahead = tl.load(p_list + tl.minimum(tile + 1, full - 1) * BLOCK_N + o_n)
                m, mass, acc = gather_attend(
                    q, q_k, p_k, p_v, list_slot, m, mass, acc, o_d, scale, softcap,
                    stride_block, stride_token, LIST_PAGE, D, D_PAD, SOFTCAP, PRECISION, FROZEN,
                )  # fmt: skip
                list_slot = ahead
            seen = stop
            # The largest relative gain of any row decides: no row is cut while it gains.
            if not FROZEN:
                mass_before *= tl.exp2(m_before - m)
                m_before = m
            if stop % STOP_STEP == 0:
                # Without a division: its registers are those that let products overlap.
                grown = m_row & (mass - mass_before >= stop_threshold * mass)
                if tl.max(grown.to(tl.int32)) == 0:
                    full = stop
                    tail = 0
            mass_before = mass
    else:
        for tile in range(seen, full):
            ahead = tl.load(p_list + tl.minimum(tile + 1, full - 1) * BLOCK_N + o_n)
            m, mass, acc = gather_attend(
                q, q_k, p_k, p_v, list_slot, m, mass, acc, o_d, scale, softcap,
                stride_block, stride_token, LIST_PAGE, D, D_PAD, SOFTCAP, PRECISION, FROZEN,
            )  # fmt: skip
            list_slot = ahead
        seen = full
    visited = seen * BLOCK_N + tail

    slot = tl.load(p_segment + SLOT).to(tl.int64)
    p_means += slot * stride_means + i_head.to(tl.int64) * (SUMMARIES * 2 * D)
    if p_left is not None:
        p_left += (i_segment * kv_heads + i_head) * SUMMARIES
    m, mass, tokens, acc = summary_pass(
        q, p_k, p_means, p_left, tail_slot, tail, rows, correction, m, mass, acc,
        o_n, o_d, scale, softcap, stride_block, stride_token, LIST_PAGE, D, D_PAD, BLOCK_N, SOFTCAP,
        PRECISION,
    )  # fmt: skip

    if PARTS:
        mass = tl.maximum(mass, 1e-37)  # of a part without tokens
    unit = 1.0 / mass
    if SUMMARIES > 0 and rows > 0:
        p_value_cov += slot * stride_covariances + i_head.to(tl.int64) * (D * D)
        # The regression weight of a row: its share of mass on summaries times the natural scale. It
        # divides the other summand, so that queries are multiplied as they are at hand.
        weight = tl.maximum((1.0 - tokens * unit) * (scale * LN2), 1e-20)
        acc *= (unit / weight)[:, None]
        acc = add_regression(
            acc, q, p_q, o_q, m_row, p_value_cov, o_d, D, D_PAD, VALUE_BLOCK, PRECISION
        )
        unit = weight
    acc *= unit[:, None]
    if p_kv.dtype.element_ty != p_q.dtype.element_ty:  # a quantised cache
        acc *= v_scale
    if PARTS:
        o_part = ((i_segment * kv_heads + i_head) * PARTS + i_part) * GROUP
        tl.store(p_lse + o_part + o_row, m + tl.log2(mass), m_row)
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
    if i_segment % EVERY == 0:
        if (dense_start > 0) & (not DENSE):
            p_sample = p_samples + (i_segment // EVERY * kv_heads + i_head) * SAMPLES
            dropped = dropped_mass(
                q, q_k, p_k, p_table, p_sample, visited, dense_start,
                m, tokens, o_n, o_d, scale, softcap, stride_block, stride_token,
                PAGE, D, D_PAD, BLOCK_N, SAMPLES, SAMPLE_STEP, SOFTCAP, PRECISION,
            )  # fmt: skip
            dropped = tl.sum(tl.where(m_row, dropped, 0.0)) * DROPPED_UNITS
            tl.atomic_add(p_counters + DROPPED, (dropped + 0.5).to(tl.int64))
        tl.atomic_add(p_counters + SAMPLED, rows)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    selected: SelectedTokens,
    summaries: Summaries,
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
    sinks: torch.Tensor | None = None,
    tile: AttendTile,
    dense_tile: AttendTile | None = None,
) -> None:
    """Run both passes for every segment of a work list.

    Args:
        query: ``[tokens, heads, head_dim]``, fp16, bf16 (fp32 in the interpreter).
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, any strides of
            whole 16 bytes with the last dimension contiguous; a token's value follows its key.
            Same dtype as ``query``, or float8_e4m3fn, which ``query``'s dtype holds exactly.
        block_table: int32 ``[rows, max_blocks]``.
        work: the segments.
        selected: the tokens that the segments visit of their histories.
        summaries: of the segments' histories. They stand for the tokens that a list leaves out,
            if ``selected`` says how many, and take the soft cap for linear.
        out: ``[tokens, heads, head_dim]``; only the rows of the segments are written.
        counters: int64 ``[NUM_COUNTERS]``, added to; see :mod:`layout`.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        v_scale: what one unit of the cache's values stands for; 1 unless it is fp8.
        stop_threshold: a tile ends once no row's softmax mass grew by this share over the
            last ``stop_step`` tokens; 0 visits whole lists.
        stop_step: tokens between two tests of the threshold, at least two tiles of keys.
        softcap: cap of the scaled scores, 0 for none.
        parts: written to instead of ``out``; without an early stop, and with no estimate of the
            dropped mass. Summaries that are each request's own go with it.
        query_e4m3: the same numbers as ``query`` in e4m3, with the same strides, where a layer
            quantises its queries as it does its cache: both operands of the scores are e4m3 then.
            Not in the interpreter; see `tiles.fp8_products`.
        sinks: ``[heads]``, any float dtype, contiguous: the logit of each head's attention sink, a
            natural logarithm that joins the softmax's denominator and has no value.
        tile: tile shape, see :mod:`tiles`.
        dense_tile: that of dense segments; by default the same.

    Source: S2O, two passes and early stop; packing the GQA group into a tile and the summaries are
    ours.
    """
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    group = query.shape[1] // kv_heads
    contiguous = kv_cache.stride(0) == page * kv_cache.stride(2)
    shares = 0 if parts is None else parts.lse.shape[2]
    pad = triton.next_power_of_2(head_dim)
    left, means, covariances = selected.left, summaries.means, summaries.value_covariances
    ranked = work.num_segments - work.dense_segments
    for first, count in ((0, ranked), (ranked, work.dense_segments)):
        if count == 0:
            continue
        dense = first == ranked
        stops = stop_threshold > 0 and not dense
        if dense:
            tile = dense_tile or tile
        tiles = shares or -(-work.max_queries // (tile.block_m // group))
        slots = history_slots(block_table, work, page) if dense else selected.slots
        _attend_kernel[(tiles, count, kv_heads)](
            (query, query_e4m3, sinks, query.stride(0), query.stride(1)),
            (kv_cache, kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2)),
            (*((out, None) if parts is None else parts), out.stride(0), out.stride(1)),
            (slots, selected.lengths, selected.samples, None if dense else left,
             selected.slots.stride(0), selected.slots.stride(1)),
            (means, covariances, summaries.key_covariances, slot_stride(means),
             slot_stride(covariances)),
            work.segments, block_table, block_table.stride(0), counters,
            first, scale * LOG2E, v_scale, softcap * LOG2E, stop_threshold,
            GROUP=group, D=head_dim, D_PAD=pad, PAGE=page, LIST_PAGE=0 if contiguous else page,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            STOP_STEP=max(2, stop_step // tile.block_n) if stops else 0,
            DENSE=dense, SOFTCAP=softcap > 0, SAMPLE_STEP=ESTIMATE_STEP, PARTS=shares,
            SUMMARIES=0 if dense or left is None else left.shape[2],
            KEY_BLOCK=min(pad, 64 if query_e4m3 is None else 32),
            VALUE_BLOCK=pad if pad <= 128 else 8192 // pad, PRECISION=input_precision(query.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.registers,
        )  # fmt: skip


def history_slots(block_table: torch.Tensor, work: WorkList, page: int) -> torch.Tensor:
    """Return the physical slots of the longest history that is visited whole, first to last.

    Args:
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        page: tokens of a block.

    Returns:
        int32 ``[>= work.max_dense]``, whole blocks.
    """
    blocks = block_table[work.row, : -(-work.max_dense // page), None]
    return (blocks * page + torch.arange(page, dtype=torch.int32, device=blocks.device)).flatten()
