"""Sparse decode of a layer: slots of its requests, filled at the end of a prompt, and each step."""

import functools
from typing import Any

import torch

from . import reference_decode
from .decode_plan import RECENT, DecodeList, DecodeRow, DecodeShape, DecodeTable, Kept
from .operator import SparsePrefill
from .plan import NUM_COUNTERS, WorkList


class SparseDecode:
    """Sparse attention of single queries over a paged cache.

    On a CUDA device the Triton kernels run, else :mod:`reference_decode`.

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
        self.slots: Any  # a decode.DecodeWorkspace on a CUDA device
        self.decode: Any
        if device.type == "cuda":
            from . import decode

            self.slots = decode.DecodeWorkspace(shape, dtype, device, scratch(shape, device))
            self.decode = decode.decode
        else:
            self.slots = reference_decode.DecodeSlots(shape, dtype, device)
            self.decode = reference_decode.decode

    def keep(
        self,
        kept: Kept,
        prefill: SparsePrefill,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        work: WorkList,
        *,
        k_scale: float = 1.0,
    ) -> None:
        """Keep what the end of a prompt was ranked with, after a chunk's first list.

        Args:
            kept: which fit of the chunk, and the request's slot.
            prefill: what ranked it, by images of low rank.
            query: as it was given to ``prefill``.
            kv_cache: likewise.
            block_table: likewise.
            work: likewise.
            k_scale: likewise.
        """
        if prefill.space is not None:
            self.slots.keep(kept, prefill.space.ranking, prefill.space.regions)
            return
        arguments = (query, kv_cache, block_table, work)
        self.slots.keep(kept, *arguments, self.scale * k_scale)

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
        """Attend for every query of ``rows``; the arguments are those of :func:`decode.decode`."""
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
        context = min(4 * RECENT, block_table.shape[1] * kv_cache.shape[2], self.shape.max_history)
        row = DecodeRow(0, 0, context - 1, 0, context - 2)
        rows = DecodeTable(self.shape, 1, query.device).fill([row], 1)
        table = torch.zeros_like(block_table)
        self(query, kv_cache, table, rows, torch.empty_like(query), counters)


@functools.cache
def scratch(shape: DecodeShape, device: torch.device) -> Any:
    """Return a step's scratch for a shape; layers of one shape share it (they run in turn)."""
    from . import decode

    return decode.scratch(shape, device)
