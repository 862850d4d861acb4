"""Select: from scores to lists of physical slots, without a sort.

Four launches. The first counts each list's scores by bucket, from a sample in long histories. The
second shares a segment's budget among its lists and finds each list's thresholds: the scores that
as many tokens reach. The third walks the scores in order of address, the last chunks first, and
writes the slots of those that reach a threshold. Importance orders the tiers, address orders a
tier, so the gather that follows reads memory in runs. Ours; the paper sorts. The last one counts
how many tokens of each summary a list leaves out, for these stand for no more than that.

Half of the budget is dealt equally, half by one level of probability for all lists that share it.
A list ends earlier where its skipped tokens hold less softmax mass than the request's target error.
"""

import torch
import triton
import triton.language as tl

from ..attention.summary_table import REGIONS, Summaries, slot_stride
from ..columns import DENSE_START, LIST_LENGTH, ROW, SEGMENT_COLUMNS, SLOT
from ..layout import NOT_LISTED
from ..strata import stratum_offset
from ..tuning import (
    BUCKETS,
    CHUNK,
    CLUSTERS,
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

RUN = 2 * ESTIMATE_STEP  # neighbouring tokens that are handled as one
COUNT_BLOCK = 1024  # listed tokens that are counted by summary at a time


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
def _bits(scores, least, below, o_in, BOUNDED: tl.constexpr):
    """Return which of the scores [N, M] reach a threshold: N numbers of M bits."""
    scores = scores.to(tl.float32)
    listed = scores >= least
    if BOUNDED:
        listed &= scores < below
    return tl.sum(tl.where(listed, 1 << o_in[None, :], 0), 1)


@triton.jit
def _emit_kernel(
    p_scores, p_segments, p_lengths, p_thresholds, p_table, p_slots, p_samples, p_labels, p_listed,
    stride_segment, stride_head, stride_table, stride_slots_segment, stride_slots_head,
    stride_labels_slot, stride_labels_head,
    PAGE: tl.constexpr, RUN: tl.constexpr, CHUNK: tl.constexpr, TIERS: tl.constexpr,
    EVERY: tl.constexpr, SAMPLES: tl.constexpr, SAMPLE_STEP: tl.constexpr,
    NOT_LISTED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """slots[place] = table[n / PAGE] PAGE + n % PAGE of the tokens n that reach a tier's threshold.

    And listed[place] = labels[n], which summary the token belongs to. RUN neighbouring tokens lie
    on one page, and are the bits of one number, so that little is done for each token. CHUNK tokens
    are handled at a time. With SPLIT the programs of the last dimension share a list, which has one
    tier then.
    """
    i_head = tl.program_id(0)
    i_segment = tl.program_id(1).to(tl.int64)
    row = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + ROW).to(tl.int64)
    n = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + DENSE_START)
    i_list = i_segment * tl.num_programs(0) + i_head
    length = tl.load(p_lengths + i_list)
    if length == 0:
        return
    room = tl.minimum(stride_slots_head, length)
    p_thresholds += i_list * TIERS
    p_scores += i_segment * stride_segment + i_head * stride_head
    p_slots += i_segment * stride_slots_segment + i_head * stride_slots_head
    if p_labels is not None:
        i_slot = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + SLOT).to(tl.int64)
        p_labels += i_slot * stride_labels_slot + i_head * stride_labels_head
        p_listed += i_segment * stride_slots_segment + i_head * stride_slots_head
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
                number = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
                m_token = (lowest != 0) & (place + i_token < room)
                tl.store(p_slots + place + i_token, slot + number, m_token)
                if p_labels is not None:
                    label = tl.load(p_labels + start + number, m_token)
                    tl.store(p_listed + place + i_token, label, m_token)
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


