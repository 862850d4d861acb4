"""Score images of keys by those of a segment's chosen rows: the largest product of each key (ours).

See :mod:`low_rank`. Most of a ranking's time goes here, one product of 32 numbers a row and key.
What is left to do per product is half of a maximum of three, for sums are in fp16, two to a
register. Several neighbouring segments share each load of keys, and their rows fill the columns of
one product.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..columns import DENSE_START, NUM_QUERIES
from ..columns import SEGMENT_COLUMNS as ITEM_COLUMNS
from ..columns import SPAN as FIT
from ..tuning import CHUNK
from ..work_list import WorkList
from . import basis
from .packed_f16 import folded
from .workspace import RankingWorkspace

BLOCK_N = 128  # keys at a time: images have room for whole blocks
# Segments that share each load of images: the columns that are left after folding. More share
# where their rows fill no product otherwise.
SHARING = 8
MORE_SHARING = 16
LEAST_COLUMNS = 16  # of a product
STORED = tl.constexpr(8)  # tokens whose scores are stored at a time: scores have room for them
STAGES = 3
REGISTERS = 128  # of a thread: two blocks of eight warps share a multiprocessor


def image_room(tokens: int) -> int:
    """Return how many images a history of so many tokens needs room for: blocks are read whole."""
    return -(-tokens // BLOCK_N) * BLOCK_N


def bases_together(share: int, most: int) -> int:
    """Return how many of a KV head's ``share`` bases one pass takes: the fewest that are repeated.

    A pass takes one, two or four, ``most`` at most; the last one repeats the last basis.
    """
    if share == 1 or most == 1:
        return 1
    return min((n for n in (2, 4) if n <= most), key=lambda n: (-(-share // n) * n, -n))


@triton.jit
def load_rows(
    p_rows, p_items, item, i_basis, bases, row, max_rows, o_r,
    GROUP: tl.constexpr, ROW_STEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Images [WIDTH, M] of M rows of a basis: ``row`` of ``item``.

    What is too much repeats an item's last row, which no maximum sees.
    """
    item = item.to(tl.int64)
    rows = tl.cdiv(tl.load(p_items + item * ITEM_COLUMNS + NUM_QUERIES) * GROUP, ROW_STEP)
    row = tl.minimum(row, rows - 1)
    o_row = (item * bases + i_basis) * max_rows + row
    return tl.trans(tl.load(p_rows + o_row[:, None] * WIDTH + o_r[None, :]))


@triton.jit
def _largest(p_k, q, o_n, o_r, WIDTH: tl.constexpr, FOLDS: tl.constexpr, PACKED: tl.constexpr):
    """Largest products of a block of keys with BLOCK_M rows, of every eighth column: [N, 8]."""
    k = tl.load(p_k + o_n.to(tl.int64)[:, None] * WIDTH + o_r[None, :])
    # Keys in rows keep the maximum over columns inside a thread.
    return folded(tl.dot(k, q, out_dtype=tl.float16), FOLDS, PACKED)


