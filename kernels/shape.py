"""What the prefill operator must be built for."""

from dataclasses import dataclass

from .tuning import CHUNK_SPANS
from .work_list import Limits, list_capacity, span_queries

WORKSPACE_BYTES = 512 * 2**20  # what one list of segments may take; more segments, more lists


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and of its steps.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: size of a head.
        max_history: longest history, in tokens.
        max_queries: most queries of a step.
        segment: queries per segment.
        ranking: one of :data:`ranking.RANKINGS`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    max_history: int
    max_queries: int
    segment: int
    ranking: str = "low_rank"

    @property
    def limits(self) -> Limits:
        """What one launch handles: a chunk and a quarter of its history, if the scratch allows."""
        most = CHUNK_SPANS * span_queries(self.segment) // self.segment
        chunk = min(-(-self.max_queries // self.segment), most)
        # Of each token a score, and a quarter of a slot and of a weight.
        each = self.kv_heads * self.max_history * 7 // 2
        segments = max(1, min(chunk, WORKSPACE_BYTES // max(each, 1)))
        longest = list_capacity(self.max_history)
        return Limits(segments, max(longest, segments * longest // 4))
