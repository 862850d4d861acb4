"""Rank by every query against a low-rank image of the keys (ours; see :mod:`basis`).

A token's score in a list is the largest log-probability that any query of the segment gives
it, in the image. A mean query cannot see keys that single queries want; this can.
"""

import torch
import triton
import triton.language as tl

from . import basis
from .fit import FitWorkspace, fit
from .plan import CHUNK, COLUMNS, FITS, WorkList

BLOCK_M = 256  # rows (queries x group) at a time: a segment of 64 with a group of 4
BLOCK_N = 64


@triton.jit(do_not_specialize=["row"])
def _project_keys_kernel(
    p_kv, p_table, p_b, p_offset, p_images, p_fits, row,
    stride_block, stride_head, stride_token, stride_table, stride_images_fit, stride_images_head,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Images of BLOCK keys of one head by one basis: k B − offset."""
    # Neighbours in the grid read the same keys.
    i_fit, i_block, i_head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.load(p_fits + 3 * i_fit + 2)
    if i_block * BLOCK >= n:
        return
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, D_PAD)
    o_r = tl.arange(0, WIDTH)
    m_n = o_n < n
    p_table += row.to(tl.int64) * stride_table
    page = tl.load(p_table + o_n // PAGE, m_n, 0).to(tl.int64)
    o_k = page * stride_block + (o_n % PAGE) * stride_token + i_head * stride_head
    k = tl.load(p_kv + o_k[:, None] + o_d[None, :], m_n[:, None] & (o_d < D)[None, :], 0.0)
    i_basis = i_fit * tl.num_programs(2) + i_head
    b = tl.load(p_b + (i_basis * D + o_d[:, None]) * WIDTH + o_r[None, :], (o_d < D)[:, None], 0.0)
    offset = tl.load(p_offset + i_basis * WIDTH + o_r)
    image = tl.dot(k, b, input_precision=PRECISION) - offset[None, :]
    image = tl.minimum(tl.maximum(image, -LIMIT), LIMIT)
    p_images += i_fit.to(tl.int64) * stride_images_fit + i_head * stride_images_head
    tl.store(
        p_images + o_n[:, None] * WIDTH + o_r[None, :], image.to(p_images.dtype.element_ty),
        m_n[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["chunk_start"])
def _project_queries_kernel(
    p_q, p_a, p_curvature, p_images, p_fits, chunk_start, stride_q_token, stride_q_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    RANK: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR_0: tl.constexpr, FACTOR_1: tl.constexpr, FACTOR_2: tl.constexpr,
):  # fmt: skip
    """Images of BLOCK rows (queries x group) of one KV head, ending with the row's shift."""
    i_block, i_head, i_fit = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(p_fits + 3 * i_fit)
    rows = tl.load(p_fits + 3 * i_fit + 1) * GROUP
    if i_block * BLOCK >= rows:
        return
    heads = tl.num_programs(1) * GROUP
    o_row = i_block * BLOCK + tl.arange(0, BLOCK)
    m_row = o_row < rows
    query = (start + o_row // GROUP).to(tl.int64)
    head = i_head * GROUP + o_row % GROUP
    o_d = tl.arange(0, D_PAD)
    o_r = tl.arange(0, WIDTH)
    o_q = query * stride_q_token + head * stride_q_head
    q = tl.load(p_q + o_q[:, None] + o_d[None, :], m_row[:, None] & (o_d < D)[None, :], 0.0)
    i_basis = i_fit * tl.num_programs(1) + i_head
    a = tl.load(p_a + (i_basis * D + o_d[:, None]) * WIDTH + o_r[None, :], (o_d < D)[:, None], 0.0)
    image = tl.dot(q, a, input_precision=PRECISION)
    o_square = tl.arange(0, WIDTH)[:, None] * WIDTH + o_r[None, :]
    curvature = tl.load(p_curvature + i_basis * WIDTH * WIDTH + o_square)
    left = tl.sum(tl.dot(image, curvature, input_precision="ieee") * image, 1)
    image = tl.minimum(tl.maximum(image, -LIMIT), LIMIT)
    kind: tl.constexpr = p_images.dtype.element_ty
    for place in tl.static_range(3):
        factor = FACTOR_0 if place == 0 else (FACTOR_1 if place == 1 else FACTOR_2)
        part = tl.minimum(left / factor, LIMIT).to(kind).to(tl.float32)
        left -= part * factor
        image = tl.where(o_r[None, :] == RANK + place, -part[:, None], image)
    o_image = ((query - chunk_start) * heads + head) * WIDTH
    tl.store(p_images + o_image[:, None] + o_r[None, :], image.to(kind), m_row[:, None])


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


@triton.jit(do_not_specialize=["chunk_start"])
def _score_kernel(
    p_queries, p_images, p_items, p_scores, p_bounds, chunk_start,
    stride_images_fit, stride_images_head, stride_scores_item, stride_scores_head, max_chunks,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ITEM_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Largest product of a segment's rows with each key of a chunk, and the chunk's bounds."""
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    i_item = tl.program_id(2).to(tl.int64)
    p_item = p_items + i_item * ITEM_COLUMNS
    first_query = tl.load(p_item + 1) - chunk_start
    rows = tl.load(p_item + 2) * GROUP
    n = tl.load(p_item + 4)
    start = i_chunk * CHUNK
    if start >= n:
        return
    heads = tl.num_programs(1) * GROUP
    o_r = tl.arange(0, WIDTH)
    o_block = tl.arange(0, BLOCK_N)
    i_fit = tl.load(p_item + 6).to(tl.int64)
    p_images += i_fit * stride_images_fit + i_head.to(tl.int64) * stride_images_head
    p_scores += i_item * stride_scores_item + i_head * stride_scores_head
    p_bounds += 2 * ((i_item * tl.num_programs(1) + i_head) * max_chunks + i_chunk)
    end = tl.minimum(start + CHUNK, n)
    full = start + (end - start) // BLOCK_N * BLOCK_N
    for first in range(0, rows, BLOCK_M):
        # What is too much of a block repeats the last row, which the maximum does not see.
        o_m = tl.minimum(first + tl.arange(0, BLOCK_M), rows - 1)
        o_query = (first_query + o_m // GROUP).to(tl.int64)
        o_vector = o_query * heads + i_head * GROUP + o_m % GROUP
        q = tl.trans(tl.load(p_queries + o_vector[:, None] * WIDTH + o_r[None, :]))
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


class LowRankWorkspace:
    """Scratch of :func:`low_rank_scores`: bases, images of a history and of a chunk's queries."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_history: int,
        max_queries: int,
        dtype: torch.dtype,
        device: torch.device,
        image_dtype: torch.dtype | None = None,
    ):
        kind = image_dtype or basis.image_dtype(device)
        self.fit = FitWorkspace(kv_heads, head_dim, dtype, device)
        shape = (FITS, kv_heads, max_history, basis.WIDTH)
        self.images = torch.empty(shape, dtype=kind, device=device)
        self.queries = torch.empty(max_queries, heads, basis.WIDTH, dtype=kind, device=device)


def project(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    space: LowRankWorkspace,
) -> None:
    """Project the queries of a work list's chunk and the keys they see by the fitted bases."""
    fitted = space.fit
    head_dim, page, kv_heads = query.shape[2], kv_cache.shape[2], kv_cache.shape[1]
    group = query.shape[1] // kv_heads
    fits = work.fits.shape[0]
    shape = {
        "D": head_dim,
        "D_PAD": triton.next_power_of_2(head_dim),
        "WIDTH": basis.WIDTH,
        "LIMIT": torch.finfo(space.images.dtype).max,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    block = 64
    _project_keys_kernel[(fits, -(-work.max_fit_history // block), kv_heads)](
        kv_cache, block_table, fitted.b, fitted.offset, space.images, work.fits, work.row,
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0),
        space.images.stride(0), space.images.stride(1), PAGE=page, BLOCK=block, **shape,
    )  # fmt: skip
    _project_queries_kernel[(-(-work.max_fit_queries * group // block), kv_heads, fits)](
        query, fitted.a, fitted.curvature, space.queries, work.fits,
        work.chunk_start, query.stride(0), query.stride(1), GROUP=group, RANK=basis.RANK,
        BLOCK=block, FACTOR_0=basis.SHIFT_FACTORS[0], FACTOR_1=basis.SHIFT_FACTORS[1],
        FACTOR_2=basis.SHIFT_FACTORS[2], **shape,
    )  # fmt: skip


def low_rank_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    scores: torch.Tensor,
    bounds: torch.Tensor,
    space: LowRankWorkspace,
    *,
    scale: float,
    chunk: int = CHUNK,
) -> None:
    """Score every item's history, one score per KV head and token.

    The first list of a chunk prepares ``space`` for the other ones: they must follow in order.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        scores: float16 ``[items, kv_heads, max_history]``; written up to each item's
            ``dense_start``: the largest over the segment's queries and the group's heads of the
            estimated log2-probability, up to a constant.
        bounds: float32 ``[items * kv_heads, chunks, 2]``: best and worst score of each chunk.
        space: scratch.
        scale: softmax scale.
        chunk: history tokens of a program.
    """
    if work.max_fit_history == 0:
        return
    if work.first_of_chunk:
        fit(query, kv_cache, block_table, work, space.fit, scale=scale)
        project(query, kv_cache, block_table, work, space)
    if work.max_history == 0:
        return
    kv_heads = kv_cache.shape[1]
    images = space.images
    _score_kernel[(-(-work.max_history // chunk), kv_heads, work.num_items)](
        space.queries, images, work.items, scores, bounds, work.chunk_start,
        images.stride(0), images.stride(1), scores.stride(0), scores.stride(1), bounds.shape[1],
        GROUP=query.shape[1] // kv_heads, WIDTH=basis.WIDTH,
        CHUNK=chunk, BLOCK_M=BLOCK_M, BLOCK_N=min(BLOCK_N, chunk),
        ITEM_COLUMNS=COLUMNS, STAGES=3, num_warps=4,
    )  # fmt: skip
