"""The entry point that vLLM calls in every process (``vllm.general_plugins``)."""

import logging

logger = logging.getLogger("vllm.s2o")


def register() -> None:
    """Make ``--attention-backend s2o`` and the ``--s2o-*`` flags known to vLLM.

    Quick and idempotent; changes nothing in how vLLM attends unless s2o is asked for. With a
    vLLM outside the supported range it says so and registers nothing.
    """
    from . import compat

    reason = compat.unsupported_version()
    if reason is not None:
        logger.warning("%s", reason)
        return
    compat.install()
