"""`s2o bench profile`: where the time of one served long prompt goes, with S2O and without.

Each arm is `vllm serve` with vLLM's defaults and its torch profiler, which records what the GPU
does and nothing else. Prompts are random token ids, one at a time, with one token of answer.

A kernel's time is counted under one part: S2O's own `rank`, `select` and `attend`, then
`dense attention`, `cache write`, `linear layers` and `other` (norms, rotary embedding, activations,
sampling, copies). `gaps` is the time in which the GPU did nothing. Shares are of the span from the
first kernel's start to the last one's end; kernels that ran side by side are counted each, so
that shares may add up to more than 1.
"""

import argparse
import gzip
import json
import math
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from s2o_vllm.cli.server_process import ServerError, vllm_server

from ..result_file import header, save
from .serving import add_options, model_of, parse, prompt, run_and_report, vocabulary_of

REQUEST_LIMIT = 600  # seconds for an answer
TRACE_LIMIT = 60  # seconds for the trace to be complete after the profiler has stopped
LONGEST = 10  # kernels that are printed by name
NAME_WIDTH = 100  # characters of a name that are printed: templates have hundreds

KERNEL = "kernel"
CATEGORIES = {KERNEL, "gpu_memcpy", "gpu_memset"}  # of a trace's events, those on the GPU
PARTS = tuple(
    (part, re.compile(pattern, re.IGNORECASE))
    for part, pattern in (  # the first that matches counts
        (
            "rank",
            r"^_(mean|mean_score|score|moment|basis|project_\w+|row_lse|append|far_mass|pick)_kernel$",
        ),
        ("rank", r"^_?(initial|label|sum|mean|covariance|mean_covariance)_kernel$"),
        ("select", r"^_?(plan|emit|count|left)_kernel$"),
        ("attend", r"^_(attend|merge)_kernel$"),
        ("cache write", r"reshape_and_cache"),  # of which one is called "..._flash"
        ("dense attention", r"flash::|flash_?attn|fmha|batch(prefill|decode)|unified_attention"),
        ("linear layers", r"nvjet|cutlass|gemm|gemv|cublas|splitk|xmma"),
    )
)
OTHER, GAPS = "other", "gaps"


class Event(NamedTuple):
    """A kernel, a copy or a fill on the GPU; times in µs."""

    name: str
    category: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        """Return when it ended."""
        return self.start + self.duration


def part_of(name: str) -> str:
    """Return the part that a kernel of this name belongs to."""
    return next((part for part, pattern in PARTS if pattern.search(name)), OTHER)


def gpu_events(trace: Mapping[str, Any]) -> list[Event]:
    """Return what ran on the GPU in a Chrome trace."""
    return [
        Event(event["name"], event["cat"], event["ts"], event["dur"])
        for event in trace.get("traceEvents", ())
        if event.get("ph") == "X" and event.get("cat") in CATEGORIES
    ]


def span_of(events: Iterable[Event]) -> tuple[float, float]:
    """Return the first kernel's start and the last one's end; copies around them do not count."""
    kernels = [event for event in events if event.category == KERNEL]
    return min(event.start for event in kernels), max(event.end for event in kernels)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of what intervals cover together."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summarise(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return a row for each part that ran, in the order of ``PARTS``, and one for the gaps."""
    first, last = span_of(events)
    durations: dict[str, list[float]] = {part: [] for part in (*dict(PARTS), OTHER)}
    for event in events:
        durations[part_of(event.name)].append(event.duration)
    busy = covered((max(event.start, first), min(event.end, last)) for event in events)
    times = [(part, sum(parts), len(parts)) for part, parts in durations.items() if parts]
    times.append((GAPS, last - first - busy, 0))
    return [
        {"part": part, "ms": us / 1000, "share": us / (last - first), "launches": launches}
        for part, us, launches in times
    ]


def longest(events: Iterable[Event], count: int = LONGEST) -> list[tuple[str, float, int]]:
    """Return the names that took the most time together: name, ms, launches."""
    durations = defaultdict(list)
    for event in events:
        durations[event.name].append(event.duration)
    totals = [(name, sum(parts) / 1000, len(parts)) for name, parts in durations.items()]
    return sorted(totals, key=lambda total: -total[1])[:count]


def load(path: Path) -> list[Event]:
    """Return what ran on the GPU in a trace's file, compressed or not."""
    data = path.read_bytes()
    return gpu_events(json.loads(gzip.decompress(data) if path.suffix == ".gz" else data))


