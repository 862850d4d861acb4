"""What ``make serve`` runs: the embedded server, and one long prompt with S2O and without.

``python -m s2o_vllm.cli.demo [--once] [--port N] [any flag of s2o serve]``
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .server_process import (
    ServerError,
    launch,
    measured_density,
    read,
    samples,
    stop,
    wait_until_healthy,
)

DENSE_ROWS = "s2o:dense_rows_total"
WHO = "The gardener|My neighbour|A young teacher|The old sailor|Her cousin|The baker|Our guide"
DID = "repaired|painted|borrowed|described|measured|carried|photographed|remembered|cleaned"
WHAT = "a wooden boat|the stone bridge|an empty notebook|the kitchen window|a bicycle|two lamps"
WHERE = "near the harbour|behind the library|in the quiet valley|at the station|by the river"
WHEN = "on a rainy morning|before lunch|late in the evening|during the festival|last winter"
FACT = "The magic number of the lighthouse is 7429."
FACT_AT = 0.75  # of the text
QUESTION = "What is the magic number of the lighthouse?"
OPENING = "The magic number of the lighthouse is"  # a model this small needs to be led
SENTENCES = 370  # about 5,000 tokens
WARM_UP = (20, 8)  # sentences and seed of the prompt that no time is taken of
STOCK = 1.0  # the budget that is stock attention, to the bit, and shares no cached block


class Answer(NamedTuple):
    """What the server said, and how long its first token and all of it took, in seconds."""

    text: str
    prompt_tokens: int
    first_token: float
    total: float


def long_prompt(sentences: int = SENTENCES, seed: int = 7) -> str:
    """Return a long text with one fact in it, and a question about that fact at its end."""
    choose = random.Random(seed).choice
    parts = [part.split("|") for part in (WHO, DID, WHAT, WHERE, WHEN)]
    lines = [" ".join(choose(part) for part in parts) + "." for _ in range(sentences)]
    lines.insert(round(sentences * FACT_AT), FACT)
    return f"{' '.join(lines)}\n\nQuestion: {QUESTION}\nAnswer: {OPENING}"


def ask(url: str, prompt: str, budget: float | None = None) -> Answer:
    """Send one prompt with the official client and time its first token.

    Args:
        url: of the server.
        prompt: the text.
        budget: sparsity budget; None for the server's.
    """
    import openai

    client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
    model = client.models.list().data[0].id
    pieces: list[str] = []
    first, prompt_tokens = 0.0, 0
    start = time.perf_counter()
    stream = client.completions.create(
        model=model,
        prompt=prompt,
        temperature=0,
        max_tokens=32,
        stop=["\n"],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": {} if budget is None else {"s2o_sparsity_budget": budget}},
    )
    for chunk in stream:
        if chunk.usage is not None:
            prompt_tokens = chunk.usage.prompt_tokens
        if chunk.choices and (text := chunk.choices[0].text):
            first = first or time.perf_counter() - start
            pieces.append(text)
    return Answer("".join(pieces).strip(), prompt_tokens, first, time.perf_counter() - start)


def report(url: str) -> None:
    """Ask the long question, then ask it of stock attention, and print what came of it.

    Raises:
        ServerError: if the server refuses it.
    """
    import openai

    prompt = long_prompt()
    before = read(f"{url}/metrics") or ""
    print(f"s2o: asking, after a text of {len(prompt.split()):,} words: {QUESTION}", flush=True)
    try:
        ask(url, long_prompt(*WARM_UP))
        answer, stock = ask(url, prompt), ask(url, prompt, STOCK)
    except openai.OpenAIError as error:
        raise ServerError(f"The server did not answer the long prompt: {error}") from error
    share = measured_density(url, before)
    chosen = left_dense(read(f"{url}/metrics") or "") > left_dense(before)
    print(f"\nAnswer:              {OPENING} {answer.text}")
    print(f"In the text:         {FACT}")
    print(f"Prompt:              {answer.prompt_tokens:,} tokens")
    print(f"Time to first token: {answer.first_token:.2f} s")
    times = answer.first_token, stock.first_token
    print(f"Stock attention:     {compared(*times, both_dense=share is None)}")
    print(f"Density:             {described(share, chosen)}")
    print(flush=True)


def compared(ours: float, stock: float, *, both_dense: bool) -> str:
    """Return a sentence about two times to the first token, in seconds."""
    same = f"{stock:.2f} s for the same prompt on the same server, at a budget of 1"
    if both_dense:
        return f"{same}: both times are stock attention's, and differ by chance"
    return f"{same}: S2O took {ours / stock:.2f} times that"


def described(share: float | None, chosen: bool) -> str:
    """Return a sentence about the share of the history that was visited.

    Args:
        share: None where all of it was attended densely.
        chosen: whether chunks stayed dense because that is faster on this device.
    """
    if share is not None:
        return f"{share:.3f} (history tokens visited / eligible)"
    dense = "no history was attended sparsely: this prompt ran dense"
    if not chosen:
        return dense
    return f"{dense}, which is faster on this device (--s2o-dense-where-faster false ranks it)"


def left_dense(page: str) -> float:
    """Return how many chunks a metrics page counts as dense because sparse would not pay."""
    reason = 'reason="few_new_tokens"'
    counts = samples(page).items()
    return sum(n for name, n in counts if name.startswith(DENSE_ROWS) and reason in name)


def run(server: subprocess.Popen, url: str, log: Path, *, once: bool) -> int:
    """Wait for the server, ask, and stay until interrupted; return the exit code."""
    seconds = wait_until_healthy(server, url, log)
    print(f"s2o: healthy after {seconds:.0f} s", flush=True)
    report(url)
    if once:
        return 0
    print(f"The server stays up at {url}/v1 until Ctrl-C; its log: {log}", flush=True)
    return server.wait()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m s2o_vllm.cli.demo", description="A server, and one long prompt through it."
    )
    parser.add_argument("--once", action="store_true", help="stop the server after the answer")
    parser.add_argument("--port", type=int, default=8000)
    args, words = parser.parse_known_args(argv)
    url = f"http://127.0.0.1:{args.port}"
    if read(f"{url}/health") is not None:
        print(f"demo: port {args.port} is taken: choose another with --port.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="s2o-demo-") as folder:
        log = Path(folder) / "server.log"
        own = ["-m", "s2o_vllm.cli", "serve", *words, "--port", str(args.port)]
        server = launch([sys.executable, "-P", *own], log)
        try:
            return run(server, url, log, once=args.once)
        except ServerError as error:
            print(f"{error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ns2o: stopping the server", flush=True)
            return 0
        finally:
            stop(server)


if __name__ == "__main__":
    sys.exit(main())
