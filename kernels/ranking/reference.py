"""What the kernels of the rankings compute, in plain PyTorch.

Written for reading: the tests compare every kernel with these functions, and a machine
without a GPU serves with them. Each takes the same arguments as its kernel.
"""

from typing import NamedTuple

import torch

from ..layout import DENSE_START, HISTORY, LOG2E, NUM_QUERIES, ROW
from ..paging import load_tokens, physical_slots, segment_queries
from ..tuning import CACHED_TOKENS
from ..work_list import WorkList
from . import basis, retrieval

Segment = list[int]  # a line of the work table, by the columns of `layout`


def mean_query_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    *,
    scale: float,
) -> torch.Tensor:
    """Score histories by the segments' mean queries; see :func:`mean_query.mean_query_scores`.

    Returns:
        float16 ``[segments, kv_heads, max_history]``, -inf behind a history.
    """
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    scores = query.new_full(
        (work.num_segments, kv_heads, work.max_history), float("-inf"), dtype=torch.float32
    )
    for number, segment in enumerate(work.segments.tolist()):
        n = segment[DENSE_START]
        if n == 0:
            continue
        queries = segment_queries(query, segment, kv_heads)
        mean = queries.mean(2)  # [kv_heads, group, head_dim]
        positions = torch.arange(n, device=query.device)
        keys, _ = load_tokens(
            kv_cache, physical_slots(positions, block_table[segment[ROW]], page), head_dim
        )
        logits = torch.einsum("hgd,hnd->hgn", mean, keys) * scale
        scores[number, :, :n] = group_log_probability(logits)
    return scores.half()


class ProjectedKeys(NamedTuple):
    """Keys of a request that some heads see, and their projections.

    Attributes:
        heads: int64, which query heads.
        bases: theirs.
        keys: float32 ``[heads, tokens, head_dim]``, in units of the cache.
        projected: float32 ``[heads, tokens, width]``, rounded to ``dtype``.
        dtype: of projections.
    """

    heads: torch.Tensor
    bases: basis.Basis
    keys: torch.Tensor
    projected: torch.Tensor
    dtype: torch.dtype


