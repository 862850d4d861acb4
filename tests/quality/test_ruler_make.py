"""Making tasks, with a stand-in for RULER's generator and a tokenizer of words."""

import json
import sys
from types import SimpleNamespace

import pytest

from s2o_vllm.benchmarks.quality import ruler_make
from s2o_vllm.benchmarks.quality.ruler_questions import question_first
from s2o_vllm.benchmarks.quality.ruler_tasks import TASKS, read_tasks
from s2o_vllm.benchmarks.quality.samples import EvalError

SCRIPT = """\
import json, pathlib, sys
from nltk.tokenize import sent_tokenize
from constants import TASKS
from long_context_eval.there import HERE
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
kind = TASKS["niah"]
if given["template"] != kind["template"] + kind["answer_prefix"]:
    sys.exit("a template that is not the table's")
if given["random_seed"] == "13":
    sys.exit("an unlucky number")
path = pathlib.Path(given["save_dir"], given["save_name"], given["subset"] + ".jsonl")
path.parent.mkdir(parents=True)
room = int(given["max_seq_length"]) - int(given["tokens_to_generate"]) + int(given.get("extra", 0))
with path.open("w") as file:
    for index in range(int(given["num_samples"])):
        prompt = given["template"].format(context="CONTEXT", query="Q", kind=given["kind"])
        words = "x " * (room - len(prompt.split()) + 1)
        prompt = prompt.replace("CONTEXT", words.strip())
        print(json.dumps({"index": index, "input": prompt, "outputs": sent_tokenize("A. B!")}),
              file=file)
"""


class Words:
    """A token is a word; the chat template adds two."""

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=["<s>"] * add_special_tokens + text.split())

    def apply_chat_template(self, turn, tokenize, add_generation_prompt):
        assert (len(turn), tokenize, add_generation_prompt) == (1, False, True)
        return f"<user> {turn[0]['content']} <model>"


@pytest.fixture
def generator(tmp_path, monkeypatch):
    package = tmp_path / "generator" / "long_context_eval"
    scripts = package / "data" / "synthetic"
    scripts.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "there.py").write_text("HERE = True\n")
    kinds = {"niah": {"tokens_to_generate": 4, "template": "Find this.\n{context}\nAsk {query}",
                      "answer_prefix": " The answer {kind} for {query} is"}}  # fmt: skip
    (scripts / "constants.py").write_text(f"TASKS = {kinds!r}\n")
    tasks = {task: {"task": "niah", "args": {"kind": task}} for task in TASKS}
    (package / "synthetic.yaml").write_text(json.dumps(tasks))
    (scripts / "niah.py").write_text(SCRIPT)
    monkeypatch.setattr(ruler_make, "NEEDED", ())
    loader = SimpleNamespace(from_pretrained=lambda folder: Words())
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=loader))
    return package.parent


@pytest.fixture
def run(generator, tmp_path):
    def run(*more):
        out = tmp_path / "made"
        words = [str(tmp_path), str(out), "--length", "64", "--samples", "2"]
        return ruler_make.main([*words, "--generator", str(generator), *more]), out

    return run


def test_tasks_are_written_as_they_are_read(run, capsys):
    code, out = run("--tasks", "vt", "qa_1", "--xz")
    assert code == 0, capsys.readouterr().err
    found = read_tasks(out)
    assert [(one.context, one.task, one.index) for one in found] == [
        (64, "vt", 0), (64, "vt", 1), (64, "qa_1", 0), (64, "qa_1", 1)
    ]  # fmt: skip
    assert [one.metric for one in found] == ["all", "all", "part", "part"]
    assert {one.length for one in found} == {64}
    assert {one.max_new_tokens for one in found} == {4}
    assert found[0].outputs == ("A.", "B!")
    assert found[0].input.endswith("\nAsk Q The answer vt for Q is")
    assert {(one.question, one.seed) for one in found} == {("end", 42)}
    assert found[0].add_special_tokens is True
    assert sorted(path.name for path in out.rglob("*.xz")) == ["qa_1.jsonl.xz", "vt.jsonl.xz"]


