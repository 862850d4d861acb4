"""What the kernels of the rankings compute, in plain PyTorch.

Written for reading: the tests compare every kernel with these functions, and a machine
without a GPU serves with them. Each takes the same arguments as its kernel.
"""

import torch

from ..layout import DENSE_START, HISTORY, LOG2E, NUM_QUERIES, ROW
from ..paging import load_tokens, physical_slots, segment_queries
from ..work_list import WorkList
from . import basis, retrieval

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
    """Score by rows against low-rank images; see :func:`low_rank.low_rank_scores`.

    ``chosen``: see :func:`scores_by_head`.
    """
    by_head = scores_by_head(
        query, kv_cache, block_table, work, scale=scale, precision=precision, chosen=chosen
    )
    return _of_groups(by_head, kv_cache.shape[1])


def _of_groups(by_head: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Return the largest scores of each group's heads, as the kernels store them."""
    scores = by_head.unflatten(1, (kv_heads, -1)).amax(2)
    return scores.clamp(min=-torch.finfo(torch.half).max).half()


class LowRank:
    """The ranking that serves: all heads narrowly, retrieval heads widely; see :mod:`retrieval`.

    Called like :func:`low_rank_scores`; lists of a chunk must come in order.

    Attributes:
        heads: int64, the chunk's retrieval heads.
    """

    heads = torch.empty(0, dtype=torch.int64)

    def __call__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        work: WorkList,
        *,
        scale: float,
    ) -> torch.Tensor:
        """Score a work list."""
        arguments, kv_heads = (query, kv_cache, block_table, work), kv_cache.shape[1]
        scores = scores_by_head(*arguments, scale=scale)
        if work.first_of_chunk:
            looked_at = retrieval.looked_at(work.num_segments)
            exact = probe_scores(*arguments, looked_at, scale=scale)
            histories = work.segments[looked_at, DENSE_START]
            self.heads = retrieval.retrieval_heads(exact, histories, kv_heads).nonzero()[:, 0]
        if len(self.heads):
            wide = scores_by_head(*arguments, scale=scale, precision=basis.WIDE, heads=self.heads)
            scores[:, self.heads] = torch.maximum(scores[:, self.heads], wide)
        return _of_groups(scores, kv_heads)


