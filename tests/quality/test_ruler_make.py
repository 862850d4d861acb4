"""Making tasks, with a stand-in for RULER's generator and a tokenizer of words."""

import json
import sys
from types import SimpleNamespace

import pytest

from s2o_vllm.benchmarks.quality import ruler_make
from s2o_vllm.benchmarks.quality.ruler_tasks import TASKS, read_tasks

SCRIPT = """\
import json, pathlib, sys
from nltk.tokenize import sent_tokenize
from long_context_eval.there import HERE
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
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
    kinds = {"niah": {"tokens_to_generate": 4, "template": "Find {context} Ask {query}",
                      "answer_prefix": " The answer {kind} is"}}  # fmt: skip
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
    assert found[0].input.endswith(" Ask Q The answer vt is")
    assert found[0].add_special_tokens is True
    assert sorted(path.name for path in out.rglob("*.xz")) == ["qa_1.jsonl.xz", "vt.jsonl.xz"]


def test_a_chat_holds_the_start_of_the_answer_in_the_models_turn(run):
    code, out = run("--tasks", "vt", "--chat")
    assert code == 0
    sample = read_tasks(out)[0]
    assert sample.input.startswith("<user> Find x x")
    assert sample.input.endswith("Ask Q <model>The answer vt is")
    assert sample.add_special_tokens is False
    assert sample.length <= 64


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
