"""`s2o bench ttft`: time to first token of stock vLLM and of S2O, on one card at the same time.

Prompts are random token ids, sent one at a time, to each server of :mod:`arms` in turn.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from s2o_vllm.cli.server_process import measured_density, read

from ..result_file import header, save
from . import arms
from .arms import Pair, Timing, add_arm_options
from .serving import parse, prompt, run_and_report

SHORT = 32768  # prompts below it are asked more often, in proportion


def measure(args: argparse.Namespace, pair: Pair, context: int) -> list[dict[str, Any]]:
    """Ask every arm in turn, the last one first the next time; return one row an arm."""
    asked: list[tuple[str, float | None]] = [("stock", None)]
    asked += [("s2o", budget) for budget in args.budgets]
    timings: dict[tuple[str, float | None], list[Timing]] = {arm: [] for arm in asked}
    density: dict[tuple[str, float | None], float | None] = dict.fromkeys(asked)
    urls = pair.urls
    for arm in asked:  # not measured
        before = read(f"{urls['s2o']}/metrics") or ""
        arms.ask(urls[arm[0]], prompt(context, 1, pair.vocabulary), arm[1])
        if arm[0] == "s2o":
            density[arm] = measured_density(urls["s2o"], before)
    for number in range(args.repeat * max(1, SHORT // context)):
        tokens = prompt(context, 2 + number, pair.vocabulary)
        for arm in asked if number % 2 else asked[::-1]:
            timings[arm].append(arms.ask(urls[arm[0]], tokens, arm[1]))
    return [
        {
            "model": args.name,
            "context": context,
            "chunk": args.chunk,
            "backend": name,
            "budget": 1.0 if budget is None else budget,
            "min_budget_tokens": args.min_budget_tokens,
            "dtype": args.dtype,
            "ttft_s": statistics.median(t.ttft_s for t in timings[name, budget]),
            "tpot_ms": statistics.median(t.tpot_ms() for t in timings[name, budget]),
            "density": density[name, budget],
            "ttft_all_s": [t.ttft_s for t in timings[name, budget]],
        }
        for name, budget in asked
    ]


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Serve both arms, measure, save."""
    rows: list[dict[str, Any]] = []
    with arms.both(args, folder, max(args.contexts) + arms.OUTPUT_TOKENS) as pair:
        for context in args.contexts:
            new = measure(args, pair, context)
            rows += new
            save(args.out, header(), rows)
            for row in new:
                ratio = new[0]["ttft_s"] / row["ttft_s"]
                print(
                    f"{row['model']} {row['context']:>7} tokens, {row['backend']:>5} budget "
                    f"{row['budget']:<5} first token {row['ttft_s']:7.3f} s ({ratio:.2f}x), then "
                    f"{row['tpot_ms']:6.2f} ms a token, density {row['density']}",
                    flush=True,
                )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="s2o bench ttft", description=f"{__doc__}\n{arms.__doc__}"
    )
    add_arm_options(parser, 8097, "ttft.json")
    add = parser.add_argument
    add("--contexts", nargs="+", type=int, default=[4096, 32768, 131000], metavar="TOKENS")
    add("--budgets", nargs="+", type=float, default=[0.05, 0.1], metavar="B")
    add("--repeat", type=int, default=3)
    args = parse(parser, argv)
    if args.repeat < 1:
        parser.error(f"--repeat is {args.repeat}, must be at least 1")
    return run_and_report("ttft", args, run)
