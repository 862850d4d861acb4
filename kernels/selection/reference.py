"""What the kernels of the selection compute, in plain PyTorch; see :mod:`ranking.reference`."""

import math
from bisect import bisect_right

import torch

from ..attention.summary_table import Summaries
from ..layout import DENSE_START, LIST_LENGTH, NOT_LISTED, ROW, SLOT
from ..paging import physical_slots
from ..sampling import stratified
from ..tuning import (
    BUCKETS,
    CHUNK,
    COUNTED,
    ESTIMATE_EVERY,
    ESTIMATE_STEP,
    ESTIMATE_TOKENS,
    HEADS_SHARED,
    MEAN_OF_MAX,
    TIERS,
)
from ..work_list import WorkList, list_capacity
from .selected import SelectedTokens

LOWEST = torch.finfo(torch.half).min  # the worst score that a ranking gives


def select(
    scores: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    page: int,
    tiers: int = TIERS,
    counted: int = COUNTED,
    chunk: int = CHUNK,
    shared: int = HEADS_SHARED,
    summaries: Summaries | None = None,
) -> SelectedTokens:
    """Turn scores into lists; see :func:`select.select`."""
    segments, heads = scores.shape[:2]
    sampled = -(-segments // ESTIMATE_EVERY)
    capacity = list_capacity(work.max_list)

    def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=scores.device)

    left = None
    if summaries is not None:
        rows = summaries.sizes.shape[2]
        left = zeros(segments, heads, rows, dtype=torch.float32).fill_(float("-inf"))
    lists = SelectedTokens(
        zeros(segments, heads, capacity),
        zeros(segments, heads),
        zeros(sampled, heads, ESTIMATE_TOKENS),
        left,
    )
    for number, line in enumerate(work.segments.tolist()):
        n = line[DENSE_START]
        if line[LIST_LENGTH] == 0:
            continue
        step = -(-n // counted)
        table_row = block_table[line[ROW]]
        # NaN is the worst score of all: a request with NaN keys harms itself alone.
        own = scores[number, :, :n].float().nan_to_num(LOWEST, LOWEST, LOWEST)
        pairs = own.split(shared)
        lengths = torch.cat(
            [list_lengths(pair, line[LIST_LENGTH], work.target_error, step) for pair in pairs]
        )
        for head, length in enumerate(lengths.tolist()):
            positions = select_positions(own[head], length, capacity, tiers, step, chunk)
            count = len(positions)
            lists.lengths[number, head] = count
            lists.slots[number, head, :count] = physical_slots(positions, table_row, page)
            if number % ESTIMATE_EVERY == 0:
                place = torch.full((n,), NOT_LISTED, dtype=torch.int32, device=scores.device)
                place[positions] = torch.arange(count, dtype=torch.int32, device=scores.device)
                sample = sample_positions(n, scores.device)
                lists.samples[number // ESTIMATE_EVERY, head, : len(sample)] = place[sample]
            if left is not None and summaries is not None:
                left[number, head] = left_out(positions, summaries.of(line[SLOT]), head, n)
    return lists


def left_out(positions: torch.Tensor, own: Summaries, head: int, history: int) -> torch.Tensor:
    """Return the base-2 logarithm of how many tokens of each summary a list leaves out.

    Args:
        positions: int64 ``[listed]``.
        own: the request's, with a leading dimension of one.
        head: KV head of the list.
        history: tokens that the list is chosen from; a region counts if it is whole in these.

    Returns:
        float32 ``[summaries]``.
    """
    sizes = own.sizes[0, head]
    rows = len(sizes)
    listed = torch.bincount(own.labels[0, head, positions].long(), minlength=rows)[:rows]
    region = torch.arange(rows, device=sizes.device) - own.clusters
    whole = (region < 0) | (int(own.starts) + (region + 1) * own.region_tokens <= history)
    return ((sizes - listed).clamp(min=0) * whole).float().log2()


def sample_positions(history: int, device: torch.device) -> torch.Tensor:
    """Return the positions from which the dropped mass is estimated, one of each stratum.

    Args:
        history: tokens.
        device: of the result.

    Returns:
        int64 ``[strata]``, ascending, at most ``ESTIMATE_TOKENS``.
    """
    step = max(-(-history // ESTIMATE_TOKENS), ESTIMATE_STEP)
    return stratified(history, step, step - ESTIMATE_STEP + 1).to(device)


def list_lengths(
    scores: torch.Tensor, count: int, target_error: float = 0.0, step: int = 1
) -> torch.Tensor:
    """Share a segment's budget among the lists of some of its heads (ours).

    Half of it is dealt equally. The rest goes to the tokens above one level of probability, the
    lowest whose lists fit: whole buckets of scores, and a part of the next bucket. With a target
    error a list ends where the tokens beyond are estimated to hold no more mass than that.

    Args:
        scores: float32 ``[heads, n]``, log2-probabilities.
        count: the mean list's length.
        target_error: share of softmax mass that a list may leave out; 0 for no target.
        step: one token in ``step`` is counted, and stands for all.

    Returns:
        int64 ``[heads]``: together at most ``heads * count``.
    """
    heads, n = scores.shape
    best, worst = scores.amax(1, keepdim=True), scores.amin(1, keepdim=True)
    width = torch.clamp(best - worst, min=1e-20) / BUCKETS
    bucket = bucket_of(scores, best, worst)[:, stratified(n, step).to(scores.device)]
    totals = torch.zeros(heads, BUCKETS, dtype=torch.long, device=scores.device)
    totals.scatter_add_(1, bucket, torch.full_like(bucket, step))
    edges = best - torch.arange(1, BUCKETS + 1, device=scores.device) * width

    def above(level: float) -> torch.Tensor:
        return (totals * (edges >= level)).sum(1).clamp(min=(count + 1) // 2)

    levels = [float("inf"), *edges.unique().flip(0).tolist()]  # from the highest
    fitting = bisect_right(levels, heads * count, key=lambda level: int(above(level).sum())) - 1
    lengths = above(levels[fitting])
    extra = above(levels[min(fitting + 1, len(levels) - 1)]) - lengths
    left = heads * count - int(lengths.sum())
    lengths = (lengths + extra * left // max(int(extra.sum()), 1)).clamp(max=n)

    if target_error > 0:
        mass = totals * torch.exp2(edges + 0.5 * width)
        mass *= (1 / mass.sum(1, keepdim=True).clamp(min=1e-30)).clamp(min=MEAN_OF_MAX)
        beyond = mass.sum(1, keepdim=True) - mass.cumsum(1)
        needed = (beyond > target_error).sum(1, keepdim=True).clamp(max=BUCKETS - 1)
        last, tokens = mass.gather(1, needed), totals.gather(1, needed)
        excess = beyond.gather(1, needed) + last - target_error
        part = ((excess / last.clamp(min=1e-30)).clamp(0, 1) * tokens).ceil().long()
        before = totals.cumsum(1).gather(1, needed) - tokens
        lengths = lengths.minimum((before + part)[:, 0])
    return lengths


def select_positions(
    scores: torch.Tensor,
    length: int,
    capacity: int,
    tiers: int = TIERS,
    step: int = 1,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Return the positions of about the ``length`` best scores, in order of visiting.

    Scores are counted in ``BUCKETS`` equal buckets between the best and the worst; inside a bucket
    they are taken to be spread evenly, which gives the score that ``length`` of them reach. The
    order is by tier and by address inside a tier, the last two chunks first. Tokens past
    ``capacity`` are cut off, or more than counts of a sample are uncertain by.

    Args:
        scores: float32 ``[n]``, log2-probabilities.
        length: tokens to choose.
        capacity: most tokens to choose.
        tiers: up to 1/2 of them, to 1/4 before that, and so on, and the rest.
        step: one token in ``step`` is counted.
        chunk: tokens that are listed at a time.

    Returns:
        int64 ``[listed]``.
    """
    best, worst = scores.max(), scores.min()
    counted = stratified(len(scores), step).to(scores.device)
    total = torch.bincount(bucket_of(scores[counted], best, worst), minlength=BUCKETS) * step
    cumulative = total.cumsum(0)
    width = torch.clamp(best - worst, min=1e-20) / BUCKETS
    tier = torch.zeros_like(scores, dtype=torch.long)
    for number in range(tiers):
        goal = max(length >> (tiers - 1 - number), 1)
        if goal < cumulative[-1]:
            at = int((cumulative < goal).sum())
            share = (goal - cumulative[at] + total[at]).float() / total[at].float()
            tier += scores < best - (at + share) * width
    start = max(-(-len(scores) // chunk) - 2, 0) * chunk
    rolled = tier.roll(-start)  # a tier's tokens by address, without a sort of all
    order = torch.cat([(rolled == number).nonzero()[:, 0] for number in range(tiers)])
    unsure = int(math.sqrt(4 * length * (step - 1)))
    most = length + min(length // 16 + unsure, length // 4)
    return (order[: min(capacity, most)] + start) % len(scores)


def bucket_of(scores: torch.Tensor, best: torch.Tensor, worst: torch.Tensor) -> torch.Tensor:
    """Return each score's bucket, as the kernel computes it in float32.

    Args:
        scores: float32, any shape, log2-probabilities.
        best: the largest score, a scalar or broadcast.
        worst: the smallest score, likewise.

    Returns:
        int64 of the shape of ``scores``: 0 for the best to ``BUCKETS - 1``.
    """
    width = torch.clamp(best - worst, min=1e-20)
    return ((best - scores) * (BUCKETS / width)).clamp(0, BUCKETS - 1).long()
