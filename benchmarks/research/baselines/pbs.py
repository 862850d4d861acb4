"""PBS-Attn: keys permuted inside segments, then blocks (arXiv 2510.21270)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...quality.attention import Segment
from ...quality.ranking import Method, mean_queries
from ...quality.selection import Ranking
from ...quality.units import Unit
from .blocks import BLOCK, block_means, keep_first

LAST_QUERIES = 128
KEY_SEGMENT = 256


def key_order(importance: Tensor, key_segment: int) -> Tensor:
    """Sort keys by importance inside each key segment, best first.

    Args:
        importance: [T].
        key_segment: tokens of a key segment.

    Returns:
        Positions [T].
    """
    start, orders = 0, []
    for part in importance.split(key_segment):
        orders.append(part.argsort(descending=True, stable=True) + start)
        start += len(part)
    return torch.cat(orders)


@dataclass(frozen=True)
class PBS(Method):
    """Blocks of keys sorted inside segments by the attention of the last queries.

    The importance of a key is its mean softmax probability under the last 128 queries of the
    prompt; here the prompt ends with the segment, which favours the method where it does not.
    Blocks are scored by mean query against mean permuted key. ``rule=mass`` is the paper's
    threshold, ``top`` a fixed number of blocks a tile.

    Attributes:
        block: keys of a block.
        key_segment: keys that are sorted together.
        sink: 1 forces the first block, as the published code does.
    """

    block: int = BLOCK
    key_segment: int = KEY_SEGMENT
    sink: int = 1

    name: ClassVar[str] = "pbs"

    def ranking(self, segment: Segment) -> Ranking:
        """Score blocks of permuted keys; see `Method.ranking`."""
        unit = Unit.parse(self.unit)
        if unit.shared:
            raise ValueError("pbs ranks per head: its unit must end in xhead")
        q = mean_queries(segment, unit)
        layouts, scores = [], []
        for h in range(segment.heads):
            keys = segment.k[h // segment.group]
            last = segment.q[h, -LAST_QUERIES:] @ keys.T * segment.scale
            layout = key_order(last.softmax(1).mean(0), self.key_segment)
            s = q[h] @ block_means(keys[layout], self.block).T * segment.scale
            scores.append(s.softmax(1) if self.rule == "mass" else s.log_softmax(1))
            layouts.append(layout.expand(len(s), -1))
        whole = keep_first(torch.cat(scores)) if self.sink else torch.cat(scores)
        return Ranking(unit.rows(segment), whole, self.block, torch.cat(layouts))
