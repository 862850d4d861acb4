"""What is released: a wheel and a source distribution, installed where nothing of us was."""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
WHEEL, SOURCE = f"s2o_vllm-{VERSION}-py3-none-any.whl", f"s2o_vllm-{VERSION}.tar.gz"
BUILD = "import sys; from setuptools import build_meta as b; b.build_{}(sys.argv[1])"


def run(*words, **options):
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def tree(target: Path) -> Path:
    """The tracked files of this checkout: what was built here before must not help."""
    names = run("git", "-C", ROOT, "ls-files", "-z").split("\0")
    for name in filter(None, names):
        if not name.startswith(("benchmarks/results/", "tests/")) and (ROOT / name).exists():
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    run(sys.executable, "-c", BUILD.format("sdist"), folder, cwd=tree(folder / "tree"))
    return folder / SOURCE


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """The wheel of the source distribution, not of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / SOURCE.removesuffix(".tar.gz")
    run(sys.executable, "-c", BUILD.format("wheel"), folder, cwd=unpacked)
    return folder / WHEEL


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """An environment with vLLM and without us, in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Its packages are seen, and no `.pth` file among them is read: no editable installation.
    (site / "vllm.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    return python


def ask(python: Path, code: str, tmp_path: Path) -> str:
    return run(python, "-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})


@pytest.mark.slow
def test_source_and_wheel_hold_what_they_should(source, wheel):
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "README.md", "LICENSE", "s2o_vllm/status_page.html"}
    assert needed | {"kernels/prefill.py", "deploy/loadtest/replay/run.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks/results", ".git"))]
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        top = {name.split("/")[0] for name in files}
    assert top == {"s2o_vllm", f"s2o_vllm-{VERSION}.dist-info"}, "nothing named kernels or deploy"
    assert {"s2o_vllm/status_page.html", "s2o_vllm/loadtest/replay/run.py"} <= files
    assert any(name.endswith("licenses/LICENSE") for name in files)


@pytest.mark.slow
def test_the_wheel_works_beside_vllm_in_a_clean_environment(clean, tmp_path):
    place = ask(clean, "import s2o_vllm; print(s2o_vllm.__file__, s2o_vllm.__version__)", tmp_path)
    assert str(clean.parents[1]) in place, "not this checkout"
    assert place.split()[1] == VERSION
    assert run(clean.parent / "s2o", "--version").strip() == f"s2o-vllm {VERSION}"
    found = json.loads(run(clean.parent / "s2o", "doctor", "--json", cwd=tmp_path))
    assert found["versions"]["vllm"]
    assert found["plugin"] is True
    modules = ask(clean, (
        "import importlib, pkgutil, s2o_vllm\n"
        "names = [m.name for m in pkgutil.walk_packages(s2o_vllm.__path__, 's2o_vllm.')]\n"
        "names = [n for n in names if not n.endswith('__main__')]\n"
        "[importlib.import_module(n) for n in names if 'backend_cuda' not in n]\n"
        "print(len(names))"
    ), tmp_path)  # fmt: skip
    assert int(modules.split()[-1]) > 100
    flags = ask(clean, (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "words = ['--attention-backend', 's2o', '--s2o-sparsity-budget', '0.2']\n"
        "args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)\n"
        "print(args.additional_config)"
    ), tmp_path)  # fmt: skip
    assert "{'s2o_flags': {'sparsity_budget': 0.2}}" in flags


def sbom_module():
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "deploy/sbom.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def some_wheel(folder: Path, *required: str) -> Path:
    path = folder / WHEEL
    lines = [
        "Name: s2o-vllm",
        f"Version: {VERSION}",
        "Summary: x",
        "License-Expression: Apache-2.0",
    ]
    with zipfile.ZipFile(path, "w") as archive:
        text = "\n".join([*lines, *(f"Requires-Dist: {one}" for one in required), "", ""])
        archive.writestr(f"s2o_vllm-{VERSION}.dist-info/METADATA", text)
    return path


def test_the_bill_of_materials_names_the_wheel_by_its_hash(tmp_path):
    wheel, out = some_wheel(tmp_path, "openai; extra == 'bench'"), tmp_path / "sbom.json"
    base = "docker.io/vllm/vllm-openai:v0.32.0@sha256:00"
    assert sbom_module().main([str(wheel), "--base", base, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    ours, below = found["components"]
    assert ours["purl"] == f"pkg:pypi/s2o-vllm@{VERSION}"
    assert ours["hashes"][0]["content"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert (below["name"], below["version"]) == ("docker.io/vllm/vllm-openai", "v0.32.0")
    known = {one["bom-ref"] for one in found["components"]} | {"image"}
    assert {
        ref for one in found["dependencies"] for ref in [one["ref"], *one["dependsOn"]]
    } <= known


def test_a_wheel_that_brings_packages_has_no_bill_of_materials(tmp_path):
    with pytest.raises(SystemExit, match="depends on torch, must add nothing"):
        sbom_module().sbom(some_wheel(tmp_path, "torch"), "base:1")


def test_the_version_stands_in_one_place_and_its_copies_agree():
    image = re.search(r"^ARG VERSION=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)[1]
    assert image == VERSION
    assert not re.search(r"\d+\.\d+\.\d+", (ROOT / "s2o_vllm/__init__.py").read_text())
