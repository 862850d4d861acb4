"""Retrieval heads: query heads whose queries each want keys of their own, far back (ours).

A few heads of a model look up single tokens anywhere in the history; the others look at what is
near, at the first tokens or at the same tokens for many queries. A quarter of the queries in 29
directions ranks keys well for the others and not for retrieval heads: all that lists lose of exact
ones they lose there (`benchmarks/quality/LOG.md`). So retrieval heads are found for every chunk,
and ranked again by every query in 61 directions.

How much a head seeks is the sum over far keys of the largest probability that any of a segment's
probes gives the key: 2 to 20 for a retrieval head, below 1 for most others. Products are exact, for
29 directions do not see what the very heads lack that need more; log-sum-exps are those of 29
directions, and what they lack counts in favour of a head.

Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality" (arXiv 2404.15574),
found such heads by what models copy; this looks at one chunk's attention alone.
"""

import torch

SEGMENTS = 4  # of a list that are looked at
STRIDE = 2  # every second segment from the first on; the first sees most
PROBES = 16  # of a segment, at most
BLOCK = 64  # keys: of every two blocks the first counts, twice
SINK = 64  # first tokens of a request, which do not count as far
RECENT = 1024  # tokens before a segment's dense pass, which do not count either
LEAST = 0.01  # nor keys of a smaller probability, of which a long history has many
SOUGHT = 2.0  # mean over segments from which on a head is a retrieval head
UNIT = 2**16  # sums are integers: in whatever order programs add to them, they are the same


def capacity(share: int) -> int:
    """Return how many of a KV head's ``share`` query heads can be retrieval heads: half."""
    return -(-share // 2)


def least() -> int:
    """Return from which sum over segments on a head is a retrieval head.

    A segment that a short list lacks is its last one once more.
    """
    return round(SOUGHT * UNIT * SEGMENTS)


def looked_at(segments: int) -> list[int]:
    """Return which segments of a list are looked at."""
    return [min(number * STRIDE, segments - 1) for number in range(SEGMENTS)]


def retrieval_heads(scores: torch.Tensor, histories: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Return which heads are retrieval heads; see the module.

    Args:
        scores: log2-probabilities ``[segments, heads, max_history]``, the largest of the probes,
            of the segments that are looked at.
        histories: int ``[segments]``, tokens before each segment's dense pass.
        kv_heads: key/value heads.

    Returns:
        bool ``[heads]``.
    """
    token = torch.arange(scores.shape[2], device=scores.device)
    far = (token >= SINK) & (token < histories[:, None] - RECENT) & (token // BLOCK % 2 == 0)
    mass = scores.float().clamp(max=0).exp2()
    mass = mass.masked_fill(~far[:, None] | ~(mass > LEAST), 0)
    sought = (mass.sum(-1) * (2 * UNIT)).long().sum(0).unflatten(0, (kv_heads, -1))
    order = sought.sort(dim=1, descending=True, stable=True).indices[:, : capacity(sought.shape[1])]
    best = torch.zeros_like(sought, dtype=torch.bool).scatter_(1, order, True)
    return (best & (sought >= least())).flatten()
