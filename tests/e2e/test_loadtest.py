"""The load test against a real server, with short prompts."""

import json

import pytest

from s2o_vllm.loadtest import main


@pytest.mark.e2e
def test_load_test_of_a_running_server(server, tmp_path, capsys):
    output = tmp_path / "load.json"
    code = main([
        "--arm", f"stock={server.url},budget=1", "--arm", f"s2o={server.url},budget=0.25",
        "--model", server.model, "--context", "1024", "--output-tokens", "4",
        "--rates", "2", "--requests", "3", "--warmup", "0", "--output", str(output),
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result = json.loads(output.read_text())
    assert [(row["backend"], row["budget"], row["rate"]) for row in result["rows"]] == [
        ("stock", 1.0, 2.0), ("s2o", 0.25, 2.0),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["failed"] == 0
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
        assert row["output_tok_s"] > 0
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert printed.out.count("; dense") == 1, "the stock arm visits everything"
    assert printed.out.count("; density 0.2") == 1, "the other one visits its budget's share"


@pytest.mark.e2e
def test_replay_on_a_running_server(server, tmp_path, capsys):
    output, text = tmp_path / "replay.json", tmp_path / "words.txt"
    # The tiny model's tokenizer knows these words alone.
    text.write_text(" ".join(f"w{3 + (7 * number * number) % 500}" for number in range(4000)))
    code = main([
        "--arm", f"stock={server.url},budget=1", "--arm", f"s2o={server.url},budget=0.25",
        "--model", server.model, "--replay", "agent", "--text", str(text), "--sessions", "2",
        "--lengths", "1200,2600", "--turns", "3", "--new-tokens", "300,500", "--think", "0",
        "--shared-tokens", "256", "--output-tokens", "4", "--concurrency", "2",
        "--goodput", "ttft:600000", "--output", str(output),
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    stock, sparse = json.loads(output.read_text())["rows"]
    for row in (stock, sparse):
        assert row["failed"] == 0
        assert row["requests"] > 2, "a session has several turns"
        assert row["goodput_rps"] == row["answered_rps"] > 0
        assert all(value > 0 for value in row["turn_ttft_p50_ms"])
        assert row["prefix_hit_share"] > 0.3, "a turn finds the turn before"
    assert stock["density"] is None
    assert 0.1 < sparse["density"] < 0.4
    lines = output.with_suffix(".requests.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2, "a plan, and a part for each round and arm"
    assert output.with_suffix(".png").stat().st_size > 10_000
