"""Summaries of a history: means of clusters and regions, and two covariances (ours).

The attend kernel adds each summary's mean key and value as a token that weighs as much as those of
its tokens that are not listed (FlashPrefill's mean term, of clusters instead of blocks). Clusters
are of like tokens, see :mod:`clusters`: where a text repeats itself, a region of neighbours has
tokens of many kinds, and its mean key is like none of them.

A softmax does not weigh a cluster's values alike: values whose keys are like the query count for
more. To first order in the query the mean value moves by Cov(value, key) query, as it does exactly
where keys and values are jointly normal. Likewise a cluster has more mass than its mean key says,
by the variance of its scores, query' Cov(key, key) query. One covariance of each, of tokens about
the mean of their cluster, serves all summaries.
"""

import torch
import triton
import triton.language as tl

from ..strata import stratum_offset
from ..tiles import input_precision
from ..tuning import (
    CLUSTER_PARTS,
    CLUSTER_PASSES,
    CLUSTER_SAMPLES,
    CLUSTERS,
    COVARIANCE_PARTS,
    COVARIANCE_SAMPLES,
    COVARIANCE_WEIGHT,
    REGION_TOKENS,
)
from ..work_list import WorkList
from .clusters import initial_kernel, label_kernel, mean_kernel, sum_kernel, token_rows
from .summary_table import REGIONS, Scratch, Summaries, history_before_chunk
from .tile_ops import cast

