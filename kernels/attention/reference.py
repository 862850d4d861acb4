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
    SLOT,
)
from ..paging import load_tokens, physical_slots, segment_queries
from ..sampling import mixed, stratified
from ..selection.reference import sample_positions
from ..selection.selected import SelectedTokens
from ..tuning import (
    CACHED_TOKENS,
    CLUSTER_PASSES,
    CLUSTER_SAMPLES,
    CLUSTERS,
    COVARIANCE_PARTS,
    COVARIANCE_SAMPLES,
    COVARIANCE_WEIGHT,
    ESTIMATE_EVERY,
    REGION_TOKENS,
    STOP_STEP_TOKENS,
    SUMMARY_VARIANCE,
    SUMMARY_WEIGHT_LIMIT,
)
from ..work_list import WorkList
from .summary_table import NO_SUMMARY, REGIONS, Summaries, history_before_chunk


def summarise(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    dtype: torch.dtype,
    clusters: int = CLUSTERS,
    region: int = REGION_TOKENS,
) -> Summaries:
    """Summarise a request's history in ``dtype``; see :func:`summaries.summarise`."""
    seen = work.max_seen
    slots = physical_slots(
        torch.arange(seen, device=kv_cache.device), block_table[work.row], kv_cache.shape[2]
    )
    keys, values = load_tokens(kv_cache, slots, kv_cache.shape[3] // 2)
    start = history_before_chunk(seen, work.span_length)
    return cluster(keys, values, start, dtype, clusters, region)


def cluster(
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    dtype: torch.dtype,
    clusters: int = CLUSTERS,
    region: int = REGION_TOKENS,
    passes: int = CLUSTER_PASSES,
) -> Summaries:
    """Cluster tokens before ``start``, and average regions of those behind it.

    Args:
        keys: float32 ``[kv_heads, tokens, head_dim]``.
        values: likewise.
        start: tokens that are clustered.
        dtype: of the result.
        clusters: how many.
        region: tokens of a region.
        passes: assignments of tokens to clusters, the last one of all tokens.
    """
    (heads, seen, head_dim), device = keys.shape, keys.device
    rows, both = clusters + REGIONS, torch.cat([keys, values], -1)
    step, most = max(1, -(-start // CLUSTER_SAMPLES)), torch.finfo(dtype).max
    sample = stratified(start, step).to(device)
    means = both.new_zeros(heads, rows, 2 * head_dim)
    weight = both.new_ones(heads, 1, 2 * head_dim)
    if start > 0:
        means[:, :clusters] = both[:, initial_positions(start, clusters).to(device)]
        weight[..., head_dim:] = value_weight(means[:, :clusters], head_dim)
    place = (torch.arange(seen, device=device) - start) // region
    labels = torch.where(place < REGIONS, clusters + place, NO_SUMMARY).repeat(heads, 1)
    for number in range(passes):
        of = torch.arange(start, device=device) if number == passes - 1 else sample
        own = means[:, :clusters]
        half = 0.5 * (own * own * weight).sum(-1)[:, None]
        centres = (own * weight).clamp(-most, most).to(dtype).float()
        labels[:, of] = nearest(both[:, of], centres, half)
        if number == passes - 1:
            sample = torch.cat([sample, torch.arange(start, seen, device=device)])
        new, count = means_of(both[:, sample], labels[:, sample], rows)
        means = torch.where(count[..., None] > 0, new.to(dtype).float(), means)
    sizes = torch.stack([one.bincount(minlength=NO_SUMMARY + 1)[:rows] for one in labels])
    end = start or min(seen, region)
    sample = stratified(end, max(1, -(-end // (COVARIANCE_PARTS * COVARIANCE_SAMPLES))))
    sample = sample.to(device)
    inside = both[:, sample] - means.gather(1, labels[:, sample, None].expand(-1, -1, 2 * head_dim))
    covariances = inside[..., :head_dim].mT @ inside / max(1, len(sample))
    of_keys, of_values = covariances.clamp(-most, most).split(head_dim, -1)
    return Summaries(
        means.to(dtype)[None],
        sizes.int()[None],
        labels.to(torch.uint8)[None],
        torch.tensor([start], dtype=torch.int32, device=device),
        (of_values * COVARIANCE_WEIGHT).to(dtype).contiguous()[None],
        of_keys.to(dtype).contiguous()[None],
        clusters,
        region,
    )


def initial_positions(tokens: int, count: int) -> torch.Tensor:
    """Return positions of the tokens that clusters begin with: int64 ``[count]``, ascending."""
    number = torch.arange(count)
    return number * tokens // count + (mixed(number) >> 4) % max(tokens // count, 1)


def value_weight(tokens: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return how many times a value's squared distance counts beside a key's.

    Args:
        tokens: float32 ``[kv_heads, tokens, 2 * head_dim]``.
        head_dim: size of a key.

    Returns:
        float32 ``[kv_heads, 1, 1]``: the keys' variance over the values', 0 where values hardly
        vary.
    """
    varies = (tokens - tokens.mean(1, keepdim=True)).square().sum(1)
    of_keys, of_values = (part.sum(-1) for part in varies.split(head_dim, -1))
    squares = tokens[..., head_dim:].square().sum((1, 2))
    weight = of_keys / of_values.clamp(min=1e-30)
    return torch.where(of_values > 1e-4 * squares, weight, 0.0)[:, None, None]


def nearest(tokens: torch.Tensor, centres: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Return the nearest centre of each token.

    Args:
        tokens: float32 ``[kv_heads, tokens, width]``.
        centres: float32 ``[kv_heads, clusters, width]``, what tokens are multiplied with.
        half: float32 ``[kv_heads, 1, clusters]``, half of their squared lengths.

    Returns:
        int64 ``[kv_heads, tokens]``.
    """
    parts = tokens.split(CACHED_TOKENS, 1)
    return torch.cat([(part @ centres.mT - half).argmax(-1) for part in parts], 1)


def means_of(
    tokens: torch.Tensor, labels: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each label's mean and number of tokens.

    Args:
        tokens: float32 ``[kv_heads, tokens, width]``.
        labels: int64 ``[kv_heads, tokens]``; those of ``rows`` and above count for nothing.
        rows: of the result.

    Returns:
        float32 ``[kv_heads, rows, width]`` and ``[kv_heads, rows]``.
    """
    labels = labels.clamp(max=rows)
    sums = tokens.new_zeros(tokens.shape[0], rows + 1, tokens.shape[2])
    sums.scatter_add_(1, labels[..., None].expand_as(tokens), tokens)
    count = tokens.new_zeros(sums.shape[:2])
    count.scatter_add_(1, labels, tokens.new_ones(labels.shape))
    return (sums / count.clamp(min=1)[..., None])[:, :rows], count[:, :rows]


def summary_mass(queries: torch.Tensor, key_covariance: torch.Tensor, scale: float) -> torch.Tensor:
    """Return exp(log-mass correction): how many times a summary's tokens count for each query.

    Args:
        queries: ``[..., n, head_dim]``.
        key_covariance: ``[..., head_dim, head_dim]``.
        scale: softmax scale.

    Returns:
        ``[..., n]``.
    """
    variance = ((queries @ key_covariance) * queries).sum(-1).clamp(min=0) * scale**2
    return (SUMMARY_VARIANCE * variance).exp().clamp(max=SUMMARY_WEIGHT_LIMIT)


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

        # Skipped tokens, as summaries.
        held, left = summaries.of(line[SLOT]), selected.left
        means = held.means[0].float().split(head_dim, -1)
        if left is None:
            means = [x[:, :0] for x in means]
        keys, values = (torch.cat(parts, 1) for parts in zip(own, chosen, means, strict=True))

        # One tensor: copies of it would take as long as the products.
        s = scores(queries, keys)
        s_own, s_list, s_mean = s.split([x.shape[1] for x in (own[0], chosen[0], means[0])], -1)
        future = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)
        s_own[..., -count:].masked_fill_(future, float("-inf"))
        if sinks is not None:
            s_own[..., 0] = sinks.float().view(kv_heads, group, 1)
        s_list.masked_fill_(beyond[:, None, None], float("-inf"))
        visited = visited_tokens(
            s_own, s_list, lengths, queries_per_tile, stop_threshold, stop_step,
        )  # fmt: skip  # [kv_heads, queries]
        if stop_threshold > 0:
            place = torch.arange(listed, device=device)
            s_list.masked_fill_(place >= visited[:, None, :, None], float("-inf"))
        if left is not None:
            mass = summary_mass(queries, held.key_covariances[0].float()[:, None], scale)
            s_mean += mass.log()[..., None] + left[number, :, None, None] * LN2

        p = torch.softmax(s, -1)
        result = (p.flatten(1, 2) @ values).unflatten(1, (group, -1))
        if left is not None:
            of_means = p[..., p.shape[-1] - s_mean.shape[-1] :].sum(-1, keepdim=True)
            result += (queries * scale * of_means) @ held.value_covariances[0].float()[:, None]
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
            tokens = torch.cat([s_own, s_list], -1).logsumexp(-1)
            dropped = float((lost - torch.logaddexp(lost, tokens)).exp().nan_to_num(0.0).sum())
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
