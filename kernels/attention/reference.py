"""What the kernels of :mod:`summaries` compute, in plain PyTorch; see :mod:`ranking.reference`."""

import torch

from ..ranking.reference import load_tokens
from ..selection.reference import physical_slots
from ..work_list import (
    REGION_TOKENS,
    SLOPE_GROUP,
    SLOPE_SAMPLES,
    SLOPE_WEIGHT,
    Regions,
    WorkList,
    region_samples,
    slope_span,
)


def average(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    dtype: torch.dtype,
    region: int = REGION_TOKENS,
) -> Regions:
    """Average the regions of a request's history into ``dtype``; see :func:`summaries.average`."""
    page, head_dim = kv_cache.shape[2], kv_cache.shape[3] // 2
    samples = region_samples(work.whole_chunk, region)
    positions = region_positions(work.max_fit_tokens, samples, kv_cache.device, region)
    tokens = torch.cat(
        load_tokens(
            kv_cache, physical_slots(positions.flatten(), block_table[work.row], page), head_dim
        ),
        -1,
    )
    means = tokens.unflatten(1, positions.shape).mean(2)
    span = slope_span(work.whole_chunk, region)
    sampled = slope_positions(work.max_fit_tokens, span, kv_cache.device, region)
    slots = physical_slots(sampled.flatten(), block_table[work.row], page)
    keys, values = (x.unflatten(1, sampled.shape) for x in load_tokens(kv_cache, slots, head_dim))
    cuts = work.fit_span
    starts = [max(tokens - queries, 0) // cuts * cuts for _, queries, tokens in work.fits.tolist()]
    most = torch.finfo(dtype).max
    slopes, spreads = (
        torch.stack([covariance(keys, others, start // span) * weight for start in starts])
        for others, weight in ((values, SLOPE_WEIGHT), (keys, 1.0))
    )
    return Regions(means.to(dtype), slopes.to(dtype), spreads.clamp(-most, most).to(dtype), region)


def region_positions(
    history: int, samples: int, device: torch.device, region: int = REGION_TOKENS
) -> torch.Tensor:
    """Return which tokens tell the mean of every whole region: ``[regions, samples]``."""
    starts = torch.arange(history // region, device=device)[:, None] * region
    return starts + (2 * torch.arange(samples, device=device) + 1) * region // (2 * samples)


def slope_positions(
    history: int, span: int, device: torch.device, region: int = REGION_TOKENS
) -> torch.Tensor:
    """Return which tokens tell a slope and a spread: ``[parts, groups, samples of a group]``."""
    samples = min(SLOPE_SAMPLES, region)
    step = span // samples
    starts = torch.arange(history // span, device=device)[:, None] * span
    positions = starts + torch.arange(samples, device=device) * step + step // 2
    return positions.unflatten(1, (-1, min(SLOPE_GROUP, samples)))


def covariance(keys: torch.Tensor, others: torch.Tensor, parts: int) -> torch.Tensor:
    """Return what the first ``parts`` of :func:`slope_positions` tell of keys and others.

    Args:
        keys: ``[kv_heads, parts, groups, samples, head_dim]``, at those positions.
        others: keys or values, likewise.
        parts: how many count; none give zeros.

    Returns:
        ``[kv_heads, head_dim, head_dim]``: the covariance of keys (rows) and others inside
        groups.
    """
    keys, others = (x[:, :parts] for x in (keys, others))
    keys, others = (x - x.mean(3, keepdim=True) for x in (keys, others))
    total = torch.einsum("hpgsd,hpgse->hde", keys, others)
    return total / max(1, keys.shape[1:4].numel())
