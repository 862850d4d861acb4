"""Batches over a shuffled paged cache, and dense attention in fp64 as the truth."""

from dataclasses import dataclass, replace

import pytest
import torch

from s2o_vllm.kernels.attention.summary_table import REGIONS
from s2o_vllm.kernels.layout import DENSE_START, NOT_LISTED
from s2o_vllm.kernels.selection.reference import sample_positions
from s2o_vllm.kernels.selection.selected import SelectedTokens
from s2o_vllm.kernels.tiles import head_dims
from s2o_vllm.kernels.tuning import ESTIMATE_EVERY, ESTIMATE_TOKENS, SPAN_LENGTH
from s2o_vllm.kernels.work_list import Limits, PrefillRow, WorkList, build_work_lists

SEGMENT = 32
CLUSTERS = 8  # for histories of a hundred tokens
SUMMARIES = CLUSTERS + REGIONS
LIMITS = Limits(1000, 10**7)
ON_GPU = torch.cuda.is_available()
# bf16 dots are silently wrong in the interpreter; fp32 tiles do not fit a GPU's shared memory.
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float32, torch.float16)
DTYPE = DTYPES[0]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[DTYPE]
FP8_CARD = pytest.mark.skipif(
    ON_GPU and torch.cuda.get_device_capability() < (9, 0),
    reason="vLLM's FlashAttention takes an fp8 cache from Hopper on",
)
LARGE_CARD = pytest.mark.skipif(
    512 not in head_dims(torch.device("cuda" if ON_GPU else "cpu")),
    reason="keys of head_dim 512 do not fit the card's shared memory",
)
CACHES = [False, pytest.param(True, marks=FP8_CARD)]  # whether the cache is fp8
FP8_SCALES = (0.07, 0.3)  # of keys and of values
# (context, queries) of each request: segments that are cut short at either end, whole ones, one
# without history, a single query. A GPU's larger tiles need more of each.
CHUNKS = ((150, 70), (0, 40), (77, 1)) if ON_GPU else ((90, 44), (0, 40), (77, 1))


@dataclass
class Batch:
    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    rows: list[PrefillRow]
    softmax_scale: float
    k_scale: float = 1.0
    v_scale: float = 1.0
    sinks: torch.Tensor | None = None  # [heads], logits

    @property
    def scale(self) -> float:
        """What a query's product with a key of the cache is multiplied by."""
        return self.softmax_scale * self.k_scale

    def work(
        self, *, min_context: int = 0, segment: int = SEGMENT, shared: int = LIMITS.shared,
        segments: int = LIMITS.segments, span: int = SPAN_LENGTH,
    ) -> list[WorkList]:  # fmt: skip
        """One list per request, of up to ``segments``; ``shared`` KV heads share a budget.

        Chunks have ``CHUNK_SPANS`` spans of ``span`` queries.
        """
        limits = LIMITS._replace(shared=shared, segments=segments)
        return build_work_lists(self.rows, segment, min_context, self.query.device, limits, span)


