import json

import pytest

from models import VOCABULARY, write_model, write_weights
from s2o_vllm.benchmarks.research import answers, in_process


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder)
    write_weights(folder, gain=1.5)
    return in_process.Model(folder, "cpu")


def prompt(tokens=700, wanted=3):
    numbers = [3 + (7 * n * n) % (VOCABULARY - 3) for n in range(tokens + wanted)]
    return answers.Prompt("vt", 700, "end", numbers, tokens)


def test_dense_attention_loses_nothing_and_little_attention_something(model):
    def attention(budget):
        setting = in_process.Setting("served", "low_rank", budget, 0, 256)
        return in_process.Attention(setting, 703)

    dense = in_process.Attention(None, 703)
    ((whole, all_of_it, little),) = answers.judge(
        model, [prompt()], [attention(1.0), attention(0.05)], dense
    )
    assert all_of_it[0] == pytest.approx(whole[0], abs=0.05)
    assert abs(little[0] - whole[0]) > abs(all_of_it[0] - whole[0])


def test_a_string_is_a_hit_if_every_token_is_the_likeliest(model):
    tokens, dense = prompt().tokens[:700], in_process.Attention(None, 703)
    for _ in range(3):
        for token in range(VOCABULARY):
            if model.read([*tokens, token], len(tokens), dense)[1] == [True]:
                tokens = [*tokens, token]
                break
    likeliest = answers.Prompt("vt", 700, "end", tokens, 700)
    other = answers.Prompt("vt", 700, "end", [*tokens[:-1], (tokens[-1] + 1) % VOCABULARY], 700)
    assert len(tokens) == 703
    found = list(answers.judge(model, [likeliest, other], [], dense))
    assert [hit for ((_, hit),) in found] == [True, False]
    args = answers.build_parser().parse_args(["model", "--tasks", "."])
    setting = in_process.Setting("served", "low_rank", 0.1, 0, 256)
    both = [[results[0], results[0]] for results in found]
    (row,) = answers.rows_of(args, [likeliest, other], both, [setting], [dense])
    assert (row["samples"], row["hit"], row["dense_hit"], row["value"]) == (2, 0.5, 0.5, 0)
    (first,) = answers.rows_of(args, [likeliest, other], both[:1], [setting], [dense])
    assert (first["samples"], first["hit"]) == (1, 1), "of the prompts that are done"


def test_the_wanted_string_follows_the_prompt(tmp_path):
    def encode(text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(letter) for letter in text]

    line = {"input": "the number is", "outputs": ["42", "7"], "index": 0, "context": 99}
    (tmp_path / "niah_multikey_2.jsonl").write_text(json.dumps(line) + "\n")
    args = answers.build_parser().parse_args(["model", "--tasks", str(tmp_path)])
    (only,) = answers.read_prompts(args, encode)
    assert only.tokens == [1, *map(ord, "the number is 42")]
    assert (only.task, only.context, only.first) == ("niah_multikey_2", 99, 14)
