from contextlib import contextmanager

import pytest
import torch

from s2o_vllm.kernels.output_error import ERROR_MOST, ERROR_UNIT, NUM_ERRORS, add_errors


@contextmanager
def waiting_for_the_device_is_an_error():
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def summed(sparse, dense, device="cpu"):
    """Errors and rows that are added to counters which are not empty."""
    counters = torch.full((NUM_ERRORS,), 7, dtype=torch.int64, device=device)
    given = (sparse.to(device), dense.to(device))
    with waiting_for_the_device_is_an_error():
        add_errors(counters, *given)
    error, rows = (counters - 7).tolist()
    return error * ERROR_UNIT, rows


def test_each_query_counts_by_its_own_size(device):
    dense = torch.randn(5, 4, 8)
    dense *= torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4])[:, None, None]
    sparse = dense + 0.25 * dense.flip(2)
    error, rows = summed(sparse, dense, device)
    assert rows == 5
    assert error == pytest.approx(5 * 0.25, rel=1e-4)


@pytest.mark.parametrize(
    ("sparse", "dense", "expected"),
    [
        (1.0, 1.0, (0.0, 1)),
        (0.0, 0.0, (0.0, 1)),
        (1.0, 0.0, (ERROR_MOST, 1)),
        (float("nan"), 1.0, (ERROR_MOST, 1)),
        (float("inf"), 1.0, (ERROR_MOST, 1)),
        (1.0, float("nan"), (0.0, 0)),
        (float("nan"), float("inf"), (0.0, 0)),
    ],
)
def test_what_is_no_number_spoils_no_counter(sparse, dense, expected):
    """A sparse output that is none counts in full; one that stock has not either, not at all."""
    assert summed(torch.full((1, 2, 4), sparse), torch.full((1, 2, 4), dense)) == expected
