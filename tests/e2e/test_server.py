"""A stock OpenAI-compatible server with S2O on, through the official client."""

import json
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

pytestmark = pytest.mark.e2e


def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def prompt(length, seed):
    generator = random.Random(seed)
    return [generator.randrange(3, 512) for _ in range(length)]


def complete(server, tokens, budget=None, target_error=None, **options):
    """Greedy tokens of a prompt given as token ids."""
    asked = {"s2o_sparsity_budget": budget, "s2o_target_error": target_error}
    asked = {key: value for key, value in asked.items() if value is not None}
    extra = {"return_token_ids": True} | ({"vllm_xargs": asked} if asked else {})
    answer = client(server).completions.create(
        model=server.model, prompt=tokens, temperature=0, max_tokens=8,
        extra_body=extra | options,
    )  # fmt: skip
    return answer.choices[0].token_ids


def wait_for(condition, seconds=30):
    """Counters reach /metrics within a second or so."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert condition()


HISTORY = ("s2o:history_tokens_visited", "s2o:history_tokens_eligible")


def density(server, run):
    """Visited over eligible history tokens of what ``run`` does."""
    before = server.settled(HISTORY)
    run()
    after = server.settled(HISTORY, changed_from=before)
    visited, eligible = (a - b for a, b in zip(after, before, strict=True))
    return visited / eligible


def test_long_prompt_is_sparse_and_within_the_budget(server):
    share = density(server, lambda: complete(server, prompt(3000, 1)))
    assert 0.05 < share <= 0.35, "dense segments count in full, the rest at most at the budget"


def test_request_budget_turns_density_up_and_down(server):
    low = density(server, lambda: complete(server, prompt(3000, 2), budget=0.02))
    high = density(server, lambda: complete(server, prompt(3000, 2), budget=0.6))
    assert low < 0.3 < high


def test_a_target_error_ends_lists_before_the_budget_does(server):
    lax = density(server, lambda: complete(server, prompt(3000, 2), 0.6, target_error=0.8))
    strict = density(server, lambda: complete(server, prompt(3000, 2), 0.6, target_error=1e-4))
    assert lax + 0.1 < strict <= 0.75, "a strict target spends the budget"


DROPPED = ("s2o:dropped_mass", "s2o:dropped_mass_rows")


def dropped_mass(server, run):
    """Estimated share of softmax mass that ``run`` leaves out."""
    before = server.settled(DROPPED)
    run()
    mass, rows = (
        b - a for a, b in zip(before, server.settled(DROPPED, changed_from=before), strict=True)
    )
    return mass / rows


def test_the_dropped_mass_is_estimated_and_falls_as_the_budget_rises(server):
    much = dropped_mass(server, lambda: complete(server, prompt(3000, 11), budget=0.05))
    little = dropped_mass(server, lambda: complete(server, prompt(3000, 11), budget=0.6))
    assert 0 < little < much - 0.1 < 0.9
    layers = [key for key in server.metrics() if key.startswith("s2o:dropped_mass_rows_total{")]
    assert len(layers) == 2, "one series a layer"


def test_budget_one_gives_the_tokens_of_stock_vllm(server, stock_server):
    for seed, length in ((3, 3000), (4, 700), (5, 513), (6, 17)):
        tokens = prompt(length, seed)
        assert complete(server, tokens, budget=1.0) == complete(stock_server, tokens)


def test_short_prompts_are_stock(server, stock_server):
    tokens = prompt(200, 7)
    assert complete(server, tokens) == complete(stock_server, tokens)


def test_short_prompts_are_counted_by_reason(server):
    name = 's2o:dense_rows_total{reason="short_history"}'
    before = server.metrics().get(name, 0)
    complete(server, prompt(100, 8))
    wait_for(lambda: server.metrics().get(name, 0) > before)


def cached_tokens(server):
    return server.total("vllm:prefix_cache_hits")


def test_prefix_cache_hits_within_a_budget_and_across_only_before_min_context(server):
    tokens = prompt(2000, 9)
    first = complete(server, tokens, budget=0.3)
    before = cached_tokens(server)
    assert complete(server, tokens, budget=0.3) == first
    same = cached_tokens(server)
    assert same - before > 1500, "the same budget reuses its blocks"
    complete(server, tokens, budget=1.0)
    assert cached_tokens(server) == same, "stock attention reuses no block of another budget"
    complete(server, tokens, budget=0.2)
    assert cached_tokens(server) - same == 256, "--s2o-min-context 256: no budget touches those"
    complete(server, tokens, budget=1.0)
    assert cached_tokens(server) - same > 256 + 1500, "its own blocks it does"


def test_a_prefix_cache_hit_is_attended_sparsely(server):
    tokens = prompt(2000, 10)
    complete(server, tokens)
    before = cached_tokens(server)
    share = density(server, lambda: complete(server, tokens + prompt(600, 11)))
    assert cached_tokens(server) - before >= 1500
    # Of like scores, which a random model has, a list takes all or none: a sixteenth more at most.
    assert share <= 0.1 * 17 / 16, "all of the new segments have a long history"


def test_two_requests_at_once_do_not_change_each_other(server):
    # Each prompt alone first; salted apart, so that the second run computes all of it again.
    prompts = [prompt(1800, 12), prompt(900, 13)]
    budgets = [None, 0.5]
    alone = [
        complete(server, one, budget, cache_salt="alone")
        for one, budget in zip(prompts, budgets, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        together = list(
            pool.map(
                lambda pair: complete(server, pair[0], pair[1], cache_salt="together"),
                zip(prompts, budgets, strict=True),
            )
        )
    assert together == alone


@pytest.mark.parametrize(
    ("xargs", "named"),
    [
        ({"s2o_sparsity_budget": "lots"}, "s2o_sparsity_budget is 'lots'"),
        ({"s2o_sparsity_budget": 1.5}, "greater than 0 and at most 1"),
        ({"s2o_sparsity_budget": 0}, "s2o_sparsity_budget is 0"),
        ({"s2o_target_error": 1}, "s2o_target_error is 1, must be a number from 0"),
        ({"s2o_budget": 0.1}, "unknown request setting 's2o_budget'"),
    ],
)
def test_malformed_request_settings_are_http_400(server, xargs, named):
    with pytest.raises(openai.BadRequestError) as refusal:
        client(server).completions.create(
            model=server.model, prompt=[3, 4, 5], max_tokens=1, extra_body={"vllm_xargs": xargs}
        )
    assert refusal.value.status_code == 400
    assert named in str(refusal.value)
    assert len(complete(server, [3, 4, 5])) == 8, "the server goes on"


def post(server, path, body):
    """Status, content type and text of an answer to a JSON body."""
    request = urllib.request.Request(
        server.url + path, json.dumps({"model": server.model} | body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.headers["content-type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["content-type"], error.read().decode()


MESSAGES = [{"role": "user", "content": "w3 w4 w5"}]
CHAT = {"messages": MESSAGES, "max_tokens": 2}
COMPLETION = {"prompt": [3, 4, 5], "max_tokens": 2}
LABELS = {"query": [3] * 3, "items": [[5]], "label_token_ids": [3, 4]}
ENDPOINTS = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "w3 w4", "max_output_tokens": 2},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 2},
    "/generative_scoring": LABELS,
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_malformed_budget_is_http_400_before_a_stream_begins(server, path, stream):
    body = ENDPOINTS[path] | {"stream": stream, "vllm_xargs": {"s2o_sparsity_budget": "lots"}}
    status, kind, text = post(server, path, body)
    assert (status, kind) == (400, "application/json")
    error = json.loads(text)["error"]
    assert "s2o_sparsity_budget is 'lots', must be a number greater than 0" in error["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vllm_xargs": {"s2o_sparsity_budget": True}}, "s2o_sparsity_budget is True, must be a"),
        ({"vllm_xargs": {"s2o_target_error": False}}, "s2o_target_error is False, must be a"),
        ({"vllm_xargs": {"sparsity_budget": 0.5}}, "'sparsity_budget', must be s2o_sparsity_bu"),
        ({"vllm_xargs": {"s2o-sparsity-budget": 0.5}}, "'s2o-sparsity-budget', must be s2o_spa"),
        ({"vllm_xargs": {"S2O_SPARSITY_BUDGET": 0.5}}, "'S2O_SPARSITY_BUDGET', must be s2o_spa"),
        ({"s2o_sparsity_budget": 0.5}, "must be 's2o_sparsity_budget' in vllm_xargs"),
        ({"sparsity_budget": 0.5}, "must be 's2o_sparsity_budget' in vllm_xargs"),
    ],
)
def test_a_setting_that_nobody_would_read_is_http_400(server, fields, said):
    status, _, text = post(server, "/v1/completions", COMPLETION | fields)
    assert status == 400
    assert said in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
def test_other_requests_are_answered_as_ever(server, path, stream):
    for xargs in ({"others": 1}, {"s2o_sparsity_budget": 0.5, "s2o_target_error": 0.1}):
        status, _, text = post(
            server, path, ENDPOINTS[path] | {"stream": stream, "vllm_xargs": xargs}
        )
        assert status == 200, text


def test_what_is_not_ours_is_refused_by_vllm(server):
    status, _, text = post(server, "/v1/completions", {"prompt": "s2o", "max_tokens": "many"})
    assert (status, "max_tokens" in text) == (400, True), "vLLM's own refusal"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [7] * 900, "use_beam_search": True, "n": 2}),
        ("/generative_scoring", LABELS | {"query": [7] * 900}),
    ],
)
def test_endpoints_with_parameters_of_their_own_see_the_budget(server, path, body):
    """Beam search and scoring leave vllm_xargs out of what they ask the engine for."""
    salted = body | {"max_tokens": 1, "cache_salt": path.replace("/", "-")}
    before = server.total("s2o:sparse_requests")
    one = {"vllm_xargs": {"s2o_sparsity_budget": 1.0}}
    assert post(server, path, salted | one)[0] == 200
    hits = server.total("vllm:prefix_cache_hits")
    assert post(server, path, salted)[0] == 200
    assert server.total("vllm:prefix_cache_hits") == hits, "another budget's blocks were reused"
    wait_for(lambda: server.total("s2o:sparse_requests") > before)
    chunks = server.settled(("s2o:sparse_requests",))[0] - before
    assert chunks == 2, "of 900 tokens in chunks of 512, and of one of the two requests"
