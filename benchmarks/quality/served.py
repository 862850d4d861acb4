"""The ranking that serves, through the functions of the kernels' references."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from s2o_vllm.kernels.ranking import PRECISIONS, basis
from s2o_vllm.kernels.tuning import CHUNK_SPANS, SPAN_LENGTH

from .attention import Segment
from .ranking import Method
from .selection import HEADS, REGIONS, Ranking
from .units import Unit


@dataclass(frozen=True)
class Served(Method):
    """The low-rank ranking of `s2o_vllm.kernels`: `basis.fit`, projection to e4m3, maximum.

    One list for 64 queries of a GQA group; the basis of each head is fitted to its last
    ``CHUNK_SPANS * SPAN_LENGTH`` queries, as in a full work list, and to the whole history. The
    heads of a tile share its budget, see `selection.counts_heads`; skipped tokens are summarised
    by regions.
    """

    unit: str = "64xkv"
    rule: str = HEADS
    correction: str = REGIONS

    name: ClassVar[str] = "served"
    precision: ClassVar[basis.Precision] = PRECISIONS["low_rank"]

    def ranking(self, segment: Segment) -> Ranking:
        """Score tokens; see `Method.ranking`."""
        unit = Unit.parse(self.unit)
        if not unit.shared or unit.sorted:
            raise ValueError("the heads of a group share the lists of the served ranking")
        recent = torch.cat([segment.past_q.float(), segment.q.float()], 1)[
            :, -CHUNK_SPANS * SPAN_LENGTH :
        ]
        keys, own_keys = (x.repeat_interleave(segment.group, 0) for x in (segment.k, segment.own_k))
        fitted = basis.fit(
            recent[:, :: -(-recent.shape[1] // basis.SAMPLES)],
            keys[:, :: -(-segment.history // basis.SAMPLES)], segment.scale, self.precision.rank,
        )  # fmt: skip
        seen, beside = (
            basis.key_images(keys, fitted, torch.float8_e4m3fn) for keys in (keys, own_keys)
        )
        tiles = []
        for start in range(0, segment.length, unit.queries):
            queries = segment.q[:, start : start + unit.queries].float()
            scored = basis.scored_rows(queries @ fitted.a, self.precision.row_step)
            queries = queries.gather(1, scored[..., None].expand(-1, -1, queries.shape[2]))
            visible = torch.arange(segment.length) <= start + scored[..., None]
            rows = basis.query_images(queries, fitted, seen, beside, visible, torch.float8_e4m3fn)
            by_head = (rows @ seen.mT).amax(1)
            tiles.append(by_head.unflatten(0, (segment.kv_heads, segment.group)).amax(1))
        return Ranking(unit.rows(segment), torch.stack(tiles, 1).flatten(0, 1))


@dataclass(frozen=True)
class ServedWide(Served):
    """The ranking `low_rank_wide`: all queries, by twice the directions."""

    name: ClassVar[str] = "served_wide"
    precision: ClassVar[basis.Precision] = PRECISIONS["low_rank_wide"]
