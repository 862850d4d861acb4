import pytest

from s2o_vllm.benchmarks.speed import serve
from s2o_vllm.benchmarks.speed.mix import Outcome, Request

GOOD = {
    "requests": 9, "failed": 0, "left_running": 0,
    "kernels": {"ready": 5, "end": 5, "after_ready": []}, "jit_warnings": [],
}  # fmt: skip


def answered(number, length, ttft, **options):
    return Request(number, length, 0.1, **options), Outcome(ttft, [0.01, 0.03], 3)


def test_rows_are_by_context_and_by_shared_prefix():
    rows = serve.rows_of([
        answered(0, 1024, 0.1), answered(1, 2047, 0.3), answered(2, 2048, 0.5),
        answered(3, 1500, 0.05, prefix_of=0, shared=100),
        answered(4, 1500, 9.0, give_up=2),
        (Request(5, 1500, 0.1), Outcome(9.0, [], 1, "failed")),
    ])  # fmt: skip
    keys = [
        (row["context_from"], row["context_to"], row["prefix_hit"], row["requests"]) for row in rows
    ]
    assert keys == [(1024, 2048, False, 2), (1024, 2048, True, 1), (2048, 4096, False, 1)]
    assert rows[0]["ttft_p50_ms"] == 200
    assert rows[0]["itl_p50_ms"] == 20
    assert rows[0]["ttft_p99_ms"] == pytest.approx(298)


def test_counts_tell_answered_aborted_and_failed():
    results = [
        answered(0, 1000, 0.1),
        answered(1, 3000, 0.1, prefix_of=0, shared=700),
        answered(2, 500, 0.1, give_up=2),
        (Request(3, 500, 0.1, give_up=0), Outcome(error="refused")),
    ]
    counts = serve.counts(results, wall=2.0)
    assert [counts[key] for key in ("requests", "answered", "aborted", "failed")] == [4, 2, 1, 1]
    assert (counts["prompt_tok_s"], counts["output_tok_s"]) == (2000, 4.5)
    assert (counts["prefix_hits"], counts["shared_tokens"]) == (1, 700)


def test_a_kernel_that_was_compiled_late_is_named(tmp_path):
    target = serve.Target("", [], tmp_path)
    assert serve.compiled(target.kernels(), target.kernels()) is None, "nothing ran on Triton"
    for folder, kernel in (("a", "attend_kernel"), ("b", "attend_kernel")):
        ready = target.kernels()
        (tmp_path / folder).mkdir()
        for name in (f"{kernel}.json", f"__grp__{kernel}.json", f"{kernel}.cubin"):
            (tmp_path / folder / name).write_text("{}")
    assert serve.compiled(ready, target.kernels()) == {
        "ready": 1, "end": 2, "after_ready": ["attend_kernel"],
    }  # fmt: skip
    assert serve.compiled(target.kernels(), target.kernels())["after_ready"] == []


def test_vllms_own_monitor_is_read(tmp_path):
    log = tmp_path / "log"
    target = serve.Target("", [], tmp_path, log)
    late = (
        "WARNING [jit_monitor.py:145] Triton kernel JIT compilation during inference: "
        "score_kernel. This causes a latency spike; consider extending warmup."
    )
    log.write_text(late)
    assert target.jit_warnings() is None, "it was not at work"
    log.write_text(f"INFO {serve.MONITOR}; monitored JIT compilations during inference will use …")
    assert target.jit_warnings() == []
    log.write_text(f"INFO {serve.MONITOR}; …\n{late}\n")
    (warning,) = target.jit_warnings()
    assert "JIT compilation: score_kernel" in warning


@pytest.mark.parametrize(("visible", "used"), [(None, 730), ("1", 700), ("0,1", 730)])
def test_memory_is_of_the_gpus_that_the_server_sees(visible, used, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=1) ;; *) echo 30 ;; esac\necho 700\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert serve.gpu_memory_mib() == used
    tool.unlink()
    assert serve.gpu_memory_mib() is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"kernels": None, "jit_warnings": None}, []),
        ({"failed": 2}, ["2 of 9 requests failed"]),
        ({"left_running": 1}, ["the server still holds 1 requests"]),
        (
            {"kernels": {"after_ready": ["a"]}, "jit_warnings": ["b"]},
            ["compiled after the server was ready: a, b"],
        ),
    ],
)
def test_what_must_not_happen(change, said):
    assert serve.problems(GOOD | change) == said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nowhere"], "there is no model at nowhere"),
        (["--concurrency", "0"], "--concurrency is 0, must be at least 1"),
        (["--hits", "0.5", "--aborts", "0.5"], "must be shares of less than 1 together"),
    ],
)
def test_arguments_that_cannot_work(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        serve.main(words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
