"""The work list: which query segments there are, what each may see, how much it may visit.

Built on the host from lengths that the scheduler already knows, so no device
synchronisation is needed. Every kernel reads the same table, one row a segment.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from .layout import DENSE_START, HISTORY, LIST_LENGTH, NUM_QUERIES, QUERY_START
from .tuning import CAPACITY_STEP, CHUNK_SPANS, HEADS_SHARED, SEGMENTS_TOGETHER, SPAN_LENGTH


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


def chunk_end(tokens: int, span: int = SPAN_LENGTH) -> int:
    """Return where the whole chunk ends that so many tokens reach into, of fits of ``span``."""
    return -(-tokens // (CHUNK_SPANS * span)) * CHUNK_SPANS * span


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

    Most often they are a chunk: up to ``CHUNK_SPANS * SPAN_LENGTH`` queries. Where a chunk exceeds
    the limits it has several lists, which follow one another: a ranking prepares itself at the
    first for all of them.

    Attributes:
        row: the request's row in the block table.
        target_error: as of the request's :class:`PrefillRow`.
        first_of_chunk: whether this is the chunk's first list.
        fits: int32 ``[num_fits, 3]`` on the device, one row per ``SPAN_LENGTH`` queries of the
            chunk: first query, queries, tokens that their last segment sees (its own among
            them; 0 if it ranks none).
        fit_span: tokens at whose multiples in the sequence the fits are cut.
        max_fit_tokens: most tokens of a row of ``fits``.
        items: int32 ``[num_items, SEGMENT_COLUMNS]`` on the device: block-table row, first query,
            queries, history tokens, first position of the dense pass, slots to visit in the
            mean of the heads that share, row of ``fits``. The longest history comes first.
        groups: int32 ``[num_groups, 2]`` on the device: first item and number of items of
            up to ``SEGMENTS_TOGETHER`` segments.
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


def span_queries(segment: int) -> int:
    """Return the queries that share a basis: whole segments, one at least."""
    return segment * max(1, SPAN_LENGTH // segment)


def list_capacity(length: int) -> int:
    """Return the places that a list of this length takes."""
    return max(1, -(-length // CAPACITY_STEP)) * CAPACITY_STEP


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
    span = span_queries(segment)
    lists: list[WorkList] = []
    for row in rows:
        items = segments(row, segment, min_context)
        for _, chunk in groupby(items, lambda item: item[HISTORY] // (CHUNK_SPANS * span)):
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
    span = span_queries(segment)
    fits = [
        Span(part[0][QUERY_START], sum(item[NUM_QUERIES] for item in part), seen(part[-1]))
        for part in parts
    ]
    table = to_device(fits, device)
    ordered = [(*item, fit) for fit, part in enumerate(parts) for item in part][::-1]
    lists: list[WorkList] = []
    while ordered:
        room = max(1, limits.slots // list_capacity(longest_list(ordered[0], limits.shared)))
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
    return [
        (start, min(SEGMENTS_TOGETHER, items - start))
        for start in range(0, items, SEGMENTS_TOGETHER)
    ]


def to_device(table: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Copy a table of integers, asynchronously from pinned memory where there is a GPU."""
    tensor = torch.tensor(table, dtype=torch.int32)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def small_work_list(device: torch.device, segment: int, dense: bool) -> WorkList:
    """Return a work list of one segment with a short history, all in the row's first block."""
    rows, min_context = [PrefillRow(0, 0, 1, 8, 0.5)], 16 if dense else 0
    (work,) = build_work_lists(rows, segment, min_context, device, Limits(1, CAPACITY_STEP))
    return work
