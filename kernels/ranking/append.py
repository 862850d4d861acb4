"""Project the keys that a decode step adds by the bases of their requests (ours)."""

import torch
import triton
import triton.language as tl

from ..columns import APPEND_COLUMNS, APPEND_COUNT, APPEND_FIRST, APPEND_ROW, APPEND_SLOT
from ..decode_state import DecodeList
from ..tiles import input_precision
from .keys import load_keys
from .workspace import RankingWorkspace

APPEND_BLOCK = 16  # keys that a program projects at a time; mostly there is one
APPEND_PROGRAMS = 8  # that share what a slot lacks: once, after a prompt, some thousand


@triton.jit
def _append_kernel(
    p_kv, p_table, p_b, p_offset, p_images, p_appends,
    stride_block, stride_head, stride_token, stride_table, stride_images_slot, stride_images_head,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Projected key = k B − offset, of a request's new keys of one head, by its slot's basis."""
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
    p_images += slot * stride_images_slot + i_head * stride_images_head
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
        image = tl.dot(k.to(b.dtype), b, input_precision=PRECISION) - offset[None, :]
        image = tl.minimum(tl.maximum(image, -LIMIT), LIMIT)
        tl.store(
            p_images + o_n[:, None] * WIDTH + o_r[None, :], image.to(p_images.dtype.element_ty),
            m_n[:, None],
        )  # fmt: skip


def append_keys(
    kv_cache: torch.Tensor, block_table: torch.Tensor, rows: DecodeList, space: RankingWorkspace
) -> None:
    """Project the keys that the slots lack, the step's own among them."""
    kv_heads, page, width = kv_cache.shape[1:]
    images, head_dim = space.images, width // 2
    _append_kernel[(APPEND_PROGRAMS, kv_heads, rows.work.num_segments)](
        kv_cache, block_table, space.fit.b, space.fit.offset, images, rows.appends,
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0),
        images.stride(0), images.stride(1),
        D=head_dim, D_PAD=triton.next_power_of_2(head_dim), PAGE=page, WIDTH=images.shape[3],
        BLOCK=APPEND_BLOCK, LIMIT=torch.finfo(images.dtype).max,
        PRECISION=input_precision(space.fit.b.dtype),
    )  # fmt: skip
