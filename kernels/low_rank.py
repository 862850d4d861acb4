"""Rank by every query against a low-rank image of the keys (ours; see :mod:`basis`).

A token's score in a list is the largest log-probability that any query of the segment gives
it, in the image. A mean query cannot see keys that single queries want; this can.
"""

import torch
import triton
import triton.language as tl

from . import basis
from .plan import COLUMNS, WorkList

CHUNK = 1024  # history tokens a program
BLOCK_M = 256  # rows (queries x group) at a time: a segment of 64 with a group of 4
BLOCK_N = 128


@triton.jit
def _project_kernel(
    p_kv, p_table, p_b, p_offset, p_images, n,
    stride_block, stride_head, stride_token, stride_images,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Images of BLOCK keys of one head: k B − offset."""
    i_block, i_head = tl.program_id(0), tl.program_id(1)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, D_PAD)
    o_r = tl.arange(0, RANK)
    m_n = o_n < n
    page = tl.load(p_table + o_n // PAGE, m_n, 0).to(tl.int64)
    o_k = page * stride_block + (o_n % PAGE) * stride_token + i_head.to(tl.int64) * stride_head
    k = tl.load(p_kv + o_k[:, None] + o_d[None, :], m_n[:, None] & (o_d < D)[None, :], 0.0)
    o_b = (i_head * D + o_d[:, None]) * RANK + o_r[None, :]
    b = tl.load(p_b + o_b, (o_d < D)[:, None], 0.0)
    offset = tl.load(p_offset + i_head * RANK + o_r)
    image = tl.dot(k, b, input_precision=PRECISION) - offset[None, :]
    o_image = i_head.to(tl.int64) * stride_images + o_n[:, None] * RANK + o_r[None, :]
    tl.store(p_images + o_image, image.to(p_images.dtype.element_ty), m_n[:, None])


@triton.jit
def _score_kernel(
    p_queries, p_shifts, p_images, p_items, p_scores, row_start,
    stride_images, stride_scores_item, stride_scores_head,
    GROUP: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Largest shifted score of a segment's rows for a chunk of keys."""
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    i_item = tl.program_id(2).to(tl.int64)
    p_item = p_items + i_item * ITEM_COLUMNS
    first_query = tl.load(p_item + 1) - row_start
    rows = tl.load(p_item + 2) * GROUP
    n = tl.load(p_item + 4)
    start = i_chunk * CHUNK
    if start >= n:
        return
    heads = tl.num_programs(1) * GROUP
    o_r = tl.arange(0, RANK)
    p_images += i_head.to(tl.int64) * stride_images
    p_scores += i_item * stride_scores_item + i_head * stride_scores_head
    end = tl.minimum(start + CHUNK, n)
    for first in range(0, rows, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        m_m = o_m < rows
        o_query = first_query + o_m // GROUP
        o_vector = o_query.to(tl.int64) * heads + i_head * GROUP + o_m % GROUP
        q = tl.load(p_queries + o_vector[:, None] * RANK + o_r[None, :], m_m[:, None], 0.0)
        shift = tl.load(p_shifts + o_vector, m_m, float("inf"))
        for o in range(start, end, BLOCK_N):
            o_n = o + tl.arange(0, BLOCK_N)
            k = tl.load(p_images + o_n[:, None] * RANK + o_r[None, :], (o_n < n)[:, None], 0.0)
            # Keys in rows: the maximum over queries then stays inside a warp.
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) - shift[None, :]
            best = tl.max(s, 1)
            if first > 0:
                best = tl.maximum(best, tl.load(p_scores + o_n, o_n < n, 0.0))
            tl.store(p_scores + o_n, best, o_n < n)


class LowRankWorkspace:
    """Scratch of :func:`low_rank_scores`: images of a history and of a list's queries."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        max_history: int,
        max_queries: int,
        dtype: torch.dtype,
        device: torch.device,
        rank: int = basis.RANK,
    ):
        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.images = empty(kv_heads, max_history, rank, dtype=dtype)
        self.queries = empty(max_queries, heads, rank, dtype=dtype)
        self.shifts = empty(max_queries, heads, dtype=torch.float32)


def prepare(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    space: LowRankWorkspace,
    *,
    scale: float,
) -> None:
    """Fit the basis of a work list and project its queries and keys."""
    head_dim, page, kv_heads = query.shape[2], kv_cache.shape[2], kv_cache.shape[1]
    rank = space.images.shape[2]
    fitted = basis.fit(*basis.sample(query, kv_cache, block_table, work), rank)
    own = query[work.query_start : work.query_start + work.num_queries]
    images, shifts = basis.project_queries(own, fitted, scale)
    space.queries[: work.num_queries] = images
    space.shifts[: work.num_queries] = shifts
    block = 64
    _project_kernel[(-(-work.max_history // block), kv_heads)](
        kv_cache, block_table[work.row], fitted.b.to(query.dtype), fitted.offset, space.images,
        work.max_history, kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        space.images.stride(0),
        D=head_dim, D_PAD=triton.next_power_of_2(head_dim), PAGE=page, RANK=rank, BLOCK=block,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )  # fmt: skip


def low_rank_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    scores: torch.Tensor,
    space: LowRankWorkspace,
    *,
    scale: float,
) -> None:
    """Score every item's history, one score per KV head and token.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request; one basis serves them all.
        scores: float32 ``[items, kv_heads, max_history]``; written up to each item's
            ``dense_start``: the largest over the segment's queries and the group's heads of the
            estimated log2-probability.
        space: scratch.
        scale: softmax scale.
    """
    if work.max_history == 0:
        return
    prepare(query, kv_cache, block_table, work, space, scale=scale)
    kv_heads = kv_cache.shape[1]
    _score_kernel[(-(-work.max_history // CHUNK), kv_heads, work.num_items)](
        space.queries, space.shifts, space.images, work.items, scores, work.query_start,
        space.images.stride(0), scores.stride(0), scores.stride(1),
        GROUP=query.shape[1] // kv_heads, RANK=space.images.shape[2],
        CHUNK=CHUNK, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        ITEM_COLUMNS=COLUMNS, num_warps=8, num_stages=2,
    )  # fmt: skip
