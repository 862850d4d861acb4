"""Tables of result files, in Markdown: what the commands print and the quality report holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .samples import EvalError, Row

Result = dict[str, Any]
DENSE = 1.0


def read_result(path: Path) -> Result | None:
    """Return a result file's content, None where there is no file.

    Raises:
        EvalError: if it is not a result file.
    """
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(row, dict) for row in result["rows"]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise EvalError(f"{path} is not a result file") from None
    return dict(result)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def number(value: float | None, digits: int) -> str:
    """Return a number with so many decimals, ``-`` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def bounds(row: Row, names: Sequence[str], digits: int, signed: bool = False) -> str:
    """Return ``value [low, high]`` of three of a row's fields, ``-`` where they are null."""
    values = [row.get(name) for name in names]
    if values[0] is None:
        return "-"
    texts = [f"{v:{'+' if signed else ''}.{digits}f}" for v in values if v is not None]
    return texts[0] if len(texts) < 3 else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def ruler_tables(result: Result | None) -> str:
    """Return RULER's scores: for each model and context, tasks by budgets, means last."""
    parts = []
    for (model, context, backend), rows in _groups(result, "model", "context", "backend").items():
        budgets = sorted({row["budget"] for row in rows}, reverse=True)
        columns = [_column(backend, one) for one in budgets]
        sparse = [one for one in budgets if one != DENSE]
        head = ["task", *columns, *(f"{_column(backend, one)} less dense" for one in sparse)]
        lines = []
        for task in dict.fromkeys(row["task"] for row in rows):
            own = {row["budget"]: row for row in rows if row["task"] == task}
            scores = [bounds(own.get(one, {}), ("score", "low", "high"), 1) for one in budgets]
            names = ("difference", "difference_low", "difference_high")
            scores += [bounds(own.get(one, {}), names, 1, signed=True) for one in sparse]
            lines.append([f"**{task}**" if task == "mean" else task, *scores])
        means = [row for row in rows if row["task"] == "mean"]
        told = "; ".join(
            f"{_column(backend, row['budget'])}: {row['samples']} answers over "
            f"{row.get('tasks', '?')} tasks, {row['failed']} refused"
            + (f", density {row['density']:.3f}" if row["density"] is not None else "")
            for row in means
        )
        parts.append(f"{model}, {context:,} tokens. {told}.\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def perplexity_table(result: Result | None) -> str:
    """Return perplexities, a line for each model, text, context and budget."""
    if not result or not result["rows"]:
        return ""
    lines = []
    for row in result["rows"]:
        names = ("tail_difference", "tail_difference_low", "tail_difference_high")
        lines.append(
            [
                f"{row['model']}, {row['text']}, {row['context']:,} tokens, "
                f"{_column(row['backend'], row['budget'])}",
                number(row["perplexity"], 3),
                bounds(row, ("difference", "difference_low", "difference_high"), 4, signed=True),
                number(row["tail_perplexity"], 3),
                bounds(row, names, 4, signed=True),
                str(row["samples"]),
                str(row["failed"]),
                number(row["density"], 3),
            ]
        )
    head = [
        "", "perplexity", "nll less dense", "tail's perplexity", "tail's nll less dense",
        "windows", "refused", "density",
    ]  # fmt: skip
    return table(head, lines)


def _groups(result: Result | None, *names: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in result["rows"] if result else []:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _column(backend: str, budget: float) -> str:
    if budget == DENSE:
        return "dense" if backend == "s2o" else backend
    return f"{backend}, budget {budget:g}"
