import json

import pytest

from s2o_vllm.benchmarks.speed import arms, decode_sparse

SMALL = ["--contexts", "40", "64", "--output-tokens", "32"]


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """The servers' /metrics: nothing was counted."""
    monkeypatch.setattr(decode_sparse, "read", lambda url: "")
    monkeypatch.setattr(decode_sparse, "measured_density", lambda url, before: 0.05)


def test_one_row_a_context_and_batch(two_arms, tmp_path):
    out = tmp_path / "decode_sparse.json"
    assert decode_sparse.main([*SMALL, "--batches", "1", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["context"], row["batch"], row["density"]) for row in rows] == [
        (40, 1, None), (40, 2, None), (64, 1, 0.05), (64, 2, 0.05),
    ]  # fmt: skip
    assert {(row["layers"], row["decode_budget"]) for row in rows} == {(8, 0.05)}
    assert rows[0]["ratio"] == pytest.approx(1)
    assert {len(row["s2o_all"]) for row in rows} == {3}


def test_the_server_decodes_sparsely(two_arms, monkeypatch, tmp_path):
    given = []
    server = arms.server
    monkeypatch.setattr(
        arms, "server", lambda args, arm, *size: given.append(args.s2o_args) or server(args, arm)
    )
    assert decode_sparse.main([*SMALL, "--out", str(tmp_path / "out.json")]) == 0
    assert given[0] == [
        "--s2o-decode-budget", "0.05", "--s2o-decode-min-context", "64",
        "--s2o-decode-requests", "4",
    ]  # fmt: skip


def test_requests_that_decoded_densely_end_it(two_arms, monkeypatch, tmp_path, capsys):
    page = 's2o:dense_rows_total{reason="no_decode_state"} 3.0\n'
    monkeypatch.setattr(decode_sparse, "read", lambda url: page)
    assert decode_sparse.main([*SMALL, "--out", str(tmp_path / "out.json")]) == 1
    assert "no slot held their state" in capsys.readouterr().err
