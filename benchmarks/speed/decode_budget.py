"""What a ranked share of the keys and values buys in decode, on one card.

``python -m s2o_vllm.benchmarks.speed.decode_budget``: one layer, one query a request, bf16, pages
of 16 tokens in random order. The whole operator as a server's graph holds it (projecting the new
key, ranking, selecting, attending, merging) is timed beside paged FlashAttention 3 in a graph.
Keys are random and so are bases: the time does not depend on what is listed, only on how much.

What such lists cost in error, each for one query of a GQA group, is
`s2o eval attention --methods s2o:unit=1xkv token_oracle:unit=1xkv`.

No time is reported unless either, with everything listed, is as near to fp64 attention as
bf16 PyTorch (within a factor).

Each row of `benchmarks/results/decode_budget.json`: `context`, `batch`, `budget` (the share listed)
and milliseconds a layer: `fa3_paged_ms`; `operator_ms`, and `gain`, the first over the second;
`kernels_us`, the operator's kernels by name, in microseconds, with caches as they come;
`kv_bytes_ms`, all keys and values at the copy rate, and `image_bytes_ms`, all projected keys
likewise. A copy also writes: what only reads may take less.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2o_vllm.kernels import decode_step
from s2o_vllm.kernels.decode_state import DecodeRow, DecodeShape, DecodeTable
from s2o_vllm.kernels.layout import NUM_COUNTERS
from s2o_vllm.kernels.ranking import basis
from s2o_vllm.kernels.ranking.project import append_keys
from s2o_vllm.kernels.tuning import CHUNK

from ..result_file import header, save
from .dense import PAGE, SHAPES, ceilings, milliseconds

SHAPE = "llama-3.1-8b"
SPLITS = 32  # vLLM's bound of FlashAttention's parts in a graph
PROFILED = 10  # runs whose kernels are timed
GATE_CONTEXT = 2048
GATE_FACTOR = 2.0


@dataclass
class Batch:
    """Requests in decode: the last token of each is the query's own.

    Attributes:
        query: ``[batch, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, PAGE, 2 * head_dim]``, tokens outside heads in memory.
        block_table: int32 ``[batch, context / PAGE]``.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor

    @property
    def context(self) -> int:
        """Tokens of a request."""
        return self.block_table.shape[1] * PAGE

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return self.query.shape[2] ** -0.5

    def keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, ``[blocks, PAGE, kv_heads, head_dim]`` each."""
        keys, values = self.kv_cache.transpose(1, 2).split(self.query.shape[2], -1)
        return keys, values


def make_batch(
    batch: int, context: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> Batch:
    """Return random queries, keys and values; ``context`` is rounded down to whole pages."""
    heads, kv_heads, head_dim = SHAPES[SHAPE]
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    blocks = batch * (context // PAGE)
    storage = torch.randn(blocks, PAGE, kv_heads, 2 * head_dim, **options)
    table = torch.randperm(blocks, device=device).int().view(batch, -1)
    return Batch(torch.randn(batch, heads, head_dim, **options), storage.transpose(1, 2), table)


def operator(
    batch: Batch, budget: float, chunk: int = CHUNK
) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """Return sparse decode as a step runs it, and its counters; slots hold all projected keys.

    A call returns ``[batch, heads, head_dim]``; counters are int64 ``[NUM_COUNTERS]``.
    """
    (size, heads, head_dim), kv_heads = batch.query.shape, batch.kv_cache.shape[1]
    device, dtype = batch.query.device, batch.query.dtype
    shape = DecodeShape(heads, kv_heads, head_dim, batch.context, size, budget)
    space = decode_step.RequestStates(
        shape, dtype, device, decode_step.scratch(shape, device, chunk=chunk)
    )
    for part in (space.basis.a, space.basis.b):
        part[..., : basis.RANK].normal_(std=head_dim**-0.5)
    space.basis.offset[..., basis.RANK :] = -torch.tensor(basis.LSE_FACTORS, device=device)
    sizes = space.summaries.sizes
    sizes.fill_(batch.context // sizes.shape[2])
    table = DecodeTable(shape, size, device)
    rows = [DecodeRow(number, number, batch.context - 1, number, 0) for number in range(size)]
    append_keys(batch.kv_cache, batch.block_table, table.fill(rows, size), space)
    steps = table.fill([row._replace(covered=batch.context - 1) for row in rows], size)
    out = torch.empty_like(batch.query)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)

    def run() -> torch.Tensor:
        decode_step.decode(
            batch.query, batch.kv_cache, batch.block_table, steps, space, out, counters,
            scale=batch.scale,
        )  # fmt: skip
        return out

    return run, counters


def paged(batch: Batch) -> Callable[[], torch.Tensor]:
    """Return FlashAttention 3 over all pages, as vLLM calls it in a graph.

    A call returns ``[batch, heads, head_dim]``.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    key, value = batch.keys_values()
    size, tokens = batch.query.shape[0], batch.context
    starts = torch.arange(size + 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((size,), tokens, dtype=torch.int32, device="cuda")
    planned = get_scheduler_metadata(
        batch_size=size, max_seqlen_q=1, max_seqlen_k=tokens, num_heads_q=batch.query.shape[1],
        num_heads_kv=key.shape[2], headdim=key.shape[3], cache_seqlens=lengths,
        qkv_dtype=key.dtype, cu_seqlens_q=starts, page_size=PAGE, causal=True, num_splits=SPLITS,
    )  # fmt: skip
    return lambda: flash_attn_varlen_func(
        q=batch.query, k=key, v=value, cu_seqlens_q=starts, max_seqlen_q=1, max_seqlen_k=tokens,
        softmax_scale=batch.scale, causal=True, fa_version=3, num_splits=SPLITS,
        seqused_k=lengths, block_table=batch.block_table, scheduler_metadata=planned,
    )  # fmt: skip


def kernels_us(run: Callable[[], Any]) -> dict[str, float]:
    """Return what each kernel of a call takes on the device, by name, in microseconds."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / PROFILED
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    }


def exact(batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Return attention of each query to all tokens, by PyTorch: ``[batch, heads, head_dim]``."""
    group = batch.query.shape[1] // batch.kv_cache.shape[1]
    keys, values = (
        x[batch.block_table.long()].flatten(1, 2).to(dtype).repeat_interleave(group, 2)
        for x in batch.keys_values()
    )
    scores = torch.einsum("bhd,bnhd->bhn", batch.query.to(dtype), keys) * batch.scale
    return torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), values)


