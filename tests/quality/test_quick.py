"""The quick form: the two evaluations on one server, and one table."""

import json
import random

import pytest

from answering import Refusal, answering
from s2o_vllm.benchmarks.quality import quick


def answer(body):
    """A sparse vt answer has half of the strings, a sparse token half a nat less."""
    sparse = body["vllm_xargs"]["s2o_sparsity_budget"] < 1
    if isinstance(body["prompt"], str):
        task, *words = body["prompt"].split()
        return words[0] if sparse and task == "vt" else " ".join(words)
    told = [None]
    for position, token in enumerate(body["prompt"][1:], 1):
        known = -0.5 if position >= 100 or token % 4 else -5.0
        told.append({str(token): {"logprob": known - (0.5 if sparse else 0)}})
    return {"prompt_logprobs": told}


@pytest.fixture
def server(settled):
    with answering(answer) as httpd:
        yield httpd


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    """Run on three tasks of its own and one that it does not ask; the code is numbers."""
    for task in (*quick.TASKS, "fwe"):
        path = tmp_path / "tasks" / "440" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"input": f"{task} a{i} b{i}", "outputs": [f"a{i}", f"b{i}"]} for i in range(3)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = random.Random(0)
    (tmp_path / "code.txt").write_text(" ".join(str(drawn.randrange(9999)) for _ in range(9999)))
    monkeypatch.setattr("s2o_vllm.benchmarks.quality.fidelity.NEAR", 16)
    monkeypatch.setattr("s2o_vllm.benchmarks.quality.fidelity.JUDGED", 40)

    def run(*more):
        words = ["--url", server.url, "--tasks", str(tmp_path / "tasks"), "--context", "440"]
        sizes = ["--samples", "2", "--windows", "3", "--code", str(tmp_path / "code.txt")]
        return quick.main([*words, *sizes, "--budgets", "1.0", "0.1", "0.05", *more])

    return run


def test_one_table_tells_every_budgets_difference_to_dense(run, server, capsys):
    assert run("--setting", "new") == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines}
    assert [cell.strip() for cell in cells["new"]] == [
        "dense",
        "s2o, budget 0.1",
        "s2o, budget 0.05",
    ]
    dense, tenth, twentieth = cells["vt, question at the end"]
    assert dense.strip().startswith("100.0 [")
    assert tenth == twentieth
    assert tenth.strip().startswith("-50.0 [")
    assert cells["niah_multiquery, question at the end"][1].strip().startswith("+0.0 [")
    assert cells["mean, question at the end"][1].strip().startswith("-16.7 [")
    (far,) = [name for name in cells if "all distances" in name]
    assert [cell.strip() for cell in cells[far]] == ["-"] + ["+0.500 [+0.500, +0.500]"] * 2
    assert any("within 128" in name for name in cells)
    prompts = [body["prompt"] for body in server.asked if isinstance(body["prompt"], str)]
    assert len(prompts) == 3 * 2 * 3, "two prompts of three tasks at three budgets"
    assert not [prompt for prompt in prompts if prompt.startswith("fwe")]


def test_answers_are_kept_only_in_a_folder_that_is_named(run, server, tmp_path):
    before = set(tmp_path.rglob("*"))
    assert run() == 0
    assert set(tmp_path.rglob("*")) == before
    assert run("--out", str(tmp_path / "kept")) == 0
    asked = len(server.asked)
    assert run("--out", str(tmp_path / "kept")) == 0
    assert len(server.asked) == asked
    assert {
        row["task"] for row in json.loads((tmp_path / "kept" / "ruler.json").read_text())["rows"]
    }


def test_the_servers_options_reach_both_evaluations(run, server, capsys):
    assert run("--seed", "5", "--model", "small", "--timeout", "30") == 0
    seeds = {body.get("seed") for body in server.asked if isinstance(body["prompt"], str)}
    assert seeds == {5}
    assert run("--model", "other") == 2
    assert (
        "s2o eval quick: --url: --model is 'other', must be one of small" in capsys.readouterr().err
    )


def test_refusals_are_told(run, server, capsys):
    def refuse(body):
        raise Refusal("no room")

    server.reply = refuse
    assert run() == 1
    assert "s2o eval quick: " in (error := capsys.readouterr().err)
    assert "no room" in error