STRIP_ENTRIES = 16384  # of a covariance that a program sums
COVARIANCE_TOKENS = 64  # that a program reads at a time
ROWS = 4  # of a covariance that a program averages
MEAN_ROWS = 16  # summaries that a program averages
LABEL_ENTRIES, LABEL_TOKENS = 32768, 128  # numbers and tokens that a program labels, at most
CENTRE_ENTRIES = 8192  # numbers of centres that it compares them with at a time
INITIAL_STRIP = 32  # columns that a program reads at a time, of all clusters
SUM_TOKENS = 64  # that a program adds at a time
SUM_STRIP = 64  # columns that it adds
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=["row", "samples", "step"])
def _covariance_kernel(
    p_kv, p_table, p_means, p_labels, p_sums, row, samples, step,
    stride_block, stride_head, stride_token, stride_table, stride_labels,
    SUMMARIES: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, STRIP: tl.constexpr,
    PAGE: tl.constexpr, SAMPLES: tl.constexpr, TOKENS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of (k - mean k)(x - mean x)' over a part's tokens; x is a strip of keys or of values."""
    i_part, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_half, i_strip = tl.program_id(2) // (D_PAD // STRIP), tl.program_id(2) % (D_PAD // STRIP)
    p_kv += i_head * stride_head
    p_table += row.to(tl.int64) * stride_table
    p_means += i_head * SUMMARIES * (2 * D)
    o_d = tl.arange(0, D_PAD)
    o_x = i_strip * STRIP + tl.arange(0, STRIP)
    total = tl.zeros([D_PAD, STRIP], tl.float32)
    for first in range(i_part * SAMPLES, tl.minimum((i_part + 1) * SAMPLES, samples), TOKENS):
        number = first + tl.arange(0, TOKENS)
        m_n = number < samples
        position = number * step + stratum_offset(number, step)
        label = tl.load(p_labels + i_head * stride_labels + position, m_n, 0).to(tl.int32)
        p_row = token_rows(p_kv, p_table, position, m_n, stride_block, stride_token, PAGE)
        p_mean = p_means + label * (2 * D)
        m_k = m_n[:, None] & (o_d < D)[None, :]
        m_x = m_n[:, None] & (o_x < D)[None, :]
        k = cast(tl.load(p_row[:, None] + o_d[None, :], m_k, 0.0), DTYPE).to(tl.float32)
        k -= tl.load(p_mean[:, None] + o_d[None, :], m_k, 0.0).to(tl.float32)
        x = tl.load(p_row[:, None] + (i_half * D + o_x)[None, :], m_x, 0.0)
        x = cast(x, DTYPE).to(tl.float32)
        x -= tl.load(p_mean[:, None] + (i_half * D + o_x)[None, :], m_x, 0.0).to(tl.float32)
        total = tl.dot(tl.trans(k.to(DTYPE)), x.to(DTYPE), total, input_precision=PRECISION)
    p_sums += ((2 * i_part + i_half) * tl.num_programs(1) + i_head) * D_PAD * D_PAD
    tl.store(p_sums + o_d[:, None] * D_PAD + o_x[None, :], total)


@triton.jit(do_not_specialize=["samples"])
def _mean_covariance_kernel(
    p_sums, p_value_cov, p_key_cov, samples, value_weight,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Cov = weight / samples * sum of all parts; ROWS rows of it."""
    i_strip, i_head, i_half = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    o_entry = i_strip * ROWS * D_PAD + tl.arange(0, ROWS * D_PAD)
    o_row, o_d = o_entry // D_PAD, o_entry % D_PAD
    # Parts are read at once: one after the other, each read would wait for the one before.
    o_sum = ((2 * tl.arange(0, PARTS) + i_half) * kv_heads + i_head)[:, None] * (D_PAD * D_PAD)
    total = tl.sum(tl.load(p_sums + o_sum + o_entry[None, :]), 0)
    total *= tl.where(i_half == 0, 1.0, value_weight) / tl.maximum(samples, 1)
    total = tl.minimum(tl.maximum(total, -LIMIT), LIMIT)  # variances may exceed fp16
    p_cov = p_key_cov if i_half == 0 else p_value_cov
    out = p_cov + i_head * (D * D) + o_row * D + o_d
    tl.store(out, total.to(p_value_cov.dtype.element_ty), (o_row < D) & (o_d < D))


def workspace(
    kv_heads: int,
    head_dim: int,
    max_history: int,
    dtype: torch.dtype,
    device: torch.device,
    clusters: int = CLUSTERS,
    region: int = REGION_TOKENS,
) -> Summaries:
    """Return room for the summaries of a history; nothing in it is set."""
    pad, rows = triton.next_power_of_2(head_dim), clusters + REGIONS
    rows_pad = max(16, triton.next_power_of_2(rows))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Summaries(
        empty(1, kv_heads, rows, 2 * head_dim),
        empty(1, kv_heads, rows, dtype=torch.int32),
        empty(1, kv_heads, max(1, max_history), dtype=torch.uint8),
        empty(1, dtype=torch.int32),
        empty(1, kv_heads, head_dim, head_dim),
        empty(1, kv_heads, head_dim, head_dim),
        clusters,
        region,
        Scratch(
            empty(CLUSTER_PARTS, kv_heads, rows_pad, 2 * head_dim, dtype=torch.float32),
            empty(CLUSTER_PARTS, kv_heads, rows_pad, dtype=torch.int32),
            empty(kv_heads, rows_pad, 2 * head_dim),
            empty(kv_heads, rows_pad, dtype=torch.float32),
            empty(kv_heads, dtype=torch.float32),
            empty(COVARIANCE_PARTS, 2, kv_heads, pad, pad, dtype=torch.float32),
        ),
    )


def summarise(
    kv_cache: torch.Tensor, block_table: torch.Tensor, work: WorkList, summaries: Summaries
) -> None:
    """Cluster the history before a work list's chunk, and average the chunk's regions.

    All are in units of the cache: an fp8 cache's scales apply to them as to its tokens. Clusters
    and covariances hold no token of the chunk; a prompt's first chunk has no clusters, and the
    covariances of its first region. Segments count no region but those that are whole in their
    history. So a summary reveals nothing of later tokens, and is the same however a prompt is cut.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        summaries: written to.
    """
    scratch = summaries.scratch
    assert scratch is not None, "of a workspace"
    kv_heads, page, width = kv_cache.shape[1:]
    head_dim, seen = width // 2, work.max_seen
    start = history_before_chunk(seen, work.span_length)
    rows, rows_pad = summaries.sizes.shape[2], scratch.half_norms.shape[1]
    pad, width_pad = triton.next_power_of_2(head_dim), triton.next_power_of_2(width)
    dtype = summaries.means.dtype
    clusters, region = summaries.clusters, summaries.region_tokens
    step = max(1, -(-start // CLUSTER_SAMPLES))
    samples = start // step
    strides = (kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0))
    cache = (kv_cache, block_table)
    labels = summaries.labels
    sizes = {"ROWS": rows, "ROWS_PAD": rows_pad, "WIDTH": width}
    precision, limit = input_precision(dtype), torch.finfo(dtype).max
    centres = (scratch.centres, scratch.half_norms, scratch.weights)
    initial_kernel[(kv_heads,)](
        *cache, summaries.means, summaries.sizes, summaries.starts, *centres, work.row, start,
        clusters, *strides, D=head_dim, STRIP=INITIAL_STRIP, PAGE=page, LIMIT=limit, **sizes,
        num_warps=8,
    )  # fmt: skip
    labelled = min(LABEL_TOKENS, max(16, LABEL_ENTRIES // width_pad))
    for number in range(CLUSTER_PASSES):
        last = number == CLUSTER_PASSES - 1
        tokens = seen if last else samples
        label_kernel[(max(1, -(-tokens // labelled)), kv_heads)](
            *cache, *centres[:2], labels, summaries.sizes, work.row, start, seen, samples, step,
            clusters, region, rows - clusters, *strides, labels.stride(1), SAMPLED=not last,
            TOKENS=labelled, BLOCK=min(rows_pad, max(16, CENTRE_ENTRIES // width_pad)),
            WIDTH_PAD=width_pad, PAGE=page, PRECISION=precision, **sizes, num_warps=4,
        )  # fmt: skip
        # A whole chunk, however much of it is there: sums are then of the same parts.
        total = samples + (region * (rows - clusters) if last else 0)
        sum_kernel[(CLUSTER_PARTS, triton.cdiv(width, SUM_STRIP), kv_heads)](
            *cache, labels, scratch.sums, scratch.numbers, work.row, start, seen, samples, step,
            total, -(-total // CLUSTER_PARTS), *strides, labels.stride(1),
            TOKENS=SUM_TOKENS, ROWS_PAD=rows_pad, WIDTH=width, STRIP=SUM_STRIP,
            PAGE=page, DTYPE=TRITON_DTYPES[dtype], PRECISION=precision, num_warps=8,
        )  # fmt: skip
        mean_kernel[(rows_pad // MEAN_ROWS, kv_heads)](
            scratch.sums, scratch.numbers, summaries.means, *centres, clusters,
            PARTS=CLUSTER_PARTS, BLOCK=MEAN_ROWS, D=head_dim, WIDTH_PAD=width_pad, LIMIT=limit,
            **sizes, num_warps=4,
        )  # fmt: skip
    # Without a history before the chunk: of the first region, which whoever sees any region sees.
    end = start or min(seen, region)
    step = max(1, -(-end // (COVARIANCE_PARTS * COVARIANCE_SAMPLES)))
    samples = end // step
    strip = min(pad, STRIP_ENTRIES // pad)
    _covariance_kernel[(COVARIANCE_PARTS, kv_heads, 2 * (pad // strip))](
        *cache, summaries.means, labels, scratch.covariances, work.row, samples, step,
        *strides, labels.stride(1), SUMMARIES=rows, D=head_dim, D_PAD=pad, STRIP=strip, PAGE=page,
        SAMPLES=COVARIANCE_SAMPLES, TOKENS=COVARIANCE_TOKENS, DTYPE=TRITON_DTYPES[dtype],
        PRECISION=precision, num_warps=8,
    )  # fmt: skip
    _mean_covariance_kernel[(pad // ROWS, kv_heads, 2)](
        scratch.covariances, summaries.value_covariances, summaries.key_covariances, samples,
        COVARIANCE_WEIGHT, D=head_dim, D_PAD=pad, ROWS=ROWS, PARTS=COVARIANCE_PARTS,
        LIMIT=torch.finfo(dtype).max,
    )  # fmt: skip
