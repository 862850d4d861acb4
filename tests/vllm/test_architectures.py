"""Small random models of the architectures that people serve, on vLLM's CPU backend."""

import json
import math
import subprocess
import sys
import textwrap

import pytest
from architectures import ARCHITECTURES, FULL, SLIDING, every
from vllm.platforms import current_platform

from models import write_model

pytestmark = [
    pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build"),
    pytest.mark.slow,
]

SMALL = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 4096,
    "moe_intermediate_size": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": None, "torch_dtype": "float32",
}  # fmt: skip
# Beside SMALL, and how many layers go sparse.
MODELS = {
    "Llama 3.1 8B": ({}, 4),
    "Qwen3 30B-A3B": ({}, 4),
    "GLM-4.5-Air": ({"first_k_dense_replace": 1}, 4),
    "Gemma 3 12B": ({"layer_types": every(2, 4), "sliding_window": 128}, 2),
    "Phi-4-mini": ({"head_dim": None, "hidden_size": 256, "sliding_window": 262144}, 4),
    "Mistral Small 3": ({}, 4),
    "OLMo 3 7B": ({"layer_types": every(4, 4), "sliding_window": 128}, 1),
    "SmolLM3 3B": ({"no_rope_layers": [1, 1, 1, 0], "layer_types": [FULL] * 4}, 4),
    "Qwen2.5 1.5B": ({}, 4),
    "MiniMax-M2": ({"rotary_dim": 32, "attn_type_list": [1] * 4}, 4),
    "gpt-oss 20B": ({"layer_types": [SLIDING, FULL] * 2, "sliding_window": 128}, 2),
    "Nemotron-H 8B": (
        {"hybrid_override_pattern": "M-*-", "mamba_num_heads": 4, "mamba_head_dim": 32,
         "ssm_state_size": 16, "n_groups": 2, "attention_head_dim": 64}, 1,
    ),
}  # fmt: skip
GENERATE = """
    import json, os, random, sys
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the layers, in this process
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        model, sparse = sys.argv[1], sys.argv[2] == "s2o"
        settings = {"s2o": {"min_context": 256, "segment_size": 64}}
        ours = {"attention_backend": "s2o", "additional_config": settings}
        llm = LLM(
            model, enforce_eager=True, max_model_len=2048, max_num_batched_tokens=512,
            load_format="dummy", dtype="float32", enable_prefix_caching=False,
            **(ours if sparse else {}),
        )
        choose = random.Random(1).randrange
        prompt = {"prompt_token_ids": [choose(3, 512) for _ in range(1500)]}

        def answer(**extra):
            params = SamplingParams(temperature=0, max_tokens=4, logprobs=1, extra_args=extra)
            output = llm.generate(prompt, params)[0].outputs[0]
            chosen = [next(iter(one.values())).logprob for one in output.logprobs]
            return list(output.token_ids), chosen

        found = {"dense": answer(**({"s2o_sparsity_budget": 1.0} if sparse else {}))}
        if sparse:
            found["sparse"] = answer(s2o_sparsity_budget=0.1)
            layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
            impls = [getattr(layer, "impl", None) for layer in layers.values()]
            counters = [getattr(impl, "_s2o_counters", None) for impl in impls]
            found["visited"] = [one.tolist()[:2] for one in counters if one is not None]
        print("FOUND", json.dumps(found))
"""


def generate(folder, model, backend):
    script = folder / "generate.py"
    script.write_text(textwrap.dedent(GENERATE))
    done = subprocess.run(
        [sys.executable, str(script), model, backend],
        capture_output=True, text=True, check=False, timeout=300, cwd=folder,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.mark.parametrize("name", MODELS)
def test_it_is_stock_at_a_budget_of_1_and_counted_below(tmp_path, name):
    changes, sparse_layers = MODELS[name]
    folder = tmp_path / "model"
    folder.mkdir()
    model = write_model(folder, **(ARCHITECTURES[name] | SMALL | changes))
    found = generate(tmp_path, model, "s2o")
    assert found["dense"] == generate(tmp_path, model, "stock")["dense"]
    assert all(map(math.isfinite, found["sparse"][1]))
    shares = [visited / eligible for visited, eligible in found["visited"] if eligible]
    assert len(shares) == sparse_layers
    assert all(0.05 < share < 0.3 for share in shares)
