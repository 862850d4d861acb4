"""Mean-pooled blocks: FlexPrefill's rule, FlashPrefill's cut and correction."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...quality.attention import Segment
from ...quality.ranking import Method, mean_queries
from ...quality.selection import Ranking
from ...quality.units import Unit

BLOCK = 128


def block_means(k: Tensor, block: int) -> Tensor:
    """Return mean keys of blocks [..., ceil(T / block), D] of keys [..., T, D]."""
    parts = k.split(block, -2)
    return torch.stack([part.mean(-2) for part in parts], -2)


def keep_first(scores: Tensor) -> Tensor:
    """Raise every unit's first block to its best score, so that the sink tokens are visited.

    The published codes of the block methods force this block or offer to; a mean key hides a
    sink token among 127 others, and without it their errors grow several times.

    Args:
        scores: [U, blocks].
    """
    scores[:, 0] = scores.amax(1)
    return scores


@dataclass(frozen=True)
class BlockMean(Method):
    """Tile's mean query against each block's mean key; softmax over blocks.

    With ``rule=mass`` this is FlexPrefill's query-aware branch (arXiv 2502.20766, section
    4.2): the fewest blocks whose estimated probabilities reach a cumulative threshold.

    Attributes:
        block: keys of a block.
        sink: 1 forces the first block, 0 leaves it to its score.
    """

    block: int = BLOCK
    sink: int = 1

    name: ClassVar[str] = "block_mean"

    def ranking(self, segment: Segment) -> Ranking:
        """Score blocks by log probability or, for the mass rule, by probability."""
        unit = Unit.parse(self.unit)
        q = mean_queries(segment, unit)  # [H, tiles, D]
        keys = block_means(segment.k, self.block).repeat_interleave(segment.group, 0)
        scores = (q @ keys.transpose(1, 2) * segment.scale).log_softmax(2)  # [H, tiles, blocks]
        if unit.shared:
            scores = scores.unflatten(0, (-1, segment.group)).exp().mean(1).log()
        scores = scores.flatten(0, 1)
        if self.rule == "mass":
            scores = scores.exp()
        if self.sink:
            scores = keep_first(scores)
        return Ranking(unit.rows(segment), scores, self.block)


@dataclass(frozen=True)
class FlexPrefill(BlockMean):
    """`BlockMean` with the cumulative mass rule."""

    rule: str = "mass"

    name: ClassVar[str] = "flexprefill"


@dataclass(frozen=True)
class FlashPrefill(BlockMean):
    """Blocks of a KV head above alpha times the best, a mean term for each skipped block.

    FlashPrefill V2 (arXiv 2608.19758): one list for the heads of a KV head, probability ≥
    alpha·max, and every skipped block enters the softmax as its count times one mean key and
    value.
    """

    unit: str = "128xkv"
    rule: str = "gap"
    correction: str = "blocks"

    name: ClassVar[str] = "flashprefill"
