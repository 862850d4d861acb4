"""What reading only a ranked share of the keys and values would buy in decode, on one card.

``python -m s2o_vllm.benchmarks.decode_budget``: one layer, one query a request, bf16, pages of 16
tokens in random order. It says what a decode kernel could gain at most.

The baseline is paged FlashAttention 3 as vLLM calls it in a graph. Against it: the attend kernel
over lists of random tokens (its gather is the same for ranked ones), each list cut into as many
parts as do best, without the merging of the parts; FlashAttention 3 over keys and values that were
gathered by torch; and what a ranking needs: torch's conversion of fp8 images, product and maximum
over the group, torch's `topk`, and the images' bytes alone at the card's copy rate.

What such lists cost in error, each for one query of a GQA group, is
`s2o eval attention --methods s2o:unit=1xkv token_oracle:unit=1xkv`.

No time is reported unless each of them, with everything listed, is as near to fp64 attention as
bf16 PyTorch (within a factor).

Each row of `benchmarks/results/decode_budget.json`: `context`, `batch`, `budget` (the share listed)
and milliseconds a layer: `fa3_paged_ms`; `attend_ms` with `parts`; `gather_ms` and
`fa3_gathered_ms`; `rank_torch_ms`, `topk_ms`, `rank_bytes_ms`; `kv_bytes_ms`, all keys and values
at the copy rate; `gain_bound`, fa3_paged_ms / (rank_bytes_ms + attend_ms). A copy also writes:
where FlashAttention 3 takes less than `kv_bytes_ms`, a ranking may take less than `rank_bytes_ms`,
too, and gain a little more.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2o_vllm.kernels import attend, regions
from s2o_vllm.kernels.plan import (
    ESTIMATE_EVERY,
    ESTIMATE_TOKENS,
    NOT_LISTED,
    NUM_COUNTERS,
    Lists,
    WorkList,
)
from s2o_vllm.kernels.tiles import attend_tile

from .dense import PAGE, SHAPES, ceilings, milliseconds
from .report import header, save

SHAPE = "llama-3.1-8b"
RANK_BYTES = 32  # of a token's image and KV head: rank 32 in fp8
SPLITS = 32  # vLLM's bound of FlashAttention's parts in a graph
PARTS = (1, 4, 16, 64)  # that a list is cut into
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


def random_slots(batch: Batch, budget: float) -> torch.Tensor:
    """List a random share of each request's history, all but its last token.

    Returns:
        int32 ``[batch, kv_heads, share]``: physical slots, without repeats.
    """
    history = batch.context - 1
    count, kv_heads = int(budget * history), batch.kv_cache.shape[1]
    slots = []
    for table in batch.block_table:
        order = torch.rand(kv_heads, history, device=table.device).argsort(1)[:, :count]
        slots.append(table[order // PAGE] * PAGE + order % PAGE)
    return torch.stack(slots).int()


def attending(batch: Batch, slots: torch.Tensor, parts: int) -> Callable[[], torch.Tensor]:
    """Return the attend kernel over lists that are cut into parts, each an item of its own.

    The result ``[batch * parts, heads, head_dim]`` is the attention to each part, the own token
    and the means of all regions; their merging is left out. What a means' weight is does not
    matter to the time.
    """
    size, kv_heads, device = batch.query.shape[0], slots.shape[1], slots.device
    heads, head_dim = batch.query.shape[1:]
    history, length = batch.context - 1, slots.shape[2] // parts
    cut = slots[..., : parts * length].unflatten(2, (parts, length)).transpose(1, 2)
    cut = cut.flatten(0, 1).contiguous()
    count = size * parts
    items = torch.tensor(
        [(n // parts, n, 1, history, history, length, 0) for n in range(count)],
        dtype=torch.int32, device=device,
    )  # fmt: skip
    none = torch.empty(0, 3, dtype=torch.int32, device=device)
    work = WorkList(0, 0.0, True, none, 1, 1, history, items, none, history, length, 1)
    sampled = (-(-count // ESTIMATE_EVERY), kv_heads, ESTIMATE_TOKENS)
    lists = Lists(
        cut,
        torch.full((count, kv_heads), length, dtype=torch.int32, device=device),
        torch.full(sampled, NOT_LISTED, dtype=torch.int32, device=device),
    )
    means = regions.workspace(kv_heads, head_dim, history, batch.query.dtype, device)
    means.means.zero_()
    means.slopes.zero_()
    means.spreads.zero_()
    query = batch.query.repeat_interleave(parts, 0)
    out = torch.empty_like(query)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
    tile = attend_tile(head_dim, device, heads // kv_heads)

    def run() -> torch.Tensor:
        attend.attend(
            query, batch.kv_cache, batch.block_table, work, lists, means, out, counters,
            scale=batch.scale, tile=tile,
        )  # fmt: skip
        return out

    return run


def gathering(batch: Batch, slots: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return torch's gather of the list: keys and values, ``[batch, listed, kv_heads, 2 D]``."""
    kv_heads = slots.shape[1]
    rows = batch.kv_cache.transpose(1, 2).flatten(0, 2)  # a row for each slot and head
    heads = torch.arange(kv_heads, device=slots.device)[:, None]
    index = (slots.long() * kv_heads + heads).transpose(1, 2).contiguous()
    return lambda: rows[index]


