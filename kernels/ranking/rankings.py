"""The rankings as objects, each with its scratch."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..shape import Shape
from ..side_stream import SideStream
from ..work_list import WorkList
from .low_rank import LowRankWorkspace, RetrievalWorkspace, low_rank_scores
from .mean_query import MeanQueryWorkspace, mean_query_scores


class Ranking(Protocol):
    """Scores the history of every segment of a work list."""

    def score(
        self,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        work: WorkList,
        scores: Tensor,
        bounds: Tensor,
        *,
        scale: float,
        side_stream: SideStream,
        overlapped: Callable[[], None],
    ) -> None:
        """Write scores and their bounds.

        Args:
            query: ``[tokens, heads, head_dim]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
            block_table: int32 ``[rows, max_blocks]``.
            work: segments of one request; the lists of a chunk come in order.
            scores: float16 ``[segments, kv_heads, max_history]``: log2-probabilities, written up
                to each segment's ``dense_start``, in whole groups of `score.STORED` tokens.
            bounds: float32 ``[segments * kv_heads, chunks, 2]``: best and worst score of each run
                of ``CHUNK`` tokens.
            scale: softmax scale, times what one unit of the cache's keys stands for.
            side_stream: where launches may overlap with the ranking's own; joined.
            overlapped: launches what else the first list of a chunk needs, and no ranking reads.
        """


class MeanQueryRanking:
    """By the segment's mean query (S2O)."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        self.space = MeanQueryWorkspace(
            shape.limits.segments, shape.heads, shape.head_dim, shape.max_history, dtype, device
        )

    def score(
        self,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        work: WorkList,
        scores: Tensor,
        bounds: Tensor,
        *,
        scale: float,
        side_stream: SideStream,
        overlapped: Callable[[], None],
    ) -> None:
        """See :meth:`Ranking.score`; it is too short to overlap with anything."""
        if work.first_of_chunk:
            overlapped()
        mean_query_scores(
            query, kv_cache, block_table, work, scores, bounds, self.space, scale=scale
        )


class LowRankRanking:
    """By probes against low-rank projections of the keys (ours); see :mod:`retrieval`."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        self.space = LowRankWorkspace(
            shape.heads, shape.heads, shape.head_dim, shape.max_history, shape.limits.segments,
            shape.segment, dtype, device,
        )  # fmt: skip
        self.space.retrieval = RetrievalWorkspace(self.space, shape.kv_heads, shape.segment)

    def score(
        self,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        work: WorkList,
        scores: Tensor,
        bounds: Tensor,
        *,
        scale: float,
        side_stream: SideStream,
        overlapped: Callable[[], None],
    ) -> None:
        """See :meth:`Ranking.score`."""
        low_rank_scores(
            query, kv_cache, block_table, work, scores, bounds, self.space, scale=scale,
            side_stream=side_stream, overlapped=overlapped,
        )  # fmt: skip


CLASSES: dict[str, type[MeanQueryRanking] | type[LowRankRanking]] = {
    "mean_query": MeanQueryRanking,
    "low_rank": LowRankRanking,
}


def make_ranking(shape: Shape, dtype: torch.dtype, device: torch.device) -> Ranking:
    """Return the ranking that a shape names, with its scratch."""
    return CLASSES[shape.ranking](shape, dtype, device)
