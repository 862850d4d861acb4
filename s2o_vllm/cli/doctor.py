"""``s2o doctor``: what is installed, whether S2O would run here and, if not, why.

With a model: which of its layers go sparse, which stay dense and why, and how much sooner its first
token could come at best. Only its config is read.
"""

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import __version__, compat, config
from . import environment
from .model_report import LONGEST, ModelReport, examine_model
from .model_report import rows as model_rows

MIN_CAPABILITY = (8, 0)  # bfloat16, asynchronous copies, and vLLM's FlashAttention
OWN_VARIABLES = {"S2O_METRICS_DIR"}  # set by the server for its workers, not by users


@dataclass
class Device:
    """A device that S2O would use; ``tiles`` are its row of the kernels' table, by head_dim."""

    name: str
    kind: str
    capability: str | None = None
    tiles: dict[int, str] = field(default_factory=dict)


@dataclass
class Report:
    """What was found; S2O would run here if there are no ``reasons`` against it."""

    versions: dict[str, str | None]
    supported: str
    devices: list[Device] = field(default_factory=list)
    plugin: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    self_test: list[str] = field(default_factory=list)
    model: ModelReport | None = None

    @property
    def runs(self) -> bool:
        """Whether S2O would run here."""
        return not self.reasons


def examine(variables: Mapping[str, str]) -> Report:
    """Look at this environment.

    Args:
        variables: the environment variables.
    """
    first, last = (".".join(map(str, release)) for release in compat.SUPPORTED)
    report = Report(
        versions={
            "s2o-vllm": __version__,
            "vllm": compat.vllm_version(),
            "torch": environment.installed("torch"),
            "triton": environment.installed("triton"),
            "python": platform.python_version(),
        },
        supported=f"{first} to {last}",
    )
    if reason := compat.unsupported_version():
        report.reasons.append(reason)
    report.reasons += environment.problems()
    if reason := environment.plugin_problem(variables):
        report.reasons.append(reason)
    report.plugin = reason is None
    _examine_devices(report)
    _examine_settings(report, variables)
    return report


def _examine_devices(report: Report) -> None:
    try:
        import torch
    except ImportError as error:
        why = "is not installed" if error.name == "torch" else f"cannot be imported ({error})"
        report.reasons.append(f"PyTorch {why}: install it together with vLLM.")
        return
    except OSError as error:
        report.reasons.append(f"PyTorch cannot be loaded: {error}")
        return
    if torch.version.hip is not None:
        report.reasons.append("PyTorch is built for ROCm: S2O runs on NVIDIA GPUs and on the CPU.")
    elif environment.is_cpu_build() or not (torch.cuda.is_available() or report.versions["vllm"]):
        name = f"{platform.machine()}, {os.cpu_count()} cores"
        report.devices.append(Device(name, "cpu"))
    elif torch.cuda.is_available():
        report.devices += [_gpu(torch, index, report) for index in range(torch.cuda.device_count())]
        if report.versions["triton"] is None:
            report.reasons.append("Triton is not installed: S2O's kernels need it on a GPU.")
    else:
        report.reasons.append(
            "vLLM is built for a GPU and PyTorch finds none: check the driver with nvidia-smi, "
            f"or install {environment.CPU_DISTRIBUTION} in an environment of its own."
        )


def _gpu(torch: Any, index: int, report: Report) -> Device:
    name = torch.cuda.get_device_name(index)
    found = torch.cuda.get_device_capability(index)
    device = Device(name, "cuda", "{}.{}".format(*found))
    if found < MIN_CAPABILITY:
        report.reasons.append(
            f"GPU {index} ({name}) has compute capability {device.capability}, "
            "must be {}.{} or newer.".format(*MIN_CAPABILITY)
        )
        return device
    from ..kernels import tiles

    card = torch.device("cuda", index)
    for head_dim in tiles.head_dims(card):
        tile = tiles.attend_tile(head_dim, card)
        device.tiles[head_dim] = (
            f"{tile.block_m}x{tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"
        )
    return device


def _examine_settings(report: Report, variables: Mapping[str, str]) -> None:
    names = {config.ENV_PREFIX + key.upper(): key for key in config.FIELDS}
    for name in sorted(variables):
        if not name.startswith(config.ENV_PREFIX) or name in OWN_VARIABLES:
            continue
        if name not in names:
            report.variables[name] = f"no such setting, ignored (known: {', '.join(names)})"
            continue
        try:
            config.parse_text(names[name], variables[name])
            report.variables[name] = "valid"
        except config.ConfigError as error:
            report.variables[name] = "refused"
            report.reasons.append(f"The environment variable {name} is refused: {error}.")
    try:
        report.settings = config.resolve({}, None, variables).as_dict()
    except config.ConfigError as error:
        if "refused" not in report.variables.values():
            report.reasons.append(f"The settings in the environment are refused: {error}.")


def _self_test(report: Report) -> None:
    """Compare the kernels with their reference on every device; see :mod:`s2o_vllm.self_test`."""
    import torch

    from .. import self_test

    for index, device in enumerate(report.devices):
        place = torch.device(device.kind, index) if device.kind == "cuda" else torch.device("cpu")
        try:
            report.self_test.append(f"{self_test.run(place)}.")
        except self_test.SelfTestError as error:
            report.reasons.append(f"{error}.")


def as_text(report: Report) -> str:
    """Return the report for people."""
    rows = [(name, version or "not installed") for name, version in report.versions.items()]
    rows = [
        (name, f"{version} (supported: {report.supported})" if name == "vllm" else version)
        for name, version in rows
    ]
    rows.append(("plug-in", "visible to vLLM" if report.plugin else "not visible to vLLM"))
    for device in report.devices:
        capability = f", compute capability {device.capability}" if device.capability else ""
        rows.append(("device", f"{device.kind}: {device.name}{capability}"))
        rows += [("  tile", f"head_dim {dim}: {tile}") for dim, tile in device.tiles.items()]
        if device.kind == "cpu":
            rows.append(("  tile", "none: vectorised PyTorch, no Triton kernel"))
    for name, state in report.variables.items():
        rows.append((name, f"{os.environ.get(name, '')!r}: {state}"))
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items())
    if settings:
        rows.append(("settings", f"{settings} (unless flags say otherwise)"))
    rows += [("self-test", sentence) for sentence in report.self_test]
    rows += model_rows(report.model) if report.model else []
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:{width}}{text}" for name, text in rows]
    lines.append("")
    if report.runs:
        lines.append("S2O would run here: vllm serve MODEL --attention-backend s2o")
    else:
        lines.append("S2O would not run here:")
        lines += [f"- {reason}" for reason in report.reasons]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; the exit code is 0 if S2O would run here and 1 if not."""
    parser = argparse.ArgumentParser(
        prog="s2o doctor", description=__doc__.split(": ", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder with a config, or a name")
    add("--context", type=int, default=LONGEST, metavar="TOKENS",
        help="of the prompt whose arithmetic is counted (default: %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    if args.context < 1:
        parser.error(f"--context is {args.context}, must be at least 1")
    report = examine(os.environ)
    if report.runs:
        _self_test(report)
    if args.model and report.runs:
        report.model = examine_model(args.model, args.context)
        if report.model.refused:
            report.reasons.append(f"The model is refused: {report.model.refused}")
    if args.json:
        print(json.dumps({"runs": report.runs, **asdict(report)}, indent=2))
    else:
        print(as_text(report))
    return 0 if report.runs else 1
