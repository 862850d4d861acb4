"""Selection: from a ranking of history tokens or blocks to what each unit visits.

All rules are compared at the same total density: where a paper fixes a threshold, the
threshold is chosen so that the units of a segment visit the wanted share together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from s2o_vllm.kernels.attention.reference import cluster
from s2o_vllm.kernels.attention.summary_table import history_before_chunk
from s2o_vllm.kernels.selection.reference import left_out, list_lengths
from s2o_vllm.kernels.tuning import HEADS_SHARED, SPAN_LENGTH

from .attention import Segment
from .units import Rows

TIER_BOUNDS = (2, 4, 8)  # skipped tokens are cut into tiers at these multiples of the budget


@dataclass
class Summaries:
    """Summaries of skipped tokens (FlashPrefill V2's mean term; tiers and clusters are ours).

    Attributes:
        k: mean keys [P, D].
        v: mean values [P, D].
        count: tokens that each stands for [P].
        value_covariance: of values with keys [D, D], by which a mean value follows the query,
            or None.
        key_covariance: of keys [D, D], by which a query weighs the summaries, or None.
    """

    k: Tensor
    v: Tensor
    count: Tensor
    value_covariance: Tensor | None = None
    key_covariance: Tensor | None = None


@dataclass
class Selection:
    """What each unit visits.

    Attributes:
        rows: the units.
        tokens: history positions per unit, most important first.
        summaries: of the skipped tokens, per unit, or None.
    """

    rows: Rows
    tokens: list[Tensor]
    summaries: list[Summaries] | None = None


@dataclass
class Ranking:
    """Scores of candidates; a candidate is ``block`` neighbours of a layout of the history.

    Attributes:
        rows: the units.
        scores: [U, C], larger is better.
        block: tokens of a candidate.
        layout: history positions in the order that blocks are cut from [U, T]; None is the
            natural order.
    """

    rows: Rows
    scores: Tensor
    block: int = 1
    layout: Tensor | None = None

    def tokens(self, unit: int, candidates: Tensor, history: int) -> Tensor:
        """Return the positions of candidates [n] of a unit, int64, in the candidates' order."""
        if self.block == 1:
            return candidates
        spread = candidates[:, None] * self.block + torch.arange(self.block)
        spread = spread.flatten()
        spread = spread[spread < history]
        return spread if self.layout is None else self.layout[unit][spread]


def counts_top(ordered: Tensor, wanted: int) -> Tensor:
    """Give each of the units [U] ``wanted`` candidates (S2O's budget); ``ordered`` [U, C]."""
    return torch.full((len(ordered),), wanted)


def _by_threshold(cost: Tensor, wanted: int) -> Tensor:
    """Take the cheapest ``wanted`` per unit on average; cost [U, C] rises along a unit."""
    limit = cost.flatten().kthvalue(min(wanted * len(cost), cost.numel())).values
    return (cost <= limit).sum(1)


def counts_gap(ordered: Tensor, wanted: int) -> Tensor:
    """Take what lies within one gap of its unit's best (VecAttention; alpha·max of FlashPrefill).

    Args:
        ordered: log scores, best first [U, C].
        wanted: candidates per unit on average.

    Returns:
        Candidates of each unit [U], int64.
    """
    return _by_threshold(ordered[:, :1] - ordered, wanted)


def counts_level(ordered: Tensor, wanted: int) -> Tensor:
    """Take candidates above one level in all units (ours); see `counts_gap`."""
    return _by_threshold(-ordered, wanted)


def counts_half(ordered: Tensor, wanted: int) -> Tensor:
    """Give each unit half the budget and spend the rest by one level (ours); see `counts_gap`."""
    floor = wanted // 2
    if wanted == floor:
        return counts_top(ordered, wanted)
    return floor + _by_threshold(-ordered[:, floor:], wanted - floor)


def counts_heads(ordered: Tensor, wanted: int, heads: int) -> Tensor:
    """Share the budget of a tile among the lists of pairs of heads, as the kernels do (ours).

    Args:
        ordered: log2-probabilities, best first [U, C], head by head.
        wanted: candidates per unit on average.
        heads: lists of a tile.
    """
    return lengths_by_pairs(ordered, heads, lambda pair: list_lengths(pair, wanted))


def lengths_by_pairs(scores: Tensor, heads: int, lengths: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``lengths`` to the scores of the heads that share a tile's budget.

    Args:
        scores: [U, C], head by head.
        heads: lists of a tile.
        lengths: maps scores [n, C] to list lengths [n].

    Returns:
        [U].
    """
    tiles = scores.unflatten(0, (heads, -1)).transpose(0, 1)
    counts = [torch.cat([lengths(pair) for pair in tile.split(HEADS_SHARED)]) for tile in tiles]
    return torch.stack(counts, 1).flatten()


def counts_mass(ordered: Tensor, wanted: int) -> Tensor:
    """Take the fewest that hold one share of the estimated mass (FlexPrefill, XAttention, PBS).

    Args:
        ordered: scores ≥ 0 in proportion to mass, best first [U, C].
        wanted: candidates per unit on average.
    """
    share = ordered / ordered.sum(1, keepdim=True)
    return _by_threshold(share.cumsum(1) - share, wanted)


RULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "top": counts_top,
    "gap": counts_gap,
    "level": counts_level,
    "half": counts_half,
    "mass": counts_mass,
}
HEADS = "heads"  # `counts_heads`, for lists of a KV head
CLUSTERS = "clusters"  # as the kernels do, see `kernels.attention.summaries`
CORRECTIONS = ("none", "tiers", "blocks", CLUSTERS)


class Selector:
    """A ranking, sorted once, from which selections of any density are read."""

    def __init__(self, segment: Segment, ranking: Ranking, rule: str, correction: str = "none"):
        if rule not in (*RULES, HEADS):
            raise ValueError(f"rule must be one of {', '.join((*RULES, HEADS))}, not {rule}")
        if correction not in CORRECTIONS:
            raise ValueError(
                f"correction must be one of {', '.join(CORRECTIONS)}, not {correction}"
            )
        self.segment, self.ranking, self.rule = segment, ranking, rule
        self.correction = correction
        self.ordered, self.order = ranking.scores.sort(dim=1, descending=True, stable=True)

    def select(self, density: float) -> Selection:
        """Return the selection that visits this share of the history on average."""
        candidates = self.ordered.shape[1]
        wanted = min(max(round(density * candidates), 1), candidates)
        if self.rule == HEADS:
            counts = counts_heads(self.ordered, wanted, self.segment.kv_heads)
        else:
            counts = RULES[self.rule](self.ordered, wanted)
        return self.take(counts.clamp(min=1))

    def take(self, counts: Tensor) -> Selection:
        """Return the selection of the best ``counts`` [U] candidates of every unit."""
        units, history = range(len(counts)), self.segment.history
        tokens = [self.ranking.tokens(u, self.order[u, : counts[u]], history) for u in units]
        selection = Selection(self.ranking.rows, tokens)
        if self.correction != "none":
            selection.summaries = [self._summaries(u, int(counts[u])) for u in units]
        return selection

    def _summaries(self, unit: int, count: int) -> Summaries:
        """Return the mean terms of what a unit skips."""
        history, kv = self.segment.history, int(self.ranking.rows.kv[unit])
        if self.correction == CLUSTERS:
            return self._clusters(kv, self.ranking.tokens(unit, self.order[unit, :count], history))
        skipped = self.order[unit, count:]
        if self.correction == "blocks":
            tiers = list(skipped.split(1))
        else:
            bounds = [count * bound for bound in TIER_BOUNDS]
            edges = [count, *(b for b in bounds if b < len(self.order[unit])), None]
            tiers = [self.order[unit, low:high] for low, high in pairwise(edges)]
        positions = [self.ranking.tokens(unit, tier, history) for tier in tiers if len(tier)]
        k, v = self.segment.k[kv], self.segment.v[kv]
        if not positions:
            return Summaries(k[:0], v[:0], k.new_zeros(0))
        return Summaries(
            torch.stack([k[p].mean(0) for p in positions]),
            torch.stack([v[p].mean(0) for p in positions]),
            torch.tensor([float(len(p)) for p in positions]),
        )

    def _clusters(self, kv: int, tokens: Tensor) -> Summaries:
        """Return the clusters and regions of a history of which these tokens are visited."""
        segment, history = self.segment, self.segment.history
        start = history_before_chunk(history + 1, SPAN_LENGTH)
        found = segment.memo(
            ("clusters",),
            lambda: cluster(segment.k.float(), segment.v.float(), start, torch.float32),
        )
        k, v = found.means[0, kv].chunk(2, -1)
        count = left_out(tokens, found, kv, history).exp2()
        any_left = count > 0
        covariances = found.value_covariances[0, kv], found.key_covariances[0, kv]
        return Summaries(k[any_left], v[any_left], count[any_left], *covariances)
