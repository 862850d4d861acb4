"""Raw answers, one JSON line each as they come: what a file holds is not asked again."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Row = dict[str, Any]
SAME = ("device", "torch", "triton", "vllm", "commit")  # what one file's answers must share


DENSE = 1.0  # the budget of dense attention
T = TypeVar("T")


class EvalError(Exception):
    """The evaluation cannot go on; the message is one sentence for the user."""


class Samples:
    """The raw file of an evaluation.

    The first line is ``{"header": …}`` (see `report.header`). A line with ``error`` is a refusal
    and is asked again; a line with ``counters`` holds S2O's history counters of a run.

    Attributes:
        path: the file; made with the first row.
        key: names of the fields that tell two questions apart.
        defaults: fields that lines of an older file lack.
        rows: the latest line of every question.
        counters: all lines with ``counters``.
        head: the header, the file's own where it has one.
    """

    def __init__(self, path: Path, head: Row, key: tuple[str, ...], defaults: Row | None = None):
        """Read what the file holds.

        Raises:
            EvalError: if it is not such a file, or was measured on something else.
        """
        self.path, self.key, self.defaults = path, key, defaults or {}
        self.counters: list[Row] = []
        self._latest: dict[tuple[Any, ...], Row] = {}
        lines = self._read()
        self.head = lines[0]["header"] if lines else head
        for name in SAME:
            if self.head.get(name) != head[name]:
                raise EvalError(
                    f"{path} was measured with {name} {self.head.get(name)!r} and this is "
                    f"{head[name]!r}: name another --samples-file"
                )
        try:
            for row in lines[1:]:
                self._keep(row)
        except (KeyError, TypeError):
            raise EvalError(f"{path} does not hold this command's samples") from None

    @property
    def rows(self) -> list[Row]:
        """Answers and refusals, the latest of every question."""
        return list(self._latest.values())

    def answered(self, row: Row) -> bool:
        """Say whether the question of a row has its answer."""
        known = self._latest.get(self._identity(row))
        return known is not None and "error" not in known

    def of(self, questions: Iterable[Row]) -> list[Row]:
        """Return the latest lines of these questions, in their order, where there are any."""
        identities = map(self._identity, questions)
        return [self._latest[one] for one in identities if one in self._latest]

    def add(self, row: Row) -> None:
        """Keep a row, on disk before this returns."""
        self._keep(row)
        lines = [json.dumps(row)]
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines.insert(0, json.dumps({"header": self.head}))
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))

    def _keep(self, row: Row) -> None:
        row = {**self.defaults, **row}
        if "counters" in row:
            self.counters.append(row)
        else:
            self._latest[self._identity(row)] = row

    def _identity(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)

    def _read(self) -> list[Row]:
        """Return the lines; one that an interruption left unfinished is taken off the file."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            if not lines or not isinstance(lines[0]["header"], dict):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise EvalError(f"{self.path} is not a file of samples") from None
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                os.truncate(file.fileno(), len(whole))
        return lines


def dense_of(groups: Mapping[tuple[Any, ...], T], key: tuple[Any, ...]) -> T | None:
    """Return the dense group that a group is compared with, None for a dense one itself.

    Args:
        groups: by keys that end with setting and budget.
        key: of the group; without dense answers of its setting those of the empty one count.
    """
    *others, setting, budget = key
    if budget == DENSE:
        return None
    return groups.get((*others, setting, DENSE)) or groups.get((*others, "", DENSE))
