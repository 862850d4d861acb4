"""The self-test passes where attention is right, and says in one sentence where it is not."""

import pytest
import torch

from backends import Backend
from s2o_vllm import self_test
from s2o_vllm.kernels import prefill
from s2o_vllm.kernels.attention import attend
from s2o_vllm.kernels.attention import reference as attention_reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def run_anew():
    """A pass is remembered: not from test to test."""
    self_test.run.cache_clear()
    yield
    self_test.run.cache_clear()


def spoil(monkeypatch, module, factor):
    """Let attention be a little too large."""
    right = module.attend

    def wrong(query, kv_cache, block_table, work, selected, summaries, out, *others, **options):
        right(query, kv_cache, block_table, work, selected, summaries, out, *others, **options)
        out *= factor

    monkeypatch.setattr(module, "attend", wrong)


def test_a_cpu_passes():
    assert "S2O agrees with dense attention on the CPU" in self_test.run(CPU)


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_a_wrong_output_is_one_sentence(monkeypatch, factor):
    spoil(monkeypatch, attention_reference, factor)
    wanted = (
        "S2O computes wrong attention on the CPU: with head_dim 64, bfloat16 and all tokens "
        rf"the relative error is ({factor - 1:.2g}|0\.05\d*), must be at most 0\.015"
    )
    with pytest.raises(self_test.SelfTestError, match=wanted):
        self_test.run(CPU)


def test_a_kernel_that_does_not_run_is_one_sentence(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available\nand much more")

    monkeypatch.setattr(attention_reference, "attend", broken)
    wanted = (
        "S2O's kernels do not run on the CPU: with head_dim 64, bfloat16 RuntimeError: "
        "no kernel image is available$"
    )
    with pytest.raises(self_test.SelfTestError, match=wanted):
        self_test.run(CPU)


def test_its_scratch_is_released():
    before = dict(prefill._workspaces)
    self_test.run(CPU)
    assert prefill._workspaces == before


class WithKernels(prefill.SparsePrefill):
    """What a card has: here the kernels run in the interpreter."""

    def __init__(self, shape, dtype, device, **options):
        super().__init__(shape, dtype, device, **options)
        self.space = prefill.workspace(shape, dtype, device)


@pytest.fixture
def kernels(monkeypatch):
    """Run the kernels over a history with one region; return a case that they can compute."""
    monkeypatch.setattr(prefill, "SparsePrefill", WithKernels)
    for name, value in (("CONTEXT", 1104), ("NEEDLE", 700), ("QUERIES", 16)):
        monkeypatch.setattr(self_test, name, value)
    return self_test.Case(64, torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPUs")
def test_the_kernels_pass(kernels):
    before = dict(prefill._workspaces)
    self_test.check(kernels, CPU)
    assert prefill._workspaces == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPUs")
def test_a_kernel_that_forgets_the_summaries_is_found(monkeypatch, kernels):
    right = attend.attend

    def wrong(query, kv_cache, block_table, work, selected, summaries, *others, **options):
        forgotten = selected._replace(left=None)
        right(query, kv_cache, block_table, work, forgotten, summaries, *others, **options)

    monkeypatch.setattr(attend, "attend", wrong)
    with pytest.raises(self_test.SelfTestError, match=r"a budget of 0\.1 the relative error is"):
        self_test.check(kernels, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPUs")
def test_a_ranking_that_finds_nothing_is_found(monkeypatch, kernels):
    from s2o_vllm.kernels.selection import select

    right = select.select

    def worst(block_table, work, page, selection, *others, **options):
        selection.scores.neg_().clamp_(max=0)
        right(block_table, work, page, selection, *others, **options)

    monkeypatch.setattr(select, "select", worst)
    with pytest.raises(self_test.SelfTestError, match="one token that every query wants"):
        self_test.check(kernels, CPU)


def start(model, **settings):
    """Make a worker's builder, as a server does when it starts."""
    from s2o_vllm.backend_cpu import S2OCPUBackend

    return Backend(
        S2OCPUBackend, model, heads=4, kv_heads=2, head_dim=64, page=32, dtype=torch.bfloat16,
        device="cpu", settings=settings,
    )  # fmt: skip


def test_a_server_that_is_asked_to_does_not_start_on_a_wrong_device(monkeypatch, tiny_model):
    spoil(monkeypatch, attention_reference, 1.05)
    start(tiny_model)  # off by default
    with pytest.raises(self_test.SelfTestError, match="S2O computes wrong attention on the CPU"):
        start(tiny_model, self_test=True)


def test_a_server_that_is_asked_to_starts_where_attention_is_right(tiny_model):
    start(tiny_model, self_test=True)
    assert self_test.run.cache_info().currsize == 1
