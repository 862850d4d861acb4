"""Arithmetic on fp16 numbers, two to a register, that the compiler does not find by itself."""

import triton
import triton.language as tl


@triton.jit
def halves(s):
    """Split the columns of [N, M] into the first half and the second."""
    s = tl.reshape(s, [s.shape[0], 2, s.shape[1] // 2])
    return tl.split(tl.permute(s, [0, 2, 1]))


@triton.jit
def largest(a, b, c, PACKED: tl.constexpr):
    """Return the largest of three, element by element; two to a register if PACKED."""
    if PACKED:
        # Hopper has one instruction for this; the compiler by itself emits two.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 most;
            max.f16x2 most, $1, $2;
            max.f16x2 $0, most, $3;
            }""",
            "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.maximum(tl.maximum(a, b), c)


@triton.jit
def folded(s, FOLDS: tl.constexpr, PACKED: tl.constexpr):
    """Fold the columns of [N, M], M = 2^(FOLDS + 4), to eight by maxima: j, j + 8, j + 16, …."""
    most, half = halves(s)
    for _ in tl.static_range(FOLDS):
        first, second = halves(most)
        third, half = halves(half)
        most = largest(first, second, third, PACKED)
    return largest(most, half, half, PACKED)
