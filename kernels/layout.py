"""Columns of the tables that kernels read and write; :mod:`work_list` says what they hold."""

import triton.language as tl

from . import decode_state as decode_plan
from . import work_list as plan

# A line of the work table.
ROW = tl.constexpr(plan.ROW)
QUERY_START = tl.constexpr(plan.QUERY_START)
NUM_QUERIES = tl.constexpr(plan.NUM_QUERIES)
HISTORY = tl.constexpr(plan.HISTORY)
DENSE_START = tl.constexpr(plan.DENSE_START)
LIST_LENGTH = tl.constexpr(plan.LIST_LENGTH)
FIT = tl.constexpr(plan.FIT)
ITEM_COLUMNS = tl.constexpr(plan.COLUMNS)

# A line of `WorkList.fits`: a `plan.Span`.
SPAN_QUERIES = tl.constexpr(plan.Span._fields.index("queries"))
SPAN_TOKENS = tl.constexpr(plan.Span._fields.index("tokens"))
SPAN_COLUMNS = tl.constexpr(len(plan.Span._fields))

# A line of what decode appends.
APPEND_ROW = tl.constexpr(decode_plan.APPEND_ROW)
APPEND_SLOT = tl.constexpr(decode_plan.APPEND_SLOT)
APPEND_FIRST = tl.constexpr(decode_plan.APPEND_FIRST)
APPEND_COUNT = tl.constexpr(decode_plan.APPEND_COUNT)
APPEND_COLUMNS = tl.constexpr(decode_plan.APPEND_COLUMNS)

# Counters of an attend launch.
VISITED = tl.constexpr(plan.VISITED)
ELIGIBLE = tl.constexpr(plan.ELIGIBLE)
TILES = tl.constexpr(plan.TILES)
STOPPED = tl.constexpr(plan.STOPPED)
DROPPED = tl.constexpr(plan.DROPPED)
SAMPLED = tl.constexpr(plan.SAMPLED)
