"""One model over two GPUs, by heads and by layers: what one GPU answers. All start together."""

from contextlib import ExitStack

import pytest
import torch

from asking import ask
from models import VOCABULARY
from s2o_vllm.benchmarks.serving import kv_cache_bytes, prompt, starting
from s2o_vllm.cli.demo import measured_density, read

CONTEXT = 32768
ARMS = {"one": (), "tensor": ("--tensor-parallel-size", "2"),
        "pipeline": ("--pipeline-parallel-size", "2")}  # fmt: skip
# Ranks add partial sums in another order: a hundredth in fp16; other keys or heads change these
# log-probabilities by 1 or so.
TOLERANCE = 0.05
# NVLink multicast is a setting of the machine, which others may share; none of it is needed here.
PLAIN_LINKS = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
               "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}  # fmt: skip


@pytest.fixture(scope="module")
def answers(narrow_llama, tmp_path_factory):
    """By arm: answers to three short prompts and two long ones, and the density of the latter."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("parallel")
    flags = [
        "--attention-backend", "s2o", "--s2o-sparsity-budget", "0.1", "--dtype", "float16",
        "--max-model-len", str(CONTEXT), "--gpu-memory-utilization", "0.25",
        "--kv-cache-memory-bytes", str(kv_cache_bytes(narrow_llama, CONTEXT + 4096)),
    ]  # fmt: skip
    found = {}
    with ExitStack() as stack:
        begun = {
            arm: stack.enter_context(
                starting(
                    narrow_llama, 8481 + number, [*flags, *own], folder / f"{arm}.log", PLAIN_LINKS
                )
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
                for seed, (length, budget) in enumerate([(500, 1.0)] * 3 + [(32000, None)] * 2)
            ]  # fmt: skip
            found[arm] = asked, measured_density(url, before)
    return found


@pytest.mark.parametrize("arm", ["tensor", "pipeline"])
def test_two_gpus_answer_as_one(answers, arm):
    """The first tokens' log-probabilities agree, and the tokens wherever their lead is clear."""
    (alone, density), (asked, other_density) = answers["one"], answers[arm]
    assert other_density == pytest.approx(density, rel=0.01)
    for one, other in zip(alone, asked, strict=True):
        common = one.first.keys() & other.first.keys()
        assert len(common) >= 3
        assert {name: other.first[name] for name in common} == pytest.approx(
            {name: one.first[name] for name in common}, abs=TOLERANCE
        )
        best, second = sorted(one.first.values(), reverse=True)[:2]
        if best - second > 2 * TOLERANCE:
            assert one.tokens[0] == other.tokens[0]
