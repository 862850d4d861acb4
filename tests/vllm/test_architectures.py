"""Small random models of the architectures that people serve, on vLLM's CPU backend."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from architectures import ARCHITECTURES, FULL, SLIDING, every
from examine import STUBS
from vllm.platforms import current_platform

from models import write_model

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")

PROMPT_TOKENS = 1500
CHUNKS = 3  # of 512, 512 and 476 tokens
SMALL = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 4096,
    "moe_intermediate_size": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": None, "torch_dtype": "float32",
}  # fmt: skip
SMALL_EYE = {
    "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256,
    "deepstack_visual_indexes": [], "fullatt_block_indexes": [0],
}  # fmt: skip
# The CPU's kernel of Gated DeltaNet takes bf16 alone.
LINEAR = {
    "layer_types": every(2, 4, "linear_attention"), "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "shared_expert_intermediate_size": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
HYBRID = {"layer_types": every(2, 4), "sliding_window": 128}
# What each has beside SMALL, how many layers go sparse, and why groups of others do not. What runs
# in one process stands together, so that a process takes as long as another.
PROCESSES: dict[str, dict[str, tuple]] = {
    "full attention": {
        "Llama 3.1 8B": ({}, 4, ()),
        "Qwen2.5 1.5B": ({}, 4, ()),
        "Mistral Small 3": ({}, 4, ()),
        "Ministral 3 8B": ({}, 4, ()),
        "Phi-4-mini": ({"sliding_window": 262144}, 4, ()),
        "SmolLM3 3B": ({"no_rope_layers": [1, 1, 1, 0], "layer_types": [FULL] * 4}, 4, ()),
    },
    "experts": {
        "Qwen3 30B-A3B": ({}, 4, ()),
        "GLM-4.5-Air": ({"first_k_dense_replace": 1}, 4, ()),
        "Hy3": ({"expert_hidden_dim": 64}, 4, ()),
        # vLLM's router for CPUs has no sigmoid without groups of experts.
        "MiniMax-M2": (
            {"rotary_dim": 32, "attn_type_list": [1] * 4, "scoring_func": "softmax",
             "use_routing_bias": False}, 4, (),
        ),
        "Llama 4 Scout": (
            {"attention_chunk_size": 256, "no_rope_layers": [1, 0, 1, 0], "num_experts_per_tok": 1,
             "intermediate_size_mlp": 128}, 2, ("local_chunks",),
        ),
    },
    "windows": {
        "Gemma 3 12B": (HYBRID, 2, ("sliding_window",)),
        "Gemma 4 31B": (
            HYBRID | {"num_global_key_value_heads": 1, "num_experts": None}, 2,
            ("sliding_window",),
        ),
        "Gemma 4 26B-A4B": (
            HYBRID | {"num_global_key_value_heads": 1, "top_k_experts": 2}, 2,
            ("sliding_window",),
        ),
        "OLMo 3 7B": (HYBRID, 2, ("sliding_window",)),
        "gpt-oss 20B": (
            HYBRID | {"layer_types": [SLIDING, FULL] * 2}, 2, ("sliding_window",)
        ),
    },
    "recurrent layers": {
        "Nemotron-H 8B": (
            {"hybrid_override_pattern": "M*-*", "mamba_num_heads": 4, "mamba_head_dim": 32,
             "ssm_state_size": 16, "n_groups": 2, "attention_head_dim": 64}, 2, (),
        ),
        "Qwen3-Next 80B-A3B": (LINEAR, 2, ()),
    },
    "pictures": {
        "Qwen3.5 27B": (LINEAR, 2, ()),
        "Qwen3.5 35B-A3B": (LINEAR, 2, ()),
        "Qwen3-VL 8B": ({}, 4, ()),
        "Qwen2.5-VL 7B": ({}, 4, ()),
    },
}  # fmt: skip


def small(name: str, changes: dict) -> dict:
    """Return a small model's config; of a vision-language model both parts are small."""
    config = ARCHITECTURES[name]
    if "text_config" not in config:
        return config | SMALL | changes
    text = config["text_config"] | SMALL | changes
    rope = text["rope_parameters"]
    half = int(32 * rope.get("partial_rotary_factor", 1))  # pairs of elements that rotate
    text["rope_parameters"] = rope | {"mrope_section": [half // 2, half // 4, half // 4]}
    eye = config["vision_config"] | SMALL_EYE
    return config | {"text_config": text, "vision_config": eye, "torch_dtype": text["torch_dtype"]}


def write_processor(folder: Path, model_type: str) -> None:
    """Write what says how images are prepared: vLLM asks for it even where there are none."""
    name = "Qwen2_5_VL" if model_type == "qwen2_5_vl" else "Qwen3VL"
    shared = {
        "patch_size": 16, "merge_size": 2, "temporal_patch_size": 2,
        "processor_class": f"{name}Processor",
    }  # fmt: skip
    video = "Qwen2VL" if model_type == "qwen2_5_vl" else "Qwen3VL"
    kinds = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {"video_processor_type": f"{video}VideoProcessor"},
    }
    for file, kind in kinds.items():
        (folder / file).write_text(json.dumps(shared | kind))


def answers(models: dict[str, tuple], folder: Path) -> dict[tuple[str, str], dict]:
    """Return what models answer, by name and backend: see `generate_small`."""
    folders = {}
    for number, (name, (changes, *_)) in enumerate(models.items()):
        own = folder / str(number)
        own.mkdir()
        config = small(name, changes)
        folders[name] = write_model(own, **config)
        if "vision_config" in config:
            write_processor(own, config["model_type"])
    (folder / "models.json").write_text(json.dumps(folders))
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if importlib.util.find_spec("torchvision") is None:
        environment["PYTHONPATH"] = str(STUBS)
    done = subprocess.run(
        [sys.executable, str(STUBS.parent / "generate_small.py"), str(folder / "models.json")],
        capture_output=True, text=True, check=False, timeout=600, cwd=folder, env=environment,
    )  # fmt: skip
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line[:6] == "FOUND "]
    assert len(found) == 2 * len(models), done.stderr[-3000:]
    errors = [f"{one['name']}: {one['error']}" for one in found if "error" in one]
    assert not errors, "\n".join(errors)
    return {(one["name"], one["backend"]): one for one in found}


@pytest.mark.parametrize(
    "process",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "full attention" else [])
        for name in PROCESSES
    ],
)
def test_stock_at_a_budget_of_1_and_counted_below_it(tmp_path, process):
    found = answers(PROCESSES[process], tmp_path)
    for name, (_, sparse_layers, reasons) in PROCESSES[process].items():
        ours, stock = found[name, "s2o"], found[name, "stock"]["answers"]["stock"]
        assert len(stock[1]) == PROMPT_TOKENS - 1
        assert ours["answers"]["1.0"] == stock, name
        visited = ours["visited"]["0.1"]
        assert len(visited) == sparse_layers, name
        assert all(0.1 < tokens / eligible < 0.15 for tokens, eligible in visited), name
        assert ours["dense"]["0.1"] == dict.fromkeys(reasons, CHUNKS), name
        few, nearly_all = (
            difference(ours["answers"][budget][1], stock[1]) for budget in ("0.1", "0.9999")
        )
        assert 0 < nearly_all < 0.2 * few, (name, nearly_all, few)


def difference(logprobs: list[float], others: list[float]) -> float:
    """Return how far the log-probabilities of a prompt's tokens are apart, in the mean."""
    assert all(map(math.isfinite, logprobs))
    return mean(abs(one - other) for one, other in zip(logprobs, others, strict=True))
