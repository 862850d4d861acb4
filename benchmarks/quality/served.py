"""What the kernels do today, through the very functions that serve."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from s2o_vllm.kernels import basis
from s2o_vllm.kernels.operator import FIT_QUERIES

from .attention import Segment
from .ranking import Method
from .selection import Ranking
from .units import FINE, Unit


@dataclass(frozen=True)
class Served(Method):
    """The default ranking of `s2o_vllm.kernels`: `basis.fit`, `basis.project_queries`, maximum.

    One list for 64 queries of a GQA group; the basis is fitted to the last ``FIT_QUERIES``
    queries, as in a full work list, and to the whole history.
    """

    unit: str = "64xkv"

    name: ClassVar[str] = "served"

    def ranking(self, segment: Segment) -> Ranking:
        """Score tokens; see `Method.ranking`."""
        unit = Unit.parse(self.unit)
        recent = torch.cat([segment.past_q.float(), segment.q], 1)[:, -FIT_QUERIES:]
        recent = recent.unflatten(0, (segment.kv_heads, segment.group)).flatten(1, 2)
        queries = recent[:, :: -(-recent.shape[1] // basis.SAMPLES)]
        keys = segment.k[:, :: -(-segment.history // basis.SAMPLES)]
        fitted = basis.fit(queries, keys)
        images, shifts = basis.project_queries(segment.q.transpose(0, 1), fitted, segment.scale)
        seen = segment.k @ fitted.b - fitted.offset[:, None]
        fine = []
        for head in range(segment.heads):
            scores = images[:, head] @ seen[head // segment.group].T - shifts[:, head, None]
            fine.append(scores.unflatten(0, (-1, FINE)).amax(1))
        scores = unit.pool(torch.stack(fine), segment.group, "max")
        return Ranking(unit.rows(segment), scores)
