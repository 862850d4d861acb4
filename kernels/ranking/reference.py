"""What the kernels of the rankings compute, in plain PyTorch.

Written for reading: the tests compare every kernel with these functions, and a machine
without a GPU serves with them. Each takes the same arguments as its kernel.
"""

from typing import NamedTuple

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


class ProjectedKeys(NamedTuple):
    """Keys of a request that some heads see, and their projections.

    Attributes:
        heads: int64, which query heads.
        fitted: their bases.
        keys: float32 ``[heads, tokens, head_dim]``, in units of the cache.
        images: ``[heads, tokens, width]``, rounded to ``dtype``.
        dtype: of projections.
    """

    heads: torch.Tensor
    fitted: basis.Basis
    keys: torch.Tensor
    images: torch.Tensor
    dtype: torch.dtype


def project_keys(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    *,
    scale: float,
    precision: basis.Precision = basis.SERVED,
    heads: torch.Tensor | None = None,
) -> ProjectedKeys:
    """Fit bases to a chunk and project the keys that it sees; ``heads`` None for all."""
    page, head_dim, number = kv_cache.shape[2], query.shape[2], query.shape[1]
    heads = torch.arange(number, device=query.device) if heads is None else heads
    fitted = basis.fit_span(
        query, kv_cache, block_table, work.row, work.chunk, number, scale, precision.rank
    )
    fitted = basis.Basis(*(part[heads] for part in fitted))
    positions = torch.arange(work.max_seen, device=query.device)
    slots = physical_slots(positions, block_table[work.row], page)
    keys, _ = load_tokens(kv_cache, slots, head_dim)
    keys = keys[heads * kv_cache.shape[1] // number]
    dtype = basis.image_dtype(query.device)
    return ProjectedKeys(heads, fitted, keys, basis.key_images(keys, fitted, dtype), dtype)


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
    kv_heads = kv_cache.shape[1]
    if work.max_history == 0:
        return query.new_empty(work.num_segments, kv_heads, 0, dtype=torch.half)
    projected = project_keys(query, kv_cache, block_table, work, scale=scale, precision=precision)
    return _of_groups(scores_by_head(query, work, projected, precision, chosen), kv_heads)


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
        if work.max_history == 0:
            return query.new_empty(work.num_segments, kv_heads, 0, dtype=torch.half)
        projected = project_keys(*arguments, scale=scale)
        scores = scores_by_head(query, work, projected)
        if work.first_of_chunk:
            looked_at = retrieval.looked_at(work.num_segments)
            exact = probe_scores(*arguments, projected, looked_at, scale=scale)
            histories = work.segments[looked_at, DENSE_START]
            self.heads = retrieval.retrieval_heads(exact, histories, kv_heads).nonzero()[:, 0]
        if len(self.heads):
            more = project_keys(*arguments, scale=scale, precision=basis.WIDE, heads=self.heads)
            wide = scores_by_head(query, work, more, basis.WIDE)
            scores[:, self.heads] = torch.maximum(scores[:, self.heads], wide)
        return _of_groups(scores, kv_heads)


def scores_by_head(
    query: torch.Tensor,
    work: WorkList,
    projected: ProjectedKeys,
    precision: basis.Precision = basis.SERVED,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score histories by low-rank images, head by head.

    Args:
        query: ``[tokens, heads, head_dim]``.
        work: segments of one request.
        projected: the keys that they see.
        precision: of the estimate.
        chosen: int ``[items, heads, rows]``, the rows to score, where those of
            :func:`basis.scored_rows` are not wanted: rounding decides between rows of equal size.

    Returns:
        float32 ``[items, heads, max_history]``, -inf behind a history.
    """
    heads, fitted, _, images, dtype = projected
    scores = query.new_full(
        (work.num_segments, len(heads), work.max_history), float("-inf"), dtype=torch.float32
    )
    for number, item in enumerate(work.segments.tolist()):
        n = item[DENSE_START]
        if n == 0:
            continue
        queries = segment_queries(query, item, query.shape[1]).flatten(1, 2)[heads]
        scored = basis.scored_rows(queries @ fitted.a, precision.row_step)  # [heads, rows]
        if chosen is not None:
            scored = chosen[number, :, : scored.shape[1]].long()
        scores[number, :, :n] = row_scores(queries, scored, item, fitted, images, dtype)
    return scores


def probe_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    projected: ProjectedKeys,
    looked_at: list[int],
    *,
    scale: float,
) -> torch.Tensor:
    """Score histories by :func:`basis.exact_scores` of the probes; see :mod:`retrieval`.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request, that rank something.
        projected: the keys that they see, of all heads.
        looked_at: which segments.
        scale: softmax scale, times what one unit of the cache's keys stands for.

    Returns:
        float32 ``[segments, heads, max_history]``, -inf behind a history.
    """
    heads, fitted, keys, images, dtype = projected
    sampled = basis.sampled_keys(kv_cache, block_table, work.row, work.chunk, len(heads))
    mean = sampled.float().mean(1, keepdim=True)
    scores = query.new_full(
        (len(looked_at), len(heads), work.max_history), float("-inf"), dtype=torch.float32
    )
    for number, item in enumerate(work.segments[looked_at].tolist()):
        n = item[DENSE_START]
        if n == 0:
            continue
        queries = segment_queries(query, item, len(heads)).flatten(1, 2)
        chosen = basis.scored_rows(queries @ fitted.a)[:, : retrieval.PROBES]
        rows = probe_rows(queries, chosen, item, fitted, images, dtype)
        probes = queries.gather(1, chosen[..., None].expand(-1, -1, queries.shape[2]))
        exact = basis.exact_scores(probes, rows, keys[:, :n] - mean, scale)
        scores[number, :, :n] = exact.amax(1)
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
