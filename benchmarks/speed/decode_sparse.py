"""What sparse decode buys: time per token of stock vLLM and of S2O with a decode budget.

``python -m s2o_vllm.benchmarks.speed.decode_sparse``. As `s2o bench decode`, over long prompts:
both servers of :mod:`arms` on one card, in turn, the ratio pair by pair of the same prompts. Four
requests of 131,072 tokens do not fit a card twice with all of Llama-3.1-8B's layers: by default
the model has 8 of its 32, between which nothing else differs. What is not a layer (sampling, the
scheduler, the last product) then weighs four times as much as it would. Of short prompts the same
server decodes densely, in the same graphs: what these cost then is the ratio at 2,048 tokens.

Each row of `benchmarks/results/decode_sparse.json` is one comparison: those of `decode.json`, and
`layers`, `decode_budget`, and `density`, the share of the history that S2O visited, prefill's
included, or None where all is dense. It ends if a request decoded densely for want of a slot.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from s2o_vllm.cli.server_process import ServerError, measured_density, read

from ..result_file import header, save
from . import arms
from .arms import add_arm_options
from .decode import PIECE, compare, summary, together
from .serving import llama_shape, parse, run_and_report

NO_STATE = 'reason="no_decode_state"'


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Serve both arms, compare, save."""
    layers = None
    if args.model is None:
        args.model, flags = llama_shape(folder, args.layers)
        args.server_args, layers = [*flags, *args.server_args], args.layers
    else:
        layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    args.server_args = ["--stream-interval", str(PIECE), *args.server_args]
    sparse_from = min(max(args.contexts), args.decode_min_context)
    args.s2o_args = [
        "--s2o-decode-budget", str(args.decode_budget),
        "--s2o-decode-min-context", str(sparse_from),
        "--s2o-decode-requests", str(max(args.batches)),
    ]  # fmt: skip
    request = max(args.contexts) + args.output_tokens
    rows: list[dict[str, Any]] = []
    print(f"starting stock vLLM and S2O, {layers} layers", flush=True)
    with arms.both(args, folder, request, max(args.batches) * request) as pair:
        for context, batch in itertools.product(args.contexts, args.batches):
            print(f"{batch} x {context} tokens", flush=True)
            before = read(f"{pair.urls['s2o']}/metrics") or ""

            def tpot(url: str, prompts: list[list[int]]) -> float:
                started = time.perf_counter()
                found = together(url, prompts, args.output_tokens)
                arm = next(name for name, own in pair.urls.items() if own == url)
                taken = time.perf_counter() - started
                print(f"  {arm:>5} {found:7.3f} ms a token ({taken:.1f} s)", flush=True)
                return found

            row = {
                "model": args.name,
                "layers": layers,
                "what": "tpot_ms",
                "context": context,
                "batch": batch,
                "output_tokens": args.output_tokens,
                "chunk": args.chunk,
                "dtype": args.dtype,
                "budget": max(args.budgets),
                "decode_budget": args.decode_budget,
            }
            row |= compare(pair, context, batch, args.repeat, tpot)
            row["density"] = None
            if context >= sparse_from:
                row["density"] = measured_density(pair.urls["s2o"], before)
            rows.append(row)
            save(args.out, header(), rows)
            print(summary(row), flush=True)
            if NO_STATE in (read(f"{pair.urls['s2o']}/metrics") or ""):
                raise ServerError("some requests decoded densely: no slot held their state")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m s2o_vllm.benchmarks.speed.decode_sparse", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arm_options(parser, 8101, "decode_sparse.json")
    add = parser.add_argument
    add("--layers", type=int, default=8, help="of the model without weights")
    add("--contexts", nargs="+", type=int, default=[2048, 130_000], metavar="TOKENS")
    add("--output-tokens", type=int, default=256, metavar="TOKENS")
    add("--batches", nargs="+", type=int, default=[1, 4], metavar="N")
    add("--repeat", type=int, default=3, help="pairs; one more is not counted")
    add("--budgets", nargs=1, type=float, default=[0.05], metavar="B", help="of prefill")
    add("--decode-budget", type=float, default=0.05, metavar="B")
    add("--decode-min-context", type=int, default=32768, metavar="TOKENS")
    args = parse(parser, argv)
    if args.repeat < 2 or args.output_tokens <= 2 * PIECE:
        parser.error(
            f"--repeat is {args.repeat}, must be at least 2; --output-tokens is "
            f"{args.output_tokens}, must be more than {2 * PIECE}"
        )
    return run_and_report("decode_sparse", args, run)


if __name__ == "__main__":
    sys.exit(main())
