import math
import random

import pytest

from s2o_vllm.benchmarks.quality.intervals import (
    Interval,
    mean_clustered,
    mean_difference,
    mean_of,
    mean_share,
    mean_student,
)


def test_a_share_has_wilsons_interval():
    # Wilson's 95 % interval of 8 in 10, as in textbooks.
    assert mean_share([1.0] * 8 + [0.0] * 2) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_samples_that_agree_still_leave_doubt():
    assert mean_share([1.0] * 20) == pytest.approx((1.0, 0.8389, 1.0), abs=1e-4)
    difference = mean_difference([0.5] * 20, [0.5] * 20)
    assert difference.value == 0
    assert difference.low == pytest.approx(-0.1611, abs=1e-4)
    assert difference.high == pytest.approx(0.1611, abs=1e-4)


def test_a_difference_is_taken_pair_by_pair():
    old, new = [1.0, 0.0] * 20, [1.0, 0.0] * 19 + [0.0, 0.0]
    paired = mean_difference(new, old)
    assert paired.value == pytest.approx(-1 / 40)
    # Unpaired, shares of one half over 40 samples would be uncertain by 0.2 and more.
    assert paired.low > -0.16
    assert paired.high < 0.1
    with pytest.raises(ValueError, match="argument 2"):
        mean_difference([1.0], [1.0, 0.0])


def test_the_interval_of_a_difference_covers_what_it_should():
    generator, kinds, covered, rounds = random.Random(3), [(1, 1), (1, 0), (0, 1), (0, 0)], 0, 2000
    truth = 0.1 - 0.2  # the weights of gained less lost
    for _ in range(rounds):
        pairs = generator.choices(kinds, weights=(0.4, 0.1, 0.2, 0.3), k=40)
        new, old = zip(*[(float(a), float(b)) for a, b in pairs], strict=True)
        interval = mean_difference(new, old)
        covered += interval.low <= truth <= interval.high
    assert 0.93 < covered / rounds < 0.99


def test_a_mean_over_tasks_is_surer_than_its_tasks():
    mean = mean_of([Interval(0.5, 0.3, 0.6)] * 4)
    assert mean == pytest.approx((0.5, 0.4, 0.55))
    assert mean_of([Interval(0.2, 0.1, 0.3), Interval(0.6, 0.6, 0.6)]) == pytest.approx(
        (0.4, 0.35, 0.45)
    )


def test_few_numbers_have_students_interval():
    assert mean_student([1, 2, 3, 4]) == pytest.approx((2.5, 0.4460, 4.5540), abs=1e-3)
    one = mean_student([7.0])
    assert one.value == 7
    assert math.isnan(one.low)
    many = mean_student([0.0, 1.0] * 500)
    assert many.high - many.value == pytest.approx(2.042 * math.sqrt(0.25 * 1000 / 999 / 1000))


@pytest.mark.parametrize("make", [mean_share, mean_of, mean_student, mean_clustered])
def test_nothing_has_no_mean(make):
    with pytest.raises(ValueError, match="there"):
        make([])


def test_clusters_are_the_samples_of_a_clustered_mean():
    equal = mean_clustered([[1.0, 3.0], [5.0, 7.0], [2.0, 0.0]])
    assert equal == pytest.approx(mean_student([2.0, 6.0, 1.0]))
    # Copies of a token add nothing that is known about other windows.
    few = mean_clustered([[1.0], [2.0], [6.0]])
    assert mean_clustered([[1.0] * 9, [2.0] * 9, [6.0] * 9, []]) == pytest.approx(few)
    unequal = mean_clustered([[1.0, 1.0, 1.0], [5.0]])
    assert unequal.value == 2.0
    # sqrt(2 / 1 * (3^2 + 3^2)) / 4, one degree of freedom
    assert unequal.high - unequal.value == pytest.approx(12.706 * 1.5)
    assert math.isnan(mean_clustered([[1.0, 2.0]]).low)
