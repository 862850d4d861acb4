"""Constants that were measured.

A line each: meaning; unit; range; the heading of `benchmarks/quality/LOG.md` that has the figures,
or that none has.
"""

# Ranking.
CHUNK = 4096  # history that one program scores; tokens; a power of two; not logged
SEGMENTS_TOGETHER = 16  # that `mean_query` scores at a time; segments; >= 1; not logged
SPAN_LENGTH = 2048  # that share covariances; queries; whole segments; "A mean value that follows"
CHUNK_SPANS = 4  # of a chunk, which share their bases; spans; >= 1; "A basis of each head"
PROBE_STEP = 4  # one query row in this many is a probe; >= 1; "Retrieval heads"

# Selection.
BUCKETS = 128  # of a list's scores; a power of two; not logged. Counting costs in proportion
COUNTED = 8192  # priorities of a list that are counted, at most; "Priority samples"
# Most noise of a priority, so most weight of a token; base-2 logarithm; > 0; "Priority samples"
NOISE_LIMIT = 8.0
# Tiers of a list, each a pass over its scores; >= 1; "Early stop". Up to 1/4, 1/2, 7/8 of the list
# and the rest where tiles may stop early; one where they may not.
TIERS = 4
TIERS_UNORDERED = 1
CAPACITY_STEP = 16  # lists have room for multiples of this; slots; keeps kernels' variants few
HEADS_SHARED = 2  # KV heads that share a budget; >= 1; "Own mass, and budgets shared by pairs"
# Least share of a list's skipped score mass that counts as dropped mass; 0 to 1; "A target error".
# A score is the largest probability of any probe, the dropped mass that of the mean row.
MEAN_OF_MAX = 0.022

# Attention.
STOP_STEP_TOKENS = 2048  # between tests of the early stop; tokens; "By hand on an H100 and an H200"

# Estimate of the dropped mass: "The dropped mass, estimated from a sample".
ESTIMATE_EVERY = 8  # one segment in this many has an estimate; segments
ESTIMATE_TOKENS = 256  # sampled from its history; tokens; within a factor of 1.5 for 97 % of tiles
ESTIMATE_STEP = 8  # least distance of two samples; tokens; keeps a page's samples few

# Decode: "Decode by the basis of a prompt's end".
DECODE_RECENT = 64  # the dense pass covers this many to twice as many recent tokens; tokens
DECODE_PARTS = 16  # programs that share a list, however many requests there are; programs
SNAPSHOT_QUERIES = 512  # that make a basis good enough for decode; queries; below, most win