def scores_by_head(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    *,
    scale: float,
    precision: basis.Precision = basis.SERVED,
    chosen: torch.Tensor | None = None,
    heads: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score histories by low-rank images, head by head.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        precision: of the estimate.
        chosen: int ``[items, heads, rows]``, the rows to score, where those of
            :func:`basis.scored_rows` are not wanted: rounding decides between rows of equal size.
        heads: int64, which heads; None for all.

    Returns:
        float32 ``[items, heads, max_history]``, -inf behind a history.
    """
    page, head_dim, number = kv_cache.shape[2], query.shape[2], query.shape[1]
    heads = torch.arange(number, device=query.device) if heads is None else heads
    scores = query.new_full(
        (work.num_segments, len(heads), work.max_history), float("-inf"), dtype=torch.float32
    )
    if work.max_history == 0:
        return scores
    own = basis.fit_span(
        query, kv_cache, block_table, work.row, work.chunk, number, scale, precision.rank
    )
    own = basis.Basis(*(part[heads] for part in own))
    positions = torch.arange(work.max_seen, device=query.device)
    keys, _ = load_tokens(
        kv_cache, physical_slots(positions, block_table[work.row], page), head_dim
    )
    keys = keys[heads * kv_cache.shape[1] // number]
    dtype = basis.image_dtype(query.device)
    images = basis.key_images(keys, own, dtype)  # [heads, tokens, width]
    for i_item, item in enumerate(work.segments.tolist()):
        n = item[DENSE_START]
        if n == 0:
            continue
        queries = segment_queries(query, item, number).flatten(1, 2)[heads]
        scored = basis.scored_rows(queries @ own.a, precision.row_step)  # [heads, rows]
        if chosen is not None:
            scored = chosen[i_item, :, : scored.shape[1]].long()
        scores[i_item, :, :n] = row_scores(queries, scored, item, own, images, dtype)
    return scores


def probe_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    looked_at: list[int],
    *,
    scale: float,
) -> torch.Tensor:
    """Score histories by exact products of the probes, less their log-sum-exps in 29 directions.

    Arguments are those of :func:`scores_by_head`, and which segments; see :mod:`retrieval`.

    Returns:
        float32 ``[segments, heads, max_history]``, -inf behind a history.
    """
    page, head_dim, heads = kv_cache.shape[2], query.shape[2], query.shape[1]
    scores = query.new_full(
        (len(looked_at), heads, work.max_history), float("-inf"), dtype=torch.float32
    )
    if work.max_history == 0:
        return scores
    arguments = (kv_cache, block_table, work.row, work.chunk, heads)
    own = basis.fit_span(query, *arguments, scale)
    mean = basis.sampled_keys(*arguments).float().mean(1, keepdim=True)
    slots = torch.arange(work.max_seen, device=query.device)
    slots = physical_slots(slots, block_table[work.row], page)
    keys, _ = load_tokens(kv_cache, slots, head_dim, heads)
    dtype = basis.image_dtype(query.device)
    images = basis.key_images(keys, own, dtype)
    factors = torch.tensor(basis.SHIFT_FACTORS, device=query.device)
    for number, item in enumerate(work.segments[looked_at].tolist()):
        n = item[DENSE_START]
        if n == 0:
            continue
        queries = segment_queries(query, item, heads).flatten(1, 2)
        chosen = basis.scored_rows(queries @ own.a)[:, : retrieval.PROBES]
        rows = probe_rows(queries, chosen, item, own, images, dtype)
        probes = queries.gather(1, chosen[..., None].expand(-1, -1, head_dim))
        products = probes @ (keys[:, :n] - mean).mT * (scale * LOG2E)
        shift = (rows[..., -len(factors) :] * factors).sum(-1, keepdim=True)
        scores[number, :, :n] = (products + shift).amax(1)
    return scores


def row_scores(
    queries: torch.Tensor,
    scored: torch.Tensor,
    item: Item,
    fitted: basis.Basis,
    images: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Score an item's history by some of its rows: float32 ``[bases, history]``.

    Arguments are those of :func:`probe_rows`.
    """
    rows = probe_rows(queries, scored, item, fitted, images, dtype)
    return (rows @ images[:, : item[DENSE_START]].mT).amax(1)


def probe_rows(
    queries: torch.Tensor,
    scored: torch.Tensor,
    item: Item,
    fitted: basis.Basis,
    images: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Project some rows of an item.

    Args:
        queries: all its rows ``[bases, rows, head_dim]``, query by query.
        scored: which of them count, int64 ``[bases, some]``.
        item: of a work list.
        fitted: the bases.
        images: of all keys that the item sees, ``[bases, tokens, width]``.
        dtype: that images are rounded to.

    Returns:
        float32 ``[bases, some, width]``, which end with their row log-sum-exp.
    """
    n, context, count = item[DENSE_START], item[HISTORY], item[NUM_QUERIES]
    group = queries.shape[1] // count
    queries = queries.gather(1, scored[..., None].expand(-1, -1, queries.shape[2]))
    positions = torch.arange(n, context + count, device=queries.device)
    visible = positions <= context + scored[..., None] // group
    past, beside = images[:, :n], images[:, n : context + count]
    return basis.query_images(queries, fitted, past, beside, visible, dtype)


def group_log_probability(logits: torch.Tensor) -> torch.Tensor:
    """Reduce the heads of a group to one score per token: the largest log2-probability.

    Args:
        logits: ``[..., group, n]``, natural-logarithm units.

    Returns:
        ``[..., n]``.
    """
    return (logits - logits.logsumexp(-1, keepdim=True)).amax(-2) * LOG2E
