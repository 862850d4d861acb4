"""`s2o bench decode`: what S2O costs where it does nothing: decode, and prompts that stay dense.

Requests are sent to both servers of :mod:`arms`, to one at a time. What counts is the ratio of
stock vLLM's time to S2O's, pair by pair of the same prompts: 1 is no difference. Both servers pass
on tokens in pieces of ``PIECE``, so that the client keeps up with a batch.

Each row of `benchmarks/results/decode.json` is one comparison: `what` (`tpot_ms`: of a request,
once all of the batch decode; `ttft_s`), `context` and `output_tokens` of a request, `batch`; the
medians `stock` and `s2o`, with all values; `ratio`, the geometric mean of the pairs' ratios, with
its 95 % interval (Student's, of the logarithms) in `ratio_low` and `ratio_high`.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..quality.intervals import mean_student
from ..result_file import header, save
from . import arms
from .arms import Pair, Timing, add_arm_options
from .serving import parse, prompt, run_and_report

PIECE = 8  # tokens that a server passes on at once, after the first
LARGE = 8  # requests of a batch that is repeated half as often, at least


def together(url: str, prompts: Sequence[list[int]], output_tokens: int) -> float:
    """Ask at once; return the median ms per token from the last first token to the first end."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = [pool.submit(arms.ask, url, one, None, output_tokens) for one in prompts]
        timings: list[Timing] = [one.result() for one in asked]
    since = max(timing.chunks[0].at for timing in timings)
    until = min(timing.chunks[-1].at for timing in timings)
    return statistics.median(timing.tpot_ms(since, until) for timing in timings)


def compare(
    pair: Pair, context: int, batch: int, repeat: int, time: Callable[[str, list[list[int]]], float]
) -> dict[str, Any]:
    """Time both arms on the same prompts, in turn; return what a row says of it.

    Args:
        pair: the servers.
        context: tokens of a prompt.
        batch: prompts at once.
        repeat: pairs; one more is not counted.
        time: of a URL and prompts.
    """
    values: dict[str, list[float]] = {"stock": [], "s2o": []}
    for number in range(repeat + 1):
        seeds = range(number * batch, (number + 1) * batch)
        prompts = [prompt(context, 1 + seed, pair.vocabulary) for seed in seeds]
        for arm in list(values) if number % 2 else list(values)[::-1]:
            values[arm].append(time(pair.urls[arm], prompts))
    stock, s2o = values["stock"][1:], values["s2o"][1:]
    logs = mean_student([math.log(a / b) for a, b in zip(stock, s2o, strict=True)])
    return {
        "stock": statistics.median(stock),
        "s2o": statistics.median(s2o),
        "ratio": math.exp(logs.value),
        "ratio_low": math.exp(logs.low),
        "ratio_high": math.exp(logs.high),
        "stock_all": stock,
        "s2o_all": s2o,
    }


def measure(args: argparse.Namespace, pair: Pair) -> Iterator[dict[str, Any]]:
    """Yield the rows of the result file."""

    def row(what: str, context: int, batch: int, output_tokens: int) -> dict[str, Any]:
        own = {"model": args.name, "what": what, "context": context, "batch": batch}
        return own | {"output_tokens": output_tokens, "chunk": args.chunk, "dtype": args.dtype}

    def tpot(url: str, prompts: list[list[int]]) -> float:
        return together(url, prompts, args.output_tokens)

    def ttft(url: str, prompts: list[list[int]]) -> float:
        return arms.ask(url, prompts[0], None, 1).ttft_s

    for batch in args.batches:
        repeat = args.repeat if batch < LARGE else max(2, args.repeat // 2)
        own = row("tpot_ms", args.context, batch, args.output_tokens)
        yield own | compare(pair, args.context, batch, repeat, tpot)
    for context in args.ttft_contexts:
        yield row("ttft_s", context, 1, 1) | compare(pair, context, 1, args.ttft_repeat, ttft)


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Serve both arms, compare, save."""
    args.server_args = ["--stream-interval", str(PIECE), *args.server_args]
    request = args.context + args.output_tokens
    longest = max(request, *(context + 1 for context in args.ttft_contexts))
    rows: list[dict[str, Any]] = []
    with arms.both(args, folder, longest, max(args.batches) * request) as pair:
        for row in measure(args, pair):
            rows.append(row)
            save(args.out, header(), rows)
            print(summary(row), flush=True)
    return rows


def summary(row: dict[str, Any]) -> str:
    """Return a row as one printed line."""
    return (
        f"{row['what']:>7} of {row['batch']:>2} x {row['context']} tokens: stock "
        f"{row['stock']:.3f}, S2O {row['s2o']:.3f}, ratio {row['ratio']:.4f} "
        f"({row['ratio_low']:.4f} to {row['ratio_high']:.4f}, {len(row['s2o_all'])} pairs)"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="s2o bench decode", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arm_options(parser, 8095, "decode.json")
    add = parser.add_argument
    add("--context", type=int, default=2048, metavar="TOKENS", help="of prompts that decode")
    add("--output-tokens", type=int, default=256, metavar="TOKENS")
    add("--batches", nargs="+", type=int, default=[1, 16], metavar="N")
    add("--repeat", type=int, default=8, help="pairs at batch 1; half as many of a large batch")
    add("--ttft-contexts", nargs="+", type=int, default=[4096, 8192], metavar="TOKENS")
    add("--ttft-repeat", type=int, default=24, help="pairs")
    add("--budgets", nargs=1, type=float, default=[0.05], metavar="B", help="of prompts above")
    args = parse(parser, argv)
    if min(args.repeat, args.ttft_repeat) < 2 or args.output_tokens <= 2 * PIECE:
        parser.error(
            f"--repeat is {args.repeat} and --ttft-repeat {args.ttft_repeat}, must be at least 2; "
            f"--output-tokens is {args.output_tokens}, must be more than {2 * PIECE}"
        )
    return run_and_report("decode", args, run)
