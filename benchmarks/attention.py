"""`s2o bench attention`: the operator against dense attention on one CUDA device.

One layer, one prompt, causal, bf16, and beside it the same over an fp8 cache. The baselines run in
the same process on the same inputs: FlashAttention 3 over pages (what vLLM serves with), over
contiguous keys and values, FlashAttention 2 (the paper's baseline) and cuDNN. No time is reported
unless the correctness check of the same run has passed. Beside the times stands what they are
worth: arithmetic and bytes of the visited tokens, over what the card itself does, measured in the
same run.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from s2o_vllm.config import RANKINGS
from s2o_vllm.kernels import attend
from s2o_vllm.kernels.operator import Shape, SparsePrefill
from s2o_vllm.kernels.plan import (
    ELIGIBLE,
    NUM_COUNTERS,
    NUM_QUERIES,
    VISITED,
    Lists,
    PrefillRow,
    WorkList,
    build_work_lists,
)
from s2o_vllm.kernels.tiles import AttendTile

from . import attention_plot
from .dense import (
    SHAPES,
    Prompt,
    baselines,
    ceilings,
    fa3_paged,
    in_turn,
    make_prompt,
    milliseconds,
    quantised,
    to_fp8,
)
from .quality.samples import EvalError
from .quality.tables import read_result
from .report import header, save

NEVER = 1e-30  # an early-stop threshold that no tile falls below: its cost alone
GATE_CONTEXT = 2048
GATE_FACTOR = 2.0  # promise 3: error at most twice that of PyTorch in the same dtype
ELEMENT_BYTES = {"bf16": 2, "fp8": 1}  # of the cache
FP8_CAPABILITY = (9, 0)  # from which on FlashAttention takes an fp8 cache
FP8_DEFAULT = ((32768, 0.05), (131072, 0.05))  # contexts and budgets, unless it is asked for


class Visits(NamedTuple):
    """What one run of the operator visits.

    Attributes:
        density: share of the history.
        operations: floating-point operations, see :func:`attend_operations`.
        gathered: bytes, see :func:`attend_bytes`.
    """

    density: float
    operations: float
    gathered: float


def lengths(tokens: int, segment: int) -> list[int]:
    """Return the queries of each segment of a prompt; the last may be shorter."""
    return [min(segment, tokens - start) for start in range(0, tokens, segment)]


def attend_operations(shape: Shape, tokens: int, visited: float) -> float:
    """Return the floating-point operations of the two products over what is visited.

    Args:
        shape: sizes of the operator.
        tokens: of the prompt.
        visited: history tokens, summed over queries and heads.

    Returns:
        4 * head_dim for each of them and, causal, for each of the segments' own.
    """
    own = shape.heads * sum(n * (n + 1) / 2 for n in lengths(tokens, shape.segment))
    return 4 * shape.head_dim * (visited + own)


def attend_bytes(
    shape: Shape, block_m: int, tokens: int, visited: float, kv_dtype: str = "bf16"
) -> float:
    """Return the bytes of keys and values that the attend kernel gathers.

    A tile's rows share what it loads: key and value of a token that it visits, once. What several
    tiles visit counts for each, though the L2 cache may hold it. Queries, output, lists and the
    estimate of the dropped mass are not counted.

    Args:
        shape: sizes of the operator.
        block_m: rows (queries x heads of a group) that a tile has room for.
        tokens: of the prompt, a multiple of the segment or else the last one counts as whole.
        visited: history tokens, summed over queries and heads.
        kv_dtype: of the cache, ``bf16`` or ``fp8``.
    """
    group = shape.heads // shape.kv_heads
    queries = block_m // group
    segment = min(shape.segment, tokens)
    rows = segment * group / -(-segment // queries)  # of a tile in the mean: the last has fewer
    own = sum(
        min(start + queries, n)  # from the segment's first token to the tile's last
        for n in lengths(tokens, shape.segment)
        for start in range(0, n, queries)
    )
    token = 2 * shape.head_dim * ELEMENT_BYTES[kv_dtype]
    return token * (visited / rows + shape.kv_heads * own)


def against_ceilings(
    operations: float, gathered: float, attend_ms: float, card: Mapping[str, float]
) -> dict[str, float]:
    """Return what operations and bytes would take at the card's ceilings, and how near the time is.

    Args:
        operations: floating-point operations.
        gathered: bytes.
        attend_ms: measured milliseconds.
        card: ``matmul_tflops`` and ``copy_gb_s``, see :func:`ceilings`.

    Returns:
        ``attend_tflops``, the rate of the operations; ``attend_operations`` and ``attend_bytes``;
        ``arithmetic_ms`` and ``bytes_ms``, the time of either alone; ``attend_of_ceiling``, the
        larger of the two over ``attend_ms``. More than 1 is possible: what tiles share is gathered
        from L2 faster than a copy from memory.
    """
    arithmetic_ms = operations / card["matmul_tflops"] / 1e9
    bytes_ms = gathered / card["copy_gb_s"] / 1e6
    return {
        "attend_tflops": operations / attend_ms / 1e9,
        "attend_operations": operations,
        "attend_bytes": gathered,
        "arithmetic_ms": arithmetic_ms,
        "bytes_ms": bytes_ms,
        "attend_of_ceiling": max(arithmetic_ms, bytes_ms) / attend_ms,
    }


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
        self.lists: list[Lists] = []
        self.query, self.k_scale, self.query_e4m3 = prompt.query, prompt.unit, None
        if prompt.kv_dtype == "fp8":  # as a layer hands it on, in units of its own
            self.query_e4m3 = to_fp8(prompt.query)
            self.query = self.query_e4m3.to(prompt.query.dtype)
            self.k_scale *= prompt.unit
        self.units: dict[str, Any] = {
            "k_scale": self.k_scale, "v_scale": prompt.unit, "query_e4m3": self.query_e4m3,
        }  # fmt: skip

    def arguments(self, work: WorkList) -> tuple:
        """Return what every launch takes first."""
        return self.query, self.prompt.kv_cache, self.prompt.block_table, work

    def tile(self, work: WorkList) -> AttendTile:
        """Return the tile that a wave is attended to with."""
        return self.operator.tile(work, self.query_e4m3 is not None)

    def run(self) -> torch.Tensor:
        """Rank, select and attend; return the output."""
        for work in self.waves:
            self.operator(*self.arguments(work), self.out, self.counters, **self.units)
        return self.out

    def rank(self) -> None:
        """Rank and select only."""
        for work in self.waves:
            self.operator.rank(*self.arguments(work), k_scale=self.k_scale)

    def attend(self, stop_threshold: float = 0.0) -> None:
        """Attend only, over the lists that :meth:`visits` kept and the last chunk's regions."""
        for work, lists in zip(self.waves, self.lists, strict=True):
            attend.attend(
                *self.arguments(work), lists, self.operator.space.regions, self.out, self.counters,
                scale=self.prompt.scale * self.k_scale, v_scale=self.prompt.unit,
                stop_threshold=stop_threshold, query_e4m3=self.query_e4m3, tile=self.tile(work),
            )  # fmt: skip

    def visits(self) -> Visits:
        """Run once; keep the lists and return what was visited."""
        self.counters.zero_()
        self.lists.clear()
        shape, gathered, before = self.operator.shape, 0.0, 0.0
        for work in self.waves:
            self.operator(*self.arguments(work), self.out, self.counters, **self.units)
            lists = self.operator.space.selection.lists(work)
            self.lists.append(Lists(*(part.clone() for part in lists)))
            visited, queries = float(self.counters[VISITED]), int(work.items[:, NUM_QUERIES].sum())
            gathered += attend_bytes(
                shape, self.tile(work).block_m, queries, visited - before, self.prompt.kv_dtype
            )
            before = visited
        return Visits(
            visited / float(self.counters[ELIGIBLE]),
            attend_operations(shape, self.prompt.query.shape[0], visited),
            gathered,
        )