@triton.jit
def _left_kernel(
    p_segments, p_lengths, p_listed, p_sizes, p_starts, p_left,
    stride_slots_segment, stride_slots_head, stride_sizes_slot, stride_starts, clusters, region,
    ROWS: tl.constexpr, ROWS_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """left[s] = log2(max(tokens of summary s - how many of them are listed, 0)).

    A region counts if it is whole, and before the segment's dense pass.
    """
    i_head, i_segment = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(0)
    i_list = i_segment * kv_heads + i_head
    o_s = tl.arange(0, ROWS_PAD)
    dense_start = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + DENSE_START)
    slot = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + SLOT).to(tl.int64)
    length = tl.load(p_lengths + i_list)
    p_listed += i_segment * stride_slots_segment + i_head * stride_slots_head
    listed = tl.zeros([ROWS_PAD], tl.int32)
    for first in range(0, length, BLOCK):
        place = first + tl.arange(0, BLOCK)
        label = tl.load(p_listed + place, place < length, 0).to(tl.int32)
        listed += tl.histogram(label, ROWS_PAD, mask=(place < length) & (label < ROWS))
    sizes = tl.load(p_sizes + slot * stride_sizes_slot + i_head * ROWS + o_s, o_s < ROWS, 0)
    end = tl.load(p_starts + slot * stride_starts) + (o_s - clusters + 1) * region
    left = tl.where((o_s < clusters) | (end <= dense_start), tl.maximum(sizes - listed, 0), 0)
    tl.store(p_left + i_list * ROWS + o_s, tl.log2(left.to(tl.float32)), o_s < ROWS)


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
        summary_rows: int = CLUSTERS + REGIONS,
    ):
        self.chunk = chunk
        self.chunks = max(1, -(-max_history // chunk))
        lists = segments * heads

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.scores = empty(segments, heads, self.chunks * chunk, dtype=torch.float16)
        self.slots = empty(heads * slots, dtype=torch.int32)
        self.listed = empty(heads * slots, dtype=torch.uint8)
        self.left = empty(segments, heads, summary_rows, dtype=torch.float32)
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
        count = work.num_segments
        slots = self.slots[: count * heads * capacity].view(-1, heads, capacity)
        return SelectedTokens(slots, self.lengths[:count], self.samples, self.left[:count])


def select(
    block_table: torch.Tensor,
    work: WorkList,
    page: int,
    space: SelectWorkspace,
    tiers: int = TIERS,
    counted: int = COUNTED,
    split: bool = False,
    shared: int = HEADS_SHARED,
    summaries: Summaries | None = None,
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
        summaries: of the segments' histories: what lists leave out of each is counted then.

    :mod:`selection.reference` says exactly how many are selected, which and in which order.
    """
    heads, (slots, lengths, samples, left) = space.scores.shape[1], space.lists(work)
    if work.max_list == 0:
        lengths.zero_()
        if left is not None:
            left.fill_(float("-inf"))
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
        heads, BUCKETS=BUCKETS, COUNTED=counted, SHARED=shared, SHARED_PAD=pad,
        MEAN_OF_MAX=MEAN_OF_MAX, TIERS=tiers,
        num_warps=min(max(4, pad), 32), enable_fp_fusion=False,  # levels of all lists in registers
    )  # fmt: skip
    programs = triton.cdiv(work.max_history, space.chunk) if split else 1
    labels = None if summaries is None else summaries.labels
    label_strides = (0, 0) if labels is None else (slot_stride(labels), labels.stride(1))
    _emit_kernel[(heads, work.num_segments, programs)](
        space.scores, work.segments, lengths, space.thresholds, block_table, slots, samples,
        labels, space.listed,
        *strides, block_table.stride(0), slots.stride(0), slots.stride(1), *label_strides,
        PAGE=page, RUN=RUN, EVERY=ESTIMATE_EVERY, SAMPLES=ESTIMATE_TOKENS,
        SAMPLE_STEP=ESTIMATE_STEP, NOT_LISTED=NOT_LISTED, SPLIT=split,
        num_warps=8 if split else 4, **shape,
    )  # fmt: skip
    if summaries is not None:
        sizes, rows = summaries.sizes, summaries.sizes.shape[2]
        _left_kernel[(heads, work.num_segments)](
            work.segments, lengths, space.listed, sizes, summaries.starts, left,
            slots.stride(0), slots.stride(1), slot_stride(sizes), slot_stride(summaries.starts),
            summaries.clusters, summaries.region_tokens,
            ROWS=rows, ROWS_PAD=triton.next_power_of_2(rows), BLOCK=COUNT_BLOCK, num_warps=4,
        )  # fmt: skip
