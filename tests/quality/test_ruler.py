import json
import subprocess
import sys
from pathlib import Path

import pytest

from answering import Refusal, answering
from s2o_vllm.benchmarks.quality import ruler
from s2o_vllm.benchmarks.quality.samples import Samples

pytestmark = pytest.mark.usefixtures("settled")

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


def right_when_dense(body):
    """The prompt names its answer; a sparse question of vt gets half of it."""
    words = body["prompt"].split()
    if body["vllm_xargs"]["s2o_sparsity_budget"] < 1 and words[0] == "vt":
        return words[1]
    return "They are: " + " ".join(words[1:])


@pytest.fixture
def server():
    with answering(right_when_dense) as httpd:
        yield httpd


@pytest.fixture
def tasks(tmp_path):
    """Two tasks of two samples at 256 tokens."""
    folder = tmp_path / "tasks"
    for task in ("vt", "qa_1"):
        path = folder / "256" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = [
            {"input": f"{task} one{i} two{i}", "outputs": [f"ONE{i}", f"TWO{i}"], "length": 200,
             "add_special_tokens": False} for i in range(2)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


@pytest.fixture
def run(server, tasks, tmp_path):
    def run(*more, url=None):
        out = tmp_path / "ruler.json"
        words = ["--url", url or server.url, "--tasks", str(tasks), "--out", str(out)]
        code = ruler.main([*words, *more])
        return code, json.loads(out.read_text()) if out.exists() else None

    return run


def test_every_sample_is_scored_at_every_budget(run, server, capsys):
    code, result = run()
    assert code == 0
    assert {"device", "torch", "triton", "vllm", "commit", "date"} < set(result)
    rows = {(row["task"], row["budget"]): row for row in result["rows"]}
    assert {key: row["score"] for key, row in rows.items()} == {
        ("vt", 1.0): 100, ("qa_1", 1.0): 100, ("mean", 1.0): 100,
        ("vt", 0.1): 50, ("qa_1", 0.1): 100, ("mean", 0.1): 75,
    }  # fmt: skip
    assert rows["vt", 0.1]["difference"] == -50
    assert rows["vt", 0.1]["difference_low"] < -50 < rows["vt", 0.1]["difference_high"]
    assert rows["mean", 0.1]["difference"] == -25
    assert rows["mean", 0.1] | {"tasks": 2, "samples": 4, "paired": 4} == rows["mean", 0.1]
    assert rows["mean", 1.0]["difference"] is None
    assert {row["model"] for row in result["rows"]} == {"small"}
    assert {row["context"] for row in result["rows"]} == {256}
    assert {row["backend"] for row in result["rows"]} == {"s2o"}
    assert rows["vt", 0.1]["density"] == 0.1  # 10 of 100 tokens a question, see the stand-in
    assert rows["vt", 1.0]["density"] is None
    assert len(server.asked) == 8
    assert all(
        body["temperature"] == 0 and body["add_special_tokens"] is False for body in server.asked
    )
    assert {body["max_tokens"] for body in server.asked} == {30, 32}
    assert "| **mean** | 100.0 [" in capsys.readouterr().out


def test_what_was_answered_is_not_asked_again(run, server, tmp_path):
    assert run("--budgets", "1.0")[0] == 0
    assert len(server.asked) == 4
    code, result = run()
    assert code == 0
    assert len(server.asked) == 8
    assert [body["vllm_xargs"]["s2o_sparsity_budget"] for body in server.asked[4:]] == [0.1] * 4
    assert len(result["rows"]) == 6
    raw = tmp_path / "ruler_samples.jsonl"
    whole = raw.read_text()
    raw.write_text(whole[:-20])  # as an interruption leaves it: the counters are lost
    assert run()[1]["rows"][0]["density"] == result["rows"][0]["density"]
    assert len(server.asked) == 8
    lines = raw.read_text().splitlines()
    raw.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30])  # now an answer
    assert run()[0] == 0
    assert len(server.asked) == 9


def test_a_refusal_is_counted_told_and_asked_again(run, server, capsys):
    def refuse_one(body):
        if body["prompt"].startswith("vt one1"):
            raise Refusal("the prompt is too long")
        return right_when_dense(body)

    server.reply = refuse_one
    code, result = run()
    assert code == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 8 questions were refused, 2 of them with: HTTP 400" in told
    assert "the prompt is too long" in told
    rows = {(row["task"], row["budget"]): row for row in result["rows"]}
    assert [rows["vt", 0.1][key] for key in ("samples", "failed", "paired")] == [1, 1, 1]
    assert rows["mean", 1.0]["failed"] == 1
    server.reply = right_when_dense
    before = len(server.asked)
    code, result = run()
    assert code == 0
    assert len(server.asked) == before + 2
    assert {row["failed"] for row in result["rows"]} == {0}


