"""Select: from scores to a list of physical slots, without a sort.

Three launches over chunks of the history: a histogram of every chunk, one program a list
that turns the histograms into tier bounds and write positions, and the emission. Whole
buckets are taken from the best on; importance orders the tiers, address orders a tier, so
the gather that follows reads memory in runs. Ours; the paper sorts.
"""

import torch
import triton
import triton.language as tl

from .plan import BUCKETS, COLUMNS, TIERS, WorkList

CHUNK = 4096  # history tokens a program
BLOCK = 1024


@triton.jit
def _buckets(scores, best, worst, BUCKETS: tl.constexpr):
    """Bucket 0 holds the best scores."""
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
def _bounds_kernel(
    p_scores, p_items, p_bounds, stride_item, stride_head, max_chunks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the best and the worst score of a chunk."""
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    i_item = tl.program_id(2).to(tl.int64)
    n = tl.load(p_items + i_item * ITEM_COLUMNS + 4)
    start = i_chunk * CHUNK
    if start >= n:
        return
    p_scores += i_item * stride_item + i_head * stride_head
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    worst = tl.full([BLOCK], float("inf"), tl.float32)
    for o in range(start, tl.minimum(start + CHUNK, n), BLOCK):
        o_n = o + tl.arange(0, BLOCK)
        s = tl.load(p_scores + o_n, o_n < n, 0.0)
        best = tl.maximum(best, tl.where(o_n < n, s, float("-inf")))
        worst = tl.minimum(worst, tl.where(o_n < n, s, float("inf")))
    p_bounds += 2 * ((i_item * tl.num_programs(1) + i_head) * max_chunks + i_chunk)
    tl.store(p_bounds, tl.max(best))
    tl.store(p_bounds + 1, tl.min(worst))


@triton.jit
def _histogram_kernel(
    p_scores, p_items, p_bounds, p_histograms, stride_item, stride_head, max_chunks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BUCKETS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr, ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count a chunk's scores by bucket."""
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    i_item = tl.program_id(2).to(tl.int64)
    n = tl.load(p_items + i_item * ITEM_COLUMNS + 4)
    start = i_chunk * CHUNK
    if start >= n:
        return
    p_scores += i_item * stride_item + i_head * stride_head
    i_list = (i_item * tl.num_programs(1) + i_head) * max_chunks
    best, worst = _bounds_of_list(p_bounds + 2 * i_list, tl.cdiv(n, CHUNK), CHUNKS_PAD)
    counts = tl.zeros([BUCKETS], tl.int32)
    for o in range(start, tl.minimum(start + CHUNK, n), BLOCK):
        o_n = o + tl.arange(0, BLOCK)
        s = tl.load(p_scores + o_n, o_n < n, 0.0)
        counts += tl.histogram(_buckets(s, best, worst, BUCKETS), BUCKETS, mask=o_n < n)
    tl.store(p_histograms + (i_list + i_chunk) * BUCKETS + tl.arange(0, BUCKETS), counts)


@triton.jit
def _place_kernel(
    p_items, p_histograms, p_tier_bounds, p_places, max_chunks,
    CHUNK: tl.constexpr, BUCKETS: tl.constexpr, TIERS: tl.constexpr,
    TIERS_PAD: tl.constexpr, ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Turn a list's histograms into tier bounds and each chunk's first place per tier."""
    i_head = tl.program_id(0)
    i_item = tl.program_id(1).to(tl.int64)
    n = tl.load(p_items + i_item * ITEM_COLUMNS + 4)
    count = tl.load(p_items + i_item * ITEM_COLUMNS + 5)
    if count == 0:
        return
    chunks = tl.cdiv(n, CHUNK)
    i_list = i_item * tl.num_programs(0) + i_head
    p_histograms += i_list * max_chunks * BUCKETS
    p_places += i_list * max_chunks * TIERS_PAD
    o_b = tl.arange(0, BUCKETS)
    total = tl.zeros([BUCKETS], tl.int32)
    for chunk in range(0, chunks):
        total += tl.load(p_histograms + chunk * BUCKETS + o_b)
    cumulative = tl.cumsum(total)
    last = tl.sum((cumulative < count).to(tl.int32))  # the bucket that fills the list

    # bounds[t] is the last bucket of tier t; everything after `last` belongs to no tier.
    o_t = tl.arange(0, TIERS_PAD)
    bounds = tl.where(o_t == TIERS - 2, last - 1, last)
    for t in tl.static_range(TIERS - 2):
        goal = tl.maximum(count >> (TIERS - 2 - t), 1)
        bound = tl.minimum(tl.sum((cumulative < goal).to(tl.int32)), last - 1)
        bounds = tl.where(o_t == t, bound, bounds)
    tl.store(p_tier_bounds + i_list * TIERS_PAD + o_t, bounds)

    # Tokens up to each bound, and so the first place of each tier.
    upto = tl.sum(tl.where(o_b[None, :] <= bounds[:, None], total[None, :], 0), 1)
    previous = tl.zeros([TIERS_PAD], tl.int32)
    for t in tl.static_range(1, TIERS):
        previous = tl.where(o_t == t, tl.sum(tl.where(o_t == t - 1, upto, 0)), previous)
    place = previous
    before = tl.full([TIERS_PAD], -1, tl.int32)  # last bucket of the tier before
    for t in tl.static_range(1, TIERS):
        before = tl.where(o_t == t, tl.sum(tl.where(o_t == t - 1, bounds, 0)), before)
    for chunk in range(0, chunks):
        tl.store(p_places + chunk * TIERS_PAD + o_t, place)
        counts = tl.load(p_histograms + chunk * BUCKETS + o_b)
        inside = (o_b[None, :] > before[:, None]) & (o_b[None, :] <= bounds[:, None])
        place += tl.sum(tl.where(inside, counts[None, :], 0), 1)


@triton.jit
def _emit_kernel(
    p_scores, p_items, p_bounds, p_tier_bounds, p_places, p_table, p_slots,
    stride_item, stride_head, stride_table, stride_slots_item, stride_slots_head, max_chunks,
    PAGE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BUCKETS: tl.constexpr,
    TIERS: tl.constexpr, TIERS_PAD: tl.constexpr, CHUNKS_PAD: tl.constexpr,
    ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the slots of a chunk's selected tokens to their places."""
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    i_item = tl.program_id(2).to(tl.int64)
    row = tl.load(p_items + i_item * ITEM_COLUMNS).to(tl.int64)
    n = tl.load(p_items + i_item * ITEM_COLUMNS + 4)
    count = tl.load(p_items + i_item * ITEM_COLUMNS + 5)
    start = i_chunk * CHUNK
    if (start >= n) | (count == 0):
        return
    i_list = i_item * tl.num_programs(1) + i_head
    best, worst = _bounds_of_list(p_bounds + 2 * i_list * max_chunks, tl.cdiv(n, CHUNK), CHUNKS_PAD)
    p_scores += i_item * stride_item + i_head * stride_head
    p_slots += i_item * stride_slots_item + i_head * stride_slots_head
    p_tier_bounds += i_list * TIERS_PAD
    p_places += (i_list * max_chunks + i_chunk) * TIERS_PAD
    o_t = tl.arange(0, TIERS_PAD)
    places = tl.load(p_places + o_t)
    last = tl.load(p_tier_bounds + TIERS - 1)
    for o in range(start, tl.minimum(start + CHUNK, n), BLOCK):
        o_n = o + tl.arange(0, BLOCK)
        s = tl.load(p_scores + o_n, o_n < n, 0.0)
        bucket = _buckets(s, best, worst, BUCKETS)
        taken = (o_n < n) & (bucket <= last)
        place = tl.zeros([BLOCK], tl.int32)
        lower = -1
        for t in tl.static_range(TIERS):
            upper = tl.load(p_tier_bounds + t)
            inside = taken & (bucket > lower) & (bucket <= upper)
            rank = tl.cumsum(inside.to(tl.int32))
            first = tl.sum(tl.where(o_t == t, places, 0))
            place = tl.where(inside, first + rank - 1, place)
            places = tl.where(o_t == t, places + tl.sum(inside.to(tl.int32)), places)
            lower = upper
        taken &= place < count
        page = tl.load(p_table + row * stride_table + o_n // PAGE, taken, 0)
        tl.store(p_slots + place, page * PAGE + o_n % PAGE, taken)


class SelectWorkspace:
    """Scratch of :func:`select` for up to ``items`` items of ``heads`` lists each.

    Holds the scores as well: float32 ``[items, heads, max_history]``.
    """

    def __init__(
        self,
        items: int,
        heads: int,
        max_history: int,
        device: torch.device,
        chunk: int = CHUNK,
        block: int = BLOCK,
    ):
        self.chunk, self.block = chunk, block
        self.chunks = max(1, -(-max_history // chunk))
        lists = items * heads

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.scores = empty(items, heads, max_history, dtype=torch.float32)
        self.slots = empty(items, heads, max(max_history, 1), dtype=torch.int32)
        self.bounds = empty(lists, self.chunks, 2, dtype=torch.float32)
        self.histograms = empty(lists, self.chunks, BUCKETS, dtype=torch.int32)
        self.tier_bounds = empty(lists, triton.next_power_of_2(TIERS), dtype=torch.int32)
        self.places = empty(lists, self.chunks, triton.next_power_of_2(TIERS), dtype=torch.int32)


def select(block_table: torch.Tensor, work: WorkList, page: int, space: SelectWorkspace) -> None:
    """Select the ``list_length`` best history tokens of every list.

    Args:
        block_table: int32 ``[rows, max_blocks]``.
        work: the segments; ``space.scores[i, h, :dense_start]`` holds the scores of item i.
        page: tokens per block of the cache.
        space: scratch; ``space.slots`` int32 ``[items, heads, *]`` receives the lists.

    See :func:`reference.select_positions` for exactly what is chosen and in which order.
    """
    if work.max_list == 0:
        return
    heads = space.scores.shape[1]
    strides = (space.scores.stride(0), space.scores.stride(1))
    chunks = -(-work.max_history // space.chunk)
    grid = (chunks, heads, work.num_items)
    shape = {"CHUNK": space.chunk, "BLOCK": space.block, "ITEM_COLUMNS": COLUMNS}
    tiers = {"TIERS": TIERS, "TIERS_PAD": triton.next_power_of_2(TIERS)}
    chunks_pad = triton.next_power_of_2(space.chunks)
    _bounds_kernel[grid](space.scores, work.items, space.bounds, *strides, space.chunks, **shape)
    _histogram_kernel[grid](
        space.scores, work.items, space.bounds, space.histograms, *strides, space.chunks,
        BUCKETS=BUCKETS, CHUNKS_PAD=chunks_pad, **shape,
    )  # fmt: skip
    _place_kernel[(heads, work.num_items)](
        work.items, space.histograms, space.tier_bounds, space.places, space.chunks,
        CHUNK=space.chunk, BUCKETS=BUCKETS, ITEM_COLUMNS=COLUMNS, **tiers,
    )  # fmt: skip
    _emit_kernel[grid](
        space.scores, work.items, space.bounds, space.tier_bounds, space.places,
        block_table, space.slots, *strides, block_table.stride(0),
        space.slots.stride(0), space.slots.stride(1), space.chunks,
        PAGE=page, BUCKETS=BUCKETS, CHUNKS_PAD=chunks_pad, **tiers, **shape,
    )  # fmt: skip
