"""Exact attention in pieces: a segment of queries, its history, and merging partial softmaxes.

All arithmetic is fp32. A *segment* is a run of queries; its *history* is everything before it
and is causally visible to all of them (S2O, section on segments).
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .capture import LayerCapture

T = TypeVar("T")
MEMO_ENTRIES = 12  # intermediates kept per segment; the largest is [H, S/32, T] fp32


class Partial(NamedTuple):
    """Attention over a part of the keys.

    Attributes:
        out: normalised output [..., D].
        lse: log of the part's softmax mass [...].
    """

    out: Tensor
    lse: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Partial:
    """Attend to a set of keys.

    Args:
        q: [R, D].
        k: [N, D].
        v: [N, D].
        scale: factor on q·k.
        bias: added to the scores, broadcast to [R, N].

    Returns:
        Output [R, D] and log mass [R]; an empty set has log mass -inf.
    """
    if k.shape[0] == 0:
        return Partial(torch.zeros_like(q), q.new_full(q.shape[:1], float("-inf")))
    s = (q @ k.T).mul_(scale)
    if bias is not None:
        s += bias
    top = s.amax(1, keepdim=True)
    p = s.sub_(top).exp_()
    mass = p.sum(1, keepdim=True)
    return Partial((p @ v) / mass, (top + mass.log())[:, 0])


def merge(a: Partial, b: Partial) -> Partial:
    """Combine attention over two disjoint sets of keys."""
    lse = torch.logaddexp(a.lse, b.lse)
    weight_a = (a.lse - lse).exp()[..., None]
    weight_b = (b.lse - lse).exp()[..., None]
    return Partial(a.out * weight_a + b.out * weight_b, lse)


class Segment:
    """Queries of one segment, its history, and what dense attention gives.

    Attributes:
        layer: index of the layer.
        start: position of the first query, which is the history's length T.
        scale: factor on q·k.
        q: queries [H, S, D] fp32.
        k: keys of the history [Hkv, T, D] fp32.
        v: values of the history [Hkv, T, D] fp32.
        own_k: keys of the segment itself [Hkv, S, D] fp32.
        own_v: values of the segment itself [Hkv, S, D] fp32.
        past_q: queries of the history [H, T, D], in the captured dtype.
    """

    def __init__(self, data: LayerCapture, start: int, length: int):
        end = start + length
        if not 0 < start < end <= data.q.shape[1]:
            raise ValueError(f"A segment of {length} at {start} does not fit the capture.")
        self.layer, self.start, self.scale = data.layer, start, data.scale
        self.q = data.q[:, start:end].float()
        self.k, self.v = data.k[:, :start].float(), data.v[:, :start].float()
        self.own_k, self.own_v = data.k[:, start:end].float(), data.v[:, start:end].float()
        self.past_q = data.q[:, :start]
        self._memo: OrderedDict[Hashable, object] = OrderedDict()

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self.q.shape[0]

    @property
    def kv_heads(self) -> int:
        """Key/value heads Hkv."""
        return self.k.shape[0]

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def length(self) -> int:
        """Queries of the segment, S."""
        return self.q.shape[1]

    @property
    def history(self) -> int:
        """Tokens of the history, T."""
        return self.k.shape[1]

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return an intermediate that several methods share, made at most once while kept."""
        if key not in self._memo:
            self._memo[key] = make()
            if len(self._memo) > MEMO_ENTRIES:
                self._memo.popitem(last=False)
        self._memo.move_to_end(key)
        return self._memo[key]  # type: ignore[return-value]

    @cached_property
    def own(self) -> Partial:
        """Causal attention of the segment to itself: [H, S, D], [H, S]."""
        mask = self.q.new_full((self.length, self.length), float("-inf")).triu(1)
        return self._by_head(self.own_k, self.own_v, mask)

    @cached_property
    def past(self) -> Partial:
        """Dense attention to the whole history: [H, S, D], [H, S]."""
        return self._by_head(self.k, self.v, None)

    @cached_property
    def dense(self) -> Partial:
        """Dense causal attention, the truth: [H, S, D], [H, S]."""
        return merge(self.own, self.past)

    def _by_head(self, k: Tensor, v: Tensor, bias: Tensor | None) -> Partial:
        parts = [
            attend(self.q[h], k[h // self.group], v[h // self.group], self.scale, bias)
            for h in range(self.heads)
        ]
        return Partial(torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts]))
