import json
from pathlib import Path

import torch

from s2o_vllm.benchmarks.speed import memory

ROOT = Path(__file__).parents[2]


def test_the_page_says_what_the_file_says():
    rows = json.loads((ROOT / "benchmarks/results/memory.json").read_text())["rows"]
    text = (ROOT / "docs/capacity.md").read_text()
    assert len(rows) == len(memory.MODELS) * len(memory.CONTEXTS)
    assert text == memory.page(text, rows)


def test_tensors_are_counted_once_wherever_they_are_held():
    one = torch.empty(256, dtype=torch.float32, device="meta")
    both = {"a": one, "b": [one[:10], (torch.empty(3, dtype=torch.int64, device="meta"),)]}
    assert memory.size(both, both) == 4 * 256 + 3 * 8


def test_workspaces_grow_with_context_and_heads_and_stay_small():
    rows = {
        (name, context): memory.row(name, heads, context)
        for name, heads in memory.MODELS.items()
        for context in memory.CONTEXTS[:2]
    }
    for name in memory.MODELS:
        short, long = (rows[name, context] for context in memory.CONTEXTS[:2])
        assert short["total_mib"] < long["total_mib"] < 4 * short["total_mib"]
        assert 0.01 < long["total_mib"] / long["kv_cache_mib"] < 0.15
    llama, part = (rows[name, 131072] for name in ("Llama-3.1-8B", "Llama-3.3-70B, each of 4 GPUs"))
    assert part["total_mib"] < llama["total_mib"] / 2, "a quarter of the KV heads"
