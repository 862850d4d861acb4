"""A step's plan: which rows prefill sparsely, which go to the parent backend, and why."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from .kernels.decode_state import DecodeList, Snapshot
from .kernels.work_list import PrefillRow, WorkList
from .requests import RequestBudget
from .shadow import ShadowPart

# Tokens at the end of a prompt that attend to all of it: they hold the question, and the very last
# one gives the first token. A list that serves many queries may lack what one of them needs.
DENSE_TAIL = 64


@dataclass
class DensePart:
    """Adjacent rows that the parent backend attends to; the first one may be only its end.

    Attributes:
        rows: first and last (exclusive) row of the batch.
        tokens: first and last (exclusive) query token.
        metadata: the parent's metadata for these rows alone.
    """

    rows: tuple[int, int]
    tokens: tuple[int, int]
    metadata: Any


@dataclass
class StepPlan:
    """What the forward of every layer does in one step.

    Attributes:
        work: work lists of the sparse prefill rows, which are launched one after the other.
        sparse_rows: the rows of the batch that prefill sparsely.
        dense: runs of rows that the parent backend attends to.
        decode: the sparse decode queries, or None. Rows of ``dense`` may hold the same queries:
            their output is then written over.
        snapshots: for each work list, by number, the snapshot of its ranking to take.
        shadow: queries that are attended densely as well, or None.
    """

    work: list[WorkList]
    sparse_rows: list[PrefillRow]
    dense: list[DensePart]
    decode: DecodeList | None = None
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    shadow: ShadowPart | None = None


def dense_work(
    starts: list[int],
    seq_lens: list[int],
    prefilling: list[bool],
    decoding: Collection[int] = (),
) -> int:
    """Return the tokens that the queries of a batch would attend to densely, for one head.

    A query at position ``p`` attends to ``p + 1`` tokens, however the prompt is cut into chunks.
    Rows of prefill count, and those of ``decoding``; a prefill row of one token counts as decode.
    Arguments are those of :func:`split_rows`.
    """
    tokens = 0
    for row, total in enumerate(seq_lens):
        count = starts[row + 1] - starts[row]
        if (prefilling[row] and count > 1) or row in decoding:
            tokens += count * (2 * total - count + 1) // 2
    return tokens


def split_rows(
    starts: list[int],
    seq_lens: list[int],
    prefilling: list[bool],
    budgets: list[RequestBudget],
    min_context: int,
    decoding: Collection[int] = (),
    least_new: Callable[[int], int] = lambda history: 0,
) -> tuple[list[PrefillRow], list[tuple[int, int, int]], list[str]]:
    """Split a batch into sparse rows and runs of dense rows.

    The last ``DENSE_TAIL`` tokens of a prompt are dense; the rest of their chunk may be sparse.

    Args:
        starts: first query token of each row, and the end of the last one.
        seq_lens: tokens of each row including this chunk.
        prefilling: whether a row is still reading its prompt.
        budgets: what each row may visit.
        min_context: a row none of whose segments has that much history is dense.
        decoding: rows that decode sparsely.
        least_new: new tokens that a chunk behind so long a history must have, see :mod:`cost`.

    Returns:
        The sparse rows, the dense runs (first row, last row exclusive, first query token), and for
        each dense *prefill* row the reason. Empty rows (padding) belong to neither, nor do
        those of ``decoding``.
    """
    sparse: list[PrefillRow] = []
    runs: list[tuple[int, int, int]] = []
    reasons: list[str] = []
    for row, total in enumerate(seq_lens):
        count = starts[row + 1] - starts[row]
        if count == 0 or row in decoding:
            continue
        own, context = budgets[row], total - count
        end = min(total, max(context, own.prompt - DENSE_TAIL)) if own.prompt else total
        reason = None
        if not prefilling[row] or count == 1:
            reason = ""  # decode
        elif own.sparsity_budget >= 1:
            reason = "budget_is_one"
        elif end == context:
            reason = "end_of_prompt"
        elif end <= max(min_context, own.min_budget_tokens, 1):
            reason = "short_history"
        elif end - context < least_new(context):
            reason = "few_new_tokens"
        if reason is None:
            what = (own.sparsity_budget, own.target_error, own.min_budget_tokens)
            sparse.append(PrefillRow(row, starts[row], end - context, context, *what))
            if end < total:
                runs.append((row, row + 1, starts[row] + end - context))
            continue
        if reason:
            reasons.append(reason)
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1, runs[-1][2])
        else:
            runs.append((row, row + 1, starts[row]))
    return sparse, runs, reasons
