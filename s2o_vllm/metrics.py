"""Counters on the server's own ``/metrics``.

The backend counts in worker processes, on the device; Prometheus is scraped in the API
process. Each worker keeps a file in the format of prometheus_client's multi-process mode,
and the API process merges those files into its registry.
"""

import logging
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from .kernels.plan import DROPPED_UNIT

logger = logging.getLogger("vllm.s2o")

METRICS = {
    "s2o:history_tokens_visited": "History tokens that queries of prefill (and of sparse decode) "
    "visited, over all heads.",
    "s2o:history_tokens_eligible": "History tokens that these queries could have visited.",
    "s2o:tiles": "Query tiles that ran on the sparse path.",
    "s2o:tiles_stopped_early": "Query tiles that stopped before the end of their list.",
    "s2o:dropped_mass": "Estimated softmax mass on history that was not visited, summed over the "
    "rows (queries and heads) that it was estimated for, by layer.",
    "s2o:dropped_mass_rows": "Rows that the dropped mass was estimated for, by layer.",
    "s2o:sparse_requests": "Request chunks that were prefilled on the sparse path.",
    "s2o:dense_rows": "Prefill chunks, and steps of decode where it is sparse, that took the stock "
    "path in all layers or some, by reason.",
}
DEVICE_METRICS = tuple(METRICS)[:6]  # in the order of kernels.plan's counters
LABELS = {"s2o:dense_rows": "reason", "s2o:dropped_mass": "layer", "s2o:dropped_mass_rows": "layer"}
UNITS = {"s2o:dropped_mass": DROPPED_UNIT}  # of one count; others count by one
DIRECTORY = "S2O_METRICS_DIR"
PERIOD = 0.5  # seconds between two readings of the device counters

_own_folder: Any = None  # a CounterFolder


def install_collector() -> None:
    """Offer the workers' counters on this process's registry. Idempotent.

    With several API servers vLLM itself runs Prometheus in multi-process mode; then the
    workers write to its folder, and its collector finds them there.
    """
    global _own_folder
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ or _own_folder is not None:
        return
    from prometheus_client import REGISTRY

    from .counter_files import Collector, CounterFolder

    try:
        _own_folder = CounterFolder()
    except OSError as error:
        os.environ.pop(DIRECTORY, None)
        warn(error)
        return
    os.environ[DIRECTORY] = str(_own_folder.path)
    Collector(REGISTRY, _own_folder)


def warn(error: OSError) -> None:
    """Say why there are no counters."""
    logger.warning("s2o: no counters of S2O on /metrics: %s", error)


class WorkerCounters:
    """This worker's counters: those of the layers, and counts made on the host.

    A forward pass copies a layer's counters to pinned memory without waiting; a thread of its
    own publishes what is there. It never calls CUDA: that would break a graph capture.
    """

    def __init__(self, folder: str | None = None):
        self._folder = folder
        self._file: Any = None
        self._layers: list[tuple[torch.Tensor, str]] = []
        self._host: Counter[tuple[str, str]] = Counter()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def watch(self, counters: torch.Tensor, layer: int | None) -> torch.Tensor:
        """Add a layer's counters.

        Args:
            counters: int64, kernels.plan.NUM_COUNTERS of them.
            layer: its number in the model.

        Returns:
            What is published: the counters themselves on the CPU, else pinned memory that the
            layer copies them to.
        """
        published = counters
        if counters.device.type == "cuda":
            published = torch.zeros_like(counters, device="cpu", pin_memory=True)
        self._layers.append((published, "" if layer is None else str(layer)))
        return published

    def add(self, metric: str, amount: int, label: str = "") -> None:
        """Count on the host."""
        with self._lock:
            self._host[metric, label] += amount

    def start(self) -> None:
        """Make the file, and begin to publish; without a file there are no counters."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name="s2o-metrics", daemon=True)
        folder = (
            self._folder
            or os.environ.get("PROMETHEUS_MULTIPROC_DIR")
            or os.environ.get(DIRECTORY, "")
        )
        if folder and Path(folder).is_dir() and self._open(Path(folder)):
            self._thread.start()

    def _open(self, folder: Path) -> bool:
        from .counter_files import CounterFile

        try:
            self._file = CounterFile(folder)
        except OSError as error:
            self._file = None
            warn(error)
        return self._file is not None

    def _run(self) -> None:
        wait = threading.Event()
        while self._file is not None and not wait.wait(PERIOD):
            self.publish()

    def totals(self) -> Counter[tuple[str, str]]:
        """Return all counts by metric and label ("" where there is none)."""
        with self._lock:
            totals = Counter(self._host)
        for counters, layer in list(self._layers):
            for metric, value in zip(DEVICE_METRICS, counters.tolist(), strict=True):
                totals[metric, layer if metric in LABELS else ""] += value
        return totals

    def publish(self) -> None:
        """Write the present totals to this worker's file."""
        if self._file is None or (self._file.removed and not self._open(self._file.path.parent)):
            return
        from prometheus_client.mmap_dict import mmap_key

        for (metric, label), value in self.totals().items():
            names, values = ([LABELS[metric]], [label]) if label else ([], [])
            key = mmap_key(metric, metric + "_total", names, values, METRICS[metric])
            self._file.write(key, value * UNITS.get(metric, 1.0))


worker = WorkerCounters()
