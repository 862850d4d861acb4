"""Counters on the server's own ``/metrics``.

The backend counts in worker processes, on the device; Prometheus is scraped in the API
process. Each worker keeps a file in the format of prometheus_client's multi-process mode,
and the API process merges those files into its registry.
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .kernels.layout import DROPPED_UNIT, ELIGIBLE, VISITED
from .kernels.output_error import ERROR_UNIT
from .support import DENSE_REASONS

logger = logging.getLogger("vllm.s2o")

METRICS = {
    "s2o:history_tokens_visited": "History tokens that queries of prefill (and of sparse decode) "
    "visited, over all heads, by layer.",
    "s2o:history_tokens_eligible": "History tokens that these queries could have visited, by "
    "layer.",
    "s2o:tiles": "Query tiles that ran on the sparse path.",
    "s2o:tiles_stopped_early": "Query tiles that stopped before the end of their list.",
    "s2o:dropped_mass": "Estimated softmax mass on history that was not visited, summed over the "
    "rows (queries and heads) that it was estimated for, by layer.",
    "s2o:dropped_mass_rows": "Rows that the dropped mass was estimated for, by layer.",
    "s2o:shadow_error": "Relative error of sparse attention outputs against dense ones, summed "
    "over the sampled queries, by layer.",
    "s2o:shadow_rows": "Queries of which the relative error was counted, by layer.",
    "s2o:sparse_requests": "Request chunks that were prefilled on the sparse path.",
    "s2o:dense_rows": "Prefill chunks, and steps of decode where it is sparse, that took the stock "
    "path in all layers or some, by reason.",
    "s2o:late_compilations": "Kernels of S2O that were compiled after the server was ready.",
    "s2o:attention_tokens": "Tokens that all prefill (and sparse decode) would attend to densely, "
    "summed over queries, heads and the layers with full attention.",
    "s2o:attention_tokens_skipped": "Of these tokens, those that were not visited.",
}
SHARE = "s2o:request_work_share"  # a histogram
SHARE_HELP = (
    "Attention work of a prompt's prefill over its dense work, as it was planned, one for each "
    "prompt that was read."
)
SHARE_BUCKETS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, float("inf"))
INFO = "s2o:info"
INFO_HELP = "1; its labels are the version of s2o-vllm and the server's settings."
DEVICE_METRICS = tuple(METRICS)[:6]  # in the order of kernels.layout's counters
SHADOW_METRICS = ("s2o:shadow_error", "s2o:shadow_rows")  # in the order of kernels.output_error's
OF_LAYERS = ("s2o:history_tokens_visited", "s2o:history_tokens_eligible", "s2o:dropped_mass",
             "s2o:dropped_mass_rows", *SHADOW_METRICS)  # fmt: skip
LABELS = {"s2o:dense_rows": "reason"} | dict.fromkeys(OF_LAYERS, "layer")
# Of one count; others count by one.
UNITS = {"s2o:dropped_mass": DROPPED_UNIT, "s2o:shadow_error": ERROR_UNIT}
# Series that stand at 0 before anything is counted; `expect` adds those of a layer.
ZEROS = {(metric, ""): 0 for metric in METRICS if metric not in LABELS}
ZEROS |= {("s2o:dense_rows", reason): 0 for reason in DENSE_REASONS}
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
        self._histogram: Any = None
        self._shares: Counter[float] = Counter()  # by the bucket that they are in
        self._share_sum = 0.0
        self._info: dict[str, str] = {}
        self._labels: dict[str, str] = {}
        self._layers: list[tuple[torch.Tensor, str, tuple[str, ...]]] = []
        self._host: Counter[tuple[str, str]] = Counter()
        self._skipped = 0
        self._zeros = ZEROS
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._publishing = threading.Lock()  # two would make a file anew that was removed

    def watch(
        self,
        counters: torch.Tensor,
        layer: int | None,
        names: tuple[str, ...] = DEVICE_METRICS,
    ) -> torch.Tensor:
        """Add a layer's counters.

        Args:
            counters: int64 ``[len(names)]``.
            layer: its number in the model.
            names: the metrics that they are.

        Returns:
            What is published: the counters themselves on the CPU, else pinned memory that the
            layer copies them to.
        """
        published = counters
        if counters.device.type == "cuda":
            published = torch.zeros_like(counters, device="cpu", pin_memory=True)
        self._layers.append((published, "" if layer is None else str(layer), names))
        return published

    def expect(self, layer: int | None) -> None:
        """Publish the series of a layer from now on, at 0 until it has run."""
        label = "" if layer is None else str(layer)
        self._zeros = self._zeros | {(metric, label): 0 for metric in OF_LAYERS}

    def add(self, metric: str, amount: int, label: str = "") -> None:
        """Count on the host."""
        with self._lock:
            self._host[metric, label] += amount

    def observe_share(self, share: float) -> None:
        """Count a prompt that was prefilled with this share of its dense work."""
        bucket = next(most for most in SHARE_BUCKETS if share <= most)
        with self._lock:
            self._shares[bucket] += 1
            self._share_sum += share

    def add_dense(self, reason: str) -> None:
        """Count a chunk that took the stock path; the first one of a reason is logged."""
        with self._lock:
            first = ("s2o:dense_rows", reason) not in self._host
            self._host["s2o:dense_rows", reason] += 1
        if first:
            meaning = DENSE_REASONS.get(reason, "")
            logger.info("S2O: first chunk on the stock path for %s: %s", reason, meaning)

    def start(
        self, info: Mapping[str, str] | None = None, labels: Mapping[str, str] | None = None
    ) -> bool:
        """Make the file, and begin to publish; without a file there are no counters.

        Args:
            info: the labels of ``s2o:info``.
            labels: those of every series.

        Returns:
            Whether this is the first call.
        """
        if self._thread is not None:
            return False
        self._info, self._labels = dict(info or {}), dict(labels or {})
        self._thread = threading.Thread(target=self._run, name="s2o-metrics", daemon=True)
        folder = self.folder()
        if folder is not None and self._open(folder):
            self._thread.start()
        return True

    def folder(self) -> Path | None:
        """Return the folder that this server's workers share, if it has one."""
        folder = (
            self._folder
            or os.environ.get("PROMETHEUS_MULTIPROC_DIR")
            or os.environ.get(DIRECTORY, "")
        )
        return Path(folder) if folder and Path(folder).is_dir() else None

    def sums(self, names: tuple[str, ...]) -> list[int]:
        """Return the counters that were watched under these names, summed over layers."""
        counters = [counters for counters, _, own in list(self._layers) if own == names]
        if not counters:
            return [0] * len(names)
        return [sum(values) for values in zip(*(one.tolist() for one in counters), strict=True)]

    def _open(self, folder: Path) -> bool:
        from .counter_files import INFO_RESERVED, CounterFile

        try:
            self._file = CounterFile(folder)
            self._histogram = CounterFile(folder, "histogram", INFO_RESERVED)
            if self._info:
                info = CounterFile(folder, "gauge_max", INFO_RESERVED)
                info.write(self._key(INFO, INFO, self._info, INFO_HELP), 1.0)
        except OSError as error:
            self._file = None
            warn(error)
        return self._file is not None

    def _key(self, metric: str, series: str, labels: Mapping[str, str], text: str) -> str:
        """Return prometheus_client's key of a time series."""
        from prometheus_client.mmap_dict import mmap_key

        labels = self._labels | dict(labels)
        return mmap_key(metric, series, list(labels), list(labels.values()), text)

    def _run(self) -> None:
        wait = threading.Event()
        while self._file is not None:
            self.publish()
            wait.wait(PERIOD)

    def totals(self) -> Counter[tuple[str, str]]:
        """Return all counts by metric and label ("" where there is none)."""
        with self._lock:
            totals = Counter(self._host)
        skipped = 0
        for counters, layer, names in list(self._layers):
            counts = counters.tolist()
            for metric, value in zip(names, counts, strict=True):
                totals[metric, layer if metric in LABELS else ""] += value
            if names == DEVICE_METRICS:
                skipped += counts[ELIGIBLE] - counts[VISITED]
        # Half of a copy may have arrived: a counter that fell would look like a restart.
        self._skipped = max(self._skipped, skipped)
        if self._layers:
            totals["s2o:attention_tokens_skipped", ""] = self._skipped
        return totals

    def publish(self) -> None:
        """Write the present totals to this worker's file."""
        with self._publishing:
            self._publish()

    def _publish(self) -> None:
        if self._file is None or (self._file.removed and not self._open(self._file.path.parent)):
            return
        from prometheus_client.utils import floatToGoString

        for (metric, label), value in (self._zeros | self.totals()).items():
            own = {LABELS[metric]: label} if label else {}
            key = self._key(metric, metric + "_total", own, METRICS[metric])
            self._file.write(key, value * UNITS.get(metric, 1.0))
        with self._lock:
            shares, total = Counter(self._shares), self._share_sum
        for bucket in SHARE_BUCKETS:
            key = self._key(SHARE, SHARE + "_bucket", {"le": floatToGoString(bucket)}, SHARE_HELP)
            self._histogram.write(key, float(shares[bucket]))
        self._histogram.write(self._key(SHARE, SHARE + "_sum", {}, SHARE_HELP), total)


worker = WorkerCounters()
