"""Units: which queries share one list of history tokens.

A unit is a tile of a segment's queries of one head, or of all heads of one KV head's GQA
group. Queries may be sorted before they are cut into tiles (the paper's permutation of Q; its
guide vector is not published, the first principal component is ours).
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Segment

FINE = 32  # queries of a block that scores are kept for, in units of a multiple


class Rows(NamedTuple):
    """The rows of every unit of a segment.

    Attributes:
        rows: flat indices head * S + query [U, R]; inside a KV head's unit the heads of one
            query are neighbours, as the attend kernel packs them.
        kv: KV head of the unit [U].
    """

    rows: Tensor
    kv: Tensor


@dataclass(frozen=True)
class Unit:
    """How a segment is cut.

    Attributes:
        queries: queries of a unit.
        shared: one list for all heads of a KV head.
        sorted: queries are sorted by their first principal component before cutting.
    """

    queries: int
    shared: bool
    sorted: bool = False

    @classmethod
    def parse(cls, text: str) -> "Unit":
        """Read ``128xhead``, ``512xkv`` or ``128xhead-sorted``."""
        match = re.fullmatch(r"(\d+)x(head|kv)(-sorted)?", text)
        if not match or int(match[1]) < 1:
            raise ValueError(f"unit must look like 128xhead, 512xkv or 128xhead-sorted, not {text}")
        return cls(int(match[1]), match[2] == "kv", bool(match[3]))

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return f"{self.queries}x{'kv' if self.shared else 'head'}{'-sorted' if self.sorted else ''}"

    def order(self, segment: Segment) -> Tensor:
        """Return the order of the queries of each head [H, S]."""
        if not self.sorted:
            return torch.arange(segment.length).expand(segment.heads, -1)
        key = ("order", self.shared)
        return segment.memo(key, lambda: _first_component_order(segment, self.shared))

    def tiles(self, segment: Segment) -> int:
        """Return how many tiles the segment has; they must divide it."""
        if segment.length % self.queries:
            raise ValueError(
                f"units of {self.queries} queries do not divide a segment of {segment.length}"
            )
        return segment.length // self.queries

    def rows(self, segment: Segment) -> Rows:
        """Return the rows of every unit, KV head by KV head, tile by tile."""
        size, heads, group = segment.length, segment.heads, segment.group
        tiles = self.tiles(segment)
        flat = torch.arange(heads)[:, None] * size + self.order(segment)  # [H, S]
        if self.shared:
            flat = flat.view(-1, group, tiles, self.queries).permute(0, 2, 3, 1)
            rows = flat.reshape(-1, self.queries * group)
        else:
            rows = flat.reshape(-1, self.queries)
        kv = torch.arange(segment.kv_heads).repeat_interleave(len(rows) // segment.kv_heads)
        return Rows(rows, kv)

    @property
    def fine(self) -> int:
        """Queries of the blocks that scores are kept for: units of a segment may share them."""
        return math.gcd(FINE, self.queries)

    def pool(self, fine: Tensor, group: int, how: str, block: int = FINE) -> Tensor:
        """Reduce scores of small blocks of queries to scores of units.

        Args:
            fine: [H, F, T], F blocks of equal size in the unit's order.
            group: heads of a KV head.
            how: ``mean`` or ``max``.
            block: queries of a block.

        Returns:
            [U, T] in the order of `rows`.

        Raises:
            ValueError: if a unit is not made of whole blocks.
        """
        if self.queries % block:
            raise ValueError(f"units of this ranking hold a multiple of {block} queries")
        heads, blocks, history = fine.shape
        scope = group if self.shared else 1
        tiles = blocks * block // self.queries
        fine = fine.view(heads // scope, scope, tiles, blocks // tiles, history)
        pooled = fine.mean((1, 3)) if how == "mean" else fine.amax((1, 3))
        return pooled.reshape(-1, history)


def _first_component_order(segment: Segment, shared: bool) -> Tensor:
    """Sort queries along the first principal component of one head's or one group's queries."""
    size, dim = segment.length, segment.q.shape[2]
    scope = segment.group if shared else 1
    q = segment.q.view(-1, scope, size, dim).transpose(1, 2).reshape(-1, size, scope * dim)
    q = q - q.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(q @ q.transpose(1, 2))
    del values
    return vectors[..., -1].argsort(1).repeat_interleave(scope, 0)
