"""What probes are projected into and scored from: scratch of prefill, request states of decode."""

from typing import Protocol

from torch import Tensor


class Bases(Protocol):
    """Projections of queries and keys, see :class:`basis.Basis`."""

    @property
    def a(self) -> Tensor:
        """Projection of queries."""

    @property
    def b(self) -> Tensor:
        """Projection of keys."""

    @property
    def offset(self) -> Tensor:
        """The projected mean key."""


class RankingWorkspace(Protocol):
    """Bases, projected keys and probes of a work list.

    Where ``images`` has four dimensions the first one of it and of the bases is a request's slot.
    """

    @property
    def fit(self) -> Bases:
        """The bases."""

    @property
    def row_step(self) -> int:
        """One query row of this many is a probe."""

    @property
    def numbers(self) -> Tensor | None:
        """None, or int32 ``[places]``: the heads that are ranked, -1 for none; see `retrieval`."""

    @property
    def images(self) -> Tensor:
        """Projected keys ``[(slots,) bases, >= max_history, width]``."""

    @property
    def sizes(self) -> Tensor:
        """How far each projected query row is from the segment's mean, squared, float32."""

    @property
    def chosen(self) -> Tensor:
        """Which query rows are the probes, int32 ``[segments, bases, probes]``."""

    @property
    def rows(self) -> Tensor:
        """The projected probes ``[segments, bases, probes, width]``."""


class FittedBases(Bases, Protocol):
    """Bases, and the mean keys that they are about."""

    @property
    def means(self) -> Tensor:
        """Mean keys, float32 ``[bases, >= head_dim]``, in units of the cache."""


class PrefillRanking(RankingWorkspace, Protocol):
    """That of one request, with a basis for each query head."""

    @property
    def fit(self) -> FittedBases:
        """The bases."""
