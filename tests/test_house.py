"""Rules of the house that a parser can check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A place in a table that kernels read, by number where `kernels/layout.py` has a name.
BY_NUMBER = re.compile(r"\b(p_item|ITEM_COLUMNS|SEGMENT_COLUMNS|p_counters|p_append|p_fit) \+ \d")


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize(("folder", "foreign"), [("kernels", "vllm"), ("s2o_vllm", "triton")])
def test_each_side_keeps_to_its_library(folder, foreign):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 10
    assert [path.name for path in files if foreign in imported(path)] == []


def test_kernels_name_the_columns_of_tables():
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert any("p_item + HISTORY" in path.read_text() for path in files), "the pattern still fits"
    assert [path.name for path in files if BY_NUMBER.search(path.read_text())] == []


def test_one_module_knows_of_research():
    """A wheel has no `benchmarks/research`: what it holds must do without."""
    others = [
        ROOT / "s2o_vllm",
        ROOT / "deploy",
        ROOT / "benchmarks/speed",
        ROOT / "benchmarks/quality",
    ]
    files = [path for folder in others for path in folder.rglob("*.py")]
    knowing = {
        path.name for path in files if re.search(r"import.*research|\.research ", path.read_text())
    }
    assert knowing == {"methods.py"}


def test_one_module_starts_servers():
    own = ROOT / "s2o_vllm/cli/server_process.py"
    folders = [ROOT / "s2o_vllm", ROOT / "benchmarks", ROOT / "deploy", ROOT / "tests"]
    files = [path for folder in folders for path in folder.rglob("*.py") if path.parts[-2] != "cli"]
    starting = re.compile(r"Popen\(|wait_until_\w+\(server, url|\"--port\", str\(port\)")
    assert starting.search(own.read_text()), "the pattern still fits"
    allowed = {"test_counter_files.py", "test_house.py", "test_soak.py"}  # these start none
    assert {path.name for path in files if starting.search(path.read_text())} - allowed == set()
