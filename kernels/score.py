"""Score images of keys by those of a segment's chosen rows: the largest product of each key (ours).

See :mod:`low_rank`. Most of a ranking's time goes here, one product of 32 numbers a row and key.
What is left to do per product is half of a maximum of three, for sums are in fp16, two to a
register; what is left per key is done for two segments at a time, whose scores share a register.
"""

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from . import basis
from .packed_f16 import folded
from .plan import CHUNK, COLUMNS, ROW_STEP, WorkList

if TYPE_CHECKING:
    from .decode import DecodeWorkspace
    from .low_rank import LowRankWorkspace

BLOCK_M = 128  # rows at a time: the scored ones of a segment of 64 with a group of 4
BLOCK_N = 128
SHARING = 4  # neighbouring segments of one basis share a load of images: at most so many
SCORE_REGISTERS = 96  # of a thread: five blocks share a multiprocessor


@triton.jit
def _as_pairs(a, b, PACKED: tl.constexpr = False):
    """Put two numbers of fp16 into one of 32 bits."""
    if PACKED:
        # Two elements at a time: left to itself the compiler takes three steps for the second.
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
            "=&r,=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=2,
        )  # fmt: skip
    low = a.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (b.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _of_pairs(pairs):
    """Return both numbers of pairs."""
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    return low, (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _larger_packed(a, b):
    return tl.inline_asm_elementwise(
        "max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _larger(a, b):
    a_first, a_second = _of_pairs(a)
    b_first, b_second = _of_pairs(b)
    return _as_pairs(tl.maximum(a_first, b_first), tl.maximum(a_second, b_second))


@triton.jit
def _smaller(a, b):
    a_first, a_second = _of_pairs(a)
    b_first, b_second = _of_pairs(b)
    return _as_pairs(tl.minimum(a_first, b_first), tl.minimum(a_second, b_second))


@triton.jit
def _extremes(best, worst, a, b, PACKED: tl.constexpr):
    """Fold [N] pairs into the best, [N] others into the worst of each number: [N / 2] pairs."""
    a_first, a_second = tl.split(tl.trans(tl.reshape(a, [2, a.shape[0] // 2])))
    b_first, b_second = tl.split(tl.trans(tl.reshape(b, [2, b.shape[0] // 2])))
    if PACKED:
        best = tl.inline_asm_elementwise(
            """{
            .reg .b32 most;
            max.f16x2 most, $1, $2;
            max.f16x2 $0, most, $3;
            }""",
            "=r,r,r,r", [best, a_first, a_second], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        worst = tl.inline_asm_elementwise(
            """{
            .reg .b32 least;
            min.f16x2 least, $1, $2;
            min.f16x2 $0, least, $3;
            }""",
            "=r,r,r,r", [worst, b_first, b_second], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        return best, worst
    return _larger(_larger(best, a_first), a_second), _smaller(_smaller(worst, b_first), b_second)


@triton.jit
def _largest_of_rows(first, second, FOLDS: tl.constexpr, PACKED: tl.constexpr):
    """Largest of each row of [N, M], M = 2^(FOLDS + 4), of two matrices: pairs."""
    first, second = folded(first, FOLDS, PACKED), folded(second, FOLDS, PACKED)
    if PACKED:
        # What a thread has of a row, then what four threads have: two numbers at a time.
        pairs = tl.reshape(_as_pairs(first, second, True), [first.shape[0], 4, 2])
        one, other = tl.split(pairs)
        return tl.reduce(_larger_packed(one, other), 1, _larger_packed)
    return _as_pairs(tl.max(first, 1).to(tl.float16), tl.max(second, 1).to(tl.float16))


@triton.jit
def _score_pair(
    pair, k, p_scores, o_n, again, best, worst,
    BOTH: tl.constexpr, MASKED: tl.constexpr, FOLDS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Score a block of keys for a pair of items; return pairs of their best and worst so far."""
    q_0, q_1, o_0, o_1, n_0, n_1 = pair
    # Keys in rows keep the maximum over queries inside a warp; fp16 sums, of which a register
    # holds two, halve what it costs.
    score_0 = tl.dot(k, q_0, out_dtype=tl.float16)
    score_1 = score_0
    if BOTH:
        score_1 = tl.dot(k, q_1, out_dtype=tl.float16)
    pairs = _largest_of_rows(score_0, score_1, FOLDS, PACKED)
    score_0, score_1 = _of_pairs(pairs)
    p_0, p_1 = p_scores + o_0 + o_n, p_scores + o_1 + o_n
    m_0, m_1 = o_n < n_0, o_n < n_1
    if again:
        score_0 = tl.maximum(score_0, tl.load(p_0, m_0, 0.0))
        score_1 = tl.maximum(score_1, tl.load(p_1, m_1, 0.0))
        pairs = _as_pairs(score_0, score_1)
    if MASKED:
        tl.store(p_0, score_0, m_0)
        if BOTH:
            tl.store(p_1, score_1, m_1)
        none = float("-inf")
        high = _as_pairs(
            tl.where(m_0, score_0, none).to(tl.float16), tl.where(m_1, score_1, none).to(tl.float16)
        )
        low = _as_pairs(
            tl.where(m_0, score_0, -none).to(tl.float16),
            tl.where(m_1, score_1, -none).to(tl.float16),
        )
        return _extremes(best, worst, high, low, PACKED)
    if BOTH:
        # Together they change threads once.
        tl.store(tl.join(p_0, p_1), tl.join(score_0, score_1))
    else:
        tl.store(p_0, score_0)
    return _extremes(best, worst, pairs, pairs, PACKED)


@triton.jit
def _load_rows(p_rows, o_list, first, rows, o_m, o_r, WIDTH: tl.constexpr):
    """Images of a block of rows. What is too much of it repeats the last, which no maximum sees."""
    o_row = o_list + tl.minimum(first + o_m, rows - 1)
    return tl.trans(tl.load(p_rows + o_row[:, None] * WIDTH + o_r[None, :]))


@triton.jit
def _load_pair(
    p_rows, p_items, i_0, i_1, i_head, first, max_rows, stride_item, o_m, o_r,
    GROUP: tl.constexpr, ROW_STEP: tl.constexpr, WIDTH: tl.constexpr, ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load a block of rows of a pair of items, where their scores are, and their histories."""
    p_0, p_1 = p_items + i_0 * ITEM_COLUMNS, p_items + i_1 * ITEM_COLUMNS
    rows_0 = tl.cdiv(tl.load(p_0 + 2) * GROUP, ROW_STEP)
    rows_1 = tl.cdiv(tl.load(p_1 + 2) * GROUP, ROW_STEP)
    heads = tl.num_programs(1)
    q_0 = _load_rows(p_rows, (i_0 * heads + i_head) * max_rows, first, rows_0, o_m, o_r, WIDTH)
    q_1 = _load_rows(p_rows, (i_1 * heads + i_head) * max_rows, first, rows_1, o_m, o_r, WIDTH)
    o_0, o_1 = i_0.to(tl.int64) * stride_item, i_1.to(tl.int64) * stride_item
    return q_0, q_1, o_0, o_1, tl.load(p_0 + 4), tl.load(p_1 + 4)


@triton.jit
def _score_block(
    pair_0, pair_1, p_images, p_scores, o_n, o_r, again, best_0, worst_0, best_1, worst_1,
    WIDTH: tl.constexpr, ITEMS: tl.constexpr, MASKED: tl.constexpr, FOLDS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Score a block of keys for all items; return the best and the worst of each so far."""
    o_k = o_n[:, None] * WIDTH + o_r[None, :]
    if MASKED:
        k = tl.load(p_images + o_k, (o_n < pair_0[4])[:, None], 0.0)
    else:
        k = tl.load(p_images + o_k)
    best_0, worst_0 = _score_pair(
        pair_0, k, p_scores, o_n, again, best_0, worst_0, ITEMS > 1, MASKED, FOLDS, PACKED
    )
    if ITEMS > 2:
        best_1, worst_1 = _score_pair(
            pair_1, k, p_scores, o_n, again, best_1, worst_1, True, MASKED, FOLDS, PACKED
        )
    return best_0, worst_0, best_1, worst_1


@triton.jit
def _store_bounds(p_bounds, pair, best, worst, i_0, i_1, start, heads, i_head, max_chunks, i_chunk):
    """Store the bounds of a chunk of a pair of items, of those with tokens in it."""
    best_0, best_1 = _of_pairs(best)
    worst_0, worst_1 = _of_pairs(worst)
    p_0 = p_bounds + 2 * ((i_0 * heads + i_head) * max_chunks + i_chunk)
    p_1 = p_bounds + 2 * ((i_1 * heads + i_head) * max_chunks + i_chunk)
    if start < pair[5]:
        tl.store(p_1, tl.max(best_1))
        tl.store(p_1 + 1, tl.min(worst_1))
    if start < pair[4]:
        tl.store(p_0, tl.max(best_0))
        tl.store(p_0 + 1, tl.min(worst_0))


@triton.jit(do_not_specialize=["items", "lacking"])
def _score_kernel(
    p_rows, p_images, p_items, p_scores, p_bounds,
    stride_images_fit, stride_images_head, stride_scores_item, stride_scores_head,
    max_rows, max_chunks, items, lacking,
    GROUP: tl.constexpr, ROW_STEP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    ITEMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
    FOLDS: tl.constexpr, PACKED: tl.constexpr, ITEM_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Largest product of a segment's rows with each key of a chunk, and the chunk's bounds.

    ITEMS neighbouring segments of one basis share each load of images. The first group lacks some,
    the last one may: there a segment stands for others, too.
    """
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    group = tl.program_id(2) * ITEMS - lacking
    last = tl.minimum(group + ITEMS, items) - 1
    start = i_chunk * CHUNK
    i_0 = tl.maximum(group, 0)
    i_1 = tl.minimum(tl.maximum(group + 1, 0), last)
    i_2 = tl.minimum(tl.maximum(group + 2, 0), last)
    # Items are sorted by history: the first one sees the most, the last one the least.
    n = tl.load(p_items + i_0 * ITEM_COLUMNS + 4)
    if start >= n:
        return
    end = tl.minimum(start + CHUNK, n)
    shared = tl.minimum(end, tl.load(p_items + last * ITEM_COLUMNS + 4))
    full = start + tl.maximum(shared - start, 0) // BLOCK_N * BLOCK_N
    o_r = tl.arange(0, WIDTH)
    o_block = tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M)
    p_images += tl.load(p_items + i_0 * ITEM_COLUMNS + 6).to(tl.int64) * stride_images_fit
    p_images += i_head.to(tl.int64) * stride_images_head
    p_scores += i_head * stride_scores_head
    for block in range(BLOCKS):
        again = (BLOCKS > 1) & (block > 0)
        pair_0 = _load_pair(
            p_rows, p_items, i_0, i_1, i_head, block * BLOCK_M, max_rows, stride_scores_item,
            o_m, o_r, GROUP, ROW_STEP, WIDTH, ITEM_COLUMNS,
        )  # fmt: skip
        pair_1 = pair_0
        if ITEMS > 2:
            pair_1 = _load_pair(
                p_rows, p_items, i_2, last, i_head, block * BLOCK_M, max_rows, stride_scores_item,
                o_m, o_r, GROUP, ROW_STEP, WIDTH, ITEM_COLUMNS,
            )  # fmt: skip
        none = tl.full([BLOCK_N // 2], float("-inf"), tl.float16)
        best_0, worst_0 = _as_pairs(none, none), _as_pairs(-none, -none)
        best_1, worst_1 = best_0, worst_0
        for o in tl.range(start, full, BLOCK_N, num_stages=STAGES):
            best_0, worst_0, best_1, worst_1 = _score_block(
                pair_0, pair_1, p_images, p_scores, o + o_block, o_r, again,
                best_0, worst_0, best_1, worst_1, WIDTH, ITEMS, False, FOLDS, PACKED,
            )  # fmt: skip
        for o in tl.range(full, end, BLOCK_N, num_stages=1):
            best_0, worst_0, best_1, worst_1 = _score_block(
                pair_0, pair_1, p_images, p_scores, o + o_block, o_r, again,
                best_0, worst_0, best_1, worst_1, WIDTH, ITEMS, True, FOLDS, PACKED,
            )  # fmt: skip
        heads = tl.num_programs(1)
        _store_bounds(
            p_bounds, pair_0, best_0, worst_0, i_0, i_1, start, heads, i_head, max_chunks, i_chunk
        )
        if ITEMS > 2:
            _store_bounds(
                p_bounds, pair_1, best_1, worst_1, i_2, last, start, heads, i_head, max_chunks,
                i_chunk,
            )  # fmt: skip


def score_rows(
    work: WorkList,
    scores: Tensor,
    bounds: Tensor,
    space: "LowRankWorkspace | DecodeWorkspace",
    group: int,
    *,
    row_step: int = ROW_STEP,
    block_m: int = BLOCK_M,
    chunk: int = CHUNK,
    shared: bool = True,
) -> None:
    """Score histories by the rows and images that ``space`` holds; see :mod:`low_rank`.

    Args:
        work: segments of any requests.
        scores: written to.
        bounds: written to.
        space: rows of the segments, and images by an item's fit.
        group: query heads of a KV head.
        row_step: one row of so many is scored.
        block_m: rows at a time.
        chunk: history tokens of a program.
        shared: whether neighbouring segments share a fit, and so a program.
    """
    images = space.images
    kv_heads, rows = images.shape[1], space.rows.shape[2]
    items = math.gcd(work.fit_items, SHARING) if shared else 1
    lacking = -work.first_fit_items % items
    groups = -(-(work.num_items + lacking) // items)
    _score_kernel[(-(-work.max_history // chunk), kv_heads, groups)](
        space.rows, images, work.items, scores, bounds,
        images.stride(0), images.stride(1), scores.stride(0), scores.stride(1),
        rows, bounds.shape[1], work.num_items, lacking,
        GROUP=group, ROW_STEP=row_step, WIDTH=basis.WIDTH,
        CHUNK=chunk, ITEMS=items, BLOCK_M=block_m, BLOCKS=-(-rows // block_m),
        BLOCK_N=min(BLOCK_N, chunk),
        FOLDS=block_m.bit_length() - 5, PACKED=images.device.type != "cpu",
        ITEM_COLUMNS=COLUMNS, STAGES=3, num_warps=4, maxnreg=SCORE_REGISTERS,
    )  # fmt: skip
