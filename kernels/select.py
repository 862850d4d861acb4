"""Select: from scores to a list of physical slots, without a sort.

Four launches: a histogram of every chunk of a list; one program a segment and pair of heads that
shares the budget among them; one a list that finds tier bounds and write positions; and the
emission. Whole buckets are taken from the best on; importance orders the tiers, address orders a
tier, so the gather that follows reads memory in runs. Ours; the paper sorts.

Half of the budget is dealt equally, half by one level of probability for both heads of a pair. A
list ends earlier where the scores say that what it leaves out holds less softmax mass than the
request's target error.
"""

import torch
import triton
import triton.language as tl

from .plan import (
    BUCKETS,
    CHUNK,
    COLUMNS,
    ESTIMATE_EVERY,
    ESTIMATE_TOKENS,
    HEADS_SHARED,
    MEAN_OF_MAX,
    NOT_LISTED,
    TIERS,
    Lists,
    WorkList,
    list_places,
)

TIERS_PAD = triton.next_power_of_2(TIERS)


@triton.jit
def _buckets(scores, best, worst, BUCKETS: tl.constexpr):
    """Bucket 0 holds the best scores."""
    scores = scores.to(tl.float32)
    width = tl.maximum(best - worst, 1e-20)
    bucket = (best - scores) * (BUCKETS / width)
    return tl.minimum(tl.maximum(bucket, 0.0), BUCKETS - 1.0).to(tl.int32)


@triton.jit
def _bounds_of_list(p_bounds, chunks, CHUNKS_PAD: tl.constexpr):
    """Best and worst score of a list from its chunks' bounds."""
    o = tl.arange(0, CHUNKS_PAD)
    best = tl.max(tl.load(p_bounds + 2 * o, o < chunks, float("-inf")))
    worst = tl.min(tl.load(p_bounds + 2 * o + 1, o < chunks, float("inf")))
    return best, worst


