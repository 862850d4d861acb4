"""Compile a Triton launch for a GPU that need not be there."""

from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass
class Compiled:
    name: str
    shared: int
    spills: int
    registers: int
    asm: str


class CompileOnly:
    """Stands in for ``JITFunction.run``: compiles for ``capability``, launches nothing."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)
        self.compiled: list[Compiled] = []

    def run(self, kernel, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        bound = kernel.signature.bind(*args, **kwargs).arguments
        signature, constants, attributes = {}, {}, {}
        for number, parameter in enumerate(kernel.params):
            value = bound[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constants[(number,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + DTYPES[value.dtype]
                attributes[(number,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if value < 2**31 else "i64"
                if value == 1:
                    signature[parameter.name] = "constexpr"
                    constants[(number,)] = 1
                elif value % 16 == 0:
                    attributes[(number,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        result = triton.compile(source, target=self.target, options=options)
        self.compiled.append(describe(kernel.fn.__name__, result))


def describe(name: str, result) -> Compiled:
    """Read the resources of a compiled kernel from its machine code."""
    import re
    import subprocess
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    registers = int(re.search(r"REG:(\d+)", text)[1])
    spills = int(re.search(r"STACK:(\d+)", text)[1]) + int(re.search(r"LOCAL:(\d+)", text)[1])
    return Compiled(name, result.metadata.shared, spills, registers, result.asm["ptx"])
