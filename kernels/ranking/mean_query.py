"""Rank: score the history of every segment by the segment's mean query.

The paper's ranking as we read it: tokens of the whole history against a mean-pooled
representative of the segment's queries. One list a KV head is ours: the heads of its GQA
group are reduced to the largest log-probability.
"""

import torch
import triton
import triton.language as tl

from ..columns import DENSE_START, NUM_QUERIES, QUERY_START, ROW, SEGMENT_COLUMNS
from ..layout import LOG2E
from ..tiles import KEYS_ENTRIES, input_precision
from ..tuning import CHUNK, SEGMENTS_TOGETHER
from ..work_list import WorkList

BLOCK = 64  # keys of a product, at most


@triton.jit
def _mean_kernel(
    p_q, p_segments, p_means, stride_q_token, stride_q_head,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean = sum of q / n over a segment's queries of one head."""
    i_head, i_segment = tl.program_id(0), tl.program_id(1)
    p_segment = p_segments + i_segment * SEGMENT_COLUMNS
    start = tl.load(p_segment + QUERY_START).to(tl.int64)
    count = tl.load(p_segment + NUM_QUERIES)
    o_d = tl.arange(0, D_PAD)
    total = tl.zeros([D_PAD], tl.float32)
    for o in range(0, count, BLOCK):
        o_n = o + tl.arange(0, BLOCK)
        o_q = (start + o_n) * stride_q_token + i_head * stride_q_head
        q = tl.load(
            p_q + o_q[:, None] + o_d[None, :], (o_n < count)[:, None] & (o_d < D)[None, :], 0.0
        )
        total += tl.sum(q.to(tl.float32), 0)
    p_means += (i_segment * tl.num_programs(0) + i_head) * D
    tl.store(p_means + o_d, (total / count).to(p_means.dtype.element_ty), o_d < D)


@triton.jit
def _mean_score_kernel(
    p_means, p_kv, p_segments, p_groups, p_table, p_lse, p_scores, p_bounds,
    scale_log2, stride_block, stride_head, stride_token, stride_table,
    stride_scores_segment, stride_scores_head, max_chunks,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, SEGMENTS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, CHUNKS_PAD: tl.constexpr,
    WRITE_SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """score[key] = max over the group of (scale mean.k - lse), base 2; lse is over the history.

    One program: up to SEGMENTS mean queries x GROUP heads against a chunk of one request's keys.
    Run twice: first for every chunk's log-sum-exp by row (WRITE_SCORES off), then for the
    scores, which need it over the whole history.
    """
    i_chunk, i_head, i_group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(p_groups + 2 * i_group)
    count = tl.load(p_groups + 2 * i_group + 1)
    row = tl.load(p_segments + first * SEGMENT_COLUMNS + ROW).to(tl.int64)
    # Segments are sorted by history: the first one sees the most.
    longest = tl.load(p_segments + first * SEGMENT_COLUMNS + DENSE_START)
    start = i_chunk * CHUNK
    if start >= longest:
        return

    ROWS: tl.constexpr = SEGMENTS * GROUP_PAD
    o_row = tl.arange(0, ROWS)
    o_segment = first + o_row // GROUP_PAD
    o_group = o_row % GROUP_PAD
    m_row = (o_row // GROUP_PAD < count) & (o_group < GROUP)
    o_d = tl.arange(0, D_PAD)
    heads = tl.num_programs(1) * GROUP
    o_vector = o_segment * heads + i_head * GROUP + o_group
    q = tl.load(
        p_means + o_vector[:, None] * D + o_d[None, :], m_row[:, None] & (o_d < D)[None, :], 0.0
    )
    n = tl.load(p_segments + o_segment * SEGMENT_COLUMNS + DENSE_START, m_row, 0)
    p_k = p_kv + i_head.to(tl.int64) * stride_head
    o_lse = o_vector * max_chunks
    if WRITE_SCORES:
        o_c = tl.arange(0, CHUNKS_PAD)
        m_c = m_row[:, None] & (o_c[None, :] * CHUNK < n[:, None])
        parts = tl.load(p_lse + o_lse[:, None] + o_c[None, :], m_c, float("-inf"))
        largest = tl.max(parts, 1)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.sum(tl.exp2(parts - largest[:, None]), 1)
        lse = largest + tl.log2(tl.where(total > 0, total, 1.0))
        o_score_segment = first + tl.arange(0, SEGMENTS)
        m_score_segment = tl.arange(0, SEGMENTS) < count
        n_score = tl.load(
            p_segments + o_score_segment * SEGMENT_COLUMNS + DENSE_START, m_score_segment, 0
        )
        p_scores += i_head * stride_scores_head
        best = tl.full([SEGMENTS], float("-inf"), tl.float32)
        worst = tl.full([SEGMENTS], float("inf"), tl.float32)
    else:
        m = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)

    for o in range(start, tl.minimum(start + CHUNK, longest), BLOCK):
        o_n = o + tl.arange(0, BLOCK)
        m_n = o_n < longest
        page = tl.load(p_table + row * stride_table + o_n // PAGE, m_n, 0).to(tl.int64)
        o_k = page * stride_block + (o_n % PAGE) * stride_token
        k = tl.load(p_k + o_k[:, None] + o_d[None, :], m_n[:, None] & (o_d < D)[None, :], 0.0)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale_log2
        s = tl.where(m_row[:, None] & (o_n[None, :] < n[:, None]), s, float("-inf"))
        if WRITE_SCORES:
            s = tl.reshape(s - lse[:, None], [SEGMENTS, GROUP_PAD, BLOCK])
            s = tl.max(s, 1).to(tl.float16)
            m_score = m_score_segment[:, None] & (o_n[None, :] < n_score[:, None])
            o_score = o_score_segment.to(tl.int64)[:, None] * stride_scores_segment + o_n[None, :]
            tl.store(p_scores + o_score, s, m_score)
            s = s.to(tl.float32)  # bounds are those of what is stored
            best = tl.maximum(best, tl.max(tl.where(m_score, s, float("-inf")), 1))
            worst = tl.minimum(worst, tl.min(tl.where(m_score, s, float("inf")), 1))
        else:
            m_new = tl.maximum(m, tl.max(s, 1))
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)
            mass = mass * tl.exp2(m - finite) + tl.sum(tl.exp2(s - finite[:, None]), 1)
            m = m_new
    if WRITE_SCORES:
        o_list = o_score_segment.to(tl.int64) * tl.num_programs(1) + i_head
        o_bound = 2 * (o_list * max_chunks + i_chunk)
        m_bound = m_score_segment & (start < n_score)
        tl.store(p_bounds + o_bound, best, m_bound)
        tl.store(p_bounds + o_bound + 1, worst, m_bound)
    else:
        tl.store(p_lse + o_lse + i_chunk, m + tl.log2(tl.where(mass > 0, mass, 1.0)), m_row)


class MeanQueryWorkspace:
    """Scratch of :func:`mean_query_scores` for up to ``segments`` segments."""

    def __init__(
        self,
        segments: int,
        heads: int,
        head_dim: int,
        max_history: int,
        dtype: torch.dtype,
        device: torch.device,
        chunk: int = CHUNK,
    ):
        self.chunk = chunk
        self.chunks = max(1, -(-max_history // chunk))
        self.means = torch.empty(segments, heads, head_dim, dtype=dtype, device=device)
        self.lse = torch.empty(segments, heads, self.chunks, dtype=torch.float32, device=device)


def mean_query_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    scores: torch.Tensor,
    bounds: torch.Tensor,
    space: MeanQueryWorkspace,
    *,
    scale: float,
) -> None:
    """Score every segment's history, one score per KV head and token.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, ``query``'s dtype or fp8.
        block_table: int32 ``[rows, max_blocks]``.
        work: the segments.
        scores: float16 ``[segments, kv_heads, max_history]``; written up to each segment's
            ``dense_start``: the largest over the group of the log2-probability that the
            segment's mean query gives the token.
        bounds: float32 ``[segments * kv_heads, chunks, 2]``: best and worst score of each chunk.
        space: scratch.
        scale: softmax scale, times what one unit of the cache's keys stands for.
    """
    if work.max_history == 0:
        return
    heads, head_dim = query.shape[1], query.shape[2]
    kv_heads, page = kv_cache.shape[1], kv_cache.shape[2]
    group = heads // kv_heads
    d_pad = triton.next_power_of_2(head_dim)
    _mean_kernel[(heads, work.num_segments)](
        query, work.segments, space.means, query.stride(0), query.stride(1),
        D=head_dim, D_PAD=d_pad, BLOCK=32,
    )  # fmt: skip
    grid = (-(-work.max_history // space.chunk), kv_heads, work.groups.shape[0])
    for write_scores in (False, True):
        _mean_score_kernel[grid](
            space.means, kv_cache, work.segments, work.groups, block_table, space.lse, scores,
            bounds, scale * LOG2E, kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
            block_table.stride(0), scores.stride(0), scores.stride(1), space.chunks,
            GROUP=group, GROUP_PAD=triton.next_power_of_2(group), SEGMENTS=SEGMENTS_TOGETHER,
            D=head_dim, D_PAD=d_pad, PAGE=page, CHUNK=space.chunk,
            BLOCK=min(BLOCK, KEYS_ENTRIES // d_pad, space.chunk),
            CHUNKS_PAD=triton.next_power_of_2(space.chunks), WRITE_SCORES=write_scores,
            PRECISION=input_precision(query.dtype),
            num_warps=8, num_stages=2,
        )  # fmt: skip
