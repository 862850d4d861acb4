"""Dense layers in a whole model, on vLLM's CPU backend."""

import json
import subprocess
import sys
import textwrap

import pytest
from vllm.platforms import current_platform

from models import write_weights

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")

GENERATE = """
    import json, os, random, sys
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the layers, in this process
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        model, layers = sys.argv[1], json.loads(sys.argv[2])
        llm = LLM(
            model, enforce_eager=True, max_model_len=2048,
            max_num_batched_tokens=512, attention_backend="s2o", dtype="float32",
            additional_config={
                "s2o": {"dense_layers": layers, "min_context": 256, "segment_size": 64}
            },
        )
        choose = random.Random(1).randrange
        prompt = {"prompt_token_ids": [choose(3, 512) for _ in range(1500)]}

        def logprob(budget):
            extra = {"s2o_sparsity_budget": budget}
            params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, extra_args=extra)
            (first,) = llm.generate(prompt, params)[0].outputs[0].logprobs
            return next(iter(first.values())).logprob

        found = {"stock": logprob(1.0), "sparse": logprob(0.05)}
        from s2o_vllm import metrics
        config = llm.llm_engine.vllm_config
        counters = {
            name: layer.impl._s2o_counters
            for name, layer in config.compilation_config.static_forward_context.items()
        }
        found["visited"] = {
            name: 0 if counts is None else counts.tolist()[0] for name, counts in counters.items()
        }
        found["chunks"] = metrics.worker.totals()["s2o:dense_rows", "dense_layer"]
        print("FOUND", json.dumps(found))
"""


def generate(tmp_path, model, layers):
    script = tmp_path / "generate.py"
    script.write_text(textwrap.dedent(GENERATE))
    done = subprocess.run(
        [sys.executable, str(script), model, json.dumps(layers)],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.fixture
def model(make_model, tmp_path):
    make_model(num_hidden_layers=3)
    return write_weights(tmp_path)


def test_the_first_and_the_last_layer(model, tmp_path):
    found = generate(tmp_path, model, [0, -1])
    visited = [bool(count) for _, count in sorted(found["visited"].items())]
    assert visited == [False, True, False]
    assert found["sparse"] != found["stock"]
    assert found["chunks"] == 3, "of 512, 512 and 476 tokens"


def test_all_layers_dense_is_stock(model, tmp_path):
    found = generate(tmp_path, model, [0, 1, 2])
    assert set(found["visited"].values()) == {0}
    assert found["sparse"] == found["stock"]
