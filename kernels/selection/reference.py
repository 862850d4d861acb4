"""What the kernels of the selection compute, in plain PyTorch; see :mod:`ranking.reference`."""

from bisect import bisect_right

import torch

from ..layout import DENSE_START, HISTORY, LIST_LENGTH, NOT_LISTED, ROW
from ..paging import physical_slots
from ..sampling import NOISE_TOKENS, noise_phase, priority_noise, stratified
from ..tuning import (
    BUCKETS,
    CHUNK,
    COUNTED,
    ESTIMATE_EVERY,
    ESTIMATE_STEP,
    ESTIMATE_TOKENS,
    HEADS_SHARED,
    MEAN_OF_MAX,
    NOISE_LIMIT,
    SAMPLE_SHARE,
    SCORED_EIGHTHS,
    TIERS,
)
from ..work_list import WorkList, list_capacity
from .selected import SelectedTokens

LOWEST = torch.finfo(torch.half).min  # the worst score that a ranking gives
LEVELS, ROUNDS = 16, 7  # of the search for a priority


def select(
    scores: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    page: int,
    tiers: int = TIERS,
    counted: int = COUNTED,
    chunk: int = CHUNK,
    shared: int = HEADS_SHARED,
) -> SelectedTokens:
    """Turn scores into lists; see :func:`select.select`."""
    segments, heads = scores.shape[:2]
    sampled = -(-segments // ESTIMATE_EVERY)
    capacity = list_capacity(work.max_list)

    def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=scores.device)

    lists = SelectedTokens(
        zeros(segments, heads, capacity),
        zeros(segments, heads, capacity, dtype=torch.float16),
        zeros(segments, heads),
        zeros(sampled, heads, ESTIMATE_TOKENS),
    )
    for number, line in enumerate(work.segments.tolist()):
        n = line[DENSE_START]
        if line[LIST_LENGTH] == 0:
            continue
        step = -(-n // counted)
        table_row = block_table[line[ROW]]
        # NaN is the worst score of all: a request with NaN keys harms itself alone.
        own = scores[number, :, :n].float().nan_to_num(LOWEST, LOWEST, LOWEST)
        noise = segment_noise(line[HISTORY], n, scores.device)
        pairs = own.split(shared)
        lengths = torch.cat(
            [list_lengths(pair, line[LIST_LENGTH], work.target_error, step) for pair in pairs]
        )
        for head, length in enumerate(lengths.tolist()):
            positions, weights = select_positions(
                own[head], noise, length, capacity, tiers, step, chunk
            )
            count = len(positions)
            lists.lengths[number, head] = count
            lists.slots[number, head, :count] = physical_slots(positions, table_row, page)
            lists.weights[number, head, :count] = weights
            if number % ESTIMATE_EVERY == 0:
                place = torch.full((n,), NOT_LISTED, dtype=torch.int32, device=scores.device)
                place[positions] = torch.arange(count, dtype=torch.int32, device=scores.device)
                sample = sample_positions(n, scores.device)
                lists.samples[number // ESTIMATE_EVERY, head, : len(sample)] = place[sample]
    return lists


def segment_noise(history: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Return what makes priorities of a segment's scores: float32 ``[tokens]``."""
    place = torch.arange(tokens) + noise_phase(torch.tensor(history))
    return priority_noise(device)[(place % NOISE_TOKENS).to(device)].float()


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
    noise: torch.Tensor,
    length: int,
    capacity: int,
    tiers: int = TIERS,
    step: int = 1,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the best three quarters of about ``length`` tokens by score, the others by priority.

    Scores are counted in ``BUCKETS`` equal buckets between the best and the worst. A tier takes
    whole ones, as many as fit. The order is by tier and by address inside a tier, the last two
    chunks first. Tokens past ``capacity`` are cut off.

    Args:
        scores: float32 ``[n]``, log2-probabilities.
        noise: float32 ``[n]``, which makes priorities of them.
        length: tokens to choose.
        capacity: most tokens to choose.
        tiers: of those by score: up to 1/2 of them, to 1/4 before that, and so on, and the rest.
        step: one token in ``step`` is counted.
        chunk: tokens that are listed at a time.

    Returns:
        their positions, int64, and float32 base-2 logarithms of their weights.
    """
    best, worst = scores.max(), scores.min()
    counted = stratified(len(scores), step).to(scores.device)
    total = torch.bincount(bucket_of(scores[counted], best, worst), minlength=BUCKETS) * step
    cumulative = total.cumsum(0)
    width = torch.clamp(best - worst, min=1e-20) / BUCKETS
    tier = torch.zeros_like(scores, dtype=torch.long)
    scored = length * SCORED_EIGHTHS // 8
    for number in range(tiers):
        whole = cumulative <= scored >> (tiers - 1 - number)  # of like scores a sample decides
        tier += scores <= best - int(whole.sum()) * width
    unscored = total.masked_fill(whole, 0).float()
    middle = best - torch.arange(1, BUCKETS + 1, device=scores.device) * width + 0.5 * width
    room = length - int(total[whole].sum())
    priority = priority_threshold(room, unscored, middle, best, worst)
    sampled = (tier == tiers) & (scores + noise >= priority)
    tier[sampled] = tiers - 1
    start = max(-(-len(scores) // chunk) - 2, 0) * chunk
    rolled = tier.roll(-start)  # a tier's tokens by address, without a sort of all
    order = torch.cat([(rolled == number).nonzero()[:, 0] for number in range(tiers)])
    order = (order[:capacity] + start) % len(scores)
    gap = (priority - scores[order]).clamp(0, NOISE_LIMIT).masked_fill(~sampled[order], 0)
    return order, (1 + SAMPLE_SHARE * (gap.exp2() - 1)).log2()


def priority_threshold(
    room: int,
    unscored: torch.Tensor,
    middle: torch.Tensor,
    best: torch.Tensor,
    worst: torch.Tensor,
) -> torch.Tensor:
    """Return the lowest priority that no more than ``room`` tokens are expected to reach.

    Args:
        room: tokens that a list has room for beside those that are listed by their score.
        unscored: float32 ``[BUCKETS]``, other tokens of a bucket.
        middle: float32 ``[BUCKETS]``, the score in the middle of a bucket.
        best: the best score.
        worst: the worst score.

    Returns:
        float32, without a dimension.
    """
    if room >= unscored.sum():
        return torch.full_like(best, float("-inf"))
    above, below = best + NOISE_LIMIT, worst - 1
    for _ in range(ROUNDS):
        levels = below + (above - below) * torch.arange(1, LEVELS + 1, device=best.device) / LEVELS
        gap = (levels - middle[:, None]).clamp(min=0)
        chance = (-gap).exp2().masked_fill(gap > NOISE_LIMIT, 0)
        fits = (unscored[:, None] * chance).sum(0) <= room
        above, below = (
            torch.where(fits, levels, above).min(),
            torch.where(fits, below, levels).max(),
        )
    return above


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
