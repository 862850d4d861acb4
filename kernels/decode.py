"""Sparse decode: one query a request, ranked with what the end of its prompt was ranked by (ours).

The last chunk of a prompt leaves images of all keys and the basis that made them: a request's slot
keeps both. A decode step projects the keys that are new since then by the slot's basis, scores all
images by the rows of its one query, selects and attends as prefill does. Programs share a list,
since there are few of them, and what they found is merged.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention.attend import Parts, attend
from .decode_state import DECODE_PARTS, DecodeList, DecodeShape, Kept
from .layout import (
    APPEND_COLUMNS,
    APPEND_COUNT,
    APPEND_FIRST,
    APPEND_ROW,
    APPEND_SLOT,
    ITEM_COLUMNS,
    NUM_QUERIES,
    QUERY_START,
)
from .ranking import basis
from .ranking.low_rank import LowRankWorkspace
from .ranking.rows import choose_rows, shift_rows
from .ranking.score import image_room, score_rows
from .selection.select import SelectWorkspace, select
from .tiles import AttendTile, decode_tile, input_precision
from .work_list import CHUNK, REGION_TOKENS, TIERS_SPLIT, Regions

APPEND_BLOCK = 16  # keys that a program projects at a time: mostly there is one
APPEND_PROGRAMS = 8  # that share what a slot lacks: once, after a prompt, some thousand
CHOSEN_BLOCK = 64
SHIFT_BLOCK_N = 128


@triton.jit
def _append_kernel(
    p_kv, p_table, p_b, p_offset, p_images, p_appends,
    stride_block, stride_head, stride_token, stride_table, stride_images_slot, stride_images_head,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Images of a request's new keys of one head by its slot's basis: k B − offset."""
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
        page = tl.load(p_table + o_n // PAGE, m_n, 0).to(tl.int64)
        o_k = page * stride_block + (o_n % PAGE) * stride_token + i_head * stride_head
        k = tl.load(p_kv + o_k[:, None] + o_d[None, :], m_n[:, None] & (o_d < D)[None, :], 0.0)
        image = tl.dot(k.to(b.dtype), b, input_precision=PRECISION) - offset[None, :]
        image = tl.minimum(tl.maximum(image, -LIMIT), LIMIT)
        tl.store(
            p_images + o_n[:, None] * WIDTH + o_r[None, :], image.to(p_images.dtype.element_ty),
            m_n[:, None],
        )  # fmt: skip


@triton.jit
def _merge_kernel(
    p_parts, p_mass, p_items, p_out, stride_o_token, stride_o_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The attention of one query and head from that to parts of what it visits."""
    i_head, i_item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(0) // GROUP
    if tl.load(p_items + i_item * ITEM_COLUMNS + NUM_QUERIES) == 0:
        return
    query = tl.load(p_items + i_item * ITEM_COLUMNS + QUERY_START).to(tl.int64)
    o_p, o_d = tl.arange(0, PARTS), tl.arange(0, D_PAD)
    o_row = (((i_item * kv_heads + i_head // GROUP) * PARTS + o_p) * GROUP) + i_head % GROUP
    mass = tl.load(p_mass + o_row)  # that of the first part is finite: it has the own token
    weight = tl.exp2(mass - tl.max(mass))
    part = tl.load(p_parts + o_row[:, None] * D + o_d[None, :], (o_d < D)[None, :], 0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.sum(weight)
    p_out += query * stride_o_token + i_head.to(tl.int64) * stride_o_head
    tl.store(p_out + o_d, out.to(p_out.dtype.element_ty), o_d < D)


class DecodeScratch(NamedTuple):
    """What a step writes and the next one may overwrite: layers of one shape share it."""

    sizes: torch.Tensor
    chosen: torch.Tensor
    rows: torch.Tensor
    selection: SelectWorkspace
    parts: Parts


def scratch(
    shape: DecodeShape,
    device: torch.device,
    image_dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
) -> DecodeScratch:
    """Return scratch for so many requests at a time."""
    requests, kv_heads = shape.requests, shape.kv_heads
    group = shape.heads // kv_heads
    kind = image_dtype or basis.image_dtype(device)

    def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(requests, kv_heads, *size, dtype=dtype, device=device)

    return DecodeScratch(
        empty(group, dtype=torch.float32),
        empty(group, dtype=torch.int32),
        empty(group, basis.WIDTH, dtype=kind),
        SelectWorkspace(requests, kv_heads, shape.max_history, shape.places, device, chunk),
        Parts(
            empty(DECODE_PARTS, group, shape.head_dim, dtype=torch.float32),
            empty(DECODE_PARTS, group, dtype=torch.float32),
        ),
    )


class DecodeWorkspace:
    """What the requests of one layer are ranked with, a slot each, and a step's scratch.

    Attributes:
        images: ``[slots, kv_heads, >= max_history, basis.WIDTH]``, of keys.
        fit: the bases that made them, ``a`` and ``b`` ``[slots, kv_heads, head_dim, WIDTH]``,
            ``offset`` ``[slots, kv_heads, WIDTH]``.
        sizes: of the images of a query's rows.
        chosen: which of them are scored: all.
        rows: their images.
        regions: what stands for what is not visited, of the history that the prompt's end saw.
        known: how many regions of each slot are set.
        row_step: 1, all rows are scored.
    """

    row_step = 1

    def __init__(
        self,
        shape: DecodeShape,
        dtype: torch.dtype,
        device: torch.device,
        shared: DecodeScratch,
        region: int = REGION_TOKENS,
    ):
        slots, kv_heads, width = shape.requests, shape.kv_heads, basis.WIDTH

        def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(slots, kv_heads, *size, dtype=dtype, device=device)

        self.images = zeros(image_room(shape.max_history), width, dtype=shared.rows.dtype)
        self.fit = basis.Basis(
            zeros(shape.head_dim, width, dtype=dtype),
            zeros(shape.head_dim, width, dtype=dtype),
            zeros(width, dtype=torch.float32),
        )
        self.sizes, self.chosen, self.rows, self.selection, self.parts = shared
        head_dim = shape.head_dim
        self.known = torch.zeros(slots, dtype=torch.int32, device=device)
        self.regions = Regions(
            zeros(max(1, shape.max_history // region), 2 * head_dim, dtype=dtype),
            zeros(head_dim, head_dim, dtype=dtype),
            zeros(head_dim, head_dim, dtype=dtype),
            region,
            known=self.known,
        )

    def keep(self, kept: Kept, ranked: LowRankWorkspace, regions: Regions) -> None:
        """Copy bases, and images and means of what their queries see, into a slot.

        Args:
            kept: which fit, and where it is kept.
            ranked: what :func:`low_rank.project_keys` left of them.
            regions: what :func:`summaries.average` left of it.
        """
        slot, fit, tokens, _ = kept
        self.images[slot, :, :tokens].copy_(ranked.images[:, :tokens])
        for name in ("a", "b", "offset"):
            getattr(self.fit, name)[slot].copy_(getattr(ranked.fit, name))
        count = tokens // regions.tokens
        self.regions.means[slot, :, :count].copy_(regions.means[:, :count])
        self.regions.slopes[slot].copy_(regions.slopes[fit])
        self.regions.spreads[slot].copy_(regions.spreads[fit])
        self.known[slot : slot + 1].fill_(count)


def append(
    kv_cache: torch.Tensor, block_table: torch.Tensor, rows: DecodeList, space: DecodeWorkspace
) -> None:
    """Project the keys whose images the slots lack, the step's own among them."""
    kv_heads, page, width = kv_cache.shape[1:]
    images, head_dim = space.images, width // 2
    _append_kernel[(APPEND_PROGRAMS, kv_heads, rows.work.num_items)](
        kv_cache, block_table, space.fit.b, space.fit.offset, images, rows.appends,
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0),
        images.stride(0), images.stride(1),
        D=head_dim, D_PAD=triton.next_power_of_2(head_dim), PAGE=page, WIDTH=basis.WIDTH,
        BLOCK=APPEND_BLOCK, LIMIT=torch.finfo(images.dtype).max,
        PRECISION=input_precision(space.fit.b.dtype),
    )  # fmt: skip


def decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: DecodeList,
    space: DecodeWorkspace,
    out: torch.Tensor,
    counters: torch.Tensor,
    *,
    scale: float,
    v_scale: float = 1.0,
    softcap: float = 0.0,
    tile: AttendTile | None = None,
) -> None:
    """Rank, select and attend for every query of a decode step.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, already holding the queries'
            own keys and values; ``query``'s dtype, or float8_e4m3fn.
        block_table: int32 ``[rows, max_blocks]``.
        rows: the queries; their slots are kept and hold what ``covered`` says.
        space: the layer's slots.
        out: ``[tokens, heads, head_dim]``; the rows of the queries are written.
        counters: int64 ``[NUM_COUNTERS]``, added to; see :func:`attend.attend`.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        v_scale: what one unit of the cache's values stands for.
        softcap: cap of the scaled scores, 0 for none.
        tile: tile shape; that of :mod:`tiles` by default.
    """
    work, selection, parts = rows.work, space.selection, space.parts
    head_dim, heads, kv_heads = query.shape[2], query.shape[1], kv_cache.shape[1]
    group = heads // kv_heads
    append(kv_cache, block_table, rows, space)
    choose_rows(query, work, space, block=CHOSEN_BLOCK)
    shift_rows(query, work, space, block_n=SHIFT_BLOCK_N)
    score_rows(
        work, selection.scores, selection.bounds, space, group,
        chunk=selection.chunk, shared=False,
    )  # fmt: skip
    select(block_table, work, kv_cache.shape[2], selection, TIERS_SPLIT, split=True)
    attend(
        query, kv_cache, block_table, work, selection.lists(work), space.regions, out, counters,
        scale=scale, v_scale=v_scale, softcap=softcap, parts=parts,
        tile=tile or decode_tile(head_dim, query.device, group),
    )  # fmt: skip
    _merge_kernel[(heads, work.num_items)](
        *parts, work.items, out, out.stride(0), out.stride(1), GROUP=group, D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim), PARTS=DECODE_PARTS,
    )  # fmt: skip
