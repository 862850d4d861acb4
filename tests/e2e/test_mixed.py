"""A mixed run through a server: many lengths and budgets, shared prefixes, clients that leave."""

import json

import pytest

from s2o_vllm.benchmarks.speed import serve, soak

pytestmark = pytest.mark.e2e


def all_but_two_answered(result):
    """The summary of a run of 20 requests, two of which their clients gave up."""
    summary = result["summary"]
    assert [summary[key] for key in ("answered", "aborted", "failed", "left_running")] == [
        18, 2, 0, 0,
    ]  # fmt: skip
    return summary


def test_a_mixed_run_through_a_running_server(server, tmp_path):
    out = tmp_path / "serve.json"
    assert serve.main([
        "--url", server.url, "--vocabulary", "512", "--requests", "20", "--max-context", "3072",
        "--output-tokens", "8", "--budgets", "0.1", "0.3", "1.0", "--concurrency", "4",
        "--out", str(out),
    ]) == 0  # fmt: skip
    result = json.loads(out.read_text())
    summary = all_but_two_answered(result)
    assert 0.5 * summary["shared_tokens"] < summary["cached_tokens"] <= summary["shared_tokens"]
    assert 0.1 < summary["density"] < 0.6
    assert sum(row["requests"] for row in result["rows"]) == 18
    assert {row["prefix_hit"] for row in result["rows"]} == {True, False}
    assert all(row["ttft_p50_ms"] > 0 for row in result["rows"])


def test_rounds_of_a_soak_through_a_running_server(server, tmp_path):
    out = tmp_path / "soak.json"
    assert soak.main([
        "--url", server.url, "--vocabulary", "512", "--requests", "20", "--round", "10",
        "--concurrency", "4", "--out", str(out),
    ]) == 0  # fmt: skip
    result = json.loads(out.read_text())
    summary = all_but_two_answered(result)
    assert [row["requests"] for row in result["rows"]] == [10, 20]
    assert summary["growth"] is None, "its processes are not ours to see"
    assert summary["density"] < 1


def test_a_server_without_s2o_is_refused(stock_server, tmp_path, capsys):
    out = tmp_path / "serve.json"
    assert serve.main(["--url", stock_server.url, "--vocabulary", "512", "--out", str(out)]) == 1
    assert "must be a server that was started with --attention-backend s2o" in (
        capsys.readouterr().err
    )
    assert not out.exists()
