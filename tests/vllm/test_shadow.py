"""Shadow mode: which queries are attended twice, their errors, and what follows of them."""

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from backends import FP8_CPU, Row, decode
from conformance import check_shadow, maker, shadowed
from s2o_vllm import metrics, shadow
from s2o_vllm.config import ConfigError, S2OConfig, resolve
from s2o_vllm.kernels.output_error import ERROR_UNIT
from s2o_vllm.kernels.work_list import PrefillRow

CPU = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")


def settings(**changes):
    return S2OConfig(**{"min_context": 1000, "shadow_rate": 0.01} | changes)


def test_a_share_of_the_sparse_queries_is_drawn_without_a_period():
    """Over many steps: of each place in a segment or a page about as many."""
    places = torch.zeros(64)
    drawn = 0
    for context in range(1024, 1_000_000, 1024):
        for one in shadow.sample([PrefillRow(3, 5, 1024, context, 0.1)], settings()):
            position = one.length - 1
            assert (one.row, one.token) == (3, 5 + position - context)
            places[position % 64] += 1
            drawn += 1
    assert drawn == pytest.approx(0.01 * 999_000, rel=0.01)
    assert places.min() > 0.8 * places.mean()
    assert places.max() < 1.2 * places.mean()


def test_dense_segments_are_not_drawn_from_and_a_step_is_bounded():
    row = PrefillRow(0, 0, 8192, 0, 0.1)
    (first, *_, last) = shadow.sample([row], settings(shadow_rate=1.0))
    assert len(shadow.sample([row], settings(shadow_rate=1.0))) == shadow.MOST_QUERIES
    assert first.length == 1024 + 1, "the first segment with so much history begins here"
    assert last.length > 7900, "the whole chunk is drawn from"
    assert shadow.sample([PrefillRow(0, 0, 1000, 0, 0.1)], settings(shadow_rate=1.0)) == []
    assert shadow.sample([row._replace(min_tokens=9000)], settings(shadow_rate=1.0)) == []


def test_the_sample_is_the_same_in_every_run_and_that_of_several_requests():
    rows = [PrefillRow(0, 0, 500, 5000, 0.1), PrefillRow(2, 600, 500, 5000, 0.1)]
    chosen = shadow.sample(rows, settings())
    assert chosen == shadow.sample(rows, settings())
    own = [one for one in chosen if one.row == 0]
    assert own
    assert [one._replace(row=2, token=one.token + 600) for one in own] == chosen[len(own) :]


@pytest.fixture(scope="module")
def backend(tiny_model):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from s2o_vllm.backend_cpu import S2OCPUBackend

    shape = {"heads": 8, "kv_heads": 2, "head_dim": 64, "page": 32}
    return maker(CPUAttentionBackend, S2OCPUBackend, tiny_model, "cpu", shape)


@CPU
@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=FP8_CPU)])
def test_the_error_is_that_of_the_sampled_queries(backend, fp8):
    """Between decode, short and other rows, over shuffled pages full of NaN."""
    own = {"sparsity_budget": 0.1, "fp8": fp8, "dtype": torch.float32}
    rows = [decode(600), Row(90, 700), Row(130, 1000), Row(40, 40)]
    check_shadow(backend(shadow_rate=0.5, **own), backend(**own), rows)


@CPU
def test_where_lists_hold_nearly_everything_there_is_hardly_an_error(backend):
    made = backend(shadow_rate=0.5, dtype=torch.float32)
    _, _, error, rows = shadowed(made, made.step([Row(130, 1000)]))
    assert rows > 0
    assert error / rows < 0.05


@CPU
def test_no_rows_without_sparse_queries(backend):
    made = backend(shadow_rate=1.0, sparsity_budget=0.1, min_context=900)
    assert made.attend(made.step([Row(130, 1000)]))[1].shadow is not None
    _, plan = made.attend(made.step([Row(100, 800), decode(950)]))
    assert plan is None or plan.shadow is None


