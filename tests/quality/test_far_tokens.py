"""Which tokens are far, and what is lost on them."""

import pytest

from s2o_vllm.benchmarks.quality.far_tokens import (
    ALL,
    DENSE_END,
    blocks,
    bounded,
    find,
    losses,
    reaches,
)


def test_contexts_double_from_four_times_the_near_one_up_to_half_the_whole():
    assert reaches(2048, 131072) == [2048, 8192, 16384, 32768, 65536]
    assert reaches(2048, 32768) == [2048, 8192, 16384]
    assert reaches(2048, 8192) == [2048]


def test_blocks_cover_the_judged_tokens_once_and_end_before_the_dense_end():
    found = list(blocks(context=1000, judged=50, reach=64))
    judged = [position for _, first, last in found for position in range(first, last)]
    assert judged == list(range(1000 - DENSE_END - 50, 1000 - DENSE_END))
    assert all(first - start == 64 for start, first, _ in found)
    assert max(last - first for _, first, last in found) == 16


@pytest.mark.parametrize(
    ("whole", "near", "middle", "wanted"),
    [
        (-0.5, -2.6, -0.6, [32]),  # 2.1 nats more than near, restored by the middle
        (-0.5, -2.4, -0.6, []),  # 1.9 nats: not far
        (-2.1, -9.0, -2.1, []),  # far context helps, but the token stays unlikely
        (-1.9, -9.0, -3.8, [32]),  # restored to within 2 nats
        (-1.9, -9.0, -4.0, [128]),  # only the whole context restores it
    ],
)
def test_a_token_is_far_by_the_rule_of_longppl(whole, near, middle, wanted):
    found = find([whole], {8: [near], 32: [middle]}, 128)
    assert [far.distance for far in found] == wanted


def test_losses_are_means_over_tokens_with_windows_as_samples():
    far, near = [-0.5, -0.5, -0.5], [-0.5, -5.0, -5.0]
    dense = {
        "a": {8: near, 32: [-0.5, -0.5, -5.0], 128: far},
        "b": {8: near, 32: [-0.5, -5.0, -5.0], 128: far},
        "c": {8: near, 128: far},  # an answer is missing
    }
    sparse = {"a": [-9.0, -0.7, -1.5], "b": [-0.5, -1.0, -1.0], "c": far, "d": far}
    found = {loss.distance: loss for loss in losses(sparse, dense, 128)}
    assert list(found) == [ALL, 32, 128]
    assert found[ALL].mean.value == pytest.approx((0.2 + 1.0 + 0.5 + 0.5) / 4)
    assert (found[ALL].tokens, found[ALL].windows) == (4, 2)
    assert found[32].mean.value == pytest.approx(0.2)
    assert found[32].mean.low != found[32].mean.low, "nan: one window has no bounds"
    assert found[128].mean.value == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    assert found[128].tokens == 3


def test_without_dense_answers_nothing_is_lost():
    assert losses({"a": [-1.0]}, {}, 128) == []


def test_windows_without_a_far_token_are_told():
    (loss,) = losses({"a": [-1.0]}, {"a": {8: [-0.5], 128: [-0.5]}}, 128)
    assert (loss.distance, loss.tokens, loss.windows) == (ALL, 0, 1)
    assert bounded(loss.mean) == {"value": None, "low": None, "high": None}
