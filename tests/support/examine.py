"""Reports on models' layers in a process of their own (run as a script).

Takes folders with configs; prints ``FOUND [...]``, a report each. With ``tests/support/stubs`` on
the search path vision-language models can be built where torchvision is not installed.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from vllm.model_executor.models.registry import ModelRegistry

from s2o_vllm.cli.model_report import examine_model

STUBS = Path(__file__).parent / "stubs"


def import_here(folder: str | Path) -> None:
    """Import a model's class as vLLM finds it, but in this process: a separate one takes 15 s."""
    (architecture,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
    known = ModelRegistry.models[architecture].load_model_cls()
    ModelRegistry.register_model(architecture, known)


if __name__ == "__main__":
    reports = []
    for given in sys.argv[1:]:
        import_here(given)
        reports.append(asdict(examine_model(given)))
    print("FOUND", json.dumps(reports))
