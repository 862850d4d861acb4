"""The work list of a decode step: one query of each of several requests, and what it may visit.

Built on the host once a step, like that of prefill in :mod:`plan`, of whose form it is: an item's
fit is the *slot* that holds what the end of its prompt was ranked by (ours).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .plan import DENSE_START, WorkList, list_places, longest_list, to_device

RECENT = 64  # the dense pass begins at a multiple of so many tokens, one whole of them back
DECODE_PARTS = 16  # programs that share a list, always so many: an output must not depend on others

KEPT_QUERIES = 512  # of a fit: a basis of fewer tells little of the queries to come
APPEND_ROW, APPEND_SLOT, APPEND_FIRST, APPEND_COUNT = range(4)
APPEND_COLUMNS = 4


class Kept(NamedTuple):
    """What of a prefill chunk's ranking a slot keeps.

    Attributes:
        slot: a request's.
        fit: row of ``WorkList.fits``.
        tokens: that the fit sees: so many the slot covers.
        queries: that it was fitted to.
    """

    slot: int
    fit: int
    tokens: int
    queries: int


class DecodeRow(NamedTuple):
    """One request's query in a decode step.

    Attributes:
        row: its row in the block table.
        query: index of its query in the step's packed queries.
        context: tokens in the cache before the query's own.
        slot: what it is ranked with.
        covered: tokens, from the first on, whose images the slot holds.
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
        work: an item each, of one query; its fit is the request's slot.
        appends: int32 ``[rows, APPEND_COLUMNS]`` on the device: block-table row, slot, first
            token whose image the slot lacks, how many it lacks.
        max_append: most tokens that a slot lacks.
    """

    rows: tuple[DecodeRow, ...]
    work: WorkList
    appends: torch.Tensor
    max_append: int


@dataclass(frozen=True)
class DecodeShape:
    """What sparse decode must be built for.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: size of a head.
        max_history: longest history, in tokens.
        requests: slots, and most rows of a step.
        budget: largest share of the history that a query may visit.
    """

    heads: int
    kv_heads: int
    head_dim: int
    max_history: int
    requests: int
    budget: float

    @property
    def places(self) -> int:
        """Places of all lists of a KV head."""
        item = decode_item(DecodeRow(0, 0, self.max_history + 2 * RECENT, 0, 0), self.budget)
        return self.requests * list_places(longest_list(item))


def keep(work: WorkList, slot: int) -> Kept:
    """Choose the fit that a slot keeps: the last of ``KEPT_QUERIES``, else that of most queries."""
    sizes = [
        (min(queries, KEPT_QUERIES) if tokens else 0, number)
        for number, (_, queries, tokens) in enumerate(work.host_fits)
    ]
    fit = max(sizes)[1]
    _, queries, tokens = work.host_fits[fit]
    return Kept(slot, fit, tokens, queries)


def decode_item(row: DecodeRow, budget: float) -> tuple[int, ...]:
    """Return a row's line of the work table: the last 64 to 127 tokens before it are dense."""
    dense_start = max(0, row.context // RECENT - 1) * RECENT
    count = int(budget * dense_start)
    return (row.row, row.query, 1, row.context, dense_start, count, row.slot)


def build_decode_list(rows: Sequence[DecodeRow], budget: float, device: torch.device) -> DecodeList:
    """Build the work list of a decode step.

    Args:
        rows: requests with a slot each, one at least.
        budget: share of the ranked history that a query may visit, 0 < budget <= 1.
        device: where the kernels run.
    """
    items = [decode_item(row, budget) for row in rows]
    appends = [
        (row.row, row.slot, row.covered, max(0, row.context + 1 - row.covered)) for row in rows
    ]
    none = torch.empty(0, 3, dtype=torch.int32, device=device)
    work = WorkList(
        row=0,
        target_error=0.0,
        first_of_chunk=False,
        fits=none,
        fit_span=1,
        max_fit_queries=1,
        max_fit_tokens=0,
        items=to_device(items, device),
        groups=none,
        max_history=max(item[DENSE_START] for item in items),
        max_list=max(longest_list(item) for item in items),
        max_queries=1,
    )
    most = max(append[APPEND_COUNT] for append in appends)
    return DecodeList(tuple(rows), work, to_device(appends, device), most)
