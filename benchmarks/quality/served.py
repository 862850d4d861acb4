"""The ranking that serves, through the functions of the kernels' references."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from s2o_vllm.kernels.ranking import basis, retrieval
from s2o_vllm.kernels.tuning import CHUNK_SPANS, SPAN_LENGTH

from .attention import Segment
from .ranking import Method
from .selection import HEADS, REGIONS, Ranking
from .units import Unit


@dataclass(frozen=True)
class Served(Method):
    """The low-rank ranking of `s2o_vllm.kernels`: `basis.fit`, projection to e4m3, maximum.

    One list for 64 queries of a GQA group; the basis of each head is fitted to its last
    ``CHUNK_SPANS * SPAN_LENGTH`` queries, as in a full work list, and to the whole history.
    Retrieval heads are found by the last lists of the segment and ranked again, see
    `kernels.ranking.retrieval`. The
    heads of a tile share its budget, see `selection.counts_heads`; skipped tokens are summarised
    by regions.
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
        every = torch.arange(segment.kv_heads * segment.group)
        scores = _scores(segment, unit.queries, every, basis.SERVED)
        last = scores[-retrieval.SEGMENTS :]
        histories = torch.full((len(last),), segment.history)
        heads = retrieval.retrieval_heads(last, histories, segment.kv_heads).nonzero()[:, 0]
        if len(heads):
            wide = _scores(segment, unit.queries, heads, basis.WIDE)
            scores[:, heads] = torch.maximum(scores[:, heads], wide)
        by_group = scores.unflatten(1, (segment.kv_heads, segment.group)).amax(2)
        return Ranking(unit.rows(segment), by_group.transpose(0, 1).flatten(0, 1))


def _scores(
    segment: Segment, queries_each: int, heads: Tensor, precision: basis.Precision
) -> Tensor:
    """Return the scores of some heads, list by list: float32 ``[lists, heads, history]``."""
    recent = torch.cat([segment.past_q.float(), segment.q.float()], 1)
    recent = recent[:, -CHUNK_SPANS * SPAN_LENGTH :]
    kv_head = heads // segment.group
    keys, own_keys = segment.k[kv_head], segment.own_k[kv_head]
    fitted = basis.fit(
        recent[heads, :: -(-recent.shape[1] // basis.SAMPLES)],
        keys[:, :: -(-segment.history // basis.SAMPLES)], segment.scale, precision.rank,
    )  # fmt: skip
    seen, own = (basis.key_images(part, fitted, torch.float8_e4m3fn) for part in (keys, own_keys))
    lists = []
    for start in range(0, segment.length, queries_each):
        queries = segment.q[heads, start : start + queries_each].float()
        scored = basis.scored_rows(queries @ fitted.a, precision.row_step)
        queries = queries.gather(1, scored[..., None].expand(-1, -1, queries.shape[2]))
        visible = torch.arange(segment.length) <= start + scored[..., None]
        rows = basis.query_images(queries, fitted, seen, own, visible, torch.float8_e4m3fn)
        lists.append((rows @ seen.mT).amax(1))
    return torch.stack(lists)