def check(shape: tuple[int, int, int], ranking: str, kv_dtype: str) -> dict[str, float]:
    """Compare the operator with everything listed to fp64 attention over what is in the cache.

    Returns:
        ``error`` of the operator and ``torch_error`` of bf16 PyTorch, ‖x − truth‖ / ‖truth‖. Of
        an fp8 cache also ``quantised_error`` and ``fa3_quantised_error``, those of the operator
        and of FlashAttention 3 against fp64 attention before anything was quantised.

    Raises:
        SystemExit: if the operator's error is more than ``GATE_FACTOR`` times PyTorch's.
    """
    before = make_prompt(shape, GATE_CONTEXT)
    prompt = quantised(before) if kv_dtype == "fp8" else before
    group = shape[0] // shape[1]

    def dense(dtype: torch.dtype, of: Prompt) -> torch.Tensor:
        query = of.query.to(dtype).transpose(0, 1)
        key, value = (x.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for x in of.cached())
        scores = query @ key.transpose(1, 2) * prompt.scale
        future = torch.ones(GATE_CONTEXT, GATE_CONTEXT, device="cuda").triu(1).bool()
        return (scores.masked_fill(future, float("-inf")).softmax(-1) @ value).transpose(0, 1)

    def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
        return float((x.double() - truth).norm() / truth.norm())

    truth = dense(torch.float64, prompt)
    sparse = Sparse(
        prompt, ranking, 1.0, RANKINGS[ranking], 0
    )  # every list holds the whole history
    sparse.out.fill_(float("nan"))
    result = sparse.run()
    error = relative(result, truth)
    torch_error = relative(dense(torch.bfloat16, prompt), truth)
    if not error <= GATE_FACTOR * torch_error:
        raise SystemExit(
            f"s2o bench attention: the operator's error {error:.2e} is more than {GATE_FACTOR} "
            f"times PyTorch's {torch_error:.2e}: no time is reported."
        )
    errors = {"error": error, "torch_error": torch_error}
    if kv_dtype == "fp8":
        unquantised = dense(torch.float64, before)
        errors["quantised_error"] = relative(result, unquantised)
        errors["fa3_quantised_error"] = relative(fa3_paged(prompt)(), unquantised)
    return errors


