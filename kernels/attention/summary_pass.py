"""Steps of the attend kernel behind its lists: what stands for the rest, and what that weighs."""

import triton
import triton.language as tl

from ..columns import LN2
from ..strata import stratum_offset
from .tile_ops import as_numbers, load_rows, scores, slot_offset, soft_cap


@triton.jit
def region_lift(
    q, p_q, o_q, m_row, p_key_covariances, o_d, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
    SPREAD: tl.constexpr, MOST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """How many times a token of a region counts for each row, in base 2: q' spread q tells it.

    BLOCK columns of the product are held at a time: for each, memory is waited for.
    """
    variance = tl.zeros([q.shape[0]], tl.float32)
    # One stage, as to other caches below.
    for first in tl.range(0, D_PAD, BLOCK, num_stages=1):
        o_k = first + tl.arange(0, BLOCK)
        spread = load_rows(p_key_covariances, o_k * D, o_k < D, o_d, True, D, D_PAD)  # symmetric
        product = tl.dot(q, tl.trans(spread), input_precision=PRECISION)
        if BLOCK == D_PAD:
            variance += tl.sum(product * q.to(tl.float32), 1)
        else:  # queries are read again, for registers' sake
            part = load_rows(p_q, o_q, m_row, o_k, True, D, D_PAD)
            variance += tl.sum(product * part.to(tl.float32), 1)
    # scale is in base 2: the variance is that of natural logarithms once one LN2 is put in here.
    return tl.minimum(LEAST + SPREAD * LN2 * tl.maximum(variance, 0.0) * scale * scale, MOST)


@triton.jit
def add_slopes(
    acc, q, p_q, o_q, m_row, p_value_covariances, o_d,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to acc the product of queries and value_covariances, BLOCK rows of these at a time."""
    for first in tl.range(0, D_PAD, BLOCK, num_stages=1):
        o_k = first + tl.arange(0, BLOCK)
        value_covariances = load_rows(p_value_covariances, o_k * D, o_k < D, o_d, True, D, D_PAD)
        if BLOCK == D_PAD:
            acc = tl.dot(q, value_covariances, acc, input_precision=PRECISION)
        else:
            part = load_rows(p_q, o_q, m_row, o_k, True, D, D_PAD)
            acc = tl.dot(part, value_covariances, acc, input_precision=PRECISION)
    return acc


@triton.jit
def visit_rest(
    q, p_k, p_means, slot, tail, regions, lift, m, mass, acc, o_n, o_d, scale, softcap,
    stride_block, stride_token,
    PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the tail of a list, and to regions as to tokens of a row's ``lift`` higher scores.

    One loop for both: loops as short as these are all latency. Returns the mass of tokens, too.
    """
    SAME: tl.constexpr = p_k.dtype == p_means.dtype
    tokens = mass
    end = tail + regions
    # Other caches go through registers: one stage, as Triton 3.6 sets no fence in a pipeline.
    for first in tl.range(0, end, BLOCK_N, num_stages=None if SAME else 1):
        number = first + o_n
        m_n = number < end
        is_token = number < tail
        o_slot = slot_offset(slot, stride_block, stride_token, PAGE)
        o_mean = (number - tail).to(tl.int64) * (2 * D)
        if SAME:
            # Without the hint Triton 3.9 loads by elements.
            p_row = tl.multiple_of(tl.where(is_token, p_k + o_slot, p_means + o_mean), 16)
            m_kv = m_n[:, None] & (o_d < D)[None, :]
            k = tl.load(p_row[:, None] + o_d[None, :], m_kv, 0.0)
            v = tl.load(p_row[:, None] + (o_d + D)[None, :], m_kv, 0.0)
        else:
            m_mean = m_n & (number >= tail)
            k = as_numbers(load_rows(p_k, o_slot, is_token, o_d, True, D, D_PAD), q.dtype)
            k += load_rows(p_means, o_mean, m_mean, o_d, True, D, D_PAD)
            v = as_numbers(load_rows(p_k + D, o_slot, is_token, o_d, True, D, D_PAD), q.dtype)
            v += load_rows(p_means + D, o_mean, m_mean, o_d, True, D, D_PAD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if SOFTCAP:
            s = soft_cap(s, softcap)
        s = tl.where(m_n[None, :], tl.where(is_token[None, :], s, s + lift[:, None]), float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        mass = mass * alpha + tl.sum(p, 1)
        tokens = tokens * alpha + tl.sum(tl.where(is_token[None, :], p, 0.0), 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return m, mass, tokens, acc


@triton.jit
def dropped_mass(
    q, q_k, p_k, p_table, p_places, visited, n, m, mass, o_n, o_d, scale, softcap,
    stride_block, stride_token,
    PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    SAMPLES: tl.constexpr, SAMPLE_STEP: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Estimate each row's share of softmax mass on history tokens that were not visited.

    ``mass`` is that of the visited ones and the own segment, in units of exp2(``m``).
    """
    step = tl.maximum(tl.cdiv(n, SAMPLES), SAMPLE_STEP)
    samples = n // step
    lost = tl.zeros_like(mass)
    for first in range(0, samples, BLOCK_N):
        number = first + o_n
        m_n = number < samples
        # A list without tokens has no places.
        skipped = m_n & ((tl.load(p_places + number, m_n, 0) >= visited) | (visited == 0))
        position = number * step + stratum_offset(number, step - SAMPLE_STEP + 1)
        page = tl.load(p_table + position // PAGE, m_n, 0).to(tl.int64)
        o_k = page * stride_block + (position % PAGE) * stride_token
        k = load_rows(p_k, o_k, m_n, o_d, True, D, D_PAD)
        s = scores(q, q_k, k, PRECISION) * scale
        if SOFTCAP:
            s = soft_cap(s, softcap)
        lost += tl.sum(tl.where(skipped[None, :], tl.exp2(s - m[:, None]), 0.0), 1)
    # Means may leave no mass of tokens in fp32.
    share = 1.0 - mass / tl.maximum(mass + lost * n / tl.maximum(samples, 1), 1e-37)
    # NaN counts as none: the integer that it became would spoil the counter for good.
    return tl.maximum(share, 0.0)
