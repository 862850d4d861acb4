"""`vllm serve` on the card: Llama-3.1-8B's shape at 128K, and a needle with real weights.

The needle test needs a model folder in ``S2O_TEST_MODEL`` (Qwen2.5-Coder-1.5B-Instruct with a
context of 32,768 tokens or more), or in ``S2O_TEST_URL`` a server of it with S2O on.
"""

import os
import random
from pathlib import Path

import openai
import pytest
import torch

from asking import tracebacks
from s2o_vllm.benchmarks.speed.arms import ask
from s2o_vllm.benchmarks.speed.serving import kv_cache_bytes, llama_shape, prompt
from s2o_vllm.cli.demo import WHAT, WHERE, WHO
from s2o_vllm.cli.server_process import density, measured_density, read, starting, vllm_server

pytestmark = pytest.mark.e2e

PORT = 8471
CONTEXT, SPARE = 131072, 4096  # tokens of the KV cache: a request of the greatest length, and rest


def cards(count):
    """The card of each server: one each, as far as there are cards."""
    every = ",".join(map(str, range(torch.cuda.device_count())))
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or every).split(",")
    return [{"CUDA_VISIBLE_DEVICES": visible[number % len(visible)]} for number in range(count)]


def test_llama_shape_at_128k(tmp_path):
    """Default 8,192-token chunks: sparse within the budget, off switch stock, no failure."""
    model, flags = llama_shape(tmp_path)
    flags += [
        "--load-format", "dummy", "--max-model-len", str(CONTEXT),
        "--gpu-memory-utilization", "0.45",
        "--kv-cache-memory-bytes", str(kv_cache_bytes(model, CONTEXT + SPARE)),
    ]  # fmt: skip
    own = [*flags, "--attention-backend", "s2o", "--s2o-sparsity-budget", "0.05"]
    short, logs = prompt(6000, 1, 30000), [tmp_path / "stock.log", tmp_path / "s2o.log"]
    first, second = cards(2)
    with (
        starting(model, PORT, flags, logs[0], first) as stock_healthy,
        starting(model, PORT + 1, own, logs[1], second) as healthy,
    ):
        stock, url = ask(stock_healthy(), short, None).tokens, healthy()
        assert ask(url, short, None).tokens == stock, "short prompts are stock"
        assert ask(url, short, 1.0).tokens == stock
        before = read(f"{url}/metrics")
        ask(url, prompt(131_000, 2, 30000), None)
        assert measured_density(url, before) <= 0.06
        after = read(f"{url}/metrics")
        assert density(before, after) > 0.03
        assert tracebacks(logs[1]) == []


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A client of a server with real weights: one that runs, or one of this test's own."""
    options = {"api_key": "none", "timeout": 600}
    if running := os.environ.get("S2O_TEST_URL"):
        yield openai.OpenAI(base_url=running + "/v1", **options)
        return
    if "S2O_TEST_MODEL" not in os.environ:
        pytest.skip("neither S2O_TEST_URL nor S2O_TEST_MODEL names a model")
    flags = ["--attention-backend", "s2o", "--s2o-sparsity-budget", "0.1"]
    flags += ["--max-model-len", "32768"]
    log = tmp_path_factory.mktemp("real") / "server.log"
    with vllm_server(Path(os.environ["S2O_TEST_MODEL"]), PORT, flags, log) as url:
        yield openai.OpenAI(base_url=url + "/v1", **options)


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_needle_at_32k_is_found_as_by_dense(real, at):
    choose = random.Random(int(at * 10)).choice
    lines = [
        f"{choose(WHO.split('|'))} remembered {choose(WHAT.split('|'))} {choose(WHERE.split('|'))}."
        for _ in range(2400)
    ]
    number = str(random.randrange(10_000, 99_999))
    lines.insert(int(at * len(lines)), f"The magic number is {number}.")
    question = " ".join(lines) + "\nWhat is the magic number? Answer with the number only."
    answers = [
        real.chat.completions.create(
            model=real.models.list().data[0].id,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=12,
            extra_body={"vllm_xargs": {"s2o_sparsity_budget": budget}},
        )
        for budget in (1.0, 0.1)
    ]
    assert answers[0].usage.prompt_tokens > 24_000
    dense, sparse = (answer.choices[0].message.content for answer in answers)
    assert number in dense
    assert sparse == dense
