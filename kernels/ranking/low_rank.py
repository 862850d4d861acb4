"""Rank by every query against low-rank projections of the keys (ours; see :mod:`basis`).

A token's score in a list is the largest log-probability that any probe of the segment is estimated
to give it: the product of projected query and key, less the row log-sum-exp, which a sample of the
history and the segment's own keys tell. Keys that single queries want, a mean query cannot see.

Rows are queries x heads. Each head has a basis of its own: the directions that one head's queries
vary in, others lack. One row in ``probe_step`` is a probe, see :func:`basis.farthest_rows`.
"""

from collections.abc import Callable

import torch

from ..side_stream import IN_TURN, SideStream
from ..tuning import CHUNK
from ..work_list import WorkList
from . import basis, retrieval
from .find_heads import find_heads
from .fit_basis import BasisWorkspace, find_bases, take_moments
from .probes import choose_probes
from .project import project_keys
from .row_lse import estimate_row_lse
from .score import key_capacity, score_history


class LowRankWorkspace:
    """Scratch of :func:`low_rank_scores`: bases, projected keys, and probes of one work list.

    Args:
        heads: query heads.
        bases: heads, for a basis of each, or KV heads, for one that a group shares.
        head_dim: size of a head.
        max_history: most tokens that a query sees.
        segments: most segments of a work list.
        segment: queries of a segment.
        dtype: of queries.
        device: of the kernels.
        projection_dtype: of projected keys and probes; :func:`tiles.projection_dtype` by default.
        precision: columns of a projection, and how many rows are probes.
        ranked: None, or int32 ``[capacity]``: only these heads are ranked, -1 for none.

    Attributes are those of :class:`workspace.RankingWorkspace`; with ``ranked``, its entries stand
    for bases in all but ``basis``. Also:

    Attributes:
        retrieval: None, or the ranking of retrieval heads, which adds to this one.
    """

    retrieval: "RetrievalWorkspace | None" = None

    def __init__(
        self,
        heads: int,
        bases: int,
        head_dim: int,
        max_history: int,
        segments: int,
        segment: int,
        dtype: torch.dtype,
        device: torch.device,
        projection_dtype: torch.dtype | None = None,
        precision: basis.Precision = basis.SERVED,
        ranked: torch.Tensor | None = None,
    ):
        projection = projection_dtype or basis.projection_dtype(device)
        width, self.probe_step = precision
        self.basis = BasisWorkspace(bases, head_dim, dtype, device, width)
        self.heads = ranked
        count = bases if ranked is None else ranked.numel()
        shape = (count, key_capacity(max_history), width)
        self.projected_keys = torch.empty(shape, dtype=projection, device=device)
        probes = -(-segment * (heads // bases) // self.probe_step)
        self.distances = torch.empty(segments, count, probes * self.probe_step, device=device)
        self.probe_rows = torch.empty(segments, count, probes, dtype=torch.int32, device=device)
        self.projected_probes = torch.empty(
            segments, count, probes, width, dtype=projection, device=device
        )


class RetrievalWorkspace:
    """Scratch of the second ranking, of retrieval heads alone; see :mod:`retrieval`.

    Args:
        all_heads: the ranking of all heads, whose moments it shares.
        kv_heads: key/value heads.
        segment: queries of a segment.

    Attributes:
        far_mass: int32 ``[heads]``, zero between two chunks.
        heads: int32 ``[kv_heads * capacity]``, the retrieval heads, -1 for none.
        ranking: bases of all heads, projected keys and probes of retrieval heads.
    """

    def __init__(self, all_heads: LowRankWorkspace, kv_heads: int, segment: int):
        keys, (segments, heads) = all_heads.projected_keys, all_heads.projected_probes.shape[:2]
        self.far_mass = torch.zeros(heads, dtype=torch.int32, device=keys.device)
        capacity = kv_heads * retrieval.capacity(heads // kv_heads)
        self.heads = torch.full((capacity,), -1, dtype=torch.int32, device=keys.device)
        shared = all_heads.basis
        self.ranking = LowRankWorkspace(
            heads, heads, shared.a.shape[1], keys.shape[1], segments, segment, shared.a.dtype,
            keys.device, keys.dtype, basis.RETRIEVAL, ranked=self.heads,
        )  # fmt: skip
        self.ranking.basis.moments, self.ranking.basis.means = shared.moments, shared.means


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
    """Score every segment's history, one score per KV head and token.

    The first list of a chunk prepares ``space`` for the other ones: they must follow in order.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, ``query``'s dtype or fp8.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        scores: float16 ``[segments, kv_heads, max_history]``; written up to each segment's
            ``dense_start``, in whole groups of `score.STORED`: the largest log2-probability that
            any probe of the segment is estimated to give the token.
        bounds: float32 ``[segments * kv_heads, chunks, 2]``: best and worst score of each chunk.
        space: scratch.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        chunk: history tokens of a program.
        side_stream: where launches may overlap with the others; joined.
        overlapped: launches further work of a chunk with histories, which nothing here reads.
    """
    if work.max_seen == 0:
        return
    if work.first_of_chunk:
        take_moments(query, kv_cache, block_table, work.row, work.chunk, space.basis)
        with side_stream:  # of the bases, which fill a quarter of a card
            overlapped()
        find_bases(space.basis, scale=scale)
        with side_stream:  # of projecting keys, which waits for memory
            choose_probes(query, work, space)
        project_keys(kv_cache, block_table, work.row, work.max_seen, space)
        side_stream.join()
    if work.max_history == 0:
        return
    if not work.first_of_chunk:
        choose_probes(query, work, space)
    more = space.retrieval
    if more is not None and work.first_of_chunk:
        with side_stream:  # of log-sum-exps
            find_bases(more.ranking.basis, scale=scale)
    estimate_row_lse(query, work, space)
    if more is not None:
        with side_stream:  # of the scores of all heads
            if work.first_of_chunk:
                find_heads(
                    query, kv_cache, block_table, work, space, more.far_mass, more.heads,
                    scale=scale,
                )  # fmt: skip
                project_keys(kv_cache, block_table, work.row, work.max_seen, more.ranking)
            choose_probes(query, work, more.ranking)
            estimate_row_lse(query, work, more.ranking)
    group = query.shape[1] // space.basis.a.shape[-3]
    score_history(work, scores, bounds, space, group, chunk=chunk)
    if more is not None:
        side_stream.join()
        score_history(work, scores, bounds, more.ranking, group, chunk=chunk)
