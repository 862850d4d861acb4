"""What the kernels of attention compute, in plain PyTorch; see :mod:`ranking.reference`."""

import math

import torch

from ..layout import (
    DENSE_START,
    DROPPED,
    DROPPED_UNIT,
    HISTORY,
    LN2,
    NUM_QUERIES,
    QUERY_START,
    ROW,
    SAMPLED,
    SPAN,
)
from ..paging import load_tokens, physical_slots, segment_queries
from ..selection.reference import sample_positions
from ..selection.selected import SelectedTokens
from ..tuning import (
    COVARIANCE_GROUP,
    COVARIANCE_SAMPLES,
    COVARIANCE_WEIGHT,
    ESTIMATE_EVERY,
    REGION_TOKENS,
    REGION_VARIANCE,
    REGION_WEIGHT,
    REGION_WEIGHT_LIMIT,
    SAMPLE_SHARE,
    STOP_STEP_TOKENS,
)
from ..work_list import WorkList
from .summary_table import Summaries, covariance_part, region_samples


def summarise(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    dtype: torch.dtype,
    region: int = REGION_TOKENS,
) -> Summaries:
    """Summarise a request's history in ``dtype``; see :func:`summaries.summarise`."""
    page, head_dim = kv_cache.shape[2], kv_cache.shape[3] // 2
    samples = region_samples(work.whole_chunk, region)
    positions = region_positions(work.max_seen, samples, kv_cache.device, region)
    tokens = torch.cat(
        load_tokens(
            kv_cache, physical_slots(positions.flatten(), block_table[work.row], page), head_dim
        ),
        -1,
    )
    means = tokens.unflatten(1, positions.shape).mean(2)
    span = covariance_part(work.whole_chunk, region)
    sampled = covariance_positions(work.max_seen, span, kv_cache.device, region)
    slots = physical_slots(sampled.flatten(), block_table[work.row], page)
    keys, values = (x.unflatten(1, sampled.shape) for x in load_tokens(kv_cache, slots, head_dim))
    cuts = work.span_length
    starts = [
        max(tokens - queries, 0) // cuts * cuts for _, queries, tokens in work.span_table.tolist()
    ]
    most = torch.finfo(dtype).max
    value_covariances, key_covariances = (
        torch.stack([covariance(keys, others, start // span) * weight for start in starts])
        for others, weight in ((values, COVARIANCE_WEIGHT), (keys, 1.0))
    )
    return Summaries(
        means.to(dtype),
        value_covariances.to(dtype),
        key_covariances.clamp(-most, most).to(dtype),
        region,
    )


def region_positions(
    history: int, samples: int, device: torch.device, region: int = REGION_TOKENS
) -> torch.Tensor:
    """Return the sampled tokens of every whole region: ``[regions, samples]``."""
    starts = torch.arange(history // region, device=device)[:, None] * region
    return starts + (2 * torch.arange(samples, device=device) + 1) * region // (2 * samples)


def covariance_positions(
    history: int, span: int, device: torch.device, region: int = REGION_TOKENS
) -> torch.Tensor:
    """Return the sampled tokens of covariance parts ``[parts, groups, samples of a group]``."""
    samples = min(COVARIANCE_SAMPLES, region)
    step = span // samples
    starts = torch.arange(history // span, device=device)[:, None] * span
    positions = starts + torch.arange(samples, device=device) * step + step // 2
    return positions.unflatten(1, (-1, min(COVARIANCE_GROUP, samples)))


def covariance(keys: torch.Tensor, others: torch.Tensor, parts: int) -> torch.Tensor:
    """Return the covariance of keys and others inside groups, over the first ``parts``.

    Args:
        keys: ``[kv_heads, parts, groups, samples, head_dim]``, see :func:`covariance_positions`.
        others: keys or values, likewise.
        parts: how many count; without any the result is 0.

    Returns:
        ``[kv_heads, head_dim, head_dim]``: the covariance of keys (rows) and others inside
        groups.
    """
    keys, others = (x[:, :parts] for x in (keys, others))
    keys, others = (x - x.mean(3, keepdim=True) for x in (keys, others))
    total = torch.einsum("hpgsd,hpgse->hde", keys, others)
    return total / max(1, keys.shape[1:4].numel())


def region_mass(queries: torch.Tensor, key_covariance: torch.Tensor, scale: float) -> torch.Tensor:
    """Return exp(log-mass correction): how many times a region's tokens count for each query.

    Args:
        queries: ``[..., n, head_dim]``.
        key_covariance: ``[..., head_dim, head_dim]``.
        scale: softmax scale.

    Returns:
        ``[..., n]``.
    """
    variance = ((queries @ key_covariance) * queries).sum(-1).clamp(min=0) * scale**2
    return (REGION_WEIGHT * (REGION_VARIANCE * variance).exp()).clamp(max=REGION_WEIGHT_LIMIT)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    selected: SelectedTokens,
    summaries: Summaries,
    out: torch.Tensor,
    counters: torch.Tensor,
    *,
    scale: float,
    v_scale: float = 1.0,
    stop_threshold: float = 0.0,
    stop_step: int = STOP_STEP_TOKENS,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    queries_per_tile: int,
) -> None:
    """Attend to every segment's own tokens and to its list; see :func:`attend.attend`.

    ``queries_per_tile`` is the number of queries that stop together (the tile's rows over
    the GQA group).
    """
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    group = query.shape[1] // kv_heads

    def scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        s = ((queries * scale).flatten(1, 2) @ keys.mT).unflatten(1, (group, -1))
        return s.div_(softcap).tanh_().mul_(softcap) if softcap else s

    for number, line in enumerate(work.segments.tolist()):
        start, count = line[QUERY_START], line[NUM_QUERIES]
        history, dense_start = line[HISTORY], line[DENSE_START]
        lengths = selected.lengths[number]
        listed = int(lengths.max())
        queries = segment_queries(query, line, kv_heads)
        device = query.device

        # Pass 1: dense and causal, from dense_start on.
        positions = torch.arange(dense_start, history + count, device=device)
        slots = physical_slots(positions, block_table[line[ROW]], page)
        own = list(load_tokens(kv_cache, slots, head_dim))
        if sinks is not None:  # a token before all others, visible to every query, without a value
            own = [torch.nn.functional.pad(x, (0, 0, 1, 0)) for x in own]

        # Pass 2: the selected slots, visible to every query, in the list's order.
        beyond = torch.arange(listed, device=device) >= lengths[:, None]
        slots = selected.slots[number, :, :listed].masked_fill(beyond, 0)
        # Slot 0 is somebody else's, and may hold NaN.
        chosen = [
            x.masked_fill_(beyond[..., None], 0.0) for x in load_tokens(kv_cache, slots, head_dim)
        ]

        # Skipped tokens, as summaries of whole regions.
        means = summaries.means_of(line[SPAN], dense_start).float().split(head_dim, -1)
        keys, values = (torch.cat(parts, 1) for parts in zip(own, chosen, means, strict=True))

        # One tensor: copies of it would take as long as the products.
        s = scores(queries, keys)
        s_own, s_list, s_mean = s.split([x.shape[1] for x in (own[0], chosen[0], means[0])], -1)
        future = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)
        s_own[..., -count:].masked_fill_(future, float("-inf"))
        if sinks is not None:
            s_own[..., 0] = sinks.float().view(kv_heads, group, 1)
        # In base 2: how many tokens each stands for.
        weights = selected.weights[number, :, :listed].float() * LN2
        s_list += weights.masked_fill(beyond, float("-inf"))[:, None, None]
        visited = visited_tokens(
            s_own, s_list, lengths, queries_per_tile, stop_threshold, stop_step,
        )  # fmt: skip  # [kv_heads, queries]
        if stop_threshold > 0:
            place = torch.arange(listed, device=device)
            s_list.masked_fill_(place >= visited[:, None, :, None], float("-inf"))
        missing = summaries.region_tokens * (1 - visited / max(dense_start, 1))[:, None]
        missing *= 1 - SAMPLE_SHARE
        if s_mean.shape[-1]:
            key_covariance = summaries.key_covariances[line[SPAN]].float()[:, None]
            missing = missing * region_mass(queries, key_covariance, scale)
        s_mean += missing.log()[..., None]

        p = torch.softmax(s, -1)
        result = (p.flatten(1, 2) @ values).unflatten(1, (group, -1))
        if s_mean.shape[-1]:
            of_means = p[..., p.shape[-1] - s_mean.shape[-1] :].sum(-1, keepdim=True)
            value_covariance = summaries.value_covariances[line[SPAN]].float()[:, None]
            result += (queries * scale * of_means) @ value_covariance
        result *= v_scale
        result = result.permute(2, 0, 1, 3).reshape(count, kv_heads * group, head_dim)
        out[line[QUERY_START] : start + count] = result.to(out.dtype)

        dense = (history - dense_start) * count * kv_heads
        tiles = -(-count // queries_per_tile)
        stopped = visited[:, ::queries_per_tile]
        counters += torch.tensor(
            [
                (int(visited.sum()) + dense) * group,
                history * count * kv_heads * group,
                tiles * kv_heads,
                int((stopped < lengths[:, None]).sum()),
                0,
                0,
            ],
            device=counters.device,
        )
        if number % ESTIMATE_EVERY:
            continue
        counters[SAMPLED] += count * kv_heads * group
        if dense_start > 0:
            sample = sample_positions(dense_start, device)
            k, _ = load_tokens(
                kv_cache, physical_slots(sample, block_table[line[ROW]], page), head_dim
            )
            sampled = selected.samples[number // ESTIMATE_EVERY, :, None, : len(sample)]
            skipped = (sampled >= visited[..., None]) | (visited[..., None] == 0)
            lost = scores(queries, k).masked_fill(~skipped[:, None], float("-inf")).logsumexp(-1)
            lost += math.log(dense_start / max(len(sample), 1))
            mass = s.logsumexp(-1)
            dropped = float((lost - mass).exp().clamp(max=1).nan_to_num(0.0).sum())
            counters[DROPPED] += round(dropped / DROPPED_UNIT)


def visited_tokens(
    s_own: torch.Tensor,
    s_list: torch.Tensor,
    lengths: torch.Tensor,
    queries_per_tile: int,
    stop_threshold: float,
    stop_step: int,
) -> torch.Tensor:
    """Return how many listed tokens each query visits before its tile stops.

    After each whole step of ``stop_step`` tokens a tile ends if no row's mass grew by
    ``stop_threshold`` of what it then is (S2O, early stop on measured mass; the maximum
    over rows is ours: no row is cut while it still gains).

    Args:
        s_own: ``[kv_heads, group, queries, own]`` scores of pass 1, -inf where masked.
        s_list: ``[kv_heads, group, queries, listed]`` scores in the order of visiting, -inf
            behind a list's end.
        lengths: ``[kv_heads]``, tokens of the selected.
        queries_per_tile: queries that stop together.
        stop_threshold: relative gain of mass, 0 for no stop.
        stop_step: tokens a step.

    Returns:
        int64 ``[kv_heads, queries]``.
    """
    kv_heads, _, count, listed = s_list.shape
    visited = lengths.long()[:, None].repeat(1, count)
    if stop_threshold <= 0 or listed == 0:
        return visited
    tile = torch.arange(count, device=s_list.device).expand(kv_heads, -1) // queries_per_tile
    mass = s_own.double().logsumexp(-1)
    running = torch.ones((kv_heads, count), dtype=torch.bool, device=s_list.device)
    for stop in range(stop_step, listed + 1, stop_step):
        step = s_list[..., stop - stop_step : stop].double().logsumexp(-1)
        total = torch.logaddexp(mass, step)
        gains = (1 - torch.exp(mass - total)).amax(1)  # over the group: [kv_heads, queries]
        tile_gain = torch.zeros_like(gains).scatter_reduce_(1, tile, gains, "amax")
        ends = running & (tile_gain.gather(1, tile) < stop_threshold) & (stop <= lengths[:, None])
        visited[ends] = stop
        running &= ~ends
        mass = total
    return visited
