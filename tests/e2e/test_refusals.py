"""What `vllm serve` is refused ends with one sentence and exit code 2, without a traceback."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from models import write_model

pytestmark = pytest.mark.e2e

MLA = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 2, "num_key_value_heads": 4,
}  # fmt: skip


# Changes to the tiny model, flags, and what is said.
REFUSALS = {
    "setting": (
        {}, ["--additional-config", '{"s2o": {"budget": 1}}'], "s2o: unknown setting 'budget'",
    ),
    "model": (MLA, [], "uses multi-head latent attention (MLA), must be a model with GQA or MHA"),
}  # fmt: skip


def serve(folder, changes, flags):
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", write_model(folder, **changes),
        "--attention-backend", "s2o", "--load-format", "dummy", "--enforce-eager", *flags,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with ThreadPoolExecutor() as pool:
        yield {
            name: pool.submit(serve, tmp_path_factory.mktemp(name), changes, flags)
            for name, (changes, flags, _) in REFUSALS.items()
        }


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_the_last_line(served, name):
    done, sentence = served[name].result(), REFUSALS[name][2]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "vllm serve: error: s2o: " in last
    assert sentence in last
