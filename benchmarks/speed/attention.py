"""`s2o bench attention`: the operator against dense attention on one CUDA device.

One layer, one prompt, causal, bf16, and beside it the same over an fp8 cache. The baselines run in
the same process on the same inputs: FlashAttention 3 over pages (what vLLM serves with), over
contiguous keys and values, FlashAttention 2 (the paper's baseline) and cuDNN. No time is reported
unless the correctness check of the same run has passed. Beside the times stands what they are
worth: arithmetic and bytes of the visited tokens, over what the card itself does, measured in the
same run.

Inputs are random numbers, or the heads of a real model on a real text, put together to the shape:
then the errors of the same tensors stand beside the times.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from s2o_vllm.config import RANKINGS, S2OConfig

from ..quality.capture import CaptureError
from ..quality.samples import EvalError
from ..quality.tables import read_result
from ..result_file import RANDOM, REAL, header, inputs_of, save
from . import attention_plot
from .dense import (
    SHAPES,
    Prompt,
    baselines,
    ceilings,
    fa3_paged,
    make_prompt,
    milliseconds,
    quantised,
)
from .real_heads import Errors, RealHeads, relative_mse
from .sparse import ELEMENT_BYTES, Sparse, Times, check, columns, mean_times, timed

FP8_CAPABILITY = (9, 0)  # from which on FlashAttention takes an fp8 cache
FP8_DEFAULT = ((32768, 0.05), (131072, 0.05))  # contexts and budgets, unless it is asked for
REAL_REPEAT_MS = 80  # of one call on one set of real heads; there are several sets
REAL_GATE = 1e-3  # relative MSE of two dense attentions to real heads: in bf16 some 1e-5


def budgets_of(args: argparse.Namespace, kv_dtype: str, context: int) -> list[float]:
    """Return the budgets to measure: by default few of an fp8 cache, all where it is asked for."""
    if args.kv_dtypes is not None:
        return args.budgets if kv_dtype in args.kv_dtypes else []
    if kv_dtype == "bf16":
        return args.budgets
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        return []
    return [budget for budget in args.budgets if (context, budget) in FP8_DEFAULT]


def judged_from(context: int, min_context: int) -> int:
    """Return the history from which on rows are judged: that of a server's sparse rows.

    Lists of shorter ones have a few tokens, and would be the worst hundredth of rows by themselves.
    Of short prompts the second half is judged.
    """
    return max(min_context, min(S2OConfig().min_context, context // 2))


def measure(args: argparse.Namespace, card: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Yield one row per shape, context, cache, ranking and budget; ``card``: see :func:`ceilings`.

    Inputs are random. Rows of an fp8 cache hold FlashAttention 3 over its pages; the other
    baselines stay bf16.
    """
    for name, context in itertools.product(args.shapes, args.contexts):
        prompt = make_prompt(SHAPES[name], context)
        dense = {f"{kind}_ms": milliseconds(run) for kind, run in baselines(prompt).items()}
        first = judged_from(context, args.min_context)
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
                    sparse = Sparse(
                        prompt, ranking, budget, segment, args.min_context, args.min_budget_tokens
                    )
                    yield {
                        "shape": name,
                        "context": context,
                        "inputs": RANDOM,
                        "kv_dtype": kv_dtype,
                        "ranking": ranking,
                        "segment": segment,
                        "budget": budget,
                        "min_budget_tokens": args.min_budget_tokens,
                        **columns(timed(sparse, sparse.visits(first)), card),
                        **dense,
                        "relative_mse": None,
                        **gate,
                    }


