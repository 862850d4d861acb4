"""The work list: which query segments there are, what each may see, how much it may visit.

Built on the host from lengths that the scheduler already knows, so no device
synchronisation is needed. Every kernel reads the same table, one row a segment.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

# Columns of the work table; the kernels index it by these positions.
ROW, QUERY_START, NUM_QUERIES, HISTORY, DENSE_START, LIST_LENGTH, FIT = range(7)
COLUMNS = 7
GROUP_ITEMS = 16  # segments of one request that are ranked together and share each key load

# The selection's resolution and the early stop's distance; kernels and reference share them.
CHUNK = 4096  # history tokens that the ranking and the selection handle at a time
BUCKETS = 128  # counting costs in proportion; neighbours differ by a quarter of a bit or so
COUNTED = 16384  # scores of a list that are counted, one a stratum: all of them up to here
UNEVEN = 32  # of a list one of so many tokens is unsure: what a bucket's linear count may miss
# Tiers of a list, each a pass over the scores: up to 1/4, 1/2, 7/8 of it and the rest where tiles
# may stop early, else up to 7/8 and the rest: only of its worst eighth anything is cut off. One
# where programs share a list.
TIERS = 4
TIERS_UNORDERED = 2
TIERS_SPLIT = 1
STOP_STEP_TOKENS = 2048  # a test ends a pipelined loop: one every 1,024 costs twice as much

FIT_QUERIES = 2048  # queries that share the covariances of what comes before them
ROW_STEP = 2  # one of so many queries of a head is scored: `basis.scored_rows`
FITS = 4  # such runs that are ranked together: a chunk of 8,192 queries, whose bases they share
LIST_STEP = (
    16  # lists are kept in steps of so many slots, for the same kernels whatever their length
)

# Neighbouring KV heads share a segment's budget by pairs: as many as tensor-parallel ranks mostly
# keep together, so that lists do not depend on the number of ranks.
HEADS_SHARED = 2

# A list's scores are the largest probabilities that rows give, a target error is the mean row's
# mass. Of what is left out it takes at least this share of the scores' own sum, and at least the
# share that the sum has of all scores: the first holds where few rows want a key, the second where
# all rows want the same (`benchmarks/quality/LOG.md`).
MEAN_OF_MAX = 0.022

# The estimate of the dropped mass: of every so many segments, from so many tokens of the history.
# 256 tell the mass within a factor of 1.5 for 97 % of tiles (`benchmarks/quality/LOG.md`).
ESTIMATE_EVERY = 8
ESTIMATE_TOKENS = 256
ESTIMATE_STEP = 8  # and no nearer to one another than this, so that a page has few of them
# What is left out is attended to as means of whole regions, told from so many tokens of each.
REGION_TOKENS = 1024
REGION_SAMPLES = 256  # at most
REGIONS_SAMPLES = 16384  # of all regions together, where these are more than a piece of each
REGION_PIECE = 128  # samples at a time
# A mean key has less than the mean probability of its tokens, the less the more a row's scores
# spread: a region counts REGION_WEIGHT * exp(REGION_SPREAD * variance) times, at most REGION_MOST
# times. All tokens of a normal distribution would have exp(variance / 2); lists hold the best of
# them (`benchmarks/quality/LOG.md`).
REGION_WEIGHT = 1.5
REGION_SPREAD = 0.3
REGION_MOST = 16.0
# The covariances of keys and values, by which a mean value follows the query, and of keys, by
# which scores spread, are summed over at most so many parts of a history, each told by so many
# tokens, so many at a time about their own mean. The first counts a little less than it is: it is
# told by a sample, and lists hold the tokens that have most of it.
SLOPE_PARTS = 16
SLOPE_SAMPLES = 256
SLOPE_GROUP = 64
SLOPE_WEIGHT = 0.9
NOT_LISTED = 2**30  # place of a token that a list leaves out

# What an attend launch adds to its counters, in this order.
VISITED, ELIGIBLE, TILES, STOPPED, DROPPED, SAMPLED = range(6)
NUM_COUNTERS = 6
DROPPED_UNIT = 1e-6  # of a row's softmax mass: one of DROPPED


class PrefillRow(NamedTuple):
    """One request's share of a step.

    Attributes:
        row: its row in the block table.
        query_start: index of its first query in the step's packed queries.
        num_queries: queries of this chunk.
        context: tokens already in the cache before this chunk.
        budget: share of the history a query may visit, 0 < budget <= 1.
        target_error: share of softmax mass that a list may leave out; 0 spends the budget.
        min_tokens: history tokens that a query may visit however small the budget.
    """

    row: int
    query_start: int
    num_queries: int
    context: int
    budget: float
    target_error: float = 0.0
    min_tokens: int = 0


class Span(NamedTuple):
    """Queries that a basis is fitted to, and the tokens that the last of them sees.

    Attributes:
        first: the first one in the step's packed queries.
        queries: how many.
        tokens: of the sequence, from its start on.
    """

    first: int
    queries: int
    tokens: int


class Lists(NamedTuple):
    """What is selected of a work list's history, best first (ours: the paper sorts positions).

    Attributes:
        slots: int32 ``[items, kv_heads, >= max_list]``, physical slots
            (block * block_size + offset).
        lengths: int32 ``[items, kv_heads]``, slots to visit.
        samples: int32 ``[ceil(items / ESTIMATE_EVERY), kv_heads, ESTIMATE_TOKENS]``: for every
            ``ESTIMATE_EVERY``-th item the places in its list of evenly spaced tokens of its
            history, ``NOT_LISTED`` for those it leaves out.
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    samples: torch.Tensor


