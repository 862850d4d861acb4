"""The integers of :mod:`layout` as constants that kernels may read."""

import triton.language as tl

from . import layout

ROW = tl.constexpr(layout.ROW)
QUERY_START = tl.constexpr(layout.QUERY_START)
NUM_QUERIES = tl.constexpr(layout.NUM_QUERIES)
HISTORY = tl.constexpr(layout.HISTORY)
DENSE_START = tl.constexpr(layout.DENSE_START)
LIST_LENGTH = tl.constexpr(layout.LIST_LENGTH)
SLOT = tl.constexpr(layout.SLOT)
SEGMENT_COLUMNS = tl.constexpr(layout.SEGMENT_COLUMNS)


APPEND_ROW = tl.constexpr(layout.APPEND_ROW)
APPEND_SLOT = tl.constexpr(layout.APPEND_SLOT)
APPEND_FIRST = tl.constexpr(layout.APPEND_FIRST)
APPEND_COUNT = tl.constexpr(layout.APPEND_COUNT)
APPEND_COLUMNS = tl.constexpr(layout.APPEND_COLUMNS)

VISITED = tl.constexpr(layout.VISITED)
ELIGIBLE = tl.constexpr(layout.ELIGIBLE)
TILES = tl.constexpr(layout.TILES)
STOPPED = tl.constexpr(layout.STOPPED)
DROPPED = tl.constexpr(layout.DROPPED)
SAMPLED = tl.constexpr(layout.SAMPLED)

DROPPED_UNITS = tl.constexpr(1 / layout.DROPPED_UNIT)  # in a row's softmax mass

LN2 = tl.constexpr(layout.LN2)