def test_a_plan_of_another_cache_group_has_its_blocks():
    rows, tokens = torch.tensor([0, 2]), torch.tensor([1, 9])
    part = shadow.ShadowPart(rows, tokens, "metadata")
    table, slots = torch.arange(6).reshape(3, 2), torch.arange(10) * 10
    updated = part.updated(lambda *given: given, table, slots)
    metadata, own_table, own_slots = updated.metadata
    assert metadata == "metadata"
    assert (own_table.tolist(), own_slots.tolist()) == ([[0, 1], [4, 5]], [10, 90])


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The error sums that guards read, and a folder that their workers share."""
    sums = [0, 0]
    worker = SimpleNamespace(sums=lambda names: list(sums), folder=lambda: tmp_path)
    monkeypatch.setattr(metrics, "worker", worker)
    return sums


def add(sums, error, rows):
    sums[0] += round(error * rows / ERROR_UNIT)
    sums[1] += rows


def test_the_limit_is_compared_with_enough_queries_of_late(measured, caplog):
    guard = shadow.Guard()
    add(measured, 0.9, 999)
    assert not guard.check(0.3), "too few"
    add(measured, 0.1, 99_000)
    assert not guard.check(0.3)
    add(measured, 0.31, 1000)
    assert not guard.check(0), "no limit"
    with caplog.at_level(logging.WARNING, "vllm.s2o"):
        assert guard.check(0.3), "the mean of all would be below"
        add(measured, 0.0, 10_000)
        assert guard.check(0.3), "for good"
    (record,) = caplog.records
    assert record.message == (
        "S2O: sparse attention differs from dense by 0.310 in the mean of the last 1000 sampled "
        "queries, more than shadow_limit 0.3: all prefill stays dense until the server is restarted"
    )


def test_other_workers_follow_and_say_nothing(measured, caplog):
    guards = [shadow.Guard() for _ in range(3)]
    add(measured, 0.5, 1000)
    with caplog.at_level(logging.WARNING, "vllm.s2o"):
        assert guards[0].check(0.3)
        measured[:] = [0, 0]
        assert guards[1].check(0.3)
        add(measured, 0.5, 1000)
        assert guards[2].check(0.3), "at the same time"
    assert len(caplog.records) == 1


def test_the_word_of_an_earlier_server_counts_for_nothing(measured, tmp_path, caplog):
    marker = tmp_path / shadow.MARKER
    marker.touch()
    os.utime(marker, (1, 1))
    guard = shadow.Guard()
    assert not guard.check(0.3)
    add(measured, 0.5, 1000)
    assert guard.check(0.3)
    assert len(caplog.records) == 1
    assert marker.stat().st_mtime > 1, "the others of this server see it"


def test_without_a_folder_a_worker_goes_by_its_own_sample(measured, monkeypatch):
    monkeypatch.setattr(metrics.worker, "folder", lambda: None)
    guard = shadow.Guard()
    assert not guard.check(0.3)
    add(measured, 0.5, 1000)
    assert guard.check(0.3)


@CPU
def test_beyond_the_limit_every_chunk_is_dense(backend, monkeypatch):
    made = backend(sparsity_budget=0.1, shadow_rate=0.5, shadow_limit=0.3)
    step = made.step([Row(130, 1000), decode(600)])
    before = metrics.worker.totals()["s2o:dense_rows", "shadow_limit"]
    assert made.attend(step)[1] is not None
    guard = shadow.Guard()
    guard.reached = True
    monkeypatch.setattr(shadow, "guard", guard)
    output, plan = made.attend(step)
    assert plan is None
    assert metrics.worker.totals()["s2o:dense_rows", "shadow_limit"] == before + 1
    assert torch.equal(output, backend(stock_only=True).attend(step)[0])


def test_a_limit_needs_a_sample():
    with pytest.raises(ConfigError, match=r"shadow_limit is 0\.3, must be 0 with shadow_rate 0"):
        resolve({"shadow_limit": 0.3}, None, {})
    assert resolve({"shadow_limit": 0.3, "shadow_rate": 0.1}, None, {}).shadow_limit == 0.3
