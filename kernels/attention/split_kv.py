"""Split KV: several programs attend to parts of a list, and their results are merged (ours)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..columns import NUM_QUERIES, QUERY_START, SEGMENT_COLUMNS
from ..work_list import WorkList


class Parts(NamedTuple):
    """Room for attention to parts of the lists of one-tile segments.

    The first part has the dense pass and the summaries, too.

    Attributes:
        out: float32 ``[segments, kv_heads, parts, group, head_dim]``, attention to each part.
        lse: float32 ``[segments, kv_heads, parts, group]``, its log-sum-exp, base 2.
    """

    out: torch.Tensor
    lse: torch.Tensor


@triton.jit
def _merge_kernel(
    p_parts, p_lse, p_segments, p_out, stride_o_token, stride_o_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Out = sum of exp2(lse_p) out_p / sum of exp2(lse_p), of one query and head."""
    i_head, i_segment = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(0) // GROUP
    if tl.load(p_segments + i_segment * SEGMENT_COLUMNS + NUM_QUERIES) == 0:
        return
    query = tl.load(p_segments + i_segment * SEGMENT_COLUMNS + QUERY_START).to(tl.int64)
    o_p, o_d = tl.arange(0, PARTS), tl.arange(0, D_PAD)
    o_row = (((i_segment * kv_heads + i_head // GROUP) * PARTS + o_p) * GROUP) + i_head % GROUP
    lse = tl.load(p_lse + o_row)  # that of the first part is finite: it has the own token
    weight = tl.exp2(lse - tl.max(lse))
    part = tl.load(p_parts + o_row[:, None] * D + o_d[None, :], (o_d < D)[None, :], 0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.sum(weight)
    p_out += query * stride_o_token + i_head.to(tl.int64) * stride_o_head
    tl.store(p_out + o_d, out.to(p_out.dtype.element_ty), o_d < D)


def merge(work: WorkList, parts: Parts, out: torch.Tensor) -> None:
    """Merge the parts of every query of a decode step into ``out [tokens, heads, head_dim]``."""
    kv_heads, count, group, head_dim = parts.out.shape[1:]
    _merge_kernel[(kv_heads * group, work.num_segments)](
        *parts, work.segments, out, out.stride(0), out.stride(1), GROUP=group, D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim), PARTS=count,
    )  # fmt: skip
