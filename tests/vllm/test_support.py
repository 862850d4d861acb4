"""Every reason for which code takes the stock path stands in one table."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from s2o_vllm.support import DENSE_REASONS, NOT_FULL_ATTENTION, uncounted_workers

PACKAGE = Path(__file__).parents[2] / "s2o_vllm"
DECIDING = ("layer_reason", "dense_step_reason")  # functions that return a reason


def words(node: ast.AST) -> set[str]:
    """The text constants of an expression that can be its value."""
    if isinstance(node, ast.IfExp):
        return words(node.body) | words(node.orelse)
    if isinstance(node, ast.BoolOp):
        return set().union(*map(words, node.values))
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def reasons() -> set[str]:
    """What is assigned to a name that ends in `reason` or `NO_STATE`, or returned as one."""
    found: set[str] = set()
    for name in ("forward", "metadata", "step_plan", "support", "decode_slots"):
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in DECIDING:
                returns = [one for one in ast.walk(node) if isinstance(one, ast.Return)]
                found |= set().union(*(words(one.value) for one in returns if one.value))
            if isinstance(node, ast.Assign):
                targets = [ast.unparse(target) for target in node.targets]
                if any(target.endswith(("reason", "NO_STATE")) for target in targets):
                    found |= words(node.value)
    return found


def test_the_table_has_the_reasons_of_the_code_and_no_other():
    # "" is decode; without settings nothing is planned, so nothing is counted.
    assert reasons() - {"", "not_configured"} == set(DENSE_REASONS)


def test_layers_without_full_attention_are_among_them():
    assert set(NOT_FULL_ATTENTION) < set(DENSE_REASONS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, False),
        ({"data_parallel_size": 2, "data_parallel_size_local": 2}, False),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, True),
        ({"nnodes": 2}, True),
        # Each server has a page of its own, with its own workers.
        ({"data_parallel_size": 4, "data_parallel_external_lb": True}, False),
        ({"data_parallel_size": 4, "data_parallel_hybrid_lb": True}, False),
    ],
)
def test_workers_that_no_page_counts_are_said(changes, said):
    usual = {"nnodes": 1, "data_parallel_size": 1, "data_parallel_size_local": 1,
             "data_parallel_external_lb": False, "data_parallel_hybrid_lb": False}  # fmt: skip
    config = SimpleNamespace(parallel_config=SimpleNamespace(**usual | changes))
    assert (uncounted_workers(config) is not None) == said
