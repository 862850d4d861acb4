"""Find retrieval heads on the device; :mod:`retrieval` says what they are."""

import torch
import triton
import triton.language as tl

from ..columns import DENSE_START, NUM_QUERIES, QUERY_START, SEGMENT_COLUMNS
from ..layout import LOG2E
from ..tiles import input_precision
from ..work_list import WorkList
from . import basis, retrieval
from .keys import load_keys
from .workspace import PrefillRanking

SPAN = 2048  # keys of a program, half of which count

SEGMENTS = tl.constexpr(retrieval.SEGMENTS)
STRIDE = tl.constexpr(retrieval.STRIDE)
PROBES = tl.constexpr(retrieval.PROBES)
BLOCK_N = tl.constexpr(retrieval.BLOCK)
LEAST = tl.constexpr(retrieval.LEAST)
UNIT = tl.constexpr(retrieval.UNIT)
FACTOR_0, FACTOR_1, FACTOR_2 = (tl.constexpr(factor) for factor in basis.SHIFT_FACTORS)


@triton.jit(do_not_specialize=["row", "segments"])
def _sought_kernel(
    p_q, p_kv, p_table, p_means, p_chosen, p_rows, p_segments, p_sought,
    row, segments, max_rows, unit, stride_q_token, stride_q_head,
    stride_block, stride_head, stride_token, stride_table,
    SHARE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    ROW_STEP: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    SPAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sought[head] += 2 UNIT sum over far keys k, segments of max over probes q of p(q, k).

    p(q, k) = min(1, 2^(unit q.(k - mean key) - log-sum-exp)), of every second block of keys. One
    stage: Triton 3.6 sets no fence between asynchronous copies and wgmma.
    """
    i_span, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    o_d = tl.arange(0, D_PAD)
    # Columns of the product: a segment's probes one after the other.
    column = tl.arange(0, SEGMENTS * PROBES)
    segment = tl.minimum(column // PROBES * STRIDE, segments - 1).to(tl.int64)
    p_segment = p_segments + segment * SEGMENT_COLUMNS
    o_i = tl.arange(0, SEGMENTS)
    number = tl.minimum(o_i * STRIDE, segments - 1)
    far = tl.load(p_segments + number * SEGMENT_COLUMNS + DENSE_START) - RECENT
    end = tl.minimum((i_span + 1) * SPAN, tl.max(far))
    if i_span * SPAN >= end:
        return
    # A dense segment has no probes; none of its keys are far.
    ranked = tl.load(p_segment + DENSE_START) > 0
    probes = tl.cdiv(tl.load(p_segment + NUM_QUERIES), ROW_STEP)
    o_row = (segment * heads + i_head) * max_rows + tl.minimum(column % PROBES, probes - 1)
    query = tl.load(p_segment + QUERY_START) + tl.load(p_chosen + o_row, ranked, 0)
    o_q = query.to(tl.int64) * stride_q_token + i_head * stride_q_head
    m_q = ranked[:, None] & (o_d < D)[None, :]
    q = tl.load(p_q + o_q[:, None] + o_d[None, :], m_q, 0.0)
    mean = tl.load(p_means + i_head * D_PAD + o_d, o_d < D, 0.0)
    p_row = p_rows + o_row * WIDTH + WIDTH - 3
    shift = tl.load(p_row, ranked, 0.0).to(tl.float32) * FACTOR_0
    shift += tl.load(p_row + 1, ranked, 0.0).to(tl.float32) * FACTOR_1
    shift += tl.load(p_row + 2, ranked, 0.0).to(tl.float32) * FACTOR_2
    shift -= unit * tl.sum(q.to(tl.float32) * mean[None, :], 1)
    p_kv += i_head // SHARE * stride_head
    p_table += row.to(tl.int64) * stride_table
    total = tl.zeros([BLOCK_N, SEGMENTS], tl.float32)
    token = i_span * SPAN + tl.arange(0, BLOCK_N)
    page = tl.load(p_table + token // PAGE, token < end, 0)
    k = load_keys(p_kv, page, token, o_d, end, stride_block, stride_token, PAGE, D)
    for _ in tl.range(i_span * SPAN, end, 2 * BLOCK_N, num_stages=1):
        # Prefetch the next keys.
        o_ahead = token + 2 * BLOCK_N
        page = tl.load(p_table + o_ahead // PAGE, o_ahead < end, 0)
        ahead = load_keys(p_kv, page, o_ahead, o_d, end, stride_block, stride_token, PAGE, D)
        s = tl.dot(k.to(q.dtype), tl.trans(q), input_precision=PRECISION) * unit + shift[None, :]
        most = tl.max(tl.reshape(s, [BLOCK_N, SEGMENTS, PROBES]), 2)
        mass = tl.exp2(tl.minimum(most, 0.0))
        counts = (token[:, None] >= SINK) & (token[:, None] < far[None, :]) & (mass > LEAST)
        total += tl.where(counts, mass, 0.0)
        token = o_ahead
        k = ahead
    tl.atomic_add(p_sought + i_head, (tl.sum(total) * (2 * UNIT)).to(tl.int32))


@triton.jit(do_not_specialize=["least"])
def _pick_kernel(
    p_sought, p_numbers, least,
    SHARE: tl.constexpr, SHARE_PAD: tl.constexpr,
    CAPACITY: tl.constexpr, CAPACITY_PAD: tl.constexpr,
):  # fmt: skip
    """numbers[KV head, place] = its head that seeks most, second most, …; -1 below ``least``.

    Of heads that seek equally much the first comes first.
    """
    i_head = tl.program_id(0)
    o, o_p = tl.arange(0, SHARE_PAD), tl.arange(0, CAPACITY_PAD)
    p_sought += i_head * SHARE + o
    sought = tl.load(p_sought, o < SHARE, -1)
    before = (sought[None, :] > sought[:, None]) | (
        (sought[None, :] == sought[:, None]) & (o[None, :] < o[:, None])
    )
    place = tl.sum(before.to(tl.int32), 1)
    here = (place[None, :] == o_p[:, None]) & (sought >= least)[None, :]
    number = tl.sum(tl.where(here, i_head * SHARE + o[None, :] + 1, 0), 1) - 1
    tl.store(p_numbers + i_head * CAPACITY + o_p, number, o_p < CAPACITY)
    tl.debug_barrier()
    tl.store(p_sought, tl.zeros([SHARE_PAD], tl.int32), o < SHARE)


def find_heads(
    query: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, work: WorkList,
    space: PrefillRanking, sought: torch.Tensor, numbers: torch.Tensor, *, scale: float,
) -> None:  # fmt: skip
    """Find the retrieval heads of a chunk, from its first list.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: the segments.
        space: the mean keys of each head's basis, its probes and their log-sum-exps.
        sought: int32 ``[heads]``, zeros before and after; scratch.
        numbers: int32 ``[kv_heads * capacity]``, written to: the retrieval heads of each KV head,
            those that seek most first, then -1.
        scale: softmax scale, times what one unit of the cache's keys stands for.
    """
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    heads, width = query.shape[1], space.rows.shape[3]
    _sought_kernel[(-(-work.max_history // SPAN), heads)](
        query, kv_cache, block_table, space.fit.means, space.chosen, space.rows, work.segments,
        sought, work.row, work.num_segments, space.rows.shape[2], scale * LOG2E,
        query.stride(0), query.stride(1), kv_cache.stride(0), kv_cache.stride(1),
        kv_cache.stride(2), block_table.stride(0), SHARE=heads // kv_heads, D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim), PAGE=page, ROW_STEP=space.row_step, WIDTH=width,
        SINK=retrieval.SINK, RECENT=retrieval.RECENT, SPAN=SPAN,
        PRECISION=input_precision(query.dtype),
    )  # fmt: skip
    pick(sought, numbers, kv_heads, retrieval.least())


def pick(sought: torch.Tensor, numbers: torch.Tensor, kv_heads: int, least: int) -> None:
    """Pick the heads that seek ``least`` or more.

    Args:
        sought: int32 ``[heads]``; zeros afterwards.
        numbers: int32 ``[kv_heads * capacity]``, see :func:`find_heads`.
        kv_heads: key/value heads.
        least: of what is sought.
    """
    share, capacity = sought.numel() // kv_heads, numbers.numel() // kv_heads
    _pick_kernel[(kv_heads,)](
        sought, numbers, least, SHARE=share, SHARE_PAD=triton.next_power_of_2(share),
        CAPACITY=capacity, CAPACITY_PAD=triton.next_power_of_2(capacity), num_warps=1,
    )  # fmt: skip
