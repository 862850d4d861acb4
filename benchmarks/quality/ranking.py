"""A method's interface, and the paper's ranking: tokens by the logit of a mean query."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .attention import Segment
from .reductions import Reduction
from .selection import Ranking, Selector
from .units import Unit


@dataclass(frozen=True)
class Method:
    """A method: a ranking of the history per unit, a rule that cuts it, and a correction.

    Attributes:
        unit: which queries share a list, as `Unit.parse` reads it.
        rule: how density is shared among units, one of `selection.RULES`.
        correction: how skipped tokens are summarised, one of `selection.CORRECTIONS`.
    """

    unit: str = "128xhead"
    rule: str = "top"
    correction: str = "none"

    name: ClassVar[str] = ""

    def ranking(self, segment: Segment) -> Ranking:
        """Score the history (tokens or blocks) for every unit of the segment."""
        raise NotImplementedError

    def selector(self, segment: Segment) -> Selector:
        """Rank once; selections of any density follow from it."""
        return Selector(segment, self.ranking(segment), self.rule, self.correction)


def mean_queries(segment: Segment, unit: Unit) -> Tensor:
    """Return the mean query of every tile and head [H, tiles, D], in the unit's order."""
    order = unit.order(segment)[..., None].expand_as(segment.q)
    return segment.q.gather(1, order).unflatten(1, (unit.tiles(segment), -1)).mean(2)


@dataclass(frozen=True)
class MeanQuery(Method):
    """The paper's ranking as we read it: tokens by the logit of the unit's mean query.

    The paper ranks per head; how a GQA group shares a list (``reduce``) is ours.

    Attributes:
        reduce: for lists of a KV head, a `Reduction` over the group's mean queries, or
            ``pooled``: the mean query of all heads of the group.
    """

    unit: str = "512xhead"
    reduce: str = "max-lse"

    name: ClassVar[str] = "mean_query"

    def ranking(self, segment: Segment) -> Ranking:
        """Score tokens; see `Method.ranking`."""
        unit = Unit.parse(self.unit)
        q = mean_queries(segment, unit)  # [H, tiles, D]
        own = segment.own.lse.unflatten(1, (-1, unit.queries)).mean(2)  # [H, tiles]
        scope = segment.group if unit.shared else 1
        q, own = q.unflatten(0, (-1, scope)), own.unflatten(0, (-1, scope))
        if self.reduce == "pooled":
            q, own, scope = q.mean(1, keepdim=True), own.mean(1, keepdim=True), 1
        reduction = Reduction.parse("max-lse" if self.reduce == "pooled" else self.reduce)
        scores = []
        lists = len(q) // segment.kv_heads
        for i, (queries, own_lse) in enumerate(zip(q, own, strict=True)):
            keys = segment.k[i // lists]
            s = queries.transpose(0, 1).flatten(0, 1) @ keys.T * segment.scale
            scores.append(reduction.apply(s, own_lse.T.flatten(), scope))
        return Ranking(unit.rows(segment), torch.cat(scores))
