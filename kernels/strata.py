"""The kernels' part of :mod:`sampling`."""

import triton
import triton.language as tl

from . import sampling

FACTOR = tl.constexpr(sampling.FACTOR)


@triton.jit
def mixed(number):
    """Return a hash of 32 bits of each integer."""
    h = number.to(tl.uint32) * FACTOR
    h ^= h >> 15
    h *= FACTOR
    return h ^ (h >> 13)


@triton.jit
def stratum_offset(number, room):
    """Return the offset of a stratum's token: a hash of the stratum's number, below ``room``."""
    return ((mixed(number) >> 4) % room.to(tl.uint32)).to(tl.int32)
