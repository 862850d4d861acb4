"""The work list of a decode step: one query of each of several requests, and what it may visit.

Made on the host once a step, in the form of that of prefill (:mod:`work_list`); a segment has the
*slot* of its request's state, the snapshot of its prompt's ranking. It stays at one address and
is launched as if histories were the longest, so that one CUDA graph serves all steps of as many
rows (ours).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .attention.summary_table import NO_SUMMARY, REGIONS, TENSORS, Summaries
from .layout import APPEND_COLUMNS, NO_LIMIT, SEGMENT_COLUMNS
from .tuning import CLUSTERS, DECODE_RECENT, REGION_TOKENS, SNAPSHOT_QUERIES
from .work_list import WorkList, list_capacity, longest_list


class Snapshot(NamedTuple):
    """What of a prefill chunk's ranking a request's state holds.

    Attributes:
        slot: of the request.
        span: row of the span table.
        tokens: that the span's last query sees, and the state covers.
        queries: that the basis was fitted to.
    """

    slot: int
    span: int
    tokens: int
    queries: int


class DecodeRow(NamedTuple):
    """One request's query in a decode step.

    Attributes:
        row: its row in the block table.
        query: index of its query in the step's packed queries.
        context: tokens in the cache before the query's own.
        slot: of its state.
        covered: tokens, from the first on, whose projected keys the state holds.
    """

    row: int
    query: int
    context: int
    slot: int
    covered: int


@dataclass(frozen=True)
class DecodeList:
    """Queries of a decode step that are launched together.

    Attributes:
        rows: the requests.
        work: a segment each, of one query. Segments behind them have no queries.
        appends: int32 ``[segments, APPEND_COLUMNS]`` on the device: the keys that states lack.
    """

    rows: tuple[DecodeRow, ...]
    work: WorkList
    appends: torch.Tensor


@dataclass(frozen=True)
class DecodeShape:
    """What sparse decode must be built for.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: size of a head.
        max_history: longest history, in tokens.
        requests: states, and most rows of a step.
        budget: largest share of the history that a query may visit.
    """

    heads: int
    kv_heads: int
    head_dim: int
    max_history: int
    requests: int
    budget: float

    @property
    def max_list(self) -> int:
        """Longest list of a KV head."""
        row = DecodeRow(0, 0, self.max_history + 2 * DECODE_RECENT, 0, 0)
        return longest_list(decode_line(row, self.budget))

    @property
    def slots(self) -> int:
        """Capacity of all lists of a KV head."""
        return self.requests * list_capacity(self.max_list)


def choose_snapshot(work: WorkList, slot: int) -> Snapshot:
    """Choose the last span of ``SNAPSHOT_QUERIES`` queries, else that of most."""
    sizes = [
        (min(queries, SNAPSHOT_QUERIES) if tokens else 0, number)
        for number, (_, queries, tokens) in enumerate(work.spans)
    ]
    span = max(sizes)[1]
    _, queries, tokens = work.spans[span]
    return Snapshot(slot, span, tokens, queries)


def decode_line(row: DecodeRow, budget: float) -> tuple[int, ...]:
    """Return a row's line of the work table: the last 64 to 127 tokens before it are dense."""
    dense_start = max(0, row.context // DECODE_RECENT - 1) * DECODE_RECENT
    count = int(budget * dense_start)
    return (row.row, row.query, 1, row.context, dense_start, count, row.slot)


class DecodeTable:
    """Device memory of the work lists of decode steps.

    Lines that a step does not need are zero: segments without queries, which kernels skip.

    Args:
        shape: sizes; those of heads are not read.
        batch: most rows of a step's batch.
        device: where the kernels run.

    Attributes:
        limits: int32 ``[batch]`` on the device: how much of a row's sequence the parent backend may
            see. A row that decodes sparsely costs it one token.
    """

    def __init__(self, shape: DecodeShape, batch: int, device: torch.device):
        self.shape = shape
        sizes = [shape.requests * SEGMENT_COLUMNS, shape.requests * APPEND_COLUMNS, batch]
        # Whole 16 bytes each: alignment is part of what a kernel is compiled for.
        self._sizes = [-(-size // 4) * 4 for size in sizes]
        self._all = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        parts = [
            part[:size] for part, size in zip(self._all.split(self._sizes), sizes, strict=True)
        ]
        self.segments = parts[0].view(-1, SEGMENT_COLUMNS)
        self.appends = parts[1].view(-1, APPEND_COLUMNS)
        self.limits = parts[2]
        self._none = torch.empty(0, 2, dtype=torch.int32, device=device)

    def fill(self, rows: Sequence[DecodeRow], segments: int) -> DecodeList:
        """Write a step's work list, without waiting for the device.

        Args:
            rows: requests with a state each, at most ``segments``.
            segments: that are launched, at most ``shape.requests``.
        """
        lines = [decode_line(row, self.shape.budget) for row in rows]
        appends = [
            (row.row, row.slot, row.covered, max(0, row.context + 1 - row.covered)) for row in rows
        ]
        host = torch.zeros(self._all.shape, dtype=torch.int32, pin_memory=self._all.is_cuda)
        tables = host.split(self._sizes)
        tables[2].fill_(NO_LIMIT)
        if rows:
            tables[0][: len(rows) * SEGMENT_COLUMNS] = torch.tensor(
                lines, dtype=torch.int32
            ).flatten()
            count = len(rows) * APPEND_COLUMNS
            tables[1][:count] = torch.tensor(appends, dtype=torch.int32).flatten()
            tables[2][[row.row for row in rows]] = 1
        self._all.copy_(host, non_blocking=True)
        work = WorkList(
            row=0,
            target_error=0.0,
            first_of_chunk=False,
            span_length=1,
            max_seen=0,
            segments=self.segments[:segments],
            groups=self._none,
            max_history=self.shape.max_history,
            max_list=self.shape.max_list,
            max_queries=1,
        )
        return DecodeList(tuple(rows), work, self.appends[:segments])


def empty_summaries(
    shape: DecodeShape,
    dtype: torch.dtype,
    device: torch.device,
    clusters: int = CLUSTERS,
    region: int = REGION_TOKENS,
) -> Summaries:
    """Return room for a slot of summaries for each request; they stand for no token yet."""
    rows, head_dim = clusters + REGIONS, shape.head_dim

    def zeros(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape.requests, shape.kv_heads, *size, dtype=dtype, device=device)

    return Summaries(
        zeros(rows, 2 * head_dim),
        zeros(rows, dtype=torch.int32),
        zeros(max(1, shape.max_history), dtype=torch.uint8).fill_(NO_SUMMARY),
        torch.zeros(shape.requests, dtype=torch.int32, device=device),
        zeros(head_dim, head_dim),
        zeros(head_dim, head_dim),
        clusters,
        region,
    )


def store_summaries(held: Summaries, found: Summaries, slot: int, seen: int) -> None:
    """Copy a prompt's summaries, which were made of ``seen`` tokens, into a slot."""
    for name in TENSORS:
        if name != "labels":
            getattr(held, name)[slot].copy_(getattr(found, name)[0])
    labels = held.labels[slot]
    labels[:, :seen].copy_(found.labels[0, :, :seen])
    labels[:, seen:].fill_(NO_SUMMARY)