def measure_real(
    args: argparse.Namespace, card: Mapping[str, float], real: RealHeads
) -> Iterator[dict[str, Any]]:
    """Yield one row per shape, context, ranking and budget, over sets of real heads.

    Times are means over the sets, errors are of the same tensors against paged FlashAttention 3.
    What takes the same time whatever the numbers are is timed on the first set: the other
    baselines, and the operator's dense mode, which must agree with FlashAttention 3.
    """
    for name, context in itertools.product(args.shapes, args.contexts):
        first = judged_from(context, args.min_context)
        gates = {ranking: check(SHAPES[name], ranking, "bf16") for ranking in args.rankings}
        settings = list(itertools.product(args.rankings, args.budgets))
        times: dict[tuple[str, float], list[Times]] = {setting: [] for setting in settings}
        errors = {setting: Errors() for setting in settings}
        dense: dict[str, float] = {}
        paged_ms: list[float] = []
        for own, prompt in real.sets(SHAPES[name], context):
            runs = baselines(prompt)
            paged = runs.pop("fa3_paged")
            truth = paged()
            paged_ms.append(milliseconds(paged, REAL_REPEAT_MS))
            if not dense:
                dense = {f"{kind}_ms": milliseconds(run) for kind, run in runs.items()}
                for ranking in args.rankings:
                    gates[ranking] |= check_dense(prompt, ranking, args, truth)
            for ranking, budget in settings:
                segment = args.segment or RANKINGS[ranking]
                sparse = Sparse(
                    prompt, ranking, budget, segment, args.min_context, args.min_budget_tokens
                )
                visits = sparse.visits(first)
                errors[ranking, budget].add(own, sparse.out, truth, first)
                times[ranking, budget].append(timed(sparse, visits, REAL_REPEAT_MS))
                del sparse
            del prompt, runs, paged, truth
            torch.cuda.empty_cache()
        for ranking, budget in settings:
            try:
                judged = errors[ranking, budget].columns()
            except ValueError as error:
                raise SystemExit(f"s2o bench attention: {error}: no time is reported.") from None
            yield {
                "shape": name,
                "context": context,
                "inputs": REAL,
                "model": real.model,
                "text": real.text,
                "sets": len(paged_ms),
                "kv_dtype": "bf16",
                "ranking": ranking,
                "segment": args.segment or RANKINGS[ranking],
                "budget": budget,
                "min_budget_tokens": args.min_budget_tokens,
                **columns(mean_times(times[ranking, budget]), card),
                "fa3_paged_ms": statistics.fmean(paged_ms),
                **dense,
                "judged_from": first,
                **judged,
                **gates[ranking],
            }


def check_dense(
    prompt: Prompt, ranking: str, args: argparse.Namespace, truth: torch.Tensor
) -> dict[str, float]:
    """Time the operator's dense mode on real heads and compare it with dense attention.

    Args:
        prompt: queries, keys and values.
        ranking: of the operator.
        args: the command's.
        truth: ``[tokens, heads, head_dim]``, FlashAttention 3's output.

    Returns:
        ``dense_mode_ms`` and ``dense_mode_mse``.

    Raises:
        SystemExit: if the relative MSE is more than ``REAL_GATE``.
    """
    context = prompt.query.shape[0]
    sparse = Sparse(prompt, ranking, 1.0, args.segment or RANKINGS[ranking], context + 1)
    dense_ms = milliseconds(sparse.run)
    mse = relative_mse(sparse.out, truth)
    if not mse <= REAL_GATE:
        raise SystemExit(
            f"s2o bench attention: on real heads the operator's dense mode differs by {mse:.1e} "
            f"from FlashAttention 3, more than {REAL_GATE:.0e}: no time is reported."
        )
    return {"dense_mode_ms": dense_ms, "dense_mode_mse": mse}


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
    of_real = ""
    if inputs_of(row) == REAL:
        dropped = row["dropped_mass"]
        of_real = (
            f"; real heads: relative MSE {row['relative_mse']:.4f}, worst layer "
            f"{row['relative_mse_worst_layer']:.4f}, worst hundredth of rows from "
            f"{row['row_error_p99']:.2f} on"
            + ("" if dropped is None else f", dropped mass {dropped:.3f}")
        )
    return (
        f"{row['shape']} {row['context']:>7} {row['kv_dtype']:>4} {row['ranking']:>10} "
        f"budget {row['budget']:<5} "
        f"rank {row['rank_ms']:7.2f} attend {row['attend_ms']:7.2f} "
        f"({row['attend_tflops']:.0f} TFLOP/s, {row['attend_of_ceiling']:.0%} of the ceiling) "
        f"total {total:7.2f} ms; FA3 paged {row['fa3_paged_ms']:7.2f} "
        f"({row['fa3_paged_ms'] / total:.1f}x), FA2 {row['fa2_ms']:7.2f} "
        f"({row['fa2_ms'] / total:.1f}x){of_fp8}{of_real}"
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


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="s2o bench attention", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["llama-3.1-8b"], metavar="NAME")
    add("--contexts", nargs="+", type=int, default=[8192, 32768, 131072], metavar="TOKENS")
    add("--budgets", nargs="+", type=float, default=[0.02, 0.05, 0.1, 0.2], metavar="B")
    add("--min-budget-tokens", type=int, default=S2OConfig().min_budget_tokens, metavar="TOKENS",
        help="that a query may visit however small the budget (default: %(default)s)")  # fmt: skip
    add("--rankings", nargs="+", choices=RANKINGS, default=list(RANKINGS), metavar="R")
    add("--inputs", nargs="+", choices=(RANDOM, REAL), metavar="KIND",
        help=f"{RANDOM}, {REAL} (default: both with a --model, else {RANDOM})")  # fmt: skip
    add("--model", type=Path, metavar="DIR",
        help="Hugging Face folder of the model whose heads are real")  # fmt: skip
    add("--text", type=Path, metavar="FILE", help="text that it reads")
    add("--kv-dtypes", nargs="+", choices=list(ELEMENT_BYTES), metavar="D",
        help="default: bf16, and fp8 at a budget of 0.05 from 32K on (random only)")  # fmt: skip
    add("--segment", type=int, default=0, metavar="QUERIES", help="default: the ranking's own")
    add("--min-context", type=int, default=0, metavar="TOKENS")
    add("--out", type=Path, default=Path("benchmarks/results/attention.json"), metavar="FILE")
    add("--plot", type=Path, default=Path("benchmarks/plots/attention.png"), metavar="FILE")
    add("--plot-only", action="store_true", help="measure nothing: draw what --out holds")
    return parser


