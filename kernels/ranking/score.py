"""Score projected keys by a segment's projected probes: the largest product of each key (ours).

See :mod:`low_rank`. Most of a ranking's time is spent here: a product of 32 numbers for each probe
and key, and half of a maximum of three, as sums are in fp16, two to a register. Several
neighbouring segments share each load of keys; their probes fill the columns of one product.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..columns import DENSE_START, NUM_QUERIES, SEGMENT_COLUMNS, SLOT
from ..tuning import CHUNK
from ..work_list import WorkList
from . import basis
from .packed_f16 import folded
from .workspace import RankingWorkspace

BLOCK_N = 128  # projected keys at a time: buffers have room for whole blocks
# Segments that share each load of projected keys: the columns that folding leaves. More share where
# their probes fill no product otherwise.
SHARING = 8
MORE_SHARING = 16
LEAST_COLUMNS = 16  # of a product
STORED = tl.constexpr(8)  # tokens whose scores are stored at a time: scores have room for them
STAGES = 3
REGISTERS = 128  # of a thread: two blocks of eight warps share a multiprocessor


def key_capacity(tokens: int) -> int:
    """Return the projected keys that a history of ``tokens`` needs room for: whole blocks."""
    return -(-tokens // BLOCK_N) * BLOCK_N


def bases_together(share: int, most: int) -> int:
    """Return how many of a KV head's ``share`` bases one pass takes: the fewest that are repeated.

    A pass takes one, two or four, ``most`` at most; the last one repeats the last basis.
    """
    if share == 1 or most == 1:
        return 1
    return min((n for n in (2, 4) if n <= most), key=lambda n: (-(-share // n) * n, -n))


@triton.jit
def load_probes(
    p_probes, p_segments, segment, i_basis, bases, row, max_probes, o_r,
    GROUP: tl.constexpr, PROBE_STEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Projected probes [WIDTH, M] of a basis: ``row`` of ``segment``, M of either.

    Rows past a segment's last probe repeat it, which no maximum sees.
    """
    segment = segment.to(tl.int64)
    queries = tl.load(p_segments + segment * SEGMENT_COLUMNS + NUM_QUERIES)
    row = tl.minimum(row, tl.cdiv(queries * GROUP, PROBE_STEP) - 1)
    o_row = (segment * bases + i_basis) * max_probes + row
    return tl.trans(tl.load(p_probes + o_row[:, None] * WIDTH + o_r[None, :]))


@triton.jit
def _largest(p_k, q, o_n, o_r, WIDTH: tl.constexpr, FOLDS: tl.constexpr, PACKED: tl.constexpr):
    """Largest products of a block of keys with BLOCK_M probes, of every eighth column: [N, 8]."""
    k = tl.load(p_k + o_n.to(tl.int64)[:, None] * WIDTH + o_r[None, :])
    # Keys in rows keep the maximum over columns inside a thread.
    return folded(tl.dot(k, q, out_dtype=tl.float16), FOLDS, PACKED)


