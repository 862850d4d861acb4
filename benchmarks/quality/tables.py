"""Tables of result files, in Markdown: what the commands print and the quality report holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .ruler_questions import END, START
from .samples import EvalError, Row

Result = dict[str, Any]
DENSE = 1.0
ALL = "all"  # the distance of rows over all far tokens
OLDER: Row = {"question": END, "setting": ""}  # what rows of older files do not say


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
    """Return a number with ``digits`` decimals, ``-`` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def bounds(row: Row, names: Sequence[str], digits: int, signed: bool = False) -> str:
    """Return ``value [low, high]`` of three of a row's fields, ``-`` where they are null."""
    values = [row.get(name) for name in names]
    if values[0] is None:
        return "-"
    texts = [f"{v:{'+' if signed else ''}.{digits}f}" for v in values if v is not None]
    return texts[0] if len(texts) < 3 else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def ruler_tables(result: Result | None) -> str:
    """Return RULER's scores: a table for each run of a server, tasks by budgets, means last."""
    parts = []
    run = ("model", "context", "question", "backend", "setting")
    for (model, context, question, backend, setting), rows in _groups(result, *run).items():
        budgets = sorted({row["budget"] for row in rows}, reverse=True)
        columns = [column(backend, one) for one in budgets]
        sparse = [one for one in budgets if one != DENSE]
        head = ["task", *columns, *(f"{column(backend, one)} less dense" for one in sparse)]
        lines = []
        for task in dict.fromkeys(row["task"] for row in rows):
            own = {row["budget"]: row for row in rows if row["task"] == task}
            scores = [bounds(own.get(one, {}), ("score", "low", "high"), 1) for one in budgets]
            names = ("difference", "difference_low", "difference_high")
            scores += [bounds(own.get(one, {}), names, 1, signed=True) for one in sparse]
            lines.append([f"**{task}**" if task == "mean" else task, *scores])
        means = [row for row in rows if row["task"] == "mean"]
        notes = "; ".join(
            f"{column(backend, row['budget'])}: {row['samples']} answers over "
            f"{row.get('tasks', '?')} tasks, {row['failed']} refused"
            + (f", density {row['density']:.3f}" if row["density"] is not None else "")
            for row in means
        )
        place = f"{model}, {context:,} tokens"
        place += ", question before the text" if question == START else ""
        place += f", {setting}" if setting else ""
        parts.append(f"{place}. {notes}.\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def fidelity_tables(result: Result | None) -> str:
    """Return nats lost on far tokens, by distance, and agreement: a line for each budget."""
    parts = []
    for (model, context, what), rows in _groups(result, "model", "context", "what").items():
        arms = list(
            dict.fromkeys((row["source"], row["setting"], row["budget"]) for row in rows)
        )  # fmt: skip
        distances = sorted(
            {row["distance"] for row in rows if "distance" in row},
            key=lambda one: (one != ALL, one),
        )
        lines = []
        for arm in arms:
            own = [row for row in rows if (row["source"], row["setting"], row["budget"]) == arm]
            line = [", ".join(filter(None, (arm[1], column(own[0]["backend"], arm[2]))))]
            by_distance = {row.get("distance"): row for row in own}
            if distances:
                line += [_lost(by_distance.get(one)) for one in distances]
                line += [f"{own[0]['windows']} of {arm[0]}"]
            else:
                prefix = ("prefix", "prefix_low", "prefix_high")
                line += [
                    bounds(own[0], ("value", "low", "high"), 2),
                    bounds(own[0], prefix, 1), str(own[0]["samples"]),
                ]  # fmt: skip
            lines.append([*line, str(own[0]["failed"]), number(own[0]["density"], 3)])
        head = [""]
        if distances:
            head += [f"within {one:,}" if one != ALL else "all far tokens" for one in distances]
            head += ["windows"]
        else:
            head += ["share", "common tokens", "answers"]
        title = f"{what}, {model}, {context:,} tokens"
        parts.append(f"{title}:\n\n{table([*head, 'refused', 'density'], lines)}")
    return "\n\n".join(parts)


def _lost(row: Row | None) -> str:
    """Return nats lost with bounds, and over how many tokens."""
    if row is None:
        return "-"
    return f"{bounds(row, ('value', 'low', 'high'), 3, signed=True)} ({row['samples']})"


def needle_share(rows: Sequence[Row]) -> float | None:
    """Return the share of the needles' probability that lists hold; None without needles."""
    probability = sum(row["probability"] for row in rows)
    return sum(row["held"] for row in rows) / probability if probability else None


def needle_table(result: Result | None) -> str:
    """Return the recall of needles: a line a method, a column a text and budget, in percent."""
    parts = []
    for (model, context), rows in _groups(result, "model", "context").items():
        columns = sorted({(row["text"], row["budget"]) for row in rows})
        lines = [
            [
                f"{method}, {unit}",
                *(
                    number(None if share is None else 100 * share, 1)
                    for share in (
                        needle_share([row for row in own if (row["text"], row["budget"]) == column])
                        for column in columns
                    )
                ),
            ]
            for (method, unit), own in _groups({"rows": rows}, "method", "unit").items()
        ]
        first = rows[0]
        found = sum(
            row["needles"]
            for row in rows
            if (row["method"], row["unit"], row["budget"])
            == (first["method"], first["unit"], first["budget"])
        )
        head = ["", *(f"{text}, {100 * budget:g} %" for text, budget in columns)]
        parts.append(f"{model}, {context:,} tokens, {found} needles:\n\n{table(head, lines)}")
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
                + (f"{row['setting']}, " if row.get("setting") else "")
                + column(row["backend"], row["budget"]),
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
        row = OLDER | row
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def column(backend: str, budget: float) -> str:
    """Return the heading of a budget's numbers."""
    if budget == DENSE:
        return "dense" if backend == "s2o" else backend
    return f"{backend}, budget {budget:g}"
