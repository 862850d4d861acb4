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
)
from ..paging import load_tokens, physical_slots, segment_queries
from ..selection.reference import sample_positions
from ..selection.selected import SelectedTokens
from ..tuning import ESTIMATE_EVERY, STOP_STEP_TOKENS
from ..work_list import WorkList


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    selected: SelectedTokens,
    out: torch.Tensor,
    counters: torch.Tensor,
    *,
    scale: float,
    v_scale: float = 1.0,
    stop_threshold: float = 0.0,
    stop_step: int = STOP_STEP_TOKENS,
    softcap: float = 0.0,
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

    for number, line in enumerate(work.segments.tolist()):
        start, count = line[QUERY_START], line[NUM_QUERIES]
        history, dense_start = line[HISTORY], line[DENSE_START]
        lengths = selected.lengths[number]
        listed = int(lengths.max())
        queries = segment_queries(query, line, kv_heads)
        device = query.device

        # Pass 1: dense and causal, from dense_start on.
        positions = torch.arange(dense_start, history + count, device=device)
        k_own, v_own = load_tokens(
            kv_cache, physical_slots(positions, block_table[line[ROW]], page), head_dim
        )
        s_own = scores(queries, k_own)
        own = torch.arange(history, history + count, device=device)
        s_own = s_own.masked_fill(positions > own[:, None], float("-inf"))

        # Pass 2: the selected slots, visible to every query, in the list's order.
        place = torch.arange(listed, device=device)
        slots = selected.slots[number, :, :listed] * (place < lengths[:, None])
        k_list, v_list = load_tokens(kv_cache, slots, head_dim)
        # Slot 0 is somebody else's, and may hold NaN.
        v_list = v_list.masked_fill((place >= lengths[:, None])[..., None], 0.0)
        s_list = scores(queries, k_list)
        # In base 2: how many tokens each stands for.
        s_list += selected.weights[number, :, None, None, :listed].float() * LN2
        s_list = s_list.masked_fill(place >= lengths[:, None, None, None], float("-inf"))
        visited = visited_tokens(
            s_own, s_list, lengths, queries_per_tile, stop_threshold, stop_step,
        )  # fmt: skip  # [kv_heads, queries]
        s_list = s_list.masked_fill(place >= visited[:, None, :, None], float("-inf"))

        p = torch.softmax(torch.cat([s_own, s_list], -1), -1)
        result = torch.einsum("hgqn,hnd->hgqd", p, torch.cat([v_own, v_list], 1))
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
            mass = torch.cat([s_own, s_list], -1).logsumexp(-1)
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
