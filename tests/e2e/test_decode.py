"""Sparse decode through a server, beside one whose decode is vLLM's own."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from models import write_model, write_weights
from s2o_vllm.benchmarks.speed.serving import prompt

pytestmark = pytest.mark.e2e

FLAGS = (
    "--attention-backend", "s2o", "--s2o-min-context", "256", "--s2o-sparsity-budget", "0.3",
    "--load-format", "safetensors", "--dtype", "float32", "--no-enable-prefix-caching",
)  # fmt: skip
# All of the history but its last token by rank.
DECODE = ("--s2o-decode-budget", "0.9999", "--s2o-decode-min-context", "600",
          "--s2o-decode-requests", "2")  # fmt: skip
COUNTERS = ("s2o:history_tokens_eligible", "s2o:history_tokens_visited")
TOKENS = 24


@pytest.fixture(scope="module")
def servers(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    write_model(folder)
    return launch(write_weights(folder), plain=FLAGS, decode=FLAGS + DECODE)


def ask(server, tokens, budget=None):
    extra = {"return_token_ids": True}
    if budget is not None:
        extra["vllm_xargs"] = {"s2o_sparsity_budget": budget}
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    answer = client.completions.create(
        model=server.model, prompt=tokens, temperature=0, max_tokens=TOKENS, extra_body=extra
    )
    return answer.choices[0].token_ids


def no_state(server):
    return server.metrics().get('s2o:dense_rows_total{reason="no_decode_state"}', 0)


def test_with_all_tokens_listed_an_answer_is_that_of_dense_decode(servers):
    """A prompt in three chunks; the counters tell that decode was sparse."""
    visited = {}
    for name, server in servers.items():
        visited[name] = [ask(server, prompt(1400, 1, 512)), *server.settled(COUNTERS)]
    plain, decode = visited["plain"], visited["decode"]
    assert decode[0] == plain[0]
    # Heads of all layers, and tokens of every history; of those a list lacks one or two.
    eligible = 8 * sum(1400 + token for token in range(TOKENS - 1))
    assert decode[1] - plain[1] == eligible
    assert decode[2] - plain[2] == pytest.approx(eligible, rel=2e-3)
    assert no_state(servers["decode"]) == 0


@pytest.mark.parametrize(("length", "budget"), [(1400, 1.0), (500, None)])
def test_dense_requests_and_short_ones_decode_densely(servers, length, budget):
    before = servers["decode"].total(COUNTERS[0])
    tokens = prompt(length, 2, 512)
    assert ask(servers["decode"], tokens, budget) == ask(servers["plain"], tokens, budget)
    grown = servers["decode"].settled(COUNTERS)[0] - before
    assert grown <= (0 if budget else 8 * 500 * 500)
    assert no_state(servers["decode"]) == 0


def begun_alike(one, other):
    """How many tokens two answers have in common before they part."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((number for number, (a, b) in pairs if a != b), len(one))


def test_requests_beyond_the_slots_decode_densely_and_are_counted(servers):
    """How prompts are cut depends on their neighbours: with nearly whole lists answers hardly do.

    A model of random weights has no token that is far ahead: where two are close, answers part.
    """
    prompts = [prompt(900 + 70 * seed, 10 + seed, 512) for seed in range(5)]
    alone = [ask(servers["plain"], tokens, 0.9999) for tokens in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda tokens: ask(servers["decode"], tokens, 0.9999), prompts))
    alike = sorted(map(begun_alike, together, alone))
    assert alike[1] >= 1, "the first token of all but one: two may be close"
    assert alike[2] >= TOKENS // 2, "half of the median answer"
    servers["decode"].settled(COUNTERS)
    assert no_state(servers["decode"]) > 0
