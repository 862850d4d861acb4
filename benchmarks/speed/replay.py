"""`s2o bench replay`: conversations replayed on stock vLLM and S2O, on one card in turn.

Starts two servers with prefix caching, or with ``--one-server`` S2O's alone, which is stock
attention at a budget of 1. Options that are not listed here are those of `s2o loadtest`, of which
this is a run: `s2o bench replay --concurrency 2,4 --goodput ttft:4000 tpot:100`.

The file has one row for each arm and load, and beside it stand every request (`.requests.jsonl`),
the rows as CSV, and a picture:

- `trace, backend, budget, rate, concurrency, context, sessions, requests, failed`; `context` is the
  longest prompt with its answer.
- `ttft_p50_ms, ttft_p99_ms, itl_p50_ms, itl_p99_ms`; `turn_ttft_p50_ms` by turn;
  `short_ttft_*_ms` of prompts below 4,096 tokens.
- `goodput_rps`: requests a second that met `objective`; `answered_rps`; `output_tok_s`;
  `duration_s`, that they are over.
- `prefix_hit_share` of prompt tokens; `density`: history tokens visited over eligible ones.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from s2o_vllm import loadtest
from s2o_vllm.cli.server_process import ServerError

from . import arms
from .serving import model_of

MAX_MODEL_LEN = 131072
HELD_TOKENS = 320_000  # of each server's KV cache: with two of Llama-3.1-8B's on 141 GB
PORT = 8430


@contextmanager
def servers(args: argparse.Namespace, folder: Path) -> Iterator[list[str]]:
    """Start the servers; yield the load test's arms.

    Raises:
        ServerError: if one does not start, or S2O at a budget of 1 answers other tokens than stock.
    """
    budget = f"budget={max(args.budgets):g}"
    args.server_args = [
        "--enable-prefix-caching", "--served-model-name", args.name, *args.server_args,
    ]  # fmt: skip
    if not args.one_server:
        with arms.both(args, folder, args.max_model_len, args.held_tokens) as pair:
            yield [f"stock={pair.urls['stock']}", f"s2o={pair.urls['s2o']},{budget}"]
        return
    held = 2 * args.held_tokens
    model, flags = model_of(args, folder)
    args.server_args = [*flags, *args.server_args]
    with arms.server(args, "s2o", model, folder, args.max_model_len, held) as started:
        url = started()
        yield [f"stock={url},budget=1", f"s2o={url},{budget}"]


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="s2o bench replay", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    arms.add_arm_options(parser, PORT, "replay.json")
    add = parser.add_argument
    add("--budgets", nargs=1, type=float, default=[0.05], metavar="B",
        help="that S2O's requests ask for (default: 0.05)")  # fmt: skip
    add("--one-server", action="store_true",
        help="both arms on S2O's server, with twice the room for keys and values")  # fmt: skip
    add("--held-tokens", type=int, default=HELD_TOKENS, metavar="TOKENS",
        help="room of each of two KV caches (default: %(default)s)")  # fmt: skip
    add("--max-model-len", type=int, default=MAX_MODEL_LEN, metavar="TOKENS")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is the load test's, 1 without a server."""
    parser = build_parser()
    args, words = parser.parse_known_args(argv)
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"there is no model at {args.model} (no config.json)")
    if "--replay" not in words:
        words = ["--replay", "agent", *words]
    with tempfile.TemporaryDirectory(prefix="s2o-replay-") as folder:
        try:
            with servers(args, Path(folder)) as both:
                given = [word for arm in both for word in ("--arm", arm)]
                return loadtest.main([*given, *words, "--output", str(args.out)])
        except ServerError as error:
            print(f"s2o bench replay: {error}", file=sys.stderr)
            return 1
