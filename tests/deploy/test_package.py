"""What a wheel holds: all that serves and measures, and no `benchmarks/research`."""

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESEARCH = "s2o_vllm.benchmarks.research"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of packages that a wheel would hold."""
    folder = tmp_path_factory.mktemp("build")
    steps = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", *steps]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "lib"


def test_every_package_is_listed_but_research():
    with open(ROOT / "pyproject.toml", "rb") as file:
        setup = tomllib.load(file)["tool"]["setuptools"]
    roots = {"s2o_vllm": "s2o_vllm", "kernels": "s2o_vllm.kernels"}
    roots |= {"benchmarks": "s2o_vllm.benchmarks", "deploy/loadtest": "s2o_vllm.loadtest"}
    there = set()
    for folder, name in roots.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder).parts
            there.add(".".join((name, *inside)))
    assert RESEARCH in there, "the rule still fits"
    wanted = {name for name in there if not f"{name}.".startswith(f"{RESEARCH}.")}
    assert set(setup["packages"]) == wanted == set(setup["package-dir"])


def test_a_wheel_holds_no_research_and_its_methods_do_without(built):
    files = {str(path.relative_to(built)) for path in built.rglob("*.py")}
    assert "s2o_vllm/kernels/attention/attend.py" in files
    assert "s2o_vllm/benchmarks/speed/attention.py" in files
    assert [name for name in files if "research" in name] == []
    code = (
        "from s2o_vllm.benchmarks.quality import methods, report; "
        "print(methods.__file__, list(methods.METHODS), list(methods.DEFAULTS)); "
        "methods.parse('pbs')"
    )
    # Without `site` no editable installation is found beside the built packages.
    paths = os.pathsep.join(
        [str(built), *(sysconfig.get_path(name) for name in ("purelib", "platlib"))]
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=built, env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split(maxsplit=1)[0].startswith(str(built)), done.stderr
    assert "['served', 'mean_query'] ['served']" in done.stdout
    assert "There is no method 'pbs'; there are served, mean_query (baselines need" in done.stderr
