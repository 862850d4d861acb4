"""The backend on CUDA: vLLM's FlashAttention backend, with sparse prefill rows taken out."""

from typing import Any, ClassVar

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .forward import SparseImpl
from .metadata import SparseBuilder


class S2OImpl(SparseImpl, FlashAttentionImpl):  # type: ignore[misc]
    """FlashAttention, with the sparse rows of a step on S2O's kernels."""


class S2OMetadataBuilder(SparseBuilder, FlashAttentionMetadataBuilder):
    """FlashAttention's builder, with a plan for the sparse rows of a step."""

    # Decode-only batches replay full graphs, sparse ones too; prefill runs between graph pieces.
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.s2o_graphs = self.use_full_cuda_graph
        self.prepare_s2o(
            list(get_layers_from_vllm_config(vllm_config, Attention, layer_names).values())
        )


class S2OBackend(FlashAttentionBackend):
    """What ``--attention-backend s2o`` (``CUSTOM``) selects on CUDA."""

    @staticmethod
    def get_name() -> str:
        """Return the slot's name: it must be a key of vLLM's enumeration."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[S2OImpl]:
        """Return the implementation of a layer."""
        return S2OImpl

    @staticmethod
    def get_builder_cls() -> type[S2OMetadataBuilder]:
        """Return the metadata builder."""
        return S2OMetadataBuilder
