"""One model over two workers: the same tokens, and the same counts, as on one."""

import random

import openai
import pytest

from models import write_model, write_weights

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FLAGS = (
    "--attention-backend", "s2o", "--s2o-min-context", "256", "--s2o-segment-size", "128",
    "--load-format", "safetensors", "--dtype", "float32",
)  # fmt: skip
REQUESTS = [(3000, None), (1500, 0.05), (1500, 1.0), (200, None)]  # tokens, budget
COUNTERS = (
    "s2o:history_tokens_visited", "s2o:history_tokens_eligible", "s2o:sparse_requests",
    "s2o:dense_rows",
)  # fmt: skip


def ask(server):
    """Greedy tokens of each request, and what all of them were counted as."""
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    answers = []
    for seed, (length, budget) in enumerate(REQUESTS):
        choose = random.Random(seed).randrange
        extra = {} if budget is None else {"vllm_xargs": {"s2o_sparsity_budget": budget}}
        answer = client.completions.create(
            model=server.model, prompt=[choose(3, 512) for _ in range(length)], temperature=0,
            max_tokens=8, extra_body=extra | {"return_token_ids": True},
        )  # fmt: skip
        answers.append(answer.choices[0].token_ids)
    return answers, server.settled(COUNTERS, changed_from=[0] * len(COUNTERS))


@pytest.fixture(scope="module", autouse=True)
def unbound_threads():
    """vLLM would bind each CPU worker to a NUMA node of its own, and one node must do here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    # Two pairs of KV heads that share budgets: a rank has one.
    write_model(folder, num_key_value_heads=4)
    # With keys without structure rounding would decide which rows are scored, and so the tokens.
    return write_weights(folder, gain=1.5, rank=4)


# Without a compilation mode vLLM's CPU runner never makes the buffers between pipeline stages.
STAGES = ("--no-enforce-eager", "--compilation-config", '{"mode": 3, "backend": "eager"}')


TENSOR = ("--tensor-parallel-size", "2")
PIPELINE = ("--pipeline-parallel-size", "2", *STAGES)


@pytest.fixture(scope="module")
def answers(model, launch):
    """What one worker answers, and two that share its heads."""
    servers = launch(model, one=FLAGS, tensor=FLAGS + TENSOR)  # three at once: 15 GB of memory
    return {name: ask(server) for name, server in servers.items()}


def check(answer, alone, counts_each):
    tokens, (visited, eligible, sparse, dense) = answer
    assert tokens == alone[0]
    expected = alone[1]
    assert visited == pytest.approx(expected[0], rel=0.01)
    assert eligible == expected[1]
    assert [sparse, dense] == [counts_each * count for count in expected[2:]]


def test_two_tensor_parallel_workers_answer_as_one(answers):
    check(answers["tensor"], answers["one"], counts_each=1)


def test_two_pipeline_stages_answer_as_one(model, launch, answers):
    servers = launch(model, pipeline=FLAGS + PIPELINE)
    check(ask(servers["pipeline"]), answers["one"], counts_each=2)
