"""Compile a small kernel where Triton's cache folder is what the arguments say (run as a script).

Prints the error that compiling with the cache met, whether the kernel was compiled, and what is
left in the temporary folder.
"""

import json
import os
import sys
import tempfile

import torch

from compiling import CompileOnly, standing_in
from s2o_vllm.kernels import compilations
from s2o_vllm.kernels.attention import split_kv


def launch() -> None:
    """A launch of the merge of split lists, of sizes that no other test compiles."""
    empty = {"device": "meta", "dtype": torch.float32}
    parts, mass, out = torch.empty(1, **empty), torch.empty(1, **empty), torch.empty(1, **empty)
    items = torch.empty(1, dtype=torch.int32, device="meta")
    split_kv._merge_kernel[(1, 1)](
        parts, mass, items, out, 64, 64, GROUP=1, D=64, D_PAD=64, PARTS=2
    )


def main(cache: str, temporary: str) -> None:
    """Compile once, with a cache folder and a temporary one."""
    os.environ["TRITON_CACHE_DIR"] = cache
    tempfile.tempdir = temporary
    refused, failed = None, None
    with standing_in(CompileOnly(90)) as compiled:
        try:
            refused = compilations.compile_with(launch)
        except RuntimeError as error:
            failed = str(error)
    left = os.listdir(temporary) if os.path.isdir(temporary) else []
    print(
        json.dumps(
            {
                "refused": refused and type(refused).__name__,
                "failed": failed,
                "compiled": len(compiled),
                "left": [name for name in left if name.startswith("s2o-")],
                "cache": compilations.knobs.cache.dir,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
