"""Models and configurations that S2O refuses at start, each by name."""

import pytest

from s2o_vllm import compat, plugin, support


def configure(model, **arguments):
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    return EngineArgs(model=model, attention_backend="s2o", **arguments).create_engine_config()


def test_a_plain_model_is_accepted(tiny_model):
    assert configure(tiny_model).additional_config["s2o"]["sparsity_budget"] == 0.1


def test_mla_is_refused(make_model):
    model = make_model(
        architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2",
        kv_lora_rank=64, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=32,
        v_head_dim=32, n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=1,
        moe_intermediate_size=32, first_k_dense_replace=2,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"s2o: .* uses multi-head latent attention"):
        configure(model)


def test_pooling_is_refused(tiny_model):
    with pytest.raises(ValueError, match="s2o: runner is 'pooling', must be 'generate'"):
        configure(tiny_model, runner="pooling")


def test_sliding_window_everywhere_is_refused(make_model):
    model = make_model(
        architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=128
    )
    with pytest.raises(ValueError, match=r"s2o: every layer of .* sliding window of 128"):
        configure(model)


def test_a_window_that_no_request_fills_is_accepted(make_model):
    """Phi-4-mini's is twice as long as its context."""
    model = make_model(
        architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=8192
    )
    assert "s2o" in configure(model).additional_config
    with pytest.raises(ValueError, match=r"sliding window of 8192"):
        configure(model, hf_overrides={"max_position_embeddings": 16384})


def test_a_hybrid_model_is_accepted(make_model):
    model = make_model(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", sliding_window=128,
        use_sliding_window=True, max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    assert "s2o" in configure(model).additional_config


def test_dense_layers_are_counted_from_the_first(tiny_model):
    settings = {"s2o": {"dense_layers": [-1]}}
    configured = configure(tiny_model, additional_config=settings).additional_config
    assert configured["s2o"]["dense_layers"] == [1]


def test_dense_layers_of_a_pipeline_are_numbered_over_all_its_stages(tiny_model):
    settings = {"s2o": {"dense_layers": [-1]}}
    configured = configure(tiny_model, additional_config=settings, pipeline_parallel_size=2)
    assert configured.parallel_config.pipeline_parallel_size == 2
    assert configured.additional_config["s2o"]["dense_layers"] == [1]


def test_a_dense_layer_that_the_model_lacks_is_refused(tiny_model):
    with pytest.raises(ValueError, match="s2o: dense_layers has 2, must be from -2 to 1"):
        configure(tiny_model, additional_config={"s2o": {"dense_layers": [2]}})


@pytest.mark.parametrize("size", [8, 24])
def test_block_sizes_that_the_kernels_refuse(tiny_model, size):
    with pytest.raises(ValueError, match=f"s2o: block size is {size}, must be a multiple of 16"):
        configure(tiny_model, block_size=size)


def test_rust_frontend_is_refused(tiny_model, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="s2o: VLLM_USE_RUST_FRONTEND is set, must be unset"):
        configure(tiny_model)


MULTI = {"connectors": [
    {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"},
    {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
]}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "extra"), [("ExampleConnector", {}), ("MultiConnector", MULTI)], ids=str
)
def test_a_store_that_is_keyed_by_tokens_is_refused(tiny_model, name, extra):
    """Of another budget's request it would give the keys: its keys hold no salt."""
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector=name, kv_role="kv_both", kv_connector_extra_config=extra
    )
    refusal = "s2o: KV connector is 'ExampleConnector', which may give .* of OffloadingConnector, "
    with pytest.raises(ValueError, match=refusal):
        configure(tiny_model, kv_transfer_config=transfer)


def test_a_store_that_is_keyed_by_block_hashes_is_accepted(tiny_model):
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    assert "s2o" in configure(tiny_model, kv_transfer_config=transfer).additional_config


def test_the_connectors_that_are_let_in_are_vllms():
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    known = {*support.KEYED_BY_BLOCK_HASH, *support.OF_ONE_REQUEST}
    assert known <= set(KVConnectorFactory._registry)


def decoding(model, **arguments):
    """Sparse decode asked for."""
    return configure(model, additional_config={"s2o": {"decode_budget": 0.1}}, **arguments)


def test_sparse_decode_with_drafts_is_refused(tiny_model):
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with pytest.raises(ValueError, match=r"decode_budget is 0\.1, must be 1 with speculative dec"):
        decoding(tiny_model, speculative_config=drafts)


def test_sparse_decode_in_micro_batches_is_refused(tiny_model, monkeypatch):
    """vLLM itself has them only where experts are spread over GPUs: here they are faked."""
    from vllm.config import ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    made = decoding(tiny_model)
    monkeypatch.setattr(ParallelConfig, "use_ubatching", property(lambda self: True))
    args = EngineArgs(model=tiny_model, attention_backend="s2o", additional_config={
        "s2o": {"decode_budget": 0.1}
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"decode_budget is 0\.1, must be 1 with micro-batches"):
        compat._create_engine_config(lambda *_: made, args)
