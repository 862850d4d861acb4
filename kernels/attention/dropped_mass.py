"""Estimate the dropped mass from a sample of the history (ours)."""

import triton
import triton.language as tl

from ..strata import stratum_offset
from .tile_ops import load_rows, scores, soft_cap


@triton.jit
def dropped_mass(
    q, q_k, p_k, p_table, p_sample, visited, n, m, tokens, o_n, o_d, scale, softcap,
    stride_block, stride_token,
    PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    SAMPLES: tl.constexpr, SAMPLE_STEP: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lost / (lost + tokens), lost = n / samples * sum of exp2(s - m) over skipped samples; by row.

    An estimate of the share of softmax mass on history tokens that were not visited, for which
    summaries stand. ``tokens`` is the mass of those that were, in units of exp2(``m``).
    """
    step = tl.maximum(tl.cdiv(n, SAMPLES), SAMPLE_STEP)
    samples = n // step
    lost = tl.zeros_like(tokens)
    for first in range(0, samples, BLOCK_N):
        number = first + o_n
        m_n = number < samples
        # A list without tokens has no samples.
        skipped = m_n & ((tl.load(p_sample + number, m_n, 0) >= visited) | (visited == 0))
        position = number * step + stratum_offset(number, step - SAMPLE_STEP + 1)
        page = tl.load(p_table + position // PAGE, m_n, 0).to(tl.int64)
        o_k = page * stride_block + (position % PAGE) * stride_token
        k = load_rows(p_k, o_k, m_n, o_d, True, D, D_PAD)
        s = scores(q, q_k, k, PRECISION) * scale
        if SOFTCAP:
            s = soft_cap(s, softcap)
        lost += tl.sum(tl.where(skipped[None, :], tl.exp2(s - m[:, None]), 0.0), 1)
    lost *= n / tl.maximum(samples, 1)
    share = lost / (lost + tokens)
    # NaN is 0: as an integer it would spoil the counter for good.
    return tl.where(share > 0, share, 0.0)
