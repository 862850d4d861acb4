"""Run the kernels' tests under compute-sanitizer, on a card: ``make test-gpu-sanitize``.

    python tests/support/sanitize.py [--tools memcheck,racecheck,initcheck] [pytest's arguments]

Kernels of PyTorch's are left out: their names are mangled, those of Triton's are not.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND = 86  # exit code of a tool that has found something; pytest has none of that number
ROOT = Path(__file__).parents[2]
# These launch nothing on the card.
LEFT_OUT = ("test_compile.py", "test_compilations.py", "test_work_list.py", "test_sampling.py")


def sanitizer() -> str | None:
    """Return the path of compute-sanitizer, or None."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    homes += map(str, sorted(Path("/usr/local").glob("cuda-*"), reverse=True))
    places = [str(Path(home) / "bin") for home in homes if home]
    # The package nvidia-cuda-sanitizer-api lies beside PyTorch's CUDA libraries.
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations or [] if nvidia else []
    places += [str(one) for root in folders for one in Path(root).glob("cu*/compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


def has_card() -> bool:
    """Tell whether there is a CUDA device."""
    import torch

    return torch.cuda.is_available()


def command(program: str, tool: str, tests: list[str]) -> list[str]:
    """Return the command that runs the tests under one tool.

    A tool makes a launch 10 to 100 times slower, so that no test has a time limit.
    """
    ignored = [f"--ignore=tests/kernels/{name}" for name in LEFT_OUT]
    return [
        program, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all",
        "--kernel-name-exclude", "kns=_Z", "--print-limit", "20",
        sys.executable, "-m", "pytest", "tests/kernels", *ignored, "-m", "not slow and not e2e",
        "-p", "no:xdist", "--timeout", "0", "-q", *tests,
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run every tool; return 0 if none has found anything, 2 if they cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tools", default=",".join(TOOLS), help="which ones, by comma")
    options, tests = parser.parse_known_args(arguments)
    program = sanitizer()
    if program is None:
        print(
            "sanitize: found no compute-sanitizer: install nvidia-cuda-sanitizer-api by pip, put "
            "its folder into PATH, or name the CUDA toolkit by CUDA_HOME",
            file=sys.stderr,
        )
        return 2
    if not has_card():
        print("sanitize: found no CUDA device", file=sys.stderr)
        return 2
    # Else PyTorch hands out parts of large blocks: what is read behind a tensor is its neighbour.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for tool in options.tools.split(","):
        print(f"sanitize: {tool}", flush=True)
        done = subprocess.run(command(program, tool, tests), cwd=ROOT, env=environment, check=False)
        if done.returncode:
            what = "has found something" if done.returncode == FOUND else "saw tests fail"
            failed.append(f"{tool} {what}")
    print(f"sanitize: {'; '.join(failed) or 'nothing found'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
