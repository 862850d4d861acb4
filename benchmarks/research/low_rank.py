"""Ablations of the low-rank ranking: every query against projected keys of any basis."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..quality.attention import Segment
from ..quality.ranking import Method
from ..quality.reductions import Reduction
from ..quality.selection import Ranking
from ..quality.units import Unit
from .basis import fit_chunks

FP8_MAX = 448.0  # largest e4m3 value
PRECISIONS = ("fp32", "fp8")


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
    """Every query against projected keys, one basis for each chunk of keys (ours).

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
    """Scores of queries of one head against the projected history."""

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
    """Round to e4m3 with one scale for the tensor; fp32, any shape [...]."""
    scale = FP8_MAX / x.abs().amax().clamp(min=1e-12)
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


@dataclass(frozen=True)
class S2O(LowRank):
    """Our method with the settings that `LOG.md` ends with: where the kernels are to go.

    One list for 32 queries of a GQA group; a rank-32 basis of the whole history, fitted to the
    last 2,048 queries by two steps of subspace iteration; no exponential per element.
    """

    unit: str = "32xkv"
    chunk: int = 0
    queries: int = 2048
    basis: str = "random2"
    reduce: str = "max-max16"

    name: ClassVar[str] = "s2o"
