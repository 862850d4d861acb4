"""Which variants of a kernel launches need, by Triton's own keys, without a GPU.

Triton compiles a kernel anew for every combination of its arguments' types, of the constants, of
which integers and addresses 16 divides and which integers are 1. Run as a script, without the
interpreter, this prints for each case the kernels of which served steps need a variant that the
warm-up does not compile, and the most device memory that a step asks for.
"""

import json
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from compiling import standing_in
from s2o_vllm.config import RANKINGS, resolve
from s2o_vllm.kernels import decode, decode_state, decode_step, layout, prefill, tiles, work_list
from s2o_vllm.kernels.shape import Shape

META, CPU = torch.device("meta"), torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A layer, and the server's settings that its kernels depend on."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    max_history: int = 131_040
    max_queries: int = 8192
    page: int = 16
    blocks: int = 8190  # of a row of the block table
    head_major: bool = False
    ranking: str = "low_rank"
    stop_threshold: float = 0.0
    softcap: float = 0.0
    segment: int = 0
    fp8: bool = False
    sinks: bool = False
    capability: int = 90


class Argument:
    """What Triton asks of a tensor; storage begins at a multiple of 16 bytes, as PyTorch's does."""

    def __init__(self, tensor):
        self.dtype, self._address = tensor.dtype, tensor.storage_offset() * tensor.itemsize

    def data_ptr(self):
        return self._address


class LaunchKeys:
    """Stands in for ``JITFunction.run``: notes the key by which Triton would find a variant."""

    def __init__(self, capability):
        self.backend = make_backend(GPUTarget("cuda", capability, 32))
        self.compiled, self._binders = [], {}

    def binder(self, kernel):
        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(
                kernel.signature, kernel.params, self.backend
            )
        return self._binders[kernel]

    def run(self, kernel, *args, grid, warmup, **kwargs):
        assert all(size > 0 for size in grid), "an empty grid is refused by a card"
        args, kwargs = tree_map(
            lambda one: Argument(one) if isinstance(one, torch.Tensor) else one,
            (list(args), kwargs),
        )
        _, specialisation, options = self.binder(kernel)(*args, **kwargs)
        self.compiled.append((kernel.fn.__name__, f"{specialisation} {sorted(options.items())}"))


class Allocated(TorchDispatchMode):
    """Sums the bytes of all storage that is made on the device while it is active, freed or not."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        before = {storage._cdata for storage in storages((args, kwargs))}
        self.bytes += sum(one.nbytes() for one in storages(made) if one._cdata not in before)
        return made


def storages(values):
    """The memory of all tensors on the device among nested values."""
    tensors = [one for one in tree_leaves(values) if isinstance(one, torch.Tensor)]
    return [one.untyped_storage() for one in tensors if one.device == META]


def cases() -> dict[str, Case]:
    """Shapes and settings, each unlike the others in what a kernel may be compiled for."""
    found = {
        f"{ranking} stop {stop} {'fp8' if fp8 else 'bf16'}": Case(
            ranking=ranking, stop_threshold=stop, fp8=fp8
        )
        for ranking in RANKINGS
        for stop in (0.0, 0.01)
        for fp8 in (False, True)
    }
    for heads, kv_heads, head_dim in (
        (32, 4, 128), (64, 4, 128), (40, 8, 128), (16, 2, 256), (8, 8, 64), (6, 1, 96),
        (4, 1, 128), (8, 1, 128), (64, 8, 64), (28, 4, 128), (12, 2, 128), (5, 1, 64),
    ):  # fmt: skip
        for ranking in RANKINGS:
            name = f"{heads}/{kv_heads} heads of {head_dim} {ranking}"
            found[name] = Case(heads, kv_heads, head_dim, ranking=ranking)
    others = {
        "head-major": Case(head_major=True),
        "large pages": Case(page=1056, blocks=125),
        "one block": Case(max_history=16, max_queries=64, blocks=1),
        "short": Case(max_history=1000, max_queries=512, blocks=63),
        "odd lengths": Case(max_history=40_961, max_queries=2049, blocks=2561),
        "a million": Case(max_history=1_048_576, max_queries=16_384, blocks=65_536),
        "soft cap": Case(softcap=50.0),
        "head_dim 512": Case(8, 2, 512),
        "sinks": Case(64, 8, 64, sinks=True),
        "segments of 16": Case(segment=16),
        "segments of 100": Case(segment=100),
        "segments of 4096": Case(segment=4096),
        "mean of 100": Case(segment=100, ranking="mean_query"),
        "ampere": Case(capability=80),
        "blackwell": Case(capability=100, fp8=True),
    }
    return found | others


def layer(case: Case):
    """A layer's operators on no device, with the tiles that a card would take."""
    shape = Shape(
        case.heads, case.kv_heads, case.head_dim, case.max_history, case.max_queries,
        case.segment or RANKINGS[case.ranking], case.ranking,
    )  # fmt: skip
    sinks = torch.empty(case.heads, device=META) if case.sinks else None
    operation = prefill.SparsePrefill(
        shape, torch.bfloat16, META, scale=0.1, softcap=case.softcap, sinks=sinks,
        stop_threshold=case.stop_threshold,
    )  # fmt: skip
    operation.space = prefill.workspace(shape, torch.bfloat16, META)
    group = case.heads // case.kv_heads
    card = torch.device("cuda")
    with patch.object(torch.cuda, "get_device_capability", lambda _: divmod(case.capability, 10)):
        operation.tiles = {
            key: tiles.attend_tile(case.head_dim, card, shape.segment * group, *key)
            for key in operation.tiles
        }
        tile = tiles.decode_tile(case.head_dim, card, group)
    operation.fp8_products = case.fp8
    sizes = decode_state.DecodeShape(
        case.heads, case.kv_heads, case.head_dim, case.max_history, 3, 0.05
    )
    decoding = decode.SparseDecode(
        sizes, torch.bfloat16, META, scale=0.1, softcap=case.softcap, sinks=sinks
    )
    decoding.backend = decode_step.DecodeKernels(sizes, torch.bfloat16, META)
    decoding.backend.tile = tile
    return operation, decoding, shape, sizes


