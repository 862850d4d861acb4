"""A tiny gpt-oss on vLLM's CPU backend: attention sinks, and a window in every other layer."""

import json
import subprocess
import sys
import textwrap

import pytest
from vllm.platforms import current_platform

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")

GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 150_000, "factor": 32.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "original_max_position_embeddings": 4096, "truncate": False,
    },
}  # fmt: skip
GENERATE = """
    import json, os, random, sys
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the layers, in this process
    import torch
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    def load_weights(loader, model, config):  # vLLM's own are too small to matter
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.named_parameters():
            if "sinks" in name:
                weight.data.copy_(torch.linspace(2, 9, len(weight)))
            elif weight.dim() > 1 and "bias" not in name:
                drawn = torch.randn(weight.shape, generator=generator)
                weight.data.copy_(2 * drawn / weight.shape[-1] ** 0.5)
            else:
                weight.data.fill_("norm" in name)

    if __name__ == "__main__":
        DummyModelLoader.load_weights = load_weights
        llm = LLM(
            sys.argv[1], enforce_eager=True, max_model_len=2048, max_num_batched_tokens=512,
            attention_backend="s2o", dtype="float32", load_format="dummy",
            enable_prefix_caching=False,
            additional_config={"s2o": {"min_context": 256, "segment_size": 64}},
        )
        choose = random.Random(1).randrange
        prompt = {"prompt_token_ids": [choose(3, 512) for _ in range(1500)]}

        def logprob(budget):
            extra = {"s2o_sparsity_budget": budget}
            params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, extra_args=extra)
            (first,) = llm.generate(prompt, params)[0].outputs[0].logprobs
            return next(iter(first.values())).logprob

        found = {"stock": logprob(1.0), "sparse": logprob(0.999)}
        config = llm.llm_engine.vllm_config
        layers = sorted(config.compilation_config.static_forward_context.items())
        impls = [layer.impl for name, layer in layers if hasattr(layer, "impl")]
        found["reasons"] = [impl.s2o_reason for impl in impls]
        for impl in impls:
            if impl.s2o_reason is None:
                impl._s2o_operator.sinks = None
        found["without_sinks"] = logprob(0.999)
        print("FOUND", json.dumps(found))
"""


def test_layers_with_sinks_go_sparse_and_windows_stay_dense(make_model, tmp_path):
    script = tmp_path / "generate.py"
    script.write_text(textwrap.dedent(GENERATE))
    done = subprocess.run(
        [sys.executable, str(script), make_model(**GPT_OSS)],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found["reasons"] == ["sliding_window", None, "sliding_window", None]
    with_sinks, without = (
        abs(found[name] - found["stock"]) for name in ("sparse", "without_sinks")
    )
    assert 0 < with_sinks < 0.1 * without, found
