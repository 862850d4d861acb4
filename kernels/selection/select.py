"""Select: from scores to lists of physical slots, without a sort.

Three launches. The first counts each list's scores by bucket, from a sample in long histories. The
second shares a segment's budget among its lists and finds each list's thresholds: the scores that
as many tokens reach. The third walks the scores in order of address, the last chunks first, and
writes the slots of those that reach a threshold. Importance orders the tiers, address orders a
tier, so the gather that follows reads memory in runs. Ours; the paper sorts.

Half of the budget is dealt equally, half by one level of probability for all lists that share it.
A list ends earlier where its skipped tokens hold less softmax mass than the request's target error.
"""

import torch
import triton
import triton.language as tl

from .. import tuning
from ..columns import DENSE_START, LIST_LENGTH, ROW, SEGMENT_COLUMNS
from ..layout import NOT_LISTED
from ..strata import stratum_offset
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

LEVELS = tl.constexpr(16)
UNEVEN = tl.constexpr(tuning.UNEVEN)
RUN = 2 * ESTIMATE_STEP  # neighbouring tokens that are handled as one
ROUNDS = tl.constexpr(7)  # of four bits each: more than a float32 tells apart


@triton.jit
def _buckets(scores, best, worst, BUCKETS: tl.constexpr):
    """Bucket = floor((best - score) BUCKETS / (best - worst)): 0 holds the best."""
    scores = scores.to(tl.float32)
    width = tl.maximum(best - worst, 1e-20)
    bucket = (best - scores) * (BUCKETS / width)
    return tl.minimum(tl.maximum(bucket, 0.0), BUCKETS - 1.0).to(tl.int32)


@triton.jit
def _bounds_of_list(p_bounds, chunks, CHUNKS_PAD: tl.constexpr):
    """Return the best and the worst score of a list from its chunks' bounds."""
    o = tl.arange(0, CHUNKS_PAD)
    best = tl.max(tl.load(p_bounds + 2 * o, o < chunks, float("-inf")))
    worst = tl.min(tl.load(p_bounds + 2 * o + 1, o < chunks, float("inf")))
    return best, worst


@triton.jit
def _lengths_above(level, total, edge, least):
    """Return the lengths of lists that take the buckets above a level, ``least`` at the least."""
    return tl.maximum(tl.sum(tl.where(edge >= level, total, 0), 1), least)


@triton.jit
def _threshold(cumulative, total, goal, best, width, o_b, BUCKETS: tl.constexpr):
    """Return the score that about ``goal`` tokens of each list reach: linear inside a bucket."""
    bucket = tl.sum((cumulative < goal[:, None]).to(tl.int32), 1)
    this = o_b[None, :] == bucket[:, None]
    inside = tl.sum(tl.where(this, total, 0), 1)
    wanted = goal - tl.sum(tl.where(this, cumulative - total, 0), 1)
    share = tl.div_rn(wanted.to(tl.float32), tl.maximum(inside, 1).to(tl.float32))
    all_of_them = goal >= tl.max(cumulative, 1)
    return tl.where(all_of_them, float("-inf"), best - (bucket.to(tl.float32) + share) * width)


@triton.jit
def _count_kernel(
    p_scores, p_segments, p_bounds, p_counts, p_ranges, stride_segment, stride_head, max_chunks,
    CHUNK: tl.constexpr, BUCKETS: tl.constexpr, COUNTED: tl.constexpr, CHUNKS_PAD: tl.constexpr,
):  # fmt: skip
    """counts[b] = step * |scores of bucket b, of a sample of one per stratum|; and their range."""
    i_head, i_segment = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + DENSE_START)
    if (n == 0) | (tl.load(p_segments + i_segment * SEGMENT_COLUMNS + LIST_LENGTH) == 0):
        return
    i_list = i_segment * tl.num_programs(0) + i_head
    step = tl.cdiv(n, COUNTED)
    strata = n // step
    best, worst = _bounds_of_list(p_bounds + 2 * i_list * max_chunks, tl.cdiv(n, CHUNK), CHUNKS_PAD)
    p_scores += i_segment * stride_segment + i_head * stride_head
    counts = tl.zeros([BUCKETS], tl.int32)
    for first in range(0, strata, CHUNK):
        o_n = first + tl.arange(0, CHUNK)
        s = tl.load(p_scores + o_n * step + stratum_offset(o_n, step), o_n < strata, 0.0)
        counts += tl.histogram(_buckets(s, best, worst, BUCKETS), BUCKETS, mask=o_n < strata)
    tl.store(p_counts + i_list * BUCKETS + tl.arange(0, BUCKETS), counts * step)
    tl.store(p_ranges + 2 * i_list, best)
    tl.store(p_ranges + 2 * i_list + 1, worst)


