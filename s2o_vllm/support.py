"""Why S2O refuses a configuration, and why a step stays dense."""

from typing import Any

from .config import S2OConfig

# Why prefill, or a step of sparse decode, takes the stock path: the label `reason` of
# `s2o:dense_rows`. `docs/metrics.md` says what to do about each.
DENSE_REASONS = {
    "short_history": "the history is shorter than min_context or min_budget_tokens",
    "few_new_tokens": "the chunk has so few new tokens that ranking costs more than it saves",
    "end_of_prompt": "the last tokens of a prompt attend to all of it",
    "budget_is_one": "the request or the server has a sparsity budget of 1",
    "shadow_limit": "the sampled error is above shadow_limit",
    "no_decode_state": "no request state of sparse decode was free, or it does not fit",
    "dense_layer": "dense_layers names the layer",
    "sliding_window": "the layer attends to a sliding window",
    "not_decoder": "the layer is no causal self-attention",
    "local_chunks": "the layer attends to the query's chunk alone, or vLLM rewrites its steps",
    "alibi": "the layer has ALiBi slopes",
    "quantized_kv_cache": "the KV cache has a format or scales that S2O does not read",
    "head_dim": "no kernel has the layer's head_dim",
    "no_layers": "the KV cache group has no attention layer",
    "bidirectional_ranges": "image tokens of the step attend in both directions",
    "reference_window": "the model adds a window to the tokens that it generates",
}
# Layers of these reasons have no full causal attention: they count in no dense work.
NOT_FULL_ATTENTION = ("sliding_window", "not_decoder", "local_chunks")

# KV connectors that never hand a request what another budget computed, as vLLM 0.32 and 0.33 have
# them: the first ones key their store by vLLM's block hashes, which hold the budget as a salt; the
# others move blocks of the very request. Stores that are keyed by tokens alone do.
KEYED_BY_BLOCK_HASH = (
    "OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector"
)  # fmt: skip
OF_ONE_REQUEST = (
    "NixlConnector", "NixlPullConnector", "NixlPushConnector", "MooncakeConnector",
    "MoRIIOConnector", "DecodeBenchConnector",
)  # fmt: skip


def unsupported_model(vllm_config: Any) -> str | None:
    """Return one sentence that says why S2O cannot serve this configuration, or None."""
    from vllm import envs

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache = vllm_config.cache_config
    if model.use_mla:
        return (
            f"{model.model} uses multi-head latent attention (MLA), must be a model with GQA or MHA"
        )
    if model.runner_type != "generate":
        return f"runner is {model.runner_type!r}, must be 'generate' (decoder-only text generation)"
    if model.is_encoder_decoder:
        return f"{model.model} is an encoder-decoder model, must be decoder-only"
    window = model.get_sliding_window()
    layer_types = getattr(model.hf_text_config, "layer_types", None) or []
    if (
        window is not None
        and window < model.max_model_len  # one that no request fills is full attention
        and "full_attention" not in layer_types
    ):
        return (
            f"every layer of {model.model} has a sliding window of {window} tokens, "
            "must have layers with full attention"
        )
    if cache.user_specified_block_size and cache.block_size % 16:
        return f"block size is {cache.block_size}, must be a multiple of 16"
    if parallel.decode_context_parallel_size > 1:
        return f"decode context parallel size is {parallel.decode_context_parallel_size}, must be 1"
    if parallel.prefill_context_parallel_size > 1:
        return (
            f"prefill context parallel size is {parallel.prefill_context_parallel_size}, must be 1"
        )
    if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        return "VLLM_USE_RUST_FRONTEND is set, must be unset (it bypasses per-request settings)"
    return unsupported_store(vllm_config.kv_transfer_config)


def rewrites_steps(builder: type) -> bool:
    """Tell whether vLLM puts a builder of its own before S2O's, which then sees other rows.

    So it does with layers of local attention (Llama 4): each chunk of a request is a row there.
    """
    return builder.__module__.startswith("vllm.")


def unsupported_store(transfer: Any) -> str | None:
    """Return one sentence that says which KV connector could mix budgets, or None.

    Args:
        transfer: vLLM's ``KVTransferConfig``, or None.
    """
    if transfer is None or transfer.kv_connector is None:
        return None
    known = (*KEYED_BY_BLOCK_HASH, *OF_ONE_REQUEST)
    names = [transfer.kv_connector]
    if names == ["MultiConnector"]:
        parts = transfer.kv_connector_extra_config.get("connectors", [])
        names = [part.get("kv_connector") for part in parts]
    for name in names:
        if name not in known:
            return (
                f"KV connector is {name!r}, which may give a request keys that another sparsity "
                f"budget computed, must be one of {', '.join(known)}"
            )
    return None


def unsupported_decode(vllm_config: Any, settings: S2OConfig) -> str | None:
    """Return one sentence that says why sparse decode cannot be served so, or None."""
    if not settings.decodes:
        return None
    budget = f"decode_budget is {settings.decode_budget!r}, must be 1 with"
    if vllm_config.speculative_config is not None:
        return f"{budget} speculative decoding"
    if vllm_config.parallel_config.use_ubatching:
        # A request may change its half of the batch, and each has slots of its own.
        return f"{budget} micro-batches"
    return None


def uncounted_workers(vllm_config: Any) -> str | None:
    """Return one sentence that says which workers' counters no page will show, or None.

    Workers publish through files, which the API servers of their own machine read.
    """
    parallel = vllm_config.parallel_config
    local = parallel.data_parallel_size_local
    apart = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    if parallel.nnodes == 1 and (apart or not 0 < local < parallel.data_parallel_size):
        return None
    return "S2O: /metrics has the counters of this machine's workers alone, not of other machines'"


def dense_step_reason(common: Any) -> str | None:
    """Return why a whole step must stay dense, as a short label, or None.

    Image tokens of some models attend to one another in both directions, and some models add a
    window to the tokens they generate; causal attention over a selection would leave that out.
    """
    ranges = getattr(common, "mm_req_doc_ranges", None)
    if ranges and any(ranges.values()):
        return "bidirectional_ranges"
    if getattr(common, "rswa_prefix_lens", None) is not None:
        return "reference_window"
    return None
