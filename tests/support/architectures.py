"""Configs of models that people serve, as their publishers give them, as far as layers go."""

from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


def every(number: int, layers: int, other: str = SLIDING) -> list[str]:
    """Return layer types of which one in ``number`` is full attention, the last of each run."""
    return [other if (layer + 1) % number else FULL for layer in range(layers)]


def heads(hidden: int, layers: int, query: int, kv: int, head_dim: int, **more: Any) -> dict:
    """Return what all configs have; the vocabulary is none's, for nothing depends on it."""
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": query,
        "num_key_value_heads": kv, "head_dim": head_dim, "vocab_size": 32000,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def model(architecture: str, model_type: str, sizes: dict, **more: Any) -> dict[str, Any]:
    """Return a config."""
    return {"architectures": [architecture], "model_type": model_type, **sizes, **more}


def pictures(architecture: str, model_type: str, text: dict, vision: dict, **more: Any) -> dict:
    """Return a config of a vision-language model: the text model's part is nested."""
    return {
        "architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16",
        "text_config": text, "vision_config": vision, **more,
    }  # fmt: skip


# Qwen's encoder of images, and the rotary embedding that its positions need.
QWEN_EYE = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [],
}  # fmt: skip
QWEN_ROPE = {
    "rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10],
    "mrope_interleaved": True, "partial_rotary_factor": 0.25,
}  # fmt: skip
QWEN_LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32",
}  # fmt: skip


