"""Capture: queries, keys and values of chosen layers of a real model on a real text.

The model runs once, in chunks with a KV cache as a server would, and ends after the last
wanted layer. What is stored is what attention sees: after the rotary embedding, before the
GQA group is expanded. Every method is then judged on the same files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm

ATTENTION = "s2o_capture"  # the name under which transformers finds our attention function
CHARACTERS_PER_TOKEN = 8  # more than any text here needs; saves tokenising a whole book
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HALF = (torch.bfloat16, torch.float16)  # dtypes that FlashAttention takes


class CaptureError(ValueError):
    """A capture that cannot be made; the message is one sentence for the user."""


@dataclass(frozen=True)
class CaptureSpec:
    """What to capture.

    Attributes:
        model: folder of a Hugging Face model.
        text: UTF-8 text file; its first ``context`` tokens are the prompt.
        context: prompt length in tokens.
        layers: layers to store.
        yarn: factor of the YaRN position scaling; 1 leaves the model as it is.
        chunk: tokens of one forward pass.
        dtype: ``bf16`` or ``fp32``, of the model and of the stored tensors.
    """

    model: Path
    text: Path
    context: int
    layers: tuple[int, ...]
    yarn: float = 1.0
    chunk: int = 1024
    dtype: str = "bf16"

    def folder(self, cache: Path) -> Path:
        """Return the folder of this capture's files, one per layer."""
        scaled = "" if self.yarn == 1.0 else f"-yarn{self.yarn:g}"
        return cache / self.model.name / f"{self.text.stem}-{self.context}{scaled}-{self.dtype}"

    def file(self, cache: Path, layer: int) -> Path:
        """Return the file of one layer."""
        return self.folder(cache) / f"layer_{layer:03d}.safetensors"


@dataclass
class LayerCapture:
    """One layer's attention inputs, after the rotary embedding.

    Attributes:
        layer: index of the layer.
        q: queries [H, N, D].
        k: keys [Hkv, N, D].
        v: values [Hkv, N, D].
        scale: factor on q·k.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


class Recorder:
    """An attention function for transformers that stores its inputs and then attends."""

    def __init__(self, layers: Sequence[int], context: int, device: torch.device):
        self.layers = frozenset(layers)
        self.last = max(layers)
        self.context = context
        self.mask = torch.empty(0, 0, dtype=torch.bool, device=device)
        self.queries: dict[int, Tensor] = {}
        self.done: dict[int, LayerCapture] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Store and attend.

        Args:
            module: the layer's attention module; names the layer.
            query: [1, H, C, D] of this chunk.
            key: [1, Hkv, P + C, D], the chunk and all before it.
            value: as ``key``.
            attention_mask: ignored; the chunk is causal behind its past.
            scaling: factor on q·k; default D^-½.
            **kwargs: what else transformers passes.

        Returns:
            Output [1, C, H, D] and no weights.
        """
        if kwargs.get("sliding_window"):
            raise CaptureError("Models with a sliding window are not supported.")
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        _, heads, count, dim = query.shape
        total = key.shape[2]
        scale = dim**-0.5 if scaling is None else scaling
        if layer in self.layers:
            if layer not in self.queries:
                self.queries[layer] = query.new_empty(heads, self.context, dim)
            self.queries[layer][:, total - count : total] = query[0]
            if total == self.context:
                self.done[layer] = LayerCapture(
                    layer, self.queries.pop(layer), key[0], value[0], scale
                )
        if layer == self.last:  # its output is not needed
            return query.new_zeros(1, count, heads, dim), None
        out = F.scaled_dot_product_attention(
            query, key, value, scale=scale, enable_gqa=True, **self.causal(query, total)
        )
        return out.transpose(1, 2), None

    def causal(self, query: Tensor, total: int) -> dict[str, Any]:
        """Return the options of a chunk's causal attention, a mask tensor only where one is needed.

        Args:
            query: [1, H, C, D] of the chunk.
            total: tokens of the chunk and of all before it.
        """
        count = query.shape[2]
        if count == total:
            return {"is_causal": True}
        if query.is_cuda and query.dtype in HALF:  # FlashAttention aligns queries to the last keys
            return {"attn_mask": causal_lower_right(count, total)}
        if self.mask.shape != (count, total):
            ones = torch.ones(count, total, dtype=torch.bool, device=query.device)
            self.mask = ones.tril(total - count)
        return {"attn_mask": self.mask}


