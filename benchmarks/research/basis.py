"""Bases: the few directions of a chunk of keys that matter to q·k (ours).

With Cq the second moment of the queries and Ck the covariance of the keys, the best rank-r
projection of q·(k − mean) is on the leading eigenvectors of Ck·Cq. A basis is fixed when its
chunk of keys is written: it sees that chunk's keys and queries only.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from ..quality.attention import Segment

GRAIN = 1024  # tokens over which moments are summed once for all chunk lengths
RIDGE = 1e-5  # added to a matrix before Cholesky, relative to its mean diagonal


class Basis(NamedTuple):
    """A rank-r approximation of q·k: q·mean + (q A)·((k − mean) B).

    Attributes:
        a: projection of queries [D, r].
        b: projection of keys [D, r].
        mean: mean key [D].
    """

    a: Tensor
    b: Tensor
    mean: Tensor


class Moments(NamedTuple):
    """Moments of a chunk for one KV head.

    Attributes:
        cq: second moment of the queries of the head's group [D, D].
        ck: covariance of the keys [D, D].
        mean: mean key [D].
        keys: evenly spaced centred keys [D, D], the start of some sketches.
    """

    cq: Tensor
    ck: Tensor
    mean: Tensor
    keys: Tensor


def _grains(segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums over GRAIN tokens of qq', kk' and k: [Hkv, G, D, D] twice, [Hkv, G, D]."""
    heads, history, dim = segment.kv_heads, segment.history, segment.q.shape[2]
    grains = -(-history // GRAIN)
    qq, kk = torch.zeros(2, heads, grains, dim, dim)
    total = torch.zeros(heads, grains, dim)
    for h in range(heads):
        own = segment.past_q[h * segment.group : (h + 1) * segment.group]
        for g in range(grains):
            part = slice(g * GRAIN, min((g + 1) * GRAIN, history))
            q, k = own[:, part].float().reshape(-1, dim), segment.k[h, part]
            qq[h, g], kk[h, g], total[h, g] = q.T @ q, k.T @ k, k.sum(0)
    return qq, kk, total


def moments(segment: Segment, head: int, start: int, end: int) -> Moments:
    """Return a chunk's moments; start is a multiple of GRAIN, end too or the history's end."""
    qq, kk, total = segment.memo("grains", lambda: _grains(segment))
    grains = slice(start // GRAIN, -(-end // GRAIN))
    count = end - start
    mean = total[head, grains].sum(0) / count
    cq = qq[head, grains].sum(0) / (count * segment.group)
    ck = kk[head, grains].sum(0) / count - mean.outer(mean)
    k = segment.k[head, start:end]
    spaced = torch.linspace(0, count - 1, k.shape[1]).long()
    return Moments(cq, ck, mean, (k[spaced] - mean).T)


def _cholesky(matrix: Tensor) -> Tensor:
    """Return the lower factor of a positive semi-definite matrix [D, D], slightly ridged."""
    ridge = RIDGE * matrix.diagonal().mean()
    return torch.linalg.cholesky(matrix + ridge * torch.eye(len(matrix)))


def from_directions(m: Moments, y: Tensor) -> Basis:
    """Complete query directions y [D, r] to a basis.

    The best linear guess of q from q·y is Cq y (y'Cq y)^-1 (y'q); put into q·k it gives the
    projection of keys. One r × r Cholesky; no square root of Cq.
    """
    cy = m.cq @ y
    factor = _cholesky(y.T @ cy)
    a = torch.linalg.solve_triangular(factor, y.T, upper=False).T
    return Basis(a, m.cq @ a, m.mean)


def eigen(m: Moments, rank: int) -> Basis:
    """Return the best basis: Cq = LL', eigenvectors of L'CkL."""
    lower = _cholesky(m.cq)
    _, vectors = torch.linalg.eigh(lower.T @ m.ck @ lower)
    top = vectors[:, -rank:]
    return Basis(torch.linalg.solve_triangular(lower.T, top, upper=True), lower @ top, m.mean)


def pivoted(m: Moments, rank: int) -> Basis:
    """Pick columns of L'CkL by pivoted Cholesky instead of its eigenvectors."""
    lower = _cholesky(m.cq)
    rest = lower.T @ m.ck @ lower
    whole, picks = rest.clone(), []
    for _ in range(rank):
        pick = int(rest.diagonal().argmax())
        picks.append(pick)
        rest = rest - rest[:, pick].outer(rest[pick]) / rest[pick, pick].clamp(min=1e-12)
    top = torch.linalg.qr(whole[:, picks]).Q
    return Basis(torch.linalg.solve_triangular(lower.T, top, upper=True), lower @ top, m.mean)


def principal(m: Moments, rank: int, of_queries: bool) -> Basis:
    """Project both sides on the leading eigenvectors of Ck, or of Cq."""
    top = torch.linalg.eigh(m.cq if of_queries else m.ck)[1][:, -rank:]
    return Basis(top, top, m.mean)


def power(m: Moments, start: Tensor, steps: int) -> Basis:
    """Take steps of subspace iteration y ← Ck Cq y from start [D, r], orthogonal after each."""
    y = start
    for _ in range(steps):
        y = torch.linalg.qr(m.ck @ (m.cq @ y)).Q
    return from_directions(m, y)


def fit(kind: str, m: Moments, rank: int, previous: Basis | None, seed: int) -> Basis:
    """Find the basis of a chunk.

    Args:
        kind: ``eigen``, ``pivoted``, ``pca_k``, ``pca_q``, or ``<start>N``: N steps of subspace
            iteration from ``random`` directions, evenly spaced ``keys``, or the ``previous``
            chunk's directions (random for the first chunk, with one step more).
        m: moments of the chunk.
        rank: directions r.
        previous: the basis of the chunk before.
        seed: of the random start.
    """
    if kind == "eigen":
        return eigen(m, rank)
    if kind == "pivoted":
        return pivoted(m, rank)
    if kind in ("pca_k", "pca_q"):
        return principal(m, rank, kind == "pca_q")
    match = re.fullmatch(r"(random|keys|previous)(\d)", kind)
    if not match:
        raise ValueError(f"unknown basis {kind}")
    steps = int(match[2])
    dim = len(m.mean)
    if match[1] == "keys":
        return power(m, m.keys[:, torch.linspace(0, dim - 1, rank).long()], steps)
    if match[1] == "previous" and previous is not None:
        return power(m, previous.a, steps)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(dim, rank, generator=generator, device=generator.device)
    return power(m, start.to(m.mean.device), steps + (match[1] == "previous"))


def recent_moment(segment: Segment, head: int, count: int) -> Tensor:
    """Return the second moment [D, D] of the last queries up to the segment's end."""
    own = slice(head * segment.group, (head + 1) * segment.group)
    past = max(count - segment.length, 0)
    before = segment.past_q[own, max(segment.history - past, 0) :].float()
    q = torch.cat([before, segment.q[own, -count:]], 1).flatten(0, 1)
    return q.T @ q / len(q)


def fit_chunks(
    segment: Segment, kind: str, rank: int, chunk: int, queries: int = 0
) -> list[list[Basis]]:
    """Return the bases of every KV head and chunk of the history.

    Args:
        segment: the segment.
        kind: how directions are found.
        rank: directions r.
        chunk: tokens of a chunk; 0 takes the whole history as one.
        queries: 0 fits a chunk to the queries that were written with its keys, once and for
            all; n > 0 fits to the last n queries up to the segment's end, anew for each prefill.
    """
    chunk = chunk or segment.history
    starts = range(0, segment.history, chunk)
    bases: list[list[Basis]] = []
    for head in range(segment.kv_heads):
        found: list[Basis] = []
        for start in starts:
            m = moments(segment, head, start, min(start + chunk, segment.history))
            if queries:
                m = m._replace(cq=recent_moment(segment, head, queries))
            found.append(fit(kind, m, rank, found[-1] if found else None, start))
        bases.append(found)
    return bases