def test_a_task_without_an_answer_leaves_no_mean(run, server):
    def refuse_a_task(body):
        if body["prompt"].startswith("vt"):
            raise Refusal("no")
        return right_when_dense(body)

    server.reply = refuse_a_task
    rows = {(row["task"], row["budget"]): row for row in run()[1]["rows"]}
    assert rows["vt", 0.1]["score"] is None
    assert rows["mean", 0.1]["score"] is None
    assert rows["qa_1", 0.1]["score"] == 100


def test_a_server_that_goes_away_ends_the_run_and_keeps_the_answers(run, server, capsys):
    def last_breath(body):
        if body["prompt"].startswith("qa_1"):
            raise Refusal
        return right_when_dense(body)

    server.reply = last_breath
    code, result = run("--budgets", "1.0", "--concurrency", "1")
    assert code == 2
    assert "no longer answers" in capsys.readouterr().err
    assert [row["task"] for row in result["rows"]] == ["vt", "mean"]


def test_a_stock_server_is_measured_as_such_but_not_with_a_budget(run, server, capsys):
    server.sparse = False
    code, _ = run()
    assert code == 2
    assert "ignores budget 0.1, must be a server that was started with" in capsys.readouterr().err
    assert server.asked == []
    code, result = run("--budgets", "1.0")
    assert code == 0
    assert {row["backend"] for row in result["rows"]} == {"stock"}


def test_a_budget_that_the_server_forbids_is_told_before_anything_is_asked(run, server, capsys):
    server.largest = 0.5
    assert run() == (2, None)
    assert "refuses budget 1 (HTTP 400): s2o: s2o_sparsity_budget is 1.0" in capsys.readouterr().err
    assert server.asked == []


def test_samples_longer_than_the_server_takes_are_refused(run, tasks, capsys):
    path = tasks / "256" / "vt.jsonl"
    path.write_text(path.read_text().replace("200", "513"))
    assert run() == (2, None)
    assert "is 513 tokens with its answer, must be at most the server's 512" in (
        capsys.readouterr().err
    )


def test_answers_to_other_prompts_are_not_mixed_in(run, tasks, capsys):
    assert run()[0] == 0
    path = tasks / "256" / "vt.jsonl"
    path.write_text(path.read_text().replace("vt one0", "vt one9"))
    assert run()[0] == 2
    assert "holds answers to another prompt 0 of vt at 256" in capsys.readouterr().err


