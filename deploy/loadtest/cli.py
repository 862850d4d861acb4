"""``s2o loadtest``: drive running servers with long prompts at rising rates."""

import argparse
import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from s2o_vllm.benchmarks.result_file import save

from . import bench, plot, report
from .arms import Arm, LoadTestError, parse_arms
from .server import Server, check_budget_is_honoured, check_reachable, history_counters, inspect

UNREACHABLE = 2  # also for arguments that cannot work
SETTLE = 1.5  # seconds until the server's counters have caught up with its last request
EPILOG = """\
One S2O server against itself, the stock arm by a budget of 1 (stock attention):
  s2o loadtest --arm stock=http://localhost:8000,budget=1 \\
               --arm s2o=http://localhost:8000,budget=0.1 --context 131072 --rates 0.05,0.1,0.2
Two servers, each with its own settings:
  s2o loadtest --arm stock=http://host-a:8000 --arm s2o=http://host-b:8000
Two servers one after the other on the same GPU: run twice, the second time with --append.
Prompts are random tokens: they measure time, and say nothing about quality.
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(
        prog="s2o loadtest",
        description="Time to first token at rising request rates, by stock `vllm bench serve`.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--arm", action="append", required=True, metavar="NAME=URL[,budget=B]",
        help="a server to load, and the budget its requests ask for; may be repeated")  # fmt: skip
    add("--context", type=_count, default=131072, help="prompt tokens (default: %(default)s)")
    add("--output-tokens", type=_count, default=64, help="answer tokens (default: %(default)s)")
    add("--rates", type=_rates, default=[0.05, 0.1, 0.2], metavar="R,R,...",
        help="requests per second, low to high (default: 0.05,0.1,0.2)")  # fmt: skip
    add("--requests", type=_count, default=20, help="at each rate (default: %(default)s)")
    add("--warmup", type=int, default=1, help="unmeasured requests per arm (default: %(default)s)")
    add("--concurrency", type=_count, help="most requests in flight (default: no limit)")
    add("--seed", type=int, default=0, help="of prompts and arrivals (default: %(default)s)")
    add("--model", help="served model (default: the server's first)")
    add("--tokenizer", help="name or folder of the tokenizer (default: the model's)")
    add("--device", help="what the servers run on (default: asked, or this machine)")
    add("--output", type=Path, default=Path("load.json"), help="default: %(default)s")
    add("--plot", type=Path, help="picture to draw (default: the output's name with .png)")
    add("--append", action="store_true", help="keep the rows that the output file has")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the load test.

    Returns:
        0 when every rate was measured, 1 when no request at all was answered, 2 when a server
        cannot be reached or an argument cannot work; rows measured before are on disk.
    """
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except LoadTestError as error:
        print(f"s2o loadtest: {error}", file=sys.stderr)
        return UNREACHABLE


def _run(args: argparse.Namespace) -> int:
    load = bench.Load(args.context, args.output_tokens, args.requests, args.concurrency, args.seed)
    arms = parse_arms(args.arm)
    servers = {arm: _prepare(arm, args, load) for arm in arms}
    head = report.header(list(servers.values()), args.device)
    rows = report.load_rows(args.output, head) if args.append else []
    session = uuid.uuid4().hex
    completed = 0
    for number, (arm, server) in enumerate(servers.items()):
        # Two arms may share a server, its budget and so its prefix cache.
        salt = f"{session}-{number}"
        print(f"{arm.name}: {server.model} at {arm.url}, {_budget(arm)}", flush=True)
        if args.warmup > 0:
            warm = bench.Load(load.context, load.output_tokens, args.warmup, None, load.seed)
            bench.measure(arm, server, warm, float("inf"), f"{salt}-warm-up")
        for rate in args.rates:
            check_reachable(arm)
            result, density = _measure(arm, server, load, rate, f"{salt}-{rate:g}")
            completed += result["completed"]
            row = bench.row(arm, load, rate, result)
            rows = report.add_row(rows, row)
            save(args.output, head, rows)
            print(_line(row, load, density), flush=True)
            if row["failed"]:
                error = bench.first_error(result) or "no answer"
                print(f"  {row['failed']} of {load.requests} failed, the first with: {error}")
    print(f"rows: {args.output}")
    _draw(args.output, args.plot or args.output.with_suffix(".png"))
    return 0 if completed else 1


def _prepare(arm: Arm, args: argparse.Namespace, load: bench.Load) -> Server:
    """Find out what would go wrong before anything is measured."""
    server = inspect(arm, args.model)
    longest = load.context + load.output_tokens
    if server.max_model_len is not None and longest > server.max_model_len:
        raise LoadTestError(
            f"{arm.name}: --context {load.context} and --output-tokens {load.output_tokens} are "
            f"{longest} tokens, must be at most the server's {server.max_model_len}"
        )
    check_budget_is_honoured(arm, server)
    if args.tokenizer:
        return Server(**{**vars(server), "tokenizer": args.tokenizer})
    return server


def _measure(
    arm: Arm, server: Server, load: bench.Load, rate: float, salt: str
) -> tuple[dict[str, Any], float | None]:
    """Return a measurement, and the share of history that was visited during it."""
    before = history_counters(arm) or {"visited": 0.0, "eligible": 0.0}
    result = bench.measure(arm, server, load, rate, salt)
    time.sleep(SETTLE)
    after = history_counters(arm)
    if after is None or after["eligible"] <= before["eligible"]:
        return result, None
    visited, eligible = (after[key] - before[key] for key in ("visited", "eligible"))
    return result, visited / eligible


def _line(row: dict[str, Any], load: bench.Load, density: float | None) -> str:
    def seconds(key: str) -> str:
        return "-" if row[key] is None else f"{row[key] / 1000:.3f} s"

    text = (
        f"  {row['rate']:g}/s: TTFT p50 {seconds('ttft_p50_ms')}, p99 {seconds('ttft_p99_ms')}; "
        f"{load.requests - row['failed']} answered, {row['failed']} failed"
    )
    return text + ("; dense" if density is None else f"; density {density:.3f}")


def _budget(arm: Arm) -> str:
    return "the server's own settings" if arm.budget is None else f"budget {arm.budget:g}"


def _draw(output: Path, picture: Path) -> None:
    try:
        plot.draw(json.loads(output.read_text()), picture)
        print(f"picture: {picture}")
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 's2o-vllm[bench]')")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}, must be a whole number from 1")
    return int(text)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(
            f"is {text!r}, must be numbers greater than 0, separated by commas"
        )
    return sorted(set(rates))
