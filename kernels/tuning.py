"""Constants that were measured.

A line each: meaning; unit; range; the heading of `benchmarks/quality/LOG.md` that has the figures,
or that none has.
"""

# Ranking.
CHUNK = 4096  # history that one program scores; tokens; a power of two; not logged
SEGMENTS_TOGETHER = 16  # that `mean_query` scores at a time; segments; >= 1; not logged
SPAN_LENGTH = 2048  # that share covariances; queries; whole segments; "A mean value that follows"
CACHED_TOKENS = 1024  # that the reference scores at a time, for a CPU's cache; >= 1; not logged
CHUNK_SPANS = 4  # of a chunk, which share their bases; spans; >= 1; "A basis of each head"
PROBE_STEP = 4  # one query row in this many is a probe; >= 1; "Retrieval heads"

# Selection.
BUCKETS = 128  # of a list's scores; a power of two; not logged. Counting costs in proportion
COUNTED = 8192  # scores of a list that are counted, at most; "Priority samples"
# Most noise of a priority, so most weight of a token; base-2 logarithm; > 0; "Priority samples"
NOISE_LIMIT = 8.0
SCORED_EIGHTHS = 6  # of a list, at most, are its best scores; 1 to 7; "Priority samples"
SAMPLE_SHARE = 0.35  # of what is skipped, for which the sample stands; 0 to 1; "Priority samples"
# Tiers of a list, each a pass over its scores; >= 1; "Early stop". Up to 1/4, 1/2 of those by
# score and the rest where tiles may stop early; one where they may not.
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

# Summaries of the other share of skipped tokens: "Skipped tokens, summarised by region means".
REGION_TOKENS = 1024  # that one summary stands for; tokens
REGION_SAMPLES = 256  # most samples of a region's mean; tokens
REGIONS_SAMPLES = 16384  # most samples of all regions, above one piece for each; tokens
REGION_PIECE = 128  # samples that are read at a time; tokens
# A region weighs REGION_WEIGHT * exp(REGION_VARIANCE * variance of its scores) times its mean key's
# mass, at most REGION_WEIGHT_LIMIT times; "A weight that follows the query". A normal distribution
# has exp(variance / 2), of which lists hold the best tokens.
REGION_WEIGHT = 1.5
REGION_VARIANCE = 0.3
REGION_WEIGHT_LIMIT = 16.0
# Covariances of keys with values and with keys: "A mean value that follows the query".
COVARIANCE_PARTS = 16  # most parts of a history; parts
COVARIANCE_SAMPLES = 256  # of a part; tokens
COVARIANCE_GROUP = 64  # samples about one local mean; tokens
COVARIANCE_WEIGHT = 0.9  # of the value-key covariance, as lists hold what has most of it; 0 to 1

# Decode: "Decode by the basis of a prompt's end".
DECODE_RECENT = 64  # the dense pass covers this many to twice as many recent tokens; tokens
DECODE_PARTS = 16  # programs that share a list, however many requests there are; programs
SNAPSHOT_QUERIES = 512  # that make a basis good enough for decode; queries; below, most win
