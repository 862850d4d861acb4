"""Retrieval heads: query heads whose queries each want keys of their own, far back (ours).

A few heads of a model look up single tokens anywhere in the history; the others attend to recent
tokens, to the first ones, or to the same tokens for many queries. A quarter of the queries in 29
directions ranks keys well for the others and not for retrieval heads: nearly all mass that lists
lose against exact ones they lose there (`benchmarks/quality/LOG.md`). So retrieval heads are found
for every chunk, and ranked again by every query in 61 directions.

A head's far mass is the sum over far keys of the largest probability that any of a segment's probes
gives the key: 2 to 20 for a retrieval head, below 1 for most others. Products are exact, since 29
directions underestimate the far mass of the heads that need more; log-sum-exps are those of 29
directions, which can only favour such a head.

Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality" (arXiv 2404.15574),
found such heads by what models copy; this looks at one chunk's attention alone.
"""

import torch

SEGMENTS = 4  # of a work list that are sampled; segments
STRIDE = 2  # every second segment from the first on, which sees most; segments
PROBES = 16  # of a segment, at most; query rows
BLOCK = 64  # of every two blocks of keys the first counts, twice; tokens
SINK = 64  # first tokens of a request, which do not count as far; tokens
RECENT = 1024  # before a segment's dense pass, which do not count as far; tokens
LEAST = 0.01  # keys of a smaller probability do not count: a long history has many; 0 to 1
FAR_MASS = 2.0  # of a retrieval head, at least; mean over segments
UNIT = 2**16  # sums are integers in 1 / UNIT, so that the order of additions does not matter


def capacity(share: int) -> int:
    """Return how many of a KV head's ``share`` query heads can be retrieval heads: half."""
    return -(-share // 2)


def least() -> int:
    """Return the least far mass of a retrieval head, in 1 / UNIT, summed over segments.

    Where a work list has fewer segments its last one counts again.
    """
    return round(FAR_MASS * UNIT * SEGMENTS)


def sampled_segments(segments: int) -> list[int]:
    """Return which segments of a work list are sampled."""
    return [min(number * STRIDE, segments - 1) for number in range(SEGMENTS)]


def retrieval_heads(scores: torch.Tensor, histories: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Return which heads are retrieval heads; see the module.

    Args:
        scores: log2-probabilities ``[segments, heads, max_history]``, the largest of the probes,
            of the sampled segments.
        histories: int ``[segments]``, tokens before each segment's dense pass.
        kv_heads: key/value heads.

    Returns:
        bool ``[heads]``.
    """
    token = torch.arange(scores.shape[2], device=scores.device)
    far = (token >= SINK) & (token < histories[:, None] - RECENT) & (token // BLOCK % 2 == 0)
    mass = scores.float().clamp(max=0).exp2()
    mass = mass.masked_fill(~far[:, None] | ~(mass > LEAST), 0)
    far_mass = (mass.sum(-1) * (2 * UNIT)).long().sum(0).unflatten(0, (kv_heads, -1))
    order = far_mass.sort(dim=1, descending=True, stable=True).indices
    order = order[:, : capacity(far_mass.shape[1])]
    most = torch.zeros_like(far_mass, dtype=torch.bool).scatter_(1, order, True)
    return (most & (far_mass >= least())).flatten()
