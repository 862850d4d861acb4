"""What benchmarks of a whole server share: a model without weights, prompts, the server itself."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s2o_vllm.cli.demo import ServerError, read, stop, wait_until_healthy

Row = dict[str, Any]

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
LOWEST_ID, HIGHEST_ID = 1000, 30000  # ordinary tokens of any vocabulary; cut to the model's


def llama_shape(folder: Path, layers: int | None = None) -> tuple[Path, list[str]]:
    """Write Llama-3.1-8B's configuration, for `--load-format dummy`, perhaps with fewer layers.

    Returns:
        The model's folder, and the flags of `vllm serve` that a model without a tokenizer needs.
    """
    model = folder / "llama-8b-shape"
    model.mkdir()
    changes = {} if layers is None else {"num_hidden_layers": layers}
    (model / "config.json").write_text(json.dumps(LLAMA_8B | changes))
    return model, ["--skip-tokenizer-init"]


def add_options(parser: argparse.ArgumentParser, port: int, out: str) -> None:
    """Add the options that every benchmark of a server of its own has."""
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="default: Llama-3.1-8B's shape, no weights")
    add("--name", default="Llama-3.1-8B shape", help="the model's name in the result file")
    add("--load-format", default="dummy")
    add("--min-context", type=int, default=8192, metavar="TOKENS")
    add("--port", type=int, default=port)
    add("--out", type=Path, default=Path("benchmarks/results") / out, metavar="FILE")
    add("--server-args", nargs=argparse.REMAINDER, default=[], help="the rest is for vllm serve")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ends the process where it names a model that is not there."""
    args = parser.parse_args(argv)
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"there is no model at {args.model} (no config.json)")
    return args


def model_of(args: argparse.Namespace, folder: Path) -> tuple[Path, list[str]]:
    """Return the model that was named, or :func:`llama_shape`, and the flags it needs."""
    return llama_shape(folder) if args.model is None else (args.model, [])


def run_and_report(
    name: str, args: argparse.Namespace, run: Callable[[argparse.Namespace, Path], list[Row]]
) -> int:
    """Run a benchmark in a folder of its own; return the command's exit code."""
    with tempfile.TemporaryDirectory(prefix=f"s2o-{name}-") as folder:
        try:
            rows = run(args, Path(folder))
        except ServerError as error:
            print(f"s2o bench {name}: {error}", file=sys.stderr)
            return 1
    print(f"{args.out}: {len(rows)} rows")
    return 0


def vocabulary_of(model: Path) -> int:
    """Return the number of token ids that a model has."""
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def prompt(context: int, seed: int, vocabulary: int) -> list[int]:
    """Return random token ids, the same for a seed on every arm."""
    generator = random.Random(seed)
    top = min(HIGHEST_ID, vocabulary)
    return [generator.randrange(min(LOWEST_ID, top // 2), top) for _ in range(context)]


def completion(
    tokens: Sequence[int], output_tokens: int, budget: float | None, **extra: Any
) -> dict[str, Any]:
    """Return the arguments of the `openai` client's `completions.create` for a streamed answer.

    The prompt goes with the extra fields: what the client looks through token by token delays a
    prompt of 131,000 by two seconds, which a measurement would add to the server's time.

    Args:
        tokens: the prompt.
        output_tokens: length of the answer, whatever it says.
        budget: sparsity budget to ask for; None for the server's own.
        extra: further fields of the request.
    """
    extra |= {"prompt": list(tokens), "return_token_ids": True, "ignore_eos": True}
    if budget is not None:
        extra["vllm_xargs"] = {"s2o_sparsity_budget": budget}
    return {
        "prompt": "", "temperature": 0, "max_tokens": output_tokens, "stream": True,
        "extra_body": extra,
    }  # fmt: skip


def kv_cache_bytes(model: Path, tokens: int) -> int:
    """Return the bytes that the keys and values of so many tokens take in 16 bits."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    per_layer = 2 * config.get("num_key_value_heads", heads) * head_dim * 2
    return config["num_hidden_layers"] * per_layer * tokens


@contextmanager
def starting(
    model: Path,
    port: int,
    flags: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Callable[[], str]]:
    """Start `vllm serve` on this machine; stop it and its workers in the end.

    Yields:
        A function that waits until the server is healthy and returns its URL; several servers
        can start at once.

    Args:
        model: the model's folder.
        port: where it listens, on the loopback interface alone.
        flags: of `vllm serve`.
        log: file for what the server prints.
        environment: variables beside those of this process.

    Raises:
        ServerError: if the port is taken, or the server ends or is not healthy in time.
    """
    url = f"http://127.0.0.1:{port}"
    if read(f"{url}/health") is not None:
        raise ServerError(f"port {port} is taken: choose another with --port")
    command = [
        sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(model),
        "--port", str(port), "--host", "127.0.0.1", *flags,
    ]  # fmt: skip
    variables = os.environ | dict(environment or {})

    def healthy() -> str:
        wait_until_healthy(process, url, log)
        return url

    with log.open("wb") as output, ended_by_sigterm():
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env=variables
        )
        try:
            yield healthy
        finally:
            stop(process)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind this process as an interruption does: its server must not outlive it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def vllm_server(
    model: Path,
    port: int,
    flags: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Start `vllm serve`, wait until it is healthy and yield its URL; see :func:`starting`."""
    with starting(model, port, flags, log, environment) as healthy:
        yield healthy()
