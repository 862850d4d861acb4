"""What a command of vLLM is refused ends with a sentence and exit code 2, without a traceback."""

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


SERVE = ("-m", "vllm.entrypoints.cli.main", "serve")
UNKNOWN = ("--additional-config", '{"s2o": {"budget": 1}}')
BUDGET = "s2o: unknown setting 'budget'"
FILES = ("-i", "in.jsonl", "-o", "out.jsonl")

# Changes to the tiny model, words before it, words after it, what is said.
REFUSALS = {
    "two servers": (
        {}, SERVE, (*UNKNOWN, "--api-server-count", "2"), f"vllm serve: error: {BUDGET}",
    ),
    "model": (
        MLA, SERVE, (),
        "uses multi-head latent attention (MLA), must be a model with GQA or MHA",
    ),
    "module": (
        {}, ("-m", "vllm.entrypoints.openai.api_server", "--model"), UNKNOWN,
        f"python -m vllm.entrypoints.openai.api_server: error: {BUDGET}",
    ),
    "batch": (
        {}, ("-m", "vllm.entrypoints.launchers.run_batch", *FILES, "--model"), UNKNOWN,
        f"python -m vllm.entrypoints.launchers.run_batch: error: {BUDGET}",
    ),
    "flag": (
        {}, ("-m", "s2o_vllm.cli.vllm_command", "serve"), ("--s2o-min-context", "many"),
        "vllm serve: error: argument --s2o-min-context: s2o: min_context is 'many', must be a",
    ),
}  # fmt: skip


def run(folder, changes, before, after):
    command = [
        sys.executable, *before, write_model(folder, **changes),
        "--attention-backend", "s2o", "--load-format", "dummy", "--enforce-eager", *after,
    ]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=folder
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, tmp_path_factory.mktemp(name.replace(" ", "-")), *words)
            for name, (*words, _) in REFUSALS.items()
        }


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_the_last_line(done, name):
    ended, sentence = done[name].result(), REFUSALS[name][-1]
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr
    assert sentence in ended.stderr.strip().splitlines()[-1]
