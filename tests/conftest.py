"""Models that tests make themselves: no hub, no download."""

import json
import os

import pytest

# A test machine has little memory to give to a KV cache.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(folder, **changes):
    """Write a config.json; weights are made by vLLM's dummy loader."""
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA | changes))
    return str(folder)


@pytest.fixture
def make_model(tmp_path):
    return lambda **changes: write_model(tmp_path, **changes)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))
