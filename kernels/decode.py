"""Sparse decode of a layer: states of its requests, taken at the end of a prompt, and each step.

A query of decode is ranked by low-rank keys: it has no neighbours to be pooled with, and reads
little else. The basis is fitted to the last chunk of the prompt, whatever ranked its prefill.
"""

from typing import Protocol

import torch

from .decode_reference import DecodeReference
from .decode_state import DecodeList, DecodeRow, DecodeShape, DecodeTable, Snapshot, choose_snapshot
from .layout import NUM_COUNTERS
from .tuning import DECODE_RECENT
from .work_list import WorkList, small_work_list


class DecodeBackend(Protocol):
    """The states of a layer's requests, and what runs on them: kernels or references."""

    def take(
        self,
        snapshot: Snapshot,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        work: WorkList,
        *,
        scale: float,
    ) -> None:
        """Fit a basis to the end of a prompt; store it, projected keys and summaries in a slot.

        Arguments are those of :meth:`SparseDecode.take`, with one ``scale``: the softmax scale,
        times what one unit of the cache's keys stands for.
        """

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        rows: DecodeList,
        out: torch.Tensor,
        counters: torch.Tensor,
        *,
        scale: float,
        v_scale: float,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> None:
        """Rank, select and attend for every query of a step; see :func:`decode_step.decode`."""


class SparseDecode:
    """Sparse attention of single queries over a paged cache.

    On a CUDA device the Triton kernels run, else the references.

    Args:
        shape: sizes; heads must be a multiple of kv_heads.
        dtype: of queries, and of the cache unless that is fp8.
        device: where it runs.
        scale: softmax scale.
        softcap: cap of the scaled scores, 0 for none.
        sinks: ``[heads]``, logits of attention sinks; see :func:`attend.attend`.
    """

    def __init__(
        self,
        shape: DecodeShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        scale: float,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ):
        self.shape, self.scale, self.softcap, self.sinks = shape, scale, softcap, sinks
        self.backend = make_backend(shape, dtype, device)

    def take(
        self,
        snapshot: Snapshot,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        work: WorkList,
        *,
        k_scale: float = 1.0,
    ) -> None:
        """Take a snapshot: a basis of the end of a prompt, its projected keys and summaries.

        Args:
            snapshot: which span of the chunk, and the request's slot.
            query: ``[tokens, heads, head_dim]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
            block_table: int32 ``[rows, max_blocks]``.
            work: a chunk's first list.
            k_scale: what one unit of the cache's keys stands for.
        """
        self.backend.take(snapshot, query, kv_cache, block_table, work, scale=self.scale * k_scale)

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
        self.backend.attend(
            query, kv_cache, block_table, rows, out, counters,
            scale=self.scale * k_scale, v_scale=v_scale, softcap=self.softcap, sinks=self.sinks,
        )  # fmt: skip

    def warm_up(
        self, query: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor
    ) -> None:
        """Run every kernel once over the very tensors that requests will use.

        Reads the cache; of a state, which no request has yet, it writes projected keys.

        Args:
            query: ``[tokens, heads, head_dim]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
            block_table: int32 ``[rows, max_blocks]``.
        """
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=query.device)
        cached = block_table.shape[1] * kv_cache.shape[2]
        context = min(4 * DECODE_RECENT, cached, self.shape.max_history)
        row = DecodeRow(0, 0, context - 1, 0, context - 2)
        rows = DecodeTable(self.shape, 1, query.device).fill([row], 1)
        table = torch.zeros_like(block_table)
        work = small_work_list(query.device, DECODE_RECENT, dense=False)
        self.take(choose_snapshot(work, 0), query, kv_cache, table, work)
        self(query, kv_cache, table, rows, torch.empty_like(query), counters)


def make_backend(shape: DecodeShape, dtype: torch.dtype, device: torch.device) -> DecodeBackend:
    """Return the kernels' backend on a CUDA device, else that of the references."""
    if device.type == "cuda":
        from .decode_step import DecodeKernels

        return DecodeKernels(shape, dtype, device)
    return DecodeReference(shape, dtype, device)
