"""Many mixed requests through one server with two API servers: what grows, and what slows down.

``python -m s2o_vllm.benchmarks.speed.soak --requests 10000`` sends rounds of requests as
:mod:`serve` mixes them (lengths, budgets, prefix hits, clients that leave) and looks at the
server's processes between the rounds, when it is idle. By default it starts `vllm serve` itself on
a tiny Llama without weights, with sparse decode, and a KV cache so small that blocks are evicted
all the time; `--model` names another model, `--url` a server that runs already.

The first ``WARM`` rounds fill caches, pools and every block of the KV cache; growth counts from
there on. On a CPU PyTorch keeps a plan for every number of tokens that it has multiplied by (stock
vLLM grows alike, some 0.3 MiB a request): the server is started with room for few of them, so that
what is ours would be seen. The exit code is 1 if a request failed that was not to be given up, if
the server still held one of those that were, or if memory or open handles grew beyond the noise.

`benchmarks/results/soak.json` has the header of every result file, then

- `summary`: `requests`, of which `answered`, `aborted` by the client and `failed`; `left_running`;
  `wall_s`, `preemptions`, `density`; `start` and `end`, the rows of the first round behind the warm
  ones and of the last; `growth`: `memory_mib` and `handles` between them, as the difference of the
  mean of the last third of those rounds and of the first third, and `memory_noise_mib`, twice the
  largest spread within a third; the settings.
- `rows`: one a round: `requests` sent until then, `memory_mib` (private to the server's processes),
  `handles` (open files and sockets), `threads`, `processes`, null with `--url`; `ttft_p50_ms`,
  `ttft_p99_ms`, `itl_p50_ms`, `itl_p99_ms` of the round.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2o_vllm.cli.server_process import ServerError, density, read, vllm_server
from s2o_vllm.loadtest import report
from s2o_vllm.loadtest.arms import Arm, LoadTestError
from s2o_vllm.loadtest.server import inspect

from ..result_file import save
from . import mix
from .serve import SETTLE, check_shares, counts, exit_code, grown, wait_until_idle
from .serving import LLAMA_8B, parse, vocabulary_of

WARM = 2  # rounds before anything is compared
LENGTHS = (256, 2048)  # tokens of a prompt
LEAST_NOISE_MIB = 16.0  # of all processes: what an allocator keeps or returns as it likes
LEAST_NOISE_HANDLES = 4  # connections that are being closed
TINY = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32000,
}  # fmt: skip
FLAGS = [
    "--api-server-count", "2", "--attention-backend", "s2o", "--s2o-sparsity-budget", "0.1",
    "--s2o-min-context", "256", "--s2o-decode-budget", "0.5", "--s2o-decode-min-context", "512",
    "--max-num-batched-tokens", "512",
]  # fmt: skip
TINY_FLAGS = [
    "--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "4096",
    "--block-size", "128", "--num-gpu-blocks-override", "128",
]  # fmt: skip

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4",
    "LRU_CACHE_CAPACITY": "4",
}

Row = dict[str, Any]


def tiny_llama(folder: Path) -> Path:
    """Write a configuration for `--load-format dummy` that two CPU cores serve quickly."""
    model = folder / "tiny-llama"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_8B | TINY))
    return model


def held_by_children() -> Row:
    """Return what the processes below this one hold: the server, its API servers and its engine."""
    import psutil

    found: Row = {"memory_mib": 0.0, "handles": 0, "threads": 0, "processes": 0}
    for process in psutil.Process().children(recursive=True):
        try:
            found["memory_mib"] += process.memory_full_info().uss / 2**20
            found["handles"] += process.num_fds()
            found["threads"] += process.num_threads()
            found["processes"] += 1
        except psutil.NoSuchProcess:
            continue  # it has just ended
    return found | {"memory_mib": round(found["memory_mib"], 1)}


NOTHING_SEEN: Row = dict.fromkeys(("memory_mib", "handles", "threads", "processes"))


def latencies(results: Sequence[tuple[mix.Request, mix.Outcome]]) -> Row:
    """Return a round's percentiles, of the requests whose clients stayed."""
    stayed = [one for request, one in results if request.give_up is None and not one.error]
    first = [one.ttft_s for one in stayed if one.ttft_s is not None]
    gaps = [gap for one in stayed for gap in one.gaps_s]
    return {
        f"{name}_p{share}_ms": report.percentile(values, share)
        for name, values in (("ttft", first), ("itl", gaps))
        for share in (50, 99)
    }


def growth(rows: Sequence[Row]) -> Row | None:
    """Return what grew over the rounds behind the warm ones; None if they are too few, or unseen.

    Args:
        rows: of all rounds.
    """
    rows = rows[WARM:]
    third = len(rows) // 3
    if third == 0 or rows[0]["memory_mib"] is None:
        return None
    parts = rows[:third], rows[-third:]
    memory = [[row["memory_mib"] for row in part] for part in parts]
    handles = [statistics.mean(row["handles"] for row in part) for part in parts]
    spread = max(max(values) - min(values) for values in memory)
    return {
        "memory_mib": round(statistics.mean(memory[1]) - statistics.mean(memory[0]), 1),
        "memory_noise_mib": round(max(2 * spread, LEAST_NOISE_MIB), 1),
        "handles": round(handles[1] - handles[0], 1),
    }


