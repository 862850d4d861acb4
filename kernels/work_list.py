"""The work list: the query segments of a step, what each may see, and how much it may visit.

Built on the host from lengths that the scheduler already knows, so no device synchronisation is
needed. Every kernel reads the same table, one row a segment; :mod:`layout` names its columns.
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
    """A run of a request's queries; decode fits its basis to one.

    Attributes:
        first: the first one in the step's packed queries.
        queries: how many.
        tokens: that the last query sees, from the start of the sequence on.
    """

    first: int
    queries: int
    tokens: int


class Limits(NamedTuple):
    """How much one launch may handle, of one head of lists.

    Attributes:
        segments: of one list.
        slots: capacity of all its lists together.
        shared: lists that share a segment's budget.
    """

    segments: int
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
        span_length: tokens at whose multiples in the sequence spans are cut.
        max_seen: most tokens that a query of the chunk sees, if any of it is ranked.
        segments: int32 ``[num_segments, SEGMENT_COLUMNS]`` on the device. The longest history comes
            first.
        groups: int32 ``[num_groups, 2]`` on the device: first segment and number of segments of
            up to ``SEGMENTS_TOGETHER``.
        max_history: most tokens that any segment ranks.
        max_list: longest list of any segment.
        max_queries: most queries of any segment.
        dense_segments: segments that visit all of their history; these are the last ones.
        max_dense: longest history of these.
        spans: the chunk's.
    """

    row: int
    target_error: float
    first_of_chunk: bool
    span_length: int
    max_seen: int
    segments: torch.Tensor
    groups: torch.Tensor
    max_history: int
    max_list: int
    max_queries: int
    dense_segments: int = 0
    max_dense: int = 0
    spans: tuple[Span, ...] = ()

    @property
    def num_segments(self) -> int:
        """Number of segments."""
        return self.segments.shape[0]

    @property
    def chunk(self) -> Span:
        """The chunk's queries and the tokens that they see."""
        queries = sum(span.queries for span in self.spans)
        return Span(self.spans[0].first, queries, self.max_seen)


def cut_segments(row: PrefillRow, length: int, min_context: int) -> list[tuple[int, ...]]:
    """Cut one request's chunk into segments: lines of the work table without their slot.

    Cuts lie at multiples of ``length`` in the *sequence*, not in the chunk, so that a request meets
    the same segments however its prompt is chunked (ours). A segment with less than ``min_context``
    history, or no more than ``min_tokens``, is attended densely: its list is empty and its dense
    pass starts at token 0.
    """
    lines: list[tuple[int, ...]] = []
    position, end = row.context, row.context + row.num_queries
    while position < end:
        stop = min(end, (position // length + 1) * length)
        count = max(int(row.budget * position), row.min_tokens)
        sparse = position >= max(min_context, 1) and position > row.min_tokens
        lines.append(
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
    return lines


def span_queries(segment: int, most: int = SPAN_LENGTH) -> int:
    """Return the queries of a span: whole segments, one at least, ``most`` queries otherwise."""
    return segment * max(1, most // segment)


def list_capacity(length: int) -> int:
    """Return the slots that a list of this length has room for."""
    return max(1, -(-length // CAPACITY_STEP)) * CAPACITY_STEP


def longest_list(line: Sequence[int], shared: int = HEADS_SHARED) -> int:
    """Return how long a list can become: half of its budget is safe, the other half is shared."""
    count = line[LIST_LENGTH]
    return min(count + (shared - 1) * (count // 2), line[DENSE_START])


def build_work_lists(
    rows: Iterable[PrefillRow],
    segment: int,
    min_context: int,
    device: torch.device,
    limits: Limits,
    span_length: int = SPAN_LENGTH,
) -> list[WorkList]:
    """Build the work lists of a step.

    Like segments, spans and chunks are cut at multiples in the sequence.

    Args:
        rows: the requests that take the sparse path.
        segment: queries per segment.
        min_context: segments with less history are dense.
        device: where the kernels run.
        limits: of one list; more segments make further lists.
        span_length: most queries of a span, of which a chunk has ``CHUNK_SPANS``.

    Returns:
        The lists of each request, one after the other; in a chunk the longest history first.

    Raises:
        ValueError: if ``segment`` or the limit of segments is not positive.
    """
    if segment <= 0 or limits.segments <= 0:
        raise ValueError(f"segment {segment} and limit {limits.segments} must be positive")
    span = span_queries(segment, span_length)
    lists: list[WorkList] = []
    for row in rows:
        lines = cut_segments(row, segment, min_context)
        for _, chunk in groupby(lines, lambda line: line[HISTORY] // (CHUNK_SPANS * span)):
            parts = [list(part) for _, part in groupby(chunk, lambda line: line[HISTORY] // span)]
            lists += chunk_lists(row, parts, span, device, limits)
    return lists


def chunk_lists(
    row: PrefillRow,
    parts: Sequence[Sequence[tuple[int, ...]]],
    span_length: int,
    device: torch.device,
    limits: Limits,
) -> list[WorkList]:
    """Make the lists of a chunk from the segments of each of its spans."""
    spans = [
        Span(part[0][QUERY_START], sum(line[NUM_QUERIES] for line in part), seen(part[-1]))
        for part in parts
    ]
    ordered = [(*line, 0) for part in parts for line in part][::-1]
    lists: list[WorkList] = []
    while ordered:
        room = max(1, limits.slots // list_capacity(longest_list(ordered[0], limits.shared)))
        lines = ordered[: min(limits.segments, room)]
        ordered = ordered[len(lines) :]
        dense = [line[HISTORY] for line in lines if line[DENSE_START] == 0]
        lists.append(
            WorkList(
                row=row.row,
                target_error=row.target_error,
                first_of_chunk=not lists,
                span_length=span_length,
                max_seen=max(tokens for *_, tokens in spans),
                segments=to_device(lines, device),
                groups=to_device(ranked_together(len(lines)), device),
                max_history=lines[0][DENSE_START],
                max_list=longest_list(lines[0], limits.shared),
                max_queries=max(line[NUM_QUERIES] for line in lines),
                dense_segments=len(dense),
                max_dense=max(dense, default=0),
                spans=tuple(spans),
            )
        )
    return lists


def seen(line: Sequence[int]) -> int:
    """Return the tokens that a segment's queries see; 0 if it is not ranked."""
    return line[DENSE_START] + line[NUM_QUERIES] if line[DENSE_START] else 0


def ranked_together(segments: int) -> list[tuple[int, int]]:
    """Return the first segment and the number of segments of each group."""
    return [
        (start, min(SEGMENTS_TOGETHER, segments - start))
        for start in range(0, segments, SEGMENTS_TOGETHER)
    ]


def to_device(table: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Copy a table to a device, from pinned memory if that is a GPU: int32 ``[rows, columns]``."""
    tensor = torch.tensor(table, dtype=torch.int32)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def small_work_list(device: torch.device, segment: int, dense: bool) -> WorkList:
    """Return a work list of one segment with a short history, all in the row's first block."""
    rows, min_context = [PrefillRow(0, 0, 1, 8, 0.5)], 16 if dense else 0
    (work,) = build_work_lists(rows, segment, min_context, device, Limits(1, CAPACITY_STEP))
    return work
