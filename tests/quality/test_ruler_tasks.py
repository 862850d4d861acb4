import json
import lzma

import pytest

from s2o_vllm.benchmarks.quality.ruler_tasks import TASKS, draw, read_tasks, score
from s2o_vllm.benchmarks.quality.samples import EvalError


def line(**changes):
    return {"input": "Where?", "outputs": ["here"]} | changes


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))


@pytest.mark.parametrize(
    ("answer", "outputs", "metric", "wanted"),
    [
        ("They are 12 and 34.", ["12", "34"], "all", 1.0),
        ("They are 12.", ["12", "34", "56", "78"], "all", 0.25),
        ("nothing", ["12"], "all", 0.0),
        ("PARIS, of course", ["Paris"], "all", 1.0),
        ("in paris", ["London", "Paris"], "part", 1.0),
        ("in paris", ["London", "Paris"], "all", 0.5),
        ("in Rome", ["London", "Paris"], "part", 0.0),
        ("", ["x"], "part", 0.0),
    ],
)
def test_an_answer_scores_by_the_strings_it_holds(answer, outputs, metric, wanted):
    assert score(answer, outputs, metric) == wanted


def test_there_are_rulers_thirteen_tasks():
    assert len(TASKS) == 13
    assert {task for task, how in TASKS.items() if how.metric == "part"} == {"qa_1", "qa_2"}


def test_a_files_name_and_folder_say_what_its_lines_do_not(tmp_path):
    write(tmp_path / "4096" / "vt.jsonl", line(), line())
    write(tmp_path / "8192" / "qa_1" / "validation.jsonl", line(index=7, length=8000))
    packed = json.dumps(line(task="vt", context=16, max_new_tokens=5, metric="part", index=0,
                             add_special_tokens=False))  # fmt: skip
    (tmp_path / "more.jsonl.xz").write_bytes(lzma.compress(packed.encode()))
    found = read_tasks(tmp_path)
    assert [(one.context, one.task, one.index) for one in found] == [
        (16, "vt", 0), (4096, "vt", 0), (4096, "vt", 1), (8192, "qa_1", 7)
    ]  # fmt: skip
    assert [(one.max_new_tokens, one.metric) for one in found[::3]] == [(5, "part"), (32, "part")]
    assert (found[1].max_new_tokens, found[1].metric) == (30, "all")
    assert [one.add_special_tokens for one in found[:2]] == [False, True]
    assert found[3].length == 8000
    assert [one.task for one in read_tasks(tmp_path, ["qa_1"])] == ["qa_1"]


def test_without_a_numbered_folder_the_longest_sample_is_the_context(tmp_path):
    write(tmp_path / "cwe.jsonl", line(length=90), line(length=100))
    assert [one.context for one in read_tasks(tmp_path)] == [100, 100]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("not json", "line 1: not a JSON object"),
        ("[1]", "line 1: not a JSON object"),
        (json.dumps({"outputs": ["x"]}), "line 1: 'input' must be a prompt"),
        (json.dumps(line(outputs=[])), "line 1: 'outputs' must be a list of strings"),
        (json.dumps(line(outputs=[3])), "line 1: 'outputs' must be a list of strings"),
        (json.dumps(line(metric="most")), "'metric' of task 'vt' is 'most', must be all or part"),
        (json.dumps(line(task="new")), "'metric' of task 'new' is None, must be all or part"),
        (json.dumps(line(max_new_tokens=0)), "'max_new_tokens' is 0, must be a whole number"),
        (json.dumps(line(question="middle")), "'question' is 'middle', must be end or start"),
        (json.dumps(line(seed="a")), "'seed' is 'a', must be a whole number"),
        (json.dumps(line(index="a")), "'index' is 'a', must be a whole number"),
        (json.dumps(line(index=0)) + "\n" + json.dumps(line(index=0)), "two samples 0 of vt at 64"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, text, sentence):
    path = tmp_path / "64" / "vt.jsonl"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(EvalError) as refusal:
        read_tasks(tmp_path)
    assert sentence in str(refusal.value)


def test_one_number_may_stand_for_prompts_of_two_seeds_and_of_two_questions(tmp_path):
    for place, fields in (("a", {"seed": 1}), ("b", {"seed": 2}), ("c", {"question": "start"})):
        write(tmp_path / "64" / place / "vt.jsonl", line(index=0, **fields))
    found = read_tasks(tmp_path)
    assert [(one.seed, one.question) for one in found] == [(1, "end"), (2, "end"), (None, "start")]
    assert len(draw(found, 1, seed=0)) == 2, "one of each question"
    assert read_tasks(tmp_path, None, [64]) == found


def test_a_folder_without_tasks_is_named(tmp_path):
    with pytest.raises(EvalError, match="must be a folder"):
        read_tasks(tmp_path / "none")
    with pytest.raises(EvalError, match=r"holds no \.jsonl file"):
        read_tasks(tmp_path)
    write(tmp_path / "64" / "vt.jsonl", line())
    with pytest.raises(EvalError, match=r"there is no task 'fwe' in .*; there are vt"):
        read_tasks(tmp_path, ["fwe"])


def test_a_seed_draws_the_same_samples_again(tmp_path):
    write(tmp_path / "64" / "vt.jsonl", *[line()] * 50)
    write(tmp_path / "64" / "cwe.jsonl", *[line()] * 2)
    samples = read_tasks(tmp_path)
    some = draw(samples, 5, seed=1)
    assert [one.task for one in some] == ["vt"] * 5 + ["cwe"] * 2
    assert some == draw(samples, 5, seed=1)
    assert some != draw(samples, 5, seed=2)
    assert draw(samples, None, seed=1) == samples