def budgets_of(args: argparse.Namespace, kv_dtype: str, context: int) -> list[float]:
    """Return the budgets to measure: by default few of an fp8 cache, all where it is asked for."""
    if args.kv_dtypes is not None:
        return args.budgets if kv_dtype in args.kv_dtypes else []
    if kv_dtype == "bf16":
        return args.budgets
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        return []
    return [budget for budget in args.budgets if (context, budget) in FP8_DEFAULT]


def measure(args: argparse.Namespace, card: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Yield one row per shape, context, cache, ranking and budget; ``card``: see :func:`ceilings`.

    Rows of an fp8 cache hold FlashAttention 3 over its pages; the other baselines stay bf16.
    """
    for name, context in itertools.product(args.shapes, args.contexts):
        prompt = make_prompt(SHAPES[name], context)
        dense = {f"{kind}_ms": milliseconds(run) for kind, run in baselines(prompt).items()}
        for kv_dtype in ELEMENT_BYTES:
            budgets = budgets_of(args, kv_dtype, context)
            if not budgets:
                continue
            if kv_dtype == "fp8":
                prompt = quantised(prompt)
                dense["fa3_paged_ms"] = milliseconds(fa3_paged(prompt))
            for ranking in args.rankings:
                gate = check(SHAPES[name], ranking, kv_dtype)
                segment = args.segment or RANKINGS[ranking]
                dense_mode = Sparse(prompt, ranking, 1.0, segment, context + 1)
                dense["dense_mode_ms"] = milliseconds(dense_mode.run)
                for budget in budgets:
                    sparse = Sparse(prompt, ranking, budget, segment, args.min_context)
                    yield {
                        "shape": name,
                        "context": context,
                        "kv_dtype": kv_dtype,
                        "ranking": ranking,
                        "segment": segment,
                        "budget": budget,
                        **times(sparse, card),
                        **dense,
                        "relative_mse": None,
                        **gate,
                    }


def times(sparse: Sparse, card: Mapping[str, float]) -> dict[str, float]:
    """Return what is measured of one setting of the operator."""
    density, operations, gathered = sparse.visits()
    attend_ms, stopping_ms = in_turn(sparse.attend, functools.partial(sparse.attend, NEVER))
    return {
        "density": density,
        "rank_ms": milliseconds(sparse.rank),
        "attend_ms": attend_ms,
        **against_ceilings(operations, gathered, attend_ms, card),
        "total_ms": milliseconds(sparse.run),
        "early_stop_overhead": stopping_ms / attend_ms - 1,
    }


def summary(row: Mapping[str, Any]) -> str:
    """Return a row as one printed line."""
    total, quantised_error = row["total_ms"], row.get("quantised_error")
    of_fp8 = (
        ""
        if quantised_error is None
        else (
            f"; fp8 costs an error of {quantised_error:.1%} (FA3 {row['fa3_quantised_error']:.1%})"
        )
    )
    return (
        f"{row['shape']} {row['context']:>7} {row['kv_dtype']:>4} {row['ranking']:>10} "
        f"budget {row['budget']:<5} "
        f"rank {row['rank_ms']:7.2f} attend {row['attend_ms']:7.2f} "
        f"({row['attend_tflops']:.0f} TFLOP/s, {row['attend_of_ceiling']:.0%} of the ceiling) "
        f"total {total:7.2f} ms; FA3 paged {row['fa3_paged_ms']:7.2f} "
        f"({row['fa3_paged_ms'] / total:.1f}x), FA2 {row['fa2_ms']:7.2f} "
        f"({row['fa2_ms'] / total:.1f}x){of_fp8}"
    )


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """Draw a result file's content and print where; return whether matplotlib is there for it."""
    try:
        attention_plot.draw(result, path)
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 's2o-vllm[bench]')")
        return False
    print(f"picture: {path}")
    return True


