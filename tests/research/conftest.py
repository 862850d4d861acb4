"""Segments are of `tests/support/segments.py`."""

from segments import make_segment, one_direction

__all__ = ["make_segment", "one_direction"]
