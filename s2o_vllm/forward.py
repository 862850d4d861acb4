"""The forward pass of a layer: dense rows to the parent, sparse rows to the operator."""

import logging
from typing import Any

import torch

from . import compat, metrics
from .config import S2OConfig
from .kernels.decode import SparseDecode
from .kernels.decode_state import DecodeShape
from .kernels.layout import NUM_COUNTERS
from .kernels.prefill import SparsePrefill
from .kernels.shape import Shape
from .kernels.work_list import Limits
from .shadow import LayerShadow
from .step_plan import StepPlan

logger = logging.getLogger("vllm.s2o")

PLAIN = ("auto", "float16", "bfloat16")  # vLLM's names of caches in the queries' dtype
FP8 = ("fp8", "fp8_e4m3")  # and of the quantised ones that the kernels read


class SparseImpl:
    """Mixin for an attention implementation.

    Attributes:
        s2o_reason: why this layer cannot go sparse (a metric's label), or None.
        s2o_limits: what one launch of this layer handles.
        s2o_decode_shape: what its sparse decode is built for.
        s2o_placed: whether the layer's name is known.
        s2o_layer: its number in the model, if its name has one.
        kv_cache_dtype: vLLM's name of what the cache holds.
    """

    s2o_reason: str | None = None
    _s2o_counters: Any = None  # a tensor, once reserved
    _s2o_decode: Any = None  # a SparseDecode, once reserved where decode is sparse
    _s2o_published: Any = None  # where it is read
    _s2o_shadow: LayerShadow | None = None  # in shadow mode, once reserved
    s2o_limits: Limits = Limits(1, 0)
    s2o_placed: bool = False
    s2o_layer: int | None = None
    kv_cache_dtype: str = "auto"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        settings = compat.settings_of(vllm_config)
        longest = vllm_config.model_config.max_model_len
        self.s2o_reason = layer_reason(self, longest) if settings else "not_configured"
        self._s2o: Any = settings
        self._s2o_operator: Any = None  # a SparsePrefill, once reserved
        self._s2o_warm = False
        if settings is not None and self.s2o_reason is None:
            self._s2o_shape = shape_of(self, vllm_config, settings)
            self.s2o_limits = self._s2o_shape.limits
            self.s2o_decode_shape = decode_shape(self._s2o_shape, settings)

    def place(self, layer: Any) -> None:
        """Learn which layer this is; vLLM does not say so when it makes the implementation.

        Its weights are loaded, scales of an fp8 cache among them: only now it is known whether
        there is one for all heads.
        """
        self.s2o_placed, self.s2o_layer = True, compat.layer_number(layer.layer_name)
        if self.s2o_reason is not None:
            return
        if self.s2o_layer in self._s2o.dense_layers:
            self.s2o_reason = "dense_layer"
        elif self.fp8 and not compat.one_scale(layer):
            self.s2o_reason = "quantized_kv_cache"

    @property
    def s2o_cold(self) -> bool:
        """Whether the layer can go sparse and has not compiled what it then launches."""
        return self._s2o is not None and self.s2o_reason is None and not self._s2o_warm

    @property
    def fp8(self) -> bool:
        """Whether the cache holds e4m3 numbers, whose scales are the layer's."""
        return self.kv_cache_dtype in FP8

    def reserve(self, query: torch.Tensor) -> None:
        """Make the operator and its workspace, so that vLLM's memory profile sees them.

        Args:
            query: ``[tokens, heads, head_size]``; its dtype and device are read.

        Raises:
            RuntimeError: if the device has no room for them.
        """
        if self._s2o_operator is not None:
            return
        try:
            self._reserve(query)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                "s2o: no memory for the workspaces of sparse attention, which need less with a "
                "lower --max-model-len, --max-num-batched-tokens or --s2o-decode-requests: "
                + str(error).split(". GPU")[0]
            ) from None

    def _reserve(self, query: torch.Tensor) -> None:
        of_layer = {
            "scale": self.scale,  # type: ignore[attr-defined]
            "softcap": self.logits_soft_cap or 0.0,  # type: ignore[attr-defined]
            "sinks": self.sinks,  # type: ignore[attr-defined]
        }
        self._s2o_operator = SparsePrefill(
            self._s2o_shape,
            query.dtype,
            query.device,
            stop_threshold=self._s2o.stop_threshold,
            **of_layer,
        )
        if self._s2o.decodes:
            self._s2o_decode = SparseDecode(
                self.s2o_decode_shape, query.dtype, query.device, **of_layer
            )
        self._s2o_counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=query.device)
        self._s2o_published = metrics.worker.watch(self._s2o_counters, self.s2o_layer)
        if self._s2o.shadow_rate > 0:
            self._s2o_shadow = LayerShadow(self.s2o_layer, query.device)

    def warm_up(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        dtype: torch.dtype,
    ) -> None:
        """Compile every kernel before the server is ready, for queries in ``dtype``.

        vLLM runs dummy batches over the real cache before it reports healthy; the first of
        them comes here. Nothing may compile while a graph is being captured.

        Args:
            query: ``[tokens, heads, head_size]``, in ``dtype`` or e4m3.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``.
            attn_metadata: the parent's; its ``block_table`` is int32 ``[rows, max_blocks]``.
            dtype: of the model.
        """
        if query.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        from .kernels.compilations import compile_with

        self._s2o_warm = True
        quantised, query = in_both(query, dtype)
        self.reserve(query)
        arguments = (query, as_numbers(kv_cache), attn_metadata.block_table)

        def launch() -> None:
            self._s2o_operator.warm_up(*arguments, quantised)
            if self._s2o_decode is not None:
                self._s2o_decode.warm_up(*arguments)

        refused = compile_with(launch)
        if refused is not None:
            logger.warning(
                "S2O: kernels were compiled without Triton's cache, which cannot be written (%s): "
                "every start compiles them again", refused,
            )  # fmt: skip

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; the arguments are vLLM's own (tokens first, ``[tokens, heads, head_dim]``).

        ``key`` and ``value`` are None where a fused operation has already written the cache.
        """
        if not self.s2o_placed:
            self.place(layer)
        scales = (output_scale, output_block_scale)
        if self.s2o_reason is None and attn_metadata is None:
            self.reserve(query.to(output.dtype))  # a copy that is in the profile, too
        elif self.s2o_reason is None and not self._s2o_warm:
            self.warm_up(query, kv_cache, attn_metadata, output.dtype)
        plan: StepPlan | None = getattr(attn_metadata, "s2o", None)
        if plan is None or self.s2o_reason is not None:
            return super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, *scales
            )
        for part in plan.dense:
            rows = slice(*part.tokens)
            own = [None if one is None else one[rows] for one in (key, value)]
            super().forward(  # type: ignore[misc]
                layer, query[rows], *own, kv_cache, part.metadata, output[rows], *scales
            )
        tokens = attn_metadata.num_actual_tokens
        kv_scales = compat.kv_scales(layer, query.dtype) if self.fp8 else {}
        given = query
        quantised, query = in_both(query[:tokens], output.dtype)
        self.reserve(query)
        cache, table = self.sparse_cache(as_numbers(kv_cache), attn_metadata.block_table, plan)
        result = (output[:tokens], self._s2o_counters)
        for number, work in enumerate(plan.work):
            self._s2o_operator(
                query, cache, table, work, *result, **kv_scales, query_e4m3=quantised
            )
            if number in plan.snapshots:
                self._s2o_decode.take(
                    plan.snapshots[number], query, cache, table, work,
                    k_scale=kv_scales.get("k_scale", 1.0),
                )  # fmt: skip
        if plan.decode is not None:
            self._s2o_decode(query, cache, table, plan.decode, *result, **kv_scales)
        if self._s2o_published is not self._s2o_counters:
            self._s2o_published.copy_(self._s2o_counters, non_blocking=True)
        if plan.shadow is not None and self._s2o_shadow is not None:
            sampled = output[plan.shadow.tokens]
            again = torch.empty_like(sampled)
            super().forward(  # type: ignore[misc]
                layer, at(given, plan.shadow.tokens), None, None, kv_cache, plan.shadow.metadata,
                again, *scales,
            )  # fmt: skip
            self._s2o_shadow.add(sampled, again)
        return output

    def sparse_cache(
        self, kv_cache: torch.Tensor, block_table: torch.Tensor, plan: StepPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cache as ``[blocks, kv_heads, block_size, 2 * head_dim]`` and its table."""
        return kv_cache, block_table