def redraw(results: Path, picture: Path) -> int:
    """Draw what an earlier run measured; return the exit code."""
    try:
        result = read_result(results)
        problem = f"there is no result file {results} to draw" if result is None else ""
        if result is not None and not result["rows"]:
            problem = f"{results} has no rows to draw"
    except EvalError as error:
        result, problem = None, str(error)
    if result is None or problem:
        print(f"s2o bench attention: {problem}.", file=sys.stderr)
        return 2
    return 0 if draw(result, picture) else 2


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="s2o bench attention", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["llama-3.1-8b"], metavar="NAME")
    add("--contexts", nargs="+", type=int, default=[8192, 32768, 131072], metavar="TOKENS")
    add("--budgets", nargs="+", type=float, default=[0.02, 0.05, 0.1, 0.2], metavar="B")
    add("--rankings", nargs="+", choices=RANKINGS, default=list(RANKINGS), metavar="R")
    add("--kv-dtypes", nargs="+", choices=list(ELEMENT_BYTES), metavar="D",
        help="default: bf16, and fp8 at a budget of 0.05 from 32K on")  # fmt: skip
    add("--segment", type=int, default=0, metavar="QUERIES", help="default: the ranking's own")
    add("--min-context", type=int, default=0, metavar="TOKENS")
    add("--out", type=Path, default=Path("benchmarks/results/attention.json"), metavar="FILE")
    add("--plot", type=Path, default=Path("benchmarks/plots/attention.png"), metavar="FILE")
    add("--plot-only", action="store_true", help="measure nothing: draw what --out holds")
    args = parser.parse_args(argv)
    if args.plot_only:
        return redraw(args.out, args.plot)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: times of the interpreter say nothing")
    if "fp8" in (args.kv_dtypes or ()) and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        parser.error("an fp8 cache needs compute capability 9.0")
    card = ceilings()
    head = {**header(), **card}
    print(f"{head['device']}: {head['matmul_tflops']:.0f} TFLOP/s, {head['copy_gb_s']:.0f} GB/s")
    rows = []
    for row in measure(args, card):
        rows.append(row)
        save(args.out, head, rows)
        print(summary(row))
    print(f"{args.out}: {len(rows)} rows")
    draw({**head, "rows": rows}, args.plot)
    return 0
