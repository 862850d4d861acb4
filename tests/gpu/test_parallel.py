"""One model over two GPUs, by heads and by layers: what one GPU answers. All start together."""

from contextlib import ExitStack

import pytest
import torch

from asking import ask
from models import VOCABULARY
from s2o_vllm.benchmarks.speed.serving import kv_cache_bytes, prompt
from s2o_vllm.cli.server_process import measured_density, read, starting

pytestmark = pytest.mark.e2e

CONTEXT = 32768
ARMS = {"one": (), "tensor": ("--tensor-parallel-size", "2"),
        "pipeline": ("--pipeline-parallel-size", "2")}  # fmt: skip
# Ranks add partial sums in another order, which in fp16 changes these log-probabilities by less
# than 0.01; lists of another rank's heads change them by 0.2 to 1.
TOLERANCE = 0.05
# Seed, tokens and budget; the last is a long one without S2O.
CASES = [(0, 500, 1.0), (1, 500, 1.0), (2, 500, 1.0), (3, 32000, None), (4, 32000, None),
         (3, 32000, 1.0)]  # fmt: skip
# NVLink multicast is a setting of the machine, which others may share; none of it is needed here.
PLAIN_LINKS = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
               "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}  # fmt: skip


@pytest.fixture(scope="module")
def answers(low_rank_llama, tmp_path_factory):
    """By arm: answers to all cases, and the density of the sparse ones."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model, folder = low_rank_llama, tmp_path_factory.mktemp("parallel")
    flags = [
        "--attention-backend", "s2o", "--s2o-sparsity-budget", "0.1", "--dtype", "float16",
        "--max-model-len", str(CONTEXT), "--gpu-memory-utilization", "0.25",
        "--kv-cache-memory-bytes", str(kv_cache_bytes(model, CONTEXT + 4096)),
    ]  # fmt: skip
    found = {}
    with ExitStack() as stack:
        begun = {
            arm: stack.enter_context(
                starting(model, 8481 + number, [*flags, *own], folder / f"{arm}.log", PLAIN_LINKS)
            )
            for number, (arm, own) in enumerate(ARMS.items())
        }
        for arm, healthy in begun.items():
            url = healthy()
            before = read(url + "/metrics")
            asked = [
                ask(
                    url, prompt(length, seed, VOCABULARY), budget, 8, logprobs=5,
                    return_tokens_as_token_ids=True,
                )
                for seed, length, budget in CASES
            ]  # fmt: skip
            found[arm] = asked, measured_density(url, before)
    return found


@pytest.mark.parametrize("arm", ["tensor", "pipeline"])
def test_two_gpus_answer_as_one(answers, arm):
    """The first tokens' log-probabilities agree, and the tokens wherever their lead is clear."""
    (alone, density), (asked, other_density) = answers["one"], answers[arm]
    assert other_density == pytest.approx(density, rel=0.01)
    assert alone[3].first != pytest.approx(alone[5].first, abs=TOLERANCE), "lists matter"
    for number, (one, other) in enumerate(zip(alone, asked, strict=True)):
        common = one.first.keys() & other.first.keys()
        assert len(common) >= 3, number
        assert {name: other.first[name] for name in common} == pytest.approx(
            {name: one.first[name] for name in common}, abs=TOLERANCE
        ), number
        best, second = sorted(one.first.values(), reverse=True)[:2]
        if best - second > 2 * TOLERANCE:
            assert one.tokens[0] == other.tokens[0]
