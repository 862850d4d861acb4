"""Rank by every query against a low-rank image of the keys (ours; see :mod:`basis`).

A token's score in a list is the largest log-probability that any row of the segment gives it, in
the image; a row's mass is told by a sample of its history and by its own segment. A mean query
cannot see keys that single queries want; this can. Rows are queries x heads of a group. Of a long
history only :mod:`candidates` are scored.
"""

import torch

from . import basis, candidates
from .fit import FitWorkspace, fit
from .plan import CANDIDATES_LEAST, CHUNK, FITS, WorkList
from .project import project_keys, project_queries
from .score import score


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
        least: int = CANDIDATES_LEAST,
    ):
        kind, group = image_dtype or basis.image_dtype(device), heads // kv_heads
        self.fit = FitWorkspace(kv_heads, head_dim, dtype, device)
        shape = (FITS, kv_heads, max_history, basis.WIDTH)
        self.images = torch.empty(shape, dtype=kind, device=device)
        shape = (items, kv_heads, segment * group, basis.WIDTH)
        self.rows = torch.empty(shape, dtype=kind, device=device)
        self.candidates = candidates.CandidateWorkspace(
            kv_heads, group, max_history, segment, least, kind, device
        )


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
    """Score every item's candidates, one score per KV head and token.

    The first list of a chunk prepares ``space`` for the other ones: they must follow in order.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, ``query``'s dtype or fp8.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        scores: float16 ``[items, kv_heads, max_history]``; written up to each item's number of
            candidates: the largest log2-probability that any row of the segment is estimated to
            give the token.
        bounds: float32 ``[items * kv_heads, chunks, 2]``: best and worst score of each chunk.
        space: scratch; after the first list ``space.candidates`` says which tokens they are.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        chunk: history tokens of a program.
    """
    if work.max_fit_tokens == 0:
        return
    if work.first_of_chunk:
        fit(query, kv_cache, block_table, work, space.fit, scale=scale)
        project_keys(kv_cache, block_table, work, space.fit, space.images)
        if work.coarse is not None:
            candidates.find(query, work.coarse, space.fit, space.images, space.candidates)
    if work.max_history == 0:
        return
    project_queries(query, work, space.fit, space.images, space.rows, 1)
    images = space.images if work.coarse is None else space.candidates.images
    group = query.shape[1] // kv_cache.shape[1]
    score(work, space.rows, images, scores, bounds, group=group, step=1, chunk=chunk)
