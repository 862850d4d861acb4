"""Sparse decode on the card, beside S2O with vLLM's own decode."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from asking import ask, grown, tracebacks
from models import VOCABULARY
from s2o_vllm.benchmarks.speed.serving import kv_cache_bytes, prompt
from s2o_vllm.cli.server_process import measured_density, read, starting

pytestmark = pytest.mark.e2e

CONTEXT, CHUNK, LENGTH, TOKENS = 32768, 8192, 20000, 32
PROMPTS = 8
S2O = ("--attention-backend", "s2o", "--s2o-sparsity-budget", "0.1")
DECODE = ("--s2o-decode-min-context", "16384", "--s2o-decode-requests", "2")
BUDGETS = {"plain": None, "every": 0.9999, "few": 0.05}
ELIGIBLE, VISITED = "s2o:history_tokens_eligible_total", "s2o:history_tokens_visited_total"


@pytest.fixture(scope="module")
def servers(low_rank_llama, tmp_path_factory):
    """URLs and logs: `plain` decodes densely, `every` over whole lists, `few` over a twentieth."""
    folder = tmp_path_factory.mktemp("decode")
    flags = (
        *S2O, "--max-model-len", str(CONTEXT), "--max-num-batched-tokens", str(CHUNK),
        "--gpu-memory-utilization", "0.25", "--no-enable-prefix-caching",
        "--kv-cache-memory-bytes", str(kv_cache_bytes(low_rank_llama, 4 * CONTEXT)),
    )  # fmt: skip
    with ExitStack() as stack:
        begun = {}
        for number, (name, budget) in enumerate(BUDGETS.items()):
            own = () if budget is None else ("--s2o-decode-budget", str(budget), *DECODE)
            log = folder / f"{name}.log"
            server = starting(low_rank_llama, 8493 + number, [*flags, *own], log)
            begun[name] = (stack.enter_context(server), log)
        yield {name: (healthy(), log) for name, (healthy, log) in begun.items()}


@pytest.mark.parametrize(("name", "same"), [("every", 7), ("few", 1)])
def test_answers_begin_as_those_of_dense_decode(servers, name, same):
    """Of each answer the second token, the first that decode gave.

    A model of random weights has no token that is far ahead: over a twentieth of a history some
    answers begin alike, and by chance none of eight would.
    """
    (plain, _), (url, log) = servers["plain"], servers[name]
    before = read(url + "/metrics"), read(plain + "/metrics")
    found = []
    for seed in range(PROMPTS):
        tokens = prompt(LENGTH, seed, VOCABULARY)
        found.append((ask(url, tokens, None, TOKENS), ask(plain, tokens, None, TOKENS)))
    assert all(one.tokens[0] == other.tokens[0] for one, other in found), "of the prompt"
    assert sum(one.tokens[1] == other.tokens[1] for one, other in found) >= same
    for server, page in zip((url, plain), before, strict=True):
        assert measured_density(server, page) < 0.12, "and all is counted"
    assert grown(url, before[0], ELIGIBLE) > grown(plain, before[1], ELIGIBLE)
    share = grown(url, before[0], VISITED)[0] - grown(plain, before[1], VISITED)[0]
    share /= grown(url, before[0], ELIGIBLE)[0] - grown(plain, before[1], ELIGIBLE)[0]
    assert share == pytest.approx(BUDGETS[name], abs=0.01)
    assert 'reason="no_decode_state"' not in read(url + "/metrics")
    assert tracebacks(log) == []


def test_graphs_hold_whole_steps(servers):
    for name in ("every", "few"):
        _, log = servers[name]
        assert re.search(r"Capturing CUDA graphs \(.*FULL\)", log.read_text())


def test_a_sparse_answer_repeats(servers):
    url, _ = servers["few"]
    tokens = prompt(LENGTH, 1, VOCABULARY)
    assert ask(url, tokens, None, TOKENS) == ask(url, tokens, None, TOKENS)


def test_more_requests_than_slots(servers):
    url, log = servers["few"]
    with ThreadPoolExecutor(4) as pool:
        asked = [prompt(LENGTH, 50 + seed, VOCABULARY) for seed in range(4)]
        list(pool.map(lambda tokens: ask(url, tokens, None, 4 * TOKENS), asked))
    time.sleep(2)  # counters are published from time to time
    assert 'reason="no_decode_state"' in read(url + "/metrics")
    assert tracebacks(log) == []
