import pytest
import torch

from s2o_vllm.cost import NEVER, SHORTEST, decision, least_new_tokens


def test_the_longer_the_history_the_fewer_new_tokens_pay():
    found = [least_new_tokens(history, 32) for history in (8192, 16384, 32768, 122_880, 10**6)]
    assert found == sorted(found, reverse=True)
    assert found[-1] >= 170, "some of it grows with the history"


@pytest.mark.parametrize(("history", "slower", "faster"), [(32768, 256, 1024), (122_880, 128, 512)])
def test_the_decision_is_that_of_the_measured_ratios(history, slower, faster):
    """0.70x and 2.2x behind 32K, 0.68x and 2.3x behind 120K."""
    assert slower < least_new_tokens(history, 32) <= faster


def test_a_worker_of_few_heads_needs_more_new_tokens():
    assert least_new_tokens(32768, 4) > 2 * least_new_tokens(32768, 32)


def test_short_histories_are_left_alone():
    assert least_new_tokens(SHORTEST - 1, 32) == 0
    assert least_new_tokens(0, 1) == 0
    assert decision(32, torch.device("cuda"))(100_000) == least_new_tokens(100_000, 32)


@pytest.mark.parametrize("history", [0, 512, SHORTEST, 100_000, 10**6])
@pytest.mark.parametrize("device", ["cpu", "xpu"])
def test_devices_where_nothing_was_measured_faster_are_dense(device, history):
    assert decision(32, torch.device(device))(history) == NEVER > 10**9
