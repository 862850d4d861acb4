"""Which tokens stand for all: one of each stratum, at a place that follows no period of a text.

Every n-th token does not do: where a text repeats itself after a multiple of n tokens it is always
the same one. Tables, logs and RULER's variable tracking (24 tokens) repeat themselves.
:mod:`strata` is the kernels' twin.
"""

import functools

import torch

from .tuning import NOISE_LIMIT

FACTOR = 1540483477  # an odd number whose bits are mixed: a hash's
MASK = 0xFFFFFFFF
NOISE_TOKENS = 2**16  # after which the noise repeats itself
NOISE_STEP = 16  # tokens, of which the kernels read whole runs
NOISE_QUERIES = 64  # that share a sample; queries, from a multiple on


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


@functools.cache
def priority_noise(device: torch.device) -> torch.Tensor:
    """Return what makes priorities of scores: min(log2(1 / u), NOISE_LIMIT), u uniform in (0, 1).

    Returns:
        float16 ``[NOISE_TOKENS]``; a token takes the one of its position plus a segment's phase.
    """
    u = (mixed(torch.arange(NOISE_TOKENS) + NOISE_TOKENS).double() + 0.5) / 2**32
    return (-u.log2()).clamp(max=NOISE_LIMIT).half().to(device)


def noise_phase(history: torch.Tensor) -> torch.Tensor:
    """Return where in the noise a segment begins: a multiple of ``NOISE_STEP``.

    Every ``NOISE_QUERIES`` of a sequence draw a sample of their own, however their prompt is cut.

    Args:
        history: integer tensor of any shape, the tokens before the segment.

    Returns:
        int64 of the same shape.
    """
    block = history.long() // NOISE_QUERIES
    return mixed(block) % (NOISE_TOKENS // NOISE_STEP) * NOISE_STEP
