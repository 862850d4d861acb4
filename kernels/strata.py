"""The kernels' part of :mod:`sampling`."""

import triton
import triton.language as tl

from . import sampling

FACTOR = tl.constexpr(sampling.FACTOR)
NOISE_TOKENS = tl.constexpr(sampling.NOISE_TOKENS)
NOISE_STEP = tl.constexpr(sampling.NOISE_STEP)
NOISE_QUERIES = tl.constexpr(sampling.NOISE_QUERIES)


@triton.jit
def mixed(number):
    """Return a hash of 32 bits of each integer."""
    h = number.to(tl.uint32) * FACTOR
    h ^= h >> 15
    h *= FACTOR
    return h ^ (h >> 13)


@triton.jit
def noise_phase(history):
    """Return where in the priorities' noise a segment begins; see :func:`sampling.noise_phase`."""
    block = mixed(history // NOISE_QUERIES)
    return (block % (NOISE_TOKENS // NOISE_STEP) * NOISE_STEP).to(tl.int32)


@triton.jit
def stratum_offset(number, room):
    """Return the offset of a stratum's token: a hash of the stratum's number, below ``room``."""
    return ((mixed(number) >> 4) % room.to(tl.uint32)).to(tl.int32)