def fa3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, tokens: int,
    **where: Any,
) -> Callable[[], torch.Tensor]:  # fmt: skip
    """Return FlashAttention 3 of one query a request, as vLLM calls it in a graph.

    Args:
        query: ``[batch, heads, head_dim]``.
        key: pages, or the requests' keys one after the other.
        value: as ``key``.
        scale: softmax scale.
        tokens: of each request.
        where: ``block_table``, or ``cu_seqlens_k`` without pages.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    count = query.shape[0]
    starts = torch.arange(count + 1, dtype=torch.int32, device="cuda")
    planned: dict[str, Any] = {}
    if "block_table" in where:
        where["seqused_k"] = torch.full((count,), tokens, dtype=torch.int32, device="cuda")
        planned["scheduler_metadata"] = get_scheduler_metadata(
            batch_size=count, max_seqlen_q=1, max_seqlen_k=tokens, num_heads_q=query.shape[1],
            num_heads_kv=key.shape[2], headdim=query.shape[2], cache_seqlens=where["seqused_k"],
            qkv_dtype=query.dtype, cu_seqlens_q=starts, page_size=PAGE, causal=True,
            num_splits=SPLITS,
        )  # fmt: skip
    return lambda: flash_attn_varlen_func(
        q=query, k=key, v=value, cu_seqlens_q=starts, max_seqlen_q=1, max_seqlen_k=tokens,
        softmax_scale=scale, causal=True, fa_version=3, num_splits=SPLITS, **where, **planned,
    )  # fmt: skip


def paged(batch: Batch) -> Callable[[], torch.Tensor]:
    """Return FlashAttention 3 over all pages."""
    return fa3(
        batch.query, *batch.keys_values(), batch.scale, batch.context,
        block_table=batch.block_table,
    )  # fmt: skip


def over_gathered(batch: Batch, gathered: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return FlashAttention 3 over what :func:`gathering` returns."""
    count, tokens = gathered.shape[:2]
    key, value = gathered.flatten(0, 1).split(batch.query.shape[2], -1)
    starts = torch.arange(count + 1, dtype=torch.int32, device="cuda") * tokens
    return fa3(batch.query, key, value, batch.scale, tokens, cu_seqlens_k=starts)


