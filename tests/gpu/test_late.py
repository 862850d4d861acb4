"""Nothing of ours compiles once a server reports healthy, however vLLM gets ready."""

import pytest

from asking import ask
from models import write_model
from s2o_vllm.cli.server_process import metric, read, vllm_server

pytestmark = pytest.mark.e2e

PORT = 8479
PROMPT = [3 + number * 7919 % 500 for number in range(6000)]
# The heads of Qwen3-30B-A3B between narrow layers with a few experts.
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 512,
    "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 8,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True, "max_position_embeddings": 32768, "rope_theta": 1e6,
}  # fmt: skip
# Eager servers run no batch with attention before they are healthy, nor do those whose graphs end
# at attention; vLLM has two model runners.
MODES = {
    "graphs": ([], {}),
    "eager": (["--enforce-eager"], {}),
    "eager, first runner": (["--enforce-eager"], {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    "piecewise": (["--compilation-config.cudagraph_mode", "PIECEWISE"], {}),
    "piecewise, first runner": (
        ["--compilation-config.cudagraph_mode", "PIECEWISE"], {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    ),
    "sparse decode": (["--s2o-decode-budget", "0.1", "--s2o-decode-min-context", "1024"], {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    write_model(folder, **EXPERTS)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_the_first_sparse_request_waits_for_no_compiler(experts, tmp_path, mode):
    flags, variables = MODES[mode]
    own = [
        "--load-format", "dummy", "--max-model-len", "8192", "--max-num-batched-tokens", "2048",
        "--gpu-memory-utilization", "0.3", "--attention-backend", "s2o",
        "--s2o-sparsity-budget", "0.1", "--s2o-min-context", "1024", *flags,
    ]  # fmt: skip
    log = tmp_path / "server.log"
    # A cache of its own: what an earlier server compiled would not be seen to be late.
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    with vllm_server(experts, PORT, own, log, cache | variables) as url:
        ask(url, PROMPT, output_tokens=4)
        page = read(url + "/metrics")
        for _ in range(20):
            if metric(page, "s2o:sparse_requests_total"):
                break
            ask(url, PROMPT[:10], output_tokens=8)
            page = read(url + "/metrics")
        assert metric(page, "s2o:sparse_requests_total") > 0
        assert metric(page, "s2o:late_compilations_total") == 0
    text = log.read_text()
    assert "was compiled after the server was ready" not in text
    assert "have compiled no kernel" not in text
