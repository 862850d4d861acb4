"""The row log-sum-exp of probes, estimated from projected keys (ours; see :mod:`basis`)."""

import torch
import triton
import triton.language as tl

from ..columns import DENSE_START, HISTORY, NUM_QUERIES, SEGMENT_COLUMNS, SLOT
from ..strata import stratum_offset
from ..work_list import WorkList
from . import basis
from .workspace import RankingWorkspace, kernel_constants

LSE_BLOCK = 64  # rows of a program, of one segment or of several
LSE_BLOCK_N = 64  # projected keys that it takes at a time
EXP2_UNIT = tl.constexpr(basis.EXP2_UNIT)
EXP2_ZERO = tl.constexpr(127.0 - basis.EXP2_OFFSET)
EXP2_SHARE = tl.constexpr(1 / basis.EXP2_LARGEST)
EXP2_STEP = tl.constexpr(basis.EXP2_LARGEST / 256)


@triton.jit
def _add_mass(s, m, mass):
    """Add base-2 scores [M, N] to the running maximum and mass of M rows."""
    m_new = tl.maximum(m, tl.max(s, 1))
    return m_new, mass * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), 1)


@triton.jit
def _minus_approximate_exp2(s, zero, FUSED: tl.constexpr):
    """Return -2^(s - most - EXP2_OFFSET) [M, N], approximately; see `basis.approximate_exp2`.

    Three instructions; negating the result would be a fourth. ``zero`` [M] is the share of s = 0.
    """
    if FUSED:  # the numbers are EXP2_SHARE, EXP2_STEP and 1
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 share;
            .reg .b32 bits;
            fma.rn.sat.f32 share, $1, 0f3B810204, $2;
            fma.rn.f32 share, share, 0f3F7E0000, 0f3F800000;
            mov.b32 bits, share;
            shl.b32 bits, bits, 8;
            mov.b32 $0, bits;
            }""",
            "=f,f,f", [s, tl.broadcast_to(zero[:, None], s.shape)],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    share = tl.minimum(tl.maximum(s * EXP2_SHARE + zero[:, None], 0.0), 1.0)
    bits = (share * EXP2_STEP + 1.0).to(tl.int32, bitcast=True)
    return (bits << 8).to(tl.float32, bitcast=True)


@triton.jit
def _own_mass(
    p_keys, q, query, history, n, queries, o_r, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Running maximum and mass of rows over the keys of one segment's dense pass that they see."""
    m = tl.full([q.shape[0]], float("-inf"), tl.float32)
    mass = tl.zeros([q.shape[0]], tl.float32)
    end = tl.where(n > 0, history - n + queries, 0)
    p_own = p_keys + n.to(tl.int64) * WIDTH
    for o in tl.range(0, end, BLOCK_N, num_stages=1):
        o_n = o + tl.arange(0, BLOCK_N)
        k = tl.load(p_own + tl.minimum(o_n, end - 1)[:, None] * WIDTH + o_r[None, :])
        seen = o_n[None, :] <= history - n + query[:, None]
        s = tl.where(seen, tl.dot(q, tl.trans(k)), float("-inf"))
        m, mass = _add_mass(s, m, mass)
    return m, mass


