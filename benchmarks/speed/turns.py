"""`s2o bench turns`: a chunk of new tokens behind a history, sparse and dense, on one CUDA device.

One layer, bf16, random numbers, shuffled pages: the whole operator beside FlashAttention 3 over the
same pages, in turn. Turns of a conversation are such chunks, and so is what a busy scheduler cuts
short. Beside the times stands what a server decides there (`s2o_vllm/cost.py`): a chunk with fewer
new tokens than ``least_new`` stays dense. No time is reported unless the correctness check of the
same run has passed.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from s2o_vllm.config import RANKINGS, S2OConfig
from s2o_vllm.cost import least_new_tokens
from s2o_vllm.kernels.layout import NUM_COUNTERS
from s2o_vllm.kernels.prefill import SparsePrefill
from s2o_vllm.kernels.shape import Shape
from s2o_vllm.kernels.work_list import PrefillRow, build_work_lists

from ..result_file import header, save
from .dense import SHAPES, fa3_paged, in_turn, make_prompt
from .sparse import check

REPEAT_MS = 60
CHUNK = 8192  # most new tokens


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per shape, history and number of new tokens."""
    segment = RANKINGS[args.ranking]
    for name in args.shapes:
        gate = check(SHAPES[name], args.ranking, "bf16")
        heads, kv_heads, head_dim = SHAPES[name]
        for history, new in itertools.product(args.histories, args.new_tokens):
            prompt = make_prompt(SHAPES[name], history + new)
            chunk = replace(prompt, query=prompt.query[history:])
            shape = Shape(heads, kv_heads, head_dim, history + new, CHUNK, segment, args.ranking)
            operator = SparsePrefill(shape, torch.bfloat16, chunk.query.device, scale=chunk.scale)
            row = PrefillRow(0, 0, new, history, args.budget, min_tokens=args.min_budget_tokens)
            works = build_work_lists([row], segment, 0, chunk.query.device, shape.limits)
            out = torch.empty_like(chunk.query)
            counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=out.device)
            launch = (chunk.query, chunk.kv_cache, chunk.block_table)

            def sparse(
                operator: SparsePrefill = operator, works: Any = works, launch: Any = launch,
                out: torch.Tensor = out, counters: torch.Tensor = counters,
            ) -> torch.Tensor:  # fmt: skip
                for work in works:
                    operator(*launch, work, out, counters)
                return out

            dense_ms, sparse_ms = in_turn(fa3_paged(chunk), sparse, repeat_ms=REPEAT_MS)
            yield {
                "shape": name,
                "ranking": args.ranking,
                "history": history,
                "new_tokens": new,
                "budget": args.budget,
                "min_budget_tokens": args.min_budget_tokens,
                "fa3_paged_ms": dense_ms,
                "total_ms": sparse_ms,
                "least_new": least_new_tokens(history, heads),
                **gate,
            }


def summary(row: dict[str, Any]) -> str:
    """Return a line about a row."""
    ratio = row["fa3_paged_ms"] / row["total_ms"]
    decided = "sparse" if row["new_tokens"] >= row["least_new"] else "dense"
    return (
        f"{row['shape']} {row['new_tokens']:>6} new behind {row['history']:>7}: "
        f"{row['total_ms']:7.3f} ms, dense {row['fa3_paged_ms']:7.3f} ({ratio:.2f}x): {decided}"
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="s2o bench turns", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["llama-3.1-8b"], metavar="NAME")
    add("--histories", nargs="+", type=int, metavar="TOKENS",
        default=[8192, 16384, 32768, 65536, 122880, 253952])  # fmt: skip
    add("--new-tokens", nargs="+", type=int, metavar="TOKENS",
        default=[16, 64, 128, 256, 512, 1024, 2048, 4096, 8192])  # fmt: skip
    add("--budget", type=float, default=0.05, metavar="B")
    add("--min-budget-tokens", type=int, default=S2OConfig().min_budget_tokens, metavar="TOKENS",
        help="that a query may visit however small the budget (default: %(default)s)")  # fmt: skip
    add("--ranking", choices=RANKINGS, default="low_rank")
    add("--out", type=Path, default=Path("benchmarks/results/turns.json"), metavar="FILE")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if max(args.new_tokens) > CHUNK:
        parser.error(f"--new-tokens has {max(args.new_tokens)}, must be at most {CHUNK}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    rows: list[dict[str, Any]] = []
    for row in measure(args):
        rows.append(row)
        save(args.out, header(), rows)
        print(summary(row), flush=True)
    print(f"{args.out}: {len(rows)} rows")
    return 0
