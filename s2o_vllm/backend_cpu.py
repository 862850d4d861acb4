"""The backend on the CPU: vLLM's CPU backend, with sparse prefill rows taken out.

The same ranking and attention in PyTorch over the same paged cache, so that the whole server
runs without a GPU.
"""

import functools
import math
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from .forward import SparseImpl, as_numbers
from .metadata import SparseBuilder
from .step_plan import StepPlan


class CacheLayout:
    """Where vLLM's CPU kernels keep each element of a block's keys and values.

    The layout depends on the instruction set (keys may be transposed or interleaved). Instead
    of repeating vLLM's private layouts, a block is written once by vLLM's own writer, with
    every element holding its own number, and read back.

    Args:
        isa: vLLM's name of the instruction set, ``layer.isa``.
        page: tokens per block.
        head_dim: size of a head.
        dtype: of the cache; float8_e4m3fn for one that vLLM keeps as bytes.
    """

    DIGIT = 8  # exact in every float format, e4m3 included

    def __init__(self, isa: str, page: int, head_dim: int, dtype: torch.dtype):
        numbers = torch.arange(page * head_dim)
        powers = range(math.ceil(math.log2(len(numbers)) / math.log2(self.DIGIT)))
        digits = [numbers // self.DIGIT**power % self.DIGIT for power in powers]
        fp8 = dtype == torch.float8_e4m3fn
        kinds = (torch.uint8, torch.bfloat16, "fp8") if fp8 else (dtype, dtype, "auto")
        stored, written, name = kinds
        found = torch.zeros(2, page * head_dim, dtype=torch.long)  # of keys and of values
        for power, digit in enumerate(digits):
            block = torch.zeros(1, 1, 2 * page, head_dim, dtype=stored)
            tokens = digit.reshape(page, 1, head_dim).to(written)
            keys, values = block.chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(
                tokens, tokens, keys, values, torch.arange(page), isa, kv_cache_dtype=name
            )
            found += block.view(dtype).reshape(2, -1).long() * self.DIGIT**power
        if not torch.equal(found.sort().values, numbers.expand(2, -1)):
            raise RuntimeError(f"s2o: vLLM's CPU cache layout {isa!r} could not be read back")
        # found[half][index in the half] is the element's number; invert it.
        self.order = (found.argsort() + torch.tensor([[0], [page * head_dim]])).flatten()
        self.page, self.head_dim = page, head_dim

    def tokens(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return blocks ``[n, kv_heads, page, 2 * head_dim]`` with a token's K and V in a row."""
        flat = blocks.reshape(*blocks.shape[:2], -1)[..., self.order]
        keys, values = flat.reshape(*blocks.shape[:2], 2, self.page, self.head_dim).unbind(2)
        return torch.cat([keys, values], -1)


layout_of = functools.cache(CacheLayout)  # one per shape, for all layers


class S2OCPUImpl(SparseImpl, CPUAttentionBackendImpl):
    """vLLM's CPU attention, with the sparse rows of a step on S2O's PyTorch reference."""

    def forward(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See :meth:`SparseImpl.forward`."""
        self._isa = str(getattr(layer, "isa", ""))
        return super().forward(layer, *args, **kwargs)

    def sparse_cache(
        self, kv_cache: torch.Tensor, block_table: torch.Tensor, plan: StepPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the sparse rows' blocks out of the packed cache, renumbered from 0.

        Args:
            kv_cache: vLLM's CPU cache ``[blocks, kv_heads, block_size, 2 * head_size]``, packed.
            block_table: int32 ``[rows, max_blocks]``.
            plan: of the step.

        Returns:
            These blocks ``[blocks, kv_heads, block_size, 2 * head_size]`` in the order of tokens,
            and their table, int32 ``[rows, max_blocks]``.
        """
        page = kv_cache.shape[2]
        layout = layout_of(self._isa, page, self.head_size, kv_cache.dtype)
        table = torch.zeros_like(block_table)
        blocks: list[torch.Tensor] = []
        first = 0
        ends = [(row.row, row.context + row.num_queries) for row in plan.sparse_rows]
        ends += [(row.row, row.context + 1) for row in (plan.decode.rows if plan.decode else ())]
        for row, end in ends:
            count = -(-end // page)
            table[row, :count] = torch.arange(first, first + count)
            blocks.append(block_table[row, :count])
            first += count
        return layout.tokens(kv_cache[torch.cat(blocks).long()]), table


class S2OCPUMetadataBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    """The CPU builder, with a plan for the sparse rows of a step."""

    reorder_batch_threshold = 1  # decode rows first: fewer dense parts

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.prepare_s2o(
            list(get_layers_from_vllm_config(vllm_config, Attention, layer_names).values())
        )
        if self.s2o is not None and self.s2o_reason is None:
            # A layout that cannot be read ends the start, not the first sparse request.
            dtype = as_numbers(torch.empty(0, dtype=kv_cache_spec.dtype)).dtype
            layout_of(self.isa, self.block_size, self.head_dim, dtype)


class S2OCPUBackend(CPUAttentionBackend):
    """What ``--attention-backend s2o`` selects on the CPU."""

    @staticmethod
    def get_name() -> str:
        """Return the slot's name: it must be a key of vLLM's enumeration."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[S2OCPUImpl]:
        """Return the implementation of a layer."""
        return S2OCPUImpl

    @staticmethod
    def get_builder_cls() -> type[S2OCPUMetadataBuilder]:
        """Return the metadata builder."""
        return S2OCPUMetadataBuilder
