"""What S2O's workspaces take beside the KV cache, by model and context: nothing runs.

    python -m s2o_vllm.benchmarks.speed.memory

Makes the workspaces of one layer's shape on PyTorch's `meta` device, which knows sizes and has no
memory; layers of one shape share them. `memory.json` has for each model and context the MiB of
ranking, selection and summaries, their sum, and the KV cache of one prompt of that length. The
table of docs/capacity.md is written from it.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from s2o_vllm.config import RANKINGS
from s2o_vllm.kernels.attention import summaries
from s2o_vllm.kernels.ranking.rankings import make_ranking
from s2o_vllm.kernels.selection.select import SelectWorkspace
from s2o_vllm.kernels.shape import Shape

from ..quality.tables import number, table
from ..result_file import header, save

PAGE = Path(__file__).parents[2] / "docs/capacity.md"
BEGIN, END = "<!-- memory: begin -->", "<!-- memory: end -->"
RANKING = "low_rank"
CHUNK = 8192
CONTEXTS = (32768, 131072, 262144)
MIB = 2**20


class Heads(NamedTuple):
    """What of a model decides on memory: of one GPU, and of the layers with full attention."""

    heads: int
    kv_heads: int
    head_dim: int
    layers: int


MODELS = {
    "Llama-3.1-8B": Heads(32, 8, 128, 32),
    "Qwen3-30B-A3B": Heads(32, 4, 128, 48),
    "Llama-3.3-70B, each of 4 GPUs": Heads(16, 2, 128, 80),
}


def size(*parts: Any) -> int:
    """Return the bytes of all tensors that objects hold, each storage once."""
    seen: set[int] = set()
    total = 0
    ahead = list(parts)
    while ahead:
        one = ahead.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            total += 0 if storage._cdata in seen else storage.nbytes()
            seen.add(storage._cdata)
        elif isinstance(one, Mapping):
            ahead += one.values()
        elif isinstance(one, list | tuple | set):
            ahead += one
        else:
            ahead += getattr(one, "__dict__", {}).values()
    return total


def row(name: str, heads: Heads, context: int) -> dict[str, Any]:
    """Return the row of a model and a context, in bf16."""
    meta = torch.device("meta")
    shape = Shape(*heads[:3], context, CHUNK, RANKINGS[RANKING], RANKING)
    segments, slots, _ = shape.limits
    selection = SelectWorkspace(segments, heads.kv_heads, context, slots, meta)
    means = summaries.workspace(heads.kv_heads, heads.head_dim, context, torch.bfloat16, meta)
    parts = {
        "ranking_mib": make_ranking(shape, torch.bfloat16, meta),
        "selection_mib": selection,
        "summaries_mib": means,
    }
    sizes = {key: round(size(part) / MIB, 1) for key, part in parts.items()}
    cache = 2 * 2 * heads.kv_heads * heads.head_dim * heads.layers * context
    return {
        "model": name,
        "context": context,
        "chunk": CHUNK,
        **sizes,
        "total_mib": round(sum(sizes.values()), 1),
        "kv_cache_mib": round(cache / MIB, 1),
    }


def memory_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of the page."""
    lines = [
        [
            one["model"], f"{one['context']:,}", number(one["total_mib"], 0),
            number(one["kv_cache_mib"], 0), f"{one['total_mib'] / one['kv_cache_mib']:.1%}",
        ]
        for one in rows
    ]  # fmt: skip
    head = ["", "--max-model-len", "S2O, MiB", "KV cache of one such prompt, MiB", "share"]
    return table(head, lines)


def page(text: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a page's text with the table of rows in its place."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{memory_table(rows)}\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m s2o_vllm.benchmarks.speed.memory", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    args = parser.parse_args(argv)
    rows = [row(name, heads, context) for name, heads in MODELS.items() for context in CONTEXTS]
    save(args.out, header(), rows)
    if PAGE.exists():
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(memory_table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