def make_batch(
    device,
    *,
    chunks=CHUNKS,
    heads=4,
    kv_heads=2,
    head_dim=64,
    page=16,
    dtype=DTYPE,
    head_major=True,
    budget=0.4,
    spread=1.0,
    fp8=False,
    sinks=False,
) -> Batch:
    """Random queries and a cache whose blocks are shuffled over the requests.

    ``spread`` scales the keys: larger values give peaked attention. With ``fp8`` the cache is
    quantised, its scales are ``FP8_SCALES``. ``sinks`` gives the heads :func:`make_sinks`.
    """
    counts = [-(-(context + queries) // page) for context, queries in chunks]
    blocks = sum(counts) + 3
    shape = (blocks, kv_heads, page, 2 * head_dim)
    if not head_major:  # vLLM's other layout: tokens outside heads
        shape = (blocks, page, kv_heads, 2 * head_dim)
    kv_cache = torch.randn(shape, device=device, dtype=dtype)
    if not head_major:
        kv_cache = kv_cache.transpose(1, 2)
    kv_cache[..., :head_dim] *= spread
    scales = FP8_SCALES if fp8 else (1.0, 1.0)
    if fp8:
        kv_cache = torch.cat(
            [
                to_fp8(part, scale)
                for part, scale in zip(kv_cache.split(head_dim, -1), scales, strict=True)
            ],
            -1,
        )
    order = torch.randperm(blocks, device=device).int()
    table = torch.full((len(chunks), max(counts) + 2), -1, dtype=torch.int32, device=device)
    first = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[first : first + count]
        first += count
    rows, start = [], 0
    for row, (context, queries) in enumerate(chunks):
        rows.append(PrefillRow(row, start, queries, context, budget))
        start += queries
    query = torch.randn(start, heads, head_dim, device=device, dtype=dtype)
    own = make_sinks(heads, dtype, device) if sinks else None
    return Batch(query, kv_cache, table, rows, head_dim**-0.5, *scales, own)


def far_away(batch: Batch) -> Batch:
    """The same batch with its blocks at the end of a cache of more than 2^31 elements.

    What is before them is reserved and never touched: it takes no memory on the CPU.
    """
    blocks, kv_heads, page, width = batch.kv_cache.shape
    first = 2**31 // (kv_heads * page * width) + 1
    inner = (kv_heads, page, width)
    token_major = batch.kv_cache.stride(2) > batch.kv_cache.stride(1)
    if token_major:
        inner = (page, kv_heads, width)
    cache = torch.empty(
        (first + blocks, *inner), dtype=batch.kv_cache.dtype, device=batch.kv_cache.device
    )
    cache = cache.transpose(1, 2) if token_major else cache
    cache[first:] = batch.kv_cache
    assert cache.numel() - blocks * kv_heads * page * width > 2**31
    table = torch.where(batch.block_table < 0, batch.block_table, batch.block_table + first)
    return replace(batch, kv_cache=cache, block_table=table.int())


def to_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Quantise to e4m3 in units of ``scale``, as vLLM does: what is too large saturates."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-limit, limit).to(torch.float8_e4m3fn)


def tokens_of(batch: Batch, row: PrefillRow) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a request, [kv_heads, tokens, head_dim], gathered token by token.

    Those of a quantised cache are dequantised, in float32.
    """
    page, head_dim = batch.kv_cache.shape[2], batch.query.shape[2]
    tokens = torch.stack(
        [
            batch.kv_cache[int(batch.block_table[row.row, position // page]), :, position % page]
            for position in range(row.context + row.num_queries)
        ],
        1,
    )
    keys, values = tokens[..., :head_dim], tokens[..., head_dim:]
    if tokens.dtype != batch.query.dtype:
        keys, values = keys.float() * batch.k_scale, values.float() * batch.v_scale
    return keys, values


def dense_attention(batch: Batch, dtype=torch.float64, softcap: float = 0.0) -> torch.Tensor:
    """Causal attention of every request over its whole history, in ``dtype``."""
    out = torch.empty_like(batch.query, dtype=dtype)
    group = batch.query.shape[1] // batch.kv_cache.shape[1]
    for row in batch.rows:
        keys, values = (x.to(dtype).repeat_interleave(group, 0) for x in tokens_of(batch, row))
        queries = batch.query[row.query_start :][: row.num_queries].to(dtype).transpose(0, 1)
        scores = queries @ keys.transpose(1, 2) * batch.softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        own = row.context + torch.arange(row.num_queries, device=scores.device)
        future = torch.arange(keys.shape[1], device=scores.device) > own[:, None]
        scores = scores.masked_fill(future, float("-inf"))
        if batch.sinks is not None:
            last = batch.sinks.to(dtype)[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, last], -1)
            values = torch.nn.functional.pad(values, (0, 0, 0, 1))
        result = (scores.softmax(-1) @ values).transpose(0, 1)
        out[row.query_start :][: row.num_queries] = result
    return out


def make_sinks(heads: int, dtype: torch.dtype, device) -> torch.Tensor:
    """Logits of sinks ``[heads]`` that take from next to nothing to nearly all of the mass."""
    return torch.linspace(-2, 8, heads).to(device, dtype)


def full_lists(
    batch: Batch, *, uneven: bool = False, summaries: bool = False, **cut
) -> list[tuple[WorkList, SelectedTokens]]:
    """Each request's work with lists of random history tokens, as many as its budget allows.

    ``uneven`` shortens the lists of all heads but the first, each by a random share. With
    ``summaries`` a random number of tokens is left over of each. ``cut`` is of :meth:`Batch.work`.
    """
    page, kv_heads = batch.kv_cache.shape[2], batch.kv_cache.shape[1]
    lists = []
    for work in batch.work(**cut):
        sampled = -(-work.num_segments // ESTIMATE_EVERY)
        slots = torch.zeros(work.num_segments, kv_heads, max(work.max_list, 1), dtype=torch.int32)
        lengths = torch.zeros(work.num_segments, kv_heads, dtype=torch.int32)
        samples = torch.full((sampled, kv_heads, ESTIMATE_TOKENS), -7, dtype=torch.int32)
        table = batch.block_table[work.row].cpu()
        for number, item in enumerate(work.segments.tolist()):
            for head in range(kv_heads):
                count = item[5]
                if uneven and head:
                    count -= int(torch.randint(count + 1, ()))
                order = torch.randperm(item[4])
                positions = order[:count]
                slots[number, head, :count] = table[positions // page] * page + positions % page
                lengths[number, head] = count
                if number % ESTIMATE_EVERY == 0 and count:
                    places = order.argsort()
                    places[places >= count] = NOT_LISTED
                    places = places[sample_positions(item[4], places.device)]
                    samples[number // ESTIMATE_EVERY, head, : len(places)] = places
        device = batch.query.device
        own = SelectedTokens(*(part.to(device) for part in (slots, lengths, samples)))
        if summaries:
            own = own._replace(left=some_left(work, lengths, device))
        lists.append((work, own))
    return lists


def some_left(work: WorkList, lengths: torch.Tensor, device) -> torch.Tensor:
    """Logarithms of random numbers of tokens, none for a quarter, where a list leaves any out."""
    left = torch.randint(0, 40, (*lengths.shape, SUMMARIES)).float()
    left[..., ::4] = 0.0
    left[lengths == work.segments[:, DENSE_START, None].cpu()] = 0.0
    return left.log2().to(device)


def nan_like(tensor: torch.Tensor) -> torch.Tensor:
    """A fresh output: what is not written is seen."""
    return torch.full_like(tensor, float("nan"))


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """‖result − truth‖ / ‖truth‖; NaN if any element is NaN."""
    return float((result.double() - truth.double()).norm() / truth.double().norm())
