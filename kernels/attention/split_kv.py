"""Split KV: several programs attend to parts of a list, and their results are merged (ours)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..columns import NUM_QUERIES, QUERY_START, SEGMENT_COLUMNS
from ..work_list import WorkList


class Parts(NamedTuple):
    """Room for the attention of segments of one tile, whose lists several programs share (ours).

    The first part has the dense pass and the means of regions, too.

    Attributes:
        out: float32 ``[items, kv_heads, parts, group, head_dim]``, attention to each part.
        mass: float32 ``[items, kv_heads, parts, group]``, its softmax mass, base-2 logarithm.
    """

    out: torch.Tensor
    mass: torch.Tensor


@triton.jit
def _merge_kernel(
    p_parts, p_mass, p_items, p_out, stride_o_token, stride_o_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The attention of one query and head from that to parts of what it visits."""
    i_head, i_item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(0) // GROUP
    if tl.load(p_items + i_item * SEGMENT_COLUMNS + NUM_QUERIES) == 0:
        return
    query = tl.load(p_items + i_item * SEGMENT_COLUMNS + QUERY_START).to(tl.int64)
    o_p, o_d = tl.arange(0, PARTS), tl.arange(0, D_PAD)
    o_row = (((i_item * kv_heads + i_head // GROUP) * PARTS + o_p) * GROUP) + i_head % GROUP
    mass = tl.load(p_mass + o_row)  # that of the first part is finite: it has the own token
    weight = tl.exp2(mass - tl.max(mass))
    part = tl.load(p_parts + o_row[:, None] * D + o_d[None, :], (o_d < D)[None, :], 0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.sum(weight)
    p_out += query * stride_o_token + i_head.to(tl.int64) * stride_o_head
    tl.store(p_out + o_d, out.to(p_out.dtype.element_ty), o_d < D)


def merge(work: WorkList, parts: Parts, out: torch.Tensor) -> None:
    """Merge the parts of every query of a decode step into ``out [tokens, heads, head_dim]``."""
    kv_heads, count, group, head_dim = parts.out.shape[1:]
    _merge_kernel[(kv_heads * group, work.num_items)](
        *parts, work.items, out, out.stride(0), out.stride(1), GROUP=group, D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim), PARTS=count,
    )  # fmt: skip
