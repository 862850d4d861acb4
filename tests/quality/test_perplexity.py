import json
import math

import pytest

from answering import Refusal, answering
from s2o_vllm.benchmarks.quality import perplexity

pytestmark = pytest.mark.usefixtures("settled")

LOSS = {1.0: 2.0, 0.1: 2.5}  # nats a token by budget; a quarter more in the second half


def log_probabilities(body):
    tokens, loss = body["prompt"], LOSS[body["vllm_xargs"]["s2o_sparsity_budget"]]
    told = [None]
    for position, token in enumerate(tokens[1:], 1):
        later = position >= len(tokens) // 2
        entry = {"logprob": -loss * (1.25 if later else 1), "rank": 3, "decoded_token": "x"}
        told.append({str(token): entry})
    return {"prompt_logprobs": told}


@pytest.fixture
def server():
    with answering(log_probabilities) as httpd:
        yield httpd


@pytest.fixture
def run(server, tmp_path):
    text = tmp_path / "numbers.txt"
    text.write_text("".join(f"{number:03} " for number in range(402)))

    def run(*more):
        out = tmp_path / "perplexity.json"
        words = ["--url", server.url, "--text", str(text), "--out", str(out), "--context", "41"]
        code = perplexity.main([*words, "--windows", "3", "--tail", "10", *more])
        return code, json.loads(out.read_text())["rows"] if out.exists() else None

    return run


def test_the_text_is_judged_window_by_window_at_every_budget(run, server, capsys):
    code, rows = run()
    assert code == 0
    assert [(row["budget"], row["samples"], row["paired"]) for row in rows] == [
        (1.0, 3, 0), (0.1, 3, 3)
    ]  # fmt: skip
    dense, sparse = rows
    # 40 predicted tokens, of which 21 are in the second half.
    assert dense["nll"] == pytest.approx((19 * 2 + 21 * 2.5) / 40)
    assert dense["tail_nll"] == 2.5
    assert dense["perplexity"] == pytest.approx(math.exp(2.2625), abs=1e-3)
    assert sparse["tail_perplexity"] == pytest.approx(math.exp(3.125), abs=1e-3)
    assert sparse["tail_difference"] == 0.625
    assert sparse["difference"] == pytest.approx(0.25 * 2.2625, abs=1e-5)
    assert sparse["difference_low"] == sparse["difference_high"] == sparse["difference"]
    assert dense["difference"] is None
    assert sparse["density"] == 0.1
    assert (sparse["model"], sparse["text"], sparse["context"]) == ("small", "numbers", 41)
    starts = [body["prompt"][0] for body in server.asked[:3]]
    assert sorted(starts) == [0, 134, 268]
    assert all(len(body["prompt"]) == 41 for body in server.asked)
    assert all(body["prompt_logprobs"] == 0 for body in server.asked)
    assert "9.607" in capsys.readouterr().out


def test_windows_that_were_answered_are_not_asked_again(run, server):
    def refuse_one(body):
        if body["prompt"][0] == 0 and body["vllm_xargs"]["s2o_sparsity_budget"] < 1:
            raise Refusal("not now")
        return log_probabilities(body)

    server.reply = refuse_one
    code, rows = run()
    assert code == 1
    assert [(row["samples"], row["failed"], row["paired"]) for row in rows] == [
        (3, 0, 0), (2, 1, 2)
    ]  # fmt: skip
    server.reply = log_probabilities
    assert run()[0] == 0
    assert len(server.asked) == 7


@pytest.mark.parametrize("told", [None, [], [None] * 41, [None] + [{"7": {"logprob": -1}}] * 40])
def test_an_answer_without_the_tokens_probabilities_is_a_refusal(run, server, capsys, told):
    server.reply = lambda body: {"prompt_logprobs": told}
    code, rows = run()
    assert code == 1
    assert "6 of 6 questions were refused" in (error := capsys.readouterr().err)
    assert "lacks prompt_logprobs of every token" in error
    assert rows[0]["perplexity"] is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--context", "512"], "--context is 512, must be less than the server's 512"),
        (["--context", "140"], "has no 3 windows of 140 tokens: window 0 has 134"),
        (["--tail", "41"], "--tail is 41, must be less than --context (41)"),
        (["--text", "nowhere.txt"], "--text nowhere.txt cannot be read"),
        (["--budgets", "0.1", "--url", "x"], "--url is 'x', must be like"),
    ],
)
def test_what_cannot_work_is_one_sentence(run, capsys, words, sentence):
    assert run(*words) == (2, None)
    error = capsys.readouterr().err.strip()
    assert error.startswith("s2o eval perplexity: ")
    assert sentence in error
    assert "\n" not in error


def test_a_server_without_a_tokenizer_is_told(run, server, monkeypatch, capsys):
    def refuse(path, body, post=server.post):
        if path == "/tokenize":
            raise Refusal("skipped")
        return post(path, body)

    monkeypatch.setattr(server, "post", refuse)
    assert run() == (2, None)
    assert "/tokenize gives no tokens (HTTP 400" in capsys.readouterr().err
