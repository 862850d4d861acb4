"""Fit bases on the device: moments of samples, then subspace iteration.

:func:`basis.fit_span` is the reference. Torch needs some sixty launches for it, which take
longer on the host than the whole attention of a layer takes on the device; here there are two.
Where the reference uses float64, this uses float32 and makes the directions orthogonal before
their moments are taken and factored: the same basis, up to rounding. Each product is the sum of
three TF32 products, which round by some 2^-21: less than the sampling error of the moments.
"""

import torch
import triton
import triton.language as tl

from ..tiles import KEYS_ENTRIES, input_precision
from ..work_list import Span
from . import basis

STRIP_ENTRIES = 8192  # of a moment that a program computes: all programs run at once
RIDGE = 1e-6  # of the queries' mean moment
# Columns that the others are made orthogonal to between two steps; columns; 1 to the rank. What
# remains of the others then differs so little in length that one more step in float32 keeps it.
ORTHOGONAL = 12


@triton.jit
def _even(number, count, samples):
    """Return the indices among ``count`` tokens of evenly spaced samples: 32 bits, up to 2M."""
    return (number.to(tl.uint32) * count.to(tl.uint32) // samples.to(tl.uint32)).to(tl.int32)


@triton.jit
def _moment(
    p_q, p_kv, p_table, p_moments, p_means, row, first_query, count, samples,
    stride_q_token, stride_q_head, stride_block, stride_head, stride_token, stride_table,
    OF_KEYS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, PAGE: tl.constexpr, STRIP: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """STRIP columns of the keys' covariance, or of the queries' second moment."""
    i_strip, i_head = tl.program_id(0), tl.program_id(1)
    p_table += row.to(tl.int64) * stride_table
    o_d = tl.arange(0, D_PAD)
    o_s = i_strip * STRIP + tl.arange(0, STRIP)
    n = samples if OF_KEYS else samples * GROUP
    dtype: tl.constexpr = p_q.dtype.element_ty  # differences of fp8 keys are no fp8 numbers
    moment = tl.zeros([D_PAD, STRIP], tl.float32)
    sums = tl.zeros([BLOCK, D_PAD], tl.float32)
    sums_s = tl.zeros([BLOCK, STRIP], tl.float32)
    first = tl.zeros([D_PAD], tl.float32)
    first_s = tl.zeros([STRIP], tl.float32)
    p_kv += (i_head // SHARE).to(tl.int64) * stride_head
    if OF_KEYS:
        # Keys are taken about the first one: their mean may be far larger than their deviation.
        o_first = tl.load(p_table).to(tl.int64) * stride_block
        first = tl.load(p_kv + o_first + o_d, o_d < D, 0.0).to(tl.float32)
        first_s = tl.load(p_kv + o_first + o_s, o_s < D, 0.0).to(tl.float32)
    # Queries would go from asynchronous copies straight into wgmma, and Triton 3.6 sets no fence
    # between the two: one stage loads them through registers. Keys go that way in any case.
    for o in tl.range(0, n, BLOCK, num_stages=3 if OF_KEYS else 1):
        o_n = o + tl.arange(0, BLOCK)
        m_n = o_n < n
        if OF_KEYS:
            position = _even(o_n, count, samples)
            page = tl.load(p_table + position // PAGE, m_n, 0).to(tl.int64)
            p_row = p_kv + page * stride_block + (position % PAGE) * stride_token
        else:
            position = first_query + _even(o_n // GROUP, count, samples)
            o_row = position.to(tl.int64) * stride_q_token
            p_row = p_q + o_row + (i_head * GROUP + o_n % GROUP) * stride_q_head
        x = tl.load(p_row[:, None] + o_d[None, :], m_n[:, None] & (o_d < D)[None, :], 0.0)
        s = tl.load(p_row[:, None] + o_s[None, :], m_n[:, None] & (o_s < D)[None, :], 0.0)
        if OF_KEYS:
            x = tl.where(m_n[:, None], x.to(tl.float32) - first[None, :], 0.0).to(dtype)
            s = tl.where(m_n[:, None], s.to(tl.float32) - first_s[None, :], 0.0).to(dtype)
            sums += x.to(tl.float32)
            sums_s += s.to(tl.float32)
        moment = tl.dot(tl.trans(x), s, moment, input_precision=PRECISION)
    moment /= n
    if OF_KEYS:
        total, total_s = tl.sum(sums, 0) / n, tl.sum(sums_s, 0) / n
        moment -= total[:, None] * total_s[None, :]
        tl.store(p_means + i_head * D_PAD + o_s, total_s + first_s)
    of_keys: tl.constexpr = 1 if OF_KEYS else 0
    o_moment = ((2 * i_head + of_keys) * D_PAD + o_d[:, None]) * D_PAD + o_s[None, :]
    tl.store(p_moments + o_moment, moment)


@triton.jit(do_not_specialize=["row", "first_query", "queries", "tokens", "samples_q", "samples_k"])
def _moment_kernel(
    p_q, p_kv, p_table, p_moments, p_means, row, first_query, queries, tokens, samples_q, samples_k,
    stride_q_token, stride_q_head, stride_block, stride_head, stride_token, stride_table,
    GROUP: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE: tl.constexpr, STRIP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """moment[2, D, STRIP]: E[q q'] of the queries, Cov(k, k) of the keys, of one basis.

    One launch computes both: each alone waits for memory.
    """
    if tl.program_id(2) == 0:
        _moment(
            p_q, p_kv, p_table, p_moments, p_means, row, first_query, tokens, samples_k,
            stride_q_token, stride_q_head, stride_block, stride_head, stride_token, stride_table,
            True, GROUP, SHARE, D, D_PAD, PAGE, STRIP, BLOCK, PRECISION,
        )  # fmt: skip
    else:
        _moment(
            p_q, p_kv, p_table, p_moments, p_means, row, first_query, queries, samples_q,
            stride_q_token, stride_q_head, stride_block, stride_head, stride_token, stride_table,
            False, GROUP, SHARE, D, D_PAD, PAGE, STRIP, 2 * BLOCK, PRECISION,
        )  # fmt: skip


@triton.jit
def _product(p_matrix, p_y, y, o_d, o_r, D_PAD: tl.constexpr, WIDTH: tl.constexpr):
    """Return matrix @ y for a symmetric matrix [D_PAD, D_PAD]; y [D_PAD, WIDTH] goes by memory."""
    BLOCK: tl.constexpr = 32
    tl.debug_barrier()
    tl.store(p_y + o_d[:, None] * WIDTH + o_r[None, :], y)
    tl.debug_barrier()
    out = tl.zeros([D_PAD, WIDTH], tl.float32)
    for o in range(0, D_PAD, BLOCK):
        o_k = o + tl.arange(0, BLOCK)
        m = tl.load(p_matrix + o_d[:, None] * D_PAD + o_k[None, :])
        part = tl.load(p_y + o_k[:, None] * WIDTH + o_r[None, :])
        out = tl.dot(m, part, out, input_precision="tf32x3")
    return out


@triton.jit
def _gram(p_y, z, o_d, o_r, D_PAD: tl.constexpr, WIDTH: tl.constexpr):
    """Return y'z, where memory holds y already, in the layout of memory.

    There threads have some of a row; what the matrix unit leaves is spread over few warps.
    """
    BLOCK: tl.constexpr = 32
    p_z = p_y + D_PAD * WIDTH
    tl.store(p_z + o_d[:, None] * WIDTH + o_r[None, :], z)
    tl.debug_barrier()
    out = tl.zeros([WIDTH, WIDTH], tl.float32)
    for o in range(0, D_PAD, BLOCK):
        o_k = o + tl.arange(0, BLOCK)
        part_y = tl.load(p_y + o_k[:, None] * WIDTH + o_r[None, :])
        part_z = tl.load(p_z + o_k[:, None] * WIDTH + o_r[None, :])
        out = tl.dot(tl.trans(part_y), part_z, out, input_precision="tf32x3")
    o_out = o_r[:, None] * WIDTH + o_r[None, :]
    tl.debug_barrier()
    tl.store(p_y + o_out, out)
    tl.debug_barrier()
    return tl.load(p_y + o_out)


@triton.jit
def _orthogonalise(y, o_r, columns):
    """Make y's columns orthogonal to its first ``columns`` ones, of unit length: Gram–Schmidt.

    Products turn all columns towards the same directions, until rounding hides the others.
    """
    y *= tl.rsqrt(tl.maximum(tl.sum(y * y, 0), 1e-30))[None, :]
    for j in range(columns):
        at = (o_r == j)[None, :]
        v = tl.sum(tl.where(at, y, 0.0), 1)
        along = tl.sum(v[:, None] * y, 0)
        factor = tl.rsqrt(tl.maximum(tl.sum(tl.where(o_r == j, along, 0.0)), 1e-30))
        v *= factor
        along = tl.where(o_r > j, along * factor, 0.0)
        y = tl.where(at, v[:, None], y - v[:, None] * along[None, :])
    return y


@triton.jit
def _inverse_factor(gram, o_r, least, RANK: tl.constexpr):
    """Return the inverse of the lower Cholesky factor of a Gram matrix, in its place.

    Few queries leave directions without moment, where rounding would be blown up to one: a
    row whose remainder is less than ``least`` ends as zeros.
    """
    o_i = o_r[:, None]
    o_j = o_r[None, :]
    for j in range(RANK):
        row = tl.sum(tl.where(o_i == j, gram, 0.0), 0)
        column = tl.sum(tl.where(o_j == j, gram, 0.0), 1)
        square = tl.sum(tl.where(o_r == j, row, 0.0))
        factor = tl.where(square > least, tl.rsqrt(tl.maximum(square, least)), 0.0)
        row = tl.where(o_r == j, 1.0, row) * factor
        column = tl.where(o_r > j, column * factor, 0.0)
        # Rows after j are still to be factored, those up to j belong to the inverse.
        remainder = tl.where(o_j == j, 0.0, gram) - column[:, None] * row[None, :]
        gram = tl.where(o_i == j, row[None, :], remainder)
    return tl.where((o_j <= o_i) & (o_i < RANK), gram, 0.0)


@triton.jit
def _basis_kernel(
    p_moments, p_means, p_start, p_y, p_a, p_b, p_offset, unit,
    D: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
    STEPS: tl.constexpr, ORTHOGONAL: tl.constexpr, RIDGE: tl.constexpr,
    FACTOR_0: tl.constexpr, FACTOR_1: tl.constexpr, FACTOR_2: tl.constexpr,
):  # fmt: skip
    """A, B, offset of one basis, padded to WIDTH columns; see :func:`basis.fit`.

    y <- Ck Cq y, STEPS times from random directions; y' Cq y = L L'; A = y L'^-1; B = Cq A unit;
    offset = (mean key)' B, then -FACTOR_0, -FACTOR_1, -FACTOR_2.
    """
    i_basis = tl.program_id(0)
    o_d = tl.arange(0, D_PAD)
    o_r = tl.arange(0, WIDTH)
    p_cq = p_moments + 2 * i_basis * D_PAD * D_PAD
    p_ck = p_cq + D_PAD * D_PAD
    p_y += i_basis * 2 * D_PAD * WIDTH
    ridge = RIDGE * tl.sum(tl.load(p_cq + o_d * (D_PAD + 1)), 0) / D
    y = tl.load(p_start + o_d[:, None] * WIDTH + o_r[None, :])
    for step in range(STEPS):
        z = _product(p_cq, p_y, y, o_d, o_r, D_PAD, WIDTH)
        y = _product(p_ck, p_y, z, o_d, o_r, D_PAD, WIDTH)
        y = _orthogonalise(y, o_r, tl.where(step == STEPS - 1, RANK, ORTHOGONAL))
    z = _product(p_cq, p_y, y, o_d, o_r, D_PAD, WIDTH)
    # Columns of y have length 1: a moment's ridge is theirs.
    gram = _gram(p_y, z, o_d, o_r, D_PAD, WIDTH)
    factor = tl.trans(_inverse_factor(gram, o_r, ridge + 1e-30, RANK))
    y = tl.dot(y, factor, input_precision="tf32x3")
    z = tl.dot(z, factor, input_precision="tf32x3")
    mean = tl.load(p_means + i_basis * D_PAD + o_d)
    offset = tl.sum(mean[:, None] * z, 0) * unit
    offset = tl.where(o_r == RANK, -FACTOR_0, offset)
    offset = tl.where(o_r == RANK + 1, -FACTOR_1, offset)
    offset = tl.where(o_r == RANK + 2, -FACTOR_2, offset)
    o_out = (i_basis * D + o_d[:, None]) * WIDTH + o_r[None, :]
    dtype: tl.constexpr = p_a.dtype.element_ty
    tl.store(p_a + o_out, y.to(dtype), (o_d < D)[:, None])
    tl.store(p_b + o_out, (z * unit).to(dtype), (o_d < D)[:, None])
    tl.store(p_offset + i_basis * WIDTH + o_r, offset)


class BasisWorkspace:
    """Moments of sampled queries and keys, and the bases that follow, ``width`` columns each.

    Args:
        bases: heads, for a basis of each, or KV heads, for one that a group shares.
        head_dim: size of a head.
        dtype: of queries.
        device: of the kernels.
        width: see :class:`basis.Precision`.

    Attributes:
        moments: float32 ``[bases, 2, D, D]``, of queries and of keys; D is head_dim, padded.
        means: float32 ``[bases, D]``, mean keys in units of the cache.
        y: float32 ``[bases, 2, D, width]``, scratch of products.
        start: float32 ``[D, width]``, random directions.
        a: projection of queries, ``dtype``, ``[bases, head_dim, width]``.
        b: projection of keys, ``dtype``, ``[bases, head_dim, width]``.
        offset: the projected mean key, float32 ``[bases, width]``.
    """

    def __init__(
        self, bases: int, head_dim: int, dtype: torch.dtype, device: torch.device,
        width: int = basis.WIDTH,
    ):  # fmt: skip
        pad, self.rank = triton.next_power_of_2(head_dim), basis.Precision(width).rank

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(bases, *shape, dtype=dtype, device=device)

        self.moments = empty(2, pad, pad)
        self.means = empty(pad)
        self.y = empty(2, pad, width)
        extra = (0, width - self.rank, 0, pad - head_dim)
        start = torch.nn.functional.pad(basis.random_directions(head_dim, self.rank), extra)
        self.start = start.float().to(device)
        self.a = empty(head_dim, width, dtype=dtype)
        self.b = empty(head_dim, width, dtype=dtype)
        self.offset = empty(width)


def take_moments(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    row: int,
    span: Span,
    space: BasisWorkspace,
) -> None:
    """Take the moments of queries and the keys they see; see :func:`basis.fit_span`.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        row: of the block table.
        span: the queries, and the tokens that they see.
        space: ``moments`` and ``means`` are written.
    """
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    bases, pad = space.a.shape[0], triton.next_power_of_2(head_dim)
    group = query.shape[1] // bases
    strip = min(pad, STRIP_ENTRIES // pad)
    _moment_kernel[(pad // strip, bases, 2)](
        query, kv_cache, block_table, space.moments, space.means,
        row, *span, *basis.samples(span, group), query.stride(0), query.stride(1),
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0),
        GROUP=group, SHARE=bases // kv_heads, D=head_dim, D_PAD=pad, PAGE=page, STRIP=strip,
        BLOCK=min(64, KEYS_ENTRIES // pad), PRECISION=input_precision(query.dtype), num_warps=8,
    )  # fmt: skip


def find_bases(space: BasisWorkspace, *, scale: float) -> None:
    """Compute bases from the moments in ``space``; see :func:`basis.fit_span`.

    Args:
        space: ``moments`` and ``means`` are read; ``a``, ``b`` and ``offset`` are written.
        scale: softmax scale, times what one unit of the cache's keys stands for.
    """
    bases, head_dim, width = space.a.shape
    pad = triton.next_power_of_2(head_dim)
    _basis_kernel[(bases,)](
        space.moments, space.means, space.start, space.y, space.a, space.b, space.offset,
        scale * basis.LOG2E,
        D=head_dim, D_PAD=pad, WIDTH=width, RANK=space.rank,
        STEPS=basis.STEPS, ORTHOGONAL=ORTHOGONAL, RIDGE=RIDGE,
        FACTOR_0=basis.LSE_FACTORS[0], FACTOR_1=basis.LSE_FACTORS[1],
        FACTOR_2=basis.LSE_FACTORS[2], num_warps=width // 8 * max(1, pad // 256),
    )  # fmt: skip
