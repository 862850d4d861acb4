"""XAttention: blocks scored by the sums of their antidiagonals (arXiv 2503.16428)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...quality.attention import Segment
from ...quality.ranking import Method
from ...quality.selection import Ranking
from ...quality.units import Unit
from .blocks import BLOCK, keep_first

STRIDE = 8


def antidiagonal_scores(q: Tensor, k: Tensor, stride: int, scale: float) -> Tensor:
    """Sum q·k along the antidiagonals of stride × stride squares.

    Args:
        q: [S, D], S a multiple of stride.
        k: [T, D]; a last incomplete square is filled with zeros.
        stride: side of a square.
        scale: factor on q·k.

    Returns:
        [S / stride, ceil(T / stride)], divided by stride.
    """
    k = F.pad(k, (0, 0, 0, -len(k) % stride))
    rows = q.unflatten(0, (-1, stride)).flip(1).flatten(1)
    columns = k.unflatten(0, (-1, stride)).flatten(1)
    return rows @ columns.T * (scale / stride)


@dataclass(frozen=True)
class XAttention(Method):
    """The fewest blocks that hold a share of the mass estimated from antidiagonals.

    Section 2 of the paper: strided antidiagonal sums, softmax over keys, summed over a block.

    Attributes:
        block: keys of a block.
        stride: side of the squares.
        sink: 1 forces the first block.
    """

    rule: str = "mass"
    block: int = BLOCK
    stride: int = STRIDE
    sink: int = 1

    name: ClassVar[str] = "xattention"

    def ranking(self, segment: Segment) -> Ranking:
        """Score blocks; see `Method.ranking`."""
        unit = Unit.parse(self.unit)
        if unit.shared or unit.sorted:
            raise ValueError("xattention ranks unsorted queries of one head")
        scores = []
        for h in range(segment.heads):
            keys = segment.k[h // segment.group]
            s = antidiagonal_scores(segment.q[h], keys, self.stride, segment.scale).softmax(1)
            s = F.pad(s, (0, -s.shape[1] % (self.block // self.stride)))
            s = s.unflatten(1, (-1, self.block // self.stride)).sum(2)
            scores.append(s.unflatten(0, (-1, unit.queries // self.stride)).mean(1))
        whole = keep_first(torch.cat(scores)) if self.sink else torch.cat(scores)
        return Ranking(unit.rows(segment), whole, self.block)
