"""Candidates: the part of a long history that lists are made from (ours).

Neighbouring segments want much the same tokens. So the history is scored once for the queries that
share a basis, by a sample of their rows, and each segment then ranks only the best of it, by all of
its rows; tokens that came after are candidates as they are. What it costs in error and saves in
time: `benchmarks/quality/LOG.md`.
"""

import torch
import triton
import triton.language as tl

from . import basis
from .fit import FitWorkspace
from .plan import (
    COLUMNS,
    FITS,
    TIERS_UNORDERED,
    Lists,
    WorkList,
    coarse_step,
    fit_span,
    list_places,
    most_candidates,
)
from .project import project_queries
from .score import score
from .select import SelectWorkspace, select


@triton.jit
def _gather_kernel(
    p_images, p_candidates, p_items, p_gathered, max_tokens,
    stride_images_fit, stride_images_head, stride_fit, stride_head,
    stride_gathered_fit, stride_gathered_head,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bring the images of a fit's candidates together, and those of its own tokens behind them."""
    i_block, i_head, i_fit = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_item = p_items + i_fit * ITEM_COLUMNS
    own, n, count = tl.load(p_item + 2), tl.load(p_item + 4), tl.load(p_item + 5)
    if (i_block * BLOCK >= count + own) | (n == 0):
        return
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    o_r = tl.arange(0, WIDTH)
    p_candidates += i_fit * stride_fit + i_head * stride_head
    position = tl.where(o < count, tl.load(p_candidates + o, o < count, 0), n + o - count)
    m = (o < tl.minimum(count + own, max_tokens))[:, None]
    p_images += i_fit * stride_images_fit + i_head.to(tl.int64) * stride_images_head
    image = tl.load(p_images + position.to(tl.int64)[:, None] * WIDTH + o_r[None, :], m)
    p_gathered += i_fit * stride_gathered_fit + i_head.to(tl.int64) * stride_gathered_head
    tl.store(p_gathered + o[:, None] * WIDTH + o_r[None, :], image, m)


class CandidateWorkspace:
    """Scratch of :func:`find`, and what it finds.

    Attributes:
        rows: images of the sampled rows of each fit.
        selection: of the candidates.
        images: ``[FITS, kv_heads, tokens, WIDTH]``, of the candidates and the fit's own tokens.
        step: every how many rows one is sampled.
    """

    def __init__(
        self,
        kv_heads: int,
        group: int,
        max_history: int,
        segment: int,
        least: int,
        kind: torch.dtype,
        device: torch.device,
    ):
        span, most = fit_span(segment), most_candidates(max_history, least)
        self.step = coarse_step(group)
        rows = -(-span * group // self.step)
        self.rows = torch.empty(FITS, kv_heads, rows, basis.WIDTH, dtype=kind, device=device)
        self.selection = SelectWorkspace(
            FITS, kv_heads, max_history, FITS * list_places(most), device
        )
        tokens = min(max_history, most + span)
        self.images = torch.empty(FITS, kv_heads, tokens, basis.WIDTH, dtype=kind, device=device)

    def lists(self, work: WorkList) -> Lists | None:
        """Return the candidates of the work list last found: positions, in order, for slots."""
        return None if work.coarse is None else self.selection.lists(work.coarse)


def find(
    query: torch.Tensor,
    work: WorkList,
    fitted: FitWorkspace,
    images: torch.Tensor,
    space: CandidateWorkspace,
) -> None:
    """Find the candidates of every fit of a chunk.

    Args:
        query: ``[tokens, heads, head_dim]``.
        work: the chunk's coarse list, one item a fit.
        fitted: bases of the chunk.
        images: ``[FITS, kv_heads, tokens, WIDTH]``, of all tokens that the chunk sees.
        space: written to; ``space.lists`` are the candidates.
    """
    chosen = space.selection
    project_queries(query, work, fitted, images, space.rows, space.step)
    score(
        work, space.rows, images, chosen.scores, chosen.bounds,
        group=query.shape[1] // images.shape[1], step=space.step, chunk=chosen.chunk,
    )  # fmt: skip
    select(work.items, work, 0, chosen, TIERS_UNORDERED)  # any table: it is not read
    positions = chosen.lists(work).slots
    block, most = 64, work.max_list + work.max_queries
    _gather_kernel[(-(-most // block), images.shape[1], work.num_items)](
        images, positions, work.items, space.images, space.images.shape[2],
        images.stride(0), images.stride(1), positions.stride(0), positions.stride(1),
        space.images.stride(0), space.images.stride(1), WIDTH=basis.WIDTH, BLOCK=block,
        ITEM_COLUMNS=COLUMNS,
    )  # fmt: skip
