"""Select: from scores to lists of physical slots, without a sort.

Three quarters of a list are the tokens of the best scores. The others are a priority sample of the
rest (Duffield, Lund and Thorup, J. ACM 54(6), 2007; in attention: ours). A token's priority is its
score s, a log2-probability, plus log2(1 / u) of a uniform u; it is listed if that reaches a
threshold t. So it is with the probability 2^(s - t), and stands for 2^(t - s) tokens: without bias,
but with a large variance. Summaries have none, but a bias (:mod:`attention.summaries`). So each
stands for a share of what is skipped: a sampled token weighs 1 + SAMPLE_SHARE (2^(t - s) - 1).

Three launches. The first counts each list's scores by bucket, from a sample in long histories. The
second shares a segment's budget among its lists and finds each list's thresholds: the score that
the best tokens reach, and the priority that makes up the list. The third walks the scores in
order of address, the last chunks first, and writes slots and weights of those that reach one.
Importance orders the tiers, address orders a tier, so the gather that follows reads memory in runs.
Ours; the paper sorts.

Half of the budget is dealt equally, half by one level of probability for all lists that share it.
A list ends earlier where its skipped tokens hold less softmax mass than the request's target error.
"""

import torch
import triton
import triton.language as tl

from .. import tuning
from ..columns import DENSE_START, HISTORY, LIST_LENGTH, ROW, SEGMENT_COLUMNS
from ..layout import NOT_LISTED
from ..sampling import NOISE_STEP, priority_noise
from ..strata import NOISE_TOKENS, noise_phase, stratum_offset
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
from .plan import plan_kernel
from .selected import SelectedTokens

NOISE_LIMIT = tl.constexpr(tuning.NOISE_LIMIT)
SAMPLE_SHARE = tl.constexpr(tuning.SAMPLE_SHARE)
RUN = 2 * ESTIMATE_STEP  # neighbouring tokens that are handled as one
assert RUN == NOISE_STEP


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
def _ones(bits):
    """Return the number of ones of sixteen bits."""
    bits -= (bits >> 1) & 0x5555
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
    bits = (bits + (bits >> 4)) & 0x0F0F
    return (bits + (bits >> 8)) & 0x1F


@triton.jit
def _bits(scores, p_noise, least, priority, below, o_in, BOUNDED: tl.constexpr, LAST: tl.constexpr):
    """Return which of the scores [N, M] reach a threshold: N numbers of M bits.

    In the last tier scores above ``least``, or those that reach ``priority`` with their noise.
    """
    scores = scores.to(tl.float32)
    listed = scores > least
    if LAST:
        listed |= scores + tl.load(p_noise).to(tl.float32) >= priority
    if BOUNDED:
        listed &= scores <= below
    return tl.sum(tl.where(listed, 1 << o_in[None, :], 0), 1)


