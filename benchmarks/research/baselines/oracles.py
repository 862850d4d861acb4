"""Oracles: the exact softmax mass of tokens or blocks, which no method knows beforehand."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ...quality.attention import Segment
from ...quality.ranking import Method
from ...quality.reductions import Reduction
from ...quality.selection import Ranking
from ...quality.units import Unit
from ..low_rank import all_query_scores
from .blocks import BLOCK


def token_mass(segment: Segment, unit: Unit, reduce: str) -> Tensor:
    """Return exact scores [U, T] of all queries, reduced and with the segment's own mass."""
    reduction = Reduction.parse(reduce)

    def score(head: int, q: Tensor) -> Tensor:
        return q @ segment.k[head // segment.group].T * segment.scale

    order = ("sorted", unit.shared) if unit.sorted else "natural"
    fine = segment.memo(
        ("exact", reduce, order, unit.fine),
        lambda: all_query_scores(segment, unit, reduction, score),
    )
    return unit.pool(fine, segment.group, reduction.pooling, unit.fine)


@dataclass(frozen=True)
class TokenOracle(Method):
    """The tokens with the largest softmax mass, averaged over a unit's rows.

    Attributes:
        reduce: a `Reduction`; the default is the mass itself.
    """

    reduce: str = "mean-lse-own"

    name: ClassVar[str] = "token_oracle"

    def ranking(self, segment: Segment) -> Ranking:
        """Score tokens; see `Method.ranking`."""
        unit = Unit.parse(self.unit)
        return Ranking(unit.rows(segment), token_mass(segment, unit, self.reduce))


@dataclass(frozen=True)
class BlockOracle(Method):
    """The blocks with the largest softmax mass: the bound of every block method.

    Attributes:
        block: keys of a block.
    """

    block: int = BLOCK

    name: ClassVar[str] = "block_oracle"

    def ranking(self, segment: Segment) -> Ranking:
        """Score blocks; see `Method.ranking`."""
        unit = Unit.parse(self.unit)
        mass = token_mass(segment, unit, "mean-lse-own")
        mass = F.pad(mass, (0, -mass.shape[1] % self.block))
        scores = mass.unflatten(1, (-1, self.block)).sum(2)
        return Ranking(unit.rows(segment), scores, self.block)
