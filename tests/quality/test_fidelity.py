"""The command on a server whose tokens say how much context they need."""

import json

import pytest

from answering import Refusal, answering
from s2o_vllm.benchmarks.quality import agreement, fidelity
from s2o_vllm.benchmarks.quality.agreement import common, compare
from s2o_vllm.benchmarks.quality.windows import library_code

pytestmark = pytest.mark.usefixtures("settled")

WORDS = ["--context", "256", "--near", "8", "--judged", "16", "--windows", "3", "--answers", "4"]
NEEDS = (1, 20, 50, 150, 300)  # tokens of context that a word needs, by word modulo 5


def needs(token):
    return NEEDS[token % 5]


def answer(body):
    """A token is likely once it sees what it needs; far ones lose a nat by budget and kind."""
    tokens, budget = body["prompt"], body["vllm_xargs"]["s2o_sparsity_budget"]
    if body["max_tokens"] > 1:
        end = tokens[-1] if budget == 1 or tokens[-1] % 2 else 7
        return {"token_ids": [1, 2, 3, end]}
    told = [None]
    for position, token in enumerate(tokens[1:], 1):
        known = -0.5 if position >= needs(token) else -5.0
        lost = 0.0 if budget == 1 or needs(token) < 20 else needs(token) / 100
        told.append({str(token): {"logprob": known - lost}})
    return {"prompt_logprobs": told}


@pytest.fixture
def server():
    with answering(answer) as httpd:
        yield httpd


@pytest.fixture
def run(server, tmp_path):
    for name, first in (("essays", 0), ("modules", 5000)):
        words = " ".join(str(first + number) for number in range(1500))
        (tmp_path / f"{name}.txt").write_text(words)

    def run(*more, texts=("text=essays.txt", "code=modules.txt")):
        out = tmp_path / "fidelity.json"
        named = [one.replace("=", f"={tmp_path}/") for one in texts]
        words = ["--url", server.url, "--out", str(out), "--texts", *named]
        code = fidelity.main([*words, *WORDS, *more])
        return code, json.loads(out.read_text())["rows"] if out.exists() else None

    return run


def test_nats_lost_are_told_by_distance_and_agreement_by_answer(run, server, capsys):
    code, rows = run()
    assert code == 0
    lost = {row["distance"]: row for row in rows if row["what"] == "far_tokens_code"}
    assert list(lost) == ["all", 32, 64, 256]
    assert [lost[one]["value"] for one in (32, 64, 256)] == [0.2, 0.5, 1.5]
    assert lost["all"]["samples"] == sum(lost[one]["samples"] for one in (32, 64, 256))
    assert lost["all"]["low"] < lost["all"]["value"] < lost["all"]["high"]
    assert lost[32]["low"] == lost[32]["high"] == 0.2, "windows agree"
    assert {row["windows"] for row in lost.values()} == {3}
    where = {"model": "small", "context": 256, "source": "modules", "setting": "", "budget": 0.1}
    assert where.items() <= lost["all"].items()
    assert lost["all"]["density"] == 0.1
    assert {row["what"] for row in rows} == set(fidelity.WHATS)
    dense, sparse = [row for row in rows if row["what"] == "agreement"]
    assert (dense["budget"], dense["value"], dense["prefix"]) == (1.0, 1.0, 64)
    assert sparse["samples"] == 8
    asked = [one for one in server.asked if one["max_tokens"] == agreement.ANSWER]
    sparse_ends = [
        one["prompt"][-1] for one in asked if one["vllm_xargs"]["s2o_sparsity_budget"] < 1
    ]
    odd = sum(end % 2 for end in sparse_ends)
    assert len(sparse_ends) == 8
    assert 0 < odd < 8
    assert sparse["value"] == odd / 8
    assert sparse["prefix"] == pytest.approx((odd * 64 + (8 - odd) * 3) / 8, abs=0.01)
    assert sparse["low"] < sparse["value"] < sparse["high"]
    table = capsys.readouterr().out
    assert "far_tokens_code, small, 256 tokens:" in table
    assert "| all far tokens | within 32 | within 64 | within 256 |" in table
    assert "+0.200 [+0.200, +0.200]" in table
    assert "3 of modules" in table


def test_shorter_contexts_are_asked_dense_and_only_once(run, server):
    assert run("--what", "far_tokens_text")[0] == 0
    whole = [body for body in server.asked if len(body["prompt"]) == 256]
    short = [body for body in server.asked if len(body["prompt"]) < 256]
    assert len(whole) == 6
    # 16 judged tokens behind 8, 32, 64 and 128: in 8, 2, 1 and 1 prompts.
    assert len(short) == 3 * (8 + 2 + 1 + 1)
    assert {body["vllm_xargs"]["s2o_sparsity_budget"] for body in short} == {1.0}
    assert all(body["prompt_logprobs"] == 0 for body in server.asked)
    before = len(server.asked)
    assert run("--what", "far_tokens_text", "--budgets", "1.0", "0.1", "0.05")[0] == 0
    assert [len(body["prompt"]) for body in server.asked[before:]] == [256] * 3