@triton.jit(do_not_specialize=["items"])
def _score_kernel(
    p_rows, p_images, p_items, p_numbers, p_scores, p_bounds,
    stride_images_fit, stride_images_basis, stride_scores_item, stride_scores_head,
    max_rows, max_chunks, items,
    SHARE: tl.constexpr, SHARE_PAD: tl.constexpr, TOGETHER: tl.constexpr, GROUP: tl.constexpr,
    ROW_STEP: tl.constexpr,
    ROW_BLOCKS: tl.constexpr, ITEMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, FOLDS: tl.constexpr, PACKED: tl.constexpr,
    BY_FIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """score[item, KV head, key] = max over its bases and rows of row . key, and a chunk's bounds.

    TOGETHER of a KV head's SHARE bases are scored in one pass over the keys, up to four; a later
    pass takes the maximum with what the ones before have stored. Columns go segment by segment:
    folded to ITEMS they are the segments themselves. With numbers SHARE is places of retrieval
    heads, the first of which are taken, and scores of all heads are there before.
    """
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    first_item = tl.program_id(2) * ITEMS
    last_item = tl.minimum(first_item + ITEMS, items) - 1
    start = i_chunk * CHUNK
    # Items are sorted by history: the first one sees the most.
    longest = tl.load(p_items + first_item * ITEM_COLUMNS + DENSE_START)
    if start >= longest:
        return
    bases = tl.num_programs(1) * SHARE
    if p_numbers is None:
        taken: tl.constexpr = SHARE
    else:
        o_s = tl.arange(0, SHARE_PAD)
        number = tl.load(p_numbers + i_head * SHARE + o_s, o_s < SHARE, -1)
        taken = tl.sum((number >= 0).to(tl.int32))
        if taken == 0:
            return
    ONE_PASS: tl.constexpr = p_numbers is None and ROW_BLOCKS == 1 and SHARE <= TOGETHER
    passes = ROW_BLOCKS * ((taken + TOGETHER - 1) // TOGETHER)
    o_r, o_n, o_i = tl.arange(0, WIDTH), tl.arange(0, BLOCK_N), tl.arange(0, ITEMS)
    item = tl.minimum(first_item + o_i, last_item).to(tl.int64)
    n = tl.load(p_items + item * ITEM_COLUMNS + DENSE_START)
    if BY_FIT:
        i_fit = tl.load(p_items + first_item * ITEM_COLUMNS + FIT).to(tl.int64)
        p_images += i_fit * stride_images_fit
    p_scores += i_head * stride_scores_head + item * stride_scores_item
    best = tl.full([BLOCK_N, ITEMS], float("-inf"), tl.float16)
    worst = tl.full([BLOCK_N, ITEMS], float("inf"), tl.float16)
    column = tl.arange(0, BLOCK_M)
    item_of = tl.minimum(first_item + column % ITEMS, last_item)
    for i_pass in range(passes):
        row = (i_pass % ROW_BLOCKS) * (BLOCK_M // ITEMS) + column // ITEMS
        first = i_pass // ROW_BLOCKS * TOGETHER
        # What is too much of them repeats the last basis.
        b_0 = i_head * SHARE + tl.minimum(first, taken - 1)
        b_1 = i_head * SHARE + tl.minimum(first + 1, taken - 1)
        b_2 = i_head * SHARE + tl.minimum(first + 2, taken - 1)
        b_3 = i_head * SHARE + tl.minimum(first + 3, taken - 1)
        q_0 = load_rows(
            p_rows, p_items, item_of, b_0, bases, row, max_rows, o_r, GROUP, ROW_STEP, WIDTH,
        )  # fmt: skip
        q_1, q_2, q_3 = q_0, q_0, q_0
        if TOGETHER > 1:
            q_1 = load_rows(
                p_rows, p_items, item_of, b_1, bases, row, max_rows, o_r, GROUP, ROW_STEP, WIDTH,
            )  # fmt: skip
        if TOGETHER > 2:
            q_2 = load_rows(
                p_rows, p_items, item_of, b_2, bases, row, max_rows, o_r, GROUP, ROW_STEP, WIDTH,
            )  # fmt: skip
            q_3 = load_rows(
                p_rows, p_items, item_of, b_3, bases, row, max_rows, o_r, GROUP, ROW_STEP, WIDTH,
            )  # fmt: skip
        p_0 = p_images + b_0.to(tl.int64) * stride_images_basis
        p_1 = p_images + b_1.to(tl.int64) * stride_images_basis
        p_2 = p_images + b_2.to(tl.int64) * stride_images_basis
        p_3 = p_images + b_3.to(tl.int64) * stride_images_basis
        last_pass = i_pass == passes - 1
        for o in tl.range(start, tl.minimum(start + CHUNK, longest), BLOCK_N, num_stages=STAGES):
            token = o + o_n
            most = _largest(p_0, q_0, token, o_r, WIDTH, FOLDS, PACKED)
            if TOGETHER > 1:
                most = tl.maximum(most, _largest(p_1, q_1, token, o_r, WIDTH, FOLDS, PACKED))
            if TOGETHER > 2:
                most = tl.maximum(most, _largest(p_2, q_2, token, o_r, WIDTH, FOLDS, PACKED))
                most = tl.maximum(most, _largest(p_3, q_3, token, o_r, WIDTH, FOLDS, PACKED))
            KEPT: tl.constexpr = most.shape[1]
            if ITEMS < KEPT:
                # A reduction makes float32 of it.
                most = tl.max(tl.reshape(most, [BLOCK_N, KEPT // ITEMS, ITEMS]), 1).to(tl.float16)
            # Whole groups of tokens, which a thread stores at a time.
            m_score = (token // STORED * STORED)[:, None] < n[None, :]
            p_score = p_scores[None, :] + token[:, None]
            if not ONE_PASS:
                there = (i_pass > 0) | (p_numbers is not None)
                before = tl.load(p_score, m_score & there, float("-inf"))
                most = tl.maximum(most, before)
            tl.store(p_score, most, m_score)
            seen = (token[:, None] < n[None, :]) & last_pass
            best = tl.maximum(best, tl.where(seen, most, float("-inf")))
            worst = tl.minimum(worst, tl.where(seen, most, float("inf")))
    p_bounds += 2 * ((item * tl.num_programs(1) + i_head) * max_chunks + i_chunk)
    m_item = (first_item + o_i < items) & (start < n)
    tl.store(p_bounds, tl.max(best, 0).to(tl.float32), m_item)
    tl.store(p_bounds + 1, tl.min(worst, 0).to(tl.float32), m_item)


def score_rows(
    work: WorkList,
    scores: Tensor,
    bounds: Tensor,
    space: RankingWorkspace,
    group: int,
    *,
    chunk: int = CHUNK,
    shared: bool = True,
) -> None:
    """Score histories by the rows and images that ``space`` holds; see :mod:`low_rank`.

    Args:
        work: segments of any requests.
        scores: written to, in whole groups of ``STORED`` tokens; rows have room for them.
        bounds: written to.
        space: rows of the segments, and images; of decode those are indexed by an item's fit.
        group: query heads that share a basis.
        chunk: history tokens of a program.
        shared: whether neighbouring segments share images, and so a program.
    """
    images, kv_heads = space.images, scores.shape[1]
    bases, rows, width = space.rows.shape[1:]
    share = bases // kv_heads
    # What a block holds at a time: images of fewer bytes leave room for more.
    columns, together = (256, 4) if images.element_size() == 1 else (128, 2)
    together = max(1, together * basis.WIDTH // width)
    if space.numbers is not None:
        together = 1  # a KV head has one retrieval head more often than two
    items = 1
    if shared:
        items = MORE_SHARING if MORE_SHARING * rows <= columns else SHARING
    block_m = min(columns, max(triton.next_power_of_2(rows) * items, LEAST_COLUMNS))
    folds = block_m.bit_length() - max(SHARING, items).bit_length() - 1
    _score_kernel[(-(-work.max_history // chunk), kv_heads, -(-work.num_segments // items))](
        space.rows, images, work.segments, space.numbers, scores, bounds,
        images.stride(0), images.stride(-3), scores.stride(0), scores.stride(1),
        rows, bounds.shape[1], work.num_segments,
        SHARE=share, SHARE_PAD=triton.next_power_of_2(share),
        TOGETHER=bases_together(share, together), GROUP=group, ROW_STEP=space.row_step,
        ROW_BLOCKS=-(-rows * items // block_m), ITEMS=items,
        BLOCK_M=block_m,
        BLOCK_N=min(BLOCK_N, chunk), WIDTH=width, CHUNK=chunk,
        FOLDS=folds, PACKED=images.device.type != "cpu",
        BY_FIT=images.dim() == 4, STAGES=STAGES,
        num_warps=8 if block_m > 128 else 4, maxnreg=REGISTERS,
    )  # fmt: skip