def problems(summary: Row) -> list[str]:
    """Return what must not happen and did, one sentence each."""
    found = []
    if summary["failed"]:
        found.append(f"{summary['failed']} of {summary['requests']} requests failed")
    if summary["left_running"]:
        found.append(f"the server still holds {summary['left_running']} requests")
    grew = summary["growth"]
    if grew and grew["memory_mib"] > grew["memory_noise_mib"]:
        found.append(f"memory grew by {grew['memory_mib']} MiB")
    if grew and grew["handles"] > LEAST_NOISE_HANDLES:
        found.append(f"open handles grew by {grew['handles']}")
    return found


def load(args: argparse.Namespace, url: str, vocabulary: int, *, own: bool) -> Row:
    """Send all rounds to a server and return the result file's head, summary and rows.

    Args:
        args: of the command.
        url: of the server.
        vocabulary: its token ids.
        own: whether its processes are this one's children.

    Raises:
        ServerError: if the server does not take the mix, or ends.
    """
    try:
        served = inspect(Arm("server", url, min(args.budgets)))
    except LoadTestError as error:
        raise ServerError(str(error)) from error
    before = read(f"{url}/metrics") or ""
    start = time.perf_counter()
    results: list[tuple[mix.Request, mix.Outcome]] = []
    rows: list[Row] = []
    while len(results) < args.requests and time.perf_counter() - start < 60 * args.minutes:
        seed = args.seed + len(rows)
        requests = mix.plan(
            args.round, LENGTHS, args.budgets, hits=args.hits, aborts=args.aborts, seed=seed
        )
        client = mix.Client(
            url, served.model, vocabulary, args.output_tokens, uuid.uuid4().hex, seed
        )
        part = list(zip(requests, mix.run(client, requests, args.concurrency), strict=True))
        left = wait_until_idle(url)
        time.sleep(SETTLE)
        results += part
        held = held_by_children() if own else NOTHING_SEEN
        rows.append({"requests": len(results), **held, **latencies(part)})
        for request, outcome in part:
            if outcome.error:
                print(f"round {len(rows)}, request {request.number}: {outcome.error}")
        print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    after = read(f"{url}/metrics") or ""
    total = counts(results, time.perf_counter() - start)
    keys = ("requests", "answered", "aborted", "failed", "wall_s", "requests_per_s", "prefix_hits")
    return {
        "head": report.header([served], None),
        "summary": {
            **{key: total[key] for key in keys},
            "left_running": left,
            "cached_tokens": grown(before, after, "vllm:prefix_cache_hits_total"),
            "preemptions": grown(before, after, "vllm:num_preemptions_total"),
            "density": density(before, after),
            "start": rows[min(WARM, len(rows) - 1)],
            "end": rows[-1],
            "growth": growth(rows),
            "model": served.name,
            **{key: getattr(args, key) for key in ("round", "output_tokens", "budgets")},
            **{key: getattr(args, key) for key in ("hits", "aborts", "concurrency", "seed")},
            "server_flags": [*FLAGS, *args.server_args] if own else None,
        },
        "rows": rows,
    }


def run(args: argparse.Namespace, folder: Path) -> Row:
    """Start a server unless one is named, and load it."""
    if args.url is not None:
        return load(args, args.url, args.vocabulary, own=False)
    model, flags = args.model, [*FLAGS, *args.server_args]
    if model is None:
        model, flags = tiny_llama(folder), [*FLAGS, *TINY_FLAGS, *args.server_args]
    log = folder / "server.log"
    with vllm_server(model, args.port, flags, log, ENVIRONMENT) as url:
        return load(args, url, vocabulary_of(model), own=True)


def parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    result = argparse.ArgumentParser(
        prog="python -m s2o_vllm.benchmarks.speed.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--requests", type=int, default=10_000)
    add("--minutes", type=float, default=1e9, help="begin no round later than this")
    add("--round", type=int, default=100, help="requests between two looks at the processes")
    add("--model", type=Path, metavar="FOLDER", help="default: a tiny Llama without weights")
    add("--url", help="a server that runs already, with --attention-backend s2o")
    add("--vocabulary", type=int, default=TINY["vocab_size"], help="its token ids (with --url)")
    add("--output-tokens", type=int, default=8, metavar="TOKENS")
    add("--budgets", nargs="+", type=float, default=[0.1, 0.3, 1.0], metavar="B")
    add("--hits", type=float, default=0.2, metavar="SHARE", help="that share a prefix")
    add("--aborts", type=float, default=0.1, metavar="SHARE", help="that the client gives up")
    add("--concurrency", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--port", type=int, default=8099)
    add("--out", type=Path, default=Path("benchmarks/results/soak.json"), metavar="FILE")
    add("--server-args", nargs=argparse.REMAINDER, default=[], help="the rest is for vllm serve")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    command = parser()
    args = parse(command, argv)
    if args.requests < 1 or args.round < 2 or args.minutes <= 0:
        command.error("--requests must be at least 1, --round at least 2, --minutes more than 0")
    check_shares(command, args)
    with tempfile.TemporaryDirectory(prefix="s2o-soak-") as folder:
        try:
            result = run(args, Path(folder))
        except ServerError as error:
            print(f"soak: {error}", file=sys.stderr)
            return 1
    save(args.out, result["head"] | {"summary": result["summary"]}, result["rows"])
    print(f"{args.out}: {len(result['rows'])} rounds, growth {result['summary']['growth']}")
    return exit_code("soak", problems(result["summary"]))


if __name__ == "__main__":
    sys.exit(main())
