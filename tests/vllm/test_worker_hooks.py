"""What a GPU worker does before it is ready, with workers that only record what they do."""

import logging
from types import SimpleNamespace

import pytest
import torch

from s2o_vllm import metrics, worker_hooks
from s2o_vllm.config import S2OConfig
from s2o_vllm.forward import SparseImpl
from s2o_vllm.kernels import compilations


class Layer(SparseImpl):
    """A layer that has been set up by hand."""

    def __init__(self, reason=None, warm=False, settings=None):
        self._s2o, self.s2o_reason = settings or S2OConfig(), reason
        self._s2o_warm, self._s2o_operator = warm, None


class Runner:
    """A model runner of which a batch with attention goes through the layers."""

    def __init__(self, layers):
        self.layers, self.runs = layers, []

    def _dummy_run(self, num_tokens, **options):
        self.runs.append((num_tokens, options))
        for layer in self.layers if options["force_attention"] else ():
            layer._s2o_warm = layer.s2o_reason is None


def worker(*layers, seqs=256, tokens=8192):
    context = {f"layers.{number}": SimpleNamespace(impl=one) for number, one in enumerate(layers)}
    context["layers.0.experts"] = SimpleNamespace()  # no attention
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=context),
        scheduler_config=SimpleNamespace(max_num_seqs=seqs, max_num_batched_tokens=tokens),
    )
    return SimpleNamespace(vllm_config=config, model_runner=Runner(layers))


def warm_up(one, **options):
    """The warm-up of a worker in which vLLM has run no batch with attention."""
    return worker_hooks._kernel_warmup(lambda worker, **_: "vLLM's", one, **options)


@pytest.mark.parametrize(("seqs", "tokens"), [(256, 16), (4, 4)])
def test_a_layer_compiles_before_the_server_is_ready(seqs, tokens):
    """As many tokens as requests: no chunk of prefill that would be counted."""
    one = worker(Layer(), Layer("alibi"), Layer(), seqs=seqs)
    assert len(worker_hooks.cold_layers(one.vllm_config)) == 2
    assert warm_up(one) == "vLLM's"
    ((count, options),) = one.model_runner.runs
    assert count == tokens
    assert options["cudagraph_runtime_mode"].name == "NONE"
    assert worker_hooks.cold_layers(one.vllm_config) == []


def test_where_vllm_has_run_such_a_batch_there_is_no_other():
    one = worker(Layer(warm=True), Layer("sliding_window"))
    warm_up(one)
    assert one.model_runner.runs == []


def test_no_batch_of_one_process_alone():
    """vLLM says when it warms up a single process: ranks would wait for one another."""
    one = worker(Layer())
    warm_up(one, process_local_only=True)
    assert one.model_runner.runs == []


@pytest.fixture
def gpu_worker(monkeypatch):
    """vLLM's module, as it is without us and again afterwards."""
    module = pytest.importorskip("vllm.v1.worker.gpu_worker")
    monkeypatch.setattr(module, "kernel_warmup", lambda worker, **_: None)
    monkeypatch.setattr(module.Worker, "compile_or_warm_up_model", lambda self: "times")
    monkeypatch.setattr(worker_hooks, "_watching", False)
    monkeypatch.setattr(compilations.knobs.runtime, "jit_post_compile_hook", None)
    return module


def compile_late(name, module="s2o_vllm.kernels.attend"):
    """What Triton does after it has compiled a kernel."""
    from triton.runtime.jit import JitFunctionInfo

    hook = compilations.knobs.runtime.jit_post_compile_hook
    return hook(key="", repr="", fn=JitFunctionInfo(module, name, None), compile={},
                is_manual_warmup=False, already_compiled=False)  # fmt: skip


def test_what_compiles_after_ready_is_counted_and_logged(gpu_worker, caplog):
    worker_hooks.install()
    worker_hooks.install()
    one = worker(Layer())
    gpu_worker.kernel_warmup(one)
    assert len(one.model_runner.runs) == 1
    assert compilations.knobs.runtime.jit_post_compile_hook is None, "until then all may compile"
    assert gpu_worker.Worker.compile_or_warm_up_model(one) == "times"
    before = metrics.worker.totals()["s2o:late_compilations", ""]
    with caplog.at_level(logging.WARNING, "vllm.s2o"):
        compile_late("fused_moe_kernel", "vllm.model_executor.layers.fused_moe")
        assert not caplog.records, "vLLM's own"
        compile_late("_attend_kernel")
    assert [record.message for record in caplog.records] == [
        "S2O: kernel _attend_kernel was compiled after the server was ready"
    ]
    assert metrics.worker.totals()["s2o:late_compilations", ""] == before + 1


def test_another_hook_of_triton_goes_on(gpu_worker):
    seen = []
    compilations.knobs.runtime.jit_post_compile_hook = lambda **told: seen.append(told["fn"].name)
    worker_hooks.ready(worker().vllm_config)
    compile_late("_attend_kernel")
    compile_late("another", "elsewhere")
    assert seen == ["_attend_kernel", "another"]


def test_layers_that_stay_cold_are_told(gpu_worker, caplog):
    with caplog.at_level(logging.WARNING, "vllm.s2o"):
        worker_hooks.ready(worker(Layer(), Layer(), Layer("alibi")).vllm_config)
    assert "2 layers have compiled no kernel" in caplog.text


def test_no_room_for_the_workspaces_is_one_sentence(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 1 GiB"
        )

    layer = Layer()
    monkeypatch.setattr(layer, "_reserve", full)
    with pytest.raises(RuntimeError) as refused:
        layer.reserve(torch.zeros(1))
    said = str(refused.value)
    assert said.startswith("s2o: no memory for the workspaces of sparse attention")
    assert said.endswith("CUDA out of memory. Tried to allocate 512.00 MiB")
    assert "--max-num-batched-tokens" in said
