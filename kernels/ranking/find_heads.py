"""Find retrieval heads on the device; :mod:`retrieval` says what they are."""

import torch
import triton
import triton.language as tl

from ..columns import DENSE_START, NUM_QUERIES, QUERY_START, SEGMENT_COLUMNS
from ..layout import LOG2E
from ..tiles import input_precision
from ..work_list import WorkList
from . import basis, retrieval
from .project import load_keys
from .workspace import PrefillRanking

SPAN = 2048  # keys of a program, half of which count

SEGMENTS = tl.constexpr(retrieval.SEGMENTS)
STRIDE = tl.constexpr(retrieval.STRIDE)
PROBES = tl.constexpr(retrieval.PROBES)
BLOCK_N = tl.constexpr(retrieval.BLOCK)
LEAST = tl.constexpr(retrieval.LEAST)
UNIT = tl.constexpr(retrieval.UNIT)
FACTOR_0, FACTOR_1, FACTOR_2 = (tl.constexpr(factor) for factor in basis.LSE_FACTORS)


@triton.jit(do_not_specialize=["row", "segments"])
def _far_mass_kernel(
    p_q, p_kv, p_table, p_means, p_probe_rows, p_probes, p_segments, p_far_mass,
    row, segments, max_probes, unit, stride_q_token, stride_q_head,
    stride_block, stride_head, stride_token, stride_table,
    SHARE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    PROBE_STEP: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    SPAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """far_mass[head] += 2 UNIT sum over far keys k, segments of max over probes q of p(q, k).

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
    probes = tl.cdiv(tl.load(p_segment + NUM_QUERIES), PROBE_STEP)
    o_row = (segment * heads + i_head) * max_probes + tl.minimum(column % PROBES, probes - 1)
    query = tl.load(p_segment + QUERY_START) + tl.load(p_probe_rows + o_row, ranked, 0)
    o_q = query.to(tl.int64) * stride_q_token + i_head * stride_q_head
    m_q = ranked[:, None] & (o_d < D)[None, :]
    q = tl.load(p_q + o_q[:, None] + o_d[None, :], m_q, 0.0)
    mean = tl.load(p_means + i_head * D_PAD + o_d, o_d < D, 0.0)
    p_lse = p_probes + o_row * WIDTH + WIDTH - 3
    minus_lse = tl.load(p_lse, ranked, 0.0).to(tl.float32) * FACTOR_0
    minus_lse += tl.load(p_lse + 1, ranked, 0.0).to(tl.float32) * FACTOR_1
    minus_lse += tl.load(p_lse + 2, ranked, 0.0).to(tl.float32) * FACTOR_2
    minus_lse -= unit * tl.sum(q.to(tl.float32) * mean[None, :], 1)
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
        s = tl.dot(k.to(q.dtype), tl.trans(q), input_precision=PRECISION)
        s = s * unit + minus_lse[None, :]
        most = tl.max(tl.reshape(s, [BLOCK_N, SEGMENTS, PROBES]), 2)
        mass = tl.exp2(tl.minimum(most, 0.0))
        counts = (token[:, None] >= SINK) & (token[:, None] < far[None, :]) & (mass > LEAST)
        total += tl.where(counts, mass, 0.0)
        token = o_ahead
        k = ahead
    tl.atomic_add(p_far_mass + i_head, (tl.sum(total) * (2 * UNIT)).to(tl.int32))


@triton.jit(do_not_specialize=["least"])
def _pick_kernel(
    p_far_mass, p_heads, least,
    SHARE: tl.constexpr, SHARE_PAD: tl.constexpr,
    CAPACITY: tl.constexpr, CAPACITY_PAD: tl.constexpr,
):  # fmt: skip
    """heads[KV head, i] = its query head of the i-th largest far mass; -1 below ``least``.

    Of heads with equal far mass the first comes first.
    """
    i_head = tl.program_id(0)
    o, o_out = tl.arange(0, SHARE_PAD), tl.arange(0, CAPACITY_PAD)
    p_far_mass += i_head * SHARE + o
    mass = tl.load(p_far_mass, o < SHARE, -1)
    before = (mass[None, :] > mass[:, None]) | (
        (mass[None, :] == mass[:, None]) & (o[None, :] < o[:, None])
    )
    order = tl.sum(before.to(tl.int32), 1)
    here = (order[None, :] == o_out[:, None]) & (mass >= least)[None, :]
    number = tl.sum(tl.where(here, i_head * SHARE + o[None, :] + 1, 0), 1) - 1
    tl.store(p_heads + i_head * CAPACITY + o_out, number, o_out < CAPACITY)
    tl.debug_barrier()
    tl.store(p_far_mass, tl.zeros([SHARE_PAD], tl.int32), o < SHARE)


def find_heads(
    query: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, work: WorkList,
    space: PrefillRanking, far_mass: torch.Tensor, heads: torch.Tensor, *, scale: float,
) -> None:  # fmt: skip
    """Find the retrieval heads of a chunk, from its first list.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: the segments.
        space: the mean keys of each head's basis, its probes and their log-sum-exps.
        far_mass: int32 ``[query heads]``, zeros before and after; scratch.
        heads: int32 ``[kv_heads * capacity]``, written to: the retrieval heads of each KV head,
            in the order of their far mass, then -1.
        scale: softmax scale, times what one unit of the cache's keys stands for.
    """
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    number, (probes, width) = query.shape[1], space.projected_probes.shape[2:]
    _far_mass_kernel[(-(-work.max_history // SPAN), number)](
        query, kv_cache, block_table, space.basis.means, space.probe_rows, space.projected_probes,
        work.segments, far_mass, work.row, work.num_segments, probes, scale * LOG2E,
        query.stride(0), query.stride(1), kv_cache.stride(0), kv_cache.stride(1),
        kv_cache.stride(2), block_table.stride(0), SHARE=number // kv_heads, D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim), PAGE=page, PROBE_STEP=space.probe_step, WIDTH=width,
        SINK=retrieval.SINK, RECENT=retrieval.RECENT, SPAN=SPAN,
        PRECISION=input_precision(query.dtype), num_warps=4 if head_dim <= 256 else 8,
    )  # fmt: skip
    pick(far_mass, heads, kv_heads, retrieval.least())


def pick(far_mass: torch.Tensor, heads: torch.Tensor, kv_heads: int, least: int) -> None:
    """Pick the heads whose far mass is ``least`` or more.

    Args:
        far_mass: int32 ``[query heads]``; zeros afterwards.
        heads: int32 ``[kv_heads * capacity]``, see :func:`find_heads`.
        kv_heads: key/value heads.
        least: far mass, in units of ``1 / retrieval.UNIT``, summed over segments.
    """
    share, capacity = far_mass.numel() // kv_heads, heads.numel() // kv_heads
    _pick_kernel[(kv_heads,)](
        far_mass, heads, least, SHARE=share, SHARE_PAD=triton.next_power_of_2(share),
        CAPACITY=capacity, CAPACITY_PAD=triton.next_power_of_2(capacity), num_warps=1,
    )  # fmt: skip
