"""Result file: rows with the machine and versions that made them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..result_file import header

Row = dict[str, Any]
MEASURED = {
    "density", "relative_mse", "dropped_mass", "dropped_mass_max", "attention_ms",
    "commit", "device",
}  # fmt: skip


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a result file, none where there is no file."""
    if not path.is_file():
        return []
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a result file whole, one row a line.

    The header is that of the last run; a row's own ``commit`` and ``device`` are where it was made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps(header(), indent=1)[:-2]
    partial = path.with_suffix(".part")
    partial.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    partial.rename(path)


def identity(row: Row) -> str:
    """Return what tells a row from others: all of it but what was measured."""
    return json.dumps({k: v for k, v in row.items() if k not in MEASURED}, sort_keys=True)


def mean_over(rows: Sequence[Row], keys: Sequence[str], value: str) -> dict[tuple[Any, ...], float]:
    """Average a value over rows that agree on some keys."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row[value])
    return {key: sum(values) / len(values) for key, values in groups.items()}