@triton.jit
def _emit_kernel(
    p_scores, p_noise, p_segments, p_lengths, p_thresholds, p_table, p_slots, p_weights, p_samples,
    stride_segment, stride_head, stride_table, stride_slots_segment, stride_slots_head,
    PAGE: tl.constexpr, RUN: tl.constexpr, CHUNK: tl.constexpr, TIERS: tl.constexpr,
    EVERY: tl.constexpr, SAMPLES: tl.constexpr, SAMPLE_STEP: tl.constexpr,
    NOT_LISTED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """slots[place] = table[n / PAGE] PAGE + n % PAGE of the tokens n that reach a tier's threshold.

    And weights[place] = log2(1 + SHARE (2^d - 1)), d = min(priority's threshold - score, LIMIT),
    of those that are listed by their priority; 0 of others.
    RUN neighbouring tokens lie on one page, and are the bits of one number, so that little is done
    for each token. CHUNK tokens are handled at a time. With SPLIT the programs of the last
    dimension share a list, which has one tier then.
    """
    i_head = tl.program_id(0)
    i_segment = tl.program_id(1).to(tl.int64)
    row = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + ROW).to(tl.int64)
    n = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + DENSE_START)
    i_list = i_segment * tl.num_programs(0) + i_head
    if tl.load(p_lengths + i_list) == 0:
        return
    room = stride_slots_head
    p_thresholds += i_list * (TIERS + 1)
    scored, priority = tl.load(p_thresholds + TIERS - 1), tl.load(p_thresholds + TIERS)
    p_scores += i_segment * stride_segment + i_head * stride_head
    phase = noise_phase(tl.load(p_segments + i_segment * SEGMENT_COLUMNS + HISTORY))
    p_slots += i_segment * stride_slots_segment + i_head * stride_slots_head
    p_weights += i_segment * stride_slots_segment + i_head * stride_slots_head
    p_table += row * stride_table
    p_samples += (i_segment // EVERY * tl.num_programs(0) + i_head) * SAMPLES
    step = tl.maximum(tl.cdiv(n, SAMPLES), SAMPLE_STEP)
    stratum_room = step - SAMPLE_STEP + 1
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
        least = tl.load(p_thresholds + t)
        if SPLIT:
            # Count what other programs list before this one's share, so that none waits.
            o_n = tl.arange(0, CHUNK)
            others = tl.zeros([CHUNK], tl.int32)
            for i in range(origin, origin + begin):
                start = tl.where(i < chunks, i, i - chunks) * CHUNK
                s = tl.load(p_scores + start + o_n).to(tl.float32)
                noise = tl.load(p_noise + (start + o_n + phase) % NOISE_TOKENS).to(tl.float32)
                reach = (s > least) | (s + noise >= priority)
                others += (reach & (start + o_n < n)).to(tl.int32)
            before = tl.sum(others)
        # Rows of scores hold whole chunks: loads without a mask are wide. The next chunk is on its
        # way while one is listed.
        first = tl.where(origin + begin < chunks, origin + begin, origin + begin - chunks) * CHUNK
        p_run = p_scores + (first + o_run)[:, None] + o_in[None, :]
        low, high = tl.load(p_run), tl.load(p_run + RUN // 2)
        for i in range(origin + begin, origin + end):
            start = tl.where(i < chunks, i, i - chunks) * CHUNK + o_run
            p_run = p_noise + tl.multiple_of((start + phase) % NOISE_TOKENS, RUN)[:, None]
            p_run += o_in[None, :]
            bits = _bits(low, p_run, least, priority, below, o_in, t > 0, t == TIERS - 1)
            more = _bits(
                high, p_run + RUN // 2, least, priority, below, o_in, t > 0, t == TIERS - 1
            )
            bits |= more << (RUN // 2)
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
                number = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
                m_token = (lowest != 0) & (place + i_token < room)
                tl.store(p_slots + place + i_token, slot + number, m_token)
                weight = tl.zeros_like(slot).to(tl.float32)
                if t == TIERS - 1:
                    s = tl.load(p_scores + start + number, m_token, 0.0).to(tl.float32)
                    gap = tl.where(s > scored, 0.0, tl.minimum(priority - s, NOISE_LIMIT))
                    weight = tl.log2(1.0 + (tl.exp2(tl.maximum(gap, 0.0)) - 1.0) * SAMPLE_SHARE)
                tl.store(p_weights + place + i_token, weight.to(tl.float16), m_token)
            if i_segment % EVERY == 0:
                # Half of a run has one sample at most: that of the stratum it begins in, or of the
                # next one.
                for half in tl.static_range(2):
                    begun = start + half * (RUN // 2)
                    stratum = begun // step
                    own = stratum * step + stratum_offset(stratum, stratum_room)
                    number = tl.where(own >= begun, stratum, stratum + 1)
                    sample = number * step + stratum_offset(number, stratum_room)
                    m_sample = (sample < begun + RUN // 2) & (number < n // step)
                    bit = 1 << tl.minimum(tl.maximum(sample - start, 0), RUN)
                    at = tl.where((bits & bit) != 0, place + _ones(bits & (bit - 1)), NOT_LISTED)
                    # A token that one pass does not list a later one may list.
                    m_sample &= (at < room) | (t == 0)
                    tl.store(p_samples + number, tl.where(at < room, at, NOT_LISTED), m_sample)
            before += tl.sum(of_run)
        below = least
    # A program that reads it later lists the same: no place is beyond.
    if tl.program_id(2) == tl.num_programs(2) - 1:
        tl.store(p_lengths + i_list, tl.minimum(before, room))


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
        self.weights = empty(heads * slots, dtype=torch.float16)
        self.noise = priority_noise(device)
        self.lengths = empty(segments, heads, dtype=torch.int32)
        sampled = -(-segments // ESTIMATE_EVERY)
        self.samples = empty(sampled, heads, ESTIMATE_TOKENS, dtype=torch.int32)
        self.bounds = empty(lists, self.chunks, 2, dtype=torch.float32)
        self.counts = empty(lists, BUCKETS, dtype=torch.int32)
        self.ranges = empty(lists, 2, dtype=torch.float32)
        self.thresholds = empty(lists, TIERS + 1, dtype=torch.float32)

    def lists(self, work: WorkList) -> SelectedTokens:
        """Return the lists of a work list: views of the scratch."""
        heads, capacity = self.scores.shape[1], list_capacity(work.max_list)
        slots, weights = (
            part[: work.num_segments * heads * capacity].view(-1, heads, capacity)
            for part in (self.slots, self.weights)
        )
        return SelectedTokens(slots, weights, self.lengths[: work.num_segments], self.samples)


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
        tiers: ``TIERS``, or ``TIERS_UNORDERED`` where the order is of no use.
        counted: most scores of a list that are counted.
        split: give every chunk of a list its program, where lists are few; for one tier alone.
        shared: neighbouring lists of a segment that share its budget.

    :mod:`selection.reference` says exactly how many are selected, which and in which order.
    """
    heads, (slots, weights, lengths, samples) = space.scores.shape[1], space.lists(work)
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
    plan_kernel[(triton.cdiv(heads, shared), work.num_segments)](
        work.segments, space.counts, space.ranges, lengths, space.thresholds, work.target_error,
        heads, BUCKETS=BUCKETS, SHARED=shared, SHARED_PAD=pad,
        MEAN_OF_MAX=MEAN_OF_MAX, TIERS=tiers,
        num_warps=min(max(4, pad), 32), enable_fp_fusion=False,  # levels of all lists in registers
    )  # fmt: skip
    programs = triton.cdiv(work.max_history, space.chunk) if split else 1
    _emit_kernel[(heads, work.num_segments, programs)](
        space.scores, space.noise, work.segments, lengths, space.thresholds, block_table, slots,
        weights, samples,
        *strides, block_table.stride(0), slots.stride(0), slots.stride(1), PAGE=page,
        RUN=RUN, EVERY=ESTIMATE_EVERY, SAMPLES=ESTIMATE_TOKENS,
        SAMPLE_STEP=ESTIMATE_STEP, NOT_LISTED=NOT_LISTED, SPLIT=split,
        num_warps=8 if split else 4, **shape,
    )  # fmt: skip