@triton.jit(do_not_specialize=["segments"])
def _score_kernel(
    p_probes, p_keys, p_segments, p_heads, p_scores, p_bounds,
    stride_keys_slot, stride_keys_basis, stride_scores_segment, stride_scores_head,
    max_probes, max_chunks, segments,
    SHARE: tl.constexpr, SHARE_PAD: tl.constexpr, TOGETHER: tl.constexpr, GROUP: tl.constexpr,
    PROBE_STEP: tl.constexpr, PROBE_BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    FOLDS: tl.constexpr, PACKED: tl.constexpr, BY_SLOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """score[segment, KV head, key] = max over its bases and probes of probe . key; chunks' bounds.

    TOGETHER of a KV head's SHARE bases are scored in one pass over the keys, up to four; a later
    pass takes the maximum with the scores that earlier ones stored. Columns go segment by segment:
    folded to SEGMENTS they are the segments themselves. With ``p_heads`` SHARE is the capacity of
    retrieval heads, the first of which are set, and the maximum is with the scores of all heads.
    """
    i_chunk, i_head = tl.program_id(0), tl.program_id(1)
    first_segment = tl.program_id(2) * SEGMENTS
    last_segment = tl.minimum(first_segment + SEGMENTS, segments) - 1
    start = i_chunk * CHUNK
    # Segments are sorted by history: the first one sees the most.
    longest = tl.load(p_segments + first_segment * SEGMENT_COLUMNS + DENSE_START)
    if start >= longest:
        return
    bases = tl.num_programs(1) * SHARE
    if p_heads is None:
        taken: tl.constexpr = SHARE
    else:
        o_s = tl.arange(0, SHARE_PAD)
        number = tl.load(p_heads + i_head * SHARE + o_s, o_s < SHARE, -1)
        taken = tl.sum((number >= 0).to(tl.int32))
        if taken == 0:
            return
    ONE_PASS: tl.constexpr = p_heads is None and PROBE_BLOCKS == 1 and SHARE <= TOGETHER
    passes = PROBE_BLOCKS * ((taken + TOGETHER - 1) // TOGETHER)
    o_r, o_n, o_i = tl.arange(0, WIDTH), tl.arange(0, BLOCK_N), tl.arange(0, SEGMENTS)
    segment = tl.minimum(first_segment + o_i, last_segment).to(tl.int64)
    n = tl.load(p_segments + segment * SEGMENT_COLUMNS + DENSE_START)
    if BY_SLOT:
        i_slot = tl.load(p_segments + first_segment * SEGMENT_COLUMNS + SLOT).to(tl.int64)
        p_keys += i_slot * stride_keys_slot
    p_scores += i_head * stride_scores_head + segment * stride_scores_segment
    best = tl.full([BLOCK_N, SEGMENTS], float("-inf"), tl.float16)
    worst = tl.full([BLOCK_N, SEGMENTS], float("inf"), tl.float16)
    column = tl.arange(0, BLOCK_M)
    segment_of = tl.minimum(first_segment + column % SEGMENTS, last_segment)
    for i_pass in range(passes):
        row = (i_pass % PROBE_BLOCKS) * (BLOCK_M // SEGMENTS) + column // SEGMENTS
        first = i_pass // PROBE_BLOCKS * TOGETHER
        # Bases past the last one repeat it.
        b_0 = i_head * SHARE + tl.minimum(first, taken - 1)
        b_1 = i_head * SHARE + tl.minimum(first + 1, taken - 1)
        b_2 = i_head * SHARE + tl.minimum(first + 2, taken - 1)
        b_3 = i_head * SHARE + tl.minimum(first + 3, taken - 1)
        q_0 = load_probes(
            p_probes, p_segments, segment_of, b_0, bases, row, max_probes, o_r, GROUP,
            PROBE_STEP, WIDTH,
        )  # fmt: skip
        q_1, q_2, q_3 = q_0, q_0, q_0
        if TOGETHER > 1:
            q_1 = load_probes(
                p_probes, p_segments, segment_of, b_1, bases, row, max_probes, o_r, GROUP,
                PROBE_STEP, WIDTH,
            )  # fmt: skip
        if TOGETHER > 2:
            q_2 = load_probes(
                p_probes, p_segments, segment_of, b_2, bases, row, max_probes, o_r, GROUP,
                PROBE_STEP, WIDTH,
            )  # fmt: skip
            q_3 = load_probes(
                p_probes, p_segments, segment_of, b_3, bases, row, max_probes, o_r, GROUP,
                PROBE_STEP, WIDTH,
            )  # fmt: skip
        p_0 = p_keys + b_0.to(tl.int64) * stride_keys_basis
        p_1 = p_keys + b_1.to(tl.int64) * stride_keys_basis
        p_2 = p_keys + b_2.to(tl.int64) * stride_keys_basis
        p_3 = p_keys + b_3.to(tl.int64) * stride_keys_basis
        last_pass = i_pass == passes - 1
        for o in tl.range(start, tl.minimum(start + CHUNK, longest), BLOCK_N, num_stages=STAGES):
            token = o + o_n
            most = _largest(p_0, q_0, token, o_r, WIDTH, FOLDS, PACKED)
            if TOGETHER > 1:
                most = tl.maximum(most, _largest(p_1, q_1, token, o_r, WIDTH, FOLDS, PACKED))
            if TOGETHER > 2:
                most = tl.maximum(most, _largest(p_2, q_2, token, o_r, WIDTH, FOLDS, PACKED))
                most = tl.maximum(most, _largest(p_3, q_3, token, o_r, WIDTH, FOLDS, PACKED))
            FOLDED: tl.constexpr = most.shape[1]
            if SEGMENTS < FOLDED:
                most = tl.reshape(most, [BLOCK_N, FOLDED // SEGMENTS, SEGMENTS])
                most = tl.max(most, 1).to(tl.float16)  # a reduction makes float32 of it
            # Whole groups of tokens, which a thread stores at a time.
            m_score = (token // STORED * STORED)[:, None] < n[None, :]
            p_score = p_scores[None, :] + token[:, None]
            if not ONE_PASS:
                there = (i_pass > 0) | (p_heads is not None)
                before = tl.load(p_score, m_score & there, float("-inf"))
                most = tl.maximum(most, before)
            tl.store(p_score, most, m_score)
            seen = (token[:, None] < n[None, :]) & last_pass
            best = tl.maximum(best, tl.where(seen, most, float("-inf")))
            worst = tl.minimum(worst, tl.where(seen, most, float("inf")))
    p_bounds += 2 * ((segment * tl.num_programs(1) + i_head) * max_chunks + i_chunk)
    m_segment = (first_segment + o_i < segments) & (start < n)
    tl.store(p_bounds, tl.max(best, 0).to(tl.float32), m_segment)
    tl.store(p_bounds + 1, tl.min(worst, 0).to(tl.float32), m_segment)


def score_history(
    work: WorkList,
    scores: Tensor,
    bounds: Tensor,
    space: RankingWorkspace,
    group: int,
    *,
    chunk: int = CHUNK,
    shared: bool = True,
) -> None:
    """Score histories by the projected probes and keys of ``space``; see :mod:`low_rank`.

    Args:
        work: segments, of any requests unless ``shared``.
        scores: float16 ``[segments, kv_heads, >= max_history]``; written up to each segment's
            history, in whole groups of ``STORED`` tokens.
        bounds: float32 ``[segments * kv_heads, chunks, 2]``; written: best and worst score.
        space: ``projected_probes``, ``projected_keys`` and ``heads`` are read.
        group: query heads that share a basis.
        chunk: history tokens of a program.
        shared: whether neighbouring segments share projected keys, and so a program.
    """
    keys, kv_heads = space.projected_keys, scores.shape[1]
    bases, probes, width = space.projected_probes.shape[1:]
    share = bases // kv_heads
    # Of a block's columns and bases: one-byte keys leave room for more.
    columns, together = (256, 4) if keys.element_size() == 1 else (128, 2)
    together = max(1, together * basis.WIDTH // width)
    if space.heads is not None:
        together = 1  # a KV head has one retrieval head more often than two
    segments = 1
    if shared:
        segments = MORE_SHARING if MORE_SHARING * probes <= columns else SHARING
    block_m = min(columns, max(triton.next_power_of_2(probes) * segments, LEAST_COLUMNS))
    folds = block_m.bit_length() - max(SHARING, segments).bit_length() - 1
    _score_kernel[(-(-work.max_history // chunk), kv_heads, -(-work.num_segments // segments))](
        space.projected_probes, keys, work.segments, space.heads, scores, bounds,
        keys.stride(0), keys.stride(-3), scores.stride(0), scores.stride(1),
        probes, bounds.shape[1], work.num_segments,
        SHARE=share, SHARE_PAD=triton.next_power_of_2(share),
        TOGETHER=bases_together(share, together), GROUP=group, PROBE_STEP=space.probe_step,
        PROBE_BLOCKS=-(-probes * segments // block_m), SEGMENTS=segments,
        BLOCK_M=block_m,
        BLOCK_N=min(BLOCK_N, chunk), WIDTH=width, CHUNK=chunk,
        FOLDS=folds, PACKED=keys.device.type != "cpu",
        BY_SLOT=keys.dim() == 4, STAGES=STAGES,
        num_warps=8 if block_m > 128 else 4, maxnreg=REGISTERS,
    )  # fmt: skip
