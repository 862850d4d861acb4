"""Run a research command with other measured constants than those of ``kernels/tuning.py``.

``python -m s2o_vllm.benchmarks.research.tuned CLUSTERS=248 in_process MODEL`` sets them before
a kernel is imported, which takes them as they are then. Rows of results say what was ``tuned``.
"""

import importlib
import sys
from collections.abc import Sequence

from s2o_vllm.kernels import tuning

COMMANDS = ("answers", "clusters", "in_process")  # whose rows say what was tuned
CHANGED: dict[str, float] = {}  # by the name of the constant; empty where nothing was


def change(words: Sequence[str]) -> None:
    """Set constants, in kernels that are not imported yet.

    Args:
        words: of the form ``NAME=NUMBER``; a constant keeps its type.

    Raises:
        RuntimeError: if the kernels are imported.
        ValueError: if a word names no constant or no number.
    """
    if "s2o_vllm.kernels.prefill" in sys.modules:
        raise RuntimeError("the kernels are imported already")
    known = {name for name in vars(tuning) if name.isupper()}
    new = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(sorted(known))}")
        new[name] = type(getattr(tuning, name))(number)
    for name, value in new.items():
        setattr(tuning, name, value)
    CHANGED.update(new)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code of the command that it names."""
    words = list(sys.argv[1:] if argv is None else argv)
    first = next((n for n, word in enumerate(words) if "=" not in word), len(words))
    if words[first : first + 1] not in [[name] for name in COMMANDS]:
        print(f"tuned: NAME=NUMBER … COMMAND …, of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # As other modules import it: run by its name it is another module, `__main__`.
    own = importlib.import_module("s2o_vllm.benchmarks.research.tuned")
    try:
        own.change(words[:first])
    except ValueError as error:
        print(f"tuned: {error}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"s2o_vllm.benchmarks.research.{words[first]}")
    return int(command.main(words[first + 1 :]))


if __name__ == "__main__":
    sys.exit(main())
