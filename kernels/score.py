"""Scores: the largest product of a segment's rows with every image of a key (ours)."""

import torch
import triton
import triton.language as tl

from . import basis
from .plan import CHUNK, COLUMNS, WorkList

BLOCK_M = 128  # rows at a time: half of a segment of 64 with a group of 4
BLOCK_N = 128


@triton.jit
def _score_block(
    q, p_images, p_scores, o_n, n, o_r, again, best, worst,
    WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Score a block of keys; return the best and the worst so far."""
    m_n = o_n < n
    o_k = o_n[:, None] * WIDTH + o_r[None, :]
    k = tl.load(p_images + o_k, m_n[:, None], 0.0) if MASKED else tl.load(p_images + o_k)
    # Keys in rows keep the maximum over queries inside a warp; fp16 sums, of which a register
    # holds two, halve what it costs.
    score = tl.max(tl.dot(k, q, out_dtype=tl.float16), 1).to(tl.float16)
    if again:
        score = tl.maximum(score, tl.load(p_scores + o_n, m_n, 0.0))
    if MASKED:
        tl.store(p_scores + o_n, score, m_n)
        best = tl.maximum(best, tl.where(m_n, score, float("-inf")).to(tl.float16))
        worst = tl.minimum(worst, tl.where(m_n, score, float("inf")).to(tl.float16))
    else:
        tl.store(p_scores + o_n, score)
        best = tl.maximum(best, score)
        worst = tl.minimum(worst, score)
    return best, worst


@triton.jit
def _score_kernel(
    p_rows, p_images, p_items, p_scores, p_bounds,
    stride_images_fit, stride_images_head, stride_scores_item, stride_scores_head,
    max_rows, max_chunks,
    GROUP: tl.constexpr, ROW_STEP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ITEM_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Largest product of a segment's rows with each key of a chunk, and the chunk's bounds."""
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    i_item = tl.program_id(2).to(tl.int64)
    p_item = p_items + i_item * ITEM_COLUMNS
    rows = tl.cdiv(tl.load(p_item + 2) * GROUP, ROW_STEP)
    n = tl.load(p_item + 7)
    start = i_chunk * CHUNK
    if start >= n:
        return
    o_r = tl.arange(0, WIDTH)
    o_block = tl.arange(0, BLOCK_N)
    i_fit = tl.load(p_item + 6).to(tl.int64)
    p_rows += (i_item * tl.num_programs(1) + i_head) * max_rows * WIDTH
    p_images += i_fit * stride_images_fit + i_head.to(tl.int64) * stride_images_head
    p_scores += i_item * stride_scores_item + i_head * stride_scores_head
    p_bounds += 2 * ((i_item * tl.num_programs(1) + i_head) * max_chunks + i_chunk)
    end = tl.minimum(start + CHUNK, n)
    full = start + (end - start) // BLOCK_N * BLOCK_N
    for first in range(0, rows, BLOCK_M):
        # What is too much of a block repeats the last row, which the maximum does not see.
        o_m = tl.minimum(first + tl.arange(0, BLOCK_M), rows - 1)
        q = tl.trans(tl.load(p_rows + o_m[:, None] * WIDTH + o_r[None, :]))
        best = tl.full([BLOCK_N], float("-inf"), tl.float16)
        worst = tl.full([BLOCK_N], float("inf"), tl.float16)
        for o in tl.range(start, full, BLOCK_N, num_stages=STAGES):
            best, worst = _score_block(
                q, p_images, p_scores, o + o_block, n, o_r, first > 0, best, worst,
                WIDTH, False,
            )  # fmt: skip
        if full < end:
            best, worst = _score_block(
                q, p_images, p_scores, full + o_block, n, o_r, first > 0, best, worst,
                WIDTH, True,
            )  # fmt: skip
        tl.store(p_bounds, tl.max(best))
        tl.store(p_bounds + 1, tl.min(worst))


def score(
    work: WorkList,
    rows: torch.Tensor,
    images: torch.Tensor,
    scores: torch.Tensor,
    bounds: torch.Tensor,
    *,
    group: int,
    step: int,
    chunk: int = CHUNK,
) -> None:
    """Score every item's candidates, one score per KV head and token.

    Args:
        work: segments of one request.
        rows: ``[items, kv_heads, most, WIDTH]``, their rows' images.
        images: ``[FITS, kv_heads, tokens, WIDTH]``, of the candidates.
        scores: float16 ``[items, kv_heads, tokens]``; written up to each item's candidates.
        bounds: float32 ``[items * kv_heads, chunks, 2]``: best and worst score of each chunk.
        group: query heads of a KV head.
        step: every how many rows one has an image.
        chunk: tokens of a program.
    """
    _score_kernel[(-(-work.max_history // chunk), rows.shape[1], work.num_items)](
        rows, images, work.items, scores, bounds,
        images.stride(0), images.stride(1), scores.stride(0), scores.stride(1),
        rows.shape[2], bounds.shape[1], GROUP=group, ROW_STEP=step, WIDTH=basis.WIDTH,
        CHUNK=chunk, BLOCK_M=BLOCK_M, BLOCK_N=min(BLOCK_N, chunk),
        ITEM_COLUMNS=COLUMNS, STAGES=3, num_warps=4,
    )  # fmt: skip