@triton.jit
def _plan_kernel(
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
    step = tl.cdiv(n, COUNTED)
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

    # Counts of a sample are uncertain by some root of themselves, and inside a bucket scores are
    # not even. The last tier aims at that much more, and is cut off; a single tier at less.
    unsure = tl.sqrt_rn(lengths.to(tl.float32) * (step - 1).to(tl.float32)).to(tl.int32)
    # It cannot be longer by more than it leaves out.
    unsure = tl.minimum(unsure + lengths // UNEVEN, n - lengths)
    for t in tl.static_range(TIERS):
        if TIERS == 1:
            wanted = lengths - unsure
        elif t == TIERS - 1:
            wanted = lengths + unsure
        elif t == TIERS - 2:
            wanted = lengths - lengths // 8 - unsure
        else:
            wanted = lengths >> (TIERS - 2 - t)
        wanted = tl.maximum(wanted, 1)
        score = _threshold(cumulative, total, wanted, best, width, o_b, BUCKETS)
        tl.store(p_thresholds + i_list * TIERS + t, score, m_h)


@triton.jit
def _ones(bits):
    """Return the number of ones of sixteen bits."""
    bits -= (bits >> 1) & 0x5555
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
    bits = (bits + (bits >> 4)) & 0x0F0F
    return (bits + (bits >> 8)) & 0x1F


@triton.jit
def _bits(scores, least, below, o_in, BOUNDED: tl.constexpr):
    """Return which of the scores [N, M] reach a threshold: N numbers of M bits."""
    scores = scores.to(tl.float32)
    listed = scores >= least
    if BOUNDED:
        listed &= scores < below
    return tl.sum(tl.where(listed, 1 << o_in[None, :], 0), 1)


@triton.jit
def _emit_kernel(
    p_scores, p_segments, p_lengths, p_thresholds, p_table, p_slots, p_samples,
    stride_segment, stride_head, stride_table, stride_slots_segment, stride_slots_head,
    PAGE: tl.constexpr, RUN: tl.constexpr, CHUNK: tl.constexpr, TIERS: tl.constexpr,
    EVERY: tl.constexpr, SAMPLES: tl.constexpr, SAMPLE_STEP: tl.constexpr,
    NOT_LISTED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """slots[place] = table[n / PAGE] PAGE + n % PAGE of the tokens n that reach a tier's threshold.

    RUN neighbouring tokens lie on one page, and are the bits of one number, so that little is done
    for each token. CHUNK tokens are handled at a time. With SPLIT the programs of the last
    dimension share a list, which has one tier then.
    """
    i_head = tl.program_id(0)
    i_segment = tl.program_id(1).to(tl.int64)
    row = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + ROW).to(tl.int64)
    n = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + DENSE_START)
    i_list = i_segment * tl.num_programs(0) + i_head
    count = tl.load(p_lengths + i_list)
    if count == 0:
        return
    p_scores += i_segment * stride_segment + i_head * stride_head
    p_slots += i_segment * stride_slots_segment + i_head * stride_slots_head
    p_table += row * stride_table
    p_samples += (i_segment // EVERY * tl.num_programs(0) + i_head) * SAMPLES
    step = tl.maximum(tl.cdiv(n, SAMPLES), SAMPLE_STEP)
    room = step - SAMPLE_STEP + 1
    o_run = tl.arange(0, CHUNK // RUN) * RUN
    o_in = tl.arange(0, RUN // 2)
    chunks = tl.cdiv(n, CHUNK)
    share = tl.cdiv(chunks, tl.num_programs(2))
    begin = tl.minimum(tl.program_id(2) * share, chunks)
    end = tl.minimum(begin + share, chunks)
    # The last two chunks first: a list that is too long is cut off at its end, and neither the
    # first tokens of a history, which are attention sinks, nor the last may be lost.
    origin = tl.maximum(chunks - 2, 0)
    before = 0
    below = float("inf")
    for t in tl.static_range(TIERS):
        least = tl.load(p_thresholds + i_list * TIERS + t)
        if SPLIT:
            # Count what other programs list before this one's share, so that none waits.
            o_n = tl.arange(0, CHUNK)
            others = tl.zeros([CHUNK], tl.int32)
            for i in range(origin, origin + begin):
                start = tl.where(i < chunks, i, i - chunks) * CHUNK
                s = tl.load(p_scores + start + o_n).to(tl.float32)
                others += ((s >= least) & (start + o_n < n)).to(tl.int32)
            before = tl.sum(others)
        # Rows of scores hold whole chunks: loads without a mask are wide. The next chunk is on its
        # way while one is listed.
        first = tl.where(origin + begin < chunks, origin + begin, origin + begin - chunks) * CHUNK
        p_run = p_scores + (first + o_run)[:, None] + o_in[None, :]
        low, high = tl.load(p_run), tl.load(p_run + RUN // 2)
        for i in range(origin + begin, origin + end):
            start = tl.where(i < chunks, i, i - chunks) * CHUNK + o_run
            bits = _bits(low, least, below, o_in, t > 0)
            bits |= _bits(high, least, below, o_in, t > 0) << (RUN // 2)
            next = tl.where(i + 1 < chunks, i + 1, i + 1 - chunks) * CHUNK
            p_run = p_scores + (next + o_run)[:, None] + o_in[None, :]
            low, high = tl.load(p_run), tl.load(p_run + RUN // 2)
            bits &= (1 << tl.minimum(tl.maximum(n - start, 0), RUN)) - 1
            of_run = _ones(bits)
            place = tl.cumsum(of_run) - of_run + before
            page = tl.load(p_table + start // PAGE, start < n, 0)
            slot = page * PAGE + start % PAGE
            left = bits
            for i_token in range(tl.max(of_run)):
                lowest = left & -left
                left ^= lowest
                exponent = lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23
                m_token = (lowest != 0) & (place + i_token < count)
                tl.store(p_slots + place + i_token, slot + exponent - 127, m_token)
            if i_segment % EVERY == 0:
                # Half of a run has one sample at most: that of the stratum it begins in, or of the
                # next one.
                for half in tl.static_range(2):
                    begun = start + half * (RUN // 2)
                    stratum = begun // step
                    own = stratum * step + stratum_offset(stratum, room)
                    number = tl.where(own >= begun, stratum, stratum + 1)
                    sample = number * step + stratum_offset(number, room)
                    m_sample = (sample < begun + RUN // 2) & (number < n // step)
                    bit = 1 << tl.minimum(tl.maximum(sample - start, 0), RUN)
                    at = tl.where((bits & bit) != 0, place + _ones(bits & (bit - 1)), NOT_LISTED)
                    # A token that one pass does not list a later one may list.
                    m_sample &= (at < count) | (t == 0)
                    tl.store(p_samples + number, tl.where(at < count, at, NOT_LISTED), m_sample)
            before += tl.sum(of_run)
        below = least
    # A program that reads it later lists the same: no place is beyond.
    if tl.program_id(2) == tl.num_programs(2) - 1:
        tl.store(p_lengths + i_list, tl.minimum(before, count))


class SelectWorkspace:
    """Scratch of :func:`select` for up to ``segments`` segments of ``heads`` lists each.

    A head's lists have room for ``slots`` slots together. What a ranking writes is here as well:
    ``scores``, float16 ``[segments, heads, >= max_history]``, whole chunks, and ``bounds``, float32
    ``[segments * heads, chunks, 2]``, best and worst score of each chunk.
    """

    def __init__(
        self,
        segments: int,
        heads: int,
        max_history: int,
        slots: int,
        device: torch.device,
        chunk: int = CHUNK,
    ):
        self.chunk = chunk
        self.chunks = max(1, -(-max_history // chunk))
        lists = segments * heads

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.scores = empty(segments, heads, self.chunks * chunk, dtype=torch.float16)
        self.slots = empty(heads * slots, dtype=torch.int32)
        self.lengths = empty(segments, heads, dtype=torch.int32)
        sampled = -(-segments // ESTIMATE_EVERY)
        self.samples = empty(sampled, heads, ESTIMATE_TOKENS, dtype=torch.int32)
        self.bounds = empty(lists, self.chunks, 2, dtype=torch.float32)
        self.counts = empty(lists, BUCKETS, dtype=torch.int32)
        self.ranges = empty(lists, 2, dtype=torch.float32)
        self.thresholds = empty(lists, TIERS, dtype=torch.float32)

    def lists(self, work: WorkList) -> SelectedTokens:
        """Return the lists of a work list: views of the scratch."""
        heads, capacity = self.scores.shape[1], list_capacity(work.max_list)
        slots = self.slots[: work.num_segments * heads * capacity].view(-1, heads, capacity)
        return SelectedTokens(slots, self.lengths[: work.num_segments], self.samples)


def select(
    block_table: torch.Tensor,
    work: WorkList,
    page: int,
    space: SelectWorkspace,
    tiers: int = TIERS,
    counted: int = COUNTED,
    split: bool = False,
    shared: int = HEADS_SHARED,
) -> None:
    """Select the best history tokens of every list.

    Args:
        block_table: int32 ``[rows, max_blocks]``.
        work: the segments; ``space.scores[i, h, :dense_start]`` holds those of segment i, and
            ``space.bounds`` their bounds.
        page: tokens per block of the cache, a multiple of ``RUN``.
        space: scratch; ``space.lists(work)`` are the lists.
        tiers: ``TIERS``, or ``TIERS_UNORDERED`` where the order is of no use, or ``TIERS_SPLIT``.
        counted: most scores of a list that are counted.
        split: give every chunk of a list its program, where lists are few; for one tier alone.
        shared: neighbouring lists of a segment that share its budget.

    :mod:`selection.reference` says exactly how many are selected, which and in which order.
    """
    heads, (slots, lengths, samples) = space.scores.shape[1], space.lists(work)
    if work.max_list == 0:
        lengths.zero_()
        return
    strides = (space.scores.stride(0), space.scores.stride(1))
    shape = {"CHUNK": space.chunk, "TIERS": tiers}
    _count_kernel[(heads, work.num_segments)](
        space.scores, work.segments, space.bounds, space.counts, space.ranges, *strides,
        space.chunks, CHUNK=space.chunk, BUCKETS=BUCKETS, COUNTED=counted,
        CHUNKS_PAD=triton.next_power_of_2(space.chunks),
        num_warps=8 if split else 4, enable_fp_fusion=False,
    )  # fmt: skip
    # Fused, a threshold is rounded once and not twice: equal scores on it would be listed here and
    # not by the reference.
    pad = triton.next_power_of_2(shared)
    _plan_kernel[(triton.cdiv(heads, shared), work.num_segments)](
        work.segments, space.counts, space.ranges, lengths, space.thresholds, work.target_error,
        heads, BUCKETS=BUCKETS, COUNTED=counted, SHARED=shared, SHARED_PAD=pad,
        MEAN_OF_MAX=MEAN_OF_MAX, TIERS=tiers,
        num_warps=min(max(4, pad), 32), enable_fp_fusion=False,  # levels of all lists in registers
    )  # fmt: skip
    programs = triton.cdiv(work.max_history, space.chunk) if split else 1
    _emit_kernel[(heads, work.num_segments, programs)](
        space.scores, work.segments, lengths, space.thresholds, block_table, slots, samples,
        *strides, block_table.stride(0), slots.stride(0), slots.stride(1), PAGE=page,
        RUN=RUN, EVERY=ESTIMATE_EVERY, SAMPLES=ESTIMATE_TOKENS,
        SAMPLE_STEP=ESTIMATE_STEP, NOT_LISTED=NOT_LISTED, SPLIT=split,
        num_warps=8 if split else 4, **shape,
    )  # fmt: skip
