"""Sparse decode of a layer: slots of its requests, filled at the end of a prompt, and each step.

A query of decode is ranked by low-rank keys, for it has no neighbours to be pooled with and reads
little else. The basis is fitted to the last chunk of the prompt, whatever ranked its prefill.
"""

import functools
from typing import Any

import torch

from . import decode_reference
from .decode_state import DecodeList, DecodeRow, DecodeShape, DecodeTable, Kept, keep
from .layout import NUM_COUNTERS
from .tuning import DECODE_RECENT
from .work_list import WorkList, small_work_list


class SparseDecode:
    """Sparse attention of single queries over a paged cache.

    On a CUDA device the Triton kernels run, else :mod:`decode_reference`.

    Args:
        shape: sizes; heads must be a multiple of kv_heads.
        dtype: of queries, and of the cache unless that is fp8.
        device: where it runs.
        scale: softmax scale.
        softcap: cap of the scaled scores, 0 for none.
    """

    def __init__(
        self,
        shape: DecodeShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        scale: float,
        softcap: float = 0.0,
    ):
        self.shape, self.scale, self.softcap = shape, scale, softcap
        self.slots: Any  # a decode_step.DecodeWorkspace on a CUDA device
        self.fitting: Any = None  # scratch of a fit, on a CUDA device
        self.decode: Any
        if device.type == "cuda":
            from . import decode_step

            self.slots = decode_step.DecodeWorkspace(shape, dtype, device, scratch(shape, device))
            self.fitting = fitting(shape, dtype, device)
            self.decode = decode_step.decode
        else:
            self.slots = decode_reference.DecodeSlots(shape, dtype, device)
            self.decode = decode_reference.decode

    def keep(
        self,
        kept: Kept,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        work: WorkList,
        *,
        k_scale: float = 1.0,
    ) -> None:
        """Fit a basis to the end of a prompt and keep it, low-rank keys and means in a slot.

        Args:
            kept: which fit of the chunk, and the request's slot.
            query: ``[tokens, heads, head_dim]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
            block_table: int32 ``[rows, max_blocks]``.
            work: a chunk's first list.
            k_scale: what one unit of the cache's keys stands for.
        """
        scale = self.scale * k_scale
        if self.fitting is None:
            self.slots.keep(kept, query, kv_cache, block_table, work, scale)
            return
        from .attention import summaries as regions
        from .ranking import fit, low_rank

        ranked, means = self.fitting
        span = work.spans[kept.fit]
        fit.take_moments(query, kv_cache, block_table, work.row, span, ranked.fit)
        fit.find_bases(ranked.fit, scale=scale)
        low_rank.project_keys(kv_cache, block_table, work.row, span.tokens, ranked)
        regions.average(kv_cache, block_table, work, means)
        self.slots.keep(kept, ranked, means)

    def __call__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        rows: DecodeList,
        out: torch.Tensor,
        counters: torch.Tensor,
        *,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """Attend for every query of ``rows``; arguments are those of :func:`decode_step.decode`."""
        self.decode(
            query, kv_cache, block_table, rows, self.slots, out, counters,
            scale=self.scale * k_scale, v_scale=v_scale, softcap=self.softcap,
        )  # fmt: skip

    def warm_up(
        self, query: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor
    ) -> None:
        """Run every kernel once over the very tensors that requests will use.

        Reads the cache; of a slot, which no request has yet, it writes images.
        """
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=query.device)
        context = min(
            4 * DECODE_RECENT, block_table.shape[1] * kv_cache.shape[2], self.shape.max_history
        )
        row = DecodeRow(0, 0, context - 1, 0, context - 2)
        rows = DecodeTable(self.shape, 1, query.device).fill([row], 1)
        table = torch.zeros_like(block_table)
        work = small_work_list(query.device, DECODE_RECENT, dense=False)
        self.keep(keep(work, 0), query, kv_cache, table, work)
        self(query, kv_cache, table, rows, torch.empty_like(query), counters)


@functools.cache
def scratch(shape: DecodeShape, device: torch.device) -> Any:
    """Return a step's scratch for a shape; layers of one shape share it (they run in turn)."""
    from . import decode_step

    return decode_step.scratch(shape, device)


@functools.cache
def fitting(shape: DecodeShape, dtype: torch.dtype, device: torch.device) -> Any:
    """Return scratch of a fit and the means of regions; layers of one shape share it."""
    from .attention import summaries as regions
    from .ranking import low_rank

    sizes = (shape.heads, shape.kv_heads, shape.head_dim, shape.max_history)
    ranked = low_rank.LowRankWorkspace(*sizes, 1, 1, dtype, device)
    return ranked, regions.workspace(*sizes[1:], dtype, device)
