"""The probes of a segment: which query rows they are, and their projections (ours).

Rows are queries x the heads that share a basis: in prefill each head has its own, in decode a group
has one. See :func:`basis.farthest_rows`; :mod:`row_lse` completes the projections.
"""

import torch
import triton
import triton.language as tl

from ..columns import DENSE_START, NUM_QUERIES, QUERY_START, SEGMENT_COLUMNS, SLOT
from ..tiles import input_precision
from ..work_list import WorkList
from .workspace import RankingWorkspace, kernel_constants

PROBE_BLOCK = 64  # rows that are projected at a time: a load that all wait for each


@triton.jit
def _project_block(
    p_q, p_a, row, o_basis, stride_q_token, stride_q_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Projected rows q A [M, WIDTH] of a segment and basis, float32, of M row numbers."""
    o_d = tl.arange(0, D_PAD)
    o_r = tl.arange(0, WIDTH)
    o_q = row // GROUP * stride_q_token + row % GROUP * stride_q_head
    q = tl.load(p_q + o_q[:, None] + o_d[None, :], (o_d < D)[None, :], 0.0)
    a = tl.load(p_a + (o_basis + o_d[:, None]) * WIDTH + o_r[None, :], (o_d < D)[:, None], 0.0)
    return tl.dot(q, a, input_precision=PRECISION)


@triton.jit
def _farthest(distance, row, rows, count):
    """Return which ``count`` rows have the largest distances, and their order: masks and indices.

    Distances are not negative. Of equal ones the first rows are taken.
    """
    # As integers, which such numbers order like.
    distance = tl.where(row < rows, distance.to(tl.int32, bitcast=True), -1)
    # The largest number that ``count`` distances reach, four bits at a time: a count is a round of
    # messages between warps, for one number or for sixteen. The last round has three bits.
    least = 0
    for i in range(8):
        higher = least + (tl.arange(0, 16) << tl.maximum(27 - 4 * i, 0))
        reach = tl.sum((distance[:, None] >= higher[None, :]).to(tl.int32), 0)
        least = tl.max(tl.where(reach >= count, higher, 0))
    equal = (distance == least).to(tl.int32)
    room = count - tl.sum((distance > least).to(tl.int32))
    chosen = (distance > least) | ((equal > 0) & (tl.cumsum(equal) <= room))
    return chosen, tl.cumsum(chosen.to(tl.int32)) - 1


@triton.jit
def _choose_probes(
    p_q, p_a, p_distance, p_probe_rows, rows, count, o_basis, stride_q_token, stride_q_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write which rows are the probes: those farthest from the mean projected row."""
    o_b = tl.arange(0, BLOCK)
    mean = tl.zeros([WIDTH], tl.float32)
    for i in tl.range(0, tl.cdiv(rows, BLOCK), num_stages=1):
        o_row = i * BLOCK + o_b
        projected = _project_block(
            p_q, p_a, tl.minimum(o_row, rows - 1), o_basis,
            stride_q_token, stride_q_head, GROUP, D, D_PAD, WIDTH, PRECISION,
        )  # fmt: skip
        mean += tl.sum(tl.where((o_row < rows)[:, None], projected, 0.0), 0)
    mean /= rows
    for i in tl.range(0, tl.cdiv(rows, BLOCK), num_stages=1):
        o_row = i * BLOCK + o_b
        projected = _project_block(
            p_q, p_a, tl.minimum(o_row, rows - 1), o_basis,
            stride_q_token, stride_q_head, GROUP, D, D_PAD, WIDTH, PRECISION,
        )  # fmt: skip
        projected -= mean[None, :]
        tl.store(p_distance + o_row, tl.sum(projected * projected, 1), o_row < rows)
    # Through memory, to threads that each hold a few of them.
    tl.debug_barrier()
    row = tl.arange(0, BLOCKS * BLOCK)
    distance = tl.load(p_distance + row, row < rows, 0.0)
    chosen, i_probe = _farthest(distance, row, rows, count)
    tl.store(p_probe_rows + i_probe, row, chosen)
    tl.debug_barrier()  # other threads read them


@triton.jit
def _choose_and_project(
    p_q, p_a, p_probe_rows, p_probes, rows, count, o_basis, stride_q_token, stride_q_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Choose the probes among the rows of one block; write which they are and project them."""
    o_b, o_r = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    projected = _project_block(
        p_q, p_a, tl.minimum(o_b, rows - 1), o_basis,
        stride_q_token, stride_q_head, GROUP, D, D_PAD, WIDTH, PRECISION,
    )  # fmt: skip
    mean = tl.sum(tl.where((o_b < rows)[:, None], projected, 0.0), 0) / rows
    far = projected - mean[None, :]
    chosen, i_probe = _farthest(tl.sum(far * far, 1), o_b, rows, count)
    tl.store(p_probe_rows + i_probe, o_b, chosen)
    projected = tl.minimum(tl.maximum(projected, -LIMIT), LIMIT).to(p_probes.dtype.element_ty)
    tl.store(p_probes + i_probe[:, None] * WIDTH + o_r[None, :], projected, chosen[:, None])


@triton.jit
def _project_probes_kernel(
    p_q, p_a, p_segments, p_heads, p_distances, p_probe_rows, p_probes,
    stride_q_token, stride_q_head, max_probes,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr,
    PROBE_STEP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LIMIT: tl.constexpr,
    PRECISION: tl.constexpr, BY_SLOT: tl.constexpr,
):  # fmt: skip
    """probe_rows[segment, basis] = farthest rows q A from their mean; probes = those, rounded.

    The columns of the row log-sum-exp stay zero. One stage in its loops: Triton 3.6 sets no fence
    between asynchronous copies and wgmma. With ``p_heads`` an entry says whose rows it takes.
    """
    i_entry = tl.program_id(0)
    i_head = i_entry
    bases = tl.num_programs(0)
    if p_heads is not None:
        i_head = tl.load(p_heads + i_entry)
        if i_head < 0:
            return
    i_segment = tl.program_id(1).to(tl.int64)
    p_segment = p_segments + i_segment * SEGMENT_COLUMNS
    start = tl.load(p_segment + QUERY_START).to(tl.int64)
    rows = tl.load(p_segment + NUM_QUERIES) * GROUP
    if tl.load(p_segment + DENSE_START) == 0:
        return
    o_basis = i_head.to(tl.int64) * D
    if BY_SLOT:
        o_basis += tl.load(p_segment + SLOT).to(tl.int64) * bases * D
    o_b = tl.arange(0, BLOCK)
    o_r = tl.arange(0, WIDTH)
    p_q += start * stride_q_token + i_head.to(tl.int64) * GROUP * stride_q_head
    o_list = (i_segment * bases + i_entry) * max_probes
    count = tl.cdiv(rows, PROBE_STEP)
    if PROBE_STEP > 1 and BLOCKS == 1:
        _choose_and_project(
            p_q, p_a, p_probe_rows + o_list, p_probes + o_list * WIDTH, rows, count, o_basis,
            stride_q_token, stride_q_head, GROUP, D, D_PAD, WIDTH, BLOCK, LIMIT, PRECISION,
        )  # fmt: skip
        return
    if PROBE_STEP > 1:
        _choose_probes(
            p_q, p_a, p_distances + o_list * PROBE_STEP, p_probe_rows + o_list, rows, count,
            o_basis, stride_q_token, stride_q_head, GROUP, D, D_PAD, WIDTH, BLOCK, BLOCKS,
            PRECISION,
        )  # fmt: skip
    for first in tl.range(0, count, BLOCK, num_stages=1):
        o_row = first + o_b
        row = tl.minimum(o_row, count - 1)
        if PROBE_STEP > 1:
            row = tl.load(p_probe_rows + o_list + row)
        else:
            tl.store(p_probe_rows + o_list + o_row, o_row, o_row < count)
        projected = _project_block(
            p_q, p_a, row, o_basis, stride_q_token, stride_q_head,
            GROUP, D, D_PAD, WIDTH, PRECISION,
        )  # fmt: skip
        projected = tl.minimum(tl.maximum(projected, -LIMIT), LIMIT)
        p_row = p_probes + (o_list + o_row[:, None]) * WIDTH + o_r[None, :]
        tl.store(p_row, projected.to(p_probes.dtype.element_ty), (o_row < count)[:, None])


def choose_probes(
    query: torch.Tensor,
    work: WorkList,
    space: RankingWorkspace,
    block: int = PROBE_BLOCK,
) -> None:
    """Choose and project the probes of a work list's segments; the bases must be fitted.

    Args:
        query: ``[tokens, heads, head_dim]``.
        work: the segments.
        space: ``basis`` and ``heads`` are read; ``probe_rows``, ``projected_probes`` (but for the
            row log-sum-exp) and ``distances`` are written.
        block: rows that are projected at a time.
    """
    head_dim, (bases, probes) = query.shape[2], space.projected_probes.shape[1:3]
    _project_probes_kernel[(bases, work.num_segments)](
        query, space.basis.a, work.segments, space.heads, space.distances, space.probe_rows,
        space.projected_probes, query.stride(0), query.stride(1), probes,
        D=head_dim, D_PAD=triton.next_power_of_2(head_dim), BLOCK=block,
        BLOCKS=triton.next_power_of_2(-(-probes * space.probe_step // block)),
        PRECISION=input_precision(query.dtype), num_warps=4 if head_dim <= 256 else 8,
        **kernel_constants(query, space),
    )  # fmt: skip
