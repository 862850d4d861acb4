"""What the kernels do today, through the very functions that serve."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from s2o_vllm.kernels import basis
from s2o_vllm.kernels.plan import FIT_QUERIES, ROW_STEP

from .attention import Segment
from .ranking import Method
from .selection import Ranking
from .units import FINE, Unit


@dataclass(frozen=True)
class Served(Method):
    """The default ranking of `s2o_vllm.kernels`: `basis.fit`, images in fp8, maximum.

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
        fitted = basis.fit(queries, keys, segment.scale)
        seen = basis.key_images(segment.k, fitted, torch.float8_e4m3fn)
        own = segment.q.unflatten(0, (segment.kv_heads, segment.group)).float()
        fine = []
        for head in range(segment.heads):
            of_head = basis.Basis(*(part[head // segment.group] for part in fitted))
            scored = basis.scored_rows(segment.length, segment.group, own.device)
            rows = own[head // segment.group, head % segment.group][scored[head % segment.group]]
            keys = seen[head // segment.group]
            images = basis.query_images(rows, of_head, keys, torch.float8_e4m3fn)
            scores = images @ keys.T
            fine.append(scores.unflatten(0, (-1, FINE // ROW_STEP)).amax(1))
        scores = unit.pool(torch.stack(fine), segment.group, "max")
        return Ranking(unit.rows(segment), scores)