class Regions(NamedTuple):
    """Means over the regions of a request's history, from its first token on.

    Attributes:
        means: ``[kv_heads, regions, 2 * head_dim]``, in units of the cache and the queries'
            dtype: a mean value follows its mean key.
        slopes: ``[FITS, kv_heads, head_dim, head_dim]``, likewise: for every row of
            ``WorkList.fits`` the covariance of keys (rows) and values in the history before the
            multiple of ``fit_span`` that it begins at or behind.
        spreads: likewise, the covariance of keys.
        tokens: of a region.
        sums: scratch of the kernels, float32 ``[SLOPE_PARTS, 2, kv_heads, pad, pad]``.
        known: None, or int32 ``[fits]``: then every fit is another request's, ``means`` has a
            leading dimension of fits, and so many of each are set.
    """

    means: torch.Tensor
    slopes: torch.Tensor
    spreads: torch.Tensor
    tokens: int
    sums: torch.Tensor | None = None
    known: torch.Tensor | None = None

    def of(self, fit: int, history: int) -> torch.Tensor:
        """Return the means of so long a history ``[kv_heads, regions, 2 * head_dim]``."""
        count = history // self.tokens
        if self.known is None:
            return self.means[:, :count]
        return self.means[fit, :, : min(count, int(self.known[fit]))]


