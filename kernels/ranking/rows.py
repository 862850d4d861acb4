"""The scored rows of a segment: which they are, their images, and the shift that these end with.

Rows are queries x the heads that share a basis: in prefill each head has its own, in decode a group
has one. See :mod:`low_rank` and :mod:`basis` (ours).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..columns import DENSE_START, HISTORY, NUM_QUERIES, QUERY_START
from ..columns import SEGMENT_COLUMNS as ITEM_COLUMNS
from ..columns import SPAN as FIT
from ..strata import stratum_offset
from ..tiles import input_precision
from ..work_list import WorkList
from . import basis
from .workspace import RankingWorkspace

CHOSEN_BLOCK = 64  # rows that are projected at a time: a load that all wait for each
SHIFT_BLOCK = 64
ROUGH_UNIT = tl.constexpr(basis.ROUGH_UNIT)
ROUGH_ZERO = tl.constexpr(127.0 - basis.ROUGH)
ROUGH_SHARE = tl.constexpr(1 / basis.ROUGH_MOST)
ROUGH_STEP = tl.constexpr(basis.ROUGH_MOST / 256)


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
def _farthest(size, number, rows, kept):
    """Return which ``kept`` rows have the largest sizes, which are not negative, and their places.

    Of equal ones the first rows are taken.
    """
    # As integers, which such numbers order like.
    size = tl.where(number < rows, size.to(tl.int32, bitcast=True), -1)
    # The largest number that ``kept`` sizes reach, four bits at a time: a count is a round of
    # messages between warps, for one number or for sixteen. The last round has three bits.
    least = 0
    for i in range(8):
        higher = least + (tl.arange(0, 16) << tl.maximum(27 - 4 * i, 0))
        reach = tl.sum((size[:, None] >= higher[None, :]).to(tl.int32), 0)
        least = tl.max(tl.where(reach >= kept, higher, 0))
    equal = (size == least).to(tl.int32)
    room = kept - tl.sum((size > least).to(tl.int32))
    chosen = (size > least) | ((equal > 0) & (tl.cumsum(equal) <= room))
    return chosen, tl.cumsum(chosen.to(tl.int32)) - 1


@triton.jit
def _choose(
    p_q, p_a, p_size, p_chosen, rows, kept, o_basis, stride_q_token, stride_q_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the numbers of the rows that are scored: those farthest from the mean image."""
    o_b = tl.arange(0, BLOCK)
    mean = tl.zeros([WIDTH], tl.float32)
    for i in tl.range(0, tl.cdiv(rows, BLOCK), num_stages=1):
        o_row = i * BLOCK + o_b
        image = _project_block(
            p_q, p_a, tl.minimum(o_row, rows - 1), o_basis,
            stride_q_token, stride_q_head, GROUP, D, D_PAD, WIDTH, PRECISION,
        )  # fmt: skip
        mean += tl.sum(tl.where((o_row < rows)[:, None], image, 0.0), 0)
    mean /= rows
    for i in tl.range(0, tl.cdiv(rows, BLOCK), num_stages=1):
        o_row = i * BLOCK + o_b
        image = _project_block(
            p_q, p_a, tl.minimum(o_row, rows - 1), o_basis,
            stride_q_token, stride_q_head, GROUP, D, D_PAD, WIDTH, PRECISION,
        )  # fmt: skip
        image -= mean[None, :]
        tl.store(p_size + o_row, tl.sum(image * image, 1), o_row < rows)
    # By memory to threads that each have a few of them.
    tl.debug_barrier()
    number = tl.arange(0, BLOCKS * BLOCK)
    size = tl.load(p_size + number, number < rows, 0.0)
    chosen, place = _farthest(size, number, rows, kept)
    tl.store(p_chosen + place, number, chosen)
    tl.debug_barrier()  # other threads read them


