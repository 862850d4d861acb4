"""Token methods on the mean query: VecAttention's gap, and S2O as the paper has it."""

from dataclasses import dataclass
from typing import ClassVar

from ...quality.ranking import MeanQuery


@dataclass(frozen=True)
class VecAttention(MeanQuery):
    """Tokens whose mean-query logit lies within a gap of the largest (arXiv 2603.29494)."""

    unit: str = "128xhead"
    rule: str = "gap"

    name: ClassVar[str] = "vecattention"


@dataclass(frozen=True)
class S2OPaper(MeanQuery):
    """Tokens by the segment's mean query, per head (arXiv 2602.22575 as we read it)."""

    name: ClassVar[str] = "s2o_paper"