def at(query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return some tokens of a query; PyTorch need not know how to index e4m3 numbers.

    Args:
        query: ``[tokens, heads, head_size]``, any dtype.
        tokens: int64 ``[n]``.

    Returns:
        ``[n, heads, head_size]``.
    """
    if query.dtype.itemsize == 1:
        return query.view(torch.uint8)[tokens].view(query.dtype)
    return query[tokens]


def in_both(query: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return a query ``[tokens, heads, head_size]`` in e4m3 if it is, else None; and in ``dtype``.

    The query of a layer with an fp8 cache is quantised where the parent takes it so.
    """
    return query if query.dtype.itemsize == 1 else None, query.to(dtype)


def as_numbers(kv_cache: torch.Tensor) -> torch.Tensor:
    """Return a cache, of any shape, in the dtype that it holds: vLLM stores e4m3 as uint8."""
    return kv_cache.view(torch.float8_e4m3fn) if kv_cache.dtype == torch.uint8 else kv_cache


def shape_of(impl: Any, vllm_config: Any, settings: S2OConfig) -> Shape:
    """Return what a layer's operator must be built for."""
    return Shape(
        heads=impl.num_heads,
        kv_heads=impl.num_kv_heads,
        head_dim=impl.head_size,
        max_history=vllm_config.model_config.max_model_len,
        max_queries=vllm_config.scheduler_config.max_num_batched_tokens,
        segment=settings.segment,
        ranking=settings.ranking,
    )


def decode_shape(shape: Shape, settings: S2OConfig) -> DecodeShape:
    """Return what a layer's sparse decode must be built for."""
    return DecodeShape(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_history=shape.max_history,
        requests=settings.decode_requests,
        budget=settings.decode_budget,
    )


def layer_window(impl: Any) -> int | None:
    """Return the tokens of a layer's sliding window, the query among them; None without one."""
    window = impl.sliding_window
    if isinstance(window, tuple):  # FlashAttention's: how far back, and ahead
        window = window[0] + 1
    return window if window is not None and window > 0 else None


def layer_reason(impl: Any, longest: int) -> str | None:
    """Return why a layer cannot go sparse, as a short label, or None.

    Args:
        impl: of the layer.
        longest: tokens of a request, at most: a window that none fills is full attention.
    """
    from vllm.v1.attention.backend import AttentionType

    from .kernels.tiles import HEAD_DIMS

    window = layer_window(impl)
    if window is not None and window < longest:
        return "sliding_window"
    if impl.attn_type != AttentionType.DECODER:
        return "not_decoder"
    if impl.alibi_slopes is not None:
        return "alibi"
    if impl.kv_cache_dtype not in PLAIN + FP8:
        return "quantized_kv_cache"
    if impl.head_size not in HEAD_DIMS:
        return "head_dim"
    return None
