"""Requests as a busy server meets them: long and short, cached and not, some given up."""

import math
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .serving import completion, prompt

RECENT = 8  # requests that a prefix is drawn from, the latest: its blocks are still cached
SHARED_AT_MOST = 0.75  # of a prompt: the rest is new and has to be prefilled
GIVE_UP_AFTER = 2  # tokens that the client of an aborted request reads, or none at all
TIMEOUT = 600.0  # seconds without a word from the server


@dataclass(frozen=True)
class Request:
    """One request of the mix.

    Attributes:
        number: its place in the order of sending.
        length: prompt tokens.
        budget: sparsity budget that it asks for.
        prefix_of: the request whose prompt this one begins with, or None.
        shared: tokens of that prompt.
        give_up: tokens after which the client disconnects, None if it stays.
    """

    number: int
    length: int
    budget: float
    prefix_of: int | None = None
    shared: int = 0
    give_up: int | None = None


@dataclass
class Outcome:
    """What came of a request.

    Attributes:
        ttft_s: seconds to the first token, None if there was none.
        gaps_s: seconds from each piece of the answer to the next.
        tokens: tokens received.
        error: why it failed, in one line, or None.
    """

    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


def plan(
    count: int,
    lengths: tuple[int, int],
    budgets: Sequence[float],
    *,
    hits: float,
    aborts: float,
    seed: int,
) -> list[Request]:
    """Draw a mix; the same for a seed.

    Lengths are log-uniform: as many prompts from 1K to 2K tokens as from 64K to 128K. Budgets
    take turns. A request that shares a prefix takes the budget of the request it shares it with:
    cached blocks that a budget has touched are never reused under another. Of the aborted ones
    every other one is given up before its first token, while it waits or is prefilled.

    Args:
        count: requests, 2 or more.
        lengths: shortest and longest prompt in tokens.
        budgets: sparsity budgets.
        hits: share of requests that begin with an earlier request's prompt.
        aborts: share of requests whose client disconnects; never one of those above.
        seed: of the draw.

    Raises:
        ValueError: if the shares leave no request to share a prefix with.
    """
    wanted_hits, wanted_aborts = round(count * hits), round(count * aborts)
    if wanted_hits + wanted_aborts >= count:
        raise ValueError(f"{count} requests cannot hold {wanted_hits} hits, {wanted_aborts} aborts")
    generator = random.Random(seed)
    # The first request is always a whole one, so that there is a prompt to share.
    special = generator.sample(range(1, count), wanted_hits + wanted_aborts)
    sharing, aborted = set(special[:wanted_hits]), special[wanted_hits:]
    gives_up = {number: GIVE_UP_AFTER * (place % 2) for place, number in enumerate(aborted)}
    low, high = (math.log(length) for length in lengths)
    requests: list[Request] = []
    whole: list[Request] = []
    for number in range(count):
        length = min(round(math.exp(generator.uniform(low, high))), lengths[1])
        if number in sharing:
            other = generator.choice(whole[-RECENT:])
            shared = min(other.length, int(length * SHARED_AT_MOST))
            requests.append(Request(number, length, other.budget, other.number, shared))
            continue
        request = Request(
            number, length, budgets[number % len(budgets)], give_up=gives_up.get(number)
        )
        requests.append(request)
        if request.give_up is None:
            whole.append(request)
    return requests


def tokens_of(request: Request, requests: Sequence[Request], seed: int, vocabulary: int) -> list:
    """Return a request's prompt as token ids; no two prompts share more than is planned."""
    shared: list[int] = []
    if request.prefix_of is not None:
        other = requests[request.prefix_of]
        shared = tokens_of(other, requests, seed, vocabulary)[: request.shared]
    own = prompt(request.length - len(shared), seed * 1_000_003 + request.number, vocabulary)
    return shared + own


@dataclass(frozen=True)
class Client:
    """How requests are sent.

    Attributes:
        url: the server, without a path.
        model: the served model's name.
        vocabulary: token ids that it has.
        output_tokens: length of an answer.
        salt: keeps the prefix cache from answering for another run's prompts.
        seed: of the prompts.
    """

    url: str
    model: str
    vocabulary: int
    output_tokens: int
    salt: str
    seed: int

    def send(self, tokens: Sequence[int], budget: float, give_up: int | None = None) -> Outcome:
        """Send one prompt and read its answer, or as much of it as the client waits for."""
        import httpx
        import openai

        outcome = Outcome()
        options = completion(tokens, self.output_tokens, budget, cache_salt=self.salt)
        client: Any = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", timeout=TIMEOUT, max_retries=0
        )
        last = start = time.perf_counter()
        try:
            # Leaving this block before the end disconnects.
            with client, client.completions.create(model=self.model, **options) as stream:
                if give_up == 0:
                    return outcome
                for chunk in stream:
                    new = chunk.choices[0].model_extra.get("token_ids") if chunk.choices else None
                    if not new:
                        continue
                    now = time.perf_counter()
                    if outcome.ttft_s is None:
                        outcome.ttft_s = now - start
                    else:
                        outcome.gaps_s.append(now - last)
                    last = now
                    outcome.tokens += len(new)
                    if give_up is not None and outcome.tokens >= give_up:
                        return outcome
        except (openai.OpenAIError, httpx.HTTPError) as error:
            outcome.error = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            return outcome
        if outcome.tokens != self.output_tokens:
            outcome.error = f"asked for {self.output_tokens} tokens and got {outcome.tokens}"
        return outcome


def run(client: Client, requests: Sequence[Request], concurrency: int) -> list[Outcome]:
    """Send all requests, ``concurrency`` at a time, in their order.

    A request that shares a prefix is sent once the other one has been answered.
    """
    answered = [threading.Event() for _ in requests]

    def one(request: Request) -> Outcome:
        tokens = tokens_of(request, requests, client.seed, client.vocabulary)
        try:
            if request.prefix_of is not None:
                answered[request.prefix_of].wait()
            return client.send(tokens, request.budget, request.give_up)
        finally:
            answered[request.number].set()

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, requests))
