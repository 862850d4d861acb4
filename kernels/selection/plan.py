"""Plan: share a segment's budget among its lists, and find the thresholds of each (ours)."""

import triton
import triton.language as tl

from ..columns import DENSE_START, LIST_LENGTH, SEGMENT_COLUMNS

LEVELS = tl.constexpr(16)
ROUNDS = tl.constexpr(7)  # of four bits each: more than a float32 tells apart


@triton.jit
def _lengths_above(level, total, edge, least):
    """Return the lengths of lists that take the buckets above a level, ``least`` at the least."""
    return tl.maximum(tl.sum(tl.where(edge >= level, total, 0), 1), least)


@triton.jit
def _threshold(cumulative, total, goal, best, width, o_b):
    """Return the score that about ``goal`` tokens of each list reach: linear inside a bucket."""
    bucket = tl.sum((cumulative < goal[:, None]).to(tl.int32), 1)
    this = o_b[None, :] == bucket[:, None]
    inside = tl.sum(tl.where(this, total, 0), 1)
    wanted = goal - tl.sum(tl.where(this, cumulative - total, 0), 1)
    share = tl.div_rn(wanted.to(tl.float32), tl.maximum(inside, 1).to(tl.float32))
    all_of_them = goal >= tl.max(cumulative, 1)
    return tl.where(all_of_them, float("-inf"), best - (bucket.to(tl.float32) + share) * width)


@triton.jit
def plan_kernel(
    p_segments, p_counts, p_ranges, p_lengths, p_thresholds, target_error, heads,
    BUCKETS: tl.constexpr, COUNTED: tl.constexpr, SHARED: tl.constexpr, SHARED_PAD: tl.constexpr,
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
    # Counts of a sample are uncertain by some root of themselves, and of like scores all reach a
    # threshold or none: what is more than this is cut off.
    unsure = tl.sqrt_rn(4.0 * lengths.to(tl.float32) * (tl.cdiv(n, COUNTED) - 1).to(tl.float32))
    most = lengths + tl.minimum(lengths // 16 + unsure.to(tl.int32), lengths // 4)
    tl.store(p_lengths + i_list, most, m_h)

    for t in tl.static_range(TIERS):
        goal = tl.maximum(lengths >> (TIERS - 1 - t), 1)
        score = _threshold(cumulative, total, goal, best, width, o_b)
        tl.store(p_thresholds + i_list * TIERS + t, score, m_h)
