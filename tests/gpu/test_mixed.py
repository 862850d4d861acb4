"""`s2o bench serve` on the card: Llama-3.1-8B's shape, prompts of 1K to 128K tokens."""

import json

import pytest

from s2o_vllm.benchmarks.speed import serve

pytestmark = pytest.mark.e2e

REQUESTS = 60  # some 1.5 million prompt tokens; `s2o bench serve` itself sends 200
GROWTH_MIB = 64  # the allocator's rounding; a leak of one prompt's KV cache would be gigabytes


def test_a_mixed_run_fails_nothing_compiles_nothing_and_leaks_nothing(tmp_path):
    out = tmp_path / "serve.json"
    code = serve.main(["--requests", str(REQUESTS), "--out", str(out)])
    summary = json.loads(out.read_text())["summary"]
    assert (summary["failed"], summary["left_running"]) == (0, 0)
    assert (summary["answered"], summary["aborted"]) == (54, 6)
    assert 0.5 * summary["shared_tokens"] < summary["cached_tokens"]
    assert summary["kernels"]["ready"] > 5, "S2O's kernels were compiled before it was ready"
    assert summary["kernels"]["after_ready"] == []
    assert summary["jit_warnings"] == []
    memory = summary["gpu_memory_mib"]
    assert memory["end"] - memory["warm"] <= GROWTH_MIB
    assert summary["density"] < 0.5
    assert code == 0
