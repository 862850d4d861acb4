import json
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from s2o_vllm.benchmarks import evidence
from s2o_vllm.benchmarks.quality import ruler
from s2o_vllm.benchmarks.research import in_process
from s2o_vllm.benchmarks.speed import attention, ttft


@pytest.fixture
def tasks(tmp_path):
    """Tasks of two lengths."""
    for context in (32768, 16384):
        folder = tmp_path / "tasks" / str(context)
        folder.mkdir(parents=True)
        line = {"input": "where?", "outputs": ["there"], "index": 0, "context": context}
        (folder / "vt.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path / "tasks"


@pytest.fixture
def ran(monkeypatch):
    """Note the commands, and the server's start and end; those that a test names fail."""
    events, failing = [], set()

    def run(command, **_):
        words = " ".join(command[3:])
        events.append(words)
        return SimpleNamespace(returncode=3 if any(part in words for part in failing) else 0)

    @contextmanager
    def starting(model, port, flags, log):
        events.append(f"server {' '.join(flags)}")
        yield lambda: events.append("ready")
        events.append("end of the server")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(evidence, "starting", starting)
    return SimpleNamespace(events=events, failing=failing)


def options(tmp_path, tasks):
    return [
        str(tmp_path / "out"), "--model", str(tmp_path), "--tasks", str(tasks),
        "--text", str(tmp_path / "essays.txt"), "--budget", "0.02", "--min-budget-tokens", "512",
    ]  # fmt: skip


def test_speed_is_timed_before_a_server_shares_the_card(tmp_path, tasks, ran):
    checkout = ["--tests", str(tmp_path)]
    assert evidence.main(options(tmp_path, tasks) + checkout) == 0
    before, later = ran.events[:3], ran.events[5:-1]
    assert all(" bench " in words for words in before)
    assert ran.events[3].startswith("server ")
    assert "--s2o-sparsity-budget 0.02 --s2o-min-budget-tokens 512" in ran.events[3]
    assert ran.events[4] == "ready"
    assert ran.events[-1] == "end of the server"
    assert sorted(words.split()[0] for words in later) == sorted(
        ["s2o_vllm.cli"] * 2 + [evidence.FAR] * 3 + ["pytest"]
    )
    rulers = [words for words in later if "eval ruler" in words]
    assert [words.split()[-1] for words in rulers] == ["16384", "32768"], "shortest first"


def test_what_failed_alone_runs_again(tmp_path, tasks, ran, capsys):
    ran.failing.update({"bench ttft", "--contexts 32768"})
    assert evidence.main(options(tmp_path, tasks)) == 1
    assert "failed: ttft, " in capsys.readouterr().err
    ran.events.clear()
    ran.failing.clear()
    assert evidence.main(options(tmp_path, tasks)) == 0
    again = [words for words in ran.events if " bench " in words or "eval ruler" in words]
    assert len(again) < 5
    assert "bench ttft" in again[0]
    assert again[-1].endswith("--contexts 32768")


def test_nothing_runs_without_tasks(tmp_path, ran, capsys):
    (tmp_path / "empty").mkdir()
    assert evidence.main(options(tmp_path, tmp_path / "empty")) == 2
    assert ran.events == []
    assert capsys.readouterr().err.startswith("evidence: ")


def test_every_command_is_one_that_its_own_parser_takes(tmp_path, tasks, monkeypatch):
    """A misspelt option would be found after minutes, on a card."""
    args = evidence.build_parser().parse_args(options(tmp_path, tasks))
    parsed = []
    monkeypatch.setattr(ttft, "run_and_report", lambda name, known, run: parsed.append(known) or 0)
    for step in evidence.alone(args):
        words = step.words[3:]
        if step.name == "ttft":
            assert ttft.main(words) == 0
        else:
            known = attention.build_parser().parse_args(words)
            attention.settle_inputs(attention.build_parser(), known)
            parsed.append(known)
    for step in evidence.asked(args):
        parsed.append(ruler.build_parser().parse_args(step.words[3:]))
    for stream in evidence.concurrent(args):
        for step in stream:
            parsed.append(in_process.build_parser().parse_args(step.words[1:]))
    assert len(parsed) == 3 + 2 + 3
    assert all(0.02 in known.budgets for known in parsed)
    timed = [known for known in parsed if hasattr(known, "min_budget_tokens")]
    assert all(known.min_budget_tokens == 512 for known in timed)
    assert len({str(known.out) for known in parsed}) == 3 + 1 + 3, "no two write one file"
