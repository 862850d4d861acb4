"""Summaries of skipped tokens as tensors (ours)."""

from typing import NamedTuple

import torch

from ..tuning import CHUNK_SPANS, REGION_TOKENS, SPAN_LENGTH

REGIONS = CHUNK_SPANS * SPAN_LENGTH // REGION_TOKENS  # of a whole chunk
NO_SUMMARY = 255  # label of a token that none stands for


class Summaries(NamedTuple):
    """Clusters of like keys of a request's history, regions of its chunk, and two covariances.

    A slot is a request's; in prefill there is one. Keys and values are in units of the cache.

    Attributes:
        means: ``[slots, kv_heads, summaries, 2 * head_dim]``, in the queries' dtype: a mean value
            follows its mean key. Clusters come first, then regions; all are finite.
        sizes: int32 ``[slots, kv_heads, summaries]``, tokens of each.
        labels: uint8 ``[slots, kv_heads, tokens]``: each token's summary, or ``NO_SUMMARY``.
        starts: int32 ``[slots]``: tokens before the chunk, which are clustered; the first region
            begins there.
        value_covariances: ``[slots, kv_heads, head_dim, head_dim]``, in the queries' dtype: the
            covariance of keys (rows) and values inside clusters.
        key_covariances: likewise, of keys.
        clusters: how many.
        region_tokens: tokens of a region.
        scratch: of the kernels.
    """

    means: torch.Tensor
    sizes: torch.Tensor
    labels: torch.Tensor
    starts: torch.Tensor
    value_covariances: torch.Tensor
    key_covariances: torch.Tensor
    clusters: int
    region_tokens: int
    scratch: "Scratch | None" = None

    def of(self, slot: int) -> "Summaries":
        """Return the summaries of a slot, with a leading dimension of one."""
        if len(self.means) == 1:
            return self
        return self._replace(**{name: getattr(self, name)[slot : slot + 1] for name in TENSORS})


TENSORS = ("means", "sizes", "labels", "starts", "value_covariances", "key_covariances")


class Scratch(NamedTuple):
    """What the kernels of :mod:`clusters` and :mod:`summaries` hand to one another.

    Attributes:
        sums: float32 ``[CLUSTER_PARTS, kv_heads, pad, 2 * head_dim]``, sums of keys and values.
        numbers: int32 ``[CLUSTER_PARTS, kv_heads, pad]``, tokens of these.
        centres: ``[kv_heads, pad, 2 * head_dim]``, in the queries' dtype: mean keys, and mean
            values times their weight.
        half_norms: float32 ``[kv_heads, pad]``: half of a mean's squared length, that of values
            times their weight; infinite where there is no cluster.
        weights: float32 ``[kv_heads]``, of a value's squared distance beside a key's.
        covariances: float32 ``[COVARIANCE_PARTS, 2, kv_heads, head_dim pad, head_dim pad]``.
    """

    sums: torch.Tensor
    numbers: torch.Tensor
    centres: torch.Tensor
    half_norms: torch.Tensor
    weights: torch.Tensor
    covariances: torch.Tensor


def slot_stride(tensor: torch.Tensor) -> int:
    """Return the stride of slots of a tensor ``[slots, ...]``; 0 where all segments have one."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def history_before_chunk(tokens: int, span_length: int) -> int:
    """Return how many of the tokens lie before the chunk that the last of them is in."""
    chunk = CHUNK_SPANS * span_length
    return max(tokens - 1, 0) // chunk * chunk
