"""The whole operator: rank, select, attend, over workspaces that are made once."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from .attention import reference as attention_reference
from .attention.summary_table import Summaries
from .layout import NUM_COUNTERS
from .ranking import basis
from .ranking import reference as ranking_reference
from .selection import reference as selection_reference
from .side_stream import Beside
from .tiles import WIDE_VISITS, AttendTile, attend_tile, fp8_products
from .tuning import CHUNK_SPANS, TIERS, TIERS_UNORDERED
from .work_list import Limits, WorkList, list_capacity, small_work_list, span_queries

WORKSPACE_BYTES = 512 * 2**20  # what one list of segments may take; more segments, more lists

# Rankings by low-rank scores; the wide one estimates them so well that lists are nearly exact
# (`benchmarks/quality/LOG.md`), and takes four times the products.
PRECISIONS = {"low_rank": basis.SERVED, "low_rank_wide": basis.Precision(64, 1)}
RANKINGS = (*PRECISIONS, "mean_query")


@dataclass(frozen=True)
class Shape:
    """What the operator must be built for.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: size of a head.
        max_history: longest history, in tokens.
        max_queries: most queries of a step.
        segment: queries per segment.
        ranking: one of ``RANKINGS``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    max_history: int
    max_queries: int
    segment: int
    ranking: str = "low_rank"

    @property
    def limits(self) -> Limits:
        """What one launch handles: a chunk and a quarter of its history, if the scratch allows."""
        segments = CHUNK_SPANS * span_queries(self.segment) // self.segment
        chunk = min(-(-self.max_queries // self.segment), segments)
        each = self.kv_heads * self.max_history * 3  # a score and a quarter of a slot a token
        items = max(1, min(chunk, WORKSPACE_BYTES // max(each, 1)))
        longest = list_capacity(self.max_history)
        return Limits(items, max(longest, items * longest // 4))


class SparsePrefill:
    """Sparse attention of prefill segments over a paged cache.

    On a CUDA device the Triton kernels run, over workspaces that are allocated here; on the
    CPU :mod:`ranking.reference` runs, which needs none.

    Args:
        shape: sizes; heads must be a multiple of kv_heads.
        dtype: of queries, and of the cache unless that is fp8.
        device: where it runs.
        scale: softmax scale.
        softcap: cap of the scaled scores, 0 for none.
        stop_threshold: early stop, see :func:`attend.attend`.

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
        stop_threshold: float = 0.0,
    ):
        if shape.ranking not in RANKINGS:
            raise ValueError(f"ranking is {shape.ranking!r}, must be one of {', '.join(RANKINGS)}")
        self.shape, self.scale, self.softcap = shape, scale, softcap
        self.stop_threshold = stop_threshold
        self.tiers = TIERS if stop_threshold > 0 else TIERS_UNORDERED
        rows = shape.segment * shape.heads // shape.kv_heads
        self.tiles = {
            (e4m3, visits): attend_tile(shape.head_dim, device, rows, e4m3, visits)
            for e4m3, visits in product((False, True), (0, WIDE_VISITS))
        }
        most = min(tile.block_m for tile in self.tiles.values())
        if device.type == "cuda" and shape.heads // shape.kv_heads > most:
            raise ValueError(
                f"{shape.heads // shape.kv_heads} query heads share a KV head, "
                f"must be at most {most}"
            )
        self.fp8_products = fp8_products(device)
        self.space: Any = None  # a Workspace, on a CUDA device
        if device.type == "cuda":
            self.space = workspace(shape, dtype, device)
        else:
            self.reference: Any = ranking_reference.mean_query_scores
            if shape.ranking in PRECISIONS:
                self.reference = partial(
                    ranking_reference.low_rank_scores, precision=PRECISIONS[shape.ranking]
                )

    def warm_up(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        query_e4m3: torch.Tensor | None = None,
    ) -> None:
        """Run every kernel once, over the very tensors that requests will use.

        Strides are part of what a kernel is compiled for, so they must be the real ones.
        Reads the cache, writes only scratch. ``query_e4m3`` if requests have it.
        """
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=query.device)
        table = torch.zeros_like(block_table)
        out = torch.empty_like(query)
        for visits, dense in product((0, WIDE_VISITS), (False, True)):
            work = small_work_list(query.device, self.shape.segment, dense)
            work = replace(work, max_visits=visits)
            self(query, kv_cache, table, work, out, counters, query_e4m3=query_e4m3)

    def tile(self, work: WorkList, e4m3: bool) -> AttendTile:
        """Return the tile shape for a work list, whose queries may be in e4m3."""
        return self.tiles[e4m3, WIDE_VISITS if work.max_visits >= WIDE_VISITS else 0]

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
        if not self.fp8_products:
            query_e4m3 = None
        scale = self.scale * k_scale
        options: dict[str, Any] = {
            "scale": scale,
            "v_scale": v_scale,
            "softcap": self.softcap,
            "stop_threshold": self.stop_threshold,
        }
        arguments = (query, kv_cache, block_table, work)
        if self.space is None:
            scores = self.reference(*arguments, scale=scale)
            lists = selection_reference.select(
                scores, block_table, work, kv_cache.shape[2], self.tiers,
                shared=self.shape.limits.shared,
            )  # fmt: skip
            queries_per_tile = max(1, 128 * self.shape.kv_heads // self.shape.heads)
            means = attention_reference.average(kv_cache, block_table, work, query.dtype)
            attention_reference.attend(
                *arguments, lists, means, out, counters,
                queries_per_tile=queries_per_tile, **options,
            )  # fmt: skip
            return
        self.rank(*arguments, k_scale=k_scale)
        from .attention import attend

        attend.attend(
            *arguments, self.space.selection.lists(work), self.space.regions, out, counters,
            query_e4m3=query_e4m3, tile=self.tile(work, query_e4m3 is not None), **options,
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
        """Score, select and average on a CUDA device; the results are left in the workspace."""
        from .attention import summaries as regions
        from .ranking import low_rank
        from .ranking import mean_query as rank
        from .selection import select

        space, scale = self.space, self.scale * k_scale

        def average() -> None:
            regions.average(kv_cache, block_table, work, space.regions)

        results = (space.selection.scores, space.selection.bounds)
        arguments = (query, kv_cache, block_table, work, *results, space.ranking)
        if isinstance(space.ranking, rank.RankWorkspace):
            if work.first_of_chunk:
                average()
            rank.mean_query_scores(*arguments, scale=scale)
        else:
            low_rank.low_rank_scores(
                *arguments, scale=scale, beside=space.beside, meanwhile=average
            )
        select.select(
            block_table, work, kv_cache.shape[2], space.selection, self.tiers,
            shared=self.shape.limits.shared,
        )  # fmt: skip


class Workspace(NamedTuple):
    """Scratch of the ranking in use, of the selection, the means of regions, a second stream."""

    ranking: Any
    selection: Any
    regions: Summaries
    beside: Beside


_workspaces: dict[tuple, Workspace] = {}


def workspace(shape: Shape, dtype: torch.dtype, device: torch.device) -> Workspace:
    """Return the scratch for a shape; layers of one shape share it (they run in turn)."""
    from .attention import summaries as regions
    from .ranking import low_rank
    from .ranking import mean_query as rank
    from .selection import select

    key = (shape, dtype, device)
    if key not in _workspaces:
        items, places, _ = shape.limits
        if shape.ranking == "mean_query":
            made: Any = rank.RankWorkspace(
                items, shape.heads, shape.head_dim, shape.max_history, dtype, device
            )
        else:
            made = low_rank.LowRankWorkspace(
                shape.heads, shape.heads, shape.head_dim, shape.max_history, items,
                shape.segment, dtype, device, precision=PRECISIONS[shape.ranking],
            )  # fmt: skip
        selection = select.SelectWorkspace(items, shape.kv_heads, shape.max_history, places, device)
        means = regions.workspace(shape.kv_heads, shape.head_dim, shape.max_history, dtype, device)
        _workspaces[key] = Workspace(made, selection, means, Beside(device))
    return _workspaces[key]
