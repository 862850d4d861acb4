"""Two servers on one card, stock vLLM and S2O, and one timed question to either.

Both are `vllm serve` with vLLM's defaults, but for a KV cache of a fixed size, since they share
the card, and without prefix caching. Changes of the card's clock or of the host affect both.
Without weights (`--load-format dummy`) a model is only its shape, which is all that speed depends
on. Nothing is measured unless S2O at budget 1.0 answers with the same tokens as stock vLLM.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from s2o_vllm.cli.server_process import ServerError, starting
from s2o_vllm.config import S2OConfig

from .serving import add_options, completion, kv_cache_bytes, model_of, prompt, vocabulary_of

OUTPUT_TOKENS = 32
SPARE_TOKENS = 4096  # of the KV cache: blocks that are not full, vLLM's own
GATE_CONTEXT = 3000


class Chunk(NamedTuple):
    """A piece of an answer: when it came (`time.perf_counter`), and how many tokens there were."""

    at: float
    tokens: int


class Timing(NamedTuple):
    """One request: when it was sent (`time.perf_counter`), what came when, and the tokens."""

    sent: float
    chunks: list[Chunk]
    tokens: list[int]

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.chunks[0].at - self.sent

    def tpot_ms(self, since: float = 0.0, until: float = float("inf")) -> float:
        """Return ms per token between the first and the last piece of a time.

        Raises:
            ServerError: if there are not two.
        """
        own = [chunk for chunk in self.chunks if since <= chunk.at <= until]
        if len(own) < 2:
            raise ServerError("requests hardly decoded at once: ask for more output tokens")
        return 1000 * (own[-1].at - own[0].at) / (own[-1].tokens - own[0].tokens)


class Pair(NamedTuple):
    """Two servers that run: URLs of the arms `stock` and `s2o`, and the model's vocabulary."""

    urls: dict[str, str]
    vocabulary: int


def add_arm_options(parser: argparse.ArgumentParser, port: int, out: str) -> None:
    """Add the options that every benchmark of two arms has."""
    add_options(parser, port, out)
    parser.add_argument("--chunk", type=int, default=8192, metavar="TOKENS")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--min-budget-tokens", type=int, default=S2OConfig().min_budget_tokens, metavar="TOKENS",
        help="that a query may visit however small the budget (default: %(default)s)",
    )  # fmt: skip


@functools.cache
def client(url: str) -> Any:
    """Return the `openai` client of a server; to make one takes longer than a short answer."""
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)


def ask(
    url: str, tokens: Sequence[int], budget: float | None, output_tokens: int = OUTPUT_TOKENS
) -> Timing:
    """Send one prompt and time its stream."""
    model = client(url).models.list().data[0].id
    options = completion(tokens, output_tokens, budget)
    chunks: list[Chunk] = []
    ids: list[int] = []
    sent = time.perf_counter()
    stream = client(url).completions.create(model=model, **options)
    for piece in stream:
        if piece.choices and (new := piece.choices[0].model_extra.get("token_ids")):
            ids += new
            chunks.append(Chunk(time.perf_counter(), len(ids)))
    if len(ids) != output_tokens:
        raise ServerError(f"asked for {output_tokens} tokens and got {len(ids)}")
    return Timing(sent, chunks, ids)


def server(
    args: argparse.Namespace, arm: str, model: Path, folder: Path, longest: int, held: int
) -> AbstractContextManager[Callable[[], str]]:
    """Start the `vllm serve` of one arm, see :func:`server_process.starting`.

    Args:
        args: of the command line; S2O's budget is the largest of ``args.budgets``, and
            ``args.s2o_args``, where there are some, are further flags of its own.
        arm: `stock` or `s2o`.
        model: the model's folder.
        folder: for the log.
        longest: tokens of the longest request, its answer included.
        held: tokens of all requests at once, if those are more.
    """
    flags = [
        "--no-enable-prefix-caching", "--max-model-len", str(longest),
        "--max-num-batched-tokens", str(args.chunk), "--dtype", args.dtype,
        "--load-format", args.load_format,
        "--kv-cache-memory-bytes", str(kv_cache_bytes(model, max(longest, held) + SPARE_TOKENS)),
        "--gpu-memory-utilization", "0.45", *args.server_args,
    ]  # fmt: skip
    if arm == "s2o":
        flags += ["--attention-backend", "s2o", "--s2o-min-context", str(args.min_context)]
        flags += ["--s2o-sparsity-budget", str(max(args.budgets))]
        flags += ["--s2o-min-budget-tokens", str(args.min_budget_tokens)]
        flags += getattr(args, "s2o_args", [])
    port = args.port + (arm == "s2o")
    return starting(model, port, flags, folder / f"{arm}.log")


@contextmanager
def both(args: argparse.Namespace, folder: Path, longest: int, held: int = 0) -> Iterator[Pair]:
    """Start both arms, see :func:`server`, and check that they agree.

    Raises:
        ServerError: if one does not start, or at budget 1.0 S2O's tokens are not stock vLLM's.
    """
    model, flags = model_of(args, folder)
    args.server_args = [*flags, *args.server_args]
    vocabulary = vocabulary_of(model)
    gate = prompt(min(GATE_CONTEXT, longest - OUTPUT_TOKENS), 0, vocabulary)
    size = (model, folder, longest, held)
    with server(args, "s2o", *size) as s2o, server(args, "stock", *size) as stock:
        urls = {"s2o": s2o(), "stock": stock()}
        if ask(urls["stock"], gate, None).tokens != ask(urls["s2o"], gate, 1.0).tokens:
            raise ServerError("at budget 1.0 S2O's tokens are not those of stock vLLM")
        yield Pair(urls, vocabulary)
