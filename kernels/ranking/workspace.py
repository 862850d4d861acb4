"""Bases, projected keys and probes: scratch of prefill, request states of decode."""

from typing import Protocol

import torch
from torch import Tensor


class Bases(Protocol):
    """Projections of queries and keys, see :class:`basis.Basis`; the last dimension is padded."""

    @property
    def a(self) -> Tensor:
        """Projection of queries, the queries' dtype, ``[(slots,) bases, head_dim, width]``."""

    @property
    def b(self) -> Tensor:
        """Projection of keys, the queries' dtype, ``[(slots,) bases, head_dim, width]``."""

    @property
    def offset(self) -> Tensor:
        """The projected mean key, float32 ``[(slots,) bases, width]``."""


class RankingWorkspace(Protocol):
    """Bases, projected keys and probes of a work list.

    Projected keys and probes are e4m3 or fp16, see :func:`tiles.projection_dtype`. Where
    ``projected_keys`` has four dimensions its first one, and that of the bases, is a request's
    slot of sparse decode.
    """

    @property
    def basis(self) -> Bases:
        """The bases."""

    @property
    def probe_step(self) -> int:
        """One query row in this many is a probe."""

    @property
    def heads(self) -> Tensor | None:
        """None, or int32 ``[capacity]``: the heads that are ranked, -1 for none; `retrieval`."""

    @property
    def projected_keys(self) -> Tensor:
        """Projected keys ``[(slots,) bases, >= max_history, width]``."""

    @property
    def distances(self) -> Tensor:
        """Squared distance of each projected row to its segment's mean.

        Float32 ``[segments, bases, rows of a segment]``.
        """

    @property
    def probe_rows(self) -> Tensor:
        """Which query rows are the probes, int32 ``[segments, bases, probes]``."""

    @property
    def projected_probes(self) -> Tensor:
        """The projected probes ``[segments, bases, probes, width]``, ending with their row LSE."""


class CentredBases(Bases, Protocol):
    """Bases, and the mean keys that they are about."""

    @property
    def means(self) -> Tensor:
        """Mean keys, float32 ``[bases, >= head_dim]``, in units of the cache."""


class PrefillRanking(RankingWorkspace, Protocol):
    """That of one request, with a basis for each query head."""

    @property
    def basis(self) -> CentredBases:
        """The bases."""


def kernel_constants(query: Tensor, space: RankingWorkspace) -> dict[str, int | float | bool]:
    """Return the constants of a launch that reads projected probes and keys.

    Args:
        query: ``[tokens, heads, head_dim]``.
        space: bases, projected keys and probes.
    """
    return {
        "GROUP": query.shape[1] // space.basis.a.shape[-3],
        "WIDTH": space.projected_probes.shape[-1],
        "PROBE_STEP": space.probe_step,
        "BY_SLOT": space.projected_keys.dim() == 4,
        "LIMIT": torch.finfo(space.projected_keys.dtype).max,
    }
