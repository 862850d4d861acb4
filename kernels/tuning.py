"""Constants that were measured: meaning, unit, and where the log tells of them."""

# Probes (`benchmarks/quality/LOG.md`, "Lists of one head").
PROBES = 16  # of a whole segment; the matrix unit takes no fewer at a time
UNIT = 8.0  # of a stored product: one in base 2 is so many; keeps small queries out of subnormals
LEAST_SCORE = -48.0  # log2; no list cares for less, and buckets of scores stay narrow
# A log-sum-exp counts the first and the last tokens of a history one by one (what attention sinks
# and neighbours hold no sample tells), and one of each stratum for those between.
LSE_FIRST = 64
LSE_LAST = 256
LSE_SAMPLES = 512
MEAN_SAMPLES = 128  # tokens of the mean key, among the first MEAN_SPAN
MEAN_SPAN = 8192


def pool_of(segment: int) -> int:
    """Return how many neighbouring queries of a segment's ``segment`` make a probe."""
    return -(-segment // PROBES)
