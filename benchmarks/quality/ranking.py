"""Rankings: mean queries, and every query against a low-rank image of the keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .attention import Segment
from .basis import fit_chunks
from .reductions import Reduction
from .selection import Ranking, Selector
from .units import Unit

FP8_MAX = 448.0  # largest e4m3 value
PRECISIONS = ("fp32", "fp8")


@dataclass(frozen=True)
class Method:
    """A method: a ranking of the history per unit, a rule that cuts it, and a correction.

    Attributes:
        unit: which queries share a list, as `Unit.parse` reads it.
        rule: how density is shared among units, one of `selection.RULES`.
        correction: what stands for the skipped tokens, one of `selection.CORRECTIONS`.
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
        for i, (queries, shift) in enumerate(zip(q, own, strict=True)):
            keys = segment.k[i // lists]
            s = queries.transpose(0, 1).flatten(0, 1) @ keys.T * segment.scale
            scores.append(reduction.apply(s, shift.T.flatten(), scope))
        return Ranking(unit.rows(segment), torch.cat(scores))


def all_query_scores(
    segment: Segment, unit: Unit, reduction: Reduction, score: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Reduce the scores of every query to the scores of units.

    Args:
        segment: the segment.
        unit: which queries share a list.
        reduction: how a unit's rows become one.
        score: maps (head, queries [S, D]) to scores [S, T], scale included.

    Returns:
        [H, F, T], F blocks of `Unit.fine` queries.
    """
    order = unit.order(segment)
    fine = [
        reduction.apply(score(h, segment.q[h, order[h]]), segment.own.lse[h, order[h]], unit.fine)
        for h in range(segment.heads)
    ]
    return torch.stack(fine)


@dataclass(frozen=True)
class LowRank(Method):
    """Every query against a low-rank image of the keys, one basis a chunk of keys (ours).

    Attributes:
        rank: directions of a basis.
        chunk: tokens of a chunk; 0 takes one basis for the whole history.
        basis: how directions are found, as `basis.fit` reads it.
        reduce: how rows become one, as `Reduction.parse` reads it.
        queries: 0 fits a basis to the queries of its own chunk, n > 0 to the last n queries.
        precision: of the projected queries and keys, ``fp32`` or ``fp8`` (e4m3).
    """

    rank: int = 32
    chunk: int = 8192
    basis: str = "eigen"
    reduce: str = "mean-lse"
    queries: int = 0
    precision: str = "fp32"

    name: ClassVar[str] = "lowrank"

    def ranking(self, segment: Segment) -> Ranking:
        """Score tokens; see `Method.ranking`."""
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be fp32 or fp8, not {self.precision}")
        unit, reduction = Unit.parse(self.unit), Reduction.parse(self.reduce)
        key = (self.rank, self.chunk, self.basis, self.queries, self.precision)
        score = LowRankScores(segment, *key)
        order = ("sorted", unit.shared) if unit.sorted else "natural"
        fine = segment.memo(
            (key, self.reduce, order, unit.fine),
            lambda: all_query_scores(segment, unit, reduction, score),
        )
        rows = unit.rows(segment)
        return Ranking(rows, unit.pool(fine, segment.group, reduction.pooling, unit.fine))


class LowRankScores:
    """Scores of queries of one head against the image of the history."""

    def __init__(
        self,
        segment: Segment,
        rank: int,
        chunk: int,
        basis: str,
        queries: int = 0,
        precision: str = "fp32",
    ):
        self.segment, self.chunk = segment, chunk or segment.history
        self.round = to_fp8 if precision == "fp8" else torch.Tensor.float
        self.bases = segment.memo(
            ("bases", basis, rank, chunk, queries),
            lambda: fit_chunks(segment, basis, rank, chunk, queries),
        )

    def __call__(self, head: int, q: Tensor) -> Tensor:
        """Return scores [S, T] of queries [S, D]."""
        kv = head // self.segment.group
        parts = []
        for i, basis in enumerate(self.bases[kv]):
            k = self.segment.k[kv, i * self.chunk : (i + 1) * self.chunk]
            low_q, low_k = self.round(q @ basis.a), self.round((k - basis.mean) @ basis.b)
            parts.append(low_q @ low_k.T + (q @ basis.mean)[:, None])
        return torch.cat(parts, 1) * self.segment.scale


def to_fp8(x: Tensor) -> Tensor:
    """Round to e4m3 with one scale for the tensor; returns fp32."""
    scale = FP8_MAX / x.abs().amax().clamp(min=1e-12)
    return (x * scale).to(torch.float8_e4m3fn).float() / scale