def take(folder: Path, limit: float = TRACE_LIMIT) -> list[Event]:
    """Remove the traces that the workers wrote; return what is in the fullest.

    Raises:
        ServerError: if there is none, or none with a kernel in it.
    """
    deadline = time.monotonic() + limit
    workers: list[list[Event]] = []
    while not workers:
        if time.monotonic() > deadline:
            raise ServerError("the profiler wrote no trace that is complete")
        time.sleep(0.2)
        paths = list(folder.glob("*.pt.trace.json*"))
        with suppress(EOFError, OSError, ValueError):  # of one not written to its end
            workers = [load(path) for path in paths]
    for path in paths:
        path.unlink()
    events = max(workers, key=len)
    if not any(event.category == KERNEL for event in events):
        raise ServerError("there are no GPU kernels in the profiler's trace")
    return events


def post(url: str, body: Mapping[str, Any]) -> None:
    """Send a request to the server and wait for the answer's end."""
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), kind, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_LIMIT) as answer:
            answer.read()
    except OSError as error:
        raise ServerError(f"{url}: {error}") from error


def ask(url: str, tokens: list[int]) -> None:
    """Send one prompt and wait for one token."""
    body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    post(f"{url}/v1/completions", body)


def profiler_flags(traces: Path) -> list[str]:
    """Return the flags that make `vllm serve` offer to record what the GPU does."""
    off = ("with_stack", "record_shapes", "with_memory", "dump_cuda_time_total")
    settings = {
        "profiler": "torch",
        "torch_profiler_dir": str(traces),
        "torch_profiler_activities": ["CUDA"],
        **{f"torch_profiler_{what}": False for what in off},
    }
    return ["--profiler-config", json.dumps(settings)]


def server(
    args: argparse.Namespace, backend: str, model: Path, folder: Path, traces: Path
) -> AbstractContextManager[str]:
    """Return the `vllm serve` of one backend, see :func:`server_process.vllm_server`."""
    flags = [
        "--no-enable-prefix-caching", "--max-model-len", str(max(args.contexts) + 1),
        "--max-num-batched-tokens", str(args.chunk), "--load-format", args.load_format,
        *profiler_flags(traces), *args.server_args,
    ]  # fmt: skip
    if backend == "s2o":
        flags += ["--attention-backend", "s2o", "--s2o-min-context", str(args.min_context)]
        flags += ["--s2o-sparsity-budget", str(args.budget)]
    return vllm_server(model, args.port, flags, folder / f"{backend}.log")


def measure(
    args: argparse.Namespace, url: str, traces: Path, vocabulary: int
) -> Iterator[tuple[int, list[Event]]]:
    """Yield every context and what the GPU did for one prompt of it."""
    for context in args.contexts:
        ask(url, prompt(context, 1, vocabulary))  # not measured
        post(f"{url}/start_profile", {})
        ask(url, prompt(context, 2, vocabulary))
        post(f"{url}/stop_profile", {})
        yield context, take(traces)


def show(title: str, events: Sequence[Event], parts: Iterable[Mapping[str, Any]]) -> None:
    """Print one prompt's parts and its longest kernels."""
    first, last = span_of(events)
    print(f"{title}: {(last - first) / 1000:.2f} ms")
    for row in parts:
        print("  {part:<16} {ms:10.2f} ms {share:6.1%} {launches:7} launches".format(**row))
    print(f"  the {LONGEST} longest by name:")
    for name, ms, launches in longest(events):
        print(f"  {ms:10.2f} ms {launches:7} x {name[:NAME_WIDTH]}", flush=True)


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Serve each backend, record, save."""
    model, flags = model_of(args, folder)
    args.server_args = [*flags, *args.server_args]
    vocabulary = vocabulary_of(model)
    rows: list[dict[str, Any]] = []
    for backend in args.backends:
        traces = folder / f"traces-{backend}"
        with server(args, backend, model, folder, traces) as url:
            for context, events in measure(args, url, traces, vocabulary):
                arm = {
                    "model": args.name, "context": context, "backend": backend,
                    "budget": args.budget if backend == "s2o" else 1.0,
                }  # fmt: skip
                parts = summarise(events)
                rows += [arm | row for row in parts]
                save(args.out, header(), rows)
                title = "{model}, {context} tokens, {backend}, budget {budget}".format(**arm)
                show(title, events, parts)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="s2o bench profile", description=__doc__)
    add_options(parser, 8096, "profile.json")
    add = parser.add_argument
    add("--contexts", nargs="+", type=int, default=[4096, 131000], metavar="TOKENS")
    add("--backends", nargs="+", choices=["s2o", "stock"], default=["s2o", "stock"])
    add("--budget", type=float, default=0.05, metavar="B")
    add("--chunk", type=int, default=8192, metavar="TOKENS")
    args = parse(parser, argv)
    return run_and_report("profile", args, run)
