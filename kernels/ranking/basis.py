"""The few directions of a request's keys that decide its scores (ours).

Scoring every query against every key in full would cost half of dense attention. A low-rank
approximation of q·k is enough: with Cq the second moment of the queries and Ck the covariance of
the keys, the best one is spanned by the leading eigenvectors of Ck·Cq. A basis is fitted anew for
every chunk of queries against the history they see, so the KV cache alone is stored: prefix-cache
hits, preemption and block reuse need no care. Prefill has a basis of each query head: heads of a
group that share one lose what single queries look for.

Two things keep fitting cheap: two steps of subspace iteration from random directions are about as
good as the eigenvectors (`benchmarks/quality/LOG.md`), and moments are taken from a sample.

Scores become log2-probabilities when the row log-sum-exp is taken from them. It is estimated from
projected keys: a sample of the history, and all of the segment's own.
"""

from typing import NamedTuple

import torch

from ..layout import LOG2E as LOG2E
from ..sampling import stratified
from ..tiles import projection_dtype as projection_dtype
from ..tuning import PROBE_STEP
from ..work_list import Span

WIDTH = 32  # numbers of a projected key or query: one step of the matrix unit in fp8
# A projected query ends with its row log-sum-exp, negated, in three parts that these factors at the
# end of a projected key put together: the product is a log2-probability.
LSE_FACTORS = (16.0, 1.0, 1.0 / 16)
RANK = WIDTH - len(LSE_FACTORS)
# The exponentials of a row log-sum-exp are approximate, see :func:`approximate_exp2`.
EXP2_OFFSET = 90.0  # from 36 binary orders below the largest own score they reach to 217 above it
EXP2_UNIT = 2.0**EXP2_OFFSET / 1.04073  # (1 + f) / 2^f is 1.04073 in the mean of 0 <= f < 1
EXP2_LARGEST = 254.0  # the largest exponent of a float32, biased
SAMPLES = 1024  # keys, and queries x group, that the moments are taken from, at most
LSE_STEP = 16  # one key of the history in this many counts for the row log-sum-exp
LSE_SAMPLES = 2048  # that count, at most; keys
STEPS = 2  # of subspace iteration
RIDGE = 1e-12  # in float64, added to a matrix before Cholesky, relative to its mean diagonal


class Precision(NamedTuple):
    """How closely a ranking estimates scores.

    Attributes:
        width: numbers of a projected key or query, a multiple of 32.
        probe_step: one query row in this many is a probe, see :func:`farthest_rows`.
    """

    width: int = WIDTH
    probe_step: int = PROBE_STEP

    @property
    def rank(self) -> int:
        """Directions; the other numbers hold a row's log-sum-exp."""
        return self.width - len(LSE_FACTORS)


SERVED = Precision()
# Of retrieval heads, see :mod:`retrieval`: every query, and twice the directions.
RETRIEVAL = Precision(64, 1)


class Basis(NamedTuple):
    """Rank-r approximation of scaled q·k in base-2 units, up to a constant: (q A)·(k B − offset).

    Attributes:
        a: projection of queries, float32 ``[..., head_dim, r]``; projected they have unit moments.
        b: projection of keys, float32 ``[..., head_dim, r]``.
        offset: the projected mean key, float32 ``[..., r]``.
    """

    a: torch.Tensor
    b: torch.Tensor
    offset: torch.Tensor


