"""What a GPU worker does before it is ready: every kernel compiles; later compilations are logged.

vLLM's own functions that this relies on are named here, as in :mod:`compat`.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

from . import metrics
from .wrapping import wrap

logger = logging.getLogger("vllm.s2o")

WORKER = "vllm.v1.worker.gpu_worker"
TOKENS = 16  # of the batch that warms up, or fewer where a server takes fewer requests at once

_watching = False


def install() -> None:
    """Follow this worker's start; called when its first builder is made."""
    if WORKER in sys.modules:
        module = sys.modules[WORKER]
        wrap(module, "kernel_warmup", _kernel_warmup)
        wrap(module.Worker, "compile_or_warm_up_model", _compile_or_warm_up_model)


def cold_layers(vllm_config: Any) -> list[Any]:
    """Return the implementations of layers that can go sparse and have compiled nothing."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    impls = [getattr(layer, "impl", None) for layer in layers]
    return [impl for impl in impls if getattr(impl, "s2o_cold", False)]


def _kernel_warmup(original: Callable, worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a batch with attention where none of vLLM's has one before the server is ready.

    A layer compiles in its first such batch. vLLM runs them to capture graphs of whole steps: an
    eager server has none, nor one with piecewise graphs alone.
    """
    result = original(worker, *args, **kwargs)
    if kwargs.get("process_local_only") or not cold_layers(worker.vllm_config):
        return result
    from vllm.config import CUDAGraphMode

    scheduler = worker.vllm_config.scheduler_config
    worker.model_runner._dummy_run(
        min(TOKENS, scheduler.max_num_seqs, scheduler.max_num_batched_tokens),
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        force_attention=True,
        skip_eplb=True,
    )
    return result


def _compile_or_warm_up_model(original: Callable, self: Any) -> Any:
    result = original(self)
    ready(self.vllm_config)
    return result


def ready(vllm_config: Any) -> None:
    """Count and log what compiles from now on, and say so where something will."""
    global _watching
    cold = cold_layers(vllm_config)
    if cold:
        logger.warning(
            "S2O: %d layers have compiled no kernel: their first sparse request will wait for it",
            len(cold),
        )
    if not _watching:
        from .kernels import compilations

        compilations.watch(late)
        _watching = True


def late(kernel: str) -> None:
    """Count and log a kernel that was compiled while requests waited."""
    metrics.worker.add("s2o:late_compilations", 1)
    logger.warning("S2O: kernel %s was compiled after the server was ready", kernel)
