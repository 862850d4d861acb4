"""Shadow mode: a sample of sparse queries is attended densely as well, and the two are compared.

The dense output is the parent backend's, over the same paged cache, as if each query of the sample
were a step of decode. The errors stay on the device and are read later, like the other counters.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import compat, metrics
from .config import S2OConfig
from .kernels.layout import DENSE_START, HISTORY
from .kernels.output_error import ERROR_UNIT, NUM_ERRORS, add_errors
from .kernels.work_list import PrefillRow, cut_segments, to_device

logger = logging.getLogger("vllm.s2o")

MOST_QUERIES = 32  # of one step that are attended twice, in each layer
# Positions are drawn by their multiples of the golden ratio: any share of them, and none of the
# periods that segments and pages have.
GOLDEN = 0.6180339887498949
LIMIT_ROWS = 1000  # queries, summed over layers, whose mean error is compared with the limit
CLOCK_TICK = 0.1  # seconds by which the time of a new file may lie in the past
MARKER = "s2o-shadow-limit"  # a file beside the counters: one worker has reached the limit


class Sampled(NamedTuple):
    """One query of the sample.

    Attributes:
        row: its request's row in the block table.
        token: its place in the step's packed queries.
        length: tokens that it attends to, its own among them.
    """

    row: int
    token: int
    length: int


@dataclass
class ShadowPart:
    """The sample of a step, as rows of one token.

    Attributes:
        rows: their rows in the step's block table, int64 ``[samples]`` on the device.
        tokens: their indices in the step's packed queries, likewise.
        metadata: the parent's metadata for them.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    metadata: Any

    def updated(self, update: Any, block_table: torch.Tensor, slots: torch.Tensor) -> "ShadowPart":
        """Return the part for another block table.

        Args:
            update: the parent builder's ``update_block_table``.
            block_table: int32 ``[rows, max_blocks]``.
            slots: int64 ``[tokens]``, where the step's keys and values are written.
        """
        metadata = update(self.metadata, block_table[self.rows], slots[self.tokens])
        return replace(self, metadata=metadata)


def sample(rows: Sequence[PrefillRow], settings: S2OConfig) -> list[Sampled]:
    """Draw a share ``shadow_rate`` of the sparse queries of a step, the same ones in every run.

    Where they would be more than ``MOST_QUERIES``, that many of them, evenly spaced.
    """
    chosen: list[Sampled] = []
    for row in rows:
        lines = cut_segments(row, settings.segment, settings.min_context)
        # Histories grow: from the first sparse segment on all are.
        start = next((line[HISTORY] for line in lines if line[DENSE_START]), None)
        if start is None:
            continue
        positions = torch.arange(start, row.context + row.num_queries)
        drawn = (positions.double() * GOLDEN) % 1 < settings.shadow_rate
        first = row.query_start - row.context
        chosen += [Sampled(row.row, first + p, p + 1) for p in positions[drawn].tolist()]
    count = min(len(chosen), MOST_QUERIES)
    return [chosen[number * len(chosen) // count] for number in range(count)]


def shadow_part(
    rows: Sequence[PrefillRow], settings: S2OConfig, common: Any, build: Any
) -> ShadowPart | None:
    """Return what of a step is attended twice, or None.

    Args:
        rows: the sparse rows.
        settings: the server's.
        common: vLLM's metadata of the whole step.
        build: the parent's, from such metadata.
    """
    chosen = sample(rows, settings) if settings.shadow_rate > 0 else []
    if not chosen:
        return None
    columns = list(zip(*chosen, strict=True))
    host = torch.tensor(columns, dtype=torch.int32)
    device = to_device(columns, common.block_table_tensor.device)
    own = compat.single_tokens(common, host, device)
    return ShadowPart(device[0].long(), device[1].long(), build(0, own, fast_build=True))


class LayerShadow:
    """What a layer's sparse outputs differ by from dense ones.

    Args:
        layer: its number in the model.
        device: where it runs.
    """

    def __init__(self, layer: int | None, device: torch.device):
        self.counters = torch.zeros(NUM_ERRORS, dtype=torch.int64, device=device)
        watch = metrics.worker.watch
        self.published = watch(self.counters, layer, metrics.SHADOW_METRICS)

    def add(self, sparse: torch.Tensor, dense: torch.Tensor) -> None:
        """Compare the two, both ``[queries, heads, head_dim]``, without waiting for the device."""
        add_errors(self.counters, sparse, dense)
        if self.published is not self.counters:
            self.published.copy_(self.counters, non_blocking=True)


class Guard:
    """Tells when the sampled error is above the limit; from then on everything stays dense.

    Each worker judges the layers and heads that it has. The others of its machine learn of it by
    a file beside their counters.
    """

    def __init__(self) -> None:
        self.reached = False
        self._begun = time.time() - CLOCK_TICK
        self._before = [0] * NUM_ERRORS

    def check(self, limit: float) -> bool:
        """Return whether the limit is reached, by what the device has counted until now."""
        if not self.reached and limit > 0:
            self.reached = self._measured(limit) or self._reported()
        return self.reached

    def _measured(self, limit: float) -> bool:
        now = metrics.worker.sums(metrics.SHADOW_METRICS)
        error, rows = (new - old for new, old in zip(now, self._before, strict=True))
        if rows < LIMIT_ROWS:
            return False
        self._before = now
        mean = error * ERROR_UNIT / rows
        if mean > limit and not self._report():
            logger.warning(
                "S2O: sparse attention differs from dense by %.3f in the mean of the last %d "
                "sampled queries, more than shadow_limit %g: all prefill stays dense until the "
                "server is restarted", mean, rows, limit,
            )  # fmt: skip
        return mean > limit

    def _marker(self) -> Path | None:
        folder = metrics.worker.folder()
        return folder / MARKER if folder is not None else None

    def _reported(self) -> bool:
        """Return whether another worker of this server reported it; older files do not count."""
        marker = self._marker()
        try:
            return marker is not None and marker.stat().st_mtime >= self._begun
        except OSError:
            return False

    def _report(self) -> bool:
        """Report the limit to the other workers; returns whether one of them was first."""
        marker = self._marker()
        if marker is None:
            return False
        if self._reported():
            return True
        try:
            marker.unlink(missing_ok=True)
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return True
        except OSError:  # no space: each worker goes by its own sample
            return False
        return False


guard = Guard()
