"""Summaries of a history: region means of keys and values, and two covariances.

The attend kernel adds each region's mean key and value as a token that weighs as much as the
region's skipped tokens (FlashPrefill's mean term, of fixed regions instead of blocks: ours).

A softmax does not weigh a region's values alike: values whose keys are like the query count for
more. To first order in the query the mean value moves by Cov(value, key) query, as it does exactly
where keys and values are jointly normal. Likewise a region has more mass than its mean key says, by
the variance of its scores, query' Cov(key, key) query. One covariance of each serves all
regions of a history (both ours).
"""

import torch
import triton
import triton.language as tl

from ..columns import SPAN_COLUMNS, SPAN_QUERIES, SPAN_TOKENS
from ..tiles import input_precision
from ..tuning import (
    CHUNK_SPANS,
    COVARIANCE_GROUP,
    COVARIANCE_PARTS,
    COVARIANCE_SAMPLES,
    COVARIANCE_WEIGHT,
    REGION_PIECE,
    REGION_TOKENS,
)
from ..work_list import WorkList
from .summary_table import Summaries, covariance_part, region_samples

STRIP_ENTRIES = 16384  # of a covariance that a program sums
ROWS = 4  # of a covariance that a program averages
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=["row", "history", "samples"])
def _region_kernel(
    p_kv, p_table, p_means, row, history, samples,
    stride_block, stride_head, stride_token, stride_table, stride_means,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, PAGE: tl.constexpr,
    REGION: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Mean = sum of (k, v) / samples over a region's sample, of one KV head."""
    i_region, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if (i_region + 1) * REGION > history:
        return
    p_table += row.to(tl.int64) * stride_table
    o_w = tl.arange(0, WIDTH_PAD)
    m_w = o_w < WIDTH
    total = tl.zeros([WIDTH_PAD], tl.float32)
    for first in range(0, samples, PIECE):
        number = first + tl.arange(0, PIECE)
        position = i_region * REGION + (2 * number + 1) * REGION // (2 * samples)
        page = tl.load(p_table + position // PAGE).to(tl.int64)
        o_kv = page * stride_block + (position % PAGE) * stride_token + i_head * stride_head
        tokens = tl.load(p_kv + o_kv[:, None] + o_w[None, :], m_w[None, :], 0.0)
        total += tl.sum(tokens.to(tl.float32), 0)
    mean = total / samples
    p_means += i_head * stride_means + i_region * WIDTH
    tl.store(p_means + o_w, mean.to(p_means.dtype.element_ty), m_w)


@triton.jit(do_not_specialize=["row", "history", "part"])
def _covariance_kernel(
    p_kv, p_table, p_sums, row, history, part,
    stride_block, stride_head, stride_token, stride_table,
    D: tl.constexpr, D_PAD: tl.constexpr, STRIP: tl.constexpr, PAGE: tl.constexpr,
    SAMPLES: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of (k - mean k)(x - mean x)' over a part's groups; x is a strip of keys or of values."""
    i_part, i_head = tl.program_id(0), tl.program_id(1)
    i_half, i_strip = tl.program_id(2) // (D_PAD // STRIP), tl.program_id(2) % (D_PAD // STRIP)
    if (i_part + 1) * part > history:
        return
    p_table += row.to(tl.int64) * stride_table
    p_kv += i_head.to(tl.int64) * stride_head
    o_d = tl.arange(0, D_PAD)
    o_x = i_strip * STRIP + tl.arange(0, STRIP)
    step = part // SAMPLES
    total = tl.zeros([D_PAD, STRIP], tl.float32)
    for group in range(0, SAMPLES, GROUP):
        number = group + tl.arange(0, GROUP)
        position = i_part * part + number * step + step // 2
        page = tl.load(p_table + position // PAGE).to(tl.int64)
        p_row = p_kv + page * stride_block + (position % PAGE) * stride_token
        k = tl.load(p_row[:, None] + o_d[None, :], (o_d < D)[None, :], 0.0).to(tl.float32)
        p_x = p_row[:, None] + i_half * D + o_x[None, :]
        x = tl.load(p_x, (o_x < D)[None, :], 0.0).to(tl.float32)
        k -= (tl.sum(k, 0) / GROUP)[None, :]
        x -= (tl.sum(x, 0) / GROUP)[None, :]
        total = tl.dot(tl.trans(k.to(DTYPE)), x.to(DTYPE), total, input_precision=PRECISION)
    p_sums += ((2 * i_part + i_half) * tl.num_programs(1) + i_head).to(tl.int64) * D_PAD * D_PAD
    tl.store(p_sums + o_d[:, None] * D_PAD + o_x[None, :], total)


@triton.jit
def _span_start(p_span, span_length):
    """Return the multiple of the span length that a span begins at; 0 if it ranks nothing."""
    first = tl.load(p_span + SPAN_TOKENS) - tl.load(p_span + SPAN_QUERIES)
    return tl.maximum(first, 0) // span_length * span_length


@triton.jit(do_not_specialize=["part", "spans", "span_length", "samples"])
def _span_covariance_kernel(
    p_sums, p_spans, p_value_cov, p_key_cov, part, spans, span_length, samples, value_weight,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """cov[span] = weight / n * sum of the n parts before the span; ROWS rows of it."""
    i_strip, i_head, i_half = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    o_entry = i_strip * ROWS * D_PAD + tl.arange(0, ROWS * D_PAD)
    o_part = tl.arange(0, PARTS)
    o_row, o_d = o_entry // D_PAD, o_entry % D_PAD
    # Parts are read at once: one after the other, each read would wait for the one before.
    start = _span_start(p_spans + SPAN_COLUMNS * (spans - 1), span_length)
    o_sum = ((2 * o_part + i_half) * kv_heads + i_head)[:, None] * (D_PAD * D_PAD)
    o_sum += o_entry[None, :]
    weight = tl.where(i_half == 0, 1.0, value_weight) / samples
    p_cov = p_key_cov if i_half == 0 else p_value_cov
    sums = tl.load(p_sums + o_sum, (o_part < start // part)[:, None], 0.0)
    for i_span in range(spans):
        count = _span_start(p_spans + SPAN_COLUMNS * i_span, span_length) // part
        total = tl.sum(tl.where((o_part < count)[:, None], sums, 0.0), 0)
        one = total * (weight / tl.maximum(count, 1))
        one = tl.minimum(tl.maximum(one, -LIMIT), LIMIT)  # variances may exceed fp16
        out = p_cov + (i_span * kv_heads + i_head) * (D * D) + o_row * D + o_d
        tl.store(out, one.to(p_value_cov.dtype.element_ty), (o_row < D) & (o_d < D))


def workspace(
    kv_heads: int,
    head_dim: int,
    max_history: int,
    dtype: torch.dtype,
    device: torch.device,
    region: int = REGION_TOKENS,
) -> Summaries:
    """Return room for the summaries of a history; nothing in it is set."""
    pad = triton.next_power_of_2(head_dim)
    means = (kv_heads, max(1, max_history // region), 2 * head_dim)
    covariances = (CHUNK_SPANS, kv_heads, head_dim, head_dim)
    return Summaries(
        torch.empty(means, dtype=dtype, device=device),
        torch.empty(covariances, dtype=dtype, device=device),
        torch.empty(covariances, dtype=dtype, device=device),
        region,
        torch.empty((COVARIANCE_PARTS, 2, kv_heads, pad, pad), device=device),
    )


def summarise(
    kv_cache: torch.Tensor, block_table: torch.Tensor, work: WorkList, summaries: Summaries
) -> None:
    """Average the regions that a work list's chunk sees, and sum its covariances, from samples.

    All are in units of the cache: an fp8 cache's scales apply to them as to its tokens. A
    covariance holds no token behind its span's first query: it reveals nothing of later tokens, and
    is the same however a prompt is cut.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        summaries: written to.
    """
    count = max(
        1, work.max_seen // summaries.region_tokens
    )  # a warm-up compiles it without a region
    kv_heads, page, width = kv_cache.shape[1:]
    strides = (kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0))
    _region_kernel[(count, kv_heads)](
        kv_cache, block_table, summaries.means, work.row, work.max_seen,
        region_samples(work.whole_chunk, summaries.region_tokens), *strides,
        summaries.means.stride(0), WIDTH=width, WIDTH_PAD=triton.next_power_of_2(width), PAGE=page,
        REGION=summaries.region_tokens, PIECE=min(REGION_PIECE, summaries.region_tokens),
        num_warps=8,
    )  # fmt: skip
    head_dim = width // 2
    pad = triton.next_power_of_2(head_dim)
    strip = min(pad, STRIP_ENTRIES // pad)
    samples = min(COVARIANCE_SAMPLES, summaries.region_tokens)
    part = covariance_part(work.whole_chunk, summaries.region_tokens)
    dtype = summaries.value_covariances.dtype
    _covariance_kernel[(max(1, work.max_seen // part), kv_heads, 2 * (pad // strip))](
        kv_cache, block_table, summaries.sums, work.row, work.max_seen, part, *strides,
        D=head_dim, D_PAD=pad, STRIP=strip, PAGE=page, SAMPLES=samples,
        GROUP=min(COVARIANCE_GROUP, samples), DTYPE=TRITON_DTYPES[dtype],
        PRECISION=input_precision(dtype), num_warps=8,
    )  # fmt: skip
    _span_covariance_kernel[(pad // ROWS, kv_heads, 2)](
        summaries.sums, work.span_table, summaries.value_covariances, summaries.key_covariances,
        part, work.span_table.shape[0], work.span_length, samples, COVARIANCE_WEIGHT,
        D=head_dim, D_PAD=pad, ROWS=ROWS, PARTS=COVARIANCE_PARTS, LIMIT=torch.finfo(dtype).max,
    )  # fmt: skip
