"""Summaries of a history's regions as tensors, and how many tokens they are sampled from."""

from typing import NamedTuple

import torch

from ..tuning import (
    COVARIANCE_PARTS,
    REGION_PIECE,
    REGION_SAMPLES,
    REGION_TOKENS,
    REGIONS_SAMPLES,
)


class Summaries(NamedTuple):
    """Region means of a request's history, from its first token on, and its covariances.

    All are in units of the cache and in the queries' dtype.

    Attributes:
        means: ``[kv_heads, regions, 2 * head_dim]``: a mean value follows its mean key.
        value_covariances: ``[spans, kv_heads, head_dim, head_dim]``: for every row of the span
            table the covariance of keys (rows) and values in the history before the multiple of
            the span length that the span begins at or behind.
        key_covariances: likewise, the covariance of keys.
        region_tokens: tokens of a region.
        sums: scratch of the kernels, float32 ``[COVARIANCE_PARTS, 2, kv_heads, pad, pad]``.
        known: None in prefill. In decode int32 ``[slots]``, how many regions of each slot are set:
            then every span is another request's slot, and ``means`` has a leading dimension of
            slots.
    """

    means: torch.Tensor
    value_covariances: torch.Tensor
    key_covariances: torch.Tensor
    region_tokens: int
    sums: torch.Tensor | None = None
    known: torch.Tensor | None = None

    def means_of(self, span: int, history: int) -> torch.Tensor:
        """Return the means of a history of this length: ``[kv_heads, regions, 2 * head_dim]``."""
        count = history // self.region_tokens
        if self.known is None:
            return self.means[:, :count]
        return self.means[span, :, : min(count, int(self.known[span]))]


def region_samples(history: int, region: int = REGION_TOKENS) -> int:
    """Return the evenly spaced tokens that a region's mean is taken over."""
    piece = min(REGION_PIECE, region)
    most = min(REGION_SAMPLES, region, REGIONS_SAMPLES // max(1, history // region))
    return piece * max(1, most // piece)


def covariance_part(history: int, region: int = REGION_TOKENS) -> int:
    """Return the tokens of a covariance part.

    Parts are whole regions, at most ``COVARIANCE_PARTS``; tokens behind the last whole part count
    in none.
    """
    return region * max(1, -(-(history // region) // COVARIANCE_PARTS))
