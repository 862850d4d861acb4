"""Tile shapes: a small fixed table, so that nothing is tuned in front of a user.

Chosen by architecture (shared memory per block) and head_dim. `tests/kernels/test_compile.py`
compiles every row for its architecture and checks that it fits. Only Hopper's rows keep
(nearly) everything in registers; the others compile and fit, and are not tuned.
"""

from typing import NamedTuple

import torch


class AttendTile(NamedTuple):
    """Rows (queries x GQA group) and keys of one attend step, and how it is launched.

    ``registers`` are the most that a thread may have, None for as many as there are.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None


# Largest shared memory a block may have, in bytes, by compute capability.
SHARED_MEMORY = {
    80: 166_912,
    86: 101_376,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    120: 101_376,
}

# With 128 registers two programs share a multiprocessor, and one's products run beside the other's
# exponentials: at 128K 15 % faster than one program of 64 keys a step. Such figures here are by
# hand, see `benchmarks/quality/LOG.md`.
#
# Of head_dim 512 the sums of 64 rows are half of a thread's registers: what is kept elsewhere is so
# outside of the loop over a list.
HOPPER = {
    64: AttendTile(128, 128, 8, 3),
    96: AttendTile(128, 64, 8, 4),
    128: AttendTile(128, 32, 8, 3, 128),
    256: AttendTile(128, 32, 8, 3),
    512: AttendTile(64, 16, 8, 3),
}
BLACKWELL = {
    64: AttendTile(128, 64, 8, 3),
    96: AttendTile(128, 64, 8, 3),
    128: AttendTile(128, 64, 8, 3),
    256: AttendTile(128, 32, 8, 2),
    512: AttendTile(64, 16, 8, 2),
}
# For dense segments that fill them and see WIDE_VISITS tokens or more: each tile of keys serves
# twice the rows, but nothing overlaps with the start and the end of a program. Weights of listed
# tokens do not fit its registers (128K, budget 10 %: 41.5 ms for 34.9).
WIDE = {90: {128: AttendTile(256, 64, 16, 3)}}
WIDE_VISITS = 3072
# For queries and keys that are multiplied in e4m3: half the bytes are gathered (5 % faster than
# the wide ones at 128K).
E4M3 = {90: {128: AttendTile(128, 64, 8, 3, 128)}}
# Ampere, Ada and consumer Blackwell keep the pointers of a gathered tile in registers. Keys of
# head_dim 512 and a basis do not fit the shared memory of most of them.
OTHERS = {
    64: AttendTile(128, 64, 8, 3),
    96: AttendTile(128, 64, 8, 2),
    128: AttendTile(128, 64, 8, 2),
    256: AttendTile(32, 16, 4, 2),
}
# For the heads of one query alone, on any architecture: few rows leave registers to loads.
DECODE_TILES = {
    64: AttendTile(16, 64, 4, 3),
    96: AttendTile(16, 64, 4, 3),
    128: AttendTile(16, 64, 4, 3),
    256: AttendTile(16, 32, 8, 2),
    512: AttendTile(16, 16, 8, 2),
}
BY_CAPABILITY = {
    80: OTHERS,
    86: OTHERS,
    89: OTHERS,
    90: HOPPER,
    100: BLACKWELL,
    120: OTHERS,
}
HEAD_DIMS = tuple(HOPPER)
# Numbers of the keys that a ranking kernel takes at a time, at most: 64 keys of head_dim 256.
KEYS_ENTRIES = 16_384


def input_precision(dtype: torch.dtype) -> str:
    """Return what `tl.dot` may round operands to; it only matters for float32 (the interpreter)."""
    return "ieee" if dtype == torch.float32 else "tf32"


def projection_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of projected keys and queries: e4m3 where the matrix unit takes it."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return torch.float8_e4m3fn
    return torch.float16


def fp8_products(device: torch.device) -> bool:
    """Tell whether the kernels multiply matrices of e4m3 on a device: in the interpreter no."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def known_capability(device: torch.device) -> int:
    """Return a device's compute capability, or else the nearest older one of the tables."""
    major, minor = torch.cuda.get_device_capability(device)
    known = [capability for capability in BY_CAPABILITY if capability <= major * 10 + minor]
    return max(known, default=80)


def head_dims(device: torch.device) -> tuple[int, ...]:
    """Return the head_dims that have kernels on a device; a CPU has all."""
    return tuple(BY_CAPABILITY[known_capability(device)]) if device.type == "cuda" else HEAD_DIMS


def decode_tile(head_dim: int, device: torch.device, group: int) -> AttendTile:
    """Return the tile shape for single queries, whose rows are the heads of a group.

    On the CPU as :func:`attend_tile`.
    """
    tile = DECODE_TILES[head_dim] if device.type == "cuda" else AttendTile(16, 16, 4, 1)
    return tile._replace(block_m=max(16, 1 << (group - 1).bit_length()))


def attend_tile(
    head_dim: int,
    device: torch.device,
    rows: int = 0,
    e4m3: bool = False,
    visits: int = 0,
) -> AttendTile:
    """Return the tile shape for a head_dim on a device.

    An architecture that is not in the table takes the row of the nearest older one. On the
    CPU (Triton's interpreter) tiles are as small as the kernels allow.

    Args:
        head_dim: size of a head.
        device: where the kernel runs.
        rows: of a whole segment: queries x heads of a group.
        e4m3: whether queries and keys are multiplied in e4m3.
        visits: tokens that a dense segment sees.

    Raises:
        ValueError: if no kernel exists for ``head_dim``.
    """
    if head_dim not in head_dims(device):
        raise ValueError(f"head_dim is {head_dim}, must be one of {head_dims(device)}")
    if device.type != "cuda":
        return AttendTile(16, 16, 4, 1)
    capability = known_capability(device)
    if e4m3 and head_dim in E4M3.get(capability, {}):
        return E4M3[capability][head_dim]
    wide = WIDE.get(capability, {}).get(head_dim)
    if wide is not None and rows % wide.block_m == 0 and rows > 0 and visits >= WIDE_VISITS:
        return wide
    return BY_CAPABILITY[capability][head_dim]