def gemma_4(layers: int, sizes: dict, global_kv_heads: int, **more: Any) -> dict[str, Any]:
    """Return a config of Gemma 4: layers without a window have heads of their own."""
    return model(
        "Gemma4ForCausalLM", "gemma4_text", sizes, layer_types=every(6, layers),
        sliding_window=1024, global_head_dim=512, attention_k_eq_v=True,
        num_global_key_value_heads=global_kv_heads, hidden_size_per_layer_input=0,
        hidden_activation="gelu_pytorch_tanh", final_logit_softcapping=30.0, **more,
    )  # fmt: skip


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama 3.1 8B": model(
        "LlamaForCausalLM", "llama", heads(4096, 32, 32, 8, 128, intermediate_size=14336)
    ),
    "Qwen3 30B-A3B": model(
        "Qwen3MoeForCausalLM", "qwen3_moe",
        heads(2048, 48, 32, 4, 128, intermediate_size=6144, sliding_window=None),
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, decoder_sparse_step=1,
        mlp_only_layers=[], norm_topk_prob=True, use_sliding_window=False,
    ),
    "Qwen3-Next 80B-A3B": model(
        "Qwen3NextForCausalLM", "qwen3_next",
        heads(2048, 48, 16, 2, 256, intermediate_size=5120),
        layer_types=every(4, 48, "linear_attention"), full_attention_interval=4,
        linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_num_key_heads=16,
        linear_num_value_heads=32, linear_value_head_dim=128, partial_rotary_factor=0.25,
        moe_intermediate_size=512, shared_expert_intermediate_size=512, num_experts=512,
        num_experts_per_tok=10, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
    ),
    "GLM-4.5-Air": model(
        "Glm4MoeForCausalLM", "glm4_moe",
        heads(4096, 46, 96, 8, 128, intermediate_size=10944),
        moe_intermediate_size=1408, n_routed_experts=128, n_shared_experts=1, n_group=1,
        topk_group=1, num_experts_per_tok=8, first_k_dense_replace=1, norm_topk_prob=True,
        routed_scaling_factor=1.0, partial_rotary_factor=0.5, attention_bias=True,
        use_qk_norm=False,
    ),
    "MiniMax-M2": model(
        "MiniMaxM2ForCausalLM", "minimax_m2",
        heads(3072, 62, 48, 8, 128, intermediate_size=1536),
        num_local_experts=256, num_experts_per_tok=8, rotary_dim=64, use_qk_norm=True,
        qk_norm_type="per_layer", scoring_func="sigmoid", use_routing_bias=True,
        attn_type_list=[1] * 62,
    ),
    "gpt-oss 20B": model(
        "GptOssForCausalLM", "gpt_oss",
        heads(2880, 24, 64, 8, 64, intermediate_size=2880),
        layer_types=[SLIDING, FULL] * 12, sliding_window=128, num_local_experts=32,
        num_experts_per_tok=4, swiglu_limit=7.0, attention_bias=True,
    ),
    "Gemma 3 12B": model(
        "Gemma3ForCausalLM", "gemma3_text",
        heads(3840, 48, 16, 8, 256, intermediate_size=15360),
        layer_types=every(6, 48), sliding_window=1024, query_pre_attn_scalar=256,
        hidden_activation="gelu_pytorch_tanh", rope_local_base_freq=10000.0,
    ),
    "Llama 4 Scout": model(
        "Llama4ForCausalLM", "llama4_text",
        heads(5120, 48, 40, 8, 128, intermediate_size=8192),
        intermediate_size_mlp=16384, attention_chunk_size=8192, num_local_experts=16,
        num_experts_per_tok=1, interleave_moe_layer_step=1, use_qk_norm=True,
        no_rope_layers=[1, 1, 1, 0] * 12, attn_temperature_tuning=True,
    ),
    "Phi-4-mini": model(
        "Phi3ForCausalLM", "phi3",
        heads(3072, 32, 24, 8, 128, intermediate_size=8192),
        partial_rotary_factor=0.75, sliding_window=262144, original_max_position_embeddings=4096,
        pad_token_id=0,
    ),
    "Mistral Small 3": model(
        "MistralForCausalLM", "mistral",
        heads(5120, 40, 32, 8, 128, intermediate_size=32768, sliding_window=None),
    ),
    "Mistral 7B 0.1": model(
        "MistralForCausalLM", "mistral",
        heads(4096, 32, 32, 8, 128, intermediate_size=14336, sliding_window=4096),
    ),
    "OLMo 3 7B": model(
        "Olmo3ForCausalLM", "olmo3",
        heads(4096, 32, 32, 32, 128, intermediate_size=11008),
        layer_types=every(4, 32), sliding_window=4096,
    ),
    "SmolLM3 3B": model(
        "SmolLM3ForCausalLM", "smollm3",
        heads(2048, 36, 16, 4, 128, intermediate_size=11008),
        no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4, use_sliding_window=False,
        layer_types=[FULL] * 36, pad_token_id=0,
    ),
    "Nemotron-H 8B": model(
        "NemotronHForCausalLM", "nemotron_h",
        heads(4096, 52, 32, 8, 128, intermediate_size=21504),
        hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        mamba_num_heads=128, mamba_head_dim=64, ssm_state_size=128, n_groups=8, conv_kernel=4,
        chunk_size=128, mlp_hidden_act="relu2", attention_head_dim=128,
    ),
    "Qwen3.5 27B": pictures(
        "Qwen3_5ForConditionalGeneration", "qwen3_5",
        heads(
            5120, 64, 24, 4, 256, intermediate_size=17408, model_type="qwen3_5_text",
            layer_types=every(4, 64, "linear_attention"), linear_num_value_heads=48,
            rope_parameters=QWEN_ROPE, **QWEN_LINEAR,
        ),
        QWEN_EYE | {"out_hidden_size": 5120},
    ),
    "Qwen3.5 35B-A3B": pictures(
        "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe",
        heads(
            2048, 40, 16, 2, 256, model_type="qwen3_5_moe_text",
            layer_types=every(4, 40, "linear_attention"), linear_num_value_heads=32,
            moe_intermediate_size=512, shared_expert_intermediate_size=512, num_experts=256,
            num_experts_per_tok=8, rope_parameters=QWEN_ROPE, **QWEN_LINEAR,
        ),
        QWEN_EYE | {"out_hidden_size": 2048},
    ),
    "Qwen3-VL 8B": pictures(
        "Qwen3VLForConditionalGeneration", "qwen3_vl",
        heads(
            4096, 36, 32, 8, 128, intermediate_size=12288, model_type="qwen3_vl_text",
            rope_parameters={
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        ),
        QWEN_EYE | {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
    ),
    "Qwen2.5-VL 7B": pictures(
        "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl",
        heads(
            3584, 28, 28, 4, 128, intermediate_size=18944, model_type="qwen2_5_vl_text",
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
            },
        ),
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
         "patch_size": 14, "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]},
    ),
    "Hy3": model(
        "HYV3ForCausalLM", "hy_v3",
        heads(4096, 80, 64, 8, 128, intermediate_size=13312),
        moe_intermediate_size=1536, expert_hidden_dim=1536, num_experts=192, num_experts_per_tok=8,
        num_shared_experts=1, first_k_dense_replace=1, route_norm=True,
    ),
    "MiMo-V2-Flash": model(
        "MiMoV2FlashForCausalLM", "mimo_v2_flash",
        heads(4096, 48, 64, 4, 192, intermediate_size=16384),
        v_head_dim=128, hybrid_layer_pattern=[int(layer % 6 != 5) for layer in range(48)],
        sliding_window=128, sliding_window_size=128, swa_num_attention_heads=64,
        swa_num_key_value_heads=8, swa_head_dim=192, swa_v_head_dim=128,
        add_swa_attention_sink_bias=True, layernorm_epsilon=1e-5,
        moe_layer_freq=[0] + [1] * 47, n_routed_experts=256, moe_intermediate_size=2048,
        num_experts_per_tok=8, n_group=1, topk_group=1, norm_topk_prob=True,
        scoring_func="sigmoid", topk_method="noaux_tc",
    ),
    "Ministral 3 8B": model(
        "Ministral3ForCausalLM", "ministral3",
        heads(
            4096, 34, 32, 8, 128, intermediate_size=14336,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0,
                "beta_slow": 1.0, "original_max_position_embeddings": 16384, "mscale": 1.0,
                "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            },
        ),
    ),
    "Gemma 4 31B": gemma_4(60, heads(5376, 60, 32, 16, 256, intermediate_size=21504), 4),
    "Gemma 4 26B-A4B": gemma_4(
        30, heads(2816, 30, 16, 8, 256, intermediate_size=2112), 2,
        enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704,
    ),
    "Qwen2.5 1.5B": model(
        "Qwen2ForCausalLM", "qwen2", heads(1536, 28, 12, 2, 128, intermediate_size=8960)
    ),
    "DeepSeek V3": model(
        "DeepseekV3ForCausalLM", "deepseek_v3",
        heads(7168, 61, 128, 128, 192, intermediate_size=18432),
        kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
        moe_intermediate_size=2048, first_k_dense_replace=3, n_group=8, topk_group=4,
        norm_topk_prob=True, routed_scaling_factor=2.5, scoring_func="sigmoid",
        topk_method="noaux_tc",
    ),
}  # fmt: skip
