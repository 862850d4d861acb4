"""The few directions of a request's keys that decide its scores (ours).

Scoring every query against every key in full would cost half of dense attention. A rank-r
image of q·k keeps what matters: with Cq the second moment of the queries and Ck the
covariance of the keys, the best one is spanned by the leading eigenvectors of Ck·Cq. It is
fitted anew for each chunk of queries against the history they see, so nothing is stored
beside the KV cache: prefix-cache hits, preemption and block reuse need no care.

Two things keep the fit cheap: two steps of subspace iteration from random directions are about
as good as the eigenvectors (`benchmarks/quality/LOG.md`), and moments are taken from a sample.
"""

from typing import NamedTuple

import torch

from .plan import WorkList

LOG2E = 1.4426950408889634
RANK = 32
SAMPLES = 4096  # keys, and queries x group, that the moments are taken from, at most
STEPS = 2
RIDGE = 1e-12  # in float64, added to a matrix before Cholesky, relative to its mean diagonal


class Basis(NamedTuple):
    """A rank-r image of q·k: up to a constant of the query, (q A)·(k B − offset).

    Attributes:
        a: projection of queries, float32 ``[kv_heads, head_dim, r]``.
        b: projection of keys, float32 ``[kv_heads, head_dim, r]``.
        offset: the mean key's image, float32 ``[kv_heads, r]``.
        spread: covariance of the keys' images, float32 ``[kv_heads, r, r]``.
    """

    a: torch.Tensor
    b: torch.Tensor
    offset: torch.Tensor
    spread: torch.Tensor


def fit(queries: torch.Tensor, keys: torch.Tensor, rank: int = RANK, steps: int = STEPS) -> Basis:
    """Fit a basis to samples.

    Args:
        queries: ``[kv_heads, m, head_dim]``, the heads of a group one after the other.
        keys: ``[kv_heads, n, head_dim]``.
        rank: r, at most head_dim.
        steps: steps of subspace iteration.
    """
    q, k = queries.float(), keys.float()
    mean = k.mean(1, keepdim=True)
    k = k - mean
    cq, ck = (q.mT @ q / q.shape[1]).double(), (k.mT @ k / k.shape[1]).double()
    generator = torch.Generator().manual_seed(0)  # the same start everywhere, every time
    start = torch.randn(q.shape[2], rank, generator=generator, dtype=torch.float64)
    y = start.to(q.device, non_blocking=True).expand(q.shape[0], -1, -1)
    for _ in range(steps):
        y = ck @ (cq @ y)
        y = y / y.norm(dim=1, keepdim=True).clamp(min=1e-30)
    # The best linear guess of q from its image is Cq y (y'Cq y)^-1 (y'q): put into q·k it gives
    # the projection of keys. With y'Cq y = LL', A = y L'^-1 and B = Cq A.
    gram = y.mT @ cq @ y
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    eye = torch.eye(rank, dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(gram + ridge * eye + 1e-30 * eye)  # no synchronisation
    a = torch.linalg.solve_triangular(factor, y.mT, upper=False).mT
    b = cq @ a
    parts = (a, b, (mean.mT * b).sum(1), b.mT @ ck @ b)
    return Basis(*(part.float().contiguous() for part in parts))


def sample(
    query: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, work: WorkList
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return evenly spaced queries of a request's chunk and keys of its history for `fit`."""
    kv_heads, page, head_dim = kv_cache.shape[1], kv_cache.shape[2], query.shape[2]
    group = query.shape[1] // kv_heads
    own = query[work.query_start : work.query_start + work.num_queries]
    queries = own[:: -(-work.num_queries * group // SAMPLES)].unflatten(1, (kv_heads, group))
    positions = torch.arange(
        0, work.max_history, -(-work.max_history // SAMPLES), device=query.device
    )
    blocks = block_table[work.row][positions // page].long()
    keys = kv_cache[blocks, :, positions % page, :head_dim]
    return queries.permute(1, 0, 2, 3).flatten(1, 2), keys.transpose(0, 1)


def project_queries(
    own: torch.Tensor, basis: Basis, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images of a chunk's queries, and by how much each row's scores are shifted.

    Scores become log2-probabilities when the row's log-sum-exp is taken from them. It is that
    of normal scores with the row's variance, ½ (qA)'·spread·(qA), which needs no pass over the
    keys and no exponential; what is common to all rows of a list does not matter.

    Args:
        own: ``[n, heads, head_dim]``.
        basis: of the request's history.
        scale: softmax scale.

    Returns:
        Images in base-2 units, float32 ``[n, heads, r]``, and shifts, float32 ``[n, heads]``.
    """
    queries = own.unflatten(1, (basis.a.shape[0], -1)).float()
    images = torch.einsum("nhgd,hdr->nhgr", queries, basis.a) * scale
    variance = torch.einsum("nhgr,hrs,nhgs->nhg", images, basis.spread, images)
    return (images * LOG2E).flatten(1, 2), (variance * (0.5 * LOG2E)).flatten(1, 2)
