"""`vllm serve` on the card: Llama-3.1-8B's shape at 128K, and a needle with real weights.

The needle test needs a model folder in ``S2O_TEST_MODEL`` (Qwen2.5-Coder-1.5B-Instruct with a
context of 32,768 tokens or more), or in ``S2O_TEST_URL`` a server of it with S2O on.
"""

import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from s2o_vllm.benchmarks.serving import LLAMA_8B, prompt
from s2o_vllm.benchmarks.ttft import ask
from s2o_vllm.cli.demo import (
    WHAT,
    WHERE,
    WHO,
    density,
    measured_density,
    read,
    stop,
    wait_until_healthy,
)

PORT = 8471
URL = f"http://127.0.0.1:{PORT}"


@contextmanager
def server(folder: Path, model: str, *flags: str):
    log = folder / "server.log"
    command = [
        sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", model,
        "--host", "127.0.0.1", "--port", str(PORT), *flags,
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_until_healthy(process, URL, log)
            yield log
        finally:
            stop(process)


def test_llama_shape_at_128k(tmp_path):
    """Default 8,192-token chunks: sparse within the budget, off switch stock, no failure."""
    model = tmp_path / "llama"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_8B))
    flags = ["--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "131072"]
    short = prompt(6000, 1, 30000)
    with server(tmp_path, str(model), *flags):
        stock = ask(URL, short, None).tokens
    flags += ["--attention-backend", "s2o", "--s2o-sparsity-budget", "0.05"]
    with server(tmp_path, str(model), *flags) as log:
        assert ask(URL, short, None).tokens == stock, "short prompts are stock"
        assert ask(URL, short, 1.0).tokens == stock
        before = read(f"{URL}/metrics")
        ask(URL, prompt(131_000, 2, 30000), None)
        assert measured_density(URL, before) <= 0.06
        after = read(f"{URL}/metrics")
        assert density(before, after) > 0.03
        assert "Traceback" not in log.read_text()


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
    model = os.environ["S2O_TEST_MODEL"]
    with server(tmp_path_factory.mktemp("real"), model, "--max-model-len", "32768", *flags):
        yield openai.OpenAI(base_url=URL + "/v1", **options)


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
