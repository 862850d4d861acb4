"""Rank by every query against a low-rank image of the keys (ours; see :mod:`basis`).

A token's score in a list is the largest log-probability that any scored row of the segment gives
it, in the image; a row's mass is told by a sample of its history and by its own segment. A mean
query cannot see keys that single queries want; this can. Rows are queries x heads of a group;
each head has a basis of its own: what one head looks for lies in directions that others lack. One
row in ``row_step`` is scored: those whose images are farthest from the segment's mean. What many
queries want, the nearest of these want, too.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..side_stream import IN_TURN, SideStream
from ..tiles import input_precision
from ..tuning import CHUNK
from ..work_list import WorkList
from . import basis, retrieval
from .find_heads import find_heads
from .fit import FitWorkspace, find_bases, take_moments
from .keys import load_keys
from .rows import choose_rows, shift_rows
from .score import image_room, score_rows

KEYS_BLOCK = 64  # keys that are projected at a time, and by a program in all
KEYS_SPAN = 512
COLUMNS = 128  # of one product, which the bases of several heads of a KV head fill


@triton.jit(do_not_specialize=["row", "seen"])
def _project_keys_kernel(
    p_kv, p_table, p_b, p_offset, p_images, p_numbers, row, seen,
    stride_block, stride_head, stride_token, stride_table, stride_images_head,
    SHARE: tl.constexpr, TOGETHER: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """image[basis, key] = k B − offset, of SPAN keys of a KV head and TOGETHER of its SHARE bases.

    The bases are twice as much as BLOCK keys: they are read once for all of a span. One stage:
    Triton 3.6 sets no fence between asynchronous copies and wgmma. With numbers SHARE is places
    of retrieval heads, which say whose basis each place takes.
    """
    i_span, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D_PAD)
    # One product for all: of a basis WIDTH columns.
    o_c = tl.arange(0, TOGETHER * WIDTH)
    number = tl.program_id(2) * TOGETHER + o_c // WIDTH
    i_image = i_head * SHARE + tl.minimum(number, SHARE - 1)
    wanted = number < SHARE
    i_basis = i_image
    if p_numbers is not None:
        first = i_head * SHARE + tl.program_id(2) * TOGETHER
        if tl.load(p_numbers + first) < 0:
            return
        i_basis = tl.load(p_numbers + i_image).to(tl.int64)
        wanted = wanted & (i_basis >= 0)
        i_basis = tl.maximum(i_basis, 0)
    o_b = i_basis[None, :] * (D * WIDTH) + o_d[:, None] * WIDTH + (o_c % WIDTH)[None, :]
    b = tl.load(p_b + o_b, (o_d < D)[:, None], 0.0)
    offset = tl.load(p_offset + i_basis * WIDTH + o_c % WIDTH)
    o_image = i_image * stride_images_head + o_c % WIDTH
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
        k = k.to(p_b.dtype.element_ty)
        image = tl.dot(k, b, input_precision=PRECISION) - offset[None, :]
        if p_images.dtype.element_ty == tl.float16:  # conversions to e4m3 have limits of their own
            image = tl.minimum(tl.maximum(image, -LIMIT), LIMIT)
        tl.store(
            p_images + o_n[:, None] * WIDTH + o_image[None, :],
            image.to(p_images.dtype.element_ty), (o_n < end)[:, None] & wanted[None, :],
        )  # fmt: skip
        o_n += BLOCK
        k = ahead


class LowRankWorkspace:
    """Scratch of :func:`low_rank_scores`: bases, images of a history and of a list's rows.

    Attributes:
        fit: the bases.
        row_step: see :class:`basis.Precision`.
        numbers: None, or int32 ``[places]``: only these heads are ranked, -1 for none.
        images: ``[bases, >= max_history, width]``, of keys; with numbers places stand for bases.
        sizes: float32 ``[items, bases, rows of a segment]``, of their images.
        chosen: int32 ``[items, bases, scored rows]``, which they are.
        rows: ``[items, bases, scored rows, width]``, their images.
        retrieval: None, or the ranking of retrieval heads, which adds to this one.
    """

    retrieval: "RetrievalWorkspace | None" = None

    def __init__(
        self,
        heads: int,
        bases: int,
        head_dim: int,
        max_history: int,
        items: int,
        segment: int,
        dtype: torch.dtype,
        device: torch.device,
        image_dtype: torch.dtype | None = None,
        precision: basis.Precision = basis.SERVED,
        numbers: torch.Tensor | None = None,
    ):
        kind = image_dtype or basis.image_dtype(device)
        width, self.row_step = precision
        self.fit = FitWorkspace(bases, head_dim, dtype, device, width)
        self.numbers = numbers
        kept = bases if numbers is None else numbers.numel()
        shape = (kept, image_room(max_history), width)
        self.images = torch.empty(shape, dtype=kind, device=device)
        rows = -(-segment * (heads // bases) // self.row_step)
        self.sizes = torch.empty(items, kept, rows * self.row_step, device=device)
        self.chosen = torch.empty(items, kept, rows, dtype=torch.int32, device=device)
        self.rows = torch.empty(items, kept, rows, width, dtype=kind, device=device)


class RetrievalWorkspace:
    """Scratch of the second ranking, of retrieval heads alone; see :mod:`retrieval`.

    Args:
        narrow: the ranking of all heads, whose sizes and moments it shares.
        kv_heads: key/value heads.
        segment: queries of a segment.

    Attributes:
        sought: int32 ``[heads]``, zero between two chunks.
        numbers: int32 ``[places]``, the retrieval heads.
        wide: bases of all heads, images and rows of retrieval heads.
    """

    def __init__(self, narrow: LowRankWorkspace, kv_heads: int, segment: int):
        device, (segments, heads) = narrow.images.device, narrow.rows.shape[:2]
        self.sought = torch.zeros(heads, dtype=torch.int32, device=device)
        places = kv_heads * retrieval.capacity(heads // kv_heads)
        self.numbers = torch.full((places,), -1, dtype=torch.int32, device=device)
        self.wide = LowRankWorkspace(
            heads, heads, narrow.fit.a.shape[1], narrow.images.shape[1], segments, segment,
            narrow.fit.a.dtype, device, narrow.images.dtype, basis.WIDE, numbers=self.numbers,
        )  # fmt: skip
        self.wide.fit.moments, self.wide.fit.means = narrow.fit.moments, narrow.fit.means


def project_keys(
    kv_cache: torch.Tensor, block_table: torch.Tensor, row: int, tokens: int,
    space: LowRankWorkspace,
) -> None:  # fmt: skip
    """Project the first keys of a row of the block table by the fitted bases."""
    fitted = space.fit
    head_dim, page, kv_heads = kv_cache.shape[3] // 2, kv_cache.shape[2], kv_cache.shape[1]
    share, width = space.images.shape[0] // kv_heads, space.images.shape[2]
    together = min(triton.next_power_of_2(share), COLUMNS // width)
    _project_keys_kernel[(-(-tokens // KEYS_SPAN), kv_heads, -(-share // together))](
        kv_cache, block_table, fitted.b, fitted.offset, space.images, space.numbers, row,
        tokens, kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        block_table.stride(0), space.images.stride(0), SHARE=share, TOGETHER=together,
        D=head_dim, D_PAD=triton.next_power_of_2(head_dim), PAGE=page, WIDTH=width,
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
    side_stream: SideStream = IN_TURN,
    overlapped: Callable[[], None] = lambda: None,
) -> None:
    """Score every item's history, one score per KV head and token.

    The first list of a chunk prepares ``space`` for the other ones: they must follow in order.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, ``query``'s dtype or fp8.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        scores: float16 ``[items, kv_heads, max_history]``; written up to each item's
            ``dense_start``, in whole groups of `score.STORED`: the largest log2-probability that
            any scored row of the segment is estimated to give the token.
        bounds: float32 ``[items * kv_heads, chunks, 2]``: best and worst score of each chunk.
        space: scratch.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        chunk: history tokens of a program.
        side_stream: where launches may overlap with the others; joined.
        overlapped: launches what else a chunk with histories needs, and nothing here reads.
    """
    if work.max_seen == 0:
        return
    if work.first_of_chunk:
        take_moments(query, kv_cache, block_table, work.row, work.chunk, space.fit)
        with side_stream:  # of the bases, which fill a quarter of a card
            overlapped()
        find_bases(space.fit, scale=scale)
        with side_stream:  # of the keys' images, which wait for memory
            choose_rows(query, work, space)
        project_keys(kv_cache, block_table, work.row, work.max_seen, space)
        side_stream.join()
    if work.max_history == 0:
        return
    if not work.first_of_chunk:
        choose_rows(query, work, space)
    more = space.retrieval
    if more is not None and work.first_of_chunk:
        with side_stream:  # of log-sum-exps
            find_bases(more.wide.fit, scale=scale)
    shift_rows(query, work, space)
    if more is not None:
        with side_stream:  # of the scores of all heads
            if work.first_of_chunk:
                find_heads(
                    query, kv_cache, block_table, work, space, more.sought, more.numbers,
                    scale=scale,
                )  # fmt: skip
                project_keys(kv_cache, block_table, work.row, work.max_seen, more.wide)
            choose_rows(query, work, more.wide)
            shift_rows(query, work, more.wide)
    group = query.shape[1] // space.fit.a.shape[-3]
    score_rows(work, scores, bounds, space, group, chunk=chunk)
    if more is not None:
        side_stream.join()
        score_rows(work, scores, bounds, more.wide, group, chunk=chunk)
