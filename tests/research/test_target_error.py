from itertools import pairwise

from s2o_vllm.benchmarks.quality.methods import parse
from s2o_vllm.benchmarks.research.target_error import judge


def test_a_lower_target_visits_more_and_leaves_out_less(make_segment):
    rows = judge(make_segment(history=600, length=64), parse("served"), [0.5, 0.05, 1e-6])
    assert [row["target_error"] for row in rows] == [0.5, 0.05, 1e-6]
    for more, less in pairwise(rows):
        assert more["density"] < less["density"]
        assert more["dropped_mass"] > less["dropped_mass"]
    assert rows[-1]["density"] > 0.99