def reseeded(tasks, seed, question="end", name="vt"):
    """Replace a task's file by prompts of a seed."""
    path = tasks / "256" / f"{name}.jsonl"
    lines = [
        {"input": f"{name} s{seed}n{i} {question}", "outputs": [f"s{seed}n{i}", question],
         "length": 200, "seed": seed, "question": question} for i in range(2)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_prompts_of_another_seed_are_added_to_the_same_file(run, server, tasks, tmp_path, capsys):
    for seed in (1, 2):
        reseeded(tasks, seed)
        assert run("--only", "vt")[0] == 0
    rows = {(row["task"], row["budget"]): row for row in run("--only", "vt")[1]["rows"]}
    assert len(server.asked) == 8
    assert rows["vt", 0.1]["samples"] == rows["vt", 0.1]["paired"] == 4
    lines = (tmp_path / "ruler_samples.jsonl").read_text().splitlines()[1:]
    asked = [json.loads(line) for line in lines if "counters" not in line]
    assert {(row["seed"], row["index"]) for row in asked} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    reseeded(tasks, 2)
    path = tasks / "256" / "vt.jsonl"
    path.write_text(path.read_text().replace("vt s2n0", "vt once more s2n0"))
    assert run("--only", "vt")[0] == 2, "the same seed and number, another prompt"
    assert "holds answers to another prompt 0 of vt at 256" in capsys.readouterr().err


def test_where_the_question_stands_and_the_setting_are_told_apart(run, server, tasks, capsys):
    reseeded(tasks, 1, "start")
    code, result = run("--setting", "lists of 2,048")
    assert code == 0
    keys = [(r["task"], r["question"], r["setting"]) for r in result["rows"] if r["budget"] == 1]
    setting = "lists of 2,048"
    assert keys == [
        ("qa_1", "end", setting), ("mean", "end", setting),
        ("vt", "start", setting), ("mean", "start", setting),
    ]  # fmt: skip
    assert {row["density"] for row in result["rows"] if row["budget"] < 1} == {0.1}
    table = capsys.readouterr().out
    assert "small, 256 tokens, question before the text, lists of 2,048. dense: 2 answers" in table
    assert "small, 256 tokens, lists of 2,048. dense: 2 answers over 1 tasks" in table
    before = len(server.asked)
    assert run()[0] == 0
    assert len(server.asked) == before + 8, "another setting is asked anew"


def test_a_setting_without_dense_answers_is_compared_with_the_empty_setting(run):
    assert run("--budgets", "1.0")[0] == 0
    rows = run("--budgets", "0.1", "--setting", "x")[1]["rows"]
    own = {row["task"]: row for row in rows if row["setting"] == "x"}
    assert {row["budget"] for row in own.values()} == {0.1}
    assert own["vt"]["difference"] == -50


def test_some_lengths_of_a_folder_can_be_asked(run, server, tasks, capsys):
    other = tasks / "512" / "vt.jsonl"
    other.parent.mkdir()
    other.write_text((tasks / "256" / "vt.jsonl").read_text())
    assert {row["context"] for row in run("--contexts", "512")[1]["rows"]} == {512}
    assert len(server.asked) == 4
    assert run("--contexts", "64")[0] == 2
    assert "there is nothing at 64 tokens" in capsys.readouterr().err


def test_files_from_before_question_and_setting_are_read(run, server, tmp_path):
    assert run()[0] == 0
    raw = tmp_path / "ruler_samples.jsonl"
    lines = [json.loads(line) for line in raw.read_text().splitlines()]
    for line in lines:
        for name in ("question", "setting", "seed"):
            line.pop(name, None)
    raw.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before, (_, result) = len(server.asked), run()
    assert len(server.asked) == before
    assert {(row["question"], row["setting"]) for row in result["rows"]} == {("end", "")}
    assert result["rows"][-1]["density"] == 0.1


def test_the_committed_results_are_read():
    results = Path(ruler.__file__).resolve().parents[1] / "results"
    head = json.loads((results / "ruler_samples.jsonl").open().readline())["header"]
    samples = Samples(results / "ruler_samples.jsonl", head, ruler.KEY, ruler.OLDER)
    now = {(r["context"], r["task"], r["budget"]): r for r in ruler.summarise(samples)}
    for row in json.loads((results / "ruler.json").read_text())["rows"]:
        assert row.items() <= now[row["context"], row["task"], row["budget"]].items()


def test_answers_of_other_code_are_not_mixed_in(run, monkeypatch, capsys):
    assert run()[0] == 0
    monkeypatch.setenv("S2O_COMMIT", "def")
    assert run()[0] == 2
    assert "was measured with commit 'abc' and this is 'def'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "no json", '{"header": {}}\n[]', '{"header": 3}'])
def test_a_file_that_holds_no_samples_is_not_overwritten(run, tmp_path, text, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(text + "\n")
    assert run("--samples-file", str(other)) == (2, None)
    assert str(other) in capsys.readouterr().err
    assert other.read_text() == text + "\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--url", "localhost:8000"], "--url is 'localhost:8000', must be like http://"),
        (["--url", NOBODY], f"no server answers at {NOBODY}"),
        (["--model", "other"], "--model is 'other', must be one of small"),
        (["--only", "fwe"], "there is no task 'fwe'"),
        (["--tasks", "nowhere"], "--tasks is nowhere, must be a folder"),
    ],
)
def test_what_cannot_work_is_one_sentence(run, capsys, words, sentence):
    assert run(*words) == (2, None)
    error = capsys.readouterr().err.strip()
    assert error.startswith("s2o eval ruler: ")
    assert sentence in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("option", "value"), [("--budgets", "0"), ("--budgets", "1.5"), ("--budgets", "x"),
                          ("--concurrency", "0"), ("--samples", "some")],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(run, capsys, option, value):
    with pytest.raises(SystemExit) as exit_:
        run(option, value)
    assert exit_.value.code == 2
    assert f"argument {option}: is {value!r}, must be" in capsys.readouterr().err


def test_it_is_part_of_the_installed_command(tmp_path):
    command = [sys.executable, "-m", "s2o_vllm.cli", "eval", "ruler", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: s2o eval ruler")
