"""What the kernels do today, through the very functions that serve."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from s2o_vllm.kernels import basis
from s2o_vllm.kernels.plan import (
    CANDIDATES_LEAST,
    FIT_QUERIES,
    TIERS_UNORDERED,
    candidates,
    coarse_step,
)
from s2o_vllm.kernels.reference_select import select_positions

from .attention import Segment
from .ranking import Method
from .selection import HEADS, REGIONS, Ranking
from .units import FINE, Unit


@dataclass(frozen=True)
class Served(Method):
    """The default ranking of `s2o_vllm.kernels`: `basis.fit`, images in fp8, maximum.

    One list for 64 queries of a GQA group; the basis is fitted to the last ``FIT_QUERIES``
    queries, as in a full work list, and to the whole history. The heads of a tile share its
    budget, see `selection.counts_heads`; means of regions stand for what is skipped. Of a long
    history only the candidates of those queries are ranked: as many as
    for a budget of ``rank_for``, 0 for all.
    """

    unit: str = "64xkv"
    rule: str = HEADS
    correction: str = REGIONS
    rank_for: float = 0.1

    name: ClassVar[str] = "served"

    def ranking(self, segment: Segment) -> Ranking:
        """Score tokens; see `Method.ranking`."""
        unit = Unit.parse(self.unit)
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
        causal = torch.ones(segment.length, segment.length, dtype=torch.bool).tril()
        fine = []
        for head in range(segment.heads):
            kv, member = divmod(head, segment.group)
            of_head = basis.Basis(*(part[kv] for part in fitted))
            rows = basis.query_images(
                own[kv, member], of_head, seen[kv], beside[kv], causal, torch.float8_e4m3fn
            )
            fine.append((rows @ seen[kv].T).unflatten(0, (-1, FINE)).amax(1))
        scores = unit.pool(torch.stack(fine), segment.group, "max")
        if self.rank_for:
            others = self.others(segment, fitted, torch.cat([seen, beside], 1))
            scores = scores.unflatten(0, (segment.kv_heads, -1))
            scores = scores.masked_fill(others[:, None], float("-inf")).flatten(0, 1)
        return Ranking(unit.rows(segment), scores)

    def others(self, segment: Segment, fitted: basis.Basis, images: Tensor) -> Tensor:
        """Return which tokens of the history are no candidates: bool ``[kv_heads, history]``.

        The last ``FIT_QUERIES`` queries share a basis here, and end with the segment.
        """
        end = segment.history + segment.length
        before = max(end - FIT_QUERIES, 0)
        result = torch.zeros(segment.kv_heads, segment.history, dtype=torch.bool)
        count = candidates(before, self.rank_for, CANDIDATES_LEAST)
        if count == before:
            return result
        recent = torch.cat([segment.past_q.float(), segment.q], 1)[:, before:]
        rows = recent.unflatten(0, (segment.kv_heads, segment.group)).transpose(1, 2)
        number = basis.scored_rows(
            rows[0, :, :, 0].numel(), coarse_step(segment.group), rows.device
        )
        rows = rows.flatten(1, 2)[:, number]
        visible = torch.arange(end - before) <= number[:, None] // segment.group
        rows = basis.query_images(
            rows, fitted, images[:, :before], images[:, before:], visible, torch.float8_e4m3fn
        )
        scores = (rows @ images[:, :before].mT).amax(1).half()
        for head, of_head in enumerate(scores):
            result[head, :before] = True
            result[head, select_positions(of_head, count, TIERS_UNORDERED)] = False
        return result