@triton.jit
def _histogram_kernel(
    p_scores, p_items, p_bounds, p_histograms, stride_item, stride_head, max_chunks,
    CHUNK: tl.constexpr, BUCKETS: tl.constexpr, CHUNKS_PAD: tl.constexpr,
    ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count a chunk's scores by bucket."""
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    i_item = tl.program_id(2).to(tl.int64)
    n = tl.load(p_items + i_item * ITEM_COLUMNS + 4)
    if i_chunk * CHUNK >= n:
        return
    i_list = (i_item * tl.num_programs(1) + i_head) * max_chunks
    best, worst = _bounds_of_list(p_bounds + 2 * i_list, tl.cdiv(n, CHUNK), CHUNKS_PAD)
    o_n = i_chunk * CHUNK + tl.arange(0, CHUNK)
    # Rows of scores hold whole chunks: loads without a mask are wide.
    s = tl.load(p_scores + i_item * stride_item + i_head * stride_head + o_n)
    counts = tl.histogram(_buckets(s, best, worst, BUCKETS), BUCKETS, mask=o_n < n)
    p_histograms += (i_list + i_chunk) * BUCKETS
    tl.store(p_histograms + tl.arange(0, BUCKETS), counts.to(tl.int16))


@triton.jit
def _lengths_above(level, total, edge, least):
    """Lengths of lists that take the buckets above a level, and ``least`` tokens in any case."""
    return tl.maximum(tl.sum(tl.where(edge >= level, total, 0), 1), least)


@triton.jit
def _length_kernel(
    p_items, p_bounds, p_histograms, p_lengths, target_error, heads, max_chunks,
    CHUNK: tl.constexpr, BUCKETS: tl.constexpr, SHARED: tl.constexpr, CHUNKS_PAD: tl.constexpr,
    MEAN_OF_MAX: tl.constexpr, ROWS: tl.constexpr, ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Share the budget of a segment among the lists of SHARED heads."""
    i_item = tl.program_id(1).to(tl.int64)
    n = tl.load(p_items + i_item * ITEM_COLUMNS + 4)
    count = tl.load(p_items + i_item * ITEM_COLUMNS + 5)
    o_h = tl.program_id(0) * SHARED + tl.arange(0, SHARED)
    m_h = o_h < heads
    sharing = tl.sum(m_h.to(tl.int32))
    i_list = i_item * heads + o_h
    if count == 0:
        tl.store(p_lengths + i_list, tl.zeros([SHARED], tl.int32), m_h)
        return
    chunks = tl.cdiv(n, CHUNK)
    o_b = tl.arange(0, BUCKETS)
    total = tl.zeros([SHARED, BUCKETS], tl.int32)
    for first in range(0, chunks, ROWS):
        o_chunk = first + tl.arange(0, ROWS)
        o_histogram = (i_list[None, :] * max_chunks + o_chunk[:, None])[:, :, None] * BUCKETS
        m_histogram = (m_h[None, :] & (o_chunk < chunks)[:, None])[:, :, None]
        counts = tl.load(p_histograms + o_histogram + o_b[None, None, :], m_histogram, 0)
        total += tl.sum(counts.to(tl.int32), 0)
    o_c = tl.arange(0, CHUNKS_PAD)
    o_bound = 2 * (i_list[:, None] * max_chunks + o_c[None, :])
    m_bound = m_h[:, None] & (o_c < chunks)[None, :]
    best = tl.max(tl.load(p_bounds + o_bound, m_bound, float("-inf")), 1)
    worst = tl.min(tl.load(p_bounds + o_bound + 1, m_bound, float("inf")), 1)
    above, below = tl.max(best) + 1.0, tl.min(worst) - 1.0
    best, worst = tl.where(m_h, best, 0.0), tl.where(m_h, worst, 0.0)
    width = (tl.maximum(best - worst, 1e-20) / BUCKETS)[:, None]
    edge = best[:, None] - (o_b + 1).to(tl.float32)[None, :] * width

    # The lowest level whose lists fit the budget, by bisection: below it they do not.
    least = tl.where(m_h, (count + 1) // 2, 0)
    for _ in range(40):
        level = 0.5 * (above + below)
        fits = tl.sum(_lengths_above(level, total, edge, least)) <= sharing * count
        above = tl.where(fits, level, above)
        below = tl.where(fits, below, level)
    lengths = _lengths_above(above, total, edge, least)
    extra = _lengths_above(below, total, edge, least) - lengths
    left = (sharing * count - tl.sum(lengths)).to(tl.int64)
    lengths += (extra * left // tl.maximum(tl.sum(extra), 1)).to(tl.int32)

    if target_error > 0:
        mass = total * tl.exp2(edge + 0.5 * width)
        whole = tl.sum(mass, 1)
        mass *= tl.maximum(MEAN_OF_MAX, 1.0 / tl.maximum(whole, 1e-30))[:, None]
        beyond = tl.sum(mass, 1)[:, None] - tl.cumsum(mass, 1)
        # Buckets before the last that is needed count whole, of that one as much as is needed.
        needed = tl.sum((beyond > target_error).to(tl.int32), 1)[:, None]
        last = o_b[None, :] == needed
        excess = tl.sum(tl.where(last, beyond + mass, 0.0), 1) - target_error
        tokens = tl.sum(tl.where(last, total, 0), 1)
        part = excess / tl.maximum(tl.sum(tl.where(last, mass, 0.0), 1), 1e-30)
        part = tl.ceil(tl.minimum(tl.maximum(part, 0.0), 1.0) * tokens).to(tl.int32)
        before = tl.sum(tl.where(o_b[None, :] < needed, total, 0), 1)
        lengths = tl.minimum(lengths, before + part)
    tl.store(p_lengths + i_list, lengths, m_h)


@triton.jit
def _place_kernel(
    p_items, p_histograms, p_lengths, p_tier_bounds, p_places, max_chunks,
    CHUNK: tl.constexpr, BUCKETS: tl.constexpr, TIERS: tl.constexpr, TIERS_PAD: tl.constexpr,
    ROWS: tl.constexpr, ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Turn a list's histograms into tier bounds and each chunk's first place per tier."""
    i_head = tl.program_id(0)
    i_item = tl.program_id(1).to(tl.int64)
    i_list = i_item * tl.num_programs(0) + i_head
    n = tl.load(p_items + i_item * ITEM_COLUMNS + 4)
    count = tl.load(p_lengths + i_list)
    if count == 0:
        return
    chunks = tl.cdiv(n, CHUNK)
    p_histograms += i_list * max_chunks * BUCKETS
    p_places += i_list * max_chunks * TIERS_PAD
    o_b = tl.arange(0, BUCKETS)
    o_c = tl.arange(0, ROWS)
    total = tl.zeros([BUCKETS], tl.int32)
    for first in range(0, chunks, ROWS):
        o_chunk = first + o_c
        o_histogram = o_chunk[:, None] * BUCKETS + o_b[None, :]
        counts = tl.load(p_histograms + o_histogram, (o_chunk < chunks)[:, None], 0)
        total += tl.sum(counts.to(tl.int32), 0)
    cumulative = tl.cumsum(total)
    last = tl.sum((cumulative < count).to(tl.int32))  # the bucket that fills the list

    # upper is the last bucket of a tier; what comes after the last tier's is not taken.
    lower = -1
    place = 0
    for t in tl.static_range(TIERS):
        if t == TIERS - 1:
            upper = last
        elif t == TIERS - 2:
            upper = last - 1
        else:
            goal = tl.maximum(count >> (TIERS - 2 - t), 1)
            upper = tl.minimum(tl.sum((cumulative < goal).to(tl.int32)), last - 1)
        tl.store(p_tier_bounds + i_list * TIERS_PAD + t, upper)
        inside = (o_b > lower) & (o_b <= upper)
        for first in range(0, chunks, ROWS):
            o_chunk = first + o_c
            o_histogram = o_chunk[:, None] * BUCKETS + o_b[None, :]
            m_histogram = (o_chunk < chunks)[:, None] & inside[None, :]
            counts = tl.sum(tl.load(p_histograms + o_histogram, m_histogram, 0).to(tl.int32), 1)
            before = tl.cumsum(counts) - counts
            tl.store(p_places + o_chunk * TIERS_PAD + t, place + before, o_chunk < chunks)
            place += tl.sum(counts)
        lower = upper


@triton.jit
def _emit_kernel(
    p_scores, p_items, p_bounds, p_lengths, p_tier_bounds, p_places, p_table, p_slots, p_samples,
    stride_item, stride_head, stride_table, stride_slots_item, stride_slots_head, max_chunks,
    PAGE: tl.constexpr, CHUNK: tl.constexpr, BUCKETS: tl.constexpr,
    TIERS: tl.constexpr, TIERS_PAD: tl.constexpr, CHUNKS_PAD: tl.constexpr,
    EVERY: tl.constexpr, SAMPLES: tl.constexpr, NOT_LISTED: tl.constexpr,
    ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the slots of a chunk's selected tokens to their places."""
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    i_item = tl.program_id(2).to(tl.int64)
    row = tl.load(p_items + i_item * ITEM_COLUMNS).to(tl.int64)
    n = tl.load(p_items + i_item * ITEM_COLUMNS + 4)
    i_list = i_item * tl.num_programs(1) + i_head
    count = tl.load(p_lengths + i_list)
    if (i_chunk * CHUNK >= n) | (count == 0):
        return
    best, worst = _bounds_of_list(p_bounds + 2 * i_list * max_chunks, tl.cdiv(n, CHUNK), CHUNKS_PAD)
    p_tier_bounds += i_list * TIERS_PAD
    p_places += (i_list * max_chunks + i_chunk) * TIERS_PAD
    o_n = i_chunk * CHUNK + tl.arange(0, CHUNK)
    s = tl.load(p_scores + i_item * stride_item + i_head * stride_head + o_n)
    bucket = _buckets(s, best, worst, BUCKETS)
    taken = (o_n < n) & (bucket <= tl.load(p_tier_bounds + TIERS - 1))
    tier = tl.zeros([CHUNK], tl.int32)
    place = tl.full([CHUNK], 0, tl.int32) + tl.load(p_places)
    for t in tl.static_range(TIERS - 1):
        above = bucket > tl.load(p_tier_bounds + t)
        tier += above.to(tl.int32)
        place = tl.where(above, tl.load(p_places + t + 1), place)
    # One number counts all tiers at once, BITS bits each. A tier that fills all CHUNK places
    # spills into the next one, which then has no token to notice.
    BITS: tl.constexpr = 12
    tl.static_assert(CHUNK <= 2**BITS)
    COUNTER: tl.constexpr = tl.int64 if TIERS * BITS > 32 else tl.int32
    shift = (tier * BITS).to(COUNTER)
    one = tl.where(taken, tl.full([CHUNK], 1, COUNTER) << shift, 0).to(COUNTER)
    place += (((tl.cumsum(one) - one) >> shift) & (2**BITS - 1)).to(tl.int32)
    taken &= place < count
    page = tl.load(p_table + row * stride_table + o_n // PAGE, taken, 0)
    p_slots += i_item * stride_slots_item + i_head * stride_slots_head
    tl.store(p_slots + place, page * PAGE + o_n % PAGE, taken)
    if i_item % EVERY == 0:
        samples = tl.minimum(n, SAMPLES)
        before = o_n - n // (2 * samples)
        number = (before * samples + n - 1) // n
        m_sample = (before >= 0) & (number < samples) & (number * n // samples == before)
        p_samples += (i_item // EVERY * tl.num_programs(1) + i_head) * SAMPLES
        tl.store(p_samples + number, tl.where(taken, place, NOT_LISTED), m_sample & (o_n < n))


class SelectWorkspace:
    """Scratch of :func:`select` for up to ``items`` items of ``heads`` lists each.

    A head's lists have ``places`` places together.

    Holds what a ranking writes as well: ``scores``, float16 ``[items, heads, >= max_history]``,
    whole chunks, and ``bounds``, float32 ``[items * heads, chunks, 2]``, best and worst score of
    each chunk.
    """

    def __init__(
        self,
        items: int,
        heads: int,
        max_history: int,
        places: int,
        device: torch.device,
        chunk: int = CHUNK,
    ):
        self.chunk = chunk
        self.chunks = max(1, -(-max_history // chunk))
        lists = items * heads

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.scores = empty(items, heads, self.chunks * chunk, dtype=torch.float16)
        self.slots = empty(heads * places, dtype=torch.int32)
        self.lengths = empty(items, heads, dtype=torch.int32)
        sampled = -(-items // ESTIMATE_EVERY)
        self.samples = empty(sampled, heads, ESTIMATE_TOKENS, dtype=torch.int32)
        self.bounds = empty(lists, self.chunks, 2, dtype=torch.float32)
        self.histograms = empty(lists, self.chunks, BUCKETS, dtype=torch.int16)
        self.tier_bounds = empty(lists, TIERS_PAD, dtype=torch.int32)
        self.places = empty(lists, self.chunks, TIERS_PAD, dtype=torch.int32)

    def lists(self, work: WorkList) -> Lists:
        """Return where the lists of a work list are."""
        heads, places = self.scores.shape[1], list_places(work.max_list)
        slots = self.slots[: work.num_items * heads * places].view(-1, heads, places)
        return Lists(slots, self.lengths[: work.num_items], self.samples)


def select(
    block_table: torch.Tensor,
    work: WorkList,
    page: int,
    space: SelectWorkspace,
    tiers: int = TIERS,
) -> None:
    """Select the best history tokens of every list.

    Args:
        block_table: int32 ``[rows, max_blocks]``.
        work: the segments; ``space.scores[i, h, :dense_start]`` holds the scores of item i, and
            ``space.bounds`` their bounds.
        page: tokens per block of the cache.
        space: scratch; ``space.lists(work)`` are the lists.
        tiers: ``TIERS``, or ``TIERS_UNORDERED`` where the order is of no use.

    :mod:`reference_select` says exactly how many are chosen, which and in which order.
    """
    heads, (slots, lengths, samples) = space.scores.shape[1], space.lists(work)
    if work.max_list == 0:
        lengths.zero_()
        return
    strides = (space.scores.stride(0), space.scores.stride(1))
    chunks = -(-work.max_history // space.chunk)
    grid = (chunks, heads, work.num_items)
    shape = {"CHUNK": space.chunk, "ITEM_COLUMNS": COLUMNS}
    chunks_pad = triton.next_power_of_2(space.chunks)
    options = {"TIERS": tiers, "TIERS_PAD": TIERS_PAD, "BUCKETS": BUCKETS, **shape}
    _histogram_kernel[grid](
        space.scores, work.items, space.bounds, space.histograms, *strides, space.chunks,
        BUCKETS=BUCKETS, CHUNKS_PAD=chunks_pad, num_warps=4, **shape,
    )  # fmt: skip
    _length_kernel[(triton.cdiv(heads, HEADS_SHARED), work.num_items)](
        work.items, space.bounds, space.histograms, lengths, work.target_error, heads,
        space.chunks, BUCKETS=BUCKETS, SHARED=HEADS_SHARED, CHUNKS_PAD=chunks_pad,
        MEAN_OF_MAX=MEAN_OF_MAX, ROWS=8, num_warps=1, **shape,
    )  # fmt: skip
    _place_kernel[(heads, work.num_items)](
        work.items, space.histograms, lengths, space.tier_bounds, space.places, space.chunks,
        ROWS=8, num_warps=1, **options,
    )  # fmt: skip
    _emit_kernel[grid](
        space.scores, work.items, space.bounds, lengths, space.tier_bounds, space.places,
        block_table, slots, samples, *strides, block_table.stride(0),
        slots.stride(0), slots.stride(1), space.chunks, PAGE=page, CHUNKS_PAD=chunks_pad,
        EVERY=ESTIMATE_EVERY, SAMPLES=ESTIMATE_TOKENS, NOT_LISTED=NOT_LISTED, num_warps=8,
        **options,
    )  # fmt: skip
