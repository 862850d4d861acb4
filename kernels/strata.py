"""The kernels' part of :mod:`sampling`."""

import triton
import triton.language as tl

from . import sampling

FACTOR = tl.constexpr(sampling.FACTOR)


@triton.jit
def stratum_offset(number, room):
    """Return the offset of a stratum's token: a hash of the stratum's number, below ``room``."""
    h = number.to(tl.uint32) * FACTOR
    h ^= h >> 15
    h *= FACTOR
    h ^= h >> 13
    return ((h >> 4) % room.to(tl.uint32)).to(tl.int32)
