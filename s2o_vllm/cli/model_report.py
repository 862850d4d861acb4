"""What S2O would do in each layer of a model: of its config alone, without weights or a GPU.

The model is built as a server builds it, on PyTorch's meta device, which holds no numbers. So every
verdict is that of the very code that serves.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import compat, support
from ..forward import layer_window
from ..support import DENSE_REASONS, NOT_FULL_ATTENTION

LONGEST = 131072  # tokens of the prompt whose arithmetic is counted, at most
SAID = 300  # characters of a refusal


@dataclass
class Layers:
    """Layers that are treated alike.

    Attributes:
        numbers: in the model; empty for layers whose names have none.
        count: how many they are.
        kind: the class of layers without attention, or vLLM's name of a backend that is not S2O's;
            else "".
        reason: why they stay dense, a key of ``DENSE_REASONS``, or None where they go sparse.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: elements of a head.
        window: tokens of a sliding window or of a chunk of local attention; None without.
    """

    numbers: list[int] = field(default_factory=list)
    count: int = 0
    kind: str = ""
    reason: str | None = None
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    window: int | None = None


@dataclass
class ModelReport:
    """A model's layers, and what its prefill costs.

    Attributes:
        architecture: the class that vLLM serves it with.
        layers: in the order of the model.
        parameters: that a token of text is multiplied with: of experts, those that it visits.
        tokens: of the prompt that ``share`` is of.
        share: of the arithmetic of its prefill, what is attention that S2O makes sparse.
        refused: one sentence that says why S2O does not serve the model, or None.
    """

    architecture: str = ""
    layers: list[Layers] = field(default_factory=list)
    parameters: float = 0.0
    tokens: int = 0
    share: float = 0.0
    refused: str | None = None

    @property
    def ceiling(self) -> float:
        """How many times sooner the first token would come if that attention took no time."""
        return 1 / (1 - self.share)


def examine_model(model: str, tokens: int = LONGEST) -> ModelReport:
    """Build a model without weights and ask each of its layers.

    Args:
        model: a folder with a config, its ``config.json``, or a name that vLLM can resolve.
        tokens: of the prompt, at most; the model's own limit if that is less.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from .. import plugin

    if Path(model).name == "config.json" and Path(model).is_file():
        model = str(Path(model).parent)
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        return ModelReport(refused=f"There is no config.json in {model}.")
    plugin.register()
    try:
        vllm_config, built = _build(model)
    except Exception as error:  # whatever vLLM's many models raise is the answer
        return ModelReport(refused=_sentence(error))
    config = vllm_config.model_config
    report = ModelReport(config.architecture, tokens=min(tokens, config.max_model_len))
    report.layers = grouped(vllm_config.compilation_config.static_forward_context)
    report.parameters = visited_parameters(built)
    report.share = sparse_share(report.layers, report.parameters, report.tokens)
    return report


def _build(model: str) -> tuple[Any, Any]:
    """Return the configuration and the model, on the meta device."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    given: dict[str, Any] = {"attention_backend": "s2o", "load_format": "dummy"}
    arguments = EngineArgs(model=model, skip_tokenizer_init=True, enforce_eager=True, **given)
    vllm_config: Any = arguments.create_engine_config()
    kept = torch.get_default_dtype()
    with set_current_vllm_config(vllm_config), tempfile.TemporaryDirectory() as folder:
        # Layers ask for their groups of processes: here of one.
        store = f"file://{folder}/store"
        parallel_state.init_distributed_environment(1, 0, store, 0, backend="gloo")
        parallel_state.initialize_model_parallel(1, 1)
        torch.set_default_dtype(vllm_config.model_config.dtype)
        try:
            with torch.device("meta"):
                return vllm_config, initialize_model(vllm_config)
        finally:
            torch.set_default_dtype(kept)
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def _sentence(error: Exception) -> str:
    """Return what an exception says in one line: S2O's own sentence where it holds one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = next((line for line in lines if "s2o: " in line), None)
    if own is None:
        said = f"vLLM cannot build it here: {type(error).__name__}: {lines[0] if lines else ''}"
    else:
        said = own[own.find("s2o: ") + 5 :]
    return said.partition(" [type=")[0][:SAID]


