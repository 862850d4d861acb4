"""Score every token of a history for every query segment.

Two rankings: by the segment's mean query (the paper's), or by its probes against low-rank
projections of the keys (ours), where retrieval heads have more probes and directions.

A ranking is an object with one method: :mod:`rankings` has those of the kernels. Its reference
returns scores: :func:`reference_of`.
"""

from typing import Protocol

from torch import Tensor

from ..work_list import WorkList
from . import reference

RANKINGS = ("low_rank", "mean_query")


class ScoreReference(Protocol):
    """A ranking in plain PyTorch."""

    def __call__(
        self,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        work: WorkList,
        *,
        scale: float,
    ) -> Tensor:
        """Return scores, float16 ``[segments, kv_heads, max_history]``."""


def reference_of(name: str) -> ScoreReference:
    """Return the reference of one of ``RANKINGS``."""
    return reference.LowRank() if name == "low_rank" else reference.mean_query_scores
