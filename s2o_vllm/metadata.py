"""The metadata builder: attaches to the parent's metadata the plan of a step."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from . import (
    __version__,
    compat,
    cost,
    metrics,
    request_work,
    self_test,
    shadow,
    support,
    worker_hooks,
)
from .config import S2OConfig
from .decode_slots import DecodeSlots
from .kernels.decode_state import DecodeList, DecodeRow, DecodeShape, DecodeTable
from .kernels.work_list import Limits, build_work_lists
from .requests import budget_of
from .step_plan import DENSE_TAIL, DensePart, StepPlan, dense_work, split_rows

logger = logging.getLogger("vllm.s2o")


class SparseBuilder:
    """Mixin for a metadata builder: attaches a :class:`StepPlan` where rows go sparse.

    The parent's ``build`` makes everything else. Steps without sparse rows (all decode steps)
    get the parent's metadata unchanged.
    """

    s2o: S2OConfig | None = None
    s2o_reason: str | None = None  # why no layer of this group can go sparse
    s2o_layer_reasons: tuple[str, ...] = ()  # why some of its layers stay dense if others do not
    s2o_limits: Limits = Limits(1, 0)
    s2o_counts: bool = True  # whether chunks are counted here
    s2o_counts_prompts: bool = False
    s2o_heads: int = 0  # query heads of this rank's layers with full attention, all together
    s2o_sparse_heads: int = 0  # those of them in layers that can go sparse
    s2o_slots: DecodeSlots | None = None  # where decode is sparse
    s2o_table: DecodeTable | None = None
    s2o_lengths: torch.Tensor | None = None  # of sequences, as the parent sees them there
    s2o_graphs: bool = False  # whether graphs hold whole steps of decode
    s2o_least_new: Callable[[int], int] = staticmethod(lambda history: 0)  # see `cost`

    def prepare_s2o(self, layers: list[Any]) -> None:
        """Read the settings and what the layers of this group allow.

        Args:
            layers: attention layers; each has a ``layer_name``, and an ``impl`` that is a
                :class:`~s2o_vllm.forward.SparseImpl`.
        """
        self.s2o = compat.settings_of(self.vllm_config)  # type: ignore[attr-defined]
        self.s2o_counts = compat.counts_chunks(self.vllm_config)  # type: ignore[attr-defined]
        self.s2o_counts_prompts = compat.counts_prompts(self.vllm_config)  # type: ignore[attr-defined]
        compat.watch_requests()
        worker_hooks.install()
        if self.s2o is not None:
            self.announce(self.s2o)  # before anything is counted: there must be space
            if self.s2o.self_test:
                logger.info("%s", self_test.run(self.device))  # type: ignore[attr-defined]
        for layer in layers:
            layer.impl.place(layer)
        impls = [layer.impl for layer in layers]
        if support.rewrites_steps(type(self)):
            for impl in impls:
                impl.s2o_reason = impl.s2o_reason or "local_chunks"
        full = [impl for impl in impls if impl.s2o_reason not in support.NOT_FULL_ATTENTION]
        self.s2o_heads = sum(impl.num_heads for impl in full)
        capable = [impl for impl in impls if impl.s2o_reason is None]
        self.s2o_sparse_heads = sum(impl.num_heads for impl in capable)
        for impl in capable:
            metrics.worker.expect(impl.s2o_layer)
        if capable:
            limits = zip(*(impl.s2o_limits for impl in capable), strict=True)
            self.s2o_limits = Limits(*map(min, limits))
            others = {impl.s2o_reason for impl in impls if impl.s2o_reason is not None}
            self.s2o_layer_reasons = tuple(sorted(others))
            if self.s2o is not None and self.s2o.decodes:
                rows = compat.most_rows(self.vllm_config)  # type: ignore[attr-defined]
                self.decode_sparsely(capable[0].s2o_decode_shape, rows, self.device)  # type: ignore[attr-defined]
            elif self.s2o is not None and self.s2o.dense_where_faster:
                # A prompt's last chunk, however short, leaves what sparse decode is ranked with.
                heads = min(impl.num_heads for impl in capable)
                self.s2o_least_new = cost.decision(heads, self.device)  # type: ignore[attr-defined]
        else:
            self.s2o_reason = impls[0].s2o_reason if impls else "no_layers"

    def announce(self, settings: S2OConfig) -> None:
        """Begin to publish this worker's counters, and log the settings once."""
        info = {"version": __version__} | settings.summary
        first = metrics.worker.start(info, compat.metric_labels(self.vllm_config))  # type: ignore[attr-defined]
        if first and self.s2o_counts:
            words = ", ".join(f"{key} {value}" for key, value in settings.summary.items())
            logger.info("S2O on: %s (s2o-vllm %s)", words, __version__)
            uncounted = support.uncounted_workers(self.vllm_config)  # type: ignore[attr-defined]
            if uncounted is not None:
                logger.warning(uncounted)

    def decode_sparsely(self, shape: DecodeShape, rows: int, device: torch.device) -> None:
        """Make slots and tables of sparse decode, for batches of up to ``rows`` rows."""
        assert self.s2o is not None
        self.s2o_slots = DecodeSlots(self.s2o, compat.requests.alive)
        self.s2o_table = DecodeTable(shape, rows, device)
        self.s2o_lengths = torch.zeros(rows, dtype=torch.int32, device=device)

    def plan(self, common: Any) -> StepPlan | None:
        """Return the plan of a step, or None if every row is the parent's."""
        settings, slots = self.s2o, self.s2o_slots
        if settings is None or common.causal is not True:
            return None
        decode_only = common.max_query_len <= 1
        if decode_only and slots is None:
            return None
        if self.s2o_reason == "local_chunks":
            # Rows are no requests, and nothing says which of them prefill: a step counts once.
            self.count(0, [self.s2o_reason])
            return None
        count = common.num_reqs
        starts = common.query_start_loc_cpu[: count + 1].tolist()
        seq_lens = common.seq_lens_cpu_upper_bound
        prefilling = common.is_prefilling
        if seq_lens is None or prefilling is None:
            return None
        prefill = prefilling[:count].tolist()
        prefill += [False] * (count - len(prefill))  # runner V2 pads the others alone
        requests = compat.requests.of_rows(common, count)
        budgets = [budget_of(one, settings) for one in requests]
        lengths = seq_lens[:count].tolist()
        dense_reason = self.s2o_reason or support.dense_step_reason(common)
        if dense_reason is None and shadow.guard.check(settings.shadow_limit):
            dense_reason = "shadow_limit"
        decoding: list[DecodeRow] = []
        missed: list[str] = []
        names = [one.name for one in requests]
        if slots is not None and dense_reason is None:
            decoding, missed = slots.step(starts, lengths, prefill, budgets, names)
        decoding_rows = {one.row for one in decoding}
        attended = self.s2o_heads * dense_work(starts, lengths, prefill, decoding_rows)
        metrics.worker.add("s2o:attention_tokens", attended)
        if decode_only:
            self.count(0, missed)
            return self.decode_plan(common, decoding) if decoding or self.s2o_graphs else None
        sparse, runs, reasons = split_rows(
            starts, lengths, prefill, budgets, settings.min_context, decoding_rows,
            self.s2o_least_new,
        )  # fmt: skip
        reasons += missed
        if dense_reason is not None:
            reasons += [dense_reason] * len(sparse)
            sparse = []
        self.count(len(sparse), reasons)
        if self.s2o_counts_prompts and self.s2o_heads:
            skipped = request_work.left_out(
                sparse, settings.segment, settings.min_context,
                self.s2o_sparse_heads / self.s2o_heads,
            )  # fmt: skip
            request_work.tracker.step(requests, starts, lengths, prefill, skipped)
        if not sparse and not decoding:
            return None
        build = super().build  # type: ignore[misc]
        dense = [
            DensePart(
                (first, last),
                (start, starts[last]),
                build(0, compat.slice_rows(common, first, last, start), fast_build=True),
            )
            for first, last, start in runs
        ]
        device = common.block_table_tensor.device
        work = build_work_lists(
            sparse, settings.segment, settings.min_context, device, self.s2o_limits
        )
        plan = StepPlan(work, sparse, dense)
        plan.shadow = shadow.shadow_part(sparse, settings, common, build)
        if decoding:
            plan.decode = self.decode_list(decoding, count)
        if slots is not None and sparse:
            plan.snapshots = slots.take_snapshots(work, budgets, names, DENSE_TAIL)
        return plan

    def decode_list(self, rows: Sequence[DecodeRow], count: int) -> DecodeList:
        """Return the work list of the sparse rows of a batch of ``count`` rows."""
        assert self.s2o_table is not None
        return self.s2o_table.fill(rows, min(count, self.s2o_table.shape.requests))

    def decode_plan(self, common: Any, rows: list[DecodeRow]) -> StepPlan:
        """Return the plan of a step of decode alone; it looks the same whichever rows are sparse.

        A CUDA graph may hold it: the parent attends to every row, and reads from device memory
        that the sparse rows have one token.
        """
        decode = self.decode_list(rows, common.num_reqs)
        common = compat.with_lengths(common, self.shortened(common.seq_lens))
        metadata = super().build(0, common)  # type: ignore[misc]
        whole = DensePart((0, common.num_reqs), (0, common.num_actual_tokens), metadata)
        return StepPlan([], [], [whole], decode)

    def shortened(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """Return the row lengths that the parent reads, always at the same address.

        Args:
            seq_lens: int32 ``[rows]`` on the device.

        Returns:
            int32 ``[rows]``: 1 for rows that decode sparsely, the others as they are.
        """
        assert self.s2o_table is not None
        assert self.s2o_lengths is not None
        own = self.s2o_lengths[: len(seq_lens)]
        return torch.minimum(seq_lens, self.s2o_table.limits[: len(seq_lens)], out=own)

    def count(self, sparse: int, reasons: list[str]) -> None:
        """Count a step's chunks: how many went sparse, and why each of the others did not."""
        if not self.s2o_counts:
            return  # what this rank's heads visit is counted on the device all the same
        if sparse:
            metrics.worker.add("s2o:sparse_requests", sparse)
            reasons = reasons + sparse * list(self.s2o_layer_reasons)
        for reason in reasons:
            metrics.worker.add_dense(reason)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False):
        """Build the parent's metadata and attach the plan as ``s2o``."""
        plan = self.plan(common_attn_metadata)
        # The parts were scheduled on their own: a schedule of the whole batch is not needed.
        metadata = super().build(  # type: ignore[misc]
            common_prefix_len, common_attn_metadata, fast_build or plan is not None
        )
        metadata.s2o = plan
        return metadata

    def update_block_table(
        self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> Any:
        """Give the parent's metadata, and that of each dense part, another block table.

        Args:
            metadata: as :meth:`build` returned it.
            blk_table: int32 ``[rows, max_blocks]`` of another group of the KV cache.
            slot_mapping: int64 ``[tokens]``, where the step's keys and values are written.

        Returns:
            New metadata of the parent's class.
        """
        update = super().update_block_table  # type: ignore[misc]
        updated = update(metadata, blk_table, slot_mapping)
        plan = getattr(metadata, "s2o", None)
        if plan is None:
            return updated
        dense = [
            replace(
                part,
                metadata=update(
                    part.metadata, blk_table[slice(*part.rows)], slot_mapping[slice(*part.tokens)]
                ),
            )
            for part in plan.dense
        ]
        updated.s2o = replace(plan, dense=dense)
        if plan.shadow is not None:
            updated.s2o.shadow = plan.shadow.updated(update, blk_table, slot_mapping)
        if plan.decode is not None and self.s2o_table is not None:
            # The plan may be another group's: what graphs of this one read is its own.
            updated.s2o.decode = self.decode_list(plan.decode.rows, plan.decode.work.num_segments)
            if not plan.sparse_rows:
                (whole,) = dense
                whole.metadata.seq_lens = self.shortened(whole.metadata.seq_lens)
        return updated
