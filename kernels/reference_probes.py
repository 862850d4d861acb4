"""What the kernels of :mod:`probes` compute, in plain PyTorch."""

import math

import torch

from .plan import DENSE_START, HISTORY, NUM_QUERIES, QUERY_START, WorkList
from .reference import LOG2E, load_tokens
from .reference_select import physical_slots
from .sampling import stratified
from .tiles import image_dtype
from .tuning import (
    LEAST_SCORE,
    LSE_FIRST,
    LSE_LAST,
    LSE_SAMPLES,
    MEAN_SAMPLES,
    MEAN_SPAN,
    UNIT,
    pool_of,
)


def probes_of(queries: torch.Tensor, pool: int) -> torch.Tensor:
    """Return the means of every ``pool`` neighbours ``[n, heads, head_dim]``, in float32."""
    return torch.stack([part.float().mean(0) for part in queries.split(pool)])


def mean_key(keys: torch.Tensor) -> torch.Tensor:
    """Return the mean of some of a request's first keys, ``[kv_heads, head_dim]``."""
    step = max(min(keys.shape[1], MEAN_SPAN) // MEAN_SAMPLES, 1)
    return keys[:, ::step][:, :MEAN_SAMPLES].mean(1)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``x`` as ``dtype`` holds it, saturated, in float32."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).float()


def log_sum_exp(logits: torch.Tensor, sees: torch.Tensor, history: int, n: int) -> torch.Tensor:
    """Estimate the log-sum-exp of probes, base 2.

    Args:
        logits: ``[heads, probes, tokens]``, base 2, of all tokens up to the segment's last.
        sees: ``[probes]``, own tokens of the segment that each sees.
        history: tokens before the segment.
        n: tokens before the dense pass.

    Returns:
        ``[heads, probes, 1]``.
    """
    first = min(n, LSE_FIRST)
    last = max(first, n - LSE_LAST)
    token = torch.arange(last, logits.shape[-1], device=logits.device)
    sampled = first + stratified(last - first, max(1, -(-(last - first) // LSE_SAMPLES)))
    past = logits[..., sampled.to(logits.device)]
    if len(sampled):  # the largest one stands for itself alone
        largest = past.argmax(-1, keepdim=True)
        weight = torch.full_like(past, math.log2((last - first) / len(sampled)))
        past = past + weight.scatter(-1, largest, 0.0)
    parts = [
        logits[..., :first],
        logits[..., last:].masked_fill(token >= history + sees[:, None], float("-inf")),
        past,
    ]
    return (torch.cat(parts, -1) / LOG2E).logsumexp(-1, keepdim=True) * LOG2E


def list_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    n: int,
    scale: float,
    dtype: torch.dtype,
    pool: int,
) -> torch.Tensor:
    """Score the first tokens of a history for the lists of a segment.

    Args:
        queries: of the segment, ``[queries, heads, head_dim]``.
        keys: of all tokens up to the segment's last, less their mean: ``[heads, tokens,
            head_dim]``.
        n: tokens to score: those before the dense pass.
        scale: softmax scale.
        dtype: that keys and probes are rounded to.
        pool: neighbouring queries of a probe.

    Returns:
        float32 ``[heads, n]``, log2-probabilities, ``LEAST_SCORE`` at least.
    """
    count = len(queries)
    history = keys.shape[1] - count
    probes = probes_of(queries, pool) * (scale * LOG2E * UNIT)
    logits = rounded(probes, dtype).transpose(0, 1) @ rounded(keys, dtype).mT / UNIT
    sees = torch.arange(1, logits.shape[1] + 1, device=keys.device).mul(pool).clamp(max=count)
    lse = log_sum_exp(logits, sees, history, n)
    return (logits[..., :n] - lse).amax(1).clamp(min=LEAST_SCORE)


def probe_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    *,
    scale: float,
) -> torch.Tensor:
    """Score a segment's history by its probes; see :func:`probes.probe_scores`.

    Returns:
        float16 ``[items, heads, max_history]``, -inf behind an item's history.
    """
    heads, kv_heads = query.shape[1], kv_cache.shape[1]
    page, head_dim = kv_cache.shape[2], query.shape[2]
    device, dtype = query.device, image_dtype(query.device)
    scores = query.new_full(
        (work.num_items, heads, work.max_history), float("-inf"), dtype=torch.float32
    )
    if work.max_history == 0:
        return scores.half()
    positions = torch.arange(work.max_fit_tokens, device=device)
    pool = pool_of(work.segment)
    slots = physical_slots(positions, block_table[work.row], page)
    keys, _ = load_tokens(kv_cache, slots, head_dim)
    keys = (keys - mean_key(keys)[:, None]).repeat_interleave(heads // kv_heads, 0)
    for number, item in enumerate(work.items.tolist()):
        n, start, count = item[DENSE_START], item[QUERY_START], item[NUM_QUERIES]
        if n > 0:
            seen = keys[:, : item[HISTORY] + count]
            queries = query[start : start + count]
            scores[number, :, :n] = list_scores(queries, seen, n, scale, dtype, pool)
    return scores.half()