def grouped(layers: dict[str, Any]) -> list[Layers]:
    """Group vLLM's layers that hold a state of requests by what S2O does in them."""
    groups: dict[tuple[Any, ...], Layers] = {}
    for name, layer in layers.items():
        impl: Any = getattr(layer, "impl", None)
        if not hasattr(layer, "get_kv_cache_spec"):
            continue  # experts, and others without a state
        one = Layers(kind=type(layer).__name__)
        if impl is not None:
            one = Layers(
                heads=impl.num_heads, kv_heads=impl.num_kv_heads, head_dim=impl.head_size,
                window=layer_window(impl) or getattr(layer, "attention_chunk_size", None),
            )  # fmt: skip
        if hasattr(impl, "s2o_reason"):
            impl.place(layer)
            one.reason = impl.s2o_reason
            if support.rewrites_steps(layer.get_attn_backend().get_builder_cls()):
                one.reason = one.reason or "local_chunks"
        elif impl is not None:
            one.kind = layer.get_attn_backend().get_name()
        key = (one.kind, one.reason, one.heads, one.kv_heads, one.head_dim, one.window)
        group = groups.setdefault(key, one)
        group.count += 1
        number = compat.layer_number(name)
        group.numbers += [] if number is None else [number]
    return list(groups.values())


def visited_parameters(model: Any) -> float:
    """Return the parameters that a token of text is multiplied with: of experts, those it visits.

    Embeddings are looked up; the head's logits are made of a prompt's last token alone.
    """
    if hasattr(model, "get_language_model"):  # beside an encoder of images
        model = model.get_language_model()
    visited: dict[int, float] = {}
    for module in model.modules():
        if hasattr(module, "routed_experts"):
            experts = module.moe_config
            share = experts.experts_per_token / experts.num_experts
            visited |= {id(one): share for one in module.routed_experts.parameters()}
    return sum(
        parameter.numel() * visited.get(id(parameter), 1.0)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and not {"embed_tokens", "lm_head", "wte"} & set(name.split("."))
    )


def sparse_share(layers: Iterable[Layers], parameters: float, tokens: int) -> float:
    """Return the share of a prefill's arithmetic that is attention which S2O makes sparse.

    A causal layer multiplies 4 * head_dim numbers for each head, query and key that it sees, half
    of all pairs; a window sees its tokens. The rest are two operations a parameter and token.
    """
    sparse, others = 0.0, 2.0 * parameters * tokens
    for group in layers:
        seen = tokens / 2 if group.window is None else min(group.window, tokens / 2)
        work = 4.0 * group.count * group.heads * group.head_dim * tokens * seen
        if group.reason is None and not group.kind:
            sparse += work
        else:
            others += work
    return sparse / (sparse + others) if sparse else 0.0


def ranges(numbers: Sequence[int]) -> str:
    """Return numbers as people write them: ``0 to 4, 6``; ``3, 7, 11, ... 47`` for even steps."""
    steps = {after - before for before, after in pairwise(numbers)}
    if len(steps) == 1 and len(numbers) > 4 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, {numbers[2]}, ... {numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    return ", ".join(shown if len(shown) < 8 else [*shown[:3], "...", shown[-1]])


def rows(report: ModelReport) -> list[tuple[str, str]]:
    """Return the report for people: a name and a text each."""
    if report.refused:
        return [("model", f"refused: {report.refused}")]
    found = [("model", f"{report.architecture}, {report.parameters / 1e9:.1f} billion parameters "
              "a token is multiplied with")]  # fmt: skip
    for group in report.layers:
        which = f"{group.count} layers" + (f" ({ranges(group.numbers)})" if group.numbers else "")
        heads = f"{group.heads} query heads over {group.kv_heads}, head_dim {group.head_dim}"
        if group.kind:
            why = "attention by a backend of its own" if group.heads else "no attention"
            found.append(("  layers", f"{which}: left alone, {why} ({group.kind})"))
        elif group.reason is None:
            found.append(("  layers", f"{which}: sparse; {heads}"))
        else:
            own = f", {group.window} tokens" if group.reason in NOT_FULL_ATTENTION else ""
            why = DENSE_REASONS.get(group.reason, group.reason)
            found.append(("  layers", f"{which}: dense, {why} ({group.reason}{own}); {heads}"))
    gain = (
        f"of {report.tokens:,} tokens, {report.share:.0%} of the arithmetic is attention that S2O "
        f"makes sparse: were it free, the first token would come {report.ceiling:.1f}x sooner"
    )
    found.append(("  prefill", gain if report.share else "no layer goes sparse: serve it stock"))
    return found