def fit(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    rank: int = RANK,
    steps: int = STEPS,
) -> Basis:
    """Fit bases to samples.

    Args:
        queries: ``[n, samples, head_dim]``, the heads of a group one after the other.
        keys: ``[n, samples, head_dim]``.
        scale: softmax scale.
        rank: r, at most head_dim.
        steps: steps of subspace iteration.

    Returns:
        A basis whose leading dimension is ``n``.
    """
    mean = keys.double().mean(1, keepdim=True)
    cq, ck = _moment(queries), _moment(keys.double() - mean)
    y = random_directions(queries.shape[2], rank).to(cq.device).expand(cq.shape[0], -1, -1)
    for _ in range(steps):
        y = ck @ (cq @ y)
        y = y / y.norm(dim=1, keepdim=True).clamp(min=1e-30)
    # The best linear guess of q from q y is Cq y (y'Cq y)^-1 (y'q): put into q·k it gives
    # the projection of keys. With y'Cq y = LL', A = y L'^-1 and B = Cq A.
    gram = y.mT @ (cq @ y)
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    eye = torch.eye(rank, dtype=gram.dtype, device=gram.device)
    # NaN samples give a NaN basis: an error would end the other requests of the batch, too.
    factor, _ = torch.linalg.cholesky_ex(gram + ridge * eye + 1e-30 * eye)
    a = torch.linalg.solve_triangular(factor, y.mT, upper=False).mT
    b = cq @ a
    unit = scale * LOG2E
    parts = (a, b * unit, (mean.mT * b).sum(1) * unit)
    return Basis(*(part.float() for part in parts))


