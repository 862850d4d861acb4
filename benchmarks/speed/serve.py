"""`s2o bench serve`: a mixed run through one server, and what must not happen in it.

Prompts of 1K to 128K tokens (log-uniform), several budgets side by side, a fifth of the prompts
beginning with an earlier one (prefix-cache hits), a tenth given up by the client in mid-stream.
By default it starts `vllm serve` itself, on Llama-3.1-8B's shape without weights; with `--url`
it loads a server that runs already. Prompts are random token ids.

The exit code is 1 if a request failed that was not to be given up, if the server was still
working on one of those that were, or if a kernel was compiled after the server was ready.

`benchmarks/results/serve.json` has the header of every result file, then

- `summary`: of the whole run.
  - `requests`, of which `answered` in full, `aborted` by the client, `failed`; `left_running`:
    requests that the server still held 60 s after the last answer.
  - `wall_s`; `requests_per_s`; `prompt_tok_s` (of answered requests, cached tokens included);
    `output_tok_s`.
  - `prefix_hits`: requests that share a prefix; `cached_tokens` of `shared_tokens`: what the
    prefix cache gave of what it could have, which is less by a block a request, and by what
    was evicted.
  - `density`: history tokens visited over eligible ones; null if all prefill was dense.
  - `preemptions`: requests that lost their blocks to others and were computed again.
  - `gpu_memory_mib`: in use on the GPUs that CUDA_VISIBLE_DEVICES names, else on all, as `ready`,
    after `warm` prompts of the greatest length and at the `end`; null without a GPU here.
  - `kernels`: in the server's own, fresh Triton cache, as `ready` and at the `end`, and
    `after_ready`: names of those that came later; null where nothing runs on Triton.
  - `jit_warnings`: what vLLM's own monitor of late compilation saw; null where it does not run
    (on a CPU, with `--enforce-eager`) or is not seen (with `--url`).
  - the settings: `model`, `max_context`, `output_tokens`, `budgets`, `concurrency`, `seed`,
    `server_flags`.
- `rows`: one per `context_from` ≤ prompt tokens < `context_to` and `prefix_hit`, of answered
  requests: `requests, ttft_p50_ms, ttft_p99_ms, itl_p50_ms, itl_p99_ms`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from s2o_vllm.cli.server_process import ServerError, density, metric, read, vllm_server
from s2o_vllm.loadtest import report
from s2o_vllm.loadtest.arms import Arm, LoadTestError
from s2o_vllm.loadtest.server import check_budget_is_honoured, inspect

from ..result_file import save
from . import mix
from .serving import HIGHEST_ID, add_options, model_of, parse, vocabulary_of

SHORTEST = 1024  # tokens of a prompt
IDLE_LIMIT = 60  # seconds that the server may take to end what clients gave up
SETTLE = 1.5  # seconds until the server's counters have caught up with its last request
MONITOR = "Kernel JIT monitor activated"  # vLLM's, which then reports late compilation
LATE = re.compile(r"(\S+ .*?) during inference: (\S+)")


@dataclass
class Target:
    """The server that is loaded.

    Attributes:
        url: without a path.
        flags: that it was started with, None for one that ran already.
        cache: its Triton cache, None for one that ran already.
        log: what it printed, likewise.
    """

    url: str
    flags: list[str] | None = None
    cache: Path | None = None
    log: Path | None = None

    def kernels(self) -> dict[str, str] | None:
        """Return the name of every kernel that the server has compiled, by its file."""
        if self.cache is None:
            return None
        files = [path for path in self.cache.rglob("*.json") if not path.stem.startswith("__grp__")]
        return {str(path): path.stem for path in files}

    def jit_warnings(self) -> list[str] | None:
        """Return what vLLM's monitor said of compilation after the server was ready."""
        said = self.log.read_text(errors="replace") if self.log else ""
        if MONITOR not in said:
            return None
        found = LATE.findall(said)
        return [f"{what}: {name}" for what, name in found]