def test_a_chat_holds_the_start_of_the_answer_in_the_models_turn(run):
    code, out = run("--tasks", "vt", "--chat")
    assert code == 0
    sample = read_tasks(out)[0]
    assert sample.input.startswith("<user> Find this.\nx x")
    assert sample.input.endswith("Ask Q <model>The answer vt for Q is")
    assert sample.add_special_tokens is False
    assert sample.length <= 64


def test_a_question_in_front_leaves_only_the_opening_of_the_answer_behind(run):
    assert run("--tasks", "vt")[0] == 0
    code, out = run("--tasks", "vt", "--question", "start", "--seed", "7")
    assert code == 0
    end, _, start, _ = read_tasks(out)
    assert (start.question, start.seed, start.context) == ("start", 7, 64)
    assert start.input.startswith("Find this.\nAsk Q\n\nx x")
    assert start.input.endswith(" x x\n The answer vt is")
    assert "Q" not in start.input.partition("x x")[2]
    assert end.question == "end"
    assert sorted(path.parent.name for path in out.rglob("vt.jsonl")) == ["64", "start"]


NIAH = {
    "template": "Some {v} are hidden.\n{context}\nWhat are all the {v} for {query} in the text?",
    "answer_prefix": " The {v} for {query} in the text are",
}
VT = {
    "template": "Track.\n\n{context}\nQuestion: Which have the value {query} in the text above.",
    "answer_prefix": " Answer: In the text above, {num_v} are assigned the value {query}: ",
}
FWE = {
    "template": "Read the text. {context}\nQuestion: Which words of the above coded text?",
    "answer_prefix": " Answer: The words are:",
}
QA = {
    "template": "Answer.\n\nDocuments.\n\n{context}\n\nAnswer.\n\nQuestion: {query}",
    "answer_prefix": " Answer:",
}


@pytest.mark.parametrize(
    ("kind", "template", "opening"),
    [
        (NIAH, "Some {v} are hidden.\nWhat are all the {v} for {query} in the text?\n\n{context}\n",
         " The {v} in the text are"),
        (VT, "Track.\n\nQuestion: Which have the value {query} in the text below.\n\n{context}\n",
         " Answer: In the text above, {num_v} are assigned that value: "),
        (FWE, "Read the text. Question: Which words of the coded text below?\n\n{context}\n",
         " Answer: The words are:"),
        (QA, "Answer.\n\nDocuments.\n\nQuestion: {query}\n\n{context}\n", " Answer:"),
    ],
)  # fmt: skip
def test_the_question_moves_in_front_of_the_text(kind, template, opening):
    assert question_first("x", kind) == {"template": template, "answer_prefix": opening}


@pytest.mark.parametrize(
    "change", [{"template": "Find {query} in {context}"}, {"answer_prefix": " {query} is"}]
)
def test_a_question_that_cannot_be_moved_is_refused(change):
    with pytest.raises(EvalError, match="the question of RULER's niah cannot be moved"):
        question_first("niah", NIAH | change)


def test_a_generator_that_fails_is_told_in_its_words(run, capsys):
    assert run("--tasks", "vt", "--seed", "13")[0] == 2
    assert "niah.py failed: an unlucky number" in capsys.readouterr().err


def test_a_sample_that_is_too_long_is_not_written(run, generator, capsys):
    path = generator / "long_context_eval" / "synthetic.yaml"
    path.write_text(path.read_text().replace('"kind": "vt"', '"kind": "vt", "extra": 3'))
    code, out = run("--tasks", "vt")
    assert code == 2
    assert "vt: sample 0 has 67 tokens, more than 64" in capsys.readouterr().err
    assert not out.exists()


def test_what_is_missing_is_named(run, tmp_path, monkeypatch, capsys):
    assert run("--generator", str(tmp_path))[0] == 2
    assert "does not hold long_context_eval/data/synthetic/constants.py" in capsys.readouterr().err
    monkeypatch.setattr(ruler_make, "NEEDED", ("json", "no_such_package"))
    assert run()[0] == 2
    assert "needs the Python packages no_such_package" in capsys.readouterr().err
    assert ruler_make.main([str(tmp_path), str(tmp_path), "--length", "9"]) == 2
    assert "RULER's generator is not installed" in capsys.readouterr().err
