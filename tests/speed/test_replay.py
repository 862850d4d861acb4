import json
from contextlib import contextmanager

import pytest

from s2o_vllm import loadtest
from s2o_vllm.benchmarks.speed import arms, replay
from s2o_vllm.loadtest.replay import run
from streaming import streaming

LOAD = [
    "--lengths", "300,900", "--sessions", "2", "--turns", "2", "--new-tokens", "16,32",
    "--shared-tokens", "32", "--output-tokens", "4", "--think", "0", "--concurrency", "2",
    "--goodput", "ttft:60000", "--device", "a test",
]  # fmt: skip


@pytest.fixture
def started(monkeypatch):
    """Every server is a stand-in; yields the flags of each, by arm."""
    flags = {}

    @contextmanager
    def server(args, arm, model, folder, longest, held):
        flags[arm] = [*args.server_args, longest, held]
        with streaming() as httpd:
            yield lambda: httpd.url

    monkeypatch.setattr(arms, "server", server)
    monkeypatch.setattr(arms, "ask", lambda *_: arms.Timing(0.0, [arms.Chunk(1.0, 1)], [98]))
    monkeypatch.setattr(run, "SETTLE", 0)
    return flags


def test_both_servers_are_replayed_in_turn(started, tmp_path):
    out = tmp_path / "replay.json"
    assert replay.main(["--budgets", "0.1", "--out", str(out), *LOAD]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["trace"], row["backend"], row["budget"]) for row in rows] == [
        ("agent", "stock", None), ("agent", "s2o", 0.1),
    ]  # fmt: skip
    assert all(row["goodput_rps"] > 0 and row["failed"] == 0 for row in rows)
    assert set(started) == {"stock", "s2o"}
    for flags in started.values():
        assert "--enable-prefix-caching" in flags
        assert flags[-2:] == [131072, 320_000]


def test_one_server_has_both_arms(started, tmp_path):
    out = tmp_path / "replay.json"
    assert replay.main(["--one-server", "--replay", "mixed", "--out", str(out), *LOAD]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["trace"], row["backend"], row["budget"]) for row in rows] == [
        ("mixed", "stock", 1.0), ("mixed", "s2o", 0.05),
    ]  # fmt: skip
    assert set(started) == {"s2o"}


def test_no_time_is_reported_where_the_tokens_differ(started, tmp_path, monkeypatch, capsys):
    answers = iter([[1], [2]])
    monkeypatch.setattr(
        arms, "ask", lambda *_: arms.Timing(0.0, [arms.Chunk(1.0, 1)], next(answers))
    )
    monkeypatch.setattr(loadtest, "main", lambda words: pytest.fail("nothing is to be measured"))
    out = tmp_path / "replay.json"
    assert replay.main(["--out", str(out), *LOAD]) == 1
    assert "not those of stock vLLM" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_refused(started, tmp_path):
    with pytest.raises(SystemExit):
        replay.main(["--model", str(tmp_path / "none"), *LOAD])
