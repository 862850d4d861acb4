"""Measure: the error that a selection makes, and what an early stop would do with its list."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2o_vllm.kernels.attention.reference import summary_mass
from s2o_vllm.kernels.tuning import STOP_STEP_TOKENS

from .attention import Partial, Segment, attend, merge
from .selection import Selection

STOP_TILE = 128  # rows that stop together


class Errors(NamedTuple):
    """What a selection costs and misses.

    Attributes:
        density: share of the history that is visited, averaged over rows; a summary of skipped
            tokens counts as a token.
        relative_mse: ‖Ô−O‖² / ‖O‖² over all rows of the segment.
        dropped_mass: share of softmax mass not visited, averaged over rows.
        dropped_mass_max: the same of the worst row.
    """

    density: float
    relative_mse: float
    dropped_mass: float
    dropped_mass_max: float


def compare(segment: Segment, out: Tensor, lse: Tensor, density: float) -> Errors:
    """Judge outputs [H*S, D] and visited log mass [H*S] against dense attention."""
    truth = segment.dense.out.flatten(0, 1)
    mse = (out - truth).square().sum() / truth.square().sum()
    dropped = (1 - (lse - segment.dense.lse.flatten()).exp()).clamp(min=0)
    return Errors(density, float(mse), float(dropped.mean()), float(dropped.max()))


def measure(segment: Segment, selection: Selection) -> Errors:
    """Return the error of attending to the segment itself and to what is selected."""
    q = segment.q.flatten(0, 1)
    own_out, own_lse = segment.own.out.flatten(0, 1), segment.own.lse.flatten()
    out, lse = torch.empty_like(own_out), torch.empty_like(own_lse)
    visited = 0.0
    for u, tokens in enumerate(selection.tokens):
        rows, kv = selection.rows.rows[u], int(selection.rows.kv[u])
        k, v = segment.k[kv, tokens], segment.v[kv, tokens]
        part = attend(q[rows], k, v, segment.scale)
        part = merge(Partial(own_out[rows], own_lse[rows]), part)
        lse[rows] = part.lse
        if selection.summaries is not None:
            mean = selection.summaries[u]
            counts = mean.count
            if mean.key_covariance is not None:
                counts = counts * summary_mass(q[rows], mean.key_covariance, segment.scale)[:, None]
            summarised = attend(q[rows], mean.k, mean.v, segment.scale, counts.log())
            if mean.value_covariance is not None:
                summarised = summarised._replace(
                    out=summarised.out + q[rows] @ mean.value_covariance * segment.scale
                )
            part = merge(part, summarised)
            visited += len(mean.count) * len(rows)
        out[rows] = part.out
        visited += len(tokens) * len(rows)
    return compare(segment, out, lse, visited / (len(q) * segment.history))


def early_stop(
    segment: Segment,
    selection: Selection,
    taus: Sequence[float],
    step: int = STOP_STEP_TOKENS,
    tile: int = STOP_TILE,
) -> list[Errors]:
    """Walk each list and stop a tile once its gain in mass falls below tau (S2O, early stop).

    The gain is the mass that the last step brought, relative to all mass so far; the largest
    over the tile's rows decides, which is the safe reduction (the paper's is not known).

    Args:
        segment: the segment.
        selection: lists in the order they are walked.
        taus: thresholds; each gives one result.
        step: history tokens between two tests.
        tile: rows that stop together.

    Returns:
        One result a threshold.
    """
    q = segment.q.flatten(0, 1)
    own_out, own_lse = segment.own.out.flatten(0, 1), segment.own.lse.flatten()
    outs = [torch.empty_like(own_out) for _ in taus]
    lses = [torch.empty_like(own_lse) for _ in taus]
    visited = [0.0 for _ in taus]
    for u, tokens in enumerate(selection.tokens):
        kv = int(selection.rows.kv[u])
        k, v = segment.k[kv, tokens], segment.v[kv, tokens]
        for rows in selection.rows.rows[u].split(tile):
            state = Partial(own_out[rows], own_lse[rows])
            waiting = set(range(len(taus)))
            for end in range(step, len(tokens) + step, step):
                new = attend(q[rows], k[end - step : end], v[end - step : end], segment.scale)
                state = merge(state, new)
                gain = float((new.lse - state.lse).exp().max())
                seen = min(end, len(tokens))
                stops = [i for i in waiting if gain < taus[i] or seen == len(tokens)]
                for i in stops:
                    outs[i][rows], lses[i][rows] = state
                    visited[i] += seen * len(rows)
                    waiting.discard(i)
                if not waiting:
                    break
    total = len(q) * segment.history
    return [
        compare(segment, out, lse, seen / total)
        for out, lse, seen in zip(outs, lses, visited, strict=True)
    ]
