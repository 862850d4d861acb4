"""Questions of token ids to a running server, and what its pages say."""

import urllib.request
from pathlib import Path
from typing import NamedTuple

import openai

from s2o_vllm.benchmarks.speed.serving import completion
from s2o_vllm.cli.server_process import metric, read


class Answer(NamedTuple):
    """Greedy tokens, and the log-probabilities of the likeliest first tokens by name, best first.

    The second is empty unless it was asked for.
    """

    tokens: list[int]
    first: dict[str, float]


def ask(url: str, tokens: list[int], budget=None, output_tokens=16, **extra) -> Answer:
    """Ask for ``output_tokens`` tokens; ``extra`` are further fields of the request."""
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", timeout=600, max_retries=0)
    model = client.models.list().data[0].id
    options = completion(tokens, output_tokens, budget, **extra) | {"stream": False}
    choice = client.completions.create(model=model, **options).choices[0]
    assert len(choice.token_ids) == output_tokens
    return Answer(choice.token_ids, choice.logprobs.top_logprobs[0] if choice.logprobs else {})


def post(url: str) -> str:
    """Send an empty POST; return the page."""
    with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=120) as page:
        return page.read().decode()


def grown(url: str, before: str, *names: str) -> list[float]:
    """By how much counters have grown since a page of /metrics."""
    after = read(url + "/metrics")
    return [metric(after, name) - metric(before, name) for name in names]


def tracebacks(log: Path) -> list[str]:
    """Lines of a server's log that begin a traceback, but for those of vLLM's own warnings.

    It warns so of optional packages that do not load, and where there is no tokenizer. To be read
    before the server is stopped: a shutdown may end its own loops with one.
    """
    lines = log.read_text().splitlines()
    return [line for line in lines if "Traceback" in line and " WARNING " not in line]
