"""Clusters of like tokens: k-means over a request's history, by a sample of its tokens (ours).

Tokens before a chunk are clustered by their keys and values, wherever they are; those of the chunk
itself belong to regions of neighbours. Both count alike: a value's squared distance weighs as many
times as keys vary more than values. Centres begin as evenly spread tokens. A pass labels tokens by
the nearest centre and averages them by label; the last pass labels all tokens. Means are taken over
a sample, one token of each stratum, and over all tokens of the chunk.

Nothing depends on tokens behind the chunk's start but the regions, and each of these on its own
tokens alone: however a prompt is cut, its segments meet the same summaries.
"""

import triton
import triton.language as tl

from ..strata import stratum_offset
from . import summary_table
from .tile_ops import cast

NO_SUMMARY = tl.constexpr(summary_table.NO_SUMMARY)


@triton.jit
def sample_position(number, samples, step, start):
    """Return the position of a sampled token: one of each stratum, then all from ``start`` on."""
    return tl.where(
        number < samples, number * step + stratum_offset(number, step), start + number - samples
    )


@triton.jit
def token_rows(p_kv, p_table, position, mask, stride_block, stride_token, PAGE: tl.constexpr):
    """Return pointers to the keys of tokens."""
    page = tl.load(p_table + position // PAGE, mask, 0).to(tl.int64)
    return p_kv + page * stride_block + (position % PAGE) * stride_token


@triton.jit
def _centre(mean, weight, LIMIT: tl.constexpr):
    """Return what tokens are multiplied with: keys as they are, values times their weight."""
    return tl.minimum(tl.maximum(mean * weight, -LIMIT), LIMIT)


@triton.jit(do_not_specialize=["row", "start", "clusters"])
def initial_kernel(
    p_kv, p_table, p_means, p_sizes, p_starts, p_centres, p_half_norms, p_weights,
    row, start, clusters, stride_block, stride_head, stride_token, stride_table,
    ROWS: tl.constexpr, ROWS_PAD: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    STRIP: tl.constexpr, PAGE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Means = evenly spread tokens of a head's history, 0 for regions; sizes = 0.

    And the weight of values: the keys' variance over the values', 0 where values hardly vary.
    """
    i_head = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, ROWS_PAD)
    begin = (o_s.to(tl.int64) * start // clusters).to(tl.int32)
    position = begin + stratum_offset(o_s, tl.maximum(start // clusters, 1))
    m_s = o_s < tl.where(start > 0, clusters, 0)
    p_row = token_rows(
        p_kv + i_head * stride_head, p_table + row.to(tl.int64) * stride_table, position, m_s,
        stride_block, stride_token, PAGE,
    )  # fmt: skip
    of_keys = 0.0
    of_values = 0.0
    squares = 0.0
    for first in range(0, WIDTH, STRIP):
        o_w = first + tl.arange(0, STRIP)
        x = tl.load(p_row[:, None] + o_w[None, :], m_s[:, None], 0.0).to(tl.float32)
        centred = tl.where(m_s[:, None], x - (tl.sum(x, 0) / clusters)[None, :], 0.0)
        varies = tl.sum(centred * centred)
        of_keys += tl.where(first < D, varies, 0.0)
        of_values += tl.where(first < D, 0.0, varies)
        squares += tl.where(first < D, 0.0, tl.sum(x * x))
    weight = tl.where(of_values > 1e-4 * squares, of_keys / tl.maximum(of_values, 1e-30), 0.0)
    tl.store(p_weights + i_head, weight)
    half = tl.zeros([ROWS_PAD], tl.float32)
    for first in range(0, WIDTH, STRIP):
        o_w = first + tl.arange(0, STRIP)
        x = tl.load(p_row[:, None] + o_w[None, :], m_s[:, None], 0.0)
        x = cast(x, p_means.dtype.element_ty)
        p_mean = p_means + (i_head * ROWS + o_s)[:, None] * WIDTH + o_w[None, :]
        tl.store(p_mean, x, (o_s < ROWS)[:, None])
        own = tl.where(first < D, 1.0, weight)
        p_centre = p_centres + (i_head * ROWS_PAD + o_s)[:, None] * WIDTH + o_w[None, :]
        x = x.to(tl.float32)
        tl.store(p_centre, _centre(x, own, LIMIT).to(p_centres.dtype.element_ty))
        half += 0.5 * own * tl.sum(x * x, 1)
    half = tl.where(o_s < clusters, half, float("inf"))
    tl.store(p_half_norms + i_head * ROWS_PAD + o_s, half)
    tl.store(p_sizes + i_head * ROWS + o_s, tl.zeros_like(o_s), o_s < ROWS)
    if i_head == 0:
        tl.store(p_starts, start)


@triton.jit(do_not_specialize=["row", "start", "seen", "samples", "step", "clusters", "regions"])
def label_kernel(
    p_kv, p_table, p_centres, p_half_norms, p_labels, p_sizes, row, start, seen, samples, step,
    clusters, region, regions,
    stride_block, stride_head, stride_token, stride_table, stride_labels,
    SAMPLED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, ROWS_PAD: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, PAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """labels[n] = the s with the largest (k | v)[n] . centre[s] - half_norm[s]; or n's region.

    With SAMPLED only the sample is labelled; otherwise all tokens are, and counted.
    """
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = i_tile * TOKENS + tl.arange(0, TOKENS)
    if SAMPLED:
        position = sample_position(number, samples, step, start)
        m_n = number < samples
    else:
        position = number
        m_n = number < seen
    place = (position - start) // region
    label = tl.where(place < regions, clusters + place, NO_SUMMARY)
    if tl.min(position) < start:
        o_w = tl.arange(0, WIDTH_PAD)
        p_row = token_rows(
            p_kv + i_head * stride_head, p_table + row.to(tl.int64) * stride_table, position, m_n,
            stride_block, stride_token, PAGE,
        )  # fmt: skip
        x = tl.load(p_row[:, None] + o_w[None, :], m_n[:, None] & (o_w < WIDTH)[None, :], 0.0)
        x = cast(x, p_centres.dtype.element_ty)
        best = tl.full([TOKENS], float("-inf"), tl.float32)
        nearest = tl.zeros([TOKENS], tl.int32)
        # One stage: blocks of centres are few, and in the cache.
        for first in tl.range(0, clusters, BLOCK, num_stages=1):
            o_s = first + tl.arange(0, BLOCK)
            p_centre = p_centres + (i_head * ROWS_PAD + o_s)[:, None] * WIDTH + o_w[None, :]
            centre = tl.load(p_centre, (o_w < WIDTH)[None, :], 0.0)
            score = tl.dot(x, tl.trans(centre), input_precision=PRECISION)
            score -= tl.load(p_half_norms + i_head * ROWS_PAD + o_s)[None, :]
            most = tl.max(score, 1)
            # Of equal ones the first: a reduction of both at once takes twice as long.
            at = tl.min(tl.where(score == most[:, None], o_s[None, :], ROWS_PAD), 1)
            nearest = tl.where(most > best, at, nearest)
            best = tl.maximum(most, best)
        label = tl.where(position < start, nearest, label)
    tl.store(p_labels + i_head * stride_labels + position, label.to(tl.uint8), m_n)
    if not SAMPLED:
        o_s = tl.arange(0, ROWS_PAD)
        count = tl.histogram(label, ROWS_PAD, mask=m_n & (label < ROWS))
        tl.atomic_add(p_sizes + i_head * ROWS + o_s, count, (o_s < ROWS) & (count > 0))


@triton.jit(do_not_specialize=["row", "start", "seen", "samples", "step", "total", "share"])
def sum_kernel(
    p_kv, p_table, p_labels, p_sums, p_numbers, row, start, seen, samples, step, total, share,
    stride_block, stride_head, stride_token, stride_table, stride_labels,
    TOKENS: tl.constexpr, ROWS_PAD: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr,
    PAGE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[s] = sum of (k, v) over a part's sampled tokens of label s; STRIP columns of it."""
    i_part, i_strip, i_head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_s = tl.arange(0, ROWS_PAD)
    o_w = i_strip * STRIP + tl.arange(0, STRIP)
    p_kv += i_head * stride_head
    p_table += row.to(tl.int64) * stride_table
    sums = tl.zeros([ROWS_PAD, STRIP], tl.float32)
    numbers = tl.zeros([ROWS_PAD], tl.int32)
    begin = i_part * share
    # One stage: before 3.7.1 Triton sets no proxy fence in a pipeline.
    for first in tl.range(begin, tl.minimum(begin + share, total), TOKENS, num_stages=1):
        number = first + tl.arange(0, TOKENS)
        position = sample_position(number, samples, step, start)
        m_n = (number < tl.minimum(begin + share, total)) & (position < seen)
        label = tl.load(p_labels + i_head * stride_labels + position, m_n, NO_SUMMARY)
        label = label.to(tl.int32)
        p_row = token_rows(p_kv, p_table, position, m_n, stride_block, stride_token, PAGE)
        x = tl.load(p_row[:, None] + o_w[None, :], m_n[:, None] & (o_w < WIDTH)[None, :], 0.0)
        own = (o_s[:, None] == label[None, :]).to(DTYPE)
        sums = tl.dot(own, cast(x, DTYPE), sums, input_precision=PRECISION)
        if i_strip == 0:
            numbers += tl.histogram(label, ROWS_PAD, mask=m_n & (label < ROWS_PAD))
    i_sum = i_part * tl.num_programs(2) + i_head
    p_sum = p_sums + (i_sum * ROWS_PAD + o_s)[:, None] * WIDTH + o_w[None, :]
    tl.store(p_sum, sums, (o_w < WIDTH)[None, :])
    if i_strip == 0:
        tl.store(p_numbers + i_sum * ROWS_PAD + o_s, numbers)


@triton.jit(do_not_specialize=["clusters"])
def mean_kernel(
    p_sums, p_numbers, p_means, p_centres, p_half_norms, p_weights, clusters,
    PARTS: tl.constexpr, ROWS: tl.constexpr, ROWS_PAD: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Mean = sum / number over all parts; what has no token stays as it was."""
    i_block, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(1)
    o_s = i_block * BLOCK + tl.arange(0, BLOCK)
    o_w = tl.arange(0, WIDTH_PAD)
    m_w = (o_w < WIDTH)[None, :]
    p_sum = p_sums + (i_head * ROWS_PAD + o_s)[:, None] * WIDTH + o_w[None, :]
    total = tl.zeros([BLOCK, WIDTH_PAD], tl.float32)
    number = tl.zeros([BLOCK], tl.int32)
    for part in range(PARTS):
        total += tl.load(p_sum + part * kv_heads * ROWS_PAD * WIDTH, m_w, 0.0)
        number += tl.load(p_numbers + (part * kv_heads + i_head) * ROWS_PAD + o_s)
    p_mean = p_means + (i_head * ROWS + o_s)[:, None] * WIDTH + o_w[None, :]
    m_mean = (o_s < ROWS)[:, None] & m_w
    mean = (total / tl.maximum(number, 1)[:, None]).to(p_means.dtype.element_ty)
    mean = tl.where((number > 0)[:, None], mean, tl.load(p_mean, m_mean, 0.0))
    tl.store(p_mean, mean, m_mean)
    weight = tl.where(o_w < D, 1.0, tl.load(p_weights + i_head))[None, :]
    mean = mean.to(tl.float32)
    p_centre = p_centres + (i_head * ROWS_PAD + o_s)[:, None] * WIDTH + o_w[None, :]
    tl.store(p_centre, _centre(mean, weight, LIMIT).to(p_centres.dtype.element_ty), m_w)
    half = tl.where(o_s < clusters, 0.5 * tl.sum(mean * mean * weight, 1), float("inf"))
    tl.store(p_half_norms + i_head * ROWS_PAD + o_s, half)
