"""What `vllm serve` is refused ends with one sentence and exit code 2, without a traceback."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e

MLA = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 2, "num_key_value_heads": 4,
}  # fmt: skip


def serve(*words):
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        ({}, ["--additional-config", '{"s2o": {"budget": 1}}'], "s2o: unknown setting 'budget'"),
        (MLA, [], "uses multi-head latent attention (MLA), must be a model with GQA or MHA"),
    ],
    ids=["setting", "model"],
)
def test_a_refusal_is_the_last_line(make_model, changes, flags, sentence):
    done = serve(make_model(**changes), "--attention-backend", "s2o", "--load-format", "dummy",
                 "--enforce-eager", *flags)  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "vllm serve: error: s2o: " in last
    assert sentence in last
