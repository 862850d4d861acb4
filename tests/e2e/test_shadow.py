"""Shadow mode on a real server: the true error on /metrics, and a limit that makes it dense."""

import time

import pytest

from asking import ask

pytestmark = pytest.mark.e2e

FLAGS = (
    "--attention-backend", "s2o", "--s2o-min-context", "256", "--s2o-segment-size", "128",
    "--s2o-sparsity-budget", "0.05", "--s2o-shadow-rate", "1",
)  # fmt: skip
PROMPT = list(range(3, 503)) * 6
SHADOW = ("s2o:shadow_error", "s2o:shadow_rows")
SENTENCE = "more than shadow_limit 0.001: all prefill stays dense until the server is restarted"


@pytest.fixture(scope="module")
def servers(launch, tiny_model):
    limited = (*FLAGS, "--s2o-shadow-limit", "0.001", "--no-enable-prefix-caching")
    return launch(tiny_model, plain=FLAGS, limited=limited)


def test_the_true_error_is_on_metrics(servers):
    server = servers["plain"]
    ask(server.url, PROMPT, output_tokens=2, budget=1.0)
    work = server.settled(("s2o:attention_tokens",), [0.0])
    assert work[0] > 0
    assert [server.total(name) for name in SHADOW] == [0, 0], "at a budget of 1 there is none"
    ask(server.url, PROMPT, output_tokens=2)
    error, rows = server.settled(SHADOW, [0, 0])
    # Chunks of 512 tokens: from the first with enough history on, 32 queries each, in two layers.
    assert rows == 2 * 32 * len(range(0, len(PROMPT), 512))
    assert 0.001 < error / rows < 4, "random values have next to no mean"
    by_layer = [server.metrics()[f's2o:shadow_rows_total{{layer="{layer}"}}'] for layer in range(2)]
    assert by_layer == [rows / 2, rows / 2]
    assert (
        server.total("s2o:dense_rows")
        == server.metrics()['s2o:dense_rows_total{reason="budget_is_one"}']
        + server.metrics()['s2o:dense_rows_total{reason="short_history"}']
    )


def test_beyond_the_limit_the_server_is_dense_and_says_so_once(servers):
    server = servers["limited"]
    counter = 's2o:dense_rows_total{reason="shadow_limit"}'
    deadline = time.monotonic() + 120
    while not server.metrics()[counter]:
        assert time.monotonic() < deadline, "the limit is never reached"
        ask(server.url, PROMPT, output_tokens=2)
        time.sleep(1)
    (before,) = server.settled(("s2o:sparse_requests",), [0.0])
    dense = ask(server.url, PROMPT, output_tokens=8)
    assert dense == ask(server.url, PROMPT, output_tokens=8, budget=1.0)
    assert dense == ask(servers["plain"].url, PROMPT, output_tokens=8, budget=1.0)
    assert server.settled(("s2o:sparse_requests",)) == [before]
    assert server.log.read_text().count(SENTENCE) == 1
