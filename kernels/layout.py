"""Integers and units that the host, the kernels and their readers agree on.

A column is an index into a row of a table. Kernels read the same numbers as Triton constants, from
:mod:`columns`.
"""

# The work table, a row per segment; decode has a row per query.
ROW = 0  # row of the block table
QUERY_START = 1  # first query in the step's packed queries
NUM_QUERIES = 2
HISTORY = 3  # tokens of the sequence before the segment
DENSE_START = 4  # position where the dense pass begins; the tokens before it are ranked
LIST_LENGTH = 5  # tokens to select, averaged over the heads that share a budget
SLOT = 6  # of the request's state; 0 in prefill
SEGMENT_COLUMNS = 7

# The append table of decode, a row per query: keys that a request's slot lacks.
APPEND_ROW = 0  # row of the block table
APPEND_SLOT = 1
APPEND_FIRST = 2  # position of the first key
APPEND_COUNT = 3
APPEND_COLUMNS = 4

# Counters that an attend launch adds to, int64, summed over queries and heads.
VISITED = 0  # history tokens that were attended to
ELIGIBLE = 1  # history tokens
TILES = 2
STOPPED = 3  # tiles that stopped early
DROPPED = 4  # estimated dropped mass of the sampled queries, in DROPPED_UNIT
SAMPLED = 5  # queries of which the dropped mass was estimated
NUM_COUNTERS = 6
DROPPED_UNIT = 1e-6  # share of a query's softmax mass

NOT_LISTED = 2**30  # place in a list of a token that the list leaves out
NO_LIMIT = 2**31 - 1  # tokens of a sequence that the parent backend may see: all

LOG2E = 1.4426950408889634  # base-2 logarithm of e: scores are base-2
LN2 = 0.6931471805599453
