"""Compile a Triton launch for a GPU that need not be there."""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
HEADS, KV_HEADS, MAX_HISTORY = 32, 8, 131_072
PLACES = 16 * MAX_HISTORY
# Of a launch, not of the kernel.
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass
class Compiled:
    name: str
    shared: int
    spills: int
    loop_spills: int
    registers: int
    asm: str
    unfenced: bool


class CompileOnly:
    """Stands in for ``JITFunction.run``: compiles for ``capability``, launches nothing."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)
        self.compiled: list[Compiled] = []

    def run(self, kernel, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
        source = ASTSource(kernel, *specialisation(kernel, args, kwargs))
        result = triton.compile(source, target=self.target, options=options)
        self.compiled.append(describe(kernel.fn.__name__, result))


def specialisation(kernel, args, kwargs) -> tuple[dict, dict, dict]:
    """What Triton compiles a launch for: types, constants, and which integers 16 divides."""
    bound = kernel.signature.bind(*args, **kwargs).arguments
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(number,)] = value
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(
                kind_of(one, (number, place), constants, attributes)
                for place, one in enumerate(value)
            )
        else:
            plain = parameter.do_not_specialize
            signature[parameter.name] = kind_of(value, (number,), constants, attributes, plain)
    return signature, constants, attributes


def kind_of(value, path: tuple, constants: dict, attributes: dict, plain: bool = False) -> str:
    """The type of a value of a launch; what it is specialised to goes to the other two."""
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return "*" + DTYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or (value == 1 and not plain):
        constants[path] = value
        return "constexpr"
    if value % 16 == 0 and not plain:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if value < 2**31 else "i64"


def describe(name: str, result) -> Compiled:
    """Read the resources of a compiled kernel from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        sass = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    registers = int(re.search(r"REG:(\d+)", text)[1])
    spills = int(re.search(r"STACK:(\d+)", text)[1]) + int(re.search(r"LOCAL:(\d+)", text)[1])
    ptx = result.asm["ptx"]
    return Compiled(
        name, result.metadata.shared, spills, loop_spills(sass), registers, ptx, unfenced(ptx)
    )


def loop_spills(sass: str) -> int:
    """Count the accesses to local memory in the shortest loop with two matrix products.

    In the attend kernel that is the loop over whole tiles of a list: others also mask.
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif re.match(r"\s*/\*[0-9a-f]+\*/", line):
            code.append(line)
            branch = re.search(r"\bBRA\b.*?(\.L\w+)", line)
            if branch and branch[1] in labels:
                loops.append(code[labels[branch[1]] :])
    loops = [loop for loop in loops if sum("MMA" in line for line in loop) > 8]
    return sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in min(loops, key=len, default=[]))


def unfenced(ptx: str) -> bool:
    """Tell whether wgmma may read what asynchronous copies wrote without a proxy fence between.

    PTX asks for one (Asynchronous Operations and Proxies); Triton sets it from 3.7.1 on.
    """
    waited = False
    for event in re.findall(r"cp\.async\.wait_group|fence\.proxy\.async|wgmma\.mma_async", ptx):
        if event.startswith("wgmma") and waited:
            return True
        waited = event.startswith("cp.")
    return False


def printed(script, *arguments):
    """What a script beside this one prints, run with the real compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def compile_attend(
    tile, capability: int, head_dim: int, stop_threshold: float | None, kv_dtype: torch.dtype,
    sinks: bool = False,
) -> Compiled:  # fmt: skip
    """Compile the attend kernel with a tile of the table; no threshold: for dense segments."""
    from s2o_vllm.kernels import layout
    from s2o_vllm.kernels.attention import attend, summaries
    from s2o_vllm.kernels.selection import select

    dense = stop_threshold is None
    q, kv, table, work = launch_arguments(head_dim, kv_dtype, 2**20 if dense else 4096)
    space = select.SelectWorkspace(work.num_segments, KV_HEADS, MAX_HISTORY, PLACES, "meta")
    counters = torch.empty(layout.NUM_COUNTERS, dtype=torch.int64, device="meta")
    means = summaries.workspace(KV_HEADS, head_dim, MAX_HISTORY, q.dtype, "meta")
    with compiling_for(capability) as compiled:
        attend.attend(
            q, kv, table, work, space.lists(work), means, q, counters, scale=0.1,
            stop_threshold=stop_threshold or 0.0,
            sinks=torch.empty(HEADS, dtype=q.dtype, device="meta") if sinks else None,
            tile=tile, query_e4m3=q.to(kv_dtype) if kv_dtype == torch.float8_e4m3fn else None,
        )  # fmt: skip
    return compiled[0]


