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


LSE_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
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
        kind: ``mean`` of probabilities, of their ``square``, ``max`` of log-probabilities,
            or ``peak``: mean over blocks of the largest probability in a block.
        estimate: of the row log-sum-exp that is subtracted first, one of ``LSE_ESTIMATES``, or
            ``none``.
        own: add the segment's own mass to it, so that rows which attend to their own segment
            count for less.
    """

    kind: str
    estimate: str
    own: bool = False

    @classmethod
    def parse(cls, text: str) -> "Reduction":
        """Read ``mean-lse``, ``max-top``, ``max-lse-own`` and so on."""
        kind, _, rest = text.partition("-")
        estimate, _, own = rest.partition("-")
        if kind not in KINDS or estimate not in (*LSE_ESTIMATES, "none") or own not in ("", "own"):
            raise ValueError(
                f"reduction must be one of {', '.join(KINDS)}, a dash and one of "
                f"{', '.join(LSE_ESTIMATES)}, none, and perhaps -own, not {text}"
            )
        return cls(kind, estimate, bool(own))

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return f"{self.kind}-{self.estimate}{'-own' if self.own else ''}"

    @property
    def pooling(self) -> str:
        """How blocks combine to larger units: ``mean`` or ``max``."""
        return "max" if self.kind == "max" else "mean"

    def row_lse(self, s: Tensor, own_lse: Tensor) -> Tensor:
        """Return the row log-sum-exp [S] of scores [S, T] and own log mass [S], in nats."""
        if self.estimate == "none":
            return s.new_zeros(len(s))
        history_lse = LSE_ESTIMATES[self.estimate](s)
        return torch.logaddexp(history_lse, own_lse) if self.own else history_lse

    def apply(self, s: Tensor, own_lse: Tensor, block: int) -> Tensor:
        """Reduce every ``block`` rows of scores [S, T] to one: [S / block, T]."""
        logprobs = s - self.row_lse(s, own_lse)[:, None]
        if self.kind == "max":
            return logprobs.unflatten(0, (-1, block)).amax(1)
        if self.kind == "peak":
            return logprobs.unflatten(0, (-1, block)).amax(1).exp_()
        if self.kind == "square":
            logprobs *= 2
        return logprobs.exp_().unflatten(0, (-1, block)).mean(1)
