import json

import pytest

from s2o_vllm.benchmarks.speed import arms, decode
from s2o_vllm.cli.server_process import ServerError

SMALL = ["--context", "64", "--batches", "1", "16", "--repeat", "4", "--ttft-contexts", "128",
         "--ttft-repeat", "3"]  # fmt: skip


def test_one_row_a_comparison_of_pairs_in_turn(two_arms, tmp_path):
    out = tmp_path / "decode.json"
    assert decode.main([*SMALL, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["what"], row["context"], row["batch"]) for row in rows] == [
        ("tpot_ms", 64, 1), ("tpot_ms", 64, 16), ("ttft_s", 128, 1),
    ]  # fmt: skip
    assert [len(row["s2o_all"]) for row in rows] == [4, 2, 3], "the first pair does not count"
    assert rows[1]["stock"] == pytest.approx(10)
    assert rows[1]["ratio"] == pytest.approx(1)
    assert (rows[2]["stock"], rows[2]["s2o"]) == (1.0, 0.5)
    assert rows[2]["ratio"] == rows[2]["ratio_low"] == rows[2]["ratio_high"] == pytest.approx(2)
    long = [one for one in two_arms if len(one[2]) == 128]
    assert [url for url, *_ in long] == ["s2o", "stock", "stock", "s2o"] * 2
    for first, second in zip(long[::2], long[1::2], strict=True):
        assert first[2] == second[2]
    assert len({tokens for _, _, tokens in long}) == 4, "no prompt comes back"


def test_a_batch_is_timed_while_all_of_it_decodes(monkeypatch):
    """One request begins late, another ends early; what is outside of both does not count."""
    answers = {
        1: [(0, 1), (5, 2), (6, 12), (7, 22), (30, 23)],
        2: [(4, 1), (5, 9), (6, 19), (7, 29)],
    }

    def ask(url, tokens, budget, output_tokens):
        return arms.Timing(0.0, [arms.Chunk(*one) for one in answers[tokens[0]]], [])

    monkeypatch.setattr(arms, "ask", ask)
    # From 4 to 7 s: 20 tokens in the 2 s between the pieces of one, 28 in 3 s of the other.
    assert decode.together("s2o", [[1], [2]], 32) == pytest.approx((100 + 3000 / 28) / 2)


def test_requests_that_hardly_decode_at_once_are_refused(monkeypatch):
    chunks = [arms.Chunk(0, 1), arms.Chunk(1, 9)]
    late = [arms.Chunk(2, 1), arms.Chunk(3, 9)]
    monkeypatch.setattr(
        arms, "ask", lambda url, tokens, *_: arms.Timing(0, late if tokens[0] else chunks, [])
    )
    with pytest.raises(ServerError, match="more output tokens"):
        decode.together("s2o", [[0], [1]], 9)


def test_too_few_pairs_are_refused(capsys):
    with pytest.raises(SystemExit):
        decode.main(["--repeat", "1"])
    assert "--repeat is 1" in capsys.readouterr().err
