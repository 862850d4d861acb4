import pytest
import torch

from s2o_vllm.benchmarks import decode_budget
from s2o_vllm.benchmarks.dense import PAGE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def batch():
    return decode_budget.make_batch(2, 100, DEVICE, torch.float32)


def test_lists_are_a_requests_own_tokens_without_repeats(batch):
    slots = decode_budget.random_slots(batch, 0.5)
    assert batch.context == 96, "whole pages"
    assert slots.shape == (2, 8, 47)
    for table, lists in zip(batch.block_table, slots, strict=True):
        own = table[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)
        last = own.flatten()[-1]
        for one in lists:
            assert len(set(one.tolist())) == 47
            assert torch.isin(one, own).all()
            assert last not in one


def test_everything_listed_is_dense_attention(batch):
    found = decode_budget.attending(batch, decode_budget.random_slots(batch, 1.0), 1)()
    torch.testing.assert_close(
        found, decode_budget.exact(batch, batch.context, torch.float32), atol=1e-4, rtol=1e-3
    )


def test_parts_of_a_list_are_attended_to_each_on_its_own(batch):
    slots = decode_budget.random_slots(batch, 1.0)
    found = decode_budget.attending(batch, slots, 5)()
    assert found.shape == (10, 32, 128)
    assert torch.isfinite(found).all()
    assert not torch.equal(found[0], found[1])


def test_what_is_gathered_is_what_is_listed(batch):
    slots = decode_budget.random_slots(batch, 0.2)
    gathered = decode_budget.gathering(batch, slots)()
    for request, place, head in ((0, 3, 2), (1, 18, 7)):
        slot = int(slots[request, head, place])
        wanted = batch.kv_cache[slot // PAGE, head, slot % PAGE]
        assert torch.equal(gathered[request, place, head], wanted)


def test_without_a_card_there_is_nothing_to_time(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        decode_budget.main([])
    assert "no CUDA device" in capsys.readouterr().err