def prefill_rows(case: Case) -> list[work_list.PrefillRow]:
    """Chunks that start anywhere, of one query or of many, in any row of the block table."""
    longest, most = min(case.max_history, case.page * case.blocks), case.max_queries
    chunks = [
        (queries, context)
        for queries in (1, 2, 17, 33, 100, 513, 1025, most // 2 + 1, most - 7, most)
        for context in (0, 1, 15, 17, 1000, 8193, longest // 2 + 1, longest - queries)
        if 0 < queries <= most and 0 <= context <= longest - queries
    ]
    budgets = (0.05, 0.9, 0.02, 1e-4)
    errors = (resolve({}, {"target_error": 0}, {}).target_error, 0.1)  # as JSON may have it
    return [
        work_list.PrefillRow(number % 7, number % 3, queries, context, budgets[number % 4],
                        errors[number % 2], (0, 1024, 16)[number % 3])
        for number, (queries, context) in enumerate(chunks)
    ]  # fmt: skip


def measure(case: Case) -> tuple[list[str], int]:
    """Kernels of which served steps need a variant that the warm-up does not compile.

    And the most bytes that one of the steps makes on the device, beside what there is at the start.
    """
    most = 0
    operation, decoding, shape, sizes = layer(case)
    width = (case.heads + 2 * case.kv_heads) * case.head_dim  # queries are a part of what is made
    qkv = torch.empty(case.max_queries + 3, width, dtype=torch.bfloat16, device=META)
    query = qkv[:, : case.heads * case.head_dim].unflatten(1, (case.heads, case.head_dim))
    out = torch.empty(query.shape, dtype=query.dtype, device=META)
    kind = torch.float8_e4m3fn if case.fp8 else torch.bfloat16
    quantised = torch.empty(query.shape, dtype=kind, device=META) if case.fp8 else None
    query = torch.empty(query.shape, dtype=query.dtype, device=META) if case.fp8 else query
    pages = (90, case.page, case.kv_heads, 2 * case.head_dim)
    kv = torch.empty(pages, dtype=kind, device=META).transpose(1, 2)
    if case.head_major:
        kv = torch.empty(kv.shape, dtype=kind, device=META)
    table = torch.empty(7, case.blocks, dtype=torch.int32, device=META)
    counters = torch.empty(layout.NUM_COUNTERS, dtype=torch.int64, device=META)
    with standing_in(LaunchKeys(case.capability)) as launches:
        few = slice(0, 16)  # tokens of the batch that warms up
        operation.warm_up(query[few], kv, table[:1], None if quantised is None else quantised[few])
        decoding.warm_up(query[few], kv, table[:1])
        known = set(launches)
        for contexts in ((case.max_history - 1, 40_000, 200), (97,), (64, 129)):
            rows = [
                decode_state.DecodeRow(6 - number, number, context, number, context - number)
                for number, context in enumerate(contexts)
                if context < case.max_history
            ]
            steps = decode_state.DecodeTable(sizes, 7, CPU).fill(rows, 3)
            decoding(query, kv, table, steps, out, counters, k_scale=0.07, v_scale=0.3)
        for row in prefill_rows(case):
            for work in work_list.build_work_lists([row], shape.segment, 1000, CPU, shape.limits):
                with Allocated() as allocated:
                    operation(
                        query, kv, table, work, out, counters,
                        k_scale=0.07, v_scale=0.3, query_e4m3=quantised,
                    )  # fmt: skip
                most = max(most, allocated.bytes)
                if work.first_of_chunk and work.max_seen:
                    end = decode_state.choose_snapshot(work, 2)
                    decoding.take(end, query, kv, table, work, k_scale=0.07)
    assert len(launches) > len(known) > 10, "the steps launch something"
    return sorted({name for name, key in launches if (name, key) not in known}), most


def main() -> None:
    """Print what is found, by case."""
    print(json.dumps({name: measure(case) for name, case in cases().items()}))


if __name__ == "__main__":
    main()