def check() -> dict[str, float]:
    """Compare what is timed, with all tokens listed, to fp64 attention.

    Returns:
        Relative errors by name; ``torch_error`` is bf16 PyTorch's.

    Raises:
        SystemExit: if one is more than ``GATE_FACTOR`` times PyTorch's.
    """
    batch = make_batch(3, GATE_CONTEXT)
    truth = exact(batch, torch.float64)

    def error(result: torch.Tensor) -> float:
        return float((result.double() - truth).norm() / truth.norm())

    allowed = error(exact(batch, torch.bfloat16))
    run, _ = operator(batch, 1.0)
    errors = {"fa3_paged_error": error(paged(batch)()), "operator_error": error(run())}
    for name, found in errors.items():
        if not found <= GATE_FACTOR * allowed:
            raise SystemExit(
                f"decode_budget: {name} {found:.2e} is more than {GATE_FACTOR} times PyTorch's "
                f"{allowed:.2e}: no time is reported."
            )
    return errors | {"torch_error": allowed}


def measure(args: argparse.Namespace, copy_gb_s: float) -> Iterator[dict[str, Any]]:
    """Yield one row a context, batch and budget."""
    gate = check()
    kv_heads, head_dim = SHAPES[SHAPE][1:]
    for context, size in itertools.product(args.contexts, args.batches):
        batch = make_batch(size, context)
        dense_ms = milliseconds(paged(batch))
        tokens = size * batch.context * kv_heads
        for budget in args.budgets:
            run, _ = operator(batch, budget)
            operator_ms = milliseconds(run)
            yield {
                "shape": SHAPE,
                "context": batch.context,
                "batch": size,
                "budget": budget,
                "fa3_paged_ms": dense_ms,
                "operator_ms": operator_ms,
                "gain": dense_ms / operator_ms,
                "kernels_us": kernels_us(run),
                "kv_bytes_ms": tokens * 4 * head_dim / copy_gb_s / 1e6,
                "image_bytes_ms": tokens * basis.WIDTH / copy_gb_s / 1e6,
                **gate,
            }


def summary(row: dict[str, Any]) -> str:
    """Return a row as one printed line."""
    kernels = sorted(row["kernels_us"].items(), key=lambda one: -one[1])
    return (
        f"{row['batch']:>3} x {row['context']} tokens, share {row['budget']:<5} FA3 "
        f"{row['fa3_paged_ms']:7.3f} ms, S2O {row['operator_ms']:7.3f}: {row['gain']:.2f}x; us: "
        + ", ".join(f"{name.strip('_').removesuffix('_kernel')} {us:.0f}" for name, us in kernels)
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m s2o_vllm.benchmarks.speed.decode_budget", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--contexts", nargs="+", type=int, default=[131072], metavar="TOKENS")
    add("--batches", nargs="+", type=int, default=[1, 4, 16], metavar="N")
    add("--budgets", nargs="+", type=float, default=[0.02, 0.05, 0.1], metavar="B")
    add("--out", type=Path, default=Path("benchmarks/results/decode_budget.json"), metavar="FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: there is nothing to time")
    card = ceilings()
    head = {**header(), **card}
    rows = []
    for row in measure(args, card["copy_gb_s"]):
        rows.append(row)
        save(args.out, head, rows)
        print(summary(row), flush=True)
    print(f"{args.out}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
