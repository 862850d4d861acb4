"""Columns of the work table by the names that kernels use; :mod:`plan` defines them."""

import triton.language as tl

from . import plan

QUERY_START = tl.constexpr(plan.QUERY_START)
NUM_QUERIES = tl.constexpr(plan.NUM_QUERIES)
HISTORY = tl.constexpr(plan.HISTORY)
DENSE_START = tl.constexpr(plan.DENSE_START)
COLUMNS = tl.constexpr(plan.COLUMNS)
