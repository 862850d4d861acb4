"""Where sparse prefill pays: how many new tokens a chunk must have behind its history.

Dense attention takes time in proportion to the pairs of a query and a key that it sees. Ranking
takes a fixed time a layer (a dozen launches, fitting the bases), some time for each token of the
history (projected keys) and little for each query. So a short turn of a long conversation, or a
chunk that a busy scheduler cut short, is faster dense.

On a CPU sparse prefill is PyTorch, dense attention vLLM's C++, and next to nothing pays.
"""

from collections.abc import Callable

import torch

# Pairs of a query and a key, of HEADS query heads, that dense attention sees in the fixed time, and
# in the time for a token of the history: 1.5 times what an H200 showed behind 32K and 120K tokens
# (`benchmarks/quality/LOG.md`, "Where short chunks pay"). `s2o bench turns` measures it.
FIXED_PAIRS = 14_000_000
PAIRS_PER_TOKEN = 170
HEADS = 32
SHORTEST = 8192  # history from which on this was measured; tokens
NEVER = 2**62  # more new tokens than any chunk has


def least_new_tokens(history: int, heads: int) -> int:
    """Return the new tokens from which on sparse prefill is faster than dense attention.

    Args:
        history: tokens before the chunk; 0 is returned below ``SHORTEST``.
        heads: query heads of this worker: the fewer, the less dense attention takes, and as much
            as ever a launch.
    """
    if history < SHORTEST:
        return 0
    return -(-int(FIXED_PAIRS * HEADS / heads + PAIRS_PER_TOKEN * history) // history)


def decision(heads: int, device: torch.device) -> Callable[[int], int]:
    """Return :func:`least_new_tokens` of a worker; on anything but a GPU ``NEVER``.

    A device that was not measured is left dense, and so is a CPU: of the chunks measured behind 2K
    to 30K tokens nearly all are faster dense, and the best gains less than a fifth sparse
    (`benchmarks/results/cpu.json`, made by ``python -m s2o_vllm.benchmarks.speed.cpu``).
    """
    if device.type != "cuda":
        return lambda history: NEVER
    return lambda history: least_new_tokens(history, heads)
