"""What the kernels of the rankings compute, in plain PyTorch.

Written for reading: the tests compare every kernel with these functions, and a machine
without a GPU serves with them. Each takes the same arguments as its kernel.
"""

import torch

from ..layout import DENSE_START, HISTORY, LOG2E, NUM_QUERIES, ROW
from ..paging import load_tokens, physical_slots, segment_queries
from ..work_list import WorkList
from . import basis

Item = list[int]


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
        (work.num_segments, kv_heads, work.max_history), float("-inf"), dtype=torch.float32
    )
    for number, item in enumerate(work.segments.tolist()):
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
        (work.num_segments, kv_heads, work.max_history), float("-inf"), dtype=torch.float32
    )
    if work.max_history == 0:
        return scores.half()
    heads = query.shape[1]
    own = basis.fit_span(
        query, kv_cache, block_table, work.row, work.chunk, heads, scale, precision.rank
    )
    positions = torch.arange(work.max_seen, device=query.device)
    keys, _ = load_tokens(
        kv_cache, physical_slots(positions, block_table[work.row], page), head_dim, heads
    )
    dtype = basis.image_dtype(query.device)
    images = basis.key_images(keys, own, dtype)  # [heads, tokens, width]
    for number, item in enumerate(work.segments.tolist()):
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
