"""Rank by every query against a low-rank image of the keys (ours; see :mod:`basis`).

A token's score in a list is the largest log-probability that any scored row of the segment gives
it, in the image; a row's mass is told by a sample of its history and by its own segment. A mean
query cannot see keys that single queries want; this can. Rows are queries x heads of a group. One
in ``ROW_STEP`` is scored: half of them evenly spread, the other half those with the largest images,
the queries that are least like others.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from . import basis
from .beside import IN_TURN, Beside
from .fit import FitWorkspace, find_bases, take_moments
from .plan import CHUNK, COLUMNS, FITS, ROW_STEP, WorkList
from .rows import choose_rows, shift_rows
from .tiles import input_precision

if TYPE_CHECKING:
    from .decode import DecodeWorkspace

BLOCK_M = 128  # rows at a time: the scored ones of a segment of 64 with a group of 4
BLOCK_N = 128
SHARING = 2  # neighbouring segments that share a load of images
KEYS_BLOCK = 64  # keys that are projected at a time, and by a program in all
KEYS_SPAN = 512
SCORE_REGISTERS = 96  # of a thread: five blocks share a multiprocessor


@triton.jit
def _load_keys(
    p_kv, p_table, o_n, o_d, end, stride_block, stride_token, PAGE: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Keys of some tokens of a head."""
    m_n = o_n < end
    page = tl.load(p_table + o_n // PAGE, m_n, 0).to(tl.int64)
    o_k = page * stride_block + (o_n % PAGE) * stride_token
    return tl.load(p_kv + o_k[:, None] + o_d[None, :], m_n[:, None] & (o_d < D)[None, :], 0.0)


@triton.jit(do_not_specialize=["row", "fits"])
def _project_keys_kernel(
    p_kv, p_table, p_b, p_offset, p_images, p_fits, row, fits,
    stride_block, stride_head, stride_token, stride_table, stride_images_fit, stride_images_head,
    FITS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Images of SPAN keys of one head by all bases of a chunk: k B − offset.

    The bases of a chunk are twice as much as BLOCK keys: they are read once for all of a span. One
    stage: Triton 3.6 sets no fence between asynchronous copies and wgmma.
    """
    i_span, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D_PAD)
    # One product for all: of a basis WIDTH columns.
    o_c = tl.arange(0, FITS * WIDTH)
    fit = tl.minimum(o_c // WIDTH, fits - 1)
    n = tl.load(p_fits + 3 * fit + 2)
    longest = tl.max(n)
    if i_span * SPAN >= longest:
        return
    i_basis = fit * tl.num_programs(1) + i_head
    o_b = i_basis[None, :] * (D * WIDTH) + o_d[:, None] * WIDTH + (o_c % WIDTH)[None, :]
    b = tl.load(p_b + o_b, (o_d < D)[:, None], 0.0)
    offset = tl.load(p_offset + i_basis * WIDTH + o_c % WIDTH)
    o_image = fit.to(tl.int64) * stride_images_fit + i_head * stride_images_head + o_c % WIDTH
    p_table += row.to(tl.int64) * stride_table
    end = tl.minimum((i_span + 1) * SPAN, longest)
    p_kv += i_head * stride_head
    o_n = i_span * SPAN + tl.arange(0, BLOCK)
    k = _load_keys(p_kv, p_table, o_n, o_d, longest, stride_block, stride_token, PAGE, D)
    for _ in tl.range(i_span * SPAN, end, BLOCK, num_stages=1):
        # The next keys are on their way meanwhile: what they wait for is memory, twice.
        ahead = _load_keys(
            p_kv, p_table, o_n + BLOCK, o_d, end, stride_block, stride_token, PAGE, D
        )
        k = k.to(p_b.dtype.element_ty)
        image = tl.dot(k, b, input_precision=PRECISION) - offset[None, :]
        image = tl.minimum(tl.maximum(image, -LIMIT), LIMIT)
        tl.store(
            p_images + o_n[:, None] * WIDTH + o_image[None, :],
            image.to(p_images.dtype.element_ty),
            (o_n[:, None] < n[None, :]) & (o_c // WIDTH < fits)[None, :],
        )  # fmt: skip
        o_n += BLOCK
        k = ahead


@triton.jit
def _halves(s):
    """Split the columns of [N, M] into the first half and the second."""
    s = tl.reshape(s, [s.shape[0], 2, s.shape[1] // 2])
    return tl.split(tl.permute(s, [0, 2, 1]))


@triton.jit
def _largest(a, b, c, PACKED: tl.constexpr):
    """Return the largest of three, element by element; two to a register if PACKED."""
    if PACKED:
        # Which Hopper has one instruction for. Left to itself the compiler takes two.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 most;
            max.f16x2 most, $1, $2;
            max.f16x2 $0, most, $3;
            }""",
            "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.maximum(tl.maximum(a, b), c)


@triton.jit
def _largest_of_rows(s, FOLDS: tl.constexpr, PACKED: tl.constexpr):
    """Largest of each row of [N, M], M = 2^(FOLDS + 4)."""
    most, rest = _halves(s)
    for _ in tl.static_range(FOLDS):
        first, second = _halves(most)
        third, rest = _halves(rest)
        most = _largest(first, second, third, PACKED)
    return tl.max(tl.maximum(most, rest), 1).to(tl.float16)


@triton.jit
def _score_block(
    q, k, p_scores, o_n, n, again, best, worst,
    MASKED: tl.constexpr, FOLDS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Score a block of keys; return the best and the worst so far."""
    # Keys in rows keep the maximum over queries inside a warp; fp16 sums, of which a register
    # holds two, halve what it costs.
    score = _largest_of_rows(tl.dot(k, q, out_dtype=tl.float16), FOLDS, PACKED)
    m_n = o_n < n
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
def _score_blocks(
    q_first, q_second, p_images, p_first, p_second, o_n, n_first, n_second, o_r, again,
    best_first, worst_first, best_second, worst_second,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr, MASKED: tl.constexpr, FOLDS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Score a block of keys for one item or two; return the best and the worst of each so far."""
    o_k = o_n[:, None] * WIDTH + o_r[None, :]
    if MASKED:
        k = tl.load(p_images + o_k, (o_n < n_first)[:, None], 0.0)
    else:
        k = tl.load(p_images + o_k)
    best_first, worst_first = _score_block(
        q_first, k, p_first, o_n, n_first, again, best_first, worst_first, MASKED, FOLDS, PACKED,
    )  # fmt: skip
    if ITEMS == 2:
        best_second, worst_second = _score_block(
            q_second, k, p_second, o_n, n_second, again, best_second, worst_second,
            MASKED, FOLDS, PACKED,
        )  # fmt: skip
    return best_first, worst_first, best_second, worst_second


@triton.jit
def _load_rows(p_rows, o_list, first, rows, o_m, o_r, WIDTH: tl.constexpr):
    """Images of a block of rows. What is too much of it repeats the last, which no maximum sees."""
    o_row = o_list + tl.minimum(first + o_m, rows - 1)
    return tl.trans(tl.load(p_rows + o_row[:, None] * WIDTH + o_r[None, :]))


@triton.jit(do_not_specialize=["items"])
def _score_kernel(
    p_rows, p_images, p_items, p_scores, p_bounds,
    stride_images_fit, stride_images_head, stride_scores_item, stride_scores_head,
    max_rows, max_chunks, items,
    GROUP: tl.constexpr, ROW_STEP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    ITEMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLDS: tl.constexpr,
    PACKED: tl.constexpr, ITEM_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Largest product of a segment's rows with each key of a chunk, and the chunk's bounds.

    With ITEMS = 2 two neighbouring segments share each load of images, where they share a basis;
    where they do not, each is scored as if it were both.
    """
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    i_item = tl.program_id(2) * ITEMS
    i_last = tl.minimum(i_item + ITEMS, items) - 1
    start = i_chunk * CHUNK
    # Items are sorted by history: the first one sees the most.
    if start >= tl.load(p_items + i_item * ITEM_COLUMNS + 4):
        return
    o_r = tl.arange(0, WIDTH)
    o_block = tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M)
    alike = tl.load(p_items + i_item * ITEM_COLUMNS + 6) == tl.load(
        p_items + i_last * ITEM_COLUMNS + 6
    )
    for i in range(0, tl.where(alike, 1, ITEMS)):
        i_first = (i_item + i).to(tl.int64)
        i_second = tl.where(alike, i_last, i_item + i).to(tl.int64)
        p_item = p_items + i_first * ITEM_COLUMNS
        n_first = tl.load(p_item + 4)
        n_second = tl.load(p_items + i_second * ITEM_COLUMNS + 4)
        rows_first = tl.cdiv(tl.load(p_item + 2) * GROUP, ROW_STEP)
        rows_second = tl.cdiv(tl.load(p_items + i_second * ITEM_COLUMNS + 2) * GROUP, ROW_STEP)
        p_image = p_images + tl.load(p_item + 6).to(tl.int64) * stride_images_fit
        p_image += i_head.to(tl.int64) * stride_images_head
        o_first = i_first * heads + i_head
        o_second = i_second * heads + i_head
        p_first = p_scores + i_first * stride_scores_item + i_head * stride_scores_head
        p_second = p_scores + i_second * stride_scores_item + i_head * stride_scores_head
        end = tl.minimum(start + CHUNK, n_first)
        shared = tl.maximum(tl.minimum(end, n_second) - start, 0)
        full = start + shared // BLOCK_N * BLOCK_N
        for first in range(0, tl.maximum(rows_first, rows_second), BLOCK_M):
            q_first = _load_rows(p_rows, o_first * max_rows, first, rows_first, o_m, o_r, WIDTH)
            q_second = q_first
            if ITEMS == 2:
                q_second = _load_rows(
                    p_rows, o_second * max_rows, first, rows_second, o_m, o_r, WIDTH
                )
            best_first = tl.full([BLOCK_N], float("-inf"), tl.float16)
            worst_first = tl.full([BLOCK_N], float("inf"), tl.float16)
            best_second, worst_second = best_first, worst_first
            for o in tl.range(start, full, BLOCK_N, num_stages=STAGES):
                best_first, worst_first, best_second, worst_second = _score_blocks(
                    q_first, q_second, p_image, p_first, p_second, o + o_block, n_first, n_second,
                    o_r, first > 0,
                    best_first, worst_first, best_second, worst_second,
                    WIDTH, ITEMS, False, FOLDS, PACKED,
                )  # fmt: skip
            for o in tl.range(full, end, BLOCK_N, num_stages=1):
                best_first, worst_first, best_second, worst_second = _score_blocks(
                    q_first, q_second, p_image, p_first, p_second, o + o_block, n_first, n_second,
                    o_r, first > 0,
                    best_first, worst_first, best_second, worst_second,
                    WIDTH, ITEMS, True, FOLDS, PACKED,
                )  # fmt: skip
            if (ITEMS == 2) & (start < n_second):
                o_bound = 2 * (o_second * max_chunks + i_chunk)
                tl.store(p_bounds + o_bound, tl.max(best_second))
                tl.store(p_bounds + o_bound + 1, tl.min(worst_second))
            o_bound = 2 * (o_first * max_chunks + i_chunk)
            tl.store(p_bounds + o_bound, tl.max(best_first))
            tl.store(p_bounds + o_bound + 1, tl.min(worst_first))


class LowRankWorkspace:
    """Scratch of :func:`low_rank_scores`: bases, images of a history and of a list's rows."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_history: int,
        items: int,
        segment: int,
        dtype: torch.dtype,
        device: torch.device,
        image_dtype: torch.dtype | None = None,
    ):
        kind = image_dtype or basis.image_dtype(device)
        self.fit = FitWorkspace(kv_heads, head_dim, dtype, device)
        shape = (FITS, kv_heads, max_history, basis.WIDTH)
        self.images = torch.empty(shape, dtype=kind, device=device)
        rows = -(-segment * (heads // kv_heads) // ROW_STEP)
        self.sizes = torch.empty(items, kv_heads, rows * ROW_STEP, device=device)
        self.chosen = torch.empty(items, kv_heads, rows, dtype=torch.int32, device=device)
        self.rows = torch.empty(items, kv_heads, rows, basis.WIDTH, dtype=kind, device=device)


def project_keys(
    kv_cache: torch.Tensor, block_table: torch.Tensor, work: WorkList, space: LowRankWorkspace
) -> None:
    """Project the keys that a work list's chunk sees by the fitted bases."""
    fitted = space.fit
    head_dim, page, kv_heads = kv_cache.shape[3] // 2, kv_cache.shape[2], kv_cache.shape[1]
    _project_keys_kernel[(-(-work.max_fit_tokens // KEYS_SPAN), kv_heads)](
        kv_cache, block_table, fitted.b, fitted.offset, space.images, work.fits, work.row,
        work.fits.shape[0], kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        block_table.stride(0), space.images.stride(0), space.images.stride(1), FITS=FITS,
        D=head_dim, D_PAD=triton.next_power_of_2(head_dim), PAGE=page, WIDTH=basis.WIDTH,
        BLOCK=KEYS_BLOCK, SPAN=KEYS_SPAN, LIMIT=torch.finfo(space.images.dtype).max,
        PRECISION=input_precision(fitted.b.dtype),
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
    beside: Beside = IN_TURN,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Score every item's history, one score per KV head and token.

    The first list of a chunk prepares ``space`` for the other ones: they must follow in order.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, ``query``'s dtype or fp8.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        scores: float16 ``[items, kv_heads, max_history]``; written up to each item's
            ``dense_start``: the largest log2-probability that any scored row of the segment is
            estimated to give the token.
        bounds: float32 ``[items * kv_heads, chunks, 2]``: best and worst score of each chunk.
        space: scratch.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        chunk: history tokens of a program.
        beside: where some of it runs beside the rest; joined.
        meanwhile: launches what else a chunk with histories needs, and nothing here reads.
    """
    if work.max_fit_tokens == 0:
        return
    if work.first_of_chunk:
        take_moments(query, kv_cache, block_table, work, space.fit)
        with beside:  # of the bases, which fill a quarter of a card
            meanwhile()
        find_bases(work, space.fit, scale=scale)
        with beside:  # of the keys' images, which wait for memory
            choose_rows(query, work, space)
        project_keys(kv_cache, block_table, work, space)
        beside.join()
    if work.max_history == 0:
        return
    if not work.first_of_chunk:
        choose_rows(query, work, space)
    shift_rows(query, work, space)
    score_rows(work, scores, bounds, space, query.shape[1] // kv_cache.shape[1], chunk=chunk)


def score_rows(
    work: WorkList,
    scores: torch.Tensor,
    bounds: torch.Tensor,
    space: "LowRankWorkspace | DecodeWorkspace",
    group: int,
    *,
    row_step: int = ROW_STEP,
    block_m: int = BLOCK_M,
    chunk: int = CHUNK,
    items: int = SHARING,
) -> None:
    """Score histories by the rows and images that ``space`` holds; see :func:`low_rank_scores`.

    Args:
        work: segments of any requests.
        scores: written to.
        bounds: written to.
        space: rows of the segments, and images by an item's fit.
        group: query heads of a KV head.
        row_step: one row of so many is scored.
        block_m: rows at a time.
        chunk: history tokens of a program.
        items: neighbouring segments of a program, one or two; one where no two share a fit.
    """
    images = space.images
    kv_heads = images.shape[1]
    _score_kernel[(-(-work.max_history // chunk), kv_heads, -(-work.num_items // items))](
        space.rows, images, work.items, scores, bounds,
        images.stride(0), images.stride(1), scores.stride(0), scores.stride(1),
        space.rows.shape[2], bounds.shape[1], work.num_items,
        GROUP=group, ROW_STEP=row_step, WIDTH=basis.WIDTH,
        CHUNK=chunk, ITEMS=items, BLOCK_M=block_m, BLOCK_N=min(BLOCK_N, chunk),
        FOLDS=block_m.bit_length() - 5, PACKED=images.device.type != "cpu",
        ITEM_COLUMNS=COLUMNS, STAGES=3, num_warps=4, maxnreg=SCORE_REGISTERS,
    )  # fmt: skip
