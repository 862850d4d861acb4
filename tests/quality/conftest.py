"""A client that does not wait; segments are of `tests/support/segments.py`."""

import pytest

from s2o_vllm.benchmarks.quality import client
from segments import make_segment, one_direction

__all__ = ["make_segment", "one_direction"]


@pytest.fixture
def settled(monkeypatch):
    """A client that neither waits nor tries again, at a commit that is known."""
    monkeypatch.setattr(client, "SETTLE", 0)
    monkeypatch.setattr(client, "RETRIES", 0)
    monkeypatch.setenv("S2O_COMMIT", "abc")
