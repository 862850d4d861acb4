"""What a selection hands to attention."""

from typing import NamedTuple

import torch


class SelectedTokens(NamedTuple):
    """The lists of a work list's segments, best tier first (ours: the paper sorts positions).

    Attributes:
        slots: int32 ``[segments, kv_heads, >= max_list]``, physical slots
            (block * block_size + offset).
        lengths: int32 ``[segments, kv_heads]``, slots to visit.
        samples: int32 ``[ceil(segments / ESTIMATE_EVERY), kv_heads, ESTIMATE_TOKENS]``: for every
            ``ESTIMATE_EVERY``-th segment the places in its list of evenly spaced tokens of its
            history, ``NOT_LISTED`` for those it leaves out.
        left: float32 ``[segments, kv_heads, summaries]``: the base-2 logarithm of how many tokens
            of each summary the list leaves out, minus infinity for none; None without summaries.
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    samples: torch.Tensor
    left: torch.Tensor | None = None