def region_samples(history: int, region: int = REGION_TOKENS) -> int:
    """Return how many evenly spaced tokens tell the mean of a region of so long a history."""
    piece = min(REGION_PIECE, region)
    most = min(REGION_SAMPLES, region, REGIONS_SAMPLES // max(1, history // region))
    return piece * max(1, most // piece)


def chunk_end(tokens: int, span: int = FIT_QUERIES) -> int:
    """Return where the whole chunk ends that so many tokens reach into, of fits of ``span``."""
    return -(-tokens // (FITS * span)) * FITS * span


def slope_span(history: int, region: int = REGION_TOKENS) -> int:
    """Return of how many tokens the parts are that the slopes of so long a history sum over.

    They are whole regions, at most ``SLOPE_PARTS``; what is behind the last whole part counts in
    none.
    """
    return region * max(1, -(-(history // region) // SLOPE_PARTS))


class Limits(NamedTuple):
    """How much one launch may handle, of one head of lists.

    Attributes:
        items: segments.
        slots: places in all their lists together.
        shared: lists that share a segment's budget.
    """

    items: int
    slots: int
    shared: int = HEADS_SHARED


@dataclass(frozen=True)
class WorkList:
    """Query segments of one request that are launched together.

    Most often they are a chunk: up to ``FITS * FIT_QUERIES`` queries. Where a chunk exceeds the
    limits it has several lists, which follow one another: a ranking prepares itself at the
    first for all of them.

    Attributes:
        row: the request's row in the block table.
        target_error: as of the request's :class:`PrefillRow`.
        first_of_chunk: whether this is the chunk's first list.
        fits: int32 ``[num_fits, 3]`` on the device, one row per ``FIT_QUERIES`` queries of the
            chunk: first query, queries, tokens that their last segment sees (its own among
            them; 0 if it ranks none).
        fit_span: tokens at whose multiples in the sequence the fits are cut.
        max_fit_tokens: most tokens of a row of ``fits``.
        items: int32 ``[num_items, COLUMNS]`` on the device: block-table row, first query,
            queries, history tokens, first position of the dense pass, slots to visit in the
            mean of the heads that share, row of ``fits``. The longest history comes first.
        groups: int32 ``[num_groups, 2]`` on the device: first item and number of items of
            up to ``GROUP_ITEMS`` segments.
        max_history: most tokens that any item ranks.
        max_list: longest list of any item.
        dense_items: items that visit all of their history; these are the last ones.
        max_dense: longest history of these.
        max_visits: most tokens of its history that any item visits, in the mean of the heads that
            share.
        max_queries: most queries of any item.
        spans: ``fits`` on the host.
    """

    row: int
    target_error: float
    first_of_chunk: bool
    fits: torch.Tensor
    fit_span: int
    max_fit_tokens: int
    items: torch.Tensor
    groups: torch.Tensor
    max_history: int
    max_list: int
    max_queries: int
    dense_items: int = 0
    max_dense: int = 0
    max_visits: int = 0
    spans: tuple[Span, ...] = ()

    @property
    def num_items(self) -> int:
        """Number of segments."""
        return self.items.shape[0]

    @property
    def chunk(self) -> Span:
        """The chunk's queries and the tokens that they see."""
        queries = sum(span.queries for span in self.spans)
        return Span(self.spans[0].first, queries, self.max_fit_tokens)

    @property
    def whole_chunk(self) -> int:
        """Tokens up to the end of the chunk if it were whole.

        What is told of a history in pieces depends on this, and not on how a prompt is cut.
        """
        return chunk_end(self.max_fit_tokens, self.fit_span)


def segments(row: PrefillRow, segment: int, min_context: int) -> list[tuple[int, ...]]:
    """Cut one request's chunk into work items.

    Cuts lie at multiples of ``segment`` in the *sequence*, not in the chunk, so that a
    request meets the same segments however its prompt is chunked (ours). A segment with
    less than ``min_context`` history, or no more than ``min_tokens``, is attended
    densely: its list is empty and its dense pass starts at token 0.
    """
    items: list[tuple[int, ...]] = []
    position, end = row.context, row.context + row.num_queries
    while position < end:
        stop = min(end, (position // segment + 1) * segment)
        count = max(int(row.budget * position), row.min_tokens)
        sparse = position >= max(min_context, 1) and position > row.min_tokens
        items.append(
            (
                row.row,
                row.query_start + position - row.context,
                stop - position,
                position,
                position if sparse else 0,
                count if sparse else 0,
            )
        )
        position = stop
    return items


def fit_span(segment: int) -> int:
    """Return the queries that share a basis: whole segments, one at least."""
    return segment * max(1, FIT_QUERIES // segment)


def list_places(length: int) -> int:
    """Return the places that a list of this length takes."""
    return max(1, -(-length // LIST_STEP)) * LIST_STEP


def longest_list(item: Sequence[int], shared: int = HEADS_SHARED) -> int:
    """Return how long a list of an item can become: what those that share with it need not have."""
    count = item[LIST_LENGTH]
    return min(count + (shared - 1) * (count // 2), item[DENSE_START])


def build_work_lists(
    rows: Iterable[PrefillRow],
    segment: int,
    min_context: int,
    device: torch.device,
    limits: Limits,
) -> list[WorkList]:
    """Build the work lists of a step.

    Like segments, fits and chunks are cut at multiples in the sequence.

    Args:
        rows: the requests that take the sparse path.
        segment: queries per segment.
        min_context: segments with less history are dense.
        device: where the kernels run.
        limits: of one list; more segments make further lists.

    Returns:
        The lists of each request, one after the other; in a chunk the longest history first.

    Raises:
        ValueError: if ``segment`` or the limit of items is not positive.
    """
    if segment <= 0 or limits.items <= 0:
        raise ValueError(f"segment {segment} and limit {limits.items} must be positive")
    span = fit_span(segment)
    lists: list[WorkList] = []
    for row in rows:
        items = segments(row, segment, min_context)
        for _, chunk in groupby(items, lambda item: item[HISTORY] // (FITS * span)):
            parts = [list(part) for _, part in groupby(chunk, lambda item: item[HISTORY] // span)]
            lists += chunk_lists(row, parts, segment, device, limits)
    return lists


def chunk_lists(
    row: PrefillRow,
    parts: Sequence[Sequence[tuple[int, ...]]],
    segment: int,
    device: torch.device,
    limits: Limits,
) -> list[WorkList]:
    """Make the lists of a chunk from the items of each of its fits."""
    span = fit_span(segment)
    fits = [
        Span(part[0][QUERY_START], sum(item[NUM_QUERIES] for item in part), seen(part[-1]))
        for part in parts
    ]
    table = to_device(fits, device)
    ordered = [(*item, fit) for fit, part in enumerate(parts) for item in part][::-1]
    lists: list[WorkList] = []
    while ordered:
        room = max(1, limits.slots // list_places(longest_list(ordered[0], limits.shared)))
        items = ordered[: min(limits.items, room)]
        ordered = ordered[len(items) :]
        dense = [item[HISTORY] for item in items if item[DENSE_START] == 0]
        lists.append(
            WorkList(
                row=row.row,
                target_error=row.target_error,
                first_of_chunk=not lists,
                fits=table,
                fit_span=span,
                max_fit_tokens=max(tokens for *_, tokens in fits),
                items=to_device(items, device),
                groups=to_device(ranked_together(len(items)), device),
                max_history=items[0][DENSE_START],
                max_list=longest_list(items[0], limits.shared),
                max_queries=max(item[NUM_QUERIES] for item in items),
                dense_items=len(dense),
                max_dense=max(dense, default=0),
                max_visits=max(visits(item) for item in items),
                spans=tuple(fits),
            )
        )
    return lists


def seen(item: Sequence[int]) -> int:
    """Return the tokens that an item's queries see, if it ranks any."""
    return item[DENSE_START] + item[NUM_QUERIES] if item[DENSE_START] else 0


def visits(item: Sequence[int]) -> int:
    """Return the tokens that an item visits of its history, in the mean of the heads that share."""
    return item[LIST_LENGTH] + item[HISTORY] - item[DENSE_START]


def ranked_together(items: int) -> list[tuple[int, int]]:
    """Return the first item and the number of items of each group."""
    return [(start, min(GROUP_ITEMS, items - start)) for start in range(0, items, GROUP_ITEMS)]


def to_device(table: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Copy a table of integers, asynchronously from pinned memory where there is a GPU."""
    tensor = torch.tensor(table, dtype=torch.int32)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
