"""What the kernels do today, through the very functions that serve."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from s2o_vllm.kernels import basis
from s2o_vllm.kernels.plan import FIT_QUERIES

from .attention import Segment
from .ranking import Method
from .selection import HEADS, REGIONS, Ranking
from .units import Unit


@dataclass(frozen=True)
class Served(Method):
    """The low-rank ranking of `s2o_vllm.kernels`: `basis.fit`, images in fp8, maximum.

    One list for 64 queries of a GQA group; the basis is fitted to the last ``FIT_QUERIES``
    queries, as in a full work list, and to the whole history. The heads of a tile share its
    budget, see `selection.counts_heads`; means of regions stand for what is skipped.
    """

    unit: str = "64xkv"
    rule: str = HEADS
    correction: str = REGIONS

    name: ClassVar[str] = "served"

    def ranking(self, segment: Segment) -> Ranking:
        """Score tokens; see `Method.ranking`."""
        unit = Unit.parse(self.unit)
        if not unit.shared or unit.sorted:
            raise ValueError("the heads of a group share the lists of the served ranking")
        recent = torch.cat([segment.past_q.float(), segment.q], 1)[:, -FIT_QUERIES:]
        recent = recent.unflatten(0, (segment.kv_heads, segment.group)).flatten(1, 2)
        queries = recent[:, :: -(-recent.shape[1] // basis.SAMPLES)]
        keys = segment.k[:, :: -(-segment.history // basis.SAMPLES)]
        fitted = basis.fit(queries, keys, segment.scale)
        seen, beside = (
            basis.key_images(keys, fitted, torch.float8_e4m3fn)
            for keys in (segment.k, segment.own_k)
        )
        own = segment.q.unflatten(0, (segment.kv_heads, segment.group)).float()
        tile = unit.queries
        fine = []
        for kv in range(segment.kv_heads):
            of_head = basis.Basis(*(part[kv] for part in fitted))
            for start in range(0, segment.length, tile):
                # A tile's rows query by query, as in the kernels.
                queries = own[kv, :, start : start + tile].transpose(0, 1).flatten(0, 1)
                scored = basis.scored_rows(queries @ of_head.a, segment.group)
                visible = torch.arange(segment.length) <= start + scored[:, None] // segment.group
                rows = basis.query_images(
                    queries[scored], of_head, seen[kv], beside[kv], visible, torch.float8_e4m3fn
                )
                fine.append((rows @ seen[kv].T).amax(0))
        return Ranking(unit.rows(segment), torch.stack(fine))
