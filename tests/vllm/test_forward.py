"""A layer's forward, with a parent that records what it is given."""

from types import SimpleNamespace

import pytest
import torch

from s2o_vllm.config import S2OConfig
from s2o_vllm.forward import SparseImpl, layer_reason
from s2o_vllm.step_plan import DensePart, StepPlan


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
        self.given = []
        self._s2o_operator = self.operate

    def operate(self, query, kv_cache, table, work, out, counters, *, query_e4m3, **kv_scales):
        self.operated.append(work)
        self.given.append((query, query_e4m3, kv_cache, kv_scales))


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


def fp8_layer(scales=(2.0, 3.0, 5.0), heads=1):
    """A layer with scales of its queries, keys and values, as vLLM keeps them."""
    named = dict(zip("qkv", scales, strict=True))
    return SimpleNamespace(
        layer_name="model.layers.1.self_attn.attn",
        **{f"_{part}_scale": torch.full((heads,), scale) for part, scale in named.items()},
        **{f"_{part}_scale_float": scale for part, scale in named.items()},
    )


def forward_fp8(layer, kv_cache_dtype, quantised_query):
    impl = Impl(S2OConfig())
    impl.kv_cache_dtype = kv_cache_dtype
    query, output = torch.ones(6, 2, 4), torch.zeros(6, 2, 4)
    if quantised_query:
        query = query.to(torch.float8_e4m3fn)
    cache = torch.zeros(3, 1, 16, 8, dtype=torch.uint8 if impl.fp8 else torch.float32)
    impl.forward(layer, query, query, query, cache, mixed_step(), output)
    return impl


@pytest.mark.parametrize(("quantised_query", "k_scale"), [(True, 6.0), (False, 3.0)])
def test_an_fp8_layer_gives_its_scales_to_the_operator(quantised_query, k_scale):
    """A query that comes in fp8 counts in units of its own scale, and goes on as it is, too."""
    impl = forward_fp8(fp8_layer(), "fp8", quantised_query)
    ((query, query_e4m3, cache, kv_scales),) = impl.given
    assert (query.dtype, cache.dtype) == (torch.float32, torch.float8_e4m3fn)
    if quantised_query:
        assert query_e4m3.dtype == torch.float8_e4m3fn
        assert torch.equal(query_e4m3.float(), query)
    else:
        assert query_e4m3 is None
    assert kv_scales == {"k_scale": k_scale, "v_scale": 5.0}
    key, *_ = impl.calls[0]
    assert (key.dtype == torch.float8_e4m3fn) is quantised_query, "the parent's rows stay as given"


def test_scales_beside_a_cache_that_is_not_quantised_are_not_applied():
    impl = forward_fp8(fp8_layer(), "bfloat16", False)
    ((_, query_e4m3, cache, kv_scales),) = impl.given
    assert (query_e4m3, cache.dtype, kv_scales) == (None, torch.float32, {})


def test_an_fp8_layer_with_a_scale_for_each_head_is_the_parents():
    impl = forward_fp8(fp8_layer(heads=2), "fp8_e4m3", True)
    assert impl.s2o_reason == "quantized_kv_cache"
    assert impl.operated == []


@pytest.mark.parametrize(
    ("kv_cache_dtype", "reason"),
    [
        ("auto", None), ("bfloat16", None), ("fp8", None), ("fp8_e4m3", None),
        ("fp8_e5m2", "quantized_kv_cache"), ("nvfp4", "quantized_kv_cache"),
        ("fp8_per_token_head", "quantized_kv_cache"),
    ],
)  # fmt: skip
def test_which_caches_go_sparse(kv_cache_dtype, reason):
    from vllm.v1.attention.backend import AttentionType

    impl = SimpleNamespace(
        sliding_window=None, attn_type=AttentionType.DECODER, alibi_slopes=None, sinks=None,
        head_size=128, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    assert layer_reason(impl, 4096) == reason


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        (None, None), (-1, None), ((-1, -1), None), ((1023, 0), "sliding_window"),
        ((4094, 0), "sliding_window"), ((4095, 0), None), (4096, None), (262144, None),
    ],
)  # fmt: skip
def test_a_window_that_no_request_fills_is_full_attention(window, reason):
    from vllm.v1.attention.backend import AttentionType

    impl = SimpleNamespace(
        sliding_window=window, attn_type=AttentionType.DECODER, alibi_slopes=None, sinks=None,
        head_size=128, kv_cache_dtype="auto",
    )  # fmt: skip
    assert layer_reason(impl, 4096) == reason


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
    impl.place(SimpleNamespace(layer_name="model.shared.attn"))
    assert impl.s2o_reason is None


def test_another_reason_is_kept():
    impl = Impl(S2OConfig(dense_layers=(0,)))
    impl.s2o_reason = "alibi"
    impl.place(SimpleNamespace(layer_name="model.layers.0.attn"))
    assert impl.s2o_reason == "alibi"
