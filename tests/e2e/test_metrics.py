"""What /metrics and the log of a real server say, at two chunk sizes."""

from importlib.metadata import version

import pytest

from asking import ask
from s2o_vllm.metrics import LABELS, METRICS, OF_LAYERS, SHARE, SHARE_BUCKETS
from s2o_vllm.support import DENSE_REASONS

pytestmark = pytest.mark.e2e

FLAGS = ("--attention-backend", "s2o", "--s2o-min-context", "512", "--s2o-segment-size", "128")
PROMPT = list(range(3, 503)) * 6
WORK = ("s2o:attention_tokens", "s2o:attention_tokens_skipped")
HISTORY = ("s2o:history_tokens_eligible", "s2o:history_tokens_visited")


@pytest.fixture(scope="module")
def servers(launch, tiny_model):
    def chunks(tokens):
        return (*FLAGS, "--max-num-batched-tokens", str(tokens))

    return launch(tiny_model, small=chunks(256), large=chunks(2048))


@pytest.fixture(scope="module")
def fresh(servers):
    """Samples of S2O of each server before its first request."""
    return {
        name: {key: value for key, value in one.metrics().items() if key.startswith("s2o:")}
        for name, one in servers.items()
    }


def test_every_series_is_there_before_the_first_request(fresh):
    for found in fresh.values():
        (info,) = [key for key in found if key.startswith("s2o:info")]
        assert found.pop(info) == 1
        assert f'version="{version("s2o-vllm")}"' in info
        assert 'min_context="512"' in info
        assert set(found.values()) == {0}
        unlabelled = {f"{name}_total" for name in METRICS if name not in LABELS}
        reasons = {f's2o:dense_rows_total{{reason="{reason}"}}' for reason in DENSE_REASONS}
        layers = {f'{name}_total{{layer="{layer}"}}' for name in OF_LAYERS for layer in range(2)}
        histogram = {key for key in found if key.startswith(SHARE)}
        assert len(histogram) == len(SHARE_BUCKETS) + 2
        assert len(layers) == 12
        assert set(found) == unlabelled | reasons | layers | histogram


def test_every_series_has_the_labels_that_vllms_have(servers):
    server = servers["small"]
    series = [line for line in server.page().splitlines() if not line.startswith("#")]
    ours = [line for line in series if line.startswith("s2o:")]
    vllms = [line for line in series if line.startswith("vllm:num_requests_running{")]
    assert ours
    assert vllms
    for line in ours + vllms:
        assert 'engine="0"' in line
        assert f'model_name="{server.model}"' in line


@pytest.fixture(scope="module")
def counted(servers, fresh):
    """Each server's counters after one long prompt."""
    for one in servers.values():
        ask(one.url, PROMPT, output_tokens=2)
    return {
        name: dict(zip(WORK + HISTORY, one.settled(WORK + HISTORY, [0] * 4), strict=True))
        for name, one in servers.items()
    }


def test_the_share_of_all_work_is_the_same_at_both_chunk_sizes(counted):
    for totals in counted.values():
        # Two layers of four heads; the prompt's last chunk has more than one token.
        assert totals[WORK[0]] == 2 * 4 * len(PROMPT) * (len(PROMPT) + 1) // 2
    small, large = (1 - totals[WORK[1]] / totals[WORK[0]] for totals in counted.values())
    assert small == pytest.approx(large, rel=0.005)
    assert 0.1 < small < 0.5


def test_the_share_of_a_prompt_is_that_of_all_work_there_is_one(servers, counted):
    for name, totals in counted.items():
        found = servers[name].metrics()
        assert found[f"{SHARE}_count"] == 1
        share = 1 - totals[WORK[1]] / totals[WORK[0]]
        # What is planned. Scores of a random model are much alike, of which a list takes all or
        # none, up to a sixteenth more than it should.
        assert found[f"{SHARE}_sum"] == pytest.approx(share, rel=0.04)


def test_the_density_of_the_sparse_path_is_not(counted):
    small, large = (totals[HISTORY[1]] / totals[HISTORY[0]] for totals in counted.values())
    assert small < 0.9 * large


def test_the_log_has_the_settings_and_each_reason_once(servers, counted):
    for name, one in servers.items():
        log = one.log.read_text()
        assert log.count("S2O on: ranking low_rank, budget 0.1, ") == 1
        reason = "S2O: first chunk on the stock path for short_history: the history is shorter"
        assert log.count(reason) == (name == "small")
