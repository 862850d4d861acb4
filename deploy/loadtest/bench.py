"""One measurement: a run of stock ``vllm bench serve``, and its row of the result file."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arms import Arm, LoadTestError
from .server import Server

LATENCIES = {
    "ttft_p50_ms": "p50_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "itl_p50_ms": "p50_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
}
PERCENTILES = "50,99"
COLD = "cold"  # the trace of prompts that share nothing; of rows that name none, too
# What tells rows apart.
ROW_KEY = ("model", "trace", "backend", "budget", "rate", "concurrency", "context")


@dataclass(frozen=True)
class Load:
    """What is sent at every rate.

    Attributes:
        context: prompt length in tokens.
        output_tokens: answer length in tokens.
        requests: requests at each rate.
        concurrency: most requests in flight; None is no limit.
        seed: of prompts and arrival times, so that every arm gets the same ones.
        goodput: objectives such as ``ttft:2000``, in ms.
    """

    context: int
    output_tokens: int
    requests: int
    concurrency: int | None = None
    seed: int = 0
    goodput: tuple[str, ...] = ()


def command(
    arm: Arm, server: Server, load: Load, rate: float, salt: str, result: Path
) -> list[str]:
    """Return the ``vllm bench serve`` command of one measurement."""
    arguments: dict[str, Any] = {
        "backend": "openai",
        "base-url": arm.url,
        "endpoint": "/v1/completions",
        "model": server.model,
        "tokenizer": server.tokenizer,
        "dataset-name": "random",
        "random-input-len": load.context,
        "random-output-len": load.output_tokens,
        "num-prompts": load.requests,
        "request-rate": rate,
        "seed": load.seed,
        "temperature": 0,
        "percentile-metrics": "ttft,itl",
        "metric-percentiles": PERCENTILES,
        "extra-body": json.dumps(arm.request_body(salt)),
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    if load.concurrency is not None:
        arguments["max-concurrency"] = load.concurrency
    flags = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    if load.goodput:
        flags += ["--goodput", *load.goodput]
    # The module and not the `vllm` script: it is the vLLM of this interpreter.
    serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    return [*serve, *flags, "--save-result", "--save-detailed", "--disable-tqdm"]


def measure(arm: Arm, server: Server, load: Load, rate: float, salt: str) -> dict[str, Any]:
    """Run one measurement and return what ``vllm bench serve`` saved.

    Raises:
        LoadTestError: if it ended without a result.
    """
    with tempfile.TemporaryDirectory(prefix="s2o-loadtest-") as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            command(arm, server, load, rate, salt, result),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not result.exists():
            lines = done.stdout.strip().splitlines() or ["no output"]
            raise LoadTestError(
                f"{arm.name}: `vllm bench serve` ended with code {done.returncode}: {lines[-1]}"
            )
        return json.loads(result.read_text())


def row(
    arm: Arm, server: Server, load: Load, rate: float, result: dict[str, Any]
) -> dict[str, Any]:
    """Return the result file's row of one measurement.

    Without one completed request there is no latency: null, where ``vllm bench serve``
    writes 0.
    """
    completed = result["completed"]
    latencies = {
        key: round(result[source], 3) if completed else None for key, source in LATENCIES.items()
    }
    goodput = result.get("request_goodput")
    return {
        "model": server.name,
        "trace": COLD,
        "backend": arm.name,
        "budget": arm.budget,
        "rate": rate,
        "concurrency": load.concurrency,
        "context": load.context,
        **latencies,
        "goodput_rps": None if goodput is None else round(goodput, 4),
        "output_tok_s": round(result["output_throughput"], 3) if completed else None,
        "failed": load.requests - completed,
    }


def first_error(result: dict[str, Any]) -> str | None:
    """Return the first failed request's error as one line, or None."""
    errors = [error for error in result.get("errors", []) if error]
    return errors[0].strip().splitlines()[-1][:200] if errors else None
