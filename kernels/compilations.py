"""When kernels are compiled: before requests come, with a cache or without; and whether later."""

import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

from triton import knobs

PACKAGE = __name__.rpartition(".")[0] + "."


def compile_with(launch: Callable[[], None]) -> Exception | None:
    """Launch kernels that may have to be compiled, also where Triton's cache cannot be written.

    Triton compiles by way of files, so that a full or read-only cache folder ends the process. Here
    a temporary folder takes its place, which is gone afterwards: what has run stays loaded.

    Args:
        launch: launches kernels, any number of times.

    Returns:
        None, or why the cache could not be written.

    Raises:
        RuntimeError: if there is no temporary folder either.
    """
    try:
        launch()
        return None
    except (OSError, subprocess.SubprocessError) as error:
        refused = error
    try:
        with knobs.cache.scope(), tempfile.TemporaryDirectory(prefix="s2o-kernels-") as folder:
            knobs.cache.dir = folder
            launch()
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(
            f"s2o: kernels cannot be compiled: neither Triton's cache folder ({refused}) nor a "
            f"temporary one ({error}) can be written"
        ) from None
    return refused


def watch(report: Callable[[str], None]) -> None:
    """Call ``report`` with the name of every kernel of ours that is compiled from now on.

    Costs nothing where none is: Triton calls the hook after a compilation, not at launches.
    """
    before = knobs.runtime.jit_post_compile_hook

    def compiled(**details: Any) -> Any:
        function = details.get("fn")  # what else Triton tells differs between its releases
        if f"{getattr(function, 'module', '')}.".startswith(PACKAGE):
            report(str(getattr(function, "name", "")))
        return before(**details) if before is not None else None

    knobs.runtime.jit_post_compile_hook = compiled