def gpu_memory_mib() -> int | None:
    """Return the memory in use on the GPUs that a server would see, None if there are none."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):  # nvidia-smi itself does not heed it
        query.append(f"--id={visible}")
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        return sum(int(line) for line in done.stdout.split())
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def wait_until_idle(url: str) -> int:
    """Return how many requests the server still holds after ``IDLE_LIMIT`` seconds."""
    deadline = time.monotonic() + IDLE_LIMIT
    while True:
        page = read(f"{url}/metrics")
        if page is None:
            raise ServerError("the server does not answer any more")
        held = [metric(page, f"vllm:num_requests_{state}") for state in ("running", "waiting")]
        if not sum(held) or time.monotonic() > deadline:
            return int(sum(held))
        time.sleep(0.5)


def rows_of(results: Iterable[tuple[mix.Request, mix.Outcome]]) -> list[dict[str, Any]]:
    """Return latencies by context and by whether a prefix was shared; see above."""
    groups: dict[tuple[int, bool], list[mix.Outcome]] = {}
    for request, outcome in results:
        if outcome.error is None and request.give_up is None:
            start = 1 << (request.length.bit_length() - 1)
            groups.setdefault((start, request.prefix_of is not None), []).append(outcome)
    rows = []
    for (start, hit), outcomes in sorted(groups.items()):
        first = [one.ttft_s for one in outcomes if one.ttft_s is not None]
        gaps = [gap for one in outcomes for gap in one.gaps_s]
        rows.append({
            "context_from": start, "context_to": 2 * start, "prefix_hit": hit,
            "requests": len(outcomes),
            "ttft_p50_ms": report.percentile(first, 50),
            "ttft_p99_ms": report.percentile(first, 99),
            "itl_p50_ms": report.percentile(gaps, 50), "itl_p99_ms": report.percentile(gaps, 99),
        })  # fmt: skip
    return rows


def load(args: argparse.Namespace, target: Target, vocabulary: int) -> dict[str, Any]:
    """Warm the server up, send the mix, and return the result file's head, summary and rows.

    Raises:
        ServerError: if the server cannot take the mix, or ends.
    """
    kernels = {"ready": target.kernels()}
    memory = {"ready": gpu_memory_mib()}
    try:
        arm = Arm("server", target.url, min(args.budgets))
        served = inspect(arm)
        check_budget_is_honoured(arm, served)
    except LoadTestError as error:
        raise ServerError(str(error)) from error
    longest = min(args.max_context, served.max_model_len or args.max_context) - args.output_tokens
    shortest = min(SHORTEST, longest)
    try:
        requests = mix.plan(
            args.requests, (shortest, longest), args.budgets,
            hits=args.hits, aborts=args.aborts, seed=args.seed,
        )  # fmt: skip
    except ValueError as error:
        raise ServerError(f"--requests is {args.requests}: {error}") from error
    session = uuid.uuid4().hex
    client = mix.Client(
        target.url, served.model, vocabulary, args.output_tokens, session, args.seed
    )
    warm = [mix.Request(number, longest, budget) for number, budget in enumerate(args.budgets)]
    outcomes = mix.run(replace(client, salt=f"{session}-warm-up"), warm, len(warm))
    if refused := [one.error for one in outcomes if one.error]:
        raise ServerError(f"a first request of {longest} tokens failed: {refused[0]}")
    wait_until_idle(target.url)
    time.sleep(SETTLE)
    memory["warm"] = gpu_memory_mib()
    before = read(f"{target.url}/metrics") or ""
    start = time.perf_counter()
    outcomes = mix.run(client, requests, args.concurrency)
    wall = time.perf_counter() - start
    left = wait_until_idle(target.url)
    time.sleep(SETTLE)
    after = read(f"{target.url}/metrics") or ""
    memory["end"], kernels["end"] = gpu_memory_mib(), target.kernels()
    results = list(zip(requests, outcomes, strict=True))
    for request, outcome in results:
        if outcome.error:
            print(f"request {request.number}, {request.length} tokens: {outcome.error}")
    return {
        "head": report.header([served], None),
        "summary": {
            **counts(results, wall),
            "left_running": left,
            "cached_tokens": grown(before, after, "vllm:prefix_cache_hits_total"),
            "density": density(before, after),
            "preemptions": grown(before, after, "vllm:num_preemptions_total"),
            "gpu_memory_mib": None if memory["end"] is None else memory,
            "kernels": compiled(kernels["ready"], kernels["end"]),
            "jit_warnings": target.jit_warnings(),
            "model": args.name if args.url is None else served.name,
            "max_context": longest + args.output_tokens,
            **{key: getattr(args, key) for key in ("output_tokens", "budgets", "concurrency")},
            "seed": args.seed,
            "server_flags": target.flags,
        },
        "rows": rows_of(results),
    }


def counts(results: Sequence[tuple[mix.Request, mix.Outcome]], wall: float) -> dict[str, Any]:
    """Return the summary's counts and rates."""
    failed = [request for request, outcome in results if outcome.error]
    aborted = [one for one, outcome in results if one.give_up is not None and not outcome.error]
    answered = [
        (request, outcome)
        for request, outcome in results
        if request.give_up is None and not outcome.error
    ]
    return {
        "requests": len(results),
        "answered": len(answered),
        "aborted": len(aborted),
        "failed": len(failed),
        "wall_s": round(wall, 3),
        "requests_per_s": round(len(answered) / wall, 4),
        "prompt_tok_s": round(sum(request.length for request, _ in answered) / wall, 1),
        "output_tok_s": round(sum(outcome.tokens for _, outcome in results) / wall, 1),
        "prefix_hits": sum(request.prefix_of is not None for request, _ in answered),
        "shared_tokens": sum(request.shared for request, _ in answered),
    }


