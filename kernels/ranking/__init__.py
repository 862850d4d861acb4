"""Score every token of a history for every query segment.

Two rankings, the second at two precisions: by the segment's mean query (the paper's), or by its
probes against low-rank projections of the keys (ours). The wide one estimates scores so well that
lists are nearly exact ("Exact lists lose nothing" in `benchmarks/quality/LOG.md`), for four times
the products.

A ranking is an object with one method: :mod:`rankings` has those of the kernels. Its reference is a
function that returns scores: :func:`reference_of`.
"""

from functools import partial
from typing import Protocol

from torch import Tensor

from ..work_list import WorkList
from . import reference
from .basis import SERVED, Precision

PRECISIONS = {"low_rank": SERVED, "low_rank_wide": Precision(64, 1)}
RANKINGS = (*PRECISIONS, "mean_query")


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
    if name in PRECISIONS:
        return partial(reference.low_rank_scores, precision=PRECISIONS[name])
    return reference.mean_query_scores
