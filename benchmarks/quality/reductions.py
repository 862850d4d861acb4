"""Reductions: from scores of every query to one number per (block of queries, token).

``mean`` is the mean softmax probability and needs an exponential per element. ``max`` is the
largest log-probability (score − row log-sum-exp) and needs none, except for the log-sum-exp; an
error common to all rows of a unit changes nothing, only its variation between rows counts. ``peak``
takes the maximum inside a block of queries and the mean of its exponential over blocks: one
exponential per block. All ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

STRIDE = 64  # keys between two of a sampled log-sum-exp


def lse(s: Tensor) -> Tensor:
    """Return the exact row log-sum-exp of scores [S, T]: [S]."""
    return s.logsumexp(1)


def row_top(s: Tensor) -> Tensor:
    """Return the row maximum of scores [S, T]: [S]."""
    return s.amax(1)


def lse_sampled(s: Tensor) -> Tensor:
    """Estimate the row log-sum-exp from every STRIDE-th key, not the sink at position 0: [S]."""
    sample = s[:, STRIDE // 2 :: STRIDE]
    return sample.logsumexp(1) + math.log(s.shape[1] / sample.shape[1])


def lse_sampled_or_top(s: Tensor) -> Tensor:
    """Add the row maximum's mass to the sampled estimate, which nearly always misses it: [S]."""
    return torch.logaddexp(lse_sampled(s), row_top(s))


def lse_of_maxima(s: Tensor, group: int) -> Tensor:
    """Take one exponential per ``group`` neighbouring keys, of their maximum: [S]."""
    return s[:, : s.shape[1] // group * group].unflatten(1, (-1, group)).amax(2).logsumexp(1)


def gaussian(s: Tensor) -> Tensor:
    """Estimate the row log-sum-exp from mean and variance, as of normal scores: [S].

    In an eigenbasis both come from r multiplications a chunk.
    """
    variance, mean = torch.var_mean(s, 1)
    return mean + variance / 2 + math.log(s.shape[1])


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "lse": lse,
    "top": row_top,
    "lse64": lse_sampled,
    "lse64top": lse_sampled_or_top,
    "max16": partial(lse_of_maxima, group=16),
    "max64": partial(lse_of_maxima, group=64),
    "gauss": gaussian,
}
KINDS = ("mean", "square", "max", "peak")


@dataclass(frozen=True)
class Reduction:
    """How scores of many rows become one.

    Attributes:
        kind: ``mean`` of probabilities, of their ``square``, ``max`` of shifted scores, or
            ``peak``: mean over blocks of the largest probability in a block.
        shift: what is taken from each row before; ``none`` for nothing.
        own: count the segment's own mass in the shift, so that rows which look at themselves
            ask for less history.
    """

    kind: str
    shift: str
    own: bool = False

    @classmethod
    def parse(cls, text: str) -> "Reduction":
        """Read ``mean-lse``, ``max-top``, ``max-lse-own`` and so on."""
        kind, _, rest = text.partition("-")
        shift, _, own = rest.partition("-")
        if kind not in KINDS or shift not in (*SHIFTS, "none") or own not in ("", "own"):
            raise ValueError(
                f"reduction must be one of {', '.join(KINDS)}, a dash and one of "
                f"{', '.join(SHIFTS)}, none, and perhaps -own, not {text}"
            )
        return cls(kind, shift, bool(own))

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return f"{self.kind}-{self.shift}{'-own' if self.own else ''}"

    @property
    def pooling(self) -> str:
        """How blocks combine to larger units: ``mean`` or ``max``."""
        return "max" if self.kind == "max" else "mean"

    def row_shift(self, s: Tensor, own_lse: Tensor) -> Tensor:
        """Return the shift [S] of scores [S, T]; own_lse [S] is the segment's own log mass."""
        if self.shift == "none":
            return s.new_zeros(len(s))
        shift = SHIFTS[self.shift](s)
        return torch.logaddexp(shift, own_lse) if self.own else shift

    def apply(self, s: Tensor, own_lse: Tensor, block: int) -> Tensor:
        """Reduce every ``block`` rows of scores [S, T] to one: [S / block, T]."""
        shifted = s - self.row_shift(s, own_lse)[:, None]
        if self.kind == "max":
            return shifted.unflatten(0, (-1, block)).amax(1)
        if self.kind == "peak":
            return shifted.unflatten(0, (-1, block)).amax(1).exp_()
        if self.kind == "square":
            shifted *= 2
        return shifted.exp_().unflatten(0, (-1, block)).mean(1)
