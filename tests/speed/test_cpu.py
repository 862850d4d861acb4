import json
from pathlib import Path

import pytest
import torch

from s2o_vllm.benchmarks.speed import cpu
from s2o_vllm.cost import NEVER, decision

ROOT = Path(__file__).parents[2]
WORTH_IT = 1.25  # how many times faster sparse prefill must be measured to be a default
ROW = {
    "shape": "smollm2-135m", "history": 14336, "new_tokens": 2048, "budget": 0.1, "dense_s": 0.9,
    "sparse_s": 1.2,
}  # fmt: skip


def test_a_line_tells_both_times_and_their_ratio():
    assert cpu.summary(ROW).endswith("budget 0.1: 1.200 s, dense 0.900 (0.75x)")


def test_the_shortest_of_a_call_counts(monkeypatch):
    now = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0, 30.0, 33.0, 40.0, 44.0, 50.0, 51.5])
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: next(now))
    called = []
    assert cpu.seconds(lambda: called.append(1), lambda: called.append(2)) == [2.0, 1.0]
    assert called == [1, 2] * cpu.REPEATS


def test_a_wrong_operator_gets_no_time(monkeypatch):
    pytest.importorskip("vllm._custom_ops")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's CPU build")
    assert cpu.check((4, 2, 64), "low_rank") < cpu.GATE_ERROR
    row = cpu.PrefillRow
    monkeypatch.setattr(cpu, "PrefillRow", lambda *given: row(*given[:4], 0.05))
    with pytest.raises(SystemExit, match="differs from vLLM's attention"):
        cpu.check((4, 2, 64), "low_rank")


def test_the_decision_is_that_of_the_measured_times():
    rows = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["rows"]
    assert {row["history"] + row["new_tokens"] for row in rows} >= {4096, 32768}
    assert decision(9, torch.device("cpu"))(30720) == NEVER
    assert [row for row in rows if row["dense_s"] > WORTH_IT * row["sparse_s"]] == []
