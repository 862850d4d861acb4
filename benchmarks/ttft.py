"""`s2o bench ttft`: time to first token of stock vLLM and of S2O, on one card at the same time.

Both are `vllm serve` with vLLM's defaults, but for a KV cache of a fixed size, since they share
the card. Prompts are random token ids, sent one at a time, to each in turn, with prefix caching
off: what a card's clock or the host does meanwhile, it does to both. Without weights
(`--load-format dummy`) a model is only its shape, which is all that speed depends on. No time is
reported unless S2O at budget 1.0 answers with the same tokens as stock vLLM in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from s2o_vllm.cli.demo import ServerError, measured_density, read

from .report import header, save
from .serving import (
    add_options,
    completion,
    kv_cache_bytes,
    model_of,
    parse,
    prompt,
    run_and_report,
    starting,
    vocabulary_of,
)

OUTPUT_TOKENS = 32
SPARE_TOKENS = 4096  # of the KV cache: blocks that are not full, vLLM's own
SHORT = 32768  # prompts below it are asked more often, in proportion
GATE_CONTEXT = 3000


class Timing(NamedTuple):
    """One request: seconds to the first token, ms per further token, and the tokens."""

    ttft_s: float
    tpot_ms: float
    tokens: list[int]


def ask(url: str, tokens: Sequence[int], budget: float | None) -> Timing:
    """Send one prompt and time its stream."""
    import openai

    client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
    model = client.models.list().data[0].id
    options = completion(tokens, OUTPUT_TOKENS, budget)
    times, ids = [], []
    start = time.perf_counter()
    stream = client.completions.create(model=model, **options)
    for chunk in stream:
        if chunk.choices and (new := chunk.choices[0].model_extra.get("token_ids")):
            times.append(time.perf_counter() - start)
            ids += new
    if len(ids) != OUTPUT_TOKENS:
        raise ServerError(f"asked for {OUTPUT_TOKENS} tokens and got {len(ids)}")
    return Timing(times[0], 1000 * (times[-1] - times[0]) / (len(ids) - 1), ids)


def server(
    args: argparse.Namespace, arm: str, model: Path, folder: Path
) -> AbstractContextManager[Callable[[], str]]:
    """Start the `vllm serve` of one arm, see :func:`serving.starting`."""
    longest = max(args.contexts) + OUTPUT_TOKENS
    flags = [
        "--no-enable-prefix-caching", "--max-model-len", str(longest),
        "--max-num-batched-tokens", str(args.chunk), "--dtype", args.dtype,
        "--load-format", args.load_format,
        "--kv-cache-memory-bytes", str(kv_cache_bytes(model, longest + SPARE_TOKENS)),
        "--gpu-memory-utilization", "0.45", *args.server_args,
    ]  # fmt: skip
    if arm == "s2o":
        flags += ["--attention-backend", "s2o", "--s2o-min-context", str(args.min_context)]
        flags += ["--s2o-sparsity-budget", str(max(args.budgets))]
    port = args.port + (arm == "s2o")
    return starting(model, port, flags, folder / f"{arm}.log")


def measure(
    args: argparse.Namespace, urls: dict[str, str], context: int, vocabulary: int
) -> list[dict[str, Any]]:
    """Ask every arm in turn, the last one first the next time; return one row an arm."""
    arms: list[tuple[str, float | None]] = [("stock", None)]
    arms += [("s2o", budget) for budget in args.budgets]
    timings: dict[tuple[str, float | None], list[Timing]] = {arm: [] for arm in arms}
    density: dict[tuple[str, float | None], float | None] = dict.fromkeys(arms)
    for arm in arms:  # not measured
        before = read(f"{urls['s2o']}/metrics") or ""
        ask(urls[arm[0]], prompt(context, 1, vocabulary), arm[1])
        if arm[0] == "s2o":
            density[arm] = measured_density(urls["s2o"], before)
    for number in range(args.repeat * max(1, SHORT // context)):
        tokens = prompt(context, 2 + number, vocabulary)
        for arm in arms if number % 2 else arms[::-1]:
            timings[arm].append(ask(urls[arm[0]], tokens, arm[1]))
    return [
        {
            "model": args.name,
            "context": context,
            "chunk": args.chunk,
            "backend": name,
            "budget": 1.0 if budget is None else budget,
            "dtype": args.dtype,
            "ttft_s": statistics.median(t.ttft_s for t in timings[name, budget]),
            "tpot_ms": statistics.median(t.tpot_ms for t in timings[name, budget]),
            "density": density[name, budget],
            "ttft_all_s": [t.ttft_s for t in timings[name, budget]],
        }
        for name, budget in arms
    ]


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Serve both arms, check that they agree, measure, save."""
    model, flags = model_of(args, folder)
    args.server_args = [*flags, *args.server_args]
    vocabulary = vocabulary_of(model)
    gate = prompt(min(GATE_CONTEXT, *args.contexts), 0, vocabulary)
    rows: list[dict[str, Any]] = []
    with server(args, "s2o", model, folder) as s2o, server(args, "stock", model, folder) as stock:
        urls = {"s2o": s2o(), "stock": stock()}
        if ask(urls["stock"], gate, None).tokens != ask(urls["s2o"], gate, 1.0).tokens:
            raise ServerError("at budget 1.0 S2O's tokens are not those of stock vLLM")
        for context in args.contexts:
            new = measure(args, urls, context, vocabulary)
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
    parser = argparse.ArgumentParser(prog="s2o bench ttft", description=__doc__)
    add_options(parser, 8097, "ttft.json")
    add = parser.add_argument
    add("--contexts", nargs="+", type=int, default=[4096, 32768, 131000], metavar="TOKENS")
    add("--budgets", nargs="+", type=float, default=[0.05, 0.1], metavar="B")
    add("--chunk", type=int, default=8192, metavar="TOKENS")
    add("--dtype", default="bfloat16")
    add("--repeat", type=int, default=3)
    args = parse(parser, argv)
    if args.repeat < 1:
        parser.error(f"--repeat is {args.repeat}, must be at least 1")
    return run_and_report("ttft", args, run)