def settle_inputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set the inputs where none are named; exit if something to make them of is missing."""
    if args.inputs is None:
        args.inputs = [RANDOM] if args.model is None else [RANDOM, REAL]
    if REAL not in args.inputs:
        return
    if args.model is None or args.text is None:
        parser.error(f"--inputs {REAL} needs --model and --text")
    if args.kv_dtypes is not None and "bf16" not in args.kv_dtypes:
        parser.error(f"--inputs {REAL} needs a bf16 cache among --kv-dtypes")
    if args.min_context >= min(args.contexts):
        parser.error(f"--min-context {args.min_context} leaves nothing sparse to judge")


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.plot_only:
        return redraw(args.out, args.plot)
    settle_inputs(parser, args)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: times of the interpreter say nothing")
    if "fp8" in (args.kv_dtypes or ()) and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        parser.error("an fp8 cache needs compute capability 9.0")
    real = None
    if REAL in args.inputs:  # first: a missing capture is reported before any time is measured
        try:
            real = captured(args)
        except CaptureError as error:
            print(f"s2o bench attention: {error}", file=sys.stderr)
            return 2
    card = ceilings()
    head = {**header(), **card}
    print(f"{head['device']}: {head['matmul_tflops']:.0f} TFLOP/s, {head['copy_gb_s']:.0f} GB/s")
    rows = []
    for row in itertools.chain(
        measure(args, card) if RANDOM in args.inputs else (),
        () if real is None else measure_real(args, card, real),
    ):
        rows.append(row)
        save(args.out, head, rows)
        print(summary(row), flush=True)
    print(f"{args.out}: {len(rows)} rows")
    draw({**head, "rows": rows}, args.plot)
    return 0


def captured(args: argparse.Namespace) -> RealHeads:
    """Run the model over its text, once for all contexts, and print how long that took."""
    since = time.perf_counter()
    shapes = {name: SHAPES[name] for name in args.shapes}
    real = RealHeads.read(args.model, args.text, max(args.contexts), shapes, "cuda")
    torch.cuda.empty_cache()
    print(
        f"captured {len(real.layers)} layers of {real.model} on {max(args.contexts):,} tokens of "
        f"{real.text} in {time.perf_counter() - since:.0f} s",
        flush=True,
    )
    return real
