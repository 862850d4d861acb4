"""Every request of a replay, one JSON line each: what rows are made of, and where to go on."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arms import LoadTestError

Record = dict[str, Any]
PART = ("load", "round", "arm")  # what tells parts apart


@dataclass
class Log:
    """The file of a replay's requests.

    A part is a round of a load on one arm. It is written when it is complete; what an interrupted
    one measured is measured again.

    Attributes:
        path: of the file.
        plan: settings that must be the same to go on.
        parts: complete parts, each with its requests, by load, round and arm.
    """

    path: Path
    plan: Record
    parts: dict[tuple[int, int, int], Record] = field(default_factory=dict)

    def begin(self) -> None:
        """Start a new file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"plan": self.plan}) + "\n")

    def resume(self) -> None:
        """Read the complete parts of an earlier run.

        Raises:
            LoadTestError: if the file is none, or its plan is another.
        """
        if not self.path.exists():
            self.begin()
            return
        try:
            first, *lines = self.path.read_text().splitlines()
            plan = json.loads(first)["plan"]
            records = [json.loads(line) for line in _complete(lines)]
        except (ValueError, KeyError, TypeError):
            raise LoadTestError(f"--resume: {self.path} is no log of a replay") from None
        for key, value in self.plan.items():
            if plan.get(key) != value:
                raise LoadTestError(
                    f"--resume: {self.path} was measured with {key} {plan.get(key)!r} and this is "
                    f"{value!r}: name another --output"
                )
        self.begin()  # without a last line that was cut off
        for record in records:
            self.add(record)

    def add(self, part: Record) -> None:
        """Append a complete part."""
        with self.path.open("a") as file:
            file.write(json.dumps(part) + "\n")
        self.parts[self._key(part)] = part

    @staticmethod
    def _key(part: Record) -> tuple[int, int, int]:
        load, number, arm = (int(part[name]) for name in PART)
        return load, number, arm


def _complete(lines: list[str]) -> Iterable[str]:
    """Return the lines without a last one that an interruption cut off."""
    if lines:
        try:
            json.loads(lines[-1])
        except json.JSONDecodeError:
            return lines[:-1]
    return lines
