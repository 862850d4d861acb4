"""One layer's prompt, dense attention over it, and what the card itself can do."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = {  # query heads, KV heads, head_dim
    "llama-3.1-8b": (32, 8, 128),
    "qwen3-8b": (32, 8, 128),
    "qwen2.5-1.5b": (12, 2, 128),
}
PAGE = 16
FP8_STEP = 1 / 64  # a unit of the fp8 cache: of normal numbers, 448 of them are 7
REPEATS_MIN, REPEATS_MAX, REPEAT_MS = 4, 60, 250  # the first is not counted


@dataclass
class Prompt:
    """One prompt whose cache pages are shuffled.

    Attributes:
        query: ``[tokens, heads, head_dim]``.
        key: ``[tokens, kv_heads, head_dim]``, the contiguous copy for baselines.
        value: as ``key``.
        kv_cache: ``[blocks, kv_heads, PAGE, 2 * head_dim]``.
        block_table: int32 ``[1, blocks]``.
        unit: what one unit of the cache stands for, 1 unless it is fp8.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    unit: float = 1.0

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return self.query.shape[2] ** -0.5

    @property
    def kv_dtype(self) -> str:
        """What the cache holds: ``bf16`` or ``fp8``."""
        return "fp8" if self.kv_cache.dtype == torch.float8_e4m3fn else "bf16"

    def cached(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values from the cache, float32 ``[tokens, kv_heads, head_dim]``."""
        pages = self.kv_cache.transpose(1, 2)[self.block_table[0].long()]
        tokens = pages.flatten(0, 1)[: self.query.shape[0]].float() * self.unit
        key, value = tokens.split(self.query.shape[2], -1)
        return key, value


def make_prompt(shape: tuple[int, int, int], context: int) -> Prompt:
    """Return random queries, keys and values (bf16) of a prompt."""
    heads, kv_heads, head_dim = shape
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(context, heads, head_dim, **options)
    key, value = (torch.randn(context, kv_heads, head_dim, **options) for _ in range(2))
    return paged(query, key, value)


def paged(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Prompt:
    """Return a prompt whose keys and values also lie in shuffled pages.

    Args:
        query: ``[tokens, heads, head_dim]``.
        key: ``[tokens, kv_heads, head_dim]``.
        value: as ``key``.
    """
    context, kv_heads, head_dim = key.shape
    blocks = -(-context // PAGE)
    order = torch.randperm(blocks, device=key.device)
    # vLLM's layout on CUDA: tokens outside heads.
    storage = key.new_zeros(blocks, PAGE, kv_heads, 2 * head_dim)
    tokens = torch.cat([key, value], -1)
    padded = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, blocks * PAGE - context))
    storage[order] = padded.unflatten(0, (blocks, PAGE))
    return Prompt(query, key, value, storage.transpose(1, 2), order.int()[None])


def quantised(prompt: Prompt) -> Prompt:
    """Return the prompt with an fp8 (e4m3) cache, as vLLM serves it.

    The query is quantised and read back, as vLLM does it. The contiguous keys and
    values stay as they are.
    """
    query = to_fp8(prompt.query).to(prompt.query.dtype) * FP8_STEP
    return replace(prompt, query=query, kv_cache=to_fp8(prompt.kv_cache), unit=FP8_STEP)


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Return e4m3 numbers in units of ``FP8_STEP``, of any shape [...]; large ones saturate."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    return (x / FP8_STEP).clamp(-limit, limit).to(torch.float8_e4m3fn)


def milliseconds(run: Callable[[], Any], repeat_ms: float = REPEAT_MS) -> float:
    """Return the median time of a call on the device, in ms; see :func:`in_turn`."""
    return in_turn(run, repeat_ms=repeat_ms)[0]


def in_turn(*runs: Callable[[], Any], repeat_ms: float = REPEAT_MS) -> list[float]:
    """Return the median time of each of some calls on the device, in ms.

    They run in turn, so that changes of the card's clock affect all of them alike.

    Replays of graphs: what the host needs to launch many small kernels is hidden behind other
    layers' work in a server, and would be counted here. The L2 cache is emptied before each.

    Args:
        *runs: the calls.
        repeat_ms: time after which the first of them is not repeated again.
    """
    graphs = [torch.cuda.CUDAGraph() for _ in runs]
    for run, graph in zip(runs, graphs, strict=True):
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times: list[list[float]] = []  # of all calls, once in turn
    while len(times) < REPEATS_MIN or (
        sum(first for first, *_ in times) < repeat_ms and len(times) < REPEATS_MAX
    ):
        times.append([])
        for graph in graphs:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[-1].append(start.elapsed_time(end))
    return [statistics.median(of_run) for of_run in zip(*times[1:], strict=True)]


def ceilings() -> dict[str, float]:
    """Measure what this card reaches at most.

    Returns:
        ``matmul_tflops`` of a bf16 product of random 8192 x 8192 matrices, and ``copy_gb_s``,
        bytes read and written, of a copy of 2 GiB.
    """
    size = 8192
    x, y = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(x)
    source = torch.empty(2**31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return {
        "matmul_tflops": 2 * size**3 / milliseconds(lambda: torch.mm(x, y, out=product)) / 1e9,
        "copy_gb_s": 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6,
    }


def baselines(prompt: Prompt) -> dict[str, Callable[[], torch.Tensor]]:
    """Return dense causal attention over the prompt, by name; see :func:`fa3` and :func:`sdpa`."""
    return {
        "fa3_paged": fa3_paged(prompt),
        "fa3": fa3(prompt, prompt.key, prompt.value, cu_seqlens_k=starts(prompt)),
        "fa2": sdpa(prompt, SDPBackend.FLASH_ATTENTION),
        "cudnn": sdpa(prompt, SDPBackend.CUDNN_ATTENTION),
    }


def fa3_paged(prompt: Prompt) -> Callable[[], torch.Tensor]:
    """Return FlashAttention 3 over pages: over an fp8 cache with queries in fp8, as vLLM does.

    Queries may be the last ones of a prompt alone; see :func:`fa3`.
    """
    pages = prompt.kv_cache.transpose(1, 2).split(prompt.query.shape[2], -1)
    used = torch.tensor([prompt.key.shape[0]], dtype=torch.int32, device="cuda")
    where: dict[str, Any] = {"seqused_k": used, "block_table": prompt.block_table}
    if prompt.kv_dtype == "fp8":
        unit = torch.full((1, prompt.kv_cache.shape[1]), prompt.unit, device="cuda")
        where |= {f"{part}_descale": unit for part in "qkv"}
        prompt = replace(prompt, query=to_fp8(prompt.query))
    return fa3(prompt, *pages, **where)


def starts(prompt: Prompt) -> torch.Tensor:
    """Return where the only sequence starts and ends: int32 ``[2]``."""
    return torch.tensor([0, prompt.query.shape[0]], dtype=torch.int32, device="cuda")


def fa3(
    prompt: Prompt, key: torch.Tensor, value: torch.Tensor, **where: Any
) -> Callable[[], torch.Tensor]:
    """Return FlashAttention 3 as vLLM calls it, over pages or contiguous keys and values.

    Args:
        prompt: the queries.
        key: ``[tokens, kv_heads, head_dim]``, or ``[blocks, block_size, kv_heads, head_dim]``.
        value: likewise.
        **where: arguments that say where keys are.

    Returns:
        A call that returns ``[tokens, heads, head_dim]``.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    queries, keys, of_queries = prompt.query.shape[0], prompt.key.shape[0], starts(prompt)

    def run() -> torch.Tensor:
        return flash_attn_varlen_func(
            q=prompt.query, k=key, v=value, cu_seqlens_q=of_queries, max_seqlen_q=queries,
            max_seqlen_k=keys, softmax_scale=prompt.scale, causal=True, fa_version=3, **where,
        )  # fmt: skip

    return run


def sdpa(prompt: Prompt, backend: SDPBackend) -> Callable[[], torch.Tensor]:
    """Return one of torch's backends over contiguous keys and values.

    A call returns ``[1, heads, tokens, head_dim]``.
    """
    query, key, value = (x.transpose(0, 1)[None] for x in (prompt.query, prompt.key, prompt.value))

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )

    return run
