"""Real heads: prompts of a benchmark's shape from the layers of a real model, and errors on them.

A model with other numbers of heads than the shape runs once over a text. Each set of tensors then
takes the KV heads of several of its layers, with as many query heads of each as the shape's group
has; all sets together cover all layers. Dense attention to the same tensors is the truth.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..quality.capture import CaptureError, CaptureSpec, LayerCapture, check, record
from .dense import Prompt, paged

Sizes = tuple[int, int, int]  # query heads, KV heads, head_dim
QUANTILE = 0.99  # of the rows' errors: all but the worst hundredth
SLAB = 8192  # queries whose errors are computed at a time


class KVHead(NamedTuple):
    """A KV head of the model."""

    layer: int
    head: int


def plan_sets(layers: int, model_heads: int, kv_heads: int) -> list[list[KVHead]]:
    """Return the KV heads of each set.

    The layers of a set are far apart. Where they do not divide evenly, the last ones of some sets
    are layers of others again.

    Args:
        layers: of the model.
        model_heads: its KV heads, which divide ``kv_heads``.
        kv_heads: of the shape.
    """
    together = kv_heads // model_heads
    sets = -(-layers // together)
    return [
        [
            KVHead((first + step * sets) % layers, head)
            for step in range(together)
            for head in range(model_heads)
        ]
        for first in range(sets)
    ]


def model_sizes(config: Any) -> Sizes:
    """Return the sizes of a transformers config's attention."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def longest_context(config: Any) -> int:
    """Return the tokens that a config's positions are made for.

    transformers 5 writes the context after scaling; older configs with YaRN the one before.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    native = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return max(config.max_position_embeddings, int(native * (rope.get("factor") or 1)))


def refuse_misfits(config: Any, shapes: dict[str, Sizes], context: int) -> None:
    """Check that heads of a model can be put together to shapes.

    Raises:
        CaptureError: naming what does not fit.
    """
    heads, kv_heads, head_dim = model_sizes(config)
    for name, (wanted, wanted_kv, wanted_dim) in shapes.items():
        if head_dim != wanted_dim:
            raise CaptureError(f"{name} has a head_dim of {wanted_dim}, the model of {head_dim}.")
        if wanted_kv % kv_heads:
            raise CaptureError(
                f"{name} has {wanted_kv} KV heads, must be a multiple of the model's {kv_heads}."
            )
        if wanted // wanted_kv > heads // kv_heads:
            raise CaptureError(
                f"{name} has {wanted // wanted_kv} query heads a KV head, "
                f"the model only {heads // kv_heads}."
            )
    if context > (longest := longest_context(config)):
        raise CaptureError(f"The model is made for {longest} tokens, not {context}.")


@dataclass
class RealHeads:
    """What attention sees of every layer of a model on a text.

    Attributes:
        model: its folder's name.
        text: the text file's name, without its suffix.
        layers: one capture each; queries ``[heads, tokens, head_dim]``.
    """

    model: str
    text: str
    layers: list[LayerCapture]

    @classmethod
    def read(
        cls, model: Path, text: Path, context: int, shapes: dict[str, Sizes], device: str
    ) -> "RealHeads":
        """Run the model once over the first ``context`` tokens of a text, in one forward pass.

        Raises:
            CaptureError: if something is not there, or the model does not fit the shapes.
        """
        check(CaptureSpec(model, text, context, (0,)))
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model)
        refuse_misfits(config, shapes, context)
        every = tuple(range(config.num_hidden_layers))
        done = record(CaptureSpec(model, text, context, every, chunk=context), device)
        layers = [done[layer] for layer in every]
        usual = model_sizes(config)[2] ** -0.5
        if any(not math.isclose(layer.scale, usual, rel_tol=1e-3) for layer in layers):
            raise CaptureError("Models whose softmax scale is not head_dim^-1/2 are not supported.")
        return cls(model.name, text.stem, layers)

    def sets(self, shape: Sizes, context: int) -> Iterator[tuple[list[KVHead], Prompt]]:
        """Yield the KV heads of each set and its prompt.

        A causal model sees in a text's first tokens what it sees of a text that ends there.

        Args:
            shape: sizes of the prompt.
            context: its tokens, at most those that were captured.
        """
        heads, kv_heads, _ = shape
        for own in plan_sets(len(self.layers), self.layers[0].k.shape[0], kv_heads):
            yield own, self.prompt(own, heads // kv_heads, context)

    def prompt(self, own: Sequence[KVHead], group: int, context: int) -> Prompt:
        """Return the prompt of some KV heads, each with its first ``group`` query heads."""
        queries, keys, values = [], [], []
        for layer, head in own:
            data = self.layers[layer]
            first = head * (data.q.shape[0] // data.k.shape[0])
            queries.append(data.q[first : first + group, :context])
            keys.append(data.k[head, None, :context])
            values.append(data.v[head, None, :context])
        return paged(*(torch.cat(x).transpose(0, 1).contiguous() for x in (queries, keys, values)))


class HeadError(NamedTuple):
    """Errors of one KV head's rows (query x head), on the device.

    Attributes:
        squared: sum of the squared differences from the truth.
        norm: sum of the truth's squares.
        rows: float32 ``[rows]``, each row's squared difference over its truth's square.
    """

    squared: Tensor
    norm: Tensor
    rows: Tensor


class Errors:
    """Errors of one setting of the operator, gathered over sets."""

    def __init__(self) -> None:
        self.heads: dict[KVHead, HeadError] = {}

    def add(self, own: Sequence[KVHead], out: Tensor, truth: Tensor, first: int) -> None:
        """Add one set.

        Args:
            own: its KV heads.
            out: ``[tokens, heads, head_dim]``, what is judged.
            truth: as ``out``, dense attention.
            first: the first token that counts.
        """
        squared, norm = (
            of_rows.unflatten(1, (len(own), -1)) for of_rows in squares(out[first:], truth[first:])
        )
        for place, head in enumerate(own):
            one, whole = squared[:, place], norm[:, place]
            rows = (one / whole.clamp(min=torch.finfo(torch.float32).tiny)).flatten()
            self.heads[head] = HeadError(one.double().sum(), whole.double().sum(), rows)

    def columns(self) -> dict[str, Any]:
        """Return the columns of a result row.

        Returns:
            ``relative_mse``, the layers' mean of ‖Ô - O‖² / ‖O‖² over all rows of a layer;
            ``relative_mse_worst_layer``; ``row_error_p99``, the 99th percentile of single rows of
            all layers; ``layers``, both of each layer.

        Raises:
            ValueError: if an output is not finite.
        """
        layers = []
        for layer in sorted({head.layer for head in self.heads}):
            own = [error for head, error in self.heads.items() if head.layer == layer]
            squared, norm = sum(float(e.squared) for e in own), sum(float(e.norm) for e in own)
            p99 = percentile(torch.cat([error.rows for error in own]), QUANTILE)
            layers.append({"layer": layer, "relative_mse": squared / norm, "row_error_p99": p99})
        every = [layer["relative_mse"] for layer in layers]
        if not all(map(math.isfinite, every)):
            raise ValueError("the output on real heads is not finite")
        return {
            "relative_mse": sum(every) / len(every),
            "relative_mse_worst_layer": max(every),
            "row_error_p99": percentile(
                torch.cat([error.rows for error in self.heads.values()]), QUANTILE
            ),
            "layers": layers,
        }


def squares(out: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖Ô - O‖² and ‖O‖² of every row, float32 ``[tokens, heads]``.

    Args:
        out: ``[tokens, heads, head_dim]``, what is judged.
        truth: as ``out``.
    """
    squared = torch.empty(truth.shape[:2], device=truth.device)
    norm = torch.empty_like(squared)
    for start in range(0, len(truth), SLAB):
        slab = slice(start, start + SLAB)
        exact = truth[slab].float()
        squared[slab] = (out[slab].float() - exact).square().sum(-1)
        norm[slab] = exact.square().sum(-1)
    return squared, norm


def relative_mse(out: Tensor, truth: Tensor) -> float:
    """Return ‖Ô - O‖² / ‖O‖² of all rows together; see :func:`squares`."""
    squared, norm = squares(out, truth)
    return float(squared.double().sum() / norm.double().sum())


def percentile(values: Tensor, quantile: float) -> float:
    """Return the smallest of values [n] that a share ``quantile`` of them does not exceed.

    `torch.quantile` takes no more than 16 million values.
    """
    return float(values.sort().values[max(0, math.ceil(quantile * len(values)) - 1)])
