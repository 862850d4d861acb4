"""Epilogue of the attend kernel: attend to summaries of the tokens that were skipped (ours).

A summary of tokens with mean key k, mean value v, key covariance K and value-key covariance C
counts as one token of score q.k + log(tokens left out) + log_mass_correction and value v + s C'q,
where s scales q.k: to first order in the query a softmax moves the mean value so, and by the
variance of its scores q'Kq a cluster has more mass than its mean key says.
"""

import math

import triton
import triton.language as tl

from .. import tuning
from ..columns import LN2
from .tile_ops import cast, load_rows, slot_offset, soft_cap

LOG_LIMIT = tl.constexpr(math.log2(tuning.SUMMARY_WEIGHT_LIMIT))
VARIANCE = tl.constexpr(tuning.SUMMARY_VARIANCE)


@triton.jit
def log_mass_correction(
    q, p_q, o_q, m_row, p_key_covariances, o_d, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """min(c log2(e) s^2 q'Kq, log2(limit)) of each row, with the natural scale s.

    BLOCK columns of the product are held at a time: for each, memory is waited for.
    """
    variance = tl.zeros([q.shape[0]], tl.float32)
    # One stage, as for a quantised cache below.
    for first in tl.range(0, D_PAD, BLOCK, num_stages=1):
        o_k = first + tl.arange(0, BLOCK)
        k_cov = load_rows(p_key_covariances, o_k * D, o_k < D, o_d, True, D, D_PAD)  # symmetric
        product = tl.dot(q, tl.trans(k_cov), input_precision=PRECISION)
        if BLOCK == D_PAD:
            variance += tl.sum(product * q.to(tl.float32), 1)
        else:  # queries are read again, for registers' sake
            part = load_rows(p_q, o_q, m_row, o_k, True, D, D_PAD)
            variance += tl.sum(product * part.to(tl.float32), 1)
    # scale is in base 2: with one LN2 the variance is that of natural logarithms.
    exponent = VARIANCE * LN2 * tl.maximum(variance, 0.0) * scale * scale
    return tl.minimum(exponent, LOG_LIMIT)


@triton.jit
def add_regression(
    acc, q, p_q, o_q, m_row, p_value_covariances, o_d,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Acc + q C, BLOCK rows of the value-key covariance C at a time."""
    for first in tl.range(0, D_PAD, BLOCK, num_stages=1):
        o_k = first + tl.arange(0, BLOCK)
        v_cov = load_rows(p_value_covariances, o_k * D, o_k < D, o_d, True, D, D_PAD)
        if BLOCK == D_PAD:
            acc = tl.dot(q, v_cov, acc, input_precision=PRECISION)
        else:
            part = load_rows(p_q, o_q, m_row, o_k, True, D, D_PAD)
            acc = tl.dot(part, v_cov, acc, input_precision=PRECISION)
    return acc


@triton.jit
def summary_pass(
    q, p_k, p_means, p_left, slot, tail, rows, correction, m, mass, acc, o_n, o_d,
    scale, softcap, stride_block, stride_token,
    PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold a list's last tile into the softmax, then summaries: log2 of what is left is at p_left.

    One loop for both: loops as short as these are all latency. Also returns the mass of tokens.
    """
    SAME: tl.constexpr = p_k.dtype == p_means.dtype
    tokens = mass
    end = tail + rows
    # A quantised cache goes by registers: one stage, as Triton 3.6 sets no fence in a pipeline.
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
            k = cast(load_rows(p_k, o_slot, is_token, o_d, True, D, D_PAD), q.dtype)
            k += load_rows(p_means, o_mean, m_mean, o_d, True, D, D_PAD)
            v = cast(load_rows(p_k + D, o_slot, is_token, o_d, True, D, D_PAD), q.dtype)
            v += load_rows(p_means + D, o_mean, m_mean, o_d, True, D, D_PAD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if SOFTCAP:
            s = soft_cap(s, softcap)
        if p_left is not None:
            left = tl.load(p_left + number - tail, m_n & (number >= tail), 0.0)
            s = tl.where(is_token[None, :], s, s + correction[:, None] + left[None, :])
        s = tl.where(m_n[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        mass = mass * alpha + tl.sum(p, 1)
        tokens = tokens * alpha + tl.sum(tl.where(is_token[None, :], p, 0.0), 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return m, mass, tokens, acc
