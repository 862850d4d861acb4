"""Plan: share a segment's budget among its lists, and find the thresholds of each (ours)."""

import triton
import triton.language as tl

from .. import tuning
from ..columns import DENSE_START, LIST_LENGTH, SEGMENT_COLUMNS

LEVELS = tl.constexpr(16)
ROUNDS = tl.constexpr(7)  # of four bits each: more than a float32 tells apart
NOISE_LIMIT = tl.constexpr(tuning.NOISE_LIMIT)
SCORED_EIGHTHS = tl.constexpr(tuning.SCORED_EIGHTHS)


@triton.jit
def _lengths_above(level, total, edge, least):
    """Return the lengths of lists that take the buckets above a level, ``least`` at the least."""
    return tl.maximum(tl.sum(tl.where(edge >= level, total, 0), 1), least)


@triton.jit
def _priority(lengths, scored, total, unscored, best, worst, score):
    """Return the lowest priority whose lists are no longer than they should be, as is expected.

    ``scored`` tokens are listed by their score. Each other one, of which buckets hold ``unscored``,
    is with the probability 2^(score - priority), if that is above 2^-NOISE_LIMIT. Scores are those
    of the middle of their bucket. LEVELS priorities are tried at a time.
    """
    above, below = best + NOISE_LIMIT, worst - 1.0
    o_l = tl.arange(1, LEVELS + 1).to(tl.float32) / LEVELS
    for _ in range(ROUNDS):
        level = below[:, None] + (above - below)[:, None] * o_l[None, :]
        gap = tl.maximum(level[:, None, :] - score[:, :, None], 0.0)
        chance = tl.where(gap <= NOISE_LIMIT, tl.exp2(-gap), 0.0)
        taken = tl.sum(unscored[:, :, None] * chance, 1)
        fits = taken <= (lengths - scored).to(tl.float32)[:, None]
        above = tl.min(tl.where(fits, level, above[:, None]), 1)
        below = tl.max(tl.where(fits, below[:, None], level), 1)
    return tl.where(lengths >= tl.sum(total, 1), float("-inf"), above)


@triton.jit
def plan_kernel(
    p_segments, p_counts, p_ranges, p_lengths, p_thresholds, target_error, heads,
    BUCKETS: tl.constexpr, SHARED: tl.constexpr, SHARED_PAD: tl.constexpr,
    MEAN_OF_MAX: tl.constexpr, TIERS: tl.constexpr,
):  # fmt: skip
    """length[h] = max(half the budget, tokens above the lowest level that fits); and thresholds.

    The lists of SHARED heads share the budget of a segment.
    """
    i_segment = tl.program_id(1).to(tl.int64)
    n = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + DENSE_START)
    count = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + LIST_LENGTH)
    first_head = tl.program_id(0) * SHARED
    o_h = first_head + tl.arange(0, SHARED_PAD)
    m_h = (tl.arange(0, SHARED_PAD) < SHARED) & (o_h < heads)
    sharing = tl.sum(m_h.to(tl.int32))
    i_list = i_segment * heads + o_h
    if count == 0:
        tl.store(p_lengths + i_list, tl.zeros([SHARED_PAD], tl.int32), m_h)
        return
    o_b = tl.arange(0, BUCKETS)
    total = tl.load(p_counts + i_list[:, None] * BUCKETS + o_b[None, :], m_h[:, None], 0)
    best = tl.load(p_ranges + 2 * i_list, m_h, 0.0)
    worst = tl.load(p_ranges + 2 * i_list + 1, m_h, 0.0)
    above = tl.max(tl.where(m_h, best, float("-inf"))) + 1.0
    below = tl.min(tl.where(m_h, worst, float("inf"))) - 1.0
    width = tl.maximum(best - worst, 1e-20) / BUCKETS
    edge = best[:, None] - (o_b + 1).to(tl.float32)[None, :] * width[:, None]

    # The lowest level whose lists fit the budget. LEVELS are tried at a time: a sum over buckets is
    # a round of messages between warps, for one level or for many.
    least = tl.where(m_h, (count + 1) // 2, 0)
    o_l = tl.arange(1, LEVELS + 1).to(tl.float32) / LEVELS
    for _ in range(ROUNDS):
        level = below + (above - below) * o_l
        taken = tl.where(edge[:, :, None] >= level[None, None, :], total[:, :, None], 0)
        taken = tl.maximum(tl.sum(taken, 1), least[:, None])
        fits = tl.sum(taken, 0) <= sharing * count
        above, below = tl.min(tl.where(fits, level, above)), tl.max(tl.where(fits, below, level))
    lengths = _lengths_above(above, total, edge, least)
    extra = _lengths_above(below, total, edge, least) - lengths
    left = (sharing * count - tl.sum(lengths)).to(tl.int64)
    lengths += (extra * left // tl.maximum(tl.sum(extra), 1)).to(tl.int32)
    lengths = tl.minimum(lengths, n)

    cumulative = tl.cumsum(total, 1)
    if target_error > 0:
        mass = total * tl.exp2(edge + 0.5 * width[:, None])
        whole = tl.sum(mass, 1)
        mass *= tl.maximum(MEAN_OF_MAX, 1.0 / tl.maximum(whole, 1e-30))[:, None]
        beyond = tl.sum(mass, 1)[:, None] - tl.cumsum(mass, 1)
        # Buckets before the last needed one count whole, that one as far as it is needed.
        needed = tl.sum((beyond > target_error).to(tl.int32), 1)[:, None]
        last = o_b[None, :] == needed
        excess = tl.sum(tl.where(last, beyond + mass, 0.0), 1) - target_error
        tokens = tl.sum(tl.where(last, total, 0), 1)
        part = excess / tl.maximum(tl.sum(tl.where(last, mass, 0.0), 1), 1e-30)
        part = tl.ceil(tl.minimum(tl.maximum(part, 0.0), 1.0) * tokens).to(tl.int32)
        before = tl.sum(tl.where(o_b[None, :] < needed, total, 0), 1)
        lengths = tl.minimum(lengths, before + part)
    tl.store(p_lengths + i_list, lengths, m_h)

    # By their score whole buckets are listed: of like scores a sample decides.
    by_score = lengths * SCORED_EIGHTHS // 8
    scored = tl.zeros_like(lengths)
    for p in tl.static_range(TIERS):  # the last one: all that is listed by its score
        whole = cumulative <= (by_score >> (TIERS - 1 - p))[:, None]
        buckets = tl.sum(whole.to(tl.int32), 1)
        scored = tl.sum(tl.where(whole, total, 0), 1)
        score = best - buckets.to(tl.float32) * width
        tl.store(p_thresholds + i_list * (TIERS + 1) + p, score, m_h)
    unscored = tl.where(cumulative <= by_score[:, None], 0, total).to(tl.float32)
    middle = edge + 0.5 * width[:, None]
    priority = _priority(lengths, scored, total, unscored, best, worst, middle)
    tl.store(p_thresholds + i_list * (TIERS + 1) + TIERS, priority, m_h)