def test_judged_tokens_lie_before_the_prompts_dense_end(run, server):
    """Only the last 64 tokens are lost here, which no row may show."""

    def lose_the_end(body):
        told = answer(body)["prompt_logprobs"]
        if body["vllm_xargs"]["s2o_sparsity_budget"] < 1:
            told = answer(body | {"vllm_xargs": {"s2o_sparsity_budget": 1}})["prompt_logprobs"]
            for position in range(256 - 64, 256):
                told[position] = {str(body["prompt"][position]): {"logprob": -9.0}}
        return {"prompt_logprobs": told}

    server.reply = lose_the_end
    _, rows = run("--what", "far_tokens_text")
    assert {row["value"] for row in rows} == {0.0}


def test_a_setting_has_its_own_rows_and_uses_dense_answers_that_are_there(run, server):
    assert run("--what", "far_tokens_text")[0] == 0
    before = len(server.asked)
    code, rows = run("--what", "far_tokens_text", "--setting", "lists of 2,048", "--budgets", "0.1")
    assert code == 0
    assert len(server.asked) == before + 3
    found = {row["setting"]: row["value"] for row in rows if row["distance"] == "all"}
    assert found.keys() == {"", "lists of 2,048"}
    assert found[""] == found["lists of 2,048"] > 0


def test_refusals_are_counted_and_asked_again(run, server, capsys):
    def refuse_sparse(body):
        if body["vllm_xargs"]["s2o_sparsity_budget"] < 1:
            raise Refusal("not now")
        return answer(body)

    server.reply = refuse_sparse
    code, rows = run("--what", "agreement")
    assert code == 1
    assert "8 of 24 questions were refused" in capsys.readouterr().err
    assert [row["budget"] for row in rows] == [1.0]
    server.reply = answer
    code, rows = run("--what", "agreement")
    assert (code, [row["budget"] for row in rows]) == (0, [1.0, 0.1])


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ({"token_ids": None}, "lacks token_ids"),
        ({"prompt_logprobs": [None]}, "lacks prompt_logprobs of every token"),
    ],
)
def test_an_answer_without_what_was_asked_for_is_a_refusal(run, server, capsys, reply, sentence):
    server.reply = lambda body: reply
    assert run()[0] == 1
    assert sentence in capsys.readouterr().err or "token_ids" in reply


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--context", "140"], "--context is 140, must be 144 at least for --judged 16 and"),
        (["--context", "500"], "--context is 500, must leave room for an answer of 64 in the"),
        (["--texts", "code=nowhere.txt"], "--texts nowhere.txt cannot be read"),
        (["--texts", "code=pyproject.toml"], "--texts names no text, must have text=FILE"),
    ],
)
def test_what_cannot_work_is_one_sentence(run, capsys, words, sentence):
    assert run(*words) == (2, None)
    error = capsys.readouterr().err.strip()
    assert error.startswith("s2o eval fidelity: ")
    assert sentence in error
    assert "\n" not in error


def test_a_text_that_is_too_short_is_named(run, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("1 2 3")
    assert run(texts=("text=short.txt",))[0] == 2
    assert "short has 3 tokens, must have 256 at least" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("1 " * 300)
    assert run(texts=("text=short.txt",))[0] == 2
    assert "short is too short for 3 windows of 256 tokens" in capsys.readouterr().err


def test_words_of_many_letters_are_read_further_back(run, server, tmp_path):
    """Twelve characters a token: six for each do not fill a window."""
    long = " ".join(f"{number:011}" for number in range(1500))
    (tmp_path / "long.txt").write_text(long)
    assert run("--what", "far_tokens_text", texts=("text=long.txt",))[0] == 0
    whole = [body["prompt"] for body in server.asked if len(body["prompt"]) == 256]
    assert {tuple(prompt) for prompt in whole} == {
        tuple(range(prompt[0], prompt[0] + 256)) for prompt in whole
    }
    assert max(prompt[-1] for prompt in whole) == 1499


def test_code_comes_from_large_modules_of_the_standard_library():
    name, content = library_code()
    assert name.startswith("python-3.")
    heads = [
        line for line in content.splitlines() if line.startswith("# ") and line.endswith(".py")
    ]
    assert {"# argparse.py", "# typing.py"} <= set(heads)
    assert not [line for line in heads if "/test" in line]
    assert heads.index("# argparse.py") < heads.index("# typing.py"), "in the order of paths"
    assert len(content) > 2_000_000


def test_common_beginnings():
    assert common([1, 2, 3], [1, 2, 4]) == 2
    assert common([1, 2], [1, 2, 4]) == 2
    assert common([1, 2], [1, 2]) == agreement.ANSWER
    assert compare({"a": [1]}, {"b": [1]}) is None
