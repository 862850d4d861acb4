"""The load test against a real server, with short prompts."""

import json

import pytest
from s2o_vllm.loadtest import main


@pytest.mark.e2e
def test_load_test_of_a_running_server(server, tmp_path):
    output = tmp_path / "load.json"
    code = main([
        "--arm", f"stock={server.url},budget=1", "--arm", f"s2o={server.url},budget=0.25",
        "--model", server.model, "--context", "512", "--output-tokens", "4",
        "--rates", "0.5,1", "--requests", "3", "--output", str(output),
    ])  # fmt: skip
    assert code == 0
    result = json.loads(output.read_text())
    assert [(row["backend"], row["budget"], row["rate"]) for row in result["rows"]] == [
        ("stock", 1.0, 0.5), ("stock", 1.0, 1.0), ("s2o", 0.25, 0.5), ("s2o", 0.25, 1.0),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["failed"] == 0
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
        assert row["output_tok_s"] > 0
    assert output.with_suffix(".png").stat().st_size > 10_000
