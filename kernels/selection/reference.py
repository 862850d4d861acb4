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
        # What is no number is the worst of all: a request whose keys are none harms itself alone.
        own = scores[number, :, :n].float().nan_to_num(LOWEST, LOWEST, LOWEST)
        priorities = own + segment_noise(line[HISTORY], n, scores.device)
        lengths = torch.cat(
            [
                list_lengths(pair, line[LIST_LENGTH], work.target_error, step, scored)
                for pair, scored in zip(priorities.split(shared), own.split(shared), strict=True)
            ]
        )
        for head, length in enumerate(lengths.tolist()):
            positions, weights = select_positions(
                priorities[head], own[head], length, capacity, tiers, step, chunk
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
    """Return the positions, one a stratum, of which the dropped mass is estimated."""
    step = max(-(-history // ESTIMATE_TOKENS), ESTIMATE_STEP)
    return stratified(history, step, step - ESTIMATE_STEP + 1).to(device)


def list_lengths(
    priorities: torch.Tensor,
    count: int,
    target_error: float = 0.0,
    step: int = 1,
    scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Share a segment's budget among the lists of some of its heads (ours).

    Half of it is dealt equally. The rest goes to what lies above one level of priority, the lowest
    whose lists fit: whole buckets of priorities, and of the next bucket what is left over. With a
    target error a list ends where what lies beyond is estimated to hold no more mass than that.

    Args:
        priorities: float32 ``[heads, n]``, log2-probabilities with noise.
        count: the mean list's length.
        target_error: share of softmax mass that a list may leave out; 0 for no target.
        step: of so many tokens one is counted, and stands for all.
        scores: float32 ``[heads, n]``, without noise; by default there is none.

    Returns:
        int64 ``[heads]``: together at most ``heads * count``.
    """
    if scores is None:
        scores = priorities
    heads, n = scores.shape
    best, worst = scores.amax(1, keepdim=True) + NOISE_LIMIT, scores.amin(1, keepdim=True)
    width = torch.clamp(best - worst, min=1e-20) / BUCKETS
    counted = stratified(n, step).to(scores.device)

    def histogram(numbers: torch.Tensor) -> torch.Tensor:
        bucket = bucket_of(numbers[:, counted], best, worst)
        totals = torch.zeros(heads, BUCKETS, dtype=torch.long, device=scores.device)
        return totals.scatter_add_(1, bucket, torch.full_like(bucket, step))

    totals = histogram(priorities)
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
        mass = histogram(scores) * torch.exp2(edges + 0.5 * width)
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
    priorities: torch.Tensor,
    scores: torch.Tensor,
    length: int,
    capacity: int,
    tiers: int = TIERS,
    step: int = 1,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the tokens of about the ``length`` best priorities, in order of visiting.

    Priorities are counted in ``BUCKETS`` equal buckets between the best and the worst that there
    can be; inside a bucket they are taken to be spread evenly, which gives the priority that so
    many reach. The order is by tier, see :func:`aims`, and by address inside a tier, the last two
    chunks first: what is more than ``capacity`` is cut off the end.

    Args:
        priorities: float32 ``[n]``.
        scores: float32 ``[n]``, the priorities without their noise.
        length: tokens to choose.
        capacity: most tokens to choose.
        tiers: of the list.
        step: of so many tokens one is counted.
        chunk: tokens that are listed at a time.

    Returns:
        their positions, and the base-2 logarithms of how many tokens each stands for.
    """
    best, worst = scores.max() + NOISE_LIMIT, scores.min()
    counted = stratified(len(scores), step).to(scores.device)
    total = torch.bincount(bucket_of(priorities[counted], best, worst), minlength=BUCKETS) * step
    cumulative = total.cumsum(0)
    width = torch.clamp(best - worst, min=1e-20) / BUCKETS
    tier = torch.zeros_like(scores, dtype=torch.long)
    for wanted in aims(length, tiers):
        if wanted < cumulative[-1]:
            at = int((cumulative < wanted).sum())
            share = (wanted - cumulative[at] + total[at]).float() / total[at].float()
            threshold = best - (at + share) * width
            tier += priorities < threshold
        else:
            threshold = torch.full_like(best, float("-inf"))
    start = max(-(-len(scores) // chunk) - 2, 0) * chunk
    order = (torch.argsort(tier.roll(-start), stable=True) + start) % len(scores)
    order = order[: min(capacity, int((tier < tiers).sum()))]
    return order, (threshold - scores[order]).clamp(0, NOISE_LIMIT)


def aims(length: int, tiers: int) -> list[int]:
    """Return how many tokens each tier of a list reaches up to.

    Args:
        length: of the list.
        tiers: of the list.
    """
    wanted = [length >> (tiers - 2 - tier) for tier in range(tiers - 2)]
    wanted += [length - length // 8, length][-tiers:]
    return [max(one, 1) for one in wanted]


def bucket_of(scores: torch.Tensor, best: torch.Tensor, worst: torch.Tensor) -> torch.Tensor:
    """Return each score's bucket, 0 for the best, in float32 as the kernel computes it."""
    width = torch.clamp(best - worst, min=1e-20)
    return ((best - scores) * (BUCKETS / width)).clamp(0, BUCKETS - 1).long()
