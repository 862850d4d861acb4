"""``s2o loadtest``: drive running servers with long prompts at rising rates."""

import argparse
import json
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2o_vllm.benchmarks.result_file import save

from . import bench, plot, report
from .arms import Arm, LoadTestError, parse_arms
from .replay import replay
from .server import (
    SETTLE,
    Server,
    check_budget_is_honoured,
    check_reachable,
    history_counters,
    inspect,
    share,
)

UNREACHABLE = 2  # also for arguments that cannot work
RATES = [0.05, 0.1, 0.2]  # requests per second
EPILOG = """\
One S2O server against itself, the stock arm by a budget of 1 (stock attention):
  s2o loadtest --arm stock=http://localhost:8000,budget=1 \\
               --arm s2o=http://localhost:8000,budget=0.1 --context 131072 --rates 0.05,0.1,0.2
Two servers, each with its own settings:
  s2o loadtest --arm stock=http://host-a:8000 --arm s2o=http://host-b:8000
Two servers one after the other on the same GPU: run twice, the second time with --append.
Prompts are random tokens: they measure time, and say nothing about quality.
Conversations of an agent, four at a time; the same as recorded by others:
  s2o loadtest --arm stock=http://host-a:8000 --arm s2o=http://host-b:8000 --replay agent \\
               --lengths 30000,120000 --concurrency 4 --goodput ttft:5000 tpot:50
  s2o loadtest --arm ... --replay toolagent_trace.jsonl --sessions 200
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
    add("--rates", type=_rates, metavar="R,R,...",
        help="requests, or sessions of a replay, per second, low to high (default: 0.05,0.1,0.2; "
        "a replay's: by concurrency, or at the trace's own times)")  # fmt: skip
    add("--requests", type=_count, default=20, help="at each rate (default: %(default)s)")
    add("--warmup", type=int, default=1, help="unmeasured requests per arm (default: %(default)s)")
    add("--concurrency", type=_counts, metavar="C,C,...",
        help="most requests in flight (default: no limit); or sessions (4)")  # fmt: skip
    add("--goodput", nargs="+", default=[], metavar="WHAT:MS",
        help="objectives ttft, tpot, e2el in ms: count requests that meet them all")  # fmt: skip
    add("--seed", type=int, default=0, help="of prompts and arrivals (default: %(default)s)")
    add("--model", help="served model (default: the server's first)")
    add("--tokenizer", help="name or folder of the tokenizer (default: the model's)")
    add("--device", help="what the servers run on (default: asked, or this machine)")
    add("--output", type=Path, default=Path("load.json"), help="default: %(default)s")
    add("--plot", type=Path, help="picture to draw (default: the output's name with .png)")
    add("--append", action="store_true", help="keep the rows that the output file has")
    _add_replay(parser)
    return parser


def _add_replay(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "replay", "conversations whose turns share prefixes; the arms take turns, round by round"
    )
    add = group.add_argument
    add("--replay", metavar="TRACE",
        help="agent, mixed, or a file: Mooncake's JSONL, turns, or ShareGPT's format")  # fmt: skip
    add("--sessions", type=_count, help="conversations (default: 8, or all of a file)")
    add("--lengths", type=_range, default=(30000, 120000), metavar="LOW,HIGH",
        help="tokens of the shortest and longest prompt (default: 30000,120000)")  # fmt: skip
    add("--turns", type=_count, default=8, help="most of a session (default: %(default)s)")
    add("--new-tokens", type=_range, default=(256, 8192), metavar="LOW,HIGH",
        help="that a turn after the first adds (default: 256,8192)")  # fmt: skip
    add("--shared-tokens", type=int, default=4096,
        help="with which all sessions begin (default: %(default)s)")  # fmt: skip
    add("--think", type=float, default=0.5, metavar="SECONDS",
        help="mean pause before a turn (default: %(default)s)")  # fmt: skip
    add("--text", type=Path, help="to draw prompts from (default: Python's own sources)")
    add("--rounds", type=_count, default=2,
        help="parts of the trace that the arms take in turn (default: %(default)s)")  # fmt: skip
    add("--resume", action="store_true", help="go on where the same replay ended")
    add("--minutes", type=float, help="begin no round that would end later")


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
    arms = parse_arms(args.arm)
    if args.replay is not None:
        return replay(args, arms)
    if args.concurrency and len(args.concurrency) > 1:
        raise LoadTestError("--concurrency has several values, must have one without --replay")
    most = args.concurrency[0] if args.concurrency else None
    load = bench.Load(
        args.context, args.output_tokens, args.requests, most, args.seed, tuple(args.goodput)
    )
    rates = args.rates or RATES
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
            begun = time.monotonic()
            alone = bench.measure(arm, server, warm, float("inf"), f"{salt}-warm-up")
            seconds = minutes(alone, time.monotonic() - begun, load, rates) * 60
            print(f"  about {seconds * (len(servers) - number) / 60:.1f} min left", flush=True)
        for rate in rates:
            check_reachable(arm)
            result, density = _measure(arm, server, load, rate, f"{salt}-{rate:g}")
            completed += result["completed"]
            row = bench.row(arm, server, load, rate, result)
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
    before = history_counters(arm)
    result = bench.measure(arm, server, load, rate, salt)
    time.sleep(SETTLE)
    return result, share(before, history_counters(arm), "visited", "eligible")


def minutes(
    alone: dict[str, Any], wall_s: float, load: bench.Load, rates: Sequence[float]
) -> float:
    """Estimate the minutes that one arm takes.

    Prompts are prefilled one at a time and no faster than they come; answers pass together.

    Args:
        alone: what `vllm bench serve` saved of unmeasured requests.
        wall_s: seconds that it ran, its own start included.
        load: of each rate.
        rates: requests per second.
    """
    first_s = alone["p50_ttft_ms"] / 1000
    answer_s = alone["p50_itl_ms"] * load.output_tokens / 1000
    start_s = max(0.0, wall_s - alone["duration"])
    each = (max(load.requests / rate, load.requests * first_s) for rate in rates)
    return sum(one + answer_s + start_s + SETTLE for one in each) / 60


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


def _counts(text: str) -> list[int]:
    try:
        return [_count(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"is {text!r}, must be whole numbers from 1, separated by commas"
        ) from None


def _range(text: str) -> tuple[int, int]:
    low, *high = _counts(text)
    if len(high) != 1 or high[0] < low:
        raise argparse.ArgumentTypeError(f"is {text!r}, must be LOW,HIGH with LOW <= HIGH")
    return low, high[0]


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
