import json
import math

import pytest
import torch

from cases import make_batch
from models import VOCABULARY, write_model, write_weights
from s2o_vllm.benchmarks.quality import far_tokens
from s2o_vllm.benchmarks.research import exact_lists, in_process
from s2o_vllm.kernels import paging
from s2o_vllm.kernels.layout import DENSE_START, NUM_QUERIES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder)
    write_weights(folder, gain=1.5)
    return in_process.Model(folder, "cpu")


def windows(number=2, tokens=900):
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(3, VOCABULARY, (number, tokens), generator=generator)
    drawn[:, 500:] = drawn[:, 100 : tokens - 400].clone()  # what comes again is far
    return drawn.tolist()


def setting(lists="served", budget=0.1):
    return in_process.Setting(lists, "low_rank", budget, 0, 256)


def test_exact_scores_are_the_largest_probability_of_any_row():
    device = torch.device("cpu")
    batch = make_batch(device, chunks=((150, 70),), heads=4, kv_heads=2, head_dim=64)
    (work,) = batch.work(segment=32)
    arguments = (batch.query, batch.kv_cache, batch.block_table, work)
    scores = exact_lists.exact_scores(*arguments, scale=batch.scale)
    for number, item in enumerate(work.segments.tolist()):
        n, count = item[DENSE_START], item[NUM_QUERIES]
        rows = paging.segment_queries(batch.query, item, 2).flatten(1, 2)
        positions = torch.arange(n + count, device=device)
        slots = paging.physical_slots(positions, batch.block_table[0], batch.kv_cache.shape[2])
        keys, _ = paging.load_tokens(batch.kv_cache, slots, 64)
        logits = rows.float() @ keys.float().mT * batch.scale
        query = torch.arange(logits.shape[1], device=device) % count
        logits = logits.masked_fill(positions > n + query[:, None], float("-inf"))
        wanted = logits.log_softmax(-1)[..., :n].amax(1) / math.log(2)
        torch.testing.assert_close(scores[number, :, :n].float(), wanted, atol=2e-2, rtol=0)
        assert torch.isneginf(scores[number, :, n:]).all()


@pytest.fixture(autouse=True)
def every_token_is_far(monkeypatch):
    """No prediction of a random model is likely."""
    monkeypatch.setattr(far_tokens, "LIKELY", -100.0)
    monkeypatch.setattr(far_tokens, "GAIN", -100.0)


def test_a_full_budget_loses_nothing_and_a_small_one_something(model):
    settings = [setting(budget=1.0), setting("exact", 1.0), setting(budget=0.02)]
    full, exact, small = in_process.judge(model, windows(), 128, 200, settings)
    assert full["samples"] > 0
    assert abs(full["value"]) < 0.02
    assert abs(exact["value"]) < 0.02
    assert abs(small["value"]) > 0.02
    assert full["density"] == 1.0
    assert small["density"] < 0.03


def test_the_command_writes_a_row_a_setting(tmp_path, capsys):
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_model(folder)
    write_weights(folder)
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{token}" for tokens in windows(1, 1400) for token in tokens))
    out = tmp_path / "out.json"
    options = ["--text", str(text), "--windows", "2", "--context", "600", "--judged", "64"]
    options += ["--near", "128", "--chunk", "256", "--min-budget-tokens", "0", "--device", "cpu"]
    assert in_process.main([str(folder), *options, "--budgets", "0.1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["lists"] for row in rows] == ["served", "exact"]
    assert capsys.readouterr().out.count("nats") == 2
    assert in_process.main([str(folder), *options, "--judged", "5000"]) == 2


def test_rows_are_saved_as_they_come(tmp_path, monkeypatch):
    """What takes too long may be stopped: what was measured before stays."""
    import transformers

    def some(*_):
        yield setting()._asdict() | {
            "value": 0.1, "low": 0.0, "high": 0.2, "samples": 3, "density": 0.1
        }  # fmt: skip
        raise KeyboardInterrupt

    tokenizer = type("Tokenizer", (), {"encode": lambda self, text, **_: [1] * 40_000})
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda _: tokenizer(), raising=True
    )
    monkeypatch.setattr(in_process, "Model", lambda *_: None)
    monkeypatch.setattr(in_process, "judge", some)
    (tmp_path / "text").write_text("a")
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        in_process.main(
            ["model", "--text", str(tmp_path / "text"), "--windows", "1", "--out", str(out)]
        )
    assert [row["value"] for row in json.loads(out.read_text())["rows"]] == [0.1]
