"""Project keys of a paged cache by the bases of their heads (ours; see :mod:`basis`).

Prefill projects all keys that a chunk sees, decode those that a step adds to a request's state.
"""

import torch
import triton
import triton.language as tl

from ..columns import APPEND_COLUMNS, APPEND_COUNT, APPEND_FIRST, APPEND_ROW, APPEND_SLOT
from ..decode_state import DecodeList
from ..tiles import KEYS_ENTRIES, input_precision
from .workspace import RankingWorkspace

KEYS_BLOCK = 64  # keys that are projected at a time, at most, and by a program in all
KEYS_SPAN = 512
COLUMNS = 128  # of one product, at most, which the bases of several heads of a KV head fill
BASES_ENTRIES = 32768  # numbers of these bases, at most
APPEND_BLOCK = 16  # keys that a program projects at a time; mostly there is one
APPEND_PROGRAMS = 8  # that share what a slot lacks: once, after a prompt, some thousand


@triton.jit
def load_keys(
    p_kv, page, o_n, o_d, end, stride_block, stride_token, PAGE: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Keys [N, D_PAD] of the tokens o_n, on the pages ``page``, of a head; 0 from ``end`` on."""
    o_k = page.to(tl.int64) * stride_block + (o_n % PAGE) * stride_token
    m_k = (o_n < end)[:, None] & (o_d < D)[None, :]
    return tl.load(p_kv + o_k[:, None] + o_d[None, :], m_k, 0.0)


@triton.jit
def _project(k, b, offset, dtype: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr):
    """Projected keys k B − offset [N, C], rounded to ``dtype``, of k [N, D_PAD], B [D_PAD, C]."""
    projected = tl.dot(k.to(b.dtype), b, input_precision=PRECISION) - offset[None, :]
    if dtype == tl.float16:  # conversions to e4m3 have limits of their own
        projected = tl.minimum(tl.maximum(projected, -LIMIT), LIMIT)
    return projected.to(dtype)


@triton.jit(do_not_specialize=["row", "seen"])
def _project_keys_kernel(
    p_kv, p_table, p_b, p_offset, p_keys, p_heads, row, seen,
    stride_block, stride_head, stride_token, stride_table, stride_keys_basis,
    SHARE: tl.constexpr, TOGETHER: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """projected[basis, key] = k B − offset, of SPAN keys of a KV head, TOGETHER of SHARE bases.

    The bases are twice as much as BLOCK keys: they are read once for all of a span. One stage:
    Triton 3.6 sets no fence between asynchronous copies and wgmma. With ``p_heads`` SHARE is the
    capacity of retrieval heads, and an entry says whose basis it takes.
    """
    i_span, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D_PAD)
    # One product for all: of a basis WIDTH columns.
    o_c = tl.arange(0, TOGETHER * WIDTH)
    number = tl.program_id(2) * TOGETHER + o_c // WIDTH
    i_out = i_head * SHARE + tl.minimum(number, SHARE - 1)
    m_c = number < SHARE
    i_basis = i_out
    if p_heads is not None:
        first = i_head * SHARE + tl.program_id(2) * TOGETHER
        if tl.load(p_heads + first) < 0:
            return
        i_basis = tl.load(p_heads + i_out).to(tl.int64)
        m_c = m_c & (i_basis >= 0)
        i_basis = tl.maximum(i_basis, 0)
    o_b = i_basis[None, :] * (D * WIDTH) + o_d[:, None] * WIDTH + (o_c % WIDTH)[None, :]
    b = tl.load(p_b + o_b, (o_d < D)[:, None], 0.0)
    offset = tl.load(p_offset + i_basis * WIDTH + o_c % WIDTH)
    o_out = i_out * stride_keys_basis + o_c % WIDTH
    p_table += row.to(tl.int64) * stride_table
    end = tl.minimum((i_span + 1) * SPAN, seen)
    p_kv += i_head * stride_head
    o_n = i_span * SPAN + tl.arange(0, BLOCK)
    page = tl.load(p_table + o_n // PAGE, o_n < end, 0)
    k = load_keys(p_kv, page, o_n, o_d, end, stride_block, stride_token, PAGE, D)
    o_ahead = o_n + BLOCK
    page = tl.load(p_table + o_ahead // PAGE, o_ahead < end, 0)
    for _ in tl.range(i_span * SPAN, end, BLOCK, num_stages=1):
        # Prefetch the next keys, and the page of those behind them.
        ahead = load_keys(p_kv, page, o_ahead, o_d, end, stride_block, stride_token, PAGE, D)
        o_ahead += BLOCK
        page = tl.load(p_table + o_ahead // PAGE, o_ahead < end, 0)
        projected = _project(k, b, offset, p_keys.dtype.element_ty, LIMIT, PRECISION)
        tl.store(
            p_keys + o_n[:, None] * WIDTH + o_out[None, :], projected,
            (o_n < end)[:, None] & m_c[None, :],
        )  # fmt: skip
        o_n += BLOCK
        k = ahead


@triton.jit
def _append_kernel(
    p_kv, p_table, p_b, p_offset, p_keys, p_appends,
    stride_block, stride_head, stride_token, stride_table, stride_keys_slot, stride_keys_basis,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """projected[slot, KV head, key] = k B − offset, of the keys that a request's slot lacks."""
    i_head = tl.program_id(1).to(tl.int64)
    p_append = p_appends + tl.program_id(2) * APPEND_COLUMNS
    row = tl.load(p_append + APPEND_ROW).to(tl.int64)
    slot = tl.load(p_append + APPEND_SLOT).to(tl.int64)
    first, count = tl.load(p_append + APPEND_FIRST), tl.load(p_append + APPEND_COUNT)
    if tl.program_id(0) * BLOCK >= count:
        return
    o_d = tl.arange(0, D_PAD)
    o_r = tl.arange(0, WIDTH)
    i_basis = slot * tl.num_programs(1) + i_head
    p_b += i_basis * (D * WIDTH)
    b = tl.load(p_b + o_d[:, None] * WIDTH + o_r[None, :], (o_d < D)[:, None], 0.0)
    offset = tl.load(p_offset + i_basis * WIDTH + o_r)
    p_keys += slot * stride_keys_slot + i_head * stride_keys_basis
    p_table += row * stride_table
    for start in tl.range(
        tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK, num_stages=1
    ):
        number = start + tl.arange(0, BLOCK)
        m_n = number < count
        o_n = first + number
        page = tl.load(p_table + o_n // PAGE, m_n, 0)
        k = load_keys(
            p_kv + i_head * stride_head, page, o_n, o_d, first + count, stride_block, stride_token,
            PAGE, D,
        )  # fmt: skip
        projected = _project(k, b, offset, p_keys.dtype.element_ty, LIMIT, PRECISION)
        tl.store(p_keys + o_n[:, None] * WIDTH + o_r[None, :], projected, m_n[:, None])


def project_keys(
    kv_cache: torch.Tensor, block_table: torch.Tensor, row: int, tokens: int,
    space: RankingWorkspace,
) -> None:  # fmt: skip
    """Project the first keys of a sequence by the bases of ``space``; see `basis.project_keys`.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, the bases' dtype or fp8.
        block_table: int32 ``[rows, max_blocks]``.
        row: of the block table.
        tokens: how many keys, from the sequence's first one on.
        space: ``basis`` and ``heads`` are read; ``projected_keys`` is written up to ``tokens``.
    """
    basis, projected = space.basis, space.projected_keys
    head_dim, page, kv_heads = kv_cache.shape[3] // 2, kv_cache.shape[2], kv_cache.shape[1]
    share, width = projected.shape[0] // kv_heads, projected.shape[2]
    pad = triton.next_power_of_2(head_dim)
    columns = min(COLUMNS, BASES_ENTRIES // pad)
    together = min(triton.next_power_of_2(share), columns // width)
    _project_keys_kernel[(-(-tokens // KEYS_SPAN), kv_heads, -(-share // together))](
        kv_cache, block_table, basis.b, basis.offset, projected, space.heads, row,
        tokens, kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        block_table.stride(0), projected.stride(0), SHARE=share, TOGETHER=together,
        D=head_dim, D_PAD=pad, PAGE=page, WIDTH=width,
        BLOCK=min(KEYS_BLOCK, KEYS_ENTRIES // pad), SPAN=KEYS_SPAN,
        LIMIT=torch.finfo(projected.dtype).max, PRECISION=input_precision(basis.b.dtype),
    )  # fmt: skip


def append_keys(
    kv_cache: torch.Tensor, block_table: torch.Tensor, rows: DecodeList, space: RankingWorkspace
) -> None:
    """Project the keys that the slots of a decode step lack, the step's own among them.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, the bases' dtype or fp8.
        block_table: int32 ``[rows, max_blocks]``.
        rows: the step's requests; ``appends`` says which keys their slots lack.
        space: request states; ``projected_keys`` is written.
    """
    kv_heads, page, width = kv_cache.shape[1:]
    projected, head_dim = space.projected_keys, width // 2
    _append_kernel[(APPEND_PROGRAMS, kv_heads, rows.work.num_segments)](
        kv_cache, block_table, space.basis.b, space.basis.offset, projected, rows.appends,
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0),
        projected.stride(0), projected.stride(1),
        D=head_dim, D_PAD=triton.next_power_of_2(head_dim), PAGE=page, WIDTH=projected.shape[3],
        BLOCK=APPEND_BLOCK, LIMIT=torch.finfo(projected.dtype).max,
        PRECISION=input_precision(space.basis.b.dtype),
    )  # fmt: skip
