"""The result file: a header that says what was measured, and one row a measurement."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2o_vllm.benchmarks.result_file import header as local_header

from .arms import LoadTestError
from .bench import COLD, ROW_KEY
from .server import Server

SAME = ("device", "torch", "triton", "vllm", "commit")  # what appended rows must share


def percentile(values: Sequence[float], share: int) -> float | None:
    """Return a percentile in ms, of seconds; None of nothing."""
    if len(values) < 2:
        return round(1000 * values[0], 3) if values else None
    return round(1000 * statistics.quantiles(values, n=100, method="inclusive")[share - 1], 3)


def header(servers: list[Server], device: str | None) -> dict[str, Any]:
    """Return the result file's header.

    The server's word comes first; what it does not say is taken from this machine, which is
    right when the server runs here.
    """
    said = {key: _said(servers, key) for key in ("device", "torch", "triton", "vllm")}
    said["device"] = device or said["device"]
    return local_header() | {key: value for key, value in said.items() if value}


def load_rows(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that new ones are appended to; none if there is no file.

    Raises:
        LoadTestError: if the file is no result file, or was measured on something else.
    """
    if not path.exists():
        return []
    try:
        old = json.loads(path.read_text())
        rows = [dict(row) for row in old["rows"]]
    except (ValueError, KeyError, TypeError):
        raise LoadTestError(f"--append: {path} is not a load test's result file") from None
    for key in SAME:
        if old.get(key) != head[key]:
            raise LoadTestError(
                f"--append: {path} was measured with {key} {old.get(key)!r} and this is "
                f"{head[key]!r}: name another --output"
            )
    return rows


def add_row(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with a new one, in place of an earlier measurement of the same."""

    def key(row: dict[str, Any]) -> list[Any]:
        known = {
            "model": new["model"],
            "trace": COLD,
        } | row  # rows of earlier versions name neither
        return [known.get(name) for name in ROW_KEY]

    return [old for old in rows if key(old) != key(new)] + [new]


def _said(servers: list[Server], key: str) -> str | None:
    """Join what the servers say; several answers mean that the arms differ in it."""
    values = dict.fromkeys(value for server in servers if (value := getattr(server, key)))
    return " / ".join(values) or None
