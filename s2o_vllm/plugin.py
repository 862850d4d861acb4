"""The entry point that vLLM calls in every process (``vllm.general_plugins``)."""

import logging
import sys
from collections.abc import Sequence
from itertools import pairwise

logger = logging.getLogger("vllm.s2o")


def register() -> None:
    """Make ``--attention-backend s2o`` and the ``--s2o-*`` flags known to vLLM.

    Quick and idempotent; changes nothing in how vLLM attends unless s2o is asked for. With a
    vLLM outside the supported range it says so and registers nothing; a ``vllm`` command that
    asks for s2o then ends with that sentence.

    Raises:
        SystemExit: code 2, see above.
    """
    from . import compat

    reason = compat.unsupported_version()
    if reason is not None:
        if named_on_command_line(sys.argv):
            print(f"{vllm_command(sys.argv)}: error: {reason}", file=sys.stderr)
            raise SystemExit(2)
        logger.warning("%s", reason)
        return
    compat.install()


def register_name() -> None:
    """Make the name ``s2o`` known when vLLM asks for its platform (``vllm.platform_plugins``).

    Plug-ins are loaded by vLLM's arguments; ``LLM(attention_config={"backend": "s2o"})`` reads the
    name before that, and scripts build their parsers before that. This is no platform: it returns
    none.
    """
    from . import compat

    if compat.unsupported_version() is None:
        compat.install_name()


def vllm_command(words: Sequence[str]) -> str | None:
    """Return the name of vLLM's command that this process is, or None if it is none of vLLM's.

    Args:
        words: ``sys.argv``.
    """
    program = words[0].replace("\\", "/") if words else ""
    _, package, module = program.rpartition("/vllm/entrypoints/")
    if program.endswith("/vllm") or program == "vllm" or (package and module == "cli/main.py"):
        return " ".join(["vllm", *words[1:2]])
    if package:
        return f"python -m vllm.entrypoints.{module.removesuffix('.py').replace('/', '.')}"
    return None


def named_on_command_line(words: Sequence[str]) -> bool:
    """Tell whether these words are a command of vLLM's that selects s2o.

    ``CUSTOM`` alone may mean another plug-in.
    """
    if vllm_command(words) is None:
        return False
    if any(word.replace("_", "-").startswith("--s2o-") for word in words):
        return True
    pairs = [*pairwise(words), *(word.split("=", 1) for word in words if "=" in word)]
    return any(
        name.startswith("-") and name.endswith("backend") and value.lower() == "s2o"
        for name, value in pairs
    )
