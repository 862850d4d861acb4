"""Errors of attention outputs against dense ones, summed on the device."""

import torch

# What :func:`add_errors` adds to its counters, in this order.
ERROR, ROWS = range(2)
NUM_ERRORS = 2
ERROR_UNIT = 1e-6  # of a relative error: one of ERROR
ERROR_MOST = 10.0  # a row's relative error counts as this at most, and as this if it is NaN
SMALLEST = 1e-30  # norms of dense outputs count as this at least


def add_errors(counters: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor) -> None:
    """Add ``|sparse - dense| / |dense|`` of each query, over all of its heads.

    Nothing waits for the device. Queries whose dense output is not finite count in neither
    counter: their requests hold no numbers.

    Args:
        counters: int64 ``[NUM_ERRORS]``, added to: relative errors in ``ERROR_UNIT``, and rows.
        sparse: ``[queries, heads, head_dim]``.
        dense: likewise, what stock attention gives the same queries.
    """
    sparse, dense = sparse.float().flatten(1), dense.float().flatten(1)
    norm = dense.norm(dim=1)
    counted = norm.isfinite()
    error = (sparse - dense).norm(dim=1) / norm.clamp(min=SMALLEST)
    error = error.nan_to_num(nan=ERROR_MOST).clamp(max=ERROR_MOST)
    total = error.masked_fill(~counted, 0.0).double().sum() / ERROR_UNIT
    counters += torch.stack([total.round().long(), counted.sum()])
