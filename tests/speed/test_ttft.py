import json

import pytest

from s2o_vllm.benchmarks.speed import arms, serving, ttft


@pytest.fixture
def servers(two_arms, monkeypatch):
    """Two servers that answer at once; yields what they were asked, in order."""
    monkeypatch.setattr(ttft, "read", lambda url: "")
    monkeypatch.setattr(ttft, "measured_density", lambda url, before: 0.05)
    return two_arms


def test_arms_take_turns_on_the_same_prompts(servers, tmp_path):
    out = tmp_path / "ttft.json"
    contexts = ["--contexts", "16384", "65536"]
    assert ttft.main([*contexts, "--budgets", "0.05", "--repeat", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["context"], row["backend"], row["ttft_s"]) for row in rows] == [
        (16384, "stock", 1.0), (16384, "s2o", 0.5), (65536, "stock", 1.0), (65536, "s2o", 0.5),
    ]  # fmt: skip
    assert [len(row["ttft_all_s"]) for row in rows] == [4, 4, 2, 2], "short prompts more often"
    assert rows[1]["density"] == 0.05
    assert rows[0]["density"] is None
    measured = [one for one in servers if len(one[2]) == 16384][2:]  # two were not measured
    assert [url for url, *_ in measured] == ["s2o", "stock", "stock", "s2o"] * 2
    for first, second in zip(measured[::2], measured[1::2], strict=True):
        assert first[2] == second[2]


def test_no_time_is_reported_where_the_tokens_differ(servers, tmp_path, monkeypatch, capsys):
    honest = arms.ask
    other = arms.Timing(0.0, [arms.Chunk(1.0, 1)], [98])
    monkeypatch.setattr(
        arms, "ask", lambda url, *rest: other if url == "s2o" else honest(url, *rest)
    )
    out = tmp_path / "ttft.json"
    assert ttft.main(["--contexts", "4096", "--out", str(out)]) == 1
    assert "not those of stock vLLM" in capsys.readouterr().err
    assert not out.exists()


def test_cache_size_is_that_of_the_models_heads(tmp_path):
    shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"head_dim": 128}))
    assert serving.kv_cache_bytes(tmp_path, 1000) == 1000 * 131_072
    (tmp_path / "config.json").write_text(json.dumps(shape | {"hidden_size": 4096}))
    assert serving.kv_cache_bytes(tmp_path, 1) == 131_072