@triton.jit
def _project_chosen(
    p_q, p_a, p_chosen, p_rows, rows, kept, o_basis, stride_q_token, stride_q_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Choose among the rows of one block, and write the numbers and images of the chosen ones."""
    o_b, o_r = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    image = _project_block(
        p_q, p_a, tl.minimum(o_b, rows - 1), o_basis,
        stride_q_token, stride_q_head, GROUP, D, D_PAD, WIDTH, PRECISION,
    )  # fmt: skip
    mean = tl.sum(tl.where((o_b < rows)[:, None], image, 0.0), 0) / rows
    far = image - mean[None, :]
    chosen, place = _farthest(tl.sum(far * far, 1), o_b, rows, kept)
    tl.store(p_chosen + place, o_b, chosen)
    image = tl.minimum(tl.maximum(image, -LIMIT), LIMIT).to(p_rows.dtype.element_ty)
    tl.store(p_rows + place[:, None] * WIDTH + o_r[None, :], image, chosen[:, None])


@triton.jit
def _project_rows_kernel(
    p_q, p_a, p_items, p_numbers, p_sizes, p_chosen, p_rows,
    stride_q_token, stride_q_head, max_kept,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    ROW_STEP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LIMIT: tl.constexpr,
    PRECISION: tl.constexpr, BY_FIT: tl.constexpr,
):  # fmt: skip
    """Choose which rows of a segment and basis are scored; write their images without shift.

    One stage in its loops: Triton 3.6 sets no fence between asynchronous copies and wgmma. With
    numbers a program's place says whose rows it takes.
    """
    i_place = tl.program_id(0)
    i_head = i_place
    bases = tl.num_programs(0)
    if p_numbers is not None:
        i_head = tl.load(p_numbers + i_place)
        if i_head < 0:
            return
    i_item = tl.program_id(1).to(tl.int64)
    p_item = p_items + i_item * ITEM_COLUMNS
    start = tl.load(p_item + QUERY_START).to(tl.int64)
    rows = tl.load(p_item + NUM_QUERIES) * GROUP
    if tl.load(p_item + DENSE_START) == 0:
        return
    o_basis = i_head.to(tl.int64) * D
    if BY_FIT:
        o_basis += tl.load(p_item + FIT).to(tl.int64) * bases * D
    o_b = tl.arange(0, BLOCK)
    o_r = tl.arange(0, WIDTH)
    p_q += start * stride_q_token + i_head.to(tl.int64) * GROUP * stride_q_head
    o_list = (i_item * bases + i_place) * max_kept
    kept = tl.cdiv(rows, ROW_STEP)
    if ROW_STEP > 1 and BLOCKS == 1:
        _project_chosen(
            p_q, p_a, p_chosen + o_list, p_rows + o_list * WIDTH, rows, kept, o_basis,
            stride_q_token, stride_q_head, GROUP, D, D_PAD, WIDTH, BLOCK, LIMIT, PRECISION,
        )  # fmt: skip
        return
    if ROW_STEP > 1:
        _choose(
            p_q, p_a, p_sizes + o_list * ROW_STEP, p_chosen + o_list, rows, kept, o_basis,
            stride_q_token, stride_q_head, GROUP, D, D_PAD, WIDTH, BLOCK, BLOCKS, PRECISION,
        )  # fmt: skip
    for first in tl.range(0, kept, BLOCK, num_stages=1):
        o_row = first + o_b
        row = tl.minimum(o_row, kept - 1)
        if ROW_STEP > 1:
            row = tl.load(p_chosen + o_list + row)
        else:
            tl.store(p_chosen + o_list + o_row, o_row, o_row < kept)
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
def _minus_rough_exp2(s, zero, FUSED: tl.constexpr):
    """See :func:`basis.rough_exp2`: three instructions, its sign is left as it comes.

    ``zero`` are the shares of scores that are 0.
    """
    if FUSED:  # the numbers are ROUGH_SHARE, ROUGH_STEP and 1
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 share;
            .reg .b32 bits;
            fma.rn.sat.f32 share, $1, 0f3B810204, $2;
            fma.rn.f32 share, share, 0f3F7E0000, 0f3F800000;
            mov.b32 bits, share;
            shl.b32 bits, bits, 8;
            mov.b32 $0, bits;
            }""",
            "=f,f,f", [s, tl.broadcast_to(zero[:, None], s.shape)],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    share = tl.minimum(tl.maximum(s * ROUGH_SHARE + zero[:, None], 0.0), 1.0)
    bits = (share * ROUGH_STEP + 1.0).to(tl.int32, bitcast=True)
    return (bits << 8).to(tl.float32, bitcast=True)


@triton.jit
def _own_mass(
    p_images, q, query, history, n, queries, o_r, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Running maximum and mass of rows over the keys of one item's dense pass that they see."""
    m = tl.full([q.shape[0]], float("-inf"), tl.float32)
    mass = tl.zeros([q.shape[0]], tl.float32)
    end = tl.where(n > 0, history - n + queries, 0)
    p_own = p_images + n.to(tl.int64) * WIDTH
    for o in tl.range(0, end, BLOCK_N, num_stages=1):
        o_n = o + tl.arange(0, BLOCK_N)
        k = tl.load(p_own + tl.minimum(o_n, end - 1)[:, None] * WIDTH + o_r[None, :])
        seen = o_n[None, :] <= history - n + query[:, None]
        s = tl.where(seen, tl.dot(q, tl.trans(k)), float("-inf"))
        m, mass = _add_mass(s, m, mass)
    return m, mass


@triton.jit
def _sampling(n, SHIFT_STEP: tl.constexpr, SHIFT_SAMPLES: tl.constexpr):
    """Stride and number of the samples of a history, and what is equal where both strides are.

    A history shorter than its stride has a sample of its own.
    """
    step = tl.maximum(SHIFT_STEP, tl.cdiv(n, SHIFT_SAMPLES))
    return step, tl.maximum(n // step, 1), tl.where(n < step, -n, step)


@triton.jit
def _load_sample(p_images, number, step, samples, o_r, WIDTH: tl.constexpr):
    """Images of some of a history's keys."""
    position = number * step + stratum_offset(number, step)
    o_k = position[:, None] * WIDTH + o_r[None, :]
    return tl.load(p_images + o_k, (number < samples)[:, None], 0.0)


@triton.jit(do_not_specialize=["items"])
def _shift_kernel(
    p_rows, p_chosen, p_images, p_items, p_numbers,
    stride_images_fit, stride_images_head, max_kept, items,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, ROW_STEP: tl.constexpr,
    SHIFT_STEP: tl.constexpr, SHIFT_SAMPLES: tl.constexpr, ITEMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FUSED: tl.constexpr, LIMIT: tl.constexpr,
    FACTOR_0: tl.constexpr, FACTOR_1: tl.constexpr, FACTOR_2: tl.constexpr,
    BY_FIT: tl.constexpr,
):  # fmt: skip
    """End BLOCK_M images of rows with their shift, the log-sum-exp over the keys they see.

    Of the history a sample stands for all; of the dense pass every key counts. Rows are those of
    ITEMS neighbouring segments of a request: what a row gets does not depend on which. One stage:
    Triton 3.6 sets no fence between asynchronous copies and wgmma.
    """
    i_block, i_head = tl.program_id(0), tl.program_id(1)
    if p_numbers is not None:  # noqa: SIM102
        if tl.load(p_numbers + i_head) < 0:
            return
    first = tl.program_id(2) * ITEMS
    EACH: tl.constexpr = BLOCK_M // ITEMS
    o_m = tl.arange(0, BLOCK_M)
    o_item, o_row = first + o_m // EACH, i_block * EACH + o_m % EACH
    p_item = p_items + tl.minimum(o_item, items - 1) * ITEM_COLUMNS
    rows = tl.cdiv(tl.load(p_item + NUM_QUERIES) * GROUP, ROW_STEP)
    n = tl.load(p_item + DENSE_START)
    m_row = (o_row < rows) & (n > 0) & (o_item < items)
    if tl.max(m_row.to(tl.int32)) == 0:
        return
    o_list = (tl.minimum(o_item, items - 1).to(tl.int64) * tl.num_programs(1) + i_head) * max_kept
    o_list += tl.minimum(o_row, rows - 1)
    query = tl.load(p_chosen + o_list, m_row, 0) // GROUP
    p_images += i_head.to(tl.int64) * stride_images_head
    if BY_FIT:
        fit = tl.load(p_items + first * ITEM_COLUMNS + FIT)
        p_images += fit.to(tl.int64) * stride_images_fit
    # An image that has no shift yet ends with zeros, which the factors in a key's image meet.
    o_r = tl.arange(0, WIDTH)
    q = tl.load(p_rows + o_list[:, None] * WIDTH + o_r[None, :], m_row[:, None], 0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(ITEMS):
        p_own = p_items + tl.minimum(first + i, items - 1) * ITEM_COLUMNS
        m_own, mass_own = _own_mass(
            p_images, q, query, tl.load(p_own + HISTORY), tl.load(p_own + DENSE_START),
            tl.load(p_own + NUM_QUERIES), o_r, WIDTH, BLOCK_N,
        )  # fmt: skip
        own = o_m // EACH == i
        m, mass = tl.where(own, m_own, m), tl.where(own, mass_own, mass)
    # The rest in units of that, by exponentials so rough that they cost less than a maximum.
    rest = tl.zeros([BLOCK_M], tl.float32)
    zero = (ROUGH_ZERO - m) * ROUGH_SHARE
    _, samples, kind_of_row = _sampling(n, SHIFT_STEP, SHIFT_SAMPLES)
    before = 0
    for i in tl.static_range(ITEMS):
        # Neighbours mostly have one stride: then the first pass is for both.
        longest = tl.load(p_items + tl.minimum(first + i, items - 1) * ITEM_COLUMNS + DENSE_START)
        step, _, kind = _sampling(longest, SHIFT_STEP, SHIFT_SAMPLES)
        alike = m_row & (kind_of_row == kind) & ((i == 0) | (kind != before))
        most = tl.max(tl.where(alike, samples, 0))
        full = tl.min(tl.where(alike, samples, tl.where(m_row, 0, most)))
        full = full // BLOCK_N * BLOCK_N
        number = tl.arange(0, BLOCK_N)
        k = _load_sample(p_images, number, step, full, o_r, WIDTH)
        for _ in tl.range(0, full, BLOCK_N, num_stages=1):
            # Prefetch the next keys.
            number += BLOCK_N
            ahead = _load_sample(p_images, number, step, full, o_r, WIDTH)
            rest += tl.sum(_minus_rough_exp2(tl.dot(q, tl.trans(k)), zero, FUSED), 1)
            k = ahead
        for o in tl.range(full, most, BLOCK_N, num_stages=1):
            number = o + tl.arange(0, BLOCK_N)
            position = tl.minimum(number * step + stratum_offset(number, step), longest - 1)
            k = tl.load(p_images + position[:, None] * WIDTH + o_r[None, :])
            s = _minus_rough_exp2(tl.dot(q, tl.trans(k)), zero, FUSED)
            counts = alike[:, None] & (number[None, :] < samples[:, None])
            rest += tl.sum(tl.where(counts, s, 0.0), 1)
        before = kind
    rest *= -ROUGH_UNIT * (n.to(tl.float32) / samples.to(tl.float32))
    left = m + tl.log2(mass + rest)
    kind_of_number: tl.constexpr = p_rows.dtype.element_ty
    for place in tl.static_range(3):
        factor = FACTOR_0 if place == 0 else (FACTOR_1 if place == 1 else FACTOR_2)
        part = tl.minimum(tl.maximum(left / factor, -LIMIT), LIMIT).to(kind_of_number)
        left -= part.to(tl.float32) * factor
        minus = (-part.to(tl.float32)).to(kind_of_number)
        tl.store(p_rows + o_list * WIDTH + RANK + place, minus, m_row)


def choose_rows(
    query: torch.Tensor,
    work: WorkList,
    space: RankingWorkspace,
    block: int = CHOSEN_BLOCK,
) -> None:
    """Choose and project the rows of a work list's segments; the bases must be fitted.

    Args:
        query: ``[tokens, heads, head_dim]``.
        work: the segments.
        space: bases, of decode indexed by an item's fit; written to.
        block: rows that are projected at a time.
    """
    head_dim, kv_heads, kept = query.shape[2], space.rows.shape[1], space.rows.shape[2]
    _project_rows_kernel[(kv_heads, work.num_segments)](
        query, space.fit.a, work.segments, space.numbers, space.sizes, space.chosen, space.rows,
        query.stride(0), query.stride(1), kept,
        D=head_dim, D_PAD=triton.next_power_of_2(head_dim), BLOCK=block,
        BLOCKS=triton.next_power_of_2(-(-kept * space.row_step // block)),
        PRECISION=input_precision(query.dtype), **_shape(query, space),
    )  # fmt: skip


def shift_rows(
    query: torch.Tensor,
    work: WorkList,
    space: RankingWorkspace,
    block_n: int = 64,
) -> None:
    """End the chosen rows' images with their shifts; the keys must be projected.

    Args:
        query: ``[tokens, heads, head_dim]``.
        work: the segments.
        space: images of keys, of decode indexed by an item's fit, and of rows; written to.
        block_n: keys that a shift is told from at a time.
    """
    images, kv_heads, kept = space.images, space.rows.shape[1], space.rows.shape[2]
    by_fit = images.dim() == 4
    items = 1 if by_fit else next((n for n in (4, 2) if n * kept <= SHIFT_BLOCK), 1)
    grid = (-(-kept * items // SHIFT_BLOCK), kv_heads, -(-work.num_segments // items))
    _shift_kernel[grid](
        space.rows, space.chosen, images, work.segments, space.numbers,
        images.stride(0), images.stride(-3), kept, work.num_segments, ITEMS=items,
        RANK=basis.Precision(images.shape[-1]).rank,
        SHIFT_STEP=basis.SHIFT_STEP, SHIFT_SAMPLES=basis.SHIFT_SAMPLES,
        BLOCK_M=SHIFT_BLOCK, BLOCK_N=block_n, FUSED=images.device.type != "cpu",
        FACTOR_0=basis.SHIFT_FACTORS[0], FACTOR_1=basis.SHIFT_FACTORS[1],
        FACTOR_2=basis.SHIFT_FACTORS[2], **_shape(query, space),
    )  # fmt: skip


def _shape(query: torch.Tensor, space: RankingWorkspace) -> dict[str, Any]:
    """Return the constants that both kernels take."""
    return {
        "GROUP": query.shape[1] // space.fit.a.shape[-3],
        "WIDTH": space.rows.shape[-1],
        "ROW_STEP": space.row_step,
        "BY_FIT": space.images.dim() == 4,
        "LIMIT": torch.finfo(space.images.dtype).max,
    }