def random_directions(head_dim: int, rank: int) -> torch.Tensor:
    """Return random directions, the same in every call: float64 ``[head_dim, rank]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(
        head_dim, rank, generator=generator, dtype=torch.float64, device=generator.device
    )


def _moment(x: torch.Tensor) -> torch.Tensor:
    """Second moment of ``[n, samples, head_dim]`` in float64."""
    x = x.double()
    return x.mT @ x / x.shape[1]


def samples(span: Span, group: int) -> tuple[int, int]:
    """Return how many queries (each with its group's heads) and keys a basis is fitted to."""
    return min(span.queries, max(1, SAMPLES // group)), min(span.tokens, SAMPLES)


def fit_span(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    row: int,
    span: Span,
    bases: int,
    scale: float,
    rank: int = RANK,
) -> Basis:
    """Fit bases to evenly spaced queries and keys of a request.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        row: of the block table.
        span: which queries, and the tokens that they see.
        bases: how many: query heads, or KV heads for one that a group shares.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        rank: directions.

    Returns:
        A basis whose leading dimension is ``bases``.
    """
    group = query.shape[1] // bases
    of_queries, _ = samples(span, group)
    step = torch.arange(of_queries, device=query.device) * span.queries // of_queries
    queries = query[span.first + step].unflatten(1, (bases, group)).transpose(0, 1).flatten(1, 2)
    keys = sampled_keys(kv_cache, block_table, row, span, bases)
    return fit(queries, keys, scale, rank)


def sampled_keys(
    kv_cache: torch.Tensor, block_table: torch.Tensor, row: int, span: Span, bases: int
) -> torch.Tensor:
    """Return the keys that bases are fitted to: ``[bases, samples, head_dim]``, of the cache."""
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], kv_cache.shape[3] // 2
    _, of_keys = samples(span, 1)
    positions = torch.arange(of_keys, device=kv_cache.device) * span.tokens // of_keys
    head = torch.arange(bases, device=kv_cache.device)[:, None] * kv_heads // bases
    blocks = block_table[row][positions // page].long()
    return kv_cache[..., :head_dim][blocks, head, positions % page]


def farthest_rows(rows: torch.Tensor, probe_step: int = PROBE_STEP) -> torch.Tensor:
    """Return which rows of a segment are its probes: one in ``probe_step``.

    They are farthest from the mean of the projected rows, which have unit moments: the queries
    that are least like the others. Keys that many rows want, the nearest of the probes want, too.

    Args:
        rows: all rows of the segment, projected, ``[bases, n, r]``.
        probe_step: see :class:`Precision`.

    Returns:
        int64 ``[bases, ceil(n / probe_step)]``, ascending.
    """
    distance = (rows.float() - rows.float().mean(-2, keepdim=True)).square().sum(-1)
    order = distance.argsort(dim=-1, descending=True, stable=True)
    return order[..., : -(-distance.shape[-1] // probe_step)].sort(-1).values


def project_queries(
    queries: torch.Tensor,
    basis: Basis,
    history: torch.Tensor,
    own: torch.Tensor,
    visible: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return projected queries that end with their row log-sum-exp, negated.

    Args:
        queries: ``[..., n, head_dim]``; leading dimensions are those of the basis.
        basis: the directions.
        history: projected keys of the history, as :func:`project_keys` returns them.
        own: projected keys of the segment itself.
        visible: which own keys a query sees, bool ``[..., n, own]``.
        dtype: that projections are rounded to.

    Returns:
        float32 ``[..., n, r + 3]``.
    """
    projected = _rounded(queries.float() @ basis.a, dtype)
    rank, count = projected.shape[-1], history.shape[-2]
    step = max(LSE_STEP, -(-count // LSE_SAMPLES))
    samples = max(1, count // step)
    positions = stratified(max(count, step), step).clamp(max=count - 1)
    sample = history[..., positions.to(history.device), :rank]
    own_scores = (projected @ own[..., :rank].mT).masked_fill(~visible, float("-inf"))
    most = own_scores.amax(-1, keepdim=True)
    history_mass = approximate_exp2(projected @ sample.mT, most).sum(-1)
    history_mass = history_mass * EXP2_UNIT * (count / samples)
    left = most[..., 0] + ((own_scores - most).exp2().sum(-1) + history_mass).log2()
    parts = []
    for factor in LSE_FACTORS:
        part = _rounded(left / factor, dtype)
        left = left - part * factor
        parts.append(-part)
    return torch.cat([projected, torch.stack(parts, -1)], -1)


def exact_scores(
    queries: torch.Tensor, projected: torch.Tensor, centred: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return exact products in base-2 units, less the row log-sum-exps that projections hold.

    Args:
        queries: float32 ``[..., n, head_dim]``.
        projected: these queries, as :func:`project_queries` returns them.
        centred: keys less their mean, float32 ``[..., tokens, head_dim]``.
        scale: softmax scale, times what one unit of the keys stands for.

    Returns:
        float32 ``[..., n, tokens]``.
    """
    factors = torch.tensor(LSE_FACTORS, device=projected.device)
    minus_lse = (projected[..., -len(LSE_FACTORS) :] * factors).sum(-1, keepdim=True)
    return ((queries * (scale * LOG2E)) @ centred.mT).add_(minus_lse)


def approximate_exp2(scores: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Return 2^(scores − most − EXP2_OFFSET), linear between powers of two: by an integer shift.

    The mantissa of 1 + e / 256 is e as a number of 8 bits and a fraction: shifted by 8, e is the
    exponent and the fraction the mantissa of the result. Up to 6 % too much, 4 % in the mean. Less
    than 2^−127 counts as nothing; more than 2^127 counts as that and adds up to infinity over a
    history: such a row scores nothing.

    Args:
        scores: float32.
        most: float32, which they are relative to; broadcast.

    Returns:
        float32 of the shape of ``scores``.
    """
    share = scores * (1 / EXP2_LARGEST) + (127.0 - EXP2_OFFSET - most) * (1 / EXP2_LARGEST)
    bits = (share.clamp(0, 1) * (EXP2_LARGEST / 256) + 1).view(torch.int32)
    return -(bits << 8).view(torch.float32)


def project_keys(keys: torch.Tensor, basis: Basis, dtype: torch.dtype) -> torch.Tensor:
    """Return projected keys that end with ``LSE_FACTORS``.

    Args:
        keys: ``[..., n, head_dim]``; leading dimensions are those of the basis.
        basis: the directions.
        dtype: that projections are rounded to.

    Returns:
        float32 ``[..., n, r + 3]``.
    """
    projected = keys.float() @ basis.b - basis.offset[..., None, :]
    factors = torch.tensor(LSE_FACTORS, device=keys.device).expand(*projected.shape[:-1], -1)
    return torch.cat([_rounded(projected, dtype), factors], -1)


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).float()
