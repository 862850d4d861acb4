import pytest
import torch

from s2o_vllm.benchmarks.speed import decode_budget
from s2o_vllm.kernels.layout import ELIGIBLE, VISITED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.fixture
def batch():
    return decode_budget.make_batch(2, 300, DEVICE, DTYPE)


def test_everything_listed_is_dense_attention(batch):
    assert batch.context == 288, "whole pages"
    run, counters = decode_budget.operator(batch, 1.0, chunk=128)
    wanted = decode_budget.exact(batch, torch.float64)
    assert float((run().double() - wanted).norm() / wanted.norm()) < 1e-2
    assert counters[VISITED] == counters[ELIGIBLE] == 2 * 32 * 287


def test_a_share_is_listed_and_repeats(batch):
    run, counters = decode_budget.operator(batch, 0.25, chunk=128)
    first = run().clone()
    wanted = decode_budget.exact(batch, torch.float64)
    # Keys and bases are random: tokens left out cost √(left out / visited), 1 here, and less where
    # summaries without values take some of their mass.
    assert 0.5 < float((first.double() - wanted).norm() / wanted.norm()) < 1.5
    # The last 64 to 127 tokens are visited in any case.
    recent, ranked = 287 - 192, 192
    visited = counters[VISITED] / (2 * 32)
    assert recent < visited <= recent + 0.3 * ranked
    assert torch.equal(run(), first)


def test_a_row_says_what_takes_the_time():
    row = {
        "batch": 4, "context": 1024, "budget": 0.05, "fa3_paged_ms": 0.8, "operator_ms": 0.4,
        "gain": 2.0, "kernels_us": {"_score_kernel": 90.4, "_attend_kernel": 200.2},
    }  # fmt: skip
    assert decode_budget.summary(row).endswith("2.00x; us: attend 200, score 90")


def test_without_a_card_there_is_nothing_to_time(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        decode_budget.main([])
    assert "no CUDA device" in capsys.readouterr().err