def fit_and_project(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    *,
    scale: float,
    precision: basis.Precision = basis.SERVED,
    heads: torch.Tensor | None = None,
) -> ProjectedKeys:
    """Fit bases to a chunk and project the keys that it sees.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        precision: of the estimate.
        heads: int64, which query heads; all by default.
    """
    page, head_dim, number = kv_cache.shape[2], query.shape[2], query.shape[1]
    heads = torch.arange(number, device=query.device) if heads is None else heads
    bases = basis.fit_span(
        query, kv_cache, block_table, work.row, work.chunk, number, scale, precision.rank
    )
    bases = basis.Basis(*(part[heads] for part in bases))
    positions = torch.arange(work.max_seen, device=query.device)
    slots = physical_slots(positions, block_table[work.row], page)
    keys, _ = load_tokens(kv_cache, slots, head_dim)
    keys = keys[heads * kv_cache.shape[1] // number]
    dtype = basis.projection_dtype(query.device)
    return ProjectedKeys(heads, bases, keys, basis.project_keys(keys, bases, dtype), dtype)


def low_rank_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    *,
    scale: float,
    precision: basis.Precision = basis.SERVED,
    probe_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score by probes against projected keys; see :func:`low_rank.low_rank_scores`.

    ``probe_rows``: see :func:`scores_by_head`.
    """
    kv_heads = kv_cache.shape[1]
    if work.max_history == 0:
        return query.new_empty(work.num_segments, kv_heads, 0, dtype=torch.half)
    keys = fit_and_project(query, kv_cache, block_table, work, scale=scale, precision=precision)
    return _of_groups(scores_by_head(query, work, keys, precision, probe_rows), kv_heads)


def _of_groups(by_head: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Return the largest scores of each group's heads, as the kernels store them."""
    scores = by_head.unflatten(1, (kv_heads, -1)).amax(2)
    return scores.clamp(min=-torch.finfo(torch.half).max).half()


class LowRank:
    """The ranking that serves: all heads, then retrieval heads again; see :mod:`retrieval`.

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
        """Score a work list: float16 ``[segments, kv_heads, max_history]``."""
        arguments, kv_heads = (query, kv_cache, block_table, work), kv_cache.shape[1]
        if work.max_history == 0:
            return query.new_empty(work.num_segments, kv_heads, 0, dtype=torch.half)
        keys = fit_and_project(*arguments, scale=scale)
        scores = scores_by_head(query, work, keys)
        if work.first_of_chunk:
            sampled = retrieval.sampled_segments(work.num_segments)
            exact = exact_probe_scores(*arguments, keys, sampled, scale=scale)
            histories = work.segments[sampled, DENSE_START]
            self.heads = retrieval.retrieval_heads(exact, histories, kv_heads).nonzero()[:, 0]
        if len(self.heads):
            more = fit_and_project(
                *arguments, scale=scale, precision=basis.RETRIEVAL, heads=self.heads
            )
            again = scores_by_head(query, work, more, basis.RETRIEVAL)
            scores[:, self.heads] = torch.maximum(scores[:, self.heads], again)
        return _of_groups(scores, kv_heads)


def scores_by_head(
    query: torch.Tensor,
    work: WorkList,
    keys: ProjectedKeys,
    precision: basis.Precision = basis.SERVED,
    probe_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score histories by projected probes, head by head.

    Args:
        query: ``[tokens, heads, head_dim]``.
        work: segments of one request.
        keys: those that the segments see.
        precision: of the estimate.
        probe_rows: int ``[segments, heads, probes]``, in place of those that
            :func:`basis.farthest_rows` returns: rounding decides between rows of equal distance.

    Returns:
        float32 ``[segments, heads, max_history]``, -inf behind a history.
    """
    scores = query.new_full(
        (work.num_segments, len(keys.heads), work.max_history), float("-inf"), dtype=torch.float32
    )
    for number, segment in enumerate(work.segments.tolist()):
        n = segment[DENSE_START]
        if n == 0:
            continue
        rows = segment_queries(query, segment, query.shape[1]).flatten(1, 2)[keys.heads]
        probes = basis.farthest_rows(rows @ keys.bases.a, precision.probe_step)  # [heads, probes]
        if probe_rows is not None:
            probes = probe_rows[number, :, : probes.shape[1]].long()
        scores[number, :, :n] = estimated_scores(
            rows, probes, segment, keys.bases, keys.projected, keys.dtype
        )
    return scores


def exact_probe_scores(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: WorkList,
    keys: ProjectedKeys,
    sampled: list[int],
    *,
    scale: float,
) -> torch.Tensor:
    """Score histories by :func:`basis.exact_scores` of the probes; see :mod:`retrieval`.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request, that rank something.
        keys: those that the segments see, of all heads.
        sampled: which segments.
        scale: softmax scale, times what one unit of the cache's keys stands for.

    Returns:
        float32 ``[segments, heads, max_history]``, -inf behind a history.
    """
    heads = len(keys.heads)
    of_mean = basis.sampled_keys(kv_cache, block_table, work.row, work.chunk, heads)
    centred = keys.keys - of_mean.float().mean(1, keepdim=True)
    scores = query.new_full(
        (len(sampled), heads, work.max_history), float("-inf"), dtype=torch.float32
    )
    for number, segment in enumerate(work.segments[sampled].tolist()):
        n = segment[DENSE_START]
        if n == 0:
            continue
        rows = segment_queries(query, segment, heads).flatten(1, 2)
        probes = basis.farthest_rows(rows @ keys.bases.a)[:, : retrieval.PROBES]
        projected = project_probes(rows, probes, segment, keys.bases, keys.projected, keys.dtype)
        queries = rows.gather(1, probes[..., None].expand(-1, -1, rows.shape[2]))
        exact = basis.exact_scores(queries, projected, centred[:, :n], scale)
        scores[number, :, :n] = exact.amax(1)
    return scores


def estimated_scores(
    rows: torch.Tensor,
    probes: torch.Tensor,
    segment: Segment,
    bases: basis.Basis,
    keys: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Score a segment's history by some of its rows: float32 ``[bases, history]``.

    Arguments are those of :func:`project_probes`.
    """
    projected = project_probes(rows, probes, segment, bases, keys, dtype)
    past = keys[:, : segment[DENSE_START]]
    # In parts whose products stay in a CPU's cache.
    parts = [(projected @ part.mT).amax(1) for part in past.split(CACHED_TOKENS, 1)]
    return torch.cat(parts, 1)


def project_probes(
    rows: torch.Tensor,
    probes: torch.Tensor,
    segment: Segment,
    bases: basis.Basis,
    keys: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Project some rows of a segment.

    Args:
        rows: all its rows ``[bases, rows, head_dim]``, query by query.
        probes: which rows to project, int64 ``[bases, probes]``.
        segment: a line of the work table.
        bases: those of the rows.
        keys: float32 ``[bases, tokens, width]``, all projected keys that the segment sees.
        dtype: that projections are rounded to.

    Returns:
        float32 ``[bases, probes, width]``, which end with their row log-sum-exp, negated.
    """
    n, context, count = segment[DENSE_START], segment[HISTORY], segment[NUM_QUERIES]
    group = rows.shape[1] // count
    queries = rows.gather(1, probes[..., None].expand(-1, -1, rows.shape[2]))
    positions = torch.arange(n, context + count, device=rows.device)
    visible = positions <= context + probes[..., None] // group
    past, own = keys[:, :n], keys[:, n : context + count]
    return basis.project_queries(queries, bases, past, own, visible, dtype)


def group_log_probability(logits: torch.Tensor) -> torch.Tensor:
    """Reduce the heads of a group to one score per token: the largest log2-probability.

    Args:
        logits: ``[..., group, n]``, natural-logarithm units.

    Returns:
        ``[..., n]``.
    """
    return (logits - logits.logsumexp(-1, keepdim=True)).amax(-2) * LOG2E
