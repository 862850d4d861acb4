"""`s2o bench attention`: the operator against dense attention on one CUDA device.

One layer, one prompt, causal, bf16. The baselines run in the same process on the same inputs:
FlashAttention 3 over pages (what vLLM serves with), over contiguous keys and values, FlashAttention
2 (the paper's baseline) and cuDNN. No time is reported unless the correctness check of the same run
has passed. Beside the times stands what they are worth: the rate of the visited tokens' arithmetic,
and the card's own, measured in the same run.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from s2o_vllm.config import RANKINGS
from s2o_vllm.kernels import attend
from s2o_vllm.kernels.operator import Shape, SparsePrefill
from s2o_vllm.kernels.plan import (
    ELIGIBLE,
    NUM_COUNTERS,
    VISITED,
    PrefillRow,
    WorkList,
    build_work_lists,
)

from .dense import SHAPES, Prompt, baselines, ceilings, make_prompt, milliseconds
from .report import header, save

NEVER = 1e-30  # an early-stop threshold that no tile falls below: its cost alone
GATE_CONTEXT = 2048
GATE_FACTOR = 2.0  # promise 3: error at most twice that of PyTorch in the same dtype


class Sparse:
    """The operator over a whole prompt, its two halves callable on their own."""

    def __init__(self, prompt: Prompt, ranking: str, budget: float, segment: int, min_context: int):
        tokens, heads, head_dim = prompt.query.shape
        self.prompt = prompt
        self.operator = SparsePrefill(
            Shape(heads, prompt.kv_cache.shape[1], head_dim, tokens, 8192, segment, ranking),
            prompt.query.dtype, prompt.query.device, scale=prompt.scale,
        )  # fmt: skip
        self.waves = build_work_lists(
            [PrefillRow(0, 0, tokens, 0, budget)], segment, min_context,
            prompt.query.device, self.operator.shape.limits,
        )  # fmt: skip
        self.out = torch.empty_like(prompt.query)
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device="cuda")

    def arguments(self, work: WorkList) -> tuple:
        """Return what every launch takes first."""
        return self.prompt.query, self.prompt.kv_cache, self.prompt.block_table, work

    def run(self) -> torch.Tensor:
        """Rank, select and attend; return the output."""
        for work in self.waves:
            self.operator(*self.arguments(work), self.out, self.counters)
        return self.out

    def rank(self) -> None:
        """Rank and select only."""
        for work in self.waves:
            self.operator.rank(*self.arguments(work))

    def attend(self, stop_threshold: float = 0.0) -> None:
        """Attend only, over the lists that the last ranking left (the last wave's for all)."""
        assert self.operator.space is not None
        for work in self.waves:
            attend.attend(
                *self.arguments(work), self.operator.space.selection.lists(work), self.out,
                self.counters,
                scale=self.prompt.scale, stop_threshold=stop_threshold, tile=self.operator.tile,
            )  # fmt: skip

    def visits(self) -> tuple[float, float]:
        """Run once.

        Returns:
            The share of the history that was visited, and the floating-point operations of the
            two products over it and over the segments' own tokens.
        """
        self.counters.zero_()
        self.run()
        visited = float(self.counters[VISITED])
        tokens, heads, head_dim = self.prompt.query.shape
        own = heads * tokens * (self.operator.shape.segment + 1) / 2
        density = visited / float(self.counters[ELIGIBLE])
        return density, 4 * head_dim * (visited + own)


def check(shape: tuple[int, int, int], ranking: str) -> dict[str, float]:
    """Compare the operator with everything listed to fp64 attention.

    Returns:
        ``error`` of the operator and ``torch_error`` of bf16 PyTorch, ‖x − truth‖ / ‖truth‖.

    Raises:
        SystemExit: if the operator's error is more than ``GATE_FACTOR`` times PyTorch's.
    """
    prompt = make_prompt(shape, GATE_CONTEXT)
    group = shape[0] // shape[1]

    def dense(dtype: torch.dtype) -> torch.Tensor:
        query = prompt.query.to(dtype).transpose(0, 1)
        key, value = (
            x.to(dtype).repeat_interleave(group, 1).transpose(0, 1)
            for x in (prompt.key, prompt.value)
        )
        scores = query @ key.transpose(1, 2) * prompt.scale
        future = torch.ones(GATE_CONTEXT, GATE_CONTEXT, device="cuda").triu(1).bool()
        return (scores.masked_fill(future, float("-inf")).softmax(-1) @ value).transpose(0, 1)

    truth = dense(torch.float64)
    sparse = Sparse(
        prompt, ranking, 1.0, RANKINGS[ranking], 0
    )  # every list holds the whole history
    sparse.out.fill_(float("nan"))
    result = sparse.run().double()
    norm = truth.norm()
    error = float((result - truth).norm() / norm)
    torch_error = float((dense(torch.bfloat16).double() - truth).norm() / norm)
    if not error <= GATE_FACTOR * torch_error:
        raise SystemExit(
            f"s2o bench attention: the operator's error {error:.2e} is more than {GATE_FACTOR} "
            f"times PyTorch's {torch_error:.2e}: no time is reported."
        )
    return {"error": error, "torch_error": torch_error}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per shape, context and budget."""
    for name, context in itertools.product(args.shapes, args.contexts):
        prompt = make_prompt(SHAPES[name], context)
        dense = {f"{kind}_ms": milliseconds(run) for kind, run in baselines(prompt).items()}
        for ranking in args.rankings:
            gate = check(SHAPES[name], ranking)
            segment = args.segment or RANKINGS[ranking]
            dense_mode = Sparse(prompt, ranking, 1.0, segment, context + 1)
            dense["dense_mode_ms"] = milliseconds(dense_mode.run)
            for budget in args.budgets:
                sparse = Sparse(prompt, ranking, budget, segment, args.min_context)
                density, operations = sparse.visits()
                attend_ms = milliseconds(sparse.attend)
                stopping_ms = milliseconds(functools.partial(sparse.attend, NEVER))
                yield {
                    "shape": name,
                    "context": context,
                    "ranking": ranking,
                    "segment": segment,
                    "budget": budget,
                    "density": density,
                    "rank_ms": milliseconds(sparse.rank),
                    "attend_ms": attend_ms,
                    "attend_tflops": operations / attend_ms / 1e9,
                    "total_ms": milliseconds(sparse.run),
                    **dense,
                    "early_stop_overhead": stopping_ms / attend_ms - 1,
                    "relative_mse": None,
                    **gate,
                }


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="s2o bench attention", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["llama-3.1-8b"], metavar="NAME")
    add("--contexts", nargs="+", type=int, default=[8192, 32768, 131072], metavar="TOKENS")
    add("--budgets", nargs="+", type=float, default=[0.02, 0.05, 0.1, 0.2], metavar="B")
    add("--rankings", nargs="+", choices=RANKINGS, default=list(RANKINGS), metavar="R")
    add("--segment", type=int, default=0, metavar="QUERIES", help="default: the ranking's own")
    add("--min-context", type=int, default=0, metavar="TOKENS")
    add("--out", type=Path, default=Path("benchmarks/results/attention.json"), metavar="FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: times of the interpreter say nothing")
    head = {**header(), **ceilings()}
    print(f"{head['device']}: {head['matmul_tflops']:.0f} TFLOP/s, {head['copy_gb_s']:.0f} GB/s")
    rows = []
    for row in measure(args):
        rows.append(row)
        save(args.out, head, rows)
        print(
            f"{row['shape']} {row['context']:>7} {row['ranking']:>10} budget {row['budget']:<5} "
            f"rank {row['rank_ms']:7.2f} attend {row['attend_ms']:7.2f} "
            f"({row['attend_tflops']:.0f} TFLOP/s) "
            f"total {row['total_ms']:7.2f} ms; FA3 paged {row['fa3_paged_ms']:7.2f} "
            f"({row['fa3_paged_ms'] / row['total_ms']:.1f}x), FA2 {row['fa2_ms']:7.2f} "
            f"({row['fa2_ms'] / row['total_ms']:.1f}x)"
        )
    print(f"{args.out}: {len(rows)} rows")
    return 0
