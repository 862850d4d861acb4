"""Rules of the house that a parser can check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A place in a table that kernels read, by number where `kernels/layout.py` has a name.
BY_NUMBER = re.compile(r"\b(p_item|ITEM_COLUMNS|p_counters|p_append|p_fit) \+ \d")


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
    files = sorted((ROOT / "kernels").glob("*.py"))
    assert any("p_item + HISTORY" in path.read_text() for path in files), "the pattern still fits"
    assert [path.name for path in files if BY_NUMBER.search(path.read_text())] == []