def ranking(batch: Batch) -> Callable[[], torch.Tensor]:
    """Return torch's scores of every token by its fp8 image: ``[batch * kv_heads, context]``."""
    count, heads, kv_heads = *batch.query.shape[:2], batch.kv_cache.shape[1]
    options: dict[str, Any] = {"device": batch.query.device, "dtype": torch.bfloat16}
    images = torch.randn(count * kv_heads, batch.context, RANK_BYTES, **options)
    images = images.to(torch.float8_e4m3fn)
    queries = torch.randn(count * kv_heads, RANK_BYTES, heads // kv_heads, **options)
    return lambda: (images.to(torch.bfloat16) @ queries).amax(2)


def exact(batch: Batch, history: int, dtype: torch.dtype) -> torch.Tensor:
    """Return attention of each query to its first ``history`` tokens, by PyTorch."""
    group = batch.query.shape[1] // batch.kv_cache.shape[1]
    keys, values = (
        x[batch.block_table.long()].flatten(1, 2)[:, :history].to(dtype).repeat_interleave(group, 2)
        for x in batch.keys_values()
    )
    scores = torch.einsum("bhd,bnhd->bhn", batch.query.to(dtype), keys) * batch.scale
    return torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), values)


def check() -> dict[str, float]:
    """Compare everything that is timed, with all tokens listed, to fp64 attention.

    Returns:
        Relative errors by name; ``torch_error`` is bf16 PyTorch's.

    Raises:
        SystemExit: if one is more than ``GATE_FACTOR`` times PyTorch's.
    """
    batch = make_batch(3, GATE_CONTEXT)
    every = random_slots(batch, 1.0)

    def error(result: torch.Tensor, tokens: int) -> float:
        truth = exact(batch, tokens, torch.float64)
        return float((result.double() - truth).norm() / truth.norm())

    context = batch.context
    allowed = error(exact(batch, context, torch.bfloat16), context)
    errors = {
        "fa3_paged_error": error(paged(batch)(), context),
        "attend_error": error(attending(batch, every, 1)(), context),
        "gathered_error": error(
            over_gathered(batch, gathering(batch, every)())(), context - 1
        ),  # the list leaves the own token to the attend kernel
    }
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
        rank = ranking(batch)
        scores, rank_ms = rank(), milliseconds(rank)
        tokens = size * batch.context * kv_heads
        for budget in args.budgets:
            slots = random_slots(batch, budget)
            gather = gathering(batch, slots)
            times = {n: milliseconds(attending(batch, slots, n)) for n in args.parts}
            parts = min(times, key=lambda n: times[n])
            rank_bytes_ms = tokens * RANK_BYTES / copy_gb_s / 1e6
            top = functools.partial(torch.topk, scores, slots.shape[2], sorted=False)
            yield {
                "shape": SHAPE,
                "context": batch.context,
                "batch": size,
                "budget": budget,
                "fa3_paged_ms": dense_ms,
                "attend_ms": times[parts],
                "parts": parts,
                "gather_ms": milliseconds(gather),
                "fa3_gathered_ms": milliseconds(over_gathered(batch, gather())),
                "rank_torch_ms": rank_ms,
                "topk_ms": milliseconds(top),
                "rank_bytes_ms": rank_bytes_ms,
                "kv_bytes_ms": tokens * 4 * head_dim / copy_gb_s / 1e6,
                "gain_bound": dense_ms / (rank_bytes_ms + times[parts]),
                **gate,
            }


def summary(row: dict[str, Any]) -> str:
    """Return a row as one printed line."""
    return (
        f"{row['batch']:>3} x {row['context']} tokens, share {row['budget']:<5} FA3 "
        f"{row['fa3_paged_ms']:7.3f} ms; attend {row['attend_ms']:7.3f} ({row['parts']} parts), "
        f"ranking at least {row['rank_bytes_ms']:6.3f}: {row['gain_bound']:.2f}x at most; torch's "
        f"gather {row['gather_ms']:7.3f} + FA3 {row['fa3_gathered_ms']:7.3f}, ranking "
        f"{row['rank_torch_ms']:7.3f} + topk {row['topk_ms']:7.3f}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m s2o_vllm.benchmarks.decode_budget", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--contexts", nargs="+", type=int, default=[131072], metavar="TOKENS")
    add("--batches", nargs="+", type=int, default=[1, 4, 16], metavar="N")
    add("--budgets", nargs="+", type=float, default=[0.02, 0.05, 0.1], metavar="B")
    add("--parts", nargs="+", type=int, default=list(PARTS), metavar="N")
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
