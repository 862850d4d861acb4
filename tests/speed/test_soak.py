import pytest

from s2o_vllm.benchmarks.speed import soak
from s2o_vllm.benchmarks.speed.mix import Outcome, Request

CALM = {"requests": 9, "failed": 0, "left_running": 0, "growth": None}


def rounds(memory, handles=None):
    """Rows of a soak, the warm rounds before them."""
    handles = handles or [50] * len(memory)
    rows = [
        {"memory_mib": one, "handles": other} for one, other in zip(memory, handles, strict=True)
    ]
    return [{"memory_mib": 1, "handles": 900}] * soak.WARM + rows


def found(memory, handles=None):
    return soak.problems(CALM | {"growth": soak.growth(rounds(memory, handles))})


def test_noise_is_no_growth():
    assert found([500, 504, 498, 502, 505, 497]) == []
    assert found([500, 540, 510, 505, 545, 512]) == []
    assert found([500.0] * 6, [50, 51, 50, 52, 50, 53]) == []


def test_what_was_warm_before_counts_for_nothing():
    assert soak.growth(rounds([500] * 6))["memory_mib"] == 0


def test_steady_growth_is_named():
    assert found([500, 510, 520, 530, 540, 550]) == ["memory grew by 40 MiB"]
    assert found([500] * 6, [50, 52, 54, 56, 58, 60]) == ["open handles grew by 8"]


@pytest.mark.parametrize("memory", [[], [500], [500, 501]])
def test_few_rounds_tell_no_growth(memory):
    assert soak.growth(rounds(memory)) is None


def test_a_server_elsewhere_is_not_seen():
    assert soak.growth([soak.NOTHING_SEEN] * 9) is None


def test_failures_and_what_is_left_are_named():
    assert len(soak.problems(CALM | {"failed": 1, "left_running": 2})) == 2


def test_latencies_are_of_clients_that_stay():
    row = soak.latencies([
        (Request(0, 500, 0.1), Outcome(0.2, [0.01, 0.03], 3)),
        (Request(1, 500, 0.1, give_up=2), Outcome(9.0, [9.0], 2)),
        (Request(2, 500, 0.1), Outcome(error="refused")),
    ])  # fmt: skip
    assert row["ttft_p50_ms"] == 200
    assert row["itl_p50_ms"] == 20


def test_children_are_counted():
    import subprocess
    import sys

    code = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()  # it has memory now
        held = soak.held_by_children()
        child.communicate(b"\n")
    assert held["processes"] >= 1
    assert held["memory_mib"] > 0
    assert held["handles"] >= 1
