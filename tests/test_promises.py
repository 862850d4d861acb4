"""docs/promises.md names tests: they are there, and each promise says how it was seen to fail."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
IN_TEXT = re.compile(r"`(test_\w+|tests/[\w/]+\.py)`")
TABLE = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (ROOT / "docs" / "promises.md").read_text().splitlines()
    if line.startswith("|")
][2:]


def functions(path):
    """Names of the tests of a file."""
    tree = ast.parse(path.read_text())
    return {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_the_table_is_read():
    assert len(TABLE) > 20
    assert {len(row) for row in TABLE} == {3}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0][:40])
def test_a_promise_names_tests_that_are_there_and_how_they_failed(row):
    _, tests, failed = row
    named = NAMED.findall(tests)
    assert named
    assert len(named) == tests.count("`") // 2, "each as `file::name`"
    for file, name in named:
        assert name in functions(ROOT / file), f"{file} has no {name}"
    assert len(failed) > 10


@pytest.mark.parametrize("document", ["SECURITY.md", "docs/features.md", "docs/compatibility.md"])
def test_every_test_that_a_document_names_is_there(document):
    names = set(IN_TEXT.findall((ROOT / document).read_text()))
    assert names
    known = set().union(*(functions(path) for path in (ROOT / "tests").rglob("test_*.py")))
    for name in names:
        assert (ROOT / name).is_file() if name.endswith(".py") else name in known, name
