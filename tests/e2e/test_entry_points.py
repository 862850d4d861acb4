"""The ways into vLLM beside one `vllm serve`: what arrives there of the settings."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from asking import ask
from models import write_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CLI = ("-m", "vllm.entrypoints.cli.main")
S2O = ("--attention-backend", "s2o", "--s2o-sparsity-budget", "0.6", "--s2o-min-context", "256",
       "--s2o-segment-size", "128")  # fmt: skip
SMALL = ("--load-format", "dummy", "--enforce-eager", "--max-model-len", "2048",
         "--max-num-batched-tokens", "512")  # fmt: skip
TINY_BENCH = ("--input-len", "700", "--output-len", "2")


def python(*words):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, timeout=400
    )


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    """Benches of vLLM that make an engine of their own; they draw tokens from 10,000."""
    folder = tmp_path_factory.mktemp("bench")
    model = ("--model", write_model(folder, vocab_size=10_240), *SMALL)
    one = ("--num-iters", "1", "--num-iters-warmup", "0", "--batch-size", "1")
    words = {
        "latency": ("bench", "latency", *model, *TINY_BENCH, *one),
        "throughput": (
            "bench", "throughput", *model, "--random-input-len", "700", "--random-output-len", "2",
            "--dataset-name", "random", "--num-prompts", "2", *S2O, "--block-size", "1024",
        ),
    }  # fmt: skip
    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(python, *CLI, *own) for name, own in words.items()}


def test_a_bench_of_stock_vllm_runs_with_the_plug_in_installed(benches):
    done = benches["latency"].result()
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_bench_takes_flags_and_large_pages(benches):
    done = benches["throughput"].result()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Throughput:" in done.stdout


@pytest.fixture(scope="module")
def pair(launch, tiny_model):
    """Two API servers before one engine."""
    two = ("--api-server-count", "2", *S2O, "--s2o-max-request-budget", "0.6")
    return launch(tiny_model, pair=two)["pair"]


TRIES = 12  # connections, which the kernel deals to both servers


def test_every_api_server_knows_the_operators_cap(pair):
    for _ in range(TRIES):
        with pytest.raises(openai.BadRequestError, match=r"must be at most 0\.6 on this server"):
            ask(pair.url, [3, 4, 5], budget=0.9, output_tokens=1)


def test_no_api_server_shares_blocks_across_budgets(pair):
    """One that took the default for the server's own budget would salt a plain request so."""
    tokens = list(range(3, 512)) * 2
    for _ in range(TRIES // 2):
        ask(pair.url, tokens, budget=0.1, output_tokens=1)
    before = pair.total("vllm:prefix_cache_hits")
    ask(pair.url, tokens, output_tokens=1)
    reused = pair.total("vllm:prefix_cache_hits") - before
    assert reused == 256, "of another budget those alone that no budget touches (min_context)"
    for _ in range(TRIES // 2):
        ask(pair.url, tokens, output_tokens=1)
        ask(pair.url, tokens, budget=0.6, output_tokens=1)
    hits = pair.total("vllm:prefix_cache_hits") - before
    assert hits >= TRIES * (len(tokens) - 128), "the same budget reuses its blocks, however given"


def batch_line(number, **fields):
    message = {"role": "user", "content": "w7 " * 900}
    body = {"model": "tiny", "messages": [message], "max_tokens": 1, "logprobs": True} | fields
    line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line)


def budget(value):
    return {"vllm_xargs": {"s2o_sparsity_budget": value}}


def test_a_batch_file_is_checked_line_by_line(tiny_model, tmp_path):
    beams = {"use_beam_search": True, "n": 2, "logprobs": False}
    lines = [
        budget(0.3), budget("lots"), beams | budget("lots"), {"s2o_sparsity_budget": 0.3},
        beams | budget(1.0), beams | budget(0.9), budget(True), beams | budget(True),
    ]  # fmt: skip
    source, result = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(batch_line(i, **line) for i, line in enumerate(lines)))
    done = python(
        *CLI, "run-batch", "-i", str(source), "-o", str(result), "--model", tiny_model,
        "--served-model-name", "tiny", *SMALL, *S2O, "--s2o-max-request-budget", "0.7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in result.read_text().splitlines()]
    found = {one["custom_id"]: one["error"] and one["error"]["error"]["message"] for one in answers}
    assert found["0"] is None
    for number in "12":
        assert "s2o_sparsity_budget is 'lots', must be a number" in found[number]
    assert "must be 's2o_sparsity_budget' in vllm_xargs" in found["3"]
    for number in "67":
        assert "s2o_sparsity_budget is True, must be a number" in found[number]
    for number in "45":
        assert "must be at most 0.7 on this server" in found[number]
