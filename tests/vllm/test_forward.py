"""A layer's forward, with a parent that records what it is given."""

from types import SimpleNamespace

import pytest
import torch

from s2o_vllm.config import S2OConfig
from s2o_vllm.forward import SparseImpl
from s2o_vllm.metadata import DensePart, StepPlan


class Parent:
    def forward(self, layer, query, key, value, kv_cache, metadata, output, *scales):
        self.calls.append((key, value, metadata))
        output[:] = 1
        return output


class Impl(SparseImpl, Parent):
    """A layer that has been set up by hand: vLLM's own constructor needs a whole model."""

    def __init__(self, settings):
        self.calls, self.operated = [], []
        self._s2o, self._s2o_warm, self._s2o_counters = settings, True, None
        self._s2o_operator = lambda *arguments: self.operated.append(arguments[3])


def forward(impl, metadata, key, tokens=6, layer="model.layers.1.self_attn.attn"):
    query = torch.zeros(tokens, 2, 4)
    output = torch.zeros(tokens, 2, 4)
    value = None if key is None else key + 1
    layer = SimpleNamespace(layer_name=layer)
    return impl.forward(layer, query, key, value, torch.zeros(1), metadata, output)


def mixed_step():
    """Rows of tokens 0-1 and 4-5 are dense, the rest is sparse."""
    parts = [DensePart((0, 1), (0, 2), "first"), DensePart((2, 3), (4, 6), "last")]
    plan = StepPlan(["work"], [], parts)
    return SimpleNamespace(s2o=plan, block_table=None, num_actual_tokens=6)


def test_dense_parts_go_to_the_parent_and_the_work_to_the_operator():
    impl, key = Impl(S2OConfig()), torch.arange(6.0)
    forward(impl, mixed_step(), key)
    assert [(k.tolist(), v.tolist(), part) for k, v, part in impl.calls] == [
        ([0, 1], [1, 2], "first"),
        ([4, 5], [5, 6], "last"),
    ]
    assert impl.operated == ["work"]


def test_keys_that_a_fused_operation_has_already_cached():
    impl = Impl(S2OConfig())
    forward(impl, mixed_step(), None)
    assert impl.calls == [(None, None, "first"), (None, None, "last")]


def test_a_layer_that_cannot_go_sparse_is_the_parents():
    impl, step = Impl(S2OConfig()), mixed_step()
    impl.s2o_reason = "alibi"
    forward(impl, step, torch.zeros(6))
    assert [part for *_, part in impl.calls] == [step]
    assert impl.operated == []


@pytest.mark.parametrize(
    ("number", "dense"), [(0, True), (1, False), (2, True), (12, False), (20, False)]
)
def test_dense_layers_are_the_parents(number, dense):
    impl, step = Impl(S2OConfig(dense_layers=(0, 2))), mixed_step()
    forward(impl, step, torch.zeros(6), layer=f"language_model.model.layers.{number}.attn")
    assert (impl.s2o_reason == "dense_layer") is dense
    assert impl.operated == ([] if dense else ["work"])
    assert len(impl.calls) == (1 if dense else 2)


def test_a_layer_without_a_number_is_not_one_of_them():
    impl = Impl(S2OConfig(dense_layers=(0,)))
    impl.place("model.shared.attn")
    assert impl.s2o_reason is None


def test_another_reason_is_kept():
    impl = Impl(S2OConfig(dense_layers=(0,)))
    impl.s2o_reason = "alibi"
    impl.place("model.layers.0.attn")
    assert impl.s2o_reason == "alibi"
