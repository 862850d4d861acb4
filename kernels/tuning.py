"""Constants that were measured.

A line each: meaning; unit; range; the heading of `benchmarks/quality/LOG.md` that has the figures,
or that none has.
"""

# Ranking.
CHUNK = 4096  # history that one program scores; tokens; a power of two; not logged
SEGMENTS_TOGETHER = 16  # that `mean_query` scores at a time; segments; >= 1; not logged
SPAN_LENGTH = 2048  # of a span, to which decode fits its basis; queries; whole segments; not logged
CACHED_TOKENS = 1024  # that the reference scores at a time, for a CPU's cache; >= 1; not logged
CHUNK_SPANS = 4  # of a chunk, which share bases and clusters; spans; >= 1; "A basis of each head"
PROBE_STEP = 4  # one query row in this many is a probe; >= 1; "Retrieval heads"

# Selection.
BUCKETS = 128  # of a list's scores; a power of two; not logged. Counting costs in proportion
COUNTED = 8192  # scores of a list that are counted, at most; "Priority samples"
# Tiers of a list, each a pass over its scores; >= 1; "Early stop". Up to 1/4, 1/2 of it and the
# rest where tiles may stop early; one where they may not.
TIERS = 3
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

# Summaries of skipped tokens: "Clusters of like keys".
CLUSTERS = 120  # of a history before its chunk; with a chunk's eight regions whole tiles
CLUSTER_PASSES = 2  # assignments of tokens to clusters, the last one of all tokens; >= 1
CLUSTER_SAMPLES = 16384  # most tokens of a history that means are taken over
CLUSTER_PARTS = 16  # programs that share these; programs
REGION_TOKENS = 1024  # of a chunk's own neighbours that one summary stands for; tokens
# A summary's tokens count exp(SUMMARY_VARIANCE * variance of their scores) times, at most
# SUMMARY_WEIGHT_LIMIT times. A normal distribution has exp(variance / 2), of which lists hold the
# best tokens.
SUMMARY_VARIANCE = 0.35
SUMMARY_WEIGHT_LIMIT = 16.0
# Covariances of keys with values and with keys: "A mean value that follows the query".
COVARIANCE_PARTS = 16  # of a history, a program each; parts
COVARIANCE_SAMPLES = 256  # of a part; tokens
COVARIANCE_WEIGHT = 0.8  # of the value-key covariance, as lists hold what has most of it; 0 to 1

# Decode: "Decode by the basis of a prompt's end".
DECODE_RECENT = 64  # the dense pass covers this many to twice as many recent tokens; tokens
DECODE_PARTS = 16  # programs that share a list, however many requests there are; programs
SNAPSHOT_QUERIES = 512  # that make a basis good enough for decode; queries; below, most win