def compile_ranking(capability: int, head_dim: int, kv_dtype: torch.dtype) -> list[Compiled]:
    """Compile every kernel of ranking and selection."""
    from s2o_vllm.kernels import tuning
    from s2o_vllm.kernels.attention import summaries
    from s2o_vllm.kernels.ranking import low_rank, mean_query
    from s2o_vllm.kernels.selection import select

    q, kv, table, work = launch_arguments(head_dim, kv_dtype)
    meta = torch.device("meta")
    ranking = mean_query.MeanQueryWorkspace(
        work.num_segments, HEADS, head_dim, MAX_HISTORY, q.dtype, meta
    )
    sizes = (HEADS, HEADS, head_dim, MAX_HISTORY, work.num_segments, 512)
    space = low_rank.LowRankWorkspace(*sizes, q.dtype, meta, projection_dtype(capability))
    space.retrieval = low_rank.RetrievalWorkspace(space, KV_HEADS, 512)
    selection = select.SelectWorkspace(work.num_segments, KV_HEADS, MAX_HISTORY, PLACES, meta)
    results = (selection.scores, selection.bounds)
    with compiling_for(capability) as compiled:
        mean_query.mean_query_scores(q, kv, table, work, *results, ranking, scale=0.1)
        low_rank.low_rank_scores(q, kv, table, work, *results, space, scale=0.1)
        means = summaries.workspace(KV_HEADS, head_dim, MAX_HISTORY, q.dtype, meta)
        summaries.summarise(kv, table, work, means)
        for tiers in (tuning.TIERS, tuning.TIERS_UNORDERED):
            select.select(table, work, 16, selection, tiers, summaries=means)
    return compiled


def projection_dtype(capability: int) -> torch.dtype:
    """Dtype of projected keys; see :func:`tiles.projection_dtype`."""
    return torch.float8_e4m3fn if capability >= 89 else torch.float16


def launch_arguments(head_dim: int, kv_dtype: torch.dtype, min_context: int = 4096):
    """Llama-3.1-8B's heads, an 8K chunk at 96K context, bf16 queries."""
    from s2o_vllm.kernels import work_list

    rows = [work_list.PrefillRow(0, 0, 8192, 98_304, 0.1)]
    limits = work_list.Limits(16, PLACES)
    (work,) = work_list.build_work_lists(rows, 512, min_context, torch.device("cpu"), limits)
    q = torch.empty(8192, HEADS, head_dim, dtype=torch.bfloat16, device="meta")
    kv = torch.empty(10_000, KV_HEADS, 16, 2 * head_dim, dtype=kv_dtype, device="meta")
    return q, kv, torch.empty(1, 8192, dtype=torch.int32, device="meta"), work


@contextmanager
def compiling_for(capability: int):
    """Turn launches into compilations; yields the list of what was compiled."""
    with standing_in(CompileOnly(capability)) as compiled:
        yield compiled


@contextmanager
def standing_in(stand_in):
    """Let ``stand_in`` have all launches; yields its list."""
    run = triton.runtime.jit.JITFunction.run
    triton.runtime.jit.JITFunction.run = lambda kernel, *args, **kwargs: stand_in.run(
        kernel, *args, **kwargs
    )
    try:
        yield stand_in.compiled
    finally:
        triton.runtime.jit.JITFunction.run = run


def compile_decode(capability: int, head_dim: int, kv_dtype: torch.dtype) -> list[Compiled]:
    """Compile every kernel of a decode step."""
    from s2o_vllm.kernels import decode_state, decode_step, layout
    from s2o_vllm.kernels.tiles import DECODE_TILES

    q, kv, table, _ = launch_arguments(head_dim, kv_dtype)
    meta = torch.device("meta")
    shape = decode_state.DecodeShape(32, 8, head_dim, 131072, 4, 0.05)
    scratch = decode_step.scratch(shape, meta, projection_dtype(capability))
    space = decode_step.RequestStates(shape, q.dtype, meta, scratch)
    rows = [decode_state.DecodeRow(0, 0, 100_000, 1, 99_990)]
    steps = decode_state.DecodeTable(shape, 1, torch.device("cpu")).fill(rows, 1)
    counters = torch.empty(layout.NUM_COUNTERS, dtype=torch.int64, device="meta")
    with compiling_for(capability) as compiled:
        decode_step.decode(
            q, kv, table, steps, space, q, counters, scale=0.1, tile=DECODE_TILES[head_dim]
        )
    return [replace(one, name=f"{one.name} decode {head_dim}") for one in compiled]


def main() -> None:
    """Compile everything for one capability and print it as JSON (run without interpreter)."""
    from s2o_vllm.kernels import tiles

    capability, kv_dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    compiled = compile_ranking(capability, 128, kv_dtype)
    if capability == 90:
        compiled += compile_ranking(capability, max(tiles.HEAD_DIMS), kv_dtype)
    table = tiles.BY_CAPABILITY[capability]
    # What fits elsewhere is asked of the largest alone.
    for head_dim in tiles.DECODE_TILES if capability == 90 else [max(table)]:
        compiled += compile_decode(capability, head_dim, kv_dtype)
    if kv_dtype == torch.float8_e4m3fn:  # then a layer's queries come in e4m3, too
        launched = [*(table | tiles.E4M3.get(capability, {})).items()]
    else:
        launched = [*table.items(), *tiles.WIDE.get(capability, {}).items()]
    wide = tiles.WIDE.get(capability, {}).values()  # for dense segments alone
    for head_dim, tile in launched:
        for stop_threshold in (None,) if tile in wide else (0.0, 0.001, None):
            one = compile_attend(tile, capability, head_dim, stop_threshold, kv_dtype)
            compiled.append(replace(one, name=f"{one.name} {tile} {stop_threshold}"))
    sinks = compile_attend(table[64], capability, 64, 0.001, kv_dtype, sinks=True)
    compiled.append(replace(sinks, name=f"{sinks.name} {table[64]} sinks"))
    mma = ("wgmma", "tcgen05", "mma.sync")
    print(
        json.dumps(
            [
                {**asdict(one), "asm": next((name for name in mma if name in one.asm), "")}
                for one in compiled
            ]
        )
    )


if __name__ == "__main__":
    main()
