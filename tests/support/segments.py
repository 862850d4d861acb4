"""Fixtures: small captures that tests of quality and research write by hand or at random."""

import pytest
import torch

from s2o_vllm.benchmarks.quality.attention import Segment
from s2o_vllm.benchmarks.quality.capture import LayerCapture


@pytest.fixture
def make_segment():
    """Random layer whose last ``length`` queries are the segment; parts can be replaced."""

    def make(heads=4, kv_heads=2, history=256, length=64, dim=16, seed=0, q=None, k=None, v=None):
        generator = torch.Generator().manual_seed(seed)
        total = history + length
        data = LayerCapture(
            0,
            torch.randn(heads, total, dim, generator=generator),
            torch.randn(kv_heads, total, dim, generator=generator),
            torch.randn(kv_heads, total, dim, generator=generator),
            dim**-0.5,
        )
        if q is not None:
            data.q[:, history:] = q
        if k is not None:
            data.k[:, :history] = k
        if v is not None:
            data.v[:, :history] = v
        return Segment(data, history, length)

    return make


@pytest.fixture
def one_direction(make_segment):
    """Segment of one head whose queries all point at e0, so that k[:, 0] is every token's logit."""

    def make(logits, length=32, **changes):
        history, dim = len(logits), 4
        q = torch.zeros(1, length, dim)
        q[..., 0] = dim**0.5  # scale is dim^-1/2
        k = torch.zeros(1, history, dim)
        k[..., 0] = torch.as_tensor(logits, dtype=torch.float)
        shape = {"heads": 1, "kv_heads": 1, "history": history, "length": length, "dim": dim}
        return make_segment(**shape, q=q, k=k, **changes)

    return make
