"""`s2o bench ttft`: time to first token of stock vLLM and of S2O, served one after the other.

Both are `vllm serve` with vLLM's defaults; prompts are random token ids, sent one at a time
with prefix caching off. Without weights (`--load-format dummy`) a model is only its shape,
which is all that speed depends on. No time is reported unless S2O at budget 1.0 answers with
the same tokens as stock vLLM in the same run.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from s2o_vllm.cli.demo import ServerError, measured_density, read

from .report import header, save
from .serving import llama_shape, prompt, vllm_server, vocabulary_of

OUTPUT_TOKENS = 32
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
    extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
    if budget is not None:
        extra["vllm_xargs"] = {"s2o_sparsity_budget": budget}
    model = client.models.list().data[0].id
    times, ids = [], []
    start = time.perf_counter()
    stream = client.completions.create(
        model=model, prompt=list(tokens), temperature=0, max_tokens=OUTPUT_TOKENS, stream=True,
        extra_body=extra,
    )  # fmt: skip
    for chunk in stream:
        if chunk.choices and (new := chunk.choices[0].model_extra.get("token_ids")):
            times.append(time.perf_counter() - start)
            ids += new
    if len(ids) != OUTPUT_TOKENS:
        raise ServerError(f"asked for {OUTPUT_TOKENS} tokens and got {len(ids)}")
    return Timing(times[0], 1000 * (times[-1] - times[0]) / (len(ids) - 1), ids)


def server(
    args: argparse.Namespace, backend: str, model: Path, folder: Path
) -> AbstractContextManager[str]:
    """Return the `vllm serve` of one backend, see :func:`serving.vllm_server`."""
    flags = [
        "--no-enable-prefix-caching", "--max-model-len", str(max(args.contexts) + OUTPUT_TOKENS),
        "--max-num-batched-tokens", str(args.chunk), "--dtype", args.dtype,
        "--load-format", args.load_format, *args.server_args,
    ]  # fmt: skip
    if backend == "s2o":
        flags += ["--attention-backend", "s2o", "--s2o-min-context", str(args.min_context)]
        flags += ["--s2o-sparsity-budget", str(max(args.budgets))]
    return vllm_server(model, args.port, flags, folder / f"{backend}.log")


def measure(
    args: argparse.Namespace, url: str, backend: str, budget: float | None, vocabulary: int
) -> Iterator[dict[str, Any]]:
    """Yield one row per context."""
    for context in args.contexts:
        ask(url, prompt(context, 1, vocabulary), budget)  # not measured
        before = read(f"{url}/metrics") or ""
        timings = [
            ask(url, prompt(context, 2 + number, vocabulary), budget)
            for number in range(args.repeat)
        ]
        density = measured_density(url, before) if backend == "s2o" else None
        yield {
            "model": args.name,
            "context": context,
            "chunk": args.chunk,
            "backend": backend,
            "budget": 1.0 if budget is None else budget,
            "dtype": args.dtype,
            "ttft_s": statistics.median(t.ttft_s for t in timings),
            "tpot_ms": statistics.median(t.tpot_ms for t in timings),
            "density": density,
            "ttft_all_s": [t.ttft_s for t in timings],
        }


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Serve both arms, check that they agree, measure, save."""
    model = args.model
    if model is None:
        model, flags = llama_shape(folder)
        args.server_args = [*flags, *args.server_args]
    vocabulary = vocabulary_of(model)
    gate = prompt(GATE_CONTEXT, 0, vocabulary)
    rows: list[dict[str, Any]] = []
    partial = args.out.with_suffix(".partial.json")  # what is there if the run is cut short

    def keep(new: Iterator[dict[str, Any]]) -> None:
        for row in new:
            rows.append(row)
            save(partial, header(), rows)
            print(
                f"{row['model']} {row['context']:>7} tokens, {row['backend']:>5} budget "
                f"{row['budget']:<5} first token {row['ttft_s']:7.3f} s, then "
                f"{row['tpot_ms']:6.2f} ms a token, density {row['density']}",
                flush=True,
            )

    with server(args, "s2o", model, folder) as url:
        dense = ask(url, gate, 1.0).tokens
        for budget in args.budgets:
            keep(measure(args, url, "s2o", budget, vocabulary))
    with server(args, "stock", model, folder) as url:
        if ask(url, gate, None).tokens != dense:
            raise ServerError("at budget 1.0 S2O's tokens are not those of stock vLLM")
        keep(measure(args, url, "stock", None, vocabulary))
    save(args.out, header(), rows)
    partial.unlink()
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="s2o bench ttft", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="default: Llama-3.1-8B's shape, no weights")
    add("--name", default="Llama-3.1-8B shape", help="the model's name in the result file")
    add("--load-format", default="dummy")
    add("--contexts", nargs="+", type=int, default=[4096, 32768, 131000], metavar="TOKENS")
    add("--budgets", nargs="+", type=float, default=[0.05, 0.1], metavar="B")
    add("--min-context", type=int, default=8192, metavar="TOKENS")
    add("--chunk", type=int, default=8192, metavar="TOKENS")
    add("--dtype", default="bfloat16")
    add("--repeat", type=int, default=3)
    add("--port", type=int, default=8097)
    add("--out", type=Path, default=Path("benchmarks/results/ttft.json"), metavar="FILE")
    add("--server-args", nargs=argparse.REMAINDER, default=[], help="the rest is for vllm serve")
    args = parser.parse_args(argv)
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"there is no model at {args.model} (no config.json)")
    if args.repeat < 1:
        parser.error(f"--repeat is {args.repeat}, must be at least 1")
    with tempfile.TemporaryDirectory(prefix="s2o-ttft-") as folder:
        try:
            rows = run(args, Path(folder))
        except ServerError as error:
            print(f"s2o bench ttft: {error}", file=sys.stderr)
            return 1
    print(f"{args.out}: {len(rows)} rows")
    return 0
