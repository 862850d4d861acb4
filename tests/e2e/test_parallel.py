"""One model over two workers: the same tokens, and the same counts, as on one."""

import random
import time

import openai
import pytest

from models import write_model, write_weights

pytestmark = pytest.mark.e2e

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
    time.sleep(3)  # the workers' counters reach the server's page with a delay
    return answers, [server.total(name) for name in COUNTERS]


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
    write_model(folder)
    return write_weights(folder)


@pytest.fixture(scope="module")
def alone(model, launch):
    return ask(launch("one", model, *FLAGS))


# Without a compilation mode vLLM's CPU runner never makes the buffers between pipeline stages.
STAGES = ("--no-enforce-eager", "--compilation-config", '{"mode": 3, "backend": "eager"}')


@pytest.mark.parametrize(
    ("name", "flags", "counts_each"),
    [
        ("tensor", ("--tensor-parallel-size", "2"), 1),
        ("pipeline", ("--pipeline-parallel-size", "2", *STAGES), 2),
    ],
    ids=["tensor", "pipeline"],
)
def test_two_workers_answer_as_one(launch, model, alone, name, flags, counts_each):
    tokens, (visited, eligible, sparse, dense) = ask(launch(name, model, *FLAGS, *flags))
    assert tokens == alone[0]
    expected = alone[1]
    assert visited == pytest.approx(expected[0], rel=0.01)
    assert eligible == expected[1]
    assert [sparse, dense] == [counts_each * count for count in expected[2:]]
