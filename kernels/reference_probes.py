"""What the kernels of :mod:`probes` compute, in plain PyTorch."""

from typing import NamedTuple

import torch

from .plan import DENSE_START, HISTORY, NUM_QUERIES, QUERY_START, WorkList
from .reference import LOG2E, load_tokens
from .reference_select import physical_slots
from .tiles import image_dtype
from .tuning import (
    LEAST_SCORE,
    LSE_FIRST,
    LSE_LAST,
    LSE_SAMPLES,
    MEAN_SAMPLES,
    MEAN_SPAN,
    POOL,
    POOL_STEPS,
    UNIT,
)


class Probes(NamedTuple):
    """Probes of a segment.

    Attributes:
        means: float32 ``[heads, probes, head_dim]``.
        sees: int64 ``[heads, probes]``, own tokens of the segment that each sees.
        share: float32 ``[heads, probes]``, of the segment's queries.
    """

    means: torch.Tensor
    sees: torch.Tensor
    share: torch.Tensor


def principal_projection(x: torch.Tensor) -> torch.Tensor:
    """Project centred rows ``[heads, n, head_dim]`` onto their first principal component."""
    longest = x.square().sum(-1).argmax(1)
    w = x[torch.arange(len(x), device=x.device), longest]
    for _ in range(POOL_STEPS):
        w = torch.einsum("hnd,hn->hd", x, torch.einsum("hnd,hd->hn", x, w))
        w = w / w.norm(dim=1, keepdim=True).clamp(min=1e-15)
    return torch.einsum("hnd,hd->hn", x, w)


def probes_of(queries: torch.Tensor) -> Probes:
    """Pool queries ``[n, heads, head_dim]`` that are alike: those of neighbouring ranks."""
    x = queries.float().transpose(0, 1)
    ranks = principal_projection(x - x.mean(1, keepdim=True)).argsort(dim=1, stable=True)
    pools = ranks.split(POOL, 1)  # of query numbers

    def mean(pool: torch.Tensor) -> torch.Tensor:
        return x.gather(1, pool[..., None].expand(-1, -1, x.shape[2])).mean(1)

    return Probes(
        torch.stack([mean(pool) for pool in pools], 1),
        torch.stack([pool.sum(1) // pool.shape[1] + 1 for pool in pools], 1),
        torch.tensor([pool.shape[1] / x.shape[1] for pool in pools]).to(x).expand(len(x), -1),
    )


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
        sees: ``[heads, probes]``, see :class:`Probes`.
        history: tokens before the segment.
        n: tokens before the dense pass.

    Returns:
        ``[heads, probes, 1]``.
    """
    first = min(n, LSE_FIRST)
    last = max(first, n - LSE_LAST)
    token = torch.arange(last, logits.shape[-1], device=logits.device)
    hidden = token >= history + sees[..., None]
    step = max(1, -(-(last - first) // LSE_SAMPLES))
    sampled = torch.arange(first + step // 2, last, step, device=logits.device)
    weight = torch.tensor((last - first) / max(len(sampled), 1)).log2()
    parts = [
        logits[..., :first],
        logits[..., last:].masked_fill(hidden, float("-inf")),
        logits[..., sampled] + weight.to(logits),
    ]
    return (torch.cat(parts, -1) / LOG2E).logsumexp(-1, keepdim=True) * LOG2E


def list_scores(
    probes: Probes, keys: torch.Tensor, item: list[int], dtype: torch.dtype
) -> torch.Tensor:
    """Score an item's history.

    Args:
        probes: of the segment; means are in ``UNIT``, scaled, base 2.
        keys: of all tokens that the item sees, less their mean, ``[heads, tokens, head_dim]``.
        item: of a work list.
        dtype: that products are of.

    Returns:
        float32 ``[heads, history]``, log2 of the mean probability.
    """
    n, history = item[DENSE_START], item[HISTORY]
    end = history + item[NUM_QUERIES]
    logits = rounded(probes.means, dtype) @ rounded(keys[:, :end], dtype).mT / UNIT
    logits = logits - log_sum_exp(logits, probes.sees, history, n)
    mean = (logits[..., :n].exp2() * probes.share[..., None]).sum(1)
    return mean.log2().clamp(min=LEAST_SCORE)


def centred_keys(
    kv_cache: torch.Tensor, block_table: torch.Tensor, work: WorkList, heads: int
) -> torch.Tensor:
    """Return the keys that a work list sees, less their mean: ``[heads, tokens, head_dim]``."""
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], kv_cache.shape[3] // 2
    positions = torch.arange(work.max_fit_tokens, device=kv_cache.device)
    slots = physical_slots(positions, block_table[work.row], page)
    keys, _ = load_tokens(kv_cache, slots, head_dim)
    return (keys - mean_key(keys)[:, None]).repeat_interleave(heads // kv_heads, 0)


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
    heads, dtype = query.shape[1], image_dtype(query.device)
    scores = query.new_full(
        (work.num_items, heads, work.max_history), float("-inf"), dtype=torch.float32
    )
    if work.max_history == 0:
        return scores.half()
    keys = centred_keys(kv_cache, block_table, work, heads)
    for number, item in enumerate(work.items.tolist()):
        n, start = item[DENSE_START], item[QUERY_START]
        if n == 0:
            continue
        probes = probes_of(query[start : start + item[NUM_QUERIES]])
        probes = probes._replace(means=probes.means * (scale * LOG2E * UNIT))
        scores[number, :, :n] = list_scores(probes, keys, item, dtype)
    return scores.half()
