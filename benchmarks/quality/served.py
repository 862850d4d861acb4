"""The ranking that serves, through the functions of the kernels' references."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from s2o_vllm.kernels.ranking import basis, retrieval
from s2o_vllm.kernels.tuning import CHUNK_SPANS, SPAN_LENGTH

from .attention import Segment
from .ranking import Method
from .selection import CLUSTERS, HEADS, Ranking
from .units import Unit


@dataclass(frozen=True)
class Served(Method):
    """The low-rank ranking of `s2o_vllm.kernels`: `basis.fit`, projection to e4m3, maximum.

    One list for 64 queries of a GQA group; the basis of each head is fitted to its last
    ``CHUNK_SPANS * SPAN_LENGTH`` queries, as in a full work list, and to the whole history.
    Retrieval heads are found by the last lists of the segment and ranked again, see
    `kernels.ranking.retrieval`. The
    heads of a tile share its budget, see `selection.counts_heads`; skipped tokens are summarised
    by clusters of like keys and values, and regions of the chunk.
    """

    unit: str = "64xkv"
    rule: str = HEADS
    correction: str = CLUSTERS

    name: ClassVar[str] = "served"

    def ranking(self, segment: Segment) -> Ranking:
        """Score tokens; see `Method.ranking`."""
        unit = Unit.parse(self.unit)
        if not unit.shared or unit.sorted:
            raise ValueError("the heads of a group share the lists of the served ranking")
        every = torch.arange(segment.kv_heads * segment.group)
        every_head = Estimate(segment, every, basis.SERVED)
        starts = range(0, segment.length, unit.queries)
        scores = torch.stack([every_head.scores(start, unit.queries) for start in starts])
        # A work list begins with the last segment.
        sampled = [starts[-1 - number] for number in retrieval.sampled_segments(len(starts))]
        exact = torch.stack([every_head.exact_scores(start, unit.queries) for start in sampled])
        histories = torch.full((len(sampled),), segment.history)
        heads = retrieval.retrieval_heads(exact, histories, segment.kv_heads).nonzero()[:, 0]
        if len(heads):
            retrieving = Estimate(segment, heads, basis.RETRIEVAL)
            more = torch.stack([retrieving.scores(start, unit.queries) for start in starts])
            scores[:, heads] = torch.maximum(scores[:, heads], more)
        by_group = scores.unflatten(1, (segment.kv_heads, segment.group)).amax(2)
        return Ranking(unit.rows(segment), by_group.transpose(0, 1).flatten(0, 1))


class Estimate:
    """Scores of a history that probes of some heads are estimated to give.

    Args:
        segment: queries and keys.
        heads: int64, which heads.
        precision: of the estimate.
    """

    def __init__(self, segment: Segment, heads: Tensor, precision: basis.Precision):
        self.segment, self.heads, self.probe_step = segment, heads, precision.probe_step
        recent = torch.cat([segment.past_q.float(), segment.q.float()], 1)
        recent = recent[:, -CHUNK_SPANS * SPAN_LENGTH :]
        kv_head = heads // segment.group
        self.keys, own_keys = segment.k[kv_head], segment.own_k[kv_head]
        sampled = self.keys[:, :: -(-segment.history // basis.SAMPLES)]
        self.mean = sampled.float().mean(1, keepdim=True)
        self.fitted = basis.fit(
            recent[heads, :: -(-recent.shape[1] // basis.SAMPLES)], sampled, segment.scale,
            precision.rank,
        )  # fmt: skip
        self.seen, self.own = (
            basis.project_keys(part, self.fitted, torch.float8_e4m3fn)
            for part in (self.keys, own_keys)
        )

    def probes(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return a list's probes: queries ``[heads, n, D]``, projected ``[heads, n, width]``."""
        queries = self.segment.q[self.heads, start : start + count].float()
        rows = basis.farthest_rows(queries @ self.fitted.a, self.probe_step)
        queries = queries.gather(1, rows[..., None].expand(-1, -1, queries.shape[2]))
        visible = torch.arange(self.segment.length) <= start + rows[..., None]
        arguments = (queries, self.fitted, self.seen, self.own, visible, torch.float8_e4m3fn)
        return queries, basis.project_queries(*arguments)

    def scores(self, start: int, count: int) -> Tensor:
        """Return the scores of a list of ``count`` queries: float32 ``[heads, history]``."""
        return (self.probes(start, count)[1] @ self.seen.mT).amax(1)

    def exact_scores(self, start: int, count: int) -> Tensor:
        """Return those by which retrieval heads are found, see `kernels.ranking.retrieval`."""
        queries, projected = self.probes(start, count)
        centred = self.keys.float() - self.mean
        return basis.exact_scores(queries, projected, centred, self.segment.scale).amax(1)
