"""Find retrieval heads on the device; :mod:`retrieval` says what they are."""

import torch
import triton
import triton.language as tl

from ..columns import DENSE_START, SEGMENT_COLUMNS
from ..work_list import WorkList
from . import retrieval
from .packed_f16 import folded
from .score import load_rows
from .workspace import RankingWorkspace

BLOCK_N = 128
SPAN = 2048  # keys of a program


@triton.jit(do_not_specialize=["segments"])
def _sought_kernel(
    p_rows, p_images, p_segments, p_sought, stride_images, max_rows, segments,
    ROW_STEP: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr, WIDTH: tl.constexpr, FOLDS: tl.constexpr, PACKED: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, LEAST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """sought[head] += UNIT * sum over far keys and segments of max over probes of 2^(row . key).

    Rows end with their log-sum-exp: products are log2-probabilities. One stage: Triton 3.6 sets
    no fence between asynchronous copies and wgmma.
    """
    i_span, i_head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK_M)
    o_r, o_i = tl.arange(0, WIDTH), tl.arange(0, SEGMENTS)
    n = tl.load(p_segments + tl.minimum(o_i, segments - 1) * SEGMENT_COLUMNS + DENSE_START)
    far = tl.where(o_i < segments, n - RECENT, 0)
    end = tl.minimum((i_span + 1) * SPAN, tl.max(far))
    if i_span * SPAN >= end:
        return
    q = load_rows(
        p_rows, p_segments, tl.minimum(column % SEGMENTS, segments - 1), i_head, tl.num_programs(1),
        column // SEGMENTS, max_rows, o_r, 1, ROW_STEP, WIDTH,
    )  # fmt: skip
    p_images += i_head.to(tl.int64) * stride_images
    total = tl.zeros([BLOCK_N, SEGMENTS], tl.float32)
    token = i_span * SPAN + tl.arange(0, BLOCK_N)
    k = tl.load(p_images + token[:, None] * WIDTH + o_r[None, :])
    for o in tl.range(i_span * SPAN, end, BLOCK_N, num_stages=1):
        token = o + tl.arange(0, BLOCK_N)
        o_ahead = (token + BLOCK_N)[:, None] * WIDTH + o_r[None, :]
        ahead = tl.load(p_images + o_ahead, (token + BLOCK_N < end)[:, None], 0.0)
        most = folded(tl.dot(k, q, out_dtype=tl.float16), FOLDS, PACKED)
        # A score is rounded: it may exceed 0.
        mass = tl.exp2(tl.minimum(most.to(tl.float32), 0.0))
        counts = (token[:, None] >= SINK) & (token[:, None] < far[None, :]) & (mass > LEAST)
        total += tl.where(counts, mass, 0.0)
        k = ahead
    tl.atomic_add(p_sought + i_head, (tl.sum(total) * UNIT).to(tl.int32))


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
    work: WorkList, space: RankingWorkspace, sought: torch.Tensor, numbers: torch.Tensor,
    kv_heads: int,
) -> None:  # fmt: skip
    """Find the retrieval heads of a chunk, from its first list.

    Args:
        work: the segments.
        space: images of keys, and of rows that end with their log-sum-exp; a basis a head.
        sought: int32 ``[heads]``, zeros before and after; scratch.
        numbers: int32 ``[kv_heads * capacity]``, written to: the retrieval heads of each KV head,
            those that seek most first, then -1.
        kv_heads: key/value heads.
    """
    images, heads = space.images, space.images.shape[0]
    rows, width = space.rows.shape[2:]
    block_m = retrieval.SEGMENTS * min(retrieval.PROBES, triton.next_power_of_2(rows))
    _sought_kernel[(-(-work.max_history // SPAN), heads)](
        space.rows, images, work.segments, sought, images.stride(0), rows, work.num_segments,
        ROW_STEP=space.row_step, SEGMENTS=retrieval.SEGMENTS, BLOCK_M=block_m, BLOCK_N=BLOCK_N,
        SPAN=SPAN, WIDTH=width, FOLDS=block_m.bit_length() - 5, PACKED=images.device.type != "cpu",
        SINK=retrieval.SINK, RECENT=retrieval.RECENT, LEAST=retrieval.LEAST, UNIT=retrieval.UNIT,
    )  # fmt: skip
    pick(sought, numbers, kv_heads, retrieval.least(work.num_segments))


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
