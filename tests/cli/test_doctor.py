import json
import sys

import pytest

from s2o_vllm import self_test
from s2o_vllm.cli import doctor

torch = pytest.importorskip("torch")


@pytest.fixture
def healthy(monkeypatch):
    """An environment in which S2O runs on the CPU, whatever is really installed."""
    monkeypatch.setattr(doctor.compat, "vllm_version", lambda: "0.32.0+cpu")
    monkeypatch.setattr(doctor.environment, "problems", list)
    monkeypatch.setattr(doctor.environment, "is_cpu_build", lambda: True)
    for name in list(doctor.os.environ):
        if name.startswith("S2O_") or name == "VLLM_PLUGINS":
            monkeypatch.delenv(name)


@pytest.fixture
def gpu(healthy, monkeypatch):
    """Replace the CPU by one GPU; return a function that sets its compute capability."""
    monkeypatch.setattr(doctor.environment, "is_cpu_build", lambda: False)
    monkeypatch.setattr(doctor.environment, "installed", lambda name: "9.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU")

    def set_capability(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return set_capability


def test_a_working_environment(healthy, capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "0.32.0+cpu (supported: 0.32 to 0.33)" in text
    assert "device" in text
    assert "S2O would run here" in text
    assert "visible to vLLM" in text
    assert "not visible" not in text


def test_the_self_test_is_run(healthy, capsys):
    self_test.run.cache_clear()
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("self-test ")]
    assert "  S2O agrees with dense attention on the CPU (head_dim 64; " in line


def test_a_self_test_that_fails_is_a_reason(healthy, monkeypatch, capsys):
    def fail(device):
        raise self_test.SelfTestError(f"S2O computes wrong attention on {device}")

    monkeypatch.setattr(self_test, "run", fail)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "S2O would not run here:\n- S2O computes wrong attention on cpu.\n" in text


def test_every_gpu_is_tested(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(self_test, "run", lambda device: f"tested {device}")
    report = doctor.examine({})
    doctor._self_test(report)
    assert report.self_test == ["tested cuda:0.", "tested cuda:1."]


def test_json_holds_the_same(healthy, capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] is True
    assert report["reasons"] == []
    assert report["versions"]["vllm"] == "0.32.0+cpu"
    assert report["devices"][0]["kind"] == "cpu"
    assert report["settings"]["sparsity_budget"] == 0.1


def test_without_vllm(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor.compat, "vllm_version", lambda: None)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "S2O would not run here:" in text
    assert "found no vLLM: install vllm 0.32 to 0.33" in text
    assert "not installed (supported: 0.32 to 0.33)" in text


def test_with_an_unsupported_vllm(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor.compat, "vllm_version", lambda: "0.25.1")
    assert doctor.main(["--json"]) == 1
    (reason,) = json.loads(capsys.readouterr().out)["reasons"]
    assert "supports vLLM 0.32 to 0.33 and found 0.25.1" in reason


def test_without_torch(healthy, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["devices"] == []
    assert any(reason.startswith("PyTorch ") for reason in report["reasons"])


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("S2O_SPARSITY_BUDGET", "1.5", "must be a number greater than 0 and at most 1"),
        ("S2O_SPARSITY_BUDGET", "nan", "must be a number greater than 0 and at most 1"),
        ("S2O_STOP_THRESHOLD", "-1", "must be a number from 0 (off)"),
        ("S2O_MIN_CONTEXT", "many", "must be a whole number of tokens"),
    ],
)
def test_bad_environment_values_are_reasons(healthy, name, value, allowed):
    report = doctor.examine({name: value})
    assert report.variables == {name: "refused"}
    (reason,) = report.reasons
    assert name in reason
    assert value in reason
    assert allowed in reason


def test_good_and_unknown_environment_values(healthy):
    report = doctor.examine({"S2O_MIN_CONTEXT": "512", "S2O_BUDGET": "1", "S2O_METRICS_DIR": "x"})
    assert report.runs
    assert report.variables["S2O_MIN_CONTEXT"] == "valid"
    assert report.variables["S2O_BUDGET"].startswith("no such setting, ignored")
    assert "S2O_METRICS_DIR" not in report.variables
    assert report.settings["min_context"] == 512


@pytest.mark.parametrize(
    ("plugins", "runs"), [("other", False), ("", False), ("other,s2o", True), (None, True)]
)
def test_vllms_list_of_allowed_plugins(healthy, plugins, runs):
    report = doctor.examine({} if plugins is None else {"VLLM_PLUGINS": plugins})
    assert report.runs is runs
    assert runs or "VLLM_PLUGINS" in report.reasons[0]


def test_an_invisible_entry_point(healthy, monkeypatch):
    monkeypatch.setattr(doctor.environment, "entry_points", lambda group: [])
    report = doctor.examine({})
    assert not report.plugin
    assert "no entry point 's2o' in vllm.general_plugins" in report.reasons[0]


def test_a_gpu_shows_its_row_of_tiles(gpu):
    gpu(9, 0)
    report = doctor.examine({})
    assert report.runs
    (device,) = report.devices
    assert (device.kind, device.name, device.capability) == ("cuda", "Test GPU", "9.0")
    assert device.tiles[128] == "128x32, 8 warps, 3 stages"


def test_an_old_gpu_is_a_reason(gpu):
    gpu(7, 5)
    report = doctor.examine({})
    assert report.reasons == ["GPU 0 (Test GPU) has compute capability 7.5, must be 8.0 or newer."]


def test_a_gpu_without_triton(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(doctor.environment, "installed", lambda name: None)
    report = doctor.examine({})
    assert report.reasons == ["Triton is not installed: S2O's kernels need it on a GPU."]


def test_a_gpu_build_without_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = doctor.examine({})
    assert report.devices == []
    assert "PyTorch finds none" in report.reasons[0]
