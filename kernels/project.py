"""Images: keys and rows of queries in the few directions of a basis (ours; see :mod:`basis`)."""

import torch
import triton
import triton.language as tl

from . import basis
from .fit import FitWorkspace
from .plan import COLUMNS, WorkList
from .tiles import input_precision


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
    k = k.to(p_b.dtype.element_ty)
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


@triton.jit
def _scored_row(o_row, total, ROW_STEP: tl.constexpr):
    """Return which of a segment's rows are scored; see :func:`basis.scored_rows`."""
    return tl.minimum(o_row * ROW_STEP + o_row % ROW_STEP, total - 1)


@triton.jit
def _project_queries_kernel(
    p_q, p_a, p_items, p_rows, stride_q_token, stride_q_head, max_rows,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    ROW_STEP: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
    ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Images of BLOCK scored rows of a segment and KV head, without their shift."""
    i_block, i_head = tl.program_id(0), tl.program_id(1)
    i_item = tl.program_id(2).to(tl.int64)
    p_item = p_items + i_item * ITEM_COLUMNS
    start = tl.load(p_item + 1).to(tl.int64)
    total = tl.load(p_item + 2) * GROUP
    rows = tl.cdiv(total, ROW_STEP)
    n = tl.load(p_item + 4)
    i_fit = tl.load(p_item + 6).to(tl.int64)
    if (i_block * BLOCK >= rows) | (n == 0):
        return
    o_row = i_block * BLOCK + tl.arange(0, BLOCK)
    flat = _scored_row(o_row, total, ROW_STEP)
    o_d = tl.arange(0, D_PAD)
    o_r = tl.arange(0, WIDTH)
    o_q = (start + flat // GROUP) * stride_q_token
    o_q += (i_head * GROUP + flat % GROUP) * stride_q_head
    q = tl.load(p_q + o_q[:, None] + o_d[None, :], (o_d < D)[None, :], 0.0)
    i_basis = i_fit * tl.num_programs(1) + i_head
    a = tl.load(p_a + (i_basis * D + o_d[:, None]) * WIDTH + o_r[None, :], (o_d < D)[:, None], 0.0)
    image = tl.dot(q, a, input_precision=PRECISION)
    image = tl.minimum(tl.maximum(image, -LIMIT), LIMIT)
    p_rows += (i_item * tl.num_programs(1) + i_head) * max_rows * WIDTH
    tl.store(
        p_rows + o_row[:, None] * WIDTH + o_r[None, :], image.to(p_rows.dtype.element_ty),
        (o_row < rows)[:, None],
    )  # fmt: skip


@triton.jit
def _add_mass(s, m, mass):
    """Fold base-2 scores [M, N] into the running maximum and mass of M rows."""
    m_new = tl.maximum(m, tl.max(s, 1))
    return m_new, mass * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), 1)


@triton.jit
def _shift_kernel(
    p_rows, p_images, p_items, stride_images_fit, stride_images_head, max_rows,
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
    query = _scored_row(o_row, queries * GROUP, ROW_STEP) // GROUP
    o_r = tl.arange(0, WIDTH)
    p_rows += (i_item * tl.num_programs(1) + i_head) * max_rows * WIDTH
    p_images += i_fit * stride_images_fit + i_head.to(tl.int64) * stride_images_head
    # An image that has no shift yet ends with zeros, which the factors in a key's image meet.
    q = tl.load(p_rows + tl.minimum(o_row, rows - 1)[:, None] * WIDTH + o_r[None, :])
    step = tl.maximum(SHIFT_STEP, tl.cdiv(n, SHIFT_SAMPLES))
    samples = tl.maximum((n + step // 2 - 1) // step, 1)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for o in tl.range(0, samples, BLOCK_N, num_stages=1):
        o_n = o + tl.arange(0, BLOCK_N)
        position = tl.minimum(o_n * step + step // 2, n - 1)
        k = tl.load(p_images + position[:, None] * WIDTH + o_r[None, :])
        s = tl.where((o_n < samples)[None, :], tl.dot(q, tl.trans(k)), float("-inf"))
        m, mass = _add_mass(s, m, mass)
    mass *= n.to(tl.float32) / samples.to(tl.float32)
    p_images += n.to(tl.int64) * WIDTH
    for o in tl.range(0, queries, BLOCK_N, num_stages=1):
        o_n = o + tl.arange(0, BLOCK_N)
        own = tl.minimum(o_n, queries - 1)
        k = tl.load(p_images + own[:, None] * WIDTH + o_r[None, :])
        s = tl.where(o_n[None, :] <= query[:, None], tl.dot(q, tl.trans(k)), float("-inf"))
        m, mass = _add_mass(s, m, mass)
    left = m + tl.log2(mass)
    kind: tl.constexpr = p_rows.dtype.element_ty
    for place in tl.static_range(3):
        factor = FACTOR_0 if place == 0 else (FACTOR_1 if place == 1 else FACTOR_2)
        part = tl.minimum(tl.maximum(left / factor, -LIMIT), LIMIT).to(kind)
        left -= part.to(tl.float32) * factor
        minus = (-part.to(tl.float32)).to(kind)
        tl.store(p_rows + o_row * WIDTH + RANK + place, minus, o_row < rows)


def project_keys(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    fitted: FitWorkspace,
    images: torch.Tensor,
) -> None:
    """Project the keys that a work list's chunk sees by the fitted bases.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        fitted: bases of the chunk.
        images: ``[FITS, kv_heads, >= max_fit_tokens, WIDTH]``; written.
    """
    block = 64
    head_dim, page, kv_heads = kv_cache.shape[3] // 2, kv_cache.shape[2], kv_cache.shape[1]
    _project_keys_kernel[(work.fits.shape[0], -(-work.max_fit_tokens // block), kv_heads)](
        kv_cache, block_table, fitted.b, fitted.offset, images, work.fits, work.row,
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0),
        images.stride(0), images.stride(1), D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim), PAGE=page, WIDTH=basis.WIDTH, BLOCK=block,
        LIMIT=torch.finfo(images.dtype).max, PRECISION=input_precision(fitted.b.dtype),
    )  # fmt: skip


def project_queries(
    query: torch.Tensor,
    work: WorkList,
    fitted: FitWorkspace,
    images: torch.Tensor,
    rows: torch.Tensor,
    step: int,
) -> None:
    """Project every ``step``-th row of a work list's segments, with its shift.

    Args:
        query: ``[tokens, heads, head_dim]``.
        work: segments of one request.
        fitted: bases of the chunk.
        images: of the keys that the segments see, as :func:`project_keys` left them.
        rows: ``[items, kv_heads, most, WIDTH]``; written.
        step: of :func:`basis.scored_rows`.
    """
    head_dim, (_, kv_heads, most, _) = query.shape[2], rows.shape
    block = 64
    needed = -(-work.max_queries * query.shape[1] // (kv_heads * step))
    grid = (-(-needed // block), kv_heads, work.num_items)
    shape = {
        "GROUP": query.shape[1] // kv_heads,
        "WIDTH": basis.WIDTH,
        "ROW_STEP": step,
        "LIMIT": torch.finfo(images.dtype).max,
        "ITEM_COLUMNS": COLUMNS,
    }
    _project_queries_kernel[grid](
        query, fitted.a, work.items, rows, query.stride(0), query.stride(1), most,
        D=head_dim, D_PAD=triton.next_power_of_2(head_dim), BLOCK=block,
        PRECISION=input_precision(query.dtype), **shape,
    )  # fmt: skip
    _shift_kernel[grid](
        rows, images, work.items, images.stride(0), images.stride(1), most,
        RANK=basis.RANK, SHIFT_STEP=basis.SHIFT_STEP, SHIFT_SAMPLES=basis.SHIFT_SAMPLES,
        BLOCK_M=block, BLOCK_N=64,
        FACTOR_0=basis.SHIFT_FACTORS[0], FACTOR_1=basis.SHIFT_FACTORS[1],
        FACTOR_2=basis.SHIFT_FACTORS[2], **shape,
    )  # fmt: skip
