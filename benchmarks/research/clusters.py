"""How many clusters, and how many passes, stand best for skipped tokens (ours).

``python -m s2o_vllm.benchmarks.research.clusters MODEL TEXT …`` captures layers of a model (see
`s2o eval attention`) and attends with the lists that serve: the error of a layer's output after its
output projection, over that output's variance, for every number of clusters and of passes.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2o_vllm.kernels import tuning
from s2o_vllm.kernels.layout import NUM_QUERIES, QUERY_START

from ..quality.capture import CaptureSpec, capture, load
from ..result_file import header, save
from . import tuned

PREFILL_CHUNK = tuning.CHUNK_SPANS * tuning.SPAN_LENGTH


def projection(model: Path, layer: int) -> Tensor:
    """Return a layer's output projection, float32 ``[width, heads * head_dim]``.

    Raises:
        SystemExit: if the model's files hold none of that name.
    """
    from safetensors import safe_open

    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118  it is no mapping
                return tensors.get_tensor(name).float()
    raise SystemExit(f"clusters: {model} holds no {name}")


def dense(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Return causal attention of some positions: ``[positions, heads, head_dim]``."""
    group = query.shape[0] // keys.shape[0]
    later = torch.arange(keys.shape[1], device=keys.device) > positions[:, None]
    return torch.stack(
        [
            ((one[positions] @ keys[head // group].T) * scale)
            .masked_fill(later, -math.inf)
            .softmax(-1)
            @ values[head // group]
            for head, one in enumerate(query)
        ],
        1,
    )


def judge(args: argparse.Namespace, spec: CaptureSpec, layer: int) -> Iterator[dict[str, Any]]:
    """Yield the error of a layer for each number of clusters and passes."""
    from s2o_vllm.kernels.attention import reference
    from s2o_vllm.kernels.layout import NUM_COUNTERS
    from s2o_vllm.kernels.prefill import SparsePrefill
    from s2o_vllm.kernels.selection import reference as selection
    from s2o_vllm.kernels.shape import Shape
    from s2o_vllm.kernels.work_list import Limits, PrefillRow, build_work_lists

    data = load(spec, args.cache, layer, args.device)
    query, keys, values = data.q.float(), data.k.float(), data.v.float()
    heads, context, head_dim = query.shape
    kv_heads, page, start = keys.shape[0], 16, (context - 1) // PREFILL_CHUNK * PREFILL_CHUNK
    if start == 0:
        raise SystemExit(f"clusters: --context is {context}, must be above {PREFILL_CHUNK}")
    pages = -(-context // page)
    cache = keys.new_zeros(kv_heads, pages * page, 2 * head_dim)
    cache[:, :context] = torch.cat([keys, values], -1)
    cache = cache.unflatten(1, (pages, page)).transpose(0, 1).contiguous()
    table = torch.arange(pages, dtype=torch.int32, device=query.device)[None]
    part = query[:, start : start + PREFILL_CHUNK].transpose(0, 1).contiguous()
    shape = Shape(heads, kv_heads, head_dim, context, PREFILL_CHUNK, 64, "low_rank")
    operator = SparsePrefill(shape, torch.float32, torch.device("cpu"), scale=data.scale)
    row = PrefillRow(0, 0, part.shape[0], start, args.budget, min_tokens=args.min_budget_tokens)
    limits = Limits(context, context * context)  # whatever the budget, one list
    (work,) = build_work_lists([row], 64, 0, query.device, limits)
    scores = operator.reference(part, cache, table, work, scale=data.scale)
    chosen = torch.linspace(0, work.num_segments - 1, args.segments).long()
    work = replace(work, segments=work.segments[chosen])
    rows = torch.cat(
        [torch.arange(line[QUERY_START], line[QUERY_START] + line[NUM_QUERIES])
         for line in work.segments.tolist()]
    )  # fmt: skip
    exact = dense(query, keys, values, rows + start, data.scale)
    weight = projection(args.model, layer)
    variance = (exact.flatten(1) @ weight.T).var(0).sum()
    for count in args.clusters:
        for passes in args.passes:
            summaries = reference.cluster(keys, values, start, torch.bfloat16, count, passes=passes)
            lists = selection.select(
                scores[chosen], table, work, page, tuning.TIERS_UNORDERED, summaries=summaries
            )
            out = torch.full_like(part, math.nan)
            counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64)
            reference.attend(
                part, cache, table, work, lists, summaries, out, counters, scale=data.scale,
                queries_per_tile=64,
            )  # fmt: skip
            lost = ((out[rows] - exact).flatten(1) @ weight.T).square().sum(1) / variance
            yield {
                "model": args.model.name, "text": spec.text.stem, "context": context,
                "layer": layer, "clusters": count, "passes": passes,
                "tuned": dict(tuned.CHANGED), "queries": len(rows),
                "list": round(float(lists.lengths.float().mean()), 1),
                "error": round(float(lost.mean()), 5),
                "rows_above_0.3": round(float((lost > 0.3).float().mean()), 4),
            }  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m s2o_vllm.benchmarks.research.clusters", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder")
    add("texts", type=Path, nargs="+", metavar="TEXT", help="UTF-8 files")
    add("--context", type=int, default=16384, metavar="TOKENS")
    add("--layers", type=int, nargs="+", required=True, metavar="N")
    add("--clusters", type=int, nargs="+", default=[tuning.CLUSTERS], metavar="N")
    add("--passes", type=int, nargs="+", default=[tuning.CLUSTER_PASSES], metavar="N")
    add("--budget", type=float, default=0.0125, metavar="B")
    add("--min-budget-tokens", type=int, default=512, metavar="TOKENS")
    add("--segments", type=int, default=12, metavar="N", help="of the last chunk, evenly spread")
    add("--cache", type=Path, default=Path(".cache/captures"), metavar="DIR")
    add("--device", default="cpu", help="that the model runs on")
    add("--out", type=Path, default=Path("benchmarks/results/quality_clusters.json"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(argv)
    rows: list[dict[str, Any]] = []
    for text in args.texts:
        spec = CaptureSpec(args.model, text, args.context, tuple(args.layers))
        capture(spec, args.cache, args.device)
        for layer in args.layers:
            for row in judge(args, spec, layer):
                rows.append(row)
                save(args.out, header(), rows)
                print(
                    f"{row['text']} layer {layer}, {row['clusters']} clusters, "
                    f"{row['passes']} passes: error {row['error']:.4f}, "
                    f"{row['rows_above_0.3']:.1%} of rows above 0.3, lists of {row['list']:.0f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