@triton.jit
def _sampling(n, LSE_STEP: tl.constexpr, LSE_SAMPLES: tl.constexpr):
    """Stride and number of the samples of a history, and a key of both.

    Histories of one key have the same samples, up to their ends; one shorter than its stride has a
    key of its own.
    """
    step = tl.maximum(LSE_STEP, tl.cdiv(n, LSE_SAMPLES))
    return step, tl.maximum(n // step, 1), tl.where(n < step, -n, step)


@triton.jit
def _load_sample(p_keys, number, step, samples, o_r, WIDTH: tl.constexpr):
    """Projected keys [N, WIDTH] of the samples ``number`` of a history; 0 from ``samples`` on."""
    position = number * step + stratum_offset(number, step)
    o_k = position[:, None] * WIDTH + o_r[None, :]
    return tl.load(p_keys + o_k, (number < samples)[:, None], 0.0)


@triton.jit(do_not_specialize=["segments"])
def _row_lse_kernel(
    p_probes, p_probe_rows, p_keys, p_segments, p_heads,
    stride_keys_slot, stride_keys_basis, max_probes, segments,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, PROBE_STEP: tl.constexpr,
    LSE_STEP: tl.constexpr, LSE_SAMPLES: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FUSED: tl.constexpr, LIMIT: tl.constexpr,
    FACTOR_0: tl.constexpr, FACTOR_1: tl.constexpr, FACTOR_2: tl.constexpr,
    BY_SLOT: tl.constexpr,
):  # fmt: skip
    """probe[RANK:] = -lse / FACTORS, lse = log2(sum 2^(q.k) of own keys + n / samples of samples).

    The own keys are those of the segment's dense pass that the row sees; samples are of the n keys
    of its history. A program has BLOCK_M rows of SEGMENTS neighbouring segments of a request: the
    result of a row does not depend on its neighbours. One stage: Triton 3.6 sets no fence between
    asynchronous copies and wgmma.
    """
    i_block, i_head = tl.program_id(0), tl.program_id(1)
    if p_heads is not None:  # noqa: SIM102
        if tl.load(p_heads + i_head) < 0:
            return
    first = tl.program_id(2) * SEGMENTS
    EACH: tl.constexpr = BLOCK_M // SEGMENTS
    o_m = tl.arange(0, BLOCK_M)
    o_segment, o_row = first + o_m // EACH, i_block * EACH + o_m % EACH
    p_segment = p_segments + tl.minimum(o_segment, segments - 1) * SEGMENT_COLUMNS
    rows = tl.cdiv(tl.load(p_segment + NUM_QUERIES) * GROUP, PROBE_STEP)
    n = tl.load(p_segment + DENSE_START)
    m_row = (o_row < rows) & (n > 0) & (o_segment < segments)
    if tl.max(m_row.to(tl.int32)) == 0:
        return
    o_list = tl.minimum(o_segment, segments - 1).to(tl.int64) * tl.num_programs(1) + i_head
    o_list = o_list * max_probes + tl.minimum(o_row, rows - 1)
    query = tl.load(p_probe_rows + o_list, m_row, 0) // GROUP
    p_keys += i_head.to(tl.int64) * stride_keys_basis
    if BY_SLOT:
        slot = tl.load(p_segments + first * SEGMENT_COLUMNS + SLOT)
        p_keys += slot.to(tl.int64) * stride_keys_slot
    # Where the row log-sum-exp goes there are zeros, which meet the factors of a projected key.
    o_r = tl.arange(0, WIDTH)
    q = tl.load(p_probes + o_list[:, None] * WIDTH + o_r[None, :], m_row[:, None], 0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(SEGMENTS):
        p_own = p_segments + tl.minimum(first + i, segments - 1) * SEGMENT_COLUMNS
        m_own, mass_own = _own_mass(
            p_keys, q, query, tl.load(p_own + HISTORY), tl.load(p_own + DENSE_START),
            tl.load(p_own + NUM_QUERIES), o_r, WIDTH, BLOCK_N,
        )  # fmt: skip
        own = o_m // EACH == i
        m, mass = tl.where(own, m_own, m), tl.where(own, mass_own, mass)
    # The history's mass relative to that maximum: exponentials so approximate that they cost less
    # than a maximum.
    history_mass = tl.zeros([BLOCK_M], tl.float32)
    zero = (EXP2_ZERO - m) * EXP2_SHARE
    _, samples, row_key = _sampling(n, LSE_STEP, LSE_SAMPLES)
    previous = 0
    for i in tl.static_range(SEGMENTS):
        # Neighbours mostly have one stride: then the first pass is for both.
        p_one = p_segments + tl.minimum(first + i, segments - 1) * SEGMENT_COLUMNS
        longest = tl.load(p_one + DENSE_START)
        step, _, key = _sampling(longest, LSE_STEP, LSE_SAMPLES)
        alike = m_row & (row_key == key) & ((i == 0) | (key != previous))
        most = tl.max(tl.where(alike, samples, 0))
        full = tl.min(tl.where(alike, samples, tl.where(m_row, 0, most)))
        full = full // BLOCK_N * BLOCK_N
        number = tl.arange(0, BLOCK_N)
        k = _load_sample(p_keys, number, step, full, o_r, WIDTH)
        for _ in tl.range(0, full, BLOCK_N, num_stages=1):
            # Prefetch the next keys.
            number += BLOCK_N
            ahead = _load_sample(p_keys, number, step, full, o_r, WIDTH)
            history_mass += tl.sum(_minus_approximate_exp2(tl.dot(q, tl.trans(k)), zero, FUSED), 1)
            k = ahead
        for o in tl.range(full, most, BLOCK_N, num_stages=1):
            number = o + tl.arange(0, BLOCK_N)
            position = tl.minimum(number * step + stratum_offset(number, step), longest - 1)
            k = tl.load(p_keys + position[:, None] * WIDTH + o_r[None, :])
            s = _minus_approximate_exp2(tl.dot(q, tl.trans(k)), zero, FUSED)
            counts = alike[:, None] & (number[None, :] < samples[:, None])
            history_mass += tl.sum(tl.where(counts, s, 0.0), 1)
        previous = key
    history_mass *= -EXP2_UNIT * (n.to(tl.float32) / samples.to(tl.float32))
    left = m + tl.log2(mass + history_mass)
    dtype: tl.constexpr = p_probes.dtype.element_ty
    for i_part in tl.static_range(3):
        factor = FACTOR_0 if i_part == 0 else (FACTOR_1 if i_part == 1 else FACTOR_2)
        part = tl.minimum(tl.maximum(left / factor, -LIMIT), LIMIT).to(dtype)
        left -= part.to(tl.float32) * factor
        minus = (-part.to(tl.float32)).to(dtype)
        tl.store(p_probes + o_list * WIDTH + RANK + i_part, minus, m_row)


def estimate_row_lse(
    query: torch.Tensor,
    work: WorkList,
    space: RankingWorkspace,
    block_n: int = LSE_BLOCK_N,
) -> None:
    """Write the row log-sum-exp into the projected probes; the keys must be projected.

    Args:
        query: ``[tokens, heads, head_dim]``; its shape alone is read.
        work: the segments.
        space: ``projected_keys``, ``probe_rows`` and ``heads`` are read; ``projected_probes`` is
            completed.
        block_n: projected keys that a program takes at a time.
    """
    keys, (bases, probes) = space.projected_keys, space.projected_probes.shape[1:3]
    segments = 1 if keys.dim() == 4 else next((n for n in (4, 2) if n * probes <= LSE_BLOCK), 1)
    grid = (-(-probes * segments // LSE_BLOCK), bases, -(-work.num_segments // segments))
    _row_lse_kernel[grid](
        space.projected_probes, space.probe_rows, keys, work.segments, space.heads,
        keys.stride(0), keys.stride(-3), probes, work.num_segments, SEGMENTS=segments,
        RANK=basis.Precision(keys.shape[-1]).rank,
        LSE_STEP=basis.LSE_STEP, LSE_SAMPLES=basis.LSE_SAMPLES,
        BLOCK_M=LSE_BLOCK, BLOCK_N=block_n, FUSED=keys.device.type != "cpu",
        FACTOR_0=basis.LSE_FACTORS[0], FACTOR_1=basis.LSE_FACTORS[1],
        FACTOR_2=basis.LSE_FACTORS[2], **kernel_constants(query, space),
    )  # fmt: skip
