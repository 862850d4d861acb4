"""Which tokens stand for all: one of each stratum, at a place that follows no period of a text.

Every n-th token does not do: where a text repeats itself after a multiple of n tokens it is always
the same one. Tables, logs and RULER's variable tracking (24 tokens) repeat themselves.
:mod:`strata` is the kernels' twin.
"""

import torch

FACTOR = 1540483477  # an odd number whose bits are mixed: a hash's
MASK = 0xFFFFFFFF


def stratified(tokens: int, step: int, room: int | None = None) -> torch.Tensor:
    """Return one position of every ``step`` tokens, among the first ``room`` of them.

    Returns:
        int64 ``[tokens // step]``, rising.
    """
    number = torch.arange(tokens // step)
    return number * step + (mixed(number) >> 4) % (step if room is None else room)


def mixed(number: torch.Tensor) -> torch.Tensor:
    """Return a hash of 32 bits of each integer; int64 of any shape, and of the same one."""
    h = number * FACTOR & MASK
    h ^= h >> 15
    h = h * FACTOR & MASK
    return h ^ h >> 13
