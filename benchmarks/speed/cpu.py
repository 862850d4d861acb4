"""A chunk of new tokens behind a history on a CPU: S2O's PyTorch beside vLLM's own attention.

    python -m s2o_vllm.benchmarks.speed.cpu

One layer, bf16, random numbers, shuffled pages of vLLM's CPU layout, all cores. Both are timed in
turn; the shortest counts. `sparse_s` includes reading the packed cache back, as a server does.
`s2o_vllm/cost.py` decides by these rows. No time is reported unless the operator that visits
everything agrees with vLLM's attention.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from s2o_vllm.config import RANKINGS
from s2o_vllm.kernels.layout import NUM_COUNTERS
from s2o_vllm.kernels.prefill import SparsePrefill
from s2o_vllm.kernels.shape import Shape
from s2o_vllm.kernels.work_list import PrefillRow, build_work_lists

from ..result_file import header, save

SHAPES = {"smollm2-135m": (9, 3, 64), "qwen2.5-0.5b": (14, 2, 64)}  # heads, KV heads, head_dim
PAGE = 128  # tokens of a block, vLLM's default on a CPU
DTYPE = torch.bfloat16
REPEATS = 3
GATE = (700, 300)  # history and new tokens of the check
GATE_ERROR = 0.01  # of two outputs that are rounded to bf16, relative


class Chunk:
    """A chunk behind a history in vLLM's packed cache.

    Args:
        shape: query heads, KV heads, head_dim.
        history: tokens before the chunk.
        new: tokens of the chunk.

    Attributes:
        out: ``[new, heads, head_dim]``, of the last call.
    """

    def __init__(self, shape: tuple[int, int, int], history: int, new: int):
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        from s2o_vllm.backend_cpu import layout_of

        self.shape, self.history, self.new = shape, history, new
        heads, kv_heads, head_dim = shape
        tokens, blocks = history + new, -(-(history + new) // PAGE)
        self.isa = _get_attn_isa(DTYPE, PAGE, head_dim)
        self.layout = layout_of(self.isa, PAGE, head_dim, DTYPE)
        self.query = torch.randn(new, heads, head_dim, dtype=DTYPE)
        key, value = (torch.randn(tokens, kv_heads, head_dim, dtype=DTYPE) for _ in range(2))
        self.cache = torch.zeros(blocks, kv_heads, PAGE, 2 * head_dim, dtype=DTYPE)
        halves = self.cache.view(blocks, kv_heads, 2 * PAGE, head_dim)
        self.keys, self.values = halves.chunk(2, dim=2)
        self.table = torch.randperm(blocks).int()[None]
        place = torch.arange(tokens)
        slots = self.table[0, place // PAGE].long() * PAGE + place % PAGE
        ops.cpu_attn_reshape_and_cache(key, value, self.keys, self.values, slots, self.isa)
        self.out = torch.empty_like(self.query)

    def dense(self) -> None:
        """Attend as vLLM's CPU backend does."""
        from vllm import _custom_ops as ops

        heads, kv_heads, head_dim = self.shape
        starts = torch.tensor([0, self.new], dtype=torch.int32)
        lengths = torch.tensor([self.history + self.new], dtype=torch.int32)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
            seq_lens=lengths, dtype=DTYPE, query_start_loc=starts, causal=True,
            sliding_window_size=-1, isa=self.isa, enable_kv_split=True,
        )  # fmt: skip
        ops.cpu_attention_with_kv_cache(
            query=self.query, key_cache=self.keys, value_cache=self.values,
            output=self.out, query_start_loc=starts, seq_lens=lengths, scale=head_dim**-0.5,
            causal=True, alibi_slopes=None, sliding_window=-1, block_table=self.table, softcap=0.0,
            scheduler_metadata=schedule, s_aux=None,
        )  # fmt: skip

    def sparse(self, ranking: str, budget: float) -> Callable[[], None]:
        """Return what attends as S2O's CPU backend does."""
        heads, kv_heads, head_dim = self.shape
        tokens, segment = self.history + self.new, RANKINGS[ranking]
        shape = Shape(heads, kv_heads, head_dim, tokens, self.new, segment, ranking)
        device = torch.device("cpu")
        operator = SparsePrefill(shape, DTYPE, device, scale=head_dim**-0.5)
        row = PrefillRow(0, 0, self.new, self.history, budget)
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64)
        order = torch.arange(self.table.shape[1], dtype=torch.int32)[None]

        def run() -> None:
            cache = self.layout.tokens(self.cache[self.table[0].long()])
            for work in build_work_lists([row], segment, 0, device, shape.limits):
                operator(self.query, cache, order, work, self.out, counters)

        return run


def check(shape: tuple[int, int, int], ranking: str) -> float:
    """Return the relative difference of both where lists hold the whole history.

    Raises:
        SystemExit: if it is more than ``GATE_ERROR``.
    """
    chunk = Chunk(shape, *GATE)
    chunk.dense()
    truth = chunk.out.double()
    chunk.out.fill_(float("nan"))
    chunk.sparse(ranking, 1.0)()
    error = float((chunk.out.double() - truth).norm() / truth.norm())
    if not error <= GATE_ERROR:
        raise SystemExit(f"the operator differs from vLLM's attention by {error:.2e}: no time")
    return error


def seconds(*runs: Callable[[], None]) -> list[float]:
    """Return the shortest time of each of some calls, which run in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for _, (number, run) in itertools.product(range(REPEATS), enumerate(runs)):
        start = time.perf_counter()
        run()
        times[number].append(time.perf_counter() - start)
    return [min(of_run) for of_run in times]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per shape, history, number of new tokens and budget."""
    for name in args.shapes:
        error = check(SHAPES[name], args.ranking)
        for history, new in itertools.product(args.histories, args.new_tokens):
            chunk = Chunk(SHAPES[name], history, new)
            sparse = [chunk.sparse(args.ranking, budget) for budget in args.budgets]
            dense_s, *all_s = seconds(chunk.dense, *sparse)
            for budget, sparse_s in zip(args.budgets, all_s, strict=True):
                yield {
                    "shape": name, "ranking": args.ranking, "history": history, "new_tokens": new,
                    "budget": budget, "dense_s": dense_s, "sparse_s": sparse_s, "error": error,
                }  # fmt: skip


def summary(row: dict[str, Any]) -> str:
    """Return a line about a row."""
    return (
        f"{row['shape']} {row['new_tokens']:>5} new behind {row['history']:>6}, budget "
        f"{row['budget']:g}: {row['sparse_s']:.3f} s, dense {row['dense_s']:.3f} "
        f"({row['dense_s'] / row['sparse_s']:.2f}x)"
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m s2o_vllm.benchmarks.speed.cpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    add("--histories", nargs="+", type=int, metavar="TOKENS", default=[2048, 6144, 14336, 30720])
    add("--new-tokens", nargs="+", type=int, metavar="TOKENS", default=[512, 2048])
    add("--budgets", nargs="+", type=float, metavar="B", default=[0.1, 0.25])
    add("--ranking", choices=RANKINGS, default="low_rank")
    add("--out", type=Path, default=Path("benchmarks/results/cpu.json"), metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for row in measure(args):
        rows.append(row)
        save(args.out, header(), rows)
        print(summary(row), flush=True)
    print(f"{args.out}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