def read_tokens(tokenizer: Any, text: Path, count: int) -> Tensor:
    """Return the first ``count`` token ids [count] of a text file."""
    content = text.read_text(encoding="utf-8")
    for characters in (CHARACTERS_PER_TOKEN * count, len(content)):
        ids = tokenizer(content[:characters], add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            return torch.tensor(ids[:count])
    raise CaptureError(f"{text} has {len(ids)} tokens, fewer than the context of {count}.")


def check(spec: CaptureSpec) -> None:
    """Raise CaptureError where the spec names something that is not there."""
    if not (spec.model / "config.json").is_file():
        raise CaptureError(f"There is no model at {spec.model} (no config.json).")
    if not spec.text.is_file():
        raise CaptureError(f"There is no text file {spec.text}.")
    if spec.context < 1:
        raise CaptureError(f"The context must be at least 1 token, not {spec.context}.")


def load_model(spec: CaptureSpec, device: torch.device) -> Any:
    """Load the decoder without its head and without the layers behind the last wanted one."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(spec.model)
    if not 0 <= min(spec.layers) <= max(spec.layers) < config.num_hidden_layers:
        raise CaptureError(
            f"Layers must be between 0 and {config.num_hidden_layers - 1}, "
            f"not {', '.join(map(str, spec.layers))}."
        )
    if spec.yarn != 1.0:
        native = config.max_position_embeddings
        config.rope_parameters = dict(config.rope_parameters) | {
            "rope_type": "yarn",
            "factor": spec.yarn,
            "original_max_position_embeddings": native,
        }
        config.max_position_embeddings = int(native * spec.yarn)
    config.num_hidden_layers = max(spec.layers) + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = AutoModel.from_pretrained(
        spec.model, config=config, dtype=DTYPES[spec.dtype], attn_implementation=ATTENTION
    )
    return model.to(device).eval()


@torch.inference_mode()
def record(spec: CaptureSpec, device: str = "cpu") -> dict[int, LayerCapture]:
    """Run the model once and return the attention inputs of every wanted layer, on the device.

    Raises:
        CaptureError: if the spec names something that is not there.
    """
    check(spec)
    from transformers import AttentionInterface, AutoTokenizer

    torch.manual_seed(0)
    target = torch.device(device)
    recorder = Recorder(spec.layers, spec.context, target)
    AttentionInterface.register(ATTENTION, recorder)
    ids = read_tokens(AutoTokenizer.from_pretrained(spec.model), spec.text, spec.context)
    model = load_model(spec, target)
    past = None
    with tqdm(total=spec.context, desc=f"capture {spec.model.name}", unit="token") as bar:
        for start in range(0, spec.context, spec.chunk):
            part = ids[start : start + spec.chunk].to(target)
            past = model(input_ids=part[None], past_key_values=past, use_cache=True).past_key_values
            bar.update(len(part))
    done, recorder.done = recorder.done, {}  # transformers keeps the recorder
    return done


def capture(spec: CaptureSpec, cache: Path, device: str = "cpu") -> None:
    """Write the files of every wanted layer that is not cached yet.

    Args:
        spec: what to capture.
        cache: folder that holds captures.
        device: where the model runs.
    """
    check(spec)
    missing = [layer for layer in spec.layers if not spec.file(cache, layer).is_file()]
    if not missing:
        return
    done = record(replace(spec, layers=tuple(missing)), device)
    spec.folder(cache).mkdir(parents=True, exist_ok=True)
    for layer, data in done.items():
        tensors = {"q": data.q, "k": data.k, "v": data.v, "scale": torch.tensor(data.scale)}
        path = spec.file(cache, layer)
        partial = path.with_suffix(".part")
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial)
        partial.rename(path)


def load(spec: CaptureSpec, cache: Path, layer: int, device: str = "cpu") -> LayerCapture:
    """Read one captured layer to a device, in the stored dtype."""
    data = load_file(spec.file(cache, layer), device)
    return LayerCapture(layer, data["q"], data["k"], data["v"], float(data["scale"]))
