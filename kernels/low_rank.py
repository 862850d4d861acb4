"""Rank by every query against a low-rank image of the keys (ours; see :mod:`basis`).

A token's score in a list is the largest log-probability that any scored row of the segment gives
it, in the image; a row's mass is told by a sample of its history and by its own segment. A mean
query cannot see keys that single queries want; this can. Rows are queries x heads of a group. One
in ``ROW_STEP`` is scored: half of them evenly spread, the other half those with the largest images,
the queries that are least like others.
"""

import torch
import triton
import triton.language as tl

from . import basis
from .fit import FitWorkspace, fit
from .plan import CHUNK, COLUMNS, FITS, ROW_STEP, WorkList
from .tiles import input_precision

ROUGH = tl.constexpr(basis.ROUGH)
ROUGH_UNIT = tl.constexpr(basis.ROUGH_UNIT)

BLOCK_M = 128  # rows at a time: the scored ones of a segment of 64 with a group of 4
BLOCK_N = 128


@triton.jit(do_not_specialize=["row", "fits"])
def _project_keys_kernel(
    p_kv, p_table, p_b, p_offset, p_images, p_fits, row, fits,
    stride_block, stride_head, stride_token, stride_table, stride_images_fit, stride_images_head,
    FITS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Images of BLOCK keys of one head by all bases of a chunk: k B − offset."""
    i_block, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, D_PAD)
    # One product for all: of a basis WIDTH columns.
    o_c = tl.arange(0, FITS * WIDTH)
    fit = tl.minimum(o_c // WIDTH, fits - 1)
    n = tl.load(p_fits + 3 * fit + 2)
    longest = tl.max(n)
    if i_block * BLOCK >= longest:
        return
    m_n = o_n < longest
    p_table += row.to(tl.int64) * stride_table
    page = tl.load(p_table + o_n // PAGE, m_n, 0).to(tl.int64)
    o_k = page * stride_block + (o_n % PAGE) * stride_token + i_head * stride_head
    k = tl.load(p_kv + o_k[:, None] + o_d[None, :], m_n[:, None] & (o_d < D)[None, :], 0.0)
    k = k.to(p_b.dtype.element_ty)
    i_basis = fit * tl.num_programs(1) + i_head
    o_b = i_basis[None, :] * (D * WIDTH) + o_d[:, None] * WIDTH + (o_c % WIDTH)[None, :]
    b = tl.load(p_b + o_b, (o_d < D)[:, None], 0.0)
    offset = tl.load(p_offset + i_basis * WIDTH + o_c % WIDTH)
    image = tl.dot(k, b, input_precision=PRECISION) - offset[None, :]
    image = tl.minimum(tl.maximum(image, -LIMIT), LIMIT)
    o_image = fit.to(tl.int64) * stride_images_fit + i_head * stride_images_head + o_c % WIDTH
    tl.store(
        p_images + o_n[:, None] * WIDTH + o_image[None, :], image.to(p_images.dtype.element_ty),
        (o_n[:, None] < n[None, :]) & (o_c // WIDTH < fits)[None, :],
    )  # fmt: skip


@triton.jit
def _project_block(
    p_q, p_a, row, o_basis, stride_q_token, stride_q_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Images of some rows of a segment and KV head, float32."""
    o_d = tl.arange(0, D_PAD)
    o_r = tl.arange(0, WIDTH)
    o_q = row // GROUP * stride_q_token + row % GROUP * stride_q_head
    q = tl.load(p_q + o_q[:, None] + o_d[None, :], (o_d < D)[None, :], 0.0)
    a = tl.load(p_a + (o_basis + o_d[:, None]) * WIDTH + o_r[None, :], (o_d < D)[:, None], 0.0)
    return tl.dot(q, a, input_precision=PRECISION)


@triton.jit
def _project_rows_kernel(
    p_q, p_a, p_items, p_chosen, p_rows, stride_q_token, stride_q_head, max_kept,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    ROW_STEP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LIMIT: tl.constexpr,
    PRECISION: tl.constexpr, ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Choose which rows of a segment and KV head are scored; write their images without shift.

    One stage in its loops: Triton 3.6 sets no fence between asynchronous copies and wgmma.
    """
    i_head = tl.program_id(0)
    i_item = tl.program_id(1).to(tl.int64)
    p_item = p_items + i_item * ITEM_COLUMNS
    start = tl.load(p_item + 1).to(tl.int64)
    rows = tl.load(p_item + 2) * GROUP
    if tl.load(p_item + 4) == 0:
        return
    o_basis = (tl.load(p_item + 6).to(tl.int64) * tl.num_programs(0) + i_head) * D
    o_b = tl.arange(0, BLOCK)
    o_r = tl.arange(0, WIDTH)
    p_q += start * stride_q_token + i_head.to(tl.int64) * GROUP * stride_q_head
    number = tl.arange(0, BLOCKS)[:, None] * BLOCK + o_b[None, :]
    size = tl.zeros([BLOCKS, BLOCK], tl.float32)
    for i in tl.range(0, tl.cdiv(rows, BLOCK), num_stages=1):
        image = _project_block(
            p_q, p_a, tl.minimum(i * BLOCK + o_b, rows - 1), o_basis,
            stride_q_token, stride_q_head, GROUP, D, D_PAD, WIDTH, PRECISION,
        )  # fmt: skip
        size = tl.where(number // BLOCK == i, tl.sum(image * image, 1)[None, :], size)
    number = tl.reshape(number, [BLOCKS * BLOCK])
    # As integers, which sizes that are not negative order like. Rows that are always chosen have
    # the largest number.
    size = tl.reshape(size, [BLOCKS * BLOCK]).to(tl.int32, bitcast=True)
    always = (number // GROUP + number % GROUP) % (2 * ROW_STEP) == 0
    size = tl.where(number < rows, tl.where(always, 0x7FFFFFFF, size), -1)
    kept = tl.cdiv(rows, ROW_STEP)
    least = 0  # the largest number that so many sizes reach, bit by bit
    for i in range(0, 31):
        higher = least | (1 << (30 - i))
        least = tl.where(tl.sum((size >= higher).to(tl.int32)) >= kept, higher, least)
    equal = (size == least).to(tl.int32)
    room = kept - tl.sum((size > least).to(tl.int32))
    chosen = (size > least) | ((equal > 0) & (tl.cumsum(equal) <= room))
    place = tl.cumsum(chosen.to(tl.int32)) - 1
    o_list = (i_item * tl.num_programs(0) + i_head) * max_kept
    tl.store(p_chosen + o_list + place, number, chosen)
    tl.debug_barrier()  # other threads read them
    for first in tl.range(0, kept, BLOCK, num_stages=1):
        o_row = first + o_b
        row = tl.load(p_chosen + o_list + tl.minimum(o_row, kept - 1))
        image = _project_block(
            p_q, p_a, row, o_basis, stride_q_token, stride_q_head,
            GROUP, D, D_PAD, WIDTH, PRECISION,
        )  # fmt: skip
        image = tl.minimum(tl.maximum(image, -LIMIT), LIMIT)
        p_row = p_rows + (o_list + o_row[:, None]) * WIDTH + o_r[None, :]
        tl.store(p_row, image.to(p_rows.dtype.element_ty), (o_row < kept)[:, None])


@triton.jit
def _add_mass(s, m, mass):
    """Fold base-2 scores [M, N] into the running maximum and mass of M rows."""
    m_new = tl.maximum(m, tl.max(s, 1))
    return m_new, mass * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), 1)


@triton.jit
def _rough_exp2(s, m):
    """See :func:`basis.rough_exp2`: a sum, two bounds and a shift."""
    x = tl.minimum(tl.maximum(s - (m + (ROUGH - 384.0))[:, None], 384.0 - 126.0), 384.0 + 127.0)
    return ((x.to(tl.int32, bitcast=True) << 8) + 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _shift_kernel(
    p_rows, p_chosen, p_images, p_items, stride_images_fit, stride_images_head, max_kept,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, ROW_STEP: tl.constexpr,
    SHIFT_STEP: tl.constexpr, SHIFT_SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LIMIT: tl.constexpr,
    FACTOR_0: tl.constexpr, FACTOR_1: tl.constexpr, FACTOR_2: tl.constexpr,
    ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """End BLOCK_M images of rows with their shift, the log-sum-exp over the keys they see.

    Of the history a sample stands for all; of the own segment every key counts.

    A launch of its own that stores the shift's parts alone. One stage, as for the moments in
    :mod:`fit`: Triton 3.6 sets no fence between asynchronous copies and wgmma.
    """
    i_block, i_head = tl.program_id(0), tl.program_id(1)
    i_item = tl.program_id(2).to(tl.int64)
    p_item = p_items + i_item * ITEM_COLUMNS
    queries = tl.load(p_item + 2)
    rows = tl.cdiv(queries * GROUP, ROW_STEP)
    n = tl.load(p_item + 4)
    i_fit = tl.load(p_item + 6).to(tl.int64)
    if (i_block * BLOCK_M >= rows) | (n == 0):
        return
    o_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.arange(0, WIDTH)
    o_list = (i_item * tl.num_programs(1) + i_head) * max_kept
    query = tl.load(p_chosen + o_list + tl.minimum(o_row, rows - 1)) // GROUP
    p_rows += o_list * WIDTH
    p_images += i_fit * stride_images_fit + i_head.to(tl.int64) * stride_images_head
    # An image that has no shift yet ends with zeros, which the factors in a key's image meet.
    q = tl.load(p_rows + tl.minimum(o_row, rows - 1)[:, None] * WIDTH + o_r[None, :])
    step = tl.maximum(SHIFT_STEP, tl.cdiv(n, SHIFT_SAMPLES))
    samples = tl.maximum((n + step // 2 - 1) // step, 1)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    p_own = p_images + n.to(tl.int64) * WIDTH
    for o in tl.range(0, queries, BLOCK_N, num_stages=1):
        o_n = o + tl.arange(0, BLOCK_N)
        own = tl.minimum(o_n, queries - 1)
        k = tl.load(p_own + own[:, None] * WIDTH + o_r[None, :])
        s = tl.where(o_n[None, :] <= query[:, None], tl.dot(q, tl.trans(k)), float("-inf"))
        m, mass = _add_mass(s, m, mass)
    # The rest in units of that, by exponentials so rough that they cost less than a maximum.
    rest = tl.zeros([BLOCK_M], tl.float32)
    full = samples // BLOCK_N * BLOCK_N
    for o in tl.range(0, full, BLOCK_N, num_stages=1):
        position = (o + tl.arange(0, BLOCK_N)) * step + step // 2
        k = tl.load(p_images + position[:, None] * WIDTH + o_r[None, :])
        rest += tl.sum(_rough_exp2(tl.dot(q, tl.trans(k)), m), 1)
    if full < samples:
        o_n = full + tl.arange(0, BLOCK_N)
        position = tl.minimum(o_n * step + step // 2, n - 1)
        k = tl.load(p_images + position[:, None] * WIDTH + o_r[None, :])
        s = _rough_exp2(tl.dot(q, tl.trans(k)), m)
        rest += tl.sum(tl.where((o_n < samples)[None, :], s, 0.0), 1)
    rest *= ROUGH_UNIT * (n.to(tl.float32) / samples.to(tl.float32))
    left = m + tl.log2(mass + rest)
    kind: tl.constexpr = p_rows.dtype.element_ty
    for place in tl.static_range(3):
        factor = FACTOR_0 if place == 0 else (FACTOR_1 if place == 1 else FACTOR_2)
        part = tl.minimum(tl.maximum(left / factor, -LIMIT), LIMIT).to(kind)
        left -= part.to(tl.float32) * factor
        minus = (-part.to(tl.float32)).to(kind)
        tl.store(p_rows + o_row * WIDTH + RANK + place, minus, o_row < rows)


@triton.jit
def _halve(s):
    """Fold the second half of the columns of [N, M] into the first, by the larger."""
    s = tl.reshape(s, [s.shape[0], 2, s.shape[1] // 2])
    one, other = tl.split(tl.permute(s, [0, 2, 1]))
    return tl.maximum(one, other)


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
    # holds two, halve what it costs. By halves fewer registers are alive at a time.
    s = _halve(_halve(_halve(tl.dot(k, q, out_dtype=tl.float16))))
    score = tl.max(_halve(s), 1).to(tl.float16)
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
    n = tl.load(p_item + 4)
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
        self.chosen = torch.empty(items, kv_heads, rows, dtype=torch.int32, device=device)
        self.rows = torch.empty(items, kv_heads, rows, basis.WIDTH, dtype=kind, device=device)


def project_keys(
    kv_cache: torch.Tensor, block_table: torch.Tensor, work: WorkList, space: LowRankWorkspace
) -> None:
    """Project the keys that a work list's chunk sees by the fitted bases."""
    fitted, block = space.fit, 64
    head_dim, page, kv_heads = kv_cache.shape[3] // 2, kv_cache.shape[2], kv_cache.shape[1]
    _project_keys_kernel[(-(-work.max_fit_tokens // block), kv_heads)](
        kv_cache, block_table, fitted.b, fitted.offset, space.images, work.fits, work.row,
        work.fits.shape[0], kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        block_table.stride(0), space.images.stride(0), space.images.stride(1), FITS=FITS,
        D=head_dim, D_PAD=triton.next_power_of_2(head_dim), PAGE=page, WIDTH=basis.WIDTH,
        BLOCK=block, LIMIT=torch.finfo(space.images.dtype).max,
        PRECISION=input_precision(fitted.b.dtype),
    )  # fmt: skip


def project_rows(query: torch.Tensor, work: WorkList, space: LowRankWorkspace) -> None:
    """Choose and project the rows of a work list's segments; their keys must be projected."""
    fitted, images = space.fit, space.images
    head_dim, kv_heads, kept = query.shape[2], space.rows.shape[1], space.rows.shape[2]
    block = 64
    shape = {
        "GROUP": query.shape[1] // kv_heads,
        "WIDTH": basis.WIDTH,
        "ROW_STEP": ROW_STEP,
        "LIMIT": torch.finfo(images.dtype).max,
        "ITEM_COLUMNS": COLUMNS,
    }
    _project_rows_kernel[(kv_heads, work.num_items)](
        query, fitted.a, work.items, space.chosen, space.rows, query.stride(0), query.stride(1),
        kept, D=head_dim, D_PAD=triton.next_power_of_2(head_dim), BLOCK=block,
        BLOCKS=triton.next_power_of_2(-(-kept * ROW_STEP // block)),
        PRECISION=input_precision(query.dtype), **shape,
    )  # fmt: skip
    _shift_kernel[(-(-kept // block), kv_heads, work.num_items)](
        space.rows, space.chosen, images, work.items, images.stride(0), images.stride(1), kept,
        RANK=basis.RANK, SHIFT_STEP=basis.SHIFT_STEP, SHIFT_SAMPLES=basis.SHIFT_SAMPLES,
        BLOCK_M=block, BLOCK_N=64,
        FACTOR_0=basis.SHIFT_FACTORS[0], FACTOR_1=basis.SHIFT_FACTORS[1],
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
    """
    if work.max_fit_tokens == 0:
        return
    if work.first_of_chunk:
        fit(query, kv_cache, block_table, work, space.fit, scale=scale)
        project_keys(kv_cache, block_table, work, space)
    if work.max_history == 0:
        return
    project_rows(query, work, space)
    kv_heads = kv_cache.shape[1]
    images = space.images
    _score_kernel[(-(-work.max_history // chunk), kv_heads, work.num_items)](
        space.rows, images, work.items, scores, bounds,
        images.stride(0), images.stride(1), scores.stride(0), scores.stride(1),
        space.rows.shape[2], bounds.shape[1],
        GROUP=query.shape[1] // kv_heads, ROW_STEP=ROW_STEP, WIDTH=basis.WIDTH,
        CHUNK=chunk, BLOCK_M=BLOCK_M, BLOCK_N=min(BLOCK_N, chunk),
        ITEM_COLUMNS=COLUMNS, STAGES=3, num_warps=4,
    )  # fmt: skip
