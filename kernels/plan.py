"""The work list: which query segments there are, what each may see, how much it may visit.

Built on the host from lengths that the scheduler already knows, so no device
synchronisation is needed. Every kernel reads the same table, one row a segment.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Columns of the work table; the kernels index it by these positions.
ROW, QUERY_START, NUM_QUERIES, HISTORY, DENSE_START, LIST_LENGTH = range(6)
COLUMNS = 6
GROUP_ITEMS = 16  # segments of one request that are ranked together and share each key load

# The selection's resolution and the early stop's distance; kernels and reference share them.
BUCKETS = 512
TIERS = 6  # the first 1/16, 1/8, 1/4, 1/2 of a list, the rest, the bucket that fills it
STOP_STEP_TOKENS = 1024  # an early-stop test every 1024 tokens costs 5-7 %, every 512 9-14 %

# What an attend launch adds to its counters, in this order.
VISITED, ELIGIBLE, TILES, STOPPED = range(4)
NUM_COUNTERS = 4


class PrefillRow(NamedTuple):
    """One request's share of a step.

    Attributes:
        row: its row in the block table.
        query_start: index of its first query in the step's packed queries.
        num_queries: queries of this chunk.
        context: tokens already in the cache before this chunk.
        budget: share of the history a query may visit, 0 < budget <= 1.
    """

    row: int
    query_start: int
    num_queries: int
    context: int
    budget: float


@dataclass(frozen=True)
class WorkList:
    """Query segments of one request that are launched together.

    Attributes:
        row: the request's row in the block table.
        query_start: index of the first query of these segments; they are adjacent.
        num_queries: queries of these segments.
        items: int32 ``[num_items, COLUMNS]`` on the device: block-table row, first query,
            queries, history tokens, first position of the dense pass, slots to visit.
            The longest history comes first.
        groups: int32 ``[num_groups, 2]`` on the device: first item and number of items of
            up to ``GROUP_ITEMS`` segments.
        max_history: most tokens that any item ranks.
        max_list: longest list of any item.
        max_queries: most queries of any item.
    """

    row: int
    query_start: int
    num_queries: int
    items: torch.Tensor
    groups: torch.Tensor
    max_history: int
    max_list: int
    max_queries: int

    @property
    def num_items(self) -> int:
        """Number of segments."""
        return self.items.shape[0]


def segments(row: PrefillRow, segment: int, min_context: int) -> list[tuple[int, ...]]:
    """Cut one request's chunk into work items.

    Cuts lie at multiples of ``segment`` in the *sequence*, not in the chunk, so that a
    request meets the same segments however its prompt is chunked (ours). A segment with
    less than ``min_context`` history is attended densely: its list is empty and its dense
    pass starts at token 0.
    """
    items: list[tuple[int, ...]] = []
    position, end = row.context, row.context + row.num_queries
    while position < end:
        stop = min(end, (position // segment + 1) * segment)
        sparse = position >= max(min_context, 1)
        items.append(
            (
                row.row,
                row.query_start + position - row.context,
                stop - position,
                position,
                position if sparse else 0,
                int(row.budget * position) if sparse else 0,
            )
        )
        position = stop
    return items


def work_list(row: int, items: Sequence[tuple[int, ...]], device: torch.device) -> WorkList:
    """Put work items into device tables, copied asynchronously from pinned memory."""
    groups = [
        (start, min(GROUP_ITEMS, len(items) - start)) for start in range(0, len(items), GROUP_ITEMS)
    ]

    def to_device(table: Sequence[Sequence[int]]) -> torch.Tensor:
        tensor = torch.tensor(table, dtype=torch.int32)
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    return WorkList(
        row=row,
        query_start=min(item[QUERY_START] for item in items),
        num_queries=sum(item[NUM_QUERIES] for item in items),
        items=to_device(items),
        groups=to_device(groups),
        max_history=max(item[DENSE_START] for item in items),
        max_list=max(item[LIST_LENGTH] for item in items),
        max_queries=max(item[NUM_QUERIES] for item in items),
    )


def build_work_lists(
    rows: Iterable[PrefillRow],
    segment: int,
    min_context: int,
    device: torch.device,
    items_per_wave: int,
) -> list[WorkList]:
    """Build the work lists of a step.

    Args:
        rows: the requests that take the sparse path.
        segment: queries per segment.
        min_context: segments with less history are dense.
        device: where the kernels run.
        items_per_wave: most segments of a list; more make further lists.

    Returns:
        The lists of each request, one after the other.

    Raises:
        ValueError: if ``segment`` or ``items_per_wave`` is not positive.
    """
    if segment <= 0 or items_per_wave <= 0:
        raise ValueError(f"segment {segment} and items_per_wave {items_per_wave} must be positive")
    lists = []
    for row in rows:
        items = segments(row, segment, min_context)[::-1]  # the longest history first
        lists += [
            work_list(row.row, items[start : start + items_per_wave], device)
            for start in range(0, len(items), items_per_wave)
        ]
    return lists
