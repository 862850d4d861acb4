"""Rank by probes: one list for each query head of a segment (ours).

A segment has ``PROBES`` *probes*, each the mean of a pool of neighbouring queries of one head. A
token's score in a list is the largest log2-probability that any probe of the segment gives it:

    score[token] = max over probes p of  q_p . k_token * scale * log2(e) - lse_p

``lse_p`` is the log-sum-exp over the probe's own causal tokens, the first and the last tokens of
the history and a sample of those between. The paper ranks by one mean query of a longer segment.
Products are of e4m3 numbers where the matrix unit takes them: keys are copied once a chunk, less
their mean, which no score sees.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .layout import COLUMNS as ITEM_COLUMNS
from .layout import DENSE_START, HISTORY, NUM_QUERIES, QUERY_START
from .packed_f16 import add, folded
from .plan import CHUNK, WorkList
from .strata import stratum_offset
from .tiles import image_dtype, input_precision, shared_memory
from .tuning import (
    LEAST_SCORE,
    LSE_FIRST,
    LSE_LAST,
    LSE_SAMPLES,
    MEAN_SAMPLES,
    MEAN_SPAN,
    PROBES,
    UNIT,
    pool_of,
)

LOG2E = 1.4426950408889634
LSE_ROWS = 128  # probes of a program of the log-sum-exp
COPY_SPAN = 512  # keys that a program copies
SCORE_ITEMS = 8  # segments of a block of scores: the columns that are left after folding
SCORE_COLUMNS = SCORE_ITEMS * PROBES
SCORE_WARPS = 8


class ScoreTile(NamedTuple):
    """One step of the score kernel.

    Attributes:
        block: keys.
        stages: loads of keys that are on their way, less one.
    """

    block: int
    stages: int


# By bytes of a key (of head_dim padded, in e4m3 or fp16), at most, and shared memory of a block, at
# least; the first that fits. Probes take SCORE_COLUMNS * bytes, keys (stages - 1) * block * bytes,
# on Hopper a stage more. `tests/kernels/test_compile.py` compiles all. Only the first one is tuned.
SCORE_TILES = (
    (128, 0, ScoreTile(128, 3)),
    (256, 166_912, ScoreTile(128, 3)),
    (256, 0, ScoreTile(64, 2)),
    (512, 166_912, ScoreTile(64, 3)),
    (512, 0, ScoreTile(32, 2)),
)


def score_tile(key_bytes: int, shared: int) -> ScoreTile:
    """Return the tile for keys of so many bytes on a device of so much shared memory a block."""
    return next(tile for most, least, tile in SCORE_TILES if key_bytes <= most and shared >= least)


@triton.jit
def _pool_kernel(
    p_q, p_items, p_probes, unit, stride_q_token, stride_q_head,
    D: tl.constexpr, D_PAD: tl.constexpr, PROBES: tl.constexpr, POOL: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """probe[p] = unit * mean of queries p * POOL .. p * POOL + POOL - 1 of one segment and head.

    A segment with fewer queries repeats its last probe, which no maximum sees.
    """
    i_head, i_item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_item = p_items + i_item * ITEM_COLUMNS
    count = tl.load(p_item + NUM_QUERIES)
    p_q += tl.load(p_item + QUERY_START).to(tl.int64) * stride_q_token + i_head * stride_q_head
    o_p, o_d = tl.arange(0, PROBES), tl.arange(0, D_PAD)
    first = tl.minimum(o_p, (count - 1) // POOL) * POOL
    total = tl.zeros([PROBES, D_PAD], tl.float32)
    for i in range(POOL):
        o_q = first + i
        m_q = (o_q < count)[:, None] & (o_d < D)[None, :]
        q = tl.load(p_q + o_q[:, None] * stride_q_token + o_d[None, :], m_q, 0.0)
        total += q.to(tl.float32)
    mean = total * (unit / tl.minimum(count - first, POOL).to(tl.float32))[:, None]
    mean = tl.minimum(tl.maximum(mean, -LIMIT), LIMIT)
    o_probe = (i_item * tl.num_programs(0) + i_head) * PROBES + o_p
    p_probes += o_probe[:, None] * D_PAD + o_d[None, :]
    tl.store(p_probes, mean.to(p_probes.dtype.element_ty))


@triton.jit
def _load_keys(
    p_k, p_table, position, m_n, o_d, stride_block, stride_token, PAGE: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Keys of tokens of one head from the paged cache, zero outside."""
    page = tl.load(p_table + position // PAGE, m_n, 0).to(tl.int64)
    o_k = page * stride_block + (position % PAGE) * stride_token
    m_k = m_n[:, None] & (o_d < D)[None, :]
    return tl.load(p_k + o_k[:, None] + o_d[None, :], m_k, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["row", "seen"])
def _mean_key_kernel(
    p_kv, p_table, p_mean, row, seen, stride_block, stride_head, stride_token, stride_table,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, SAMPLES: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Mean of SAMPLES evenly spaced keys among the first SPAN, the same for all chunks."""
    i_head = tl.program_id(0).to(tl.int64)
    o_n, o_d = tl.arange(0, SAMPLES), tl.arange(0, D_PAD)
    step = tl.maximum(tl.minimum(seen, SPAN) // SAMPLES, 1)
    position = o_n * step
    k = _load_keys(
        p_kv + i_head * stride_head, p_table + row.to(tl.int64) * stride_table, position,
        position < seen, o_d, stride_block, stride_token, PAGE, D,
    )  # fmt: skip
    count = tl.minimum(tl.cdiv(seen, step), SAMPLES).to(tl.float32)
    tl.store(p_mean + i_head * D_PAD + o_d, tl.sum(k, 0) / count)


@triton.jit(do_not_specialize=["row", "seen"])
def _copy_keys_kernel(
    p_kv, p_table, p_mean, p_keys, row, seen,
    stride_block, stride_head, stride_token, stride_table, stride_keys_head,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """keys[head, token] = k - mean key, from the pages of one request, in order."""
    i_head = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D_PAD)
    mean = tl.load(p_mean + i_head * D_PAD + o_d)
    p_kv += i_head * stride_head
    p_table += row.to(tl.int64) * stride_table
    p_keys += i_head * stride_keys_head
    first = tl.program_id(0) * SPAN
    for start in range(first, tl.minimum(first + SPAN, seen), BLOCK):
        position = start + tl.arange(0, BLOCK)
        m_n = position < seen
        k = _load_keys(p_kv, p_table, position, m_n, o_d, stride_block, stride_token, PAGE, D)
        k = tl.minimum(tl.maximum(k - mean[None, :], -LIMIT), LIMIT)
        p_key = p_keys + position.to(tl.int64)[:, None] * D_PAD + o_d[None, :]
        tl.store(p_key, k.to(p_keys.dtype.element_ty), m_n[:, None])


@triton.jit
def _add_exponentials(s, m, mass):
    """Fold scores [M, N], base 2, -inf where nothing is seen, into a running log-sum-exp."""
    m_new = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    mass = mass * tl.exp2(m - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
    return m_new, mass


@triton.jit
def _add_tokens(
    q, p_keys, position, m_n, m, mass, o_d, D_PAD: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the scores of some tokens, of those that ``m_n`` [1 or rows, N] admits."""
    k = tl.load(p_keys + position.to(tl.int64)[:, None] * D_PAD + o_d[None, :])
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (1.0 / UNIT)
    return _add_exponentials(tl.where(m_n, s, float("-inf")), m, mass)


@triton.jit
def _lse_kernel(
    p_probes, p_keys, p_items, p_lse, stride_keys_head,
    GROUP: tl.constexpr, HEADS: tl.constexpr, PROBES: tl.constexpr, POOL: tl.constexpr,
    D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    SAMPLES: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse[p] = log2( exact sum of 2^s + largest sampled 2^s + weight * sum of other sampled 2^s ).

    The weight is how many tokens a sampled one stands for.
    Exact are the first FIRST and the last LAST tokens of the history and the own tokens, those of
    the dense pass up to the probe's last query. HEADS heads of a group at a time. One stage: Triton
    3.6 sets no fence between asynchronous copies and wgmma.
    """
    i_kv_head, i_item = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_item = p_items + i_item * ITEM_COLUMNS
    n = tl.load(p_item + DENSE_START)
    if n == 0:
        return
    history = tl.load(p_item + HISTORY)
    count = tl.load(p_item + NUM_QUERIES)
    end = history + count
    heads = tl.num_programs(1) * GROUP
    o_row, o_d, o_n = tl.arange(0, HEADS * PROBES), tl.arange(0, D_PAD), tl.arange(0, BLOCK_N)
    head = tl.program_id(0) * HEADS + o_row // PROBES
    i_head = i_kv_head * GROUP + tl.minimum(head, GROUP - 1)
    o_probe = (i_item * heads + i_head) * PROBES + o_row % PROBES
    q = tl.load(p_probes + o_probe[:, None] * D_PAD + o_d[None, :])
    pool = tl.minimum(o_row % PROBES, (count - 1) // POOL)
    sees = history + tl.minimum((pool + 1) * POOL, count)
    p_keys += i_kv_head.to(tl.int64) * stride_keys_head
    m = tl.full([HEADS * PROBES], float("-inf"), tl.float32)
    mass = tl.zeros([HEADS * PROBES], tl.float32)
    first = tl.minimum(n, FIRST)
    last = tl.maximum(first, n - LAST)
    for start in tl.range(0, first, BLOCK_N, num_stages=1):
        position = tl.minimum(start + o_n, n - 1)
        m_n = (start + o_n < first)[None, :]
        m, mass = _add_tokens(q, p_keys, position, m_n, m, mass, o_d, D_PAD, UNIT, PRECISION)
    for start in tl.range(last, end, BLOCK_N, num_stages=1):
        position = tl.minimum(start + o_n, end - 1)
        m_n = (start + o_n)[None, :] < sees[:, None]
        m, mass = _add_tokens(q, p_keys, position, m_n, m, mass, o_d, D_PAD, UNIT, PRECISION)
    exact = m + tl.log2(mass)
    m = tl.full([HEADS * PROBES], float("-inf"), tl.float32)
    mass = tl.zeros([HEADS * PROBES], tl.float32)
    step = tl.maximum(tl.cdiv(last - first, SAMPLES), 1)
    samples = (last - first) // step
    for start in tl.range(0, samples, BLOCK_N, num_stages=1):
        number = start + o_n
        position = tl.minimum(first + number * step + stratum_offset(number, step), n - 1)
        m_n = (start + o_n < samples)[None, :]
        m, mass = _add_tokens(q, p_keys, position, m_n, m, mass, o_d, D_PAD, UNIT, PRECISION)
    # The largest one counts once: weighed like the others, a key that a probe alone wants would
    # hide behind its own weight.
    weight = (last - first).to(tl.float32) / tl.maximum(samples, 1).to(tl.float32)
    mass = 1.0 + tl.maximum(mass - 1.0, 0.0) * weight
    sampled = tl.where(m > float("-inf"), m + tl.log2(mass), float("-inf"))
    above = tl.maximum(exact, sampled)
    lse = above + tl.log2(tl.exp2(exact - above) + tl.exp2(sampled - above))
    tl.store(p_lse + o_probe, lse, head < GROUP)


@triton.jit
def _load_probes(
    p_probes, p_lse, first_item, last_item, heads, i_head, o_d,
    ITEMS: tl.constexpr, PROBES: tl.constexpr, D_PAD: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Probes [D_PAD, PROBES * ITEMS] of ITEMS segments, segment by segment, and their -lse."""
    column = tl.arange(0, PROBES * ITEMS)
    item = tl.minimum(first_item + column % ITEMS, last_item).to(tl.int64)
    o_probe = (item * heads + i_head) * PROBES + column // ITEMS
    q = tl.trans(tl.load(p_probes + o_probe[:, None] * D_PAD + o_d[None, :]))
    shift = tl.load(p_lse + o_probe) * -UNIT
    return q, tl.maximum(shift, -60000.0).to(tl.float16)[None, :]


@triton.jit(do_not_specialize=["items"])
def _score_kernel(
    p_probes, p_lse, p_keys, p_items, p_scores, p_bounds,
    stride_keys_head, stride_scores_item, stride_scores_head, max_chunks, items,
    GROUP: tl.constexpr, ITEMS: tl.constexpr, PROBES: tl.constexpr, D_PAD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, FOLDS: tl.constexpr, PACKED: tl.constexpr,
    UNIT: tl.constexpr, LEAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """score[item, head, token] = max over probes of (probe . key - lse), and bounds of a chunk.

    Keys are rows, so that a maximum stays inside a thread. Columns go segment by segment: folded to
    eight they are the segments themselves. ITEMS neighbours share each load of keys.
    """
    # Heads of a group run side by side: they read the same keys.
    i_chunk, i_head = tl.program_id(0) // GROUP, tl.program_id(0) % GROUP
    i_kv_head = tl.program_id(1)
    i_head += i_kv_head * GROUP
    heads = tl.num_programs(1) * GROUP
    first_item = tl.program_id(2) * ITEMS
    last_item = tl.minimum(first_item + ITEMS, items) - 1
    start = i_chunk * CHUNK
    # Items are sorted by history: the first one sees the most.
    longest = tl.load(p_items + first_item * ITEM_COLUMNS + DENSE_START)
    if start >= longest:
        return
    o_d, o_n, o_i = tl.arange(0, D_PAD), tl.arange(0, BLOCK_N), tl.arange(0, ITEMS)
    item = tl.minimum(first_item + o_i, last_item).to(tl.int64)
    n = tl.load(p_items + item * ITEM_COLUMNS + DENSE_START)
    q, shift = _load_probes(
        p_probes, p_lse, first_item, last_item, heads, i_head, o_d, ITEMS, PROBES, D_PAD, UNIT
    )
    p_keys += i_kv_head.to(tl.int64) * stride_keys_head
    p_scores += i_head * stride_scores_head + item * stride_scores_item
    best = tl.full([BLOCK_N, ITEMS], float("-inf"), tl.float16)
    worst = tl.full([BLOCK_N, ITEMS], float("inf"), tl.float16)
    for first in tl.range(start, tl.minimum(start + CHUNK, longest), BLOCK_N, num_stages=STAGES):
        token = first + o_n
        k = tl.load(p_keys + token.to(tl.int64)[:, None] * D_PAD + o_d[None, :])
        s = add(tl.dot(k, q, out_dtype=tl.float16), shift, PACKED)
        most = folded(s, FOLDS, PACKED)
        score = tl.maximum(most.to(tl.float32) * (1.0 / UNIT), LEAST).to(tl.float16)
        m_score = token[:, None] < n[None, :]
        tl.store(p_scores[None, :] + token[:, None], score, m_score)
        best = tl.maximum(best, tl.where(m_score, score, float("-inf")))
        worst = tl.minimum(worst, tl.where(m_score, score, float("inf")))
    p_bounds += 2 * ((item * heads + i_head) * max_chunks + i_chunk)
    m_item = (first_item + o_i < items) & (start < n)
    tl.store(p_bounds, tl.max(best, 0).to(tl.float32), m_item)
    tl.store(p_bounds + 1, tl.min(worst, 0).to(tl.float32), m_item)


class ProbeWorkspace:
    """Scratch of :func:`probe_scores`.

    Attributes:
        tile: of the score kernel, for the device.
        pool: neighbouring queries of a probe.
        keys: ``[kv_heads, >= max_history, head_dim padded]``, copies less their mean.
        mean: float32 ``[kv_heads, head_dim padded]``, the mean key.
        probes: ``[items, heads, PROBES, head_dim padded]``, in ``UNIT``.
        lse: float32 ``[items, heads, PROBES]``, base 2.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_history: int,
        items: int,
        segment: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
        chunk: int = CHUNK,
        tile: ScoreTile | None = None,
    ):
        kind = dtype or image_dtype(device)
        pad = triton.next_power_of_2(head_dim)
        self.tile = tile or score_tile(pad * kind.itemsize, shared_memory(device))
        self.pool = pool_of(segment)

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        # Blocks of keys are read whole, up to one beyond the last chunk's queries.
        room = -(-max_history // chunk) * chunk
        self.keys = empty(kv_heads, room, pad, dtype=kind)
        self.mean = empty(kv_heads, pad)
        self.probes = empty(items, heads, PROBES, pad, dtype=kind)
        self.lse = empty(items, heads, PROBES)


def copy_keys(
    kv_cache: torch.Tensor, block_table: torch.Tensor, work: WorkList, space: ProbeWorkspace
) -> None:
    """Copy the keys that a work list's chunk sees, less their mean."""
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], kv_cache.shape[3] // 2
    seen = work.max_fit_tokens
    strides = (*kv_cache.stride()[:3], block_table.stride(0))
    shape = {"D": head_dim, "D_PAD": space.keys.shape[2], "PAGE": page}
    _mean_key_kernel[(kv_heads,)](
        kv_cache, block_table, space.mean, work.row, seen, *strides,
        SAMPLES=MEAN_SAMPLES, SPAN=MEAN_SPAN, num_warps=8, **shape,
    )  # fmt: skip
    _copy_keys_kernel[(-(-seen // COPY_SPAN), kv_heads)](
        kv_cache, block_table, space.mean, space.keys, work.row, seen, *strides,
        space.keys.stride(0), BLOCK=64, SPAN=COPY_SPAN, LIMIT=limit_of(space.keys.dtype), **shape,
    )  # fmt: skip


def limit_of(dtype: torch.dtype) -> float:
    """Return the largest number of a dtype: what is beyond saturates."""
    return float(torch.finfo(dtype).max)


def probe_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    scores: torch.Tensor,
    bounds: torch.Tensor,
    space: ProbeWorkspace,
    *,
    scale: float,
    chunk: int = CHUNK,
) -> None:
    """Score every item's history, one score per query head and token.

    The first list of a chunk copies keys for the other ones: they must follow in order.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, ``query``'s dtype or fp8.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        scores: float16 ``[items, heads, max_history]``; written up to each item's
            ``dense_start``: log2-probabilities, ``LEAST_SCORE`` at least.
        bounds: float32 ``[items * heads, chunks, 2]``: best and worst score of each chunk.
        space: scratch.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        chunk: history tokens of a program.
    """
    if work.max_fit_tokens == 0:
        return
    if work.first_of_chunk:
        copy_keys(kv_cache, block_table, work, space)
    if work.max_history == 0:
        return
    heads, kv_heads, head_dim = query.shape[1], kv_cache.shape[1], query.shape[2]
    group, pad, kind = heads // kv_heads, space.keys.shape[2], space.keys.dtype
    _pool_kernel[(heads, work.num_items)](
        query, work.items, space.probes, scale * LOG2E * UNIT, query.stride(0), query.stride(1),
        D=head_dim, D_PAD=pad, PROBES=PROBES, POOL=space.pool, LIMIT=limit_of(kind),
    )  # fmt: skip
    together = min(triton.next_power_of_2(group), LSE_ROWS // PROBES)
    _lse_kernel[(-(-group // together), kv_heads, work.num_items)](
        space.probes, space.keys, work.items, space.lse, space.keys.stride(0),
        GROUP=group, HEADS=together, PROBES=PROBES, POOL=space.pool, D_PAD=pad, BLOCK_N=64,
        FIRST=LSE_FIRST, LAST=LSE_LAST, SAMPLES=LSE_SAMPLES, UNIT=UNIT,
        PRECISION=input_precision(kind), num_warps=4,
    )  # fmt: skip
    chunks = -(-work.max_history // chunk)
    _score_kernel[(chunks * group, kv_heads, -(-work.num_items // SCORE_ITEMS))](
        space.probes, space.lse, space.keys, work.items, scores, bounds,
        space.keys.stride(0), scores.stride(0), scores.stride(1), bounds.shape[1], work.num_items,
        GROUP=group, ITEMS=SCORE_ITEMS, PROBES=PROBES, D_PAD=pad,
        CHUNK=chunk, BLOCK_N=min(space.tile.block, chunk), FOLDS=SCORE_COLUMNS.bit_length() - 5,
        PACKED=scores.device.type != "cpu", UNIT=UNIT, LEAST=LEAST_SCORE, STAGES=space.tile.stages,
        num_warps=SCORE_WARPS,
    )  # fmt: skip
