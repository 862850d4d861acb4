"""What the kernels of ranking and attention compute, in plain PyTorch.

Written for reading: the tests compare every kernel with these functions, and a machine
without a GPU serves with them. Each takes the same arguments as its kernel.
"""

import math

import torch

from ..selection.reference import physical_slots, sample_positions
from ..work_list import (
    DENSE_START,
    DROPPED,
    DROPPED_UNIT,
    ESTIMATE_EVERY,
    FIT,
    HISTORY,
    NUM_QUERIES,
    QUERY_START,
    REGION_MOST,
    REGION_SPREAD,
    REGION_WEIGHT,
    ROW,
    SAMPLED,
    STOP_STEP_TOKENS,
    Lists,
    Regions,
    WorkList,
)
from . import basis

LOG2E = 1.4426950408889634

Item = list[int]


def load_tokens(
    kv_cache: torch.Tensor, slots: torch.Tensor, head_dim: int, heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather tokens from the paged cache.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        slots: integer ``[n]`` (the same for all heads) or ``[heads, n]``.
        head_dim: size of a head.
        heads: a multiple of kv_heads, whose neighbours share a KV head; None for kv_heads.

    Returns:
        Keys and values, each ``[heads, n, head_dim]`` in float32 and units of the cache.
    """
    page, heads = kv_cache.shape[2], heads or kv_cache.shape[1]
    slots = slots.long().expand(heads, -1)
    head = torch.arange(heads, device=slots.device)[:, None] * kv_cache.shape[1] // heads
    tokens = kv_cache[slots // page, head, slots % page].float()
    return tokens[..., :head_dim], tokens[..., head_dim:]


def mean_query_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    *,
    scale: float,
) -> torch.Tensor:
    """Score a segment's history by its mean query; see :func:`mean_query.mean_query_scores`."""
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    scores = query.new_full(
        (work.num_items, kv_heads, work.max_history), float("-inf"), dtype=torch.float32
    )
    for number, item in enumerate(work.items.tolist()):
        n = item[DENSE_START]
        if n == 0:
            continue
        queries = segment_queries(query, item, kv_heads)
        mean = queries.mean(2)  # [kv_heads, group, head_dim]
        positions = torch.arange(n, device=query.device)
        keys, _ = load_tokens(
            kv_cache, physical_slots(positions, block_table[item[ROW]], page), head_dim
        )
        logits = torch.einsum("hgd,hnd->hgn", mean, keys) * scale
        scores[number, :, :n] = group_log_probability(logits)
    return scores.half()


def low_rank_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    *,
    scale: float,
    precision: basis.Precision = basis.SERVED,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score by every query against a low-rank image; see :func:`low_rank.low_rank_scores`.

    ``chosen`` int ``[items, heads, rows]`` names the rows to score, where those of
    :func:`basis.scored_rows` are not wanted: rounding decides between rows of equal size.
    """
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    scores = query.new_full(
        (work.num_items, kv_heads, work.max_history), float("-inf"), dtype=torch.float32
    )
    if work.max_history == 0:
        return scores.half()
    heads = query.shape[1]
    own = basis.fit_span(
        query, kv_cache, block_table, work.row, work.chunk, heads, scale, precision.rank
    )
    positions = torch.arange(work.max_fit_tokens, device=query.device)
    keys, _ = load_tokens(
        kv_cache, physical_slots(positions, block_table[work.row], page), head_dim, heads
    )
    dtype = basis.image_dtype(query.device)
    images = basis.key_images(keys, own, dtype)  # [heads, tokens, width]
    for number, item in enumerate(work.items.tolist()):
        n = item[DENSE_START]
        if n == 0:
            continue
        queries = segment_queries(query, item, heads).flatten(1, 2)
        scored = basis.scored_rows(queries @ own.a, precision.row_step)  # [heads, rows]
        if chosen is not None:
            scored = chosen[number, :, : scored.shape[1]].long()
        by_head = row_scores(queries, scored, item, own, images, dtype)
        scores[number, :, :n] = by_head.unflatten(0, (kv_heads, -1)).amax(1)
    return scores.clamp(min=-torch.finfo(torch.half).max).half()


def row_scores(
    queries: torch.Tensor,
    scored: torch.Tensor,
    item: Item,
    fitted: basis.Basis,
    images: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Score an item's history by some of its rows.

    Args:
        queries: all its rows ``[bases, rows, head_dim]``, query by query.
        scored: which of them count, int64 ``[bases, some]``.
        item: of a work list.
        fitted: the bases.
        images: of all keys that the item sees, ``[bases, tokens, width]``.
        dtype: that images are rounded to.

    Returns:
        float32 ``[bases, history]``.
    """
    n, context, count = item[DENSE_START], item[HISTORY], item[NUM_QUERIES]
    group = queries.shape[1] // count
    queries = queries.gather(1, scored[..., None].expand(-1, -1, queries.shape[2]))
    positions = torch.arange(n, context + count, device=queries.device)
    visible = positions <= context + scored[..., None] // group
    past, beside = images[:, :n], images[:, n : context + count]
    rows = basis.query_images(queries, fitted, past, beside, visible, dtype)
    return (rows @ past.mT).amax(1)


def group_log_probability(logits: torch.Tensor) -> torch.Tensor:
    """Reduce the heads of a group to one score per token: the largest log2-probability.

    Args:
        logits: ``[..., group, n]``, natural-logarithm units.

    Returns:
        ``[..., n]``.
    """
    return (logits - logits.logsumexp(-1, keepdim=True)).amax(-2) * LOG2E


def segment_queries(query: torch.Tensor, item: Item, kv_heads: int) -> torch.Tensor:
    """Return a segment's queries as float32 ``[kv_heads, group, queries, head_dim]``."""
    start, count = item[QUERY_START], item[NUM_QUERIES]
    part = query[start : start + count].float()
    return part.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def region_weight(queries: torch.Tensor, spread: torch.Tensor, scale: float) -> torch.Tensor:
    """Return how many times a token of a region counts for each query (ours; see :mod:`work_list`).

    Args:
        queries: ``[..., n, head_dim]``.
        spread: covariance of the keys, ``[..., head_dim, head_dim]``.
        scale: softmax scale.

    Returns:
        ``[..., n]``.
    """
    variance = ((queries @ spread) * queries).sum(-1).clamp(min=0) * scale**2
    return (REGION_WEIGHT * (REGION_SPREAD * variance).exp()).clamp(max=REGION_MOST)


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    lists: Lists,
    regions: Regions,
    out: torch.Tensor,
    counters: torch.Tensor,
    *,
    scale: float,
    v_scale: float = 1.0,
    stop_threshold: float = 0.0,
    stop_step: int = STOP_STEP_TOKENS,
    softcap: float = 0.0,
    order: torch.Tensor | None = None,
    queries_per_tile: int,
) -> None:
    """Attend to every segment's own tokens and to its list; see :func:`attend.attend`.

    ``queries_per_tile`` is the number of queries that stop together (the tile's rows over
    the GQA group).
    """
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    group = query.shape[1] // kv_heads

    def scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        s = torch.einsum("hgqd,hnd->hgqn", queries, keys) * scale
        return softcap * torch.tanh(s / softcap) if softcap else s

    for number, item in enumerate(work.items.tolist()):
        start, count = item[QUERY_START], item[NUM_QUERIES]
        history, dense_start = item[HISTORY], item[DENSE_START]
        lengths = lists.lengths[number]
        listed = int(lengths.max())
        queries = segment_queries(query, item, kv_heads)
        device = query.device

        # Pass 1: dense and causal, from dense_start on.
        positions = torch.arange(dense_start, history + count, device=device)
        k_own, v_own = load_tokens(
            kv_cache, physical_slots(positions, block_table[item[ROW]], page), head_dim
        )
        s_own = scores(queries, k_own)
        own = torch.arange(history, history + count, device=device)
        s_own = s_own.masked_fill(positions > own[:, None], float("-inf"))

        # Pass 2: the listed slots, visible to every query, in the list's order.
        place = torch.arange(listed, device=device)
        slots = lists.slots[number, :, :listed] * (place < lengths[:, None])
        k_list, v_list = load_tokens(kv_cache, slots, head_dim)
        # Slot 0 is somebody else's, and may hold NaN.
        v_list = v_list.masked_fill((place >= lengths[:, None])[..., None], 0.0)
        s_list = scores(queries, k_list)
        s_list = s_list.masked_fill(place >= lengths[:, None, None, None], float("-inf"))
        visited = visited_tokens(
            s_own, s_list, lengths, queries_per_tile, stop_threshold, stop_step,
            order[number, :, :count].long() if order is not None else None,
        )  # fmt: skip  # [kv_heads, queries]
        s_list = s_list.masked_fill(place >= visited[:, None, :, None], float("-inf"))

        # What was not visited, as means of whole regions.
        means = regions.of(item[FIT], dense_start).float()
        k_mean, v_mean = means[..., :head_dim], means[..., head_dim:]
        missing = regions.tokens * (1 - visited / max(dense_start, 1))[:, None]
        if means.shape[1]:
            spread = regions.spreads[item[FIT]].float()[:, None]
            missing = missing * region_weight(queries, spread, scale)
        s_mean = scores(queries, k_mean) + missing.log()[..., None]

        p = torch.softmax(torch.cat([s_own, s_list, s_mean], -1), -1)
        values = torch.cat([v_own, v_list, v_mean], 1)
        result = torch.einsum("hgqn,hnd->hgqd", p, values)
        if means.shape[1]:
            lean = queries * scale * p[..., p.shape[-1] - means.shape[1] :].sum(-1, keepdim=True)
            result += torch.einsum("hgqd,hde->hgqe", lean, regions.slopes[item[FIT]].float())
        result *= v_scale
        result = result.permute(2, 0, 1, 3).reshape(count, kv_heads * group, head_dim)
        out[item[QUERY_START] : start + count] = result.to(out.dtype)

        dense = (history - dense_start) * count * kv_heads
        tiles = -(-count // queries_per_tile)
        stopped = (
            visited[:, ::queries_per_tile]
            if order is None
            else tile_firsts(visited, order[number, :, :count].long(), queries_per_tile)
        )
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
                kv_cache, physical_slots(sample, block_table[item[ROW]], page), head_dim
            )
            places = lists.samples[number // ESTIMATE_EVERY, :, None, : len(sample)]
            skipped = (places >= visited[..., None]) | (visited[..., None] == 0)
            lost = scores(queries, k).masked_fill(~skipped[:, None], float("-inf")).logsumexp(-1)
            lost += math.log(dense_start / max(len(sample), 1))
            mass = torch.cat([s_own, s_list], -1).logsumexp(-1)
            dropped = float(torch.sigmoid(lost - mass).nan_to_num(0.0).sum())
            counters[DROPPED] += round(dropped / DROPPED_UNIT)


def tile_firsts(values: torch.Tensor, order: torch.Tensor, queries_per_tile: int) -> torch.Tensor:
    """Return ``values`` [kv_heads, queries] at each tile's first query."""
    return values.gather(1, order)[:, ::queries_per_tile]


def visited_tokens(
    s_own: torch.Tensor,
    s_list: torch.Tensor,
    lengths: torch.Tensor,
    queries_per_tile: int,
    stop_threshold: float,
    stop_step: int,
    order: torch.Tensor | None,
) -> torch.Tensor:
    """Return how many listed tokens each query visits before its tile stops.

    After each whole step of ``stop_step`` tokens a tile ends if no row's mass grew by
    ``stop_threshold`` of what it then is (S2O, early stop on measured mass; the maximum
    over rows is ours: no row is cut while it still gains).

    Args:
        s_own: ``[kv_heads, group, queries, own]`` scores of pass 1, -inf where masked.
        s_list: ``[kv_heads, group, queries, listed]`` scores in the order of visiting, -inf
            behind a list's end.
        lengths: ``[kv_heads]``, tokens of the lists.
        queries_per_tile: queries that stop together.
        stop_threshold: relative gain of mass, 0 for no stop.
        stop_step: tokens a step.
        order: ``[kv_heads, queries]``, which query fills which place; None for as they are.

    Returns:
        int64 ``[kv_heads, queries]``.
    """
    kv_heads, _, count, listed = s_list.shape
    visited = lengths.long()[:, None].repeat(1, count)
    if stop_threshold <= 0 or listed == 0:
        return visited
    places = torch.arange(count, device=s_list.device).expand(kv_heads, -1)
    tile = torch.empty_like(places).scatter_(
        1, order if order is not None else places, places // queries_per_tile
    )
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
