"""Steps of the attend kernel: gather a tile of tokens, score it, fold it into the softmax.

Scores are base-2 once they are scaled. ``m``, ``mass`` and ``acc`` are the state of the online
softmax: its running maximum, the sum of exp2(score - m), and that of exp2(score - m) times value.
"""

import triton
import triton.language as tl

# Largest score over a frozen maximum, in base 2; higher ones count as this. fp32 holds 127, and
# values and sums come on top.
HIGHEST = tl.constexpr(80.0)


@triton.jit
def online_softmax(s, v, m, mass, acc, scale, PRECISION: tl.constexpr):
    """P = exp2(scale s - m'); mass' = mass a + sum p; acc' = acc a + p v, with a = exp2(m - m').

    Scores s [M, N], values v [N, D]; m' is the larger of m and the row's largest scaled score.
    """
    # Scaling after the maximum leaves one multiply-add per score. scale is positive. m_new is
    # finite: the first tile of all holds a token that every row sees.
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    mass = mass * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, mass, acc


@triton.jit
def soft_cap(s, cap):
    """Return cap tanh(s / cap), both in base 2."""
    x = s / cap
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2|x|)
    return cap * tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)


@triton.jit
def load_rows(p, o_row, m_row, o_d, MASKED: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Gather rows [N, D_PAD] that start at o_row; masked only where something can be outside."""
    if MASKED:
        return tl.load(p + o_row[:, None] + o_d[None, :], m_row[:, None] & (o_d < D)[None, :], 0.0)
    if D == D_PAD:
        return tl.load(p + o_row[:, None] + o_d[None, :])
    return tl.load(p + o_row[:, None] + o_d[None, :], (o_d < D)[None, :], 0.0)


@triton.jit
def slot_offset(slot, stride_block, stride_token, PAGE: tl.constexpr):
    """Return the offsets of slots, in elements."""
    if PAGE == 0:  # blocks follow one another without a gap
        return slot.to(tl.int64) * stride_token
    slot = slot.to(tl.uint32)  # division by shifting
    return (slot // PAGE).to(tl.int64) * stride_block + (slot % PAGE).to(tl.int64) * stride_token


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Return cached keys or values in the queries' dtype, exactly."""
    if x.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        # The compiler goes by way of fp16, on the unit that computes exponentials. Here an exponent
        # of four bits is put in the place of one of eight, where it is 120 too small.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, x, y, factor, zero;
            mov.b32 factor, 0x7b807b80;
            mov.b32 zero, 0x80008000;
            prmt.b32 low, $2, 0, 0x1404;
            prmt.b32 high, $2, 0, 0x3424;
            shr.u32 x, low, 4;
            shr.u32 y, high, 4;
            and.b32 x, x, 0x07f007f0;
            and.b32 y, y, 0x07f007f0;
            lop3.b32 x, low, 0x80008000, x, 0xea;
            lop3.b32 y, high, 0x80008000, y, 0xea;
            fma.rn.bf16x2 $0, x, factor, zero;
            fma.rn.bf16x2 $1, y, factor, zero;
            }""",
            "=r,=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    return x.to(dtype)


@triton.jit
def scores(q, q_k, k, PRECISION: tl.constexpr):
    """S = q k', of e4m3 operands where queries come in e4m3."""
    if q_k.dtype == k.dtype and q_k.dtype != q.dtype:
        # The tensor core sums all of a head: in parts, each would be a sum on other units.
        return tl.dot(q_k, tl.trans(k), max_num_imprecise_acc=k.shape[1])
    return tl.dot(q, tl.trans(cast(k, q.dtype)), input_precision=PRECISION)


@triton.jit
def gather_attend(
    q, q_k, p_k, p_v, slot, m, mass, acc, o_d, scale, softcap, stride_block, stride_token,
    PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, FROZEN: tl.constexpr,
):  # fmt: skip
    """Fold the tokens of a whole tile of slots into the softmax.

    With FROZEN the running maximum m stays as it is. Nothing is rescaled then, so that the product
    of probabilities and values of one tile overlaps with the scores of the next.
    """
    o_kv = slot_offset(slot, stride_block, stride_token, PAGE)
    k = load_rows(p_k, o_kv, None, o_d, False, D, D_PAD)
    v = cast(load_rows(p_v, o_kv, None, o_d, False, D, D_PAD), q.dtype)
    s = scores(q, q_k, k, PRECISION)
    if SOFTCAP:
        s = soft_cap(s * scale, softcap)
        scale = 1.0
    if FROZEN:
        p = tl.exp2(tl.minimum(s * scale - m[:, None], HIGHEST))
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        return m, mass + tl.sum(p, 1), acc
    return online_softmax(s, v, m, mass, acc, scale, PRECISION)
