"""Sparse prefill of a layer: rank, select, attend, over scratch that is made once."""

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch

from .attention import reference as attention_reference
from .attention.summary_table import Summaries
from .layout import NUM_COUNTERS
from .ranking import RANKINGS, reference_of
from .selection import reference as selection_reference
from .shape import Shape
from .side_stream import SideStream
from .tiles import WIDE_VISITS, AttendTile, attend_tile, fp8_products
from .tuning import TIERS, TIERS_UNORDERED
from .work_list import WorkList, small_work_list

if TYPE_CHECKING:
    from .ranking.rankings import Ranking
    from .selection.select import SelectWorkspace


class SparsePrefill:
    """Sparse attention of prefill segments over a paged cache.

    On a CUDA device the Triton kernels run, over workspaces that are allocated here; on the
    CPU the references run, which need none.

    Args:
        shape: sizes; heads must be a multiple of kv_heads.
        dtype: of queries, and of the cache unless that is fp8.
        device: where it runs.
        scale: softmax scale.
        softcap: cap of the scaled scores, 0 for none.
        sinks: ``[heads]``, logits of attention sinks; see :func:`attend.attend`. Ranking takes
            them for none: a list is the same with them.
        stop_threshold: early stop, see :func:`attend.attend`.

    Attributes:
        space: scratch of the kernels; None on the CPU.
        reference: the ranking in plain PyTorch, which the CPU takes.

    Raises:
        ValueError: for a head_dim that no kernel exists for, or an unknown ranking.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        scale: float,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        stop_threshold: float = 0.0,
    ):
        if shape.ranking not in RANKINGS:
            raise ValueError(f"ranking is {shape.ranking!r}, must be one of {', '.join(RANKINGS)}")
        self.shape, self.scale, self.softcap = shape, scale, softcap
        self.sinks, self.stop_threshold = sinks, stop_threshold
        self.tiers = TIERS if stop_threshold > 0 else TIERS_UNORDERED
        group = shape.heads // shape.kv_heads
        self.tiles = {
            (e4m3, visits): attend_tile(shape.head_dim, device, shape.segment * group, e4m3, visits)
            for e4m3, visits in product((False, True), (0, WIDE_VISITS))
        }
        most = min(tile.block_m for tile in self.tiles.values())
        if device.type == "cuda" and group > most:
            raise ValueError(f"{group} query heads share a KV head, must be at most {most}")
        self.fp8_products = fp8_products(device)
        self.reference = reference_of(shape.ranking)
        self.space = workspace(shape, dtype, device) if device.type == "cuda" else None

    def warm_up(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        query_e4m3: torch.Tensor | None = None,
    ) -> None:
        """Run every kernel once, over the very tensors that requests will use.

        Strides are part of what a kernel is compiled for, so they must be the real ones.
        Reads the cache, writes only scratch.

        Args:
            query: ``[tokens, heads, head_dim]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
            block_table: int32 ``[rows, max_blocks]``.
            query_e4m3: ``query`` in e4m3, if requests have it; see :func:`attend.attend`.
        """
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=query.device)
        table = torch.zeros_like(block_table)
        out = torch.empty_like(query)
        for dense, visits in ((False, 0), (True, 0), (True, WIDE_VISITS)):
            work = small_work_list(query.device, self.shape.segment, dense)
            work = replace(work, max_dense=max(work.max_dense, visits))
            self(query, kv_cache, table, work, out, counters, query_e4m3=query_e4m3)

    def tiles_of(self, work: WorkList, e4m3: bool) -> tuple[AttendTile, AttendTile]:
        """Return the tile shapes for segments with lists and dense ones; queries may be in e4m3."""
        dense = WIDE_VISITS if work.max_dense >= WIDE_VISITS else 0
        return self.tiles[e4m3, 0], self.tiles[e4m3, dense]

    def __call__(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        work: WorkList,
        out: torch.Tensor,
        counters: torch.Tensor,
        *,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        query_e4m3: torch.Tensor | None = None,
    ) -> None:
        """Attend to the history and the own tokens of every segment of ``work``.

        Args:
            query: ``[tokens, heads, head_dim]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, already holding the
                segments' own keys and values; the queries' dtype, or float8_e4m3fn.
            block_table: int32 ``[rows, max_blocks]``.
            work: segments within ``shape.limits``.
            out: ``[tokens, heads, head_dim]``; the rows of the segments are written.
            counters: int64 ``[NUM_COUNTERS]``, added to.
            k_scale: what one unit of the cache's keys stands for (and of the queries, if they
                have a scale of their own).
            v_scale: what one unit of the cache's values stands for.
            query_e4m3: see :func:`attend.attend`; left alone where the device has no such products.
        """
        arguments = (query, kv_cache, block_table, work)
        if self.space is None:
            self.refer(*arguments, out, counters, k_scale=k_scale, v_scale=v_scale)
            return
        from .attention import attend

        if not self.fp8_products:
            query_e4m3 = None
        self.rank(*arguments, k_scale=k_scale)
        tile, dense_tile = self.tiles_of(work, query_e4m3 is not None)
        attend.attend(
            *arguments, self.space.selection.lists(work), self.space.summaries, out, counters,
            scale=self.scale * k_scale, v_scale=v_scale, softcap=self.softcap,
            stop_threshold=self.stop_threshold, query_e4m3=query_e4m3, sinks=self.sinks,
            tile=tile, dense_tile=dense_tile,
        )  # fmt: skip

    def rank(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        work: WorkList,
        *,
        k_scale: float = 1.0,
    ) -> None:
        """Score, select and summarise on a CUDA device; the results stay in the workspace.

        Arguments are those of a call.
        """
        from .attention import summaries
        from .selection import select

        space = self.space
        assert space is not None, "the CPU has the references alone"

        def summarise() -> None:
            summaries.summarise(kv_cache, block_table, work, space.summaries)

        space.ranking.score(
            query, kv_cache, block_table, work, space.selection.scores, space.selection.bounds,
            scale=self.scale * k_scale, side_stream=space.side_stream, overlapped=summarise,
        )  # fmt: skip
        select.select(
            block_table, work, kv_cache.shape[2], space.selection, self.tiers,
            shared=self.shape.limits.shared, summaries=space.summaries,
        )  # fmt: skip

    def refer(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        work: WorkList,
        out: torch.Tensor,
        counters: torch.Tensor,
        *,
        k_scale: float,
        v_scale: float,
    ) -> None:
        """Rank, select and attend in plain PyTorch; arguments are those of a call."""
        scale = self.scale * k_scale
        scores = self.reference(query, kv_cache, block_table, work, scale=scale)
        summaries = attention_reference.summarise(kv_cache, block_table, work, query.dtype)
        lists = selection_reference.select(
            scores, block_table, work, kv_cache.shape[2], self.tiers,
            shared=self.shape.limits.shared, summaries=summaries,
        )  # fmt: skip
        attention_reference.attend(
            query, kv_cache, block_table, work, lists, summaries, out, counters,
            scale=scale, v_scale=v_scale, softcap=self.softcap, stop_threshold=self.stop_threshold,
            sinks=self.sinks,
            queries_per_tile=max(1, 128 * self.shape.kv_heads // self.shape.heads),
        )  # fmt: skip


class Workspace(NamedTuple):
    """The ranking, scratch of the selection, summaries, and a side stream."""

    ranking: "Ranking"
    selection: "SelectWorkspace"
    summaries: Summaries
    side_stream: SideStream


_workspaces: dict[tuple[Shape, torch.dtype, torch.device], Workspace] = {}


def workspace(shape: Shape, dtype: torch.dtype, device: torch.device) -> Workspace:
    """Return the scratch for a shape; layers of one shape share it (they run in turn)."""
    from .attention import summaries
    from .ranking.rankings import make_ranking
    from .selection import select

    key = (shape, dtype, device)
    if key not in _workspaces:
        segments, slots, _ = shape.limits
        _workspaces[key] = Workspace(
            make_ranking(shape, dtype, device),
            select.SelectWorkspace(segments, shape.kv_heads, shape.max_history, slots, device),
            summaries.workspace(shape.kv_heads, shape.head_dim, shape.max_history, dtype, device),
            SideStream(device),
        )
    return _workspaces[key]


def release(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Forget the scratch for a shape: its memory is free once no operator has it."""
    _workspaces.pop((shape, dtype, device), None)