def grown(before: str, after: str, name: str) -> int:
    """Return by how much a counter grew between two pages of metrics."""
    return round(metric(after, name) - metric(before, name))


def compiled(ready: dict[str, str] | None, end: dict[str, str] | None) -> dict[str, Any] | None:
    """Return the summary's ``kernels``; None if there are none at all."""
    if not end:
        return None
    late = sorted(name for file, name in end.items() if file not in (ready or {}))
    return {"ready": len(end) - len(late), "end": len(end), "after_ready": late}


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start a server unless one is named, and load it."""
    if args.url is not None:
        return load(args, Target(args.url), args.vocabulary)
    model, flags = model_of(args, folder)
    flags += [
        "--max-model-len", str(args.max_context), "--load-format", args.load_format,
        "--attention-backend", "s2o", "--s2o-sparsity-budget", str(args.budgets[0]),
        "--s2o-min-context", str(args.min_context), *args.server_args,
    ]  # fmt: skip
    cache, log = folder / "triton", folder / "server.log"
    # A cache of its own: a kernel that an earlier server compiled would not be seen to be late.
    with vllm_server(model, args.port, flags, log, {"TRITON_CACHE_DIR": str(cache)}) as url:
        return load(args, Target(url, flags, cache, log), vocabulary_of(model))


def problems(summary: dict[str, Any]) -> list[str]:
    """Return what must not happen and did, one sentence each."""
    found = []
    if summary["failed"]:
        found.append(f"{summary['failed']} of {summary['requests']} requests failed")
    if summary["left_running"]:
        found.append(f"the server still holds {summary['left_running']} requests")
    late = [
        *((summary["kernels"] or {}).get("after_ready") or []),
        *(summary["jit_warnings"] or []),
    ]
    if late:
        found.append(f"compiled after the server was ready: {', '.join(late)}")
    return found


def parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    result = argparse.ArgumentParser(
        prog="s2o bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(result, 8098, "serve.json")
    add = result.add_argument
    add("--url", help="a server that runs already, with --attention-backend s2o")
    add("--vocabulary", type=int, default=HIGHEST_ID, help="its token ids (with --url)")
    add("--requests", type=int, default=200)
    add("--max-context", type=int, default=131072, metavar="TOKENS", help="prompt and answer")
    add("--output-tokens", type=int, default=32, metavar="TOKENS")
    add("--budgets", nargs="+", type=float, default=[0.05, 0.1, 0.25], metavar="B")
    add("--hits", type=float, default=0.2, metavar="SHARE", help="that share a prefix")
    add("--aborts", type=float, default=0.1, metavar="SHARE", help="that the client gives up")
    add("--concurrency", type=int, default=8)
    add("--seed", type=int, default=0)
    return result


def check_shares(command: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the process where the shares of prefix hits and of clients that leave make no mix."""
    if min(args.hits, args.aborts) < 0 or args.hits + args.aborts >= 1:
        command.error("--hits and --aborts must be shares of less than 1 together")


def exit_code(name: str, found: Sequence[str]) -> int:
    """Print what was found wrong under a command's name; return the command's exit code."""
    for problem in found:
        print(f"{name}: {problem}", file=sys.stderr)
    return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    command = parser()
    args = parse(command, argv)
    if args.concurrency < 1 or args.output_tokens < mix.GIVE_UP_AFTER + 1:
        command.error(
            f"--concurrency is {args.concurrency}, must be at least 1; --output-tokens is "
            f"{args.output_tokens}, must be more than {mix.GIVE_UP_AFTER}"
        )
    check_shares(command, args)
    with tempfile.TemporaryDirectory(prefix="s2o-serve-") as folder:
        try:
            result = run(args, Path(folder))
        except ServerError as error:
            print(f"s2o bench serve: {error}", file=sys.stderr)
            return 1
    save(args.out, result["head"] | {"summary": result["summary"]}, result["rows"])
    for key, value in result["summary"].items():
        print(f"{key:>15} {value}")
    print(f"{args.out}: {len(result['rows'])} rows")
    return exit_code("s2o bench serve", problems(result["summary"]))
