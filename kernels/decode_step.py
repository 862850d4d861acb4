"""A step of sparse decode: one query a request, ranked by the snapshot of its prompt (ours).

The last chunk of a prompt leaves a basis, the keys that it projected, and summaries: the request's
state. A decode step projects the keys that are new since then, scores all projected keys by the
rows of its one query, selects and attends as prefill does. Several programs share a list (split
KV), since lists are few.
"""

import functools
from typing import NamedTuple

import torch

from .attention import summaries
from .attention.attend import attend
from .attention.split_kv import Parts, merge
from .attention.summary_table import REGIONS, Summaries
from .decode_state import (
    DecodeList,
    DecodeShape,
    Snapshot,
    empty_summaries,
    store_summaries,
)
from .ranking import basis
from .ranking.fit_basis import find_bases, take_moments
from .ranking.low_rank import LowRankWorkspace
from .ranking.probes import choose_probes
from .ranking.project import append_keys, project_keys
from .ranking.row_lse import estimate_row_lse
from .ranking.score import key_capacity, score_history
from .selection.select import SelectWorkspace, select
from .tiles import AttendTile, decode_tile
from .tuning import CHUNK, CLUSTERS, DECODE_PARTS, REGION_TOKENS, TIERS_UNORDERED
from .work_list import WorkList

PROBE_BLOCK = 64  # query rows that are projected at a time
LSE_BLOCK_N = 128  # projected keys that a row log-sum-exp takes at a time


class DecodeScratch(NamedTuple):
    """Scratch of a step, which layers of one shape share; see `workspace.RankingWorkspace`."""

    distances: torch.Tensor
    probe_rows: torch.Tensor
    projected_probes: torch.Tensor
    selection: SelectWorkspace
    parts: Parts


def scratch(
    shape: DecodeShape,
    device: torch.device,
    projection_dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
    summary_rows: int = CLUSTERS + REGIONS,
) -> DecodeScratch:
    """Return scratch for a step of ``shape.requests`` requests."""
    requests, kv_heads = shape.requests, shape.kv_heads
    group = shape.heads // kv_heads
    projection = projection_dtype or basis.projection_dtype(device)

    def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(requests, kv_heads, *size, dtype=dtype, device=device)

    return DecodeScratch(
        empty(group, dtype=torch.float32),
        empty(group, dtype=torch.int32),
        empty(group, basis.WIDTH, dtype=projection),
        SelectWorkspace(
            requests, kv_heads, shape.max_history, shape.slots, device, chunk, summary_rows
        ),
        Parts(
            empty(DECODE_PARTS, group, shape.head_dim, dtype=torch.float32),
            empty(DECODE_PARTS, group, dtype=torch.float32),
        ),
    )


class RequestStates:
    """The states of one layer's requests, a slot each, and a step's scratch.

    Attributes:
        projected_keys: ``[slots, kv_heads, >= max_history, basis.WIDTH]``.
        basis: ``a`` and ``b`` ``[slots, kv_heads, head_dim, WIDTH]``, ``offset``
            ``[slots, kv_heads, WIDTH]``.
        distances: of the projected query rows.
        probe_rows: which of them are probes: all.
        projected_probes: the projected query rows.
        summaries: of the history that the prompt's end saw.
        probe_step: 1, every row is a probe.
    """

    probe_step = 1
    heads = None

    def __init__(
        self,
        shape: DecodeShape,
        dtype: torch.dtype,
        device: torch.device,
        shared: DecodeScratch,
        clusters: int = CLUSTERS,
        region: int = REGION_TOKENS,
    ):
        slots, kv_heads, width = shape.requests, shape.kv_heads, basis.WIDTH

        def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(slots, kv_heads, *size, dtype=dtype, device=device)

        self.projected_keys = zeros(
            key_capacity(shape.max_history), width, dtype=shared.projected_probes.dtype
        )
        self.basis = basis.Basis(
            zeros(shape.head_dim, width, dtype=dtype),
            zeros(shape.head_dim, width, dtype=dtype),
            zeros(width, dtype=torch.float32),
        )
        self.distances, self.probe_rows, self.projected_probes = shared[:3]
        self.selection, self.parts = shared.selection, shared.parts
        self.summaries = empty_summaries(shape, dtype, device, clusters, region)

    def store(
        self, snapshot: Snapshot, ranked: LowRankWorkspace, summaries: Summaries, seen: int
    ) -> None:
        """Copy bases, projected keys and summaries of a prompt's end into a slot.

        Args:
            snapshot: which span, and its slot.
            ranked: bases and projected keys, as :func:`project.project_keys` left them.
            summaries: as :func:`summaries.summarise` left them.
            seen: tokens that these were made of.
        """
        slot, _, tokens, _ = snapshot
        self.projected_keys[slot, :, :tokens].copy_(ranked.projected_keys[:, :tokens])
        for name in ("a", "b", "offset"):
            getattr(self.basis, name)[slot].copy_(getattr(ranked.basis, name))
        store_summaries(self.summaries, summaries, slot, seen)


def decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: DecodeList,
    space: RequestStates,
    out: torch.Tensor,
    counters: torch.Tensor,
    *,
    scale: float,
    v_scale: float = 1.0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    tile: AttendTile | None = None,
) -> None:
    """Rank, select and attend for every query of a decode step.

    Args:
        query: ``[tokens, heads, head_dim]``.
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``, already holding the queries'
            own keys and values; ``query``'s dtype, or float8_e4m3fn.
        block_table: int32 ``[rows, max_blocks]``.
        rows: the queries; their slots hold projected keys of what ``covered`` says.
        space: the states of the layer's requests.
        out: ``[tokens, heads, head_dim]``; the rows of the queries are written.
        counters: int64 ``[NUM_COUNTERS]``, added to; see :func:`attend.attend`.
        scale: softmax scale, times what one unit of the cache's keys stands for.
        v_scale: what one unit of the cache's values stands for.
        softcap: cap of the scaled scores, 0 for none.
        sinks: ``[heads]``, logits of attention sinks; see :func:`attend.attend`.
        tile: tile shape; that of :mod:`tiles` by default.
    """
    work, selection, parts = rows.work, space.selection, space.parts
    head_dim, heads, kv_heads = query.shape[2], query.shape[1], kv_cache.shape[1]
    group = heads // kv_heads
    append_keys(kv_cache, block_table, rows, space)
    choose_probes(query, work, space, block=PROBE_BLOCK)
    estimate_row_lse(query, work, space, block_n=LSE_BLOCK_N)
    score_history(
        work, selection.scores, selection.bounds, space, group,
        chunk=selection.chunk, shared=False,
    )  # fmt: skip
    select(
        block_table, work, kv_cache.shape[2], selection, TIERS_UNORDERED, split=True,
        summaries=space.summaries,
    )  # fmt: skip
    attend(
        query, kv_cache, block_table, work, selection.lists(work), space.summaries, out, counters,
        scale=scale, v_scale=v_scale, softcap=softcap, sinks=sinks, parts=parts,
        tile=tile or decode_tile(head_dim, query.device, group),
    )  # fmt: skip
    merge(work, parts, out)


@functools.cache
def shared_scratch(shape: DecodeShape, device: torch.device) -> DecodeScratch:
    """Return a step's scratch for a shape; layers of one shape share it (they run in turn)."""
    return scratch(shape, device)


@functools.cache
def basis_scratch(
    shape: DecodeShape, dtype: torch.dtype, device: torch.device
) -> tuple[LowRankWorkspace, Summaries]:
    """Return scratch of a snapshot's basis, and of summaries; layers of one shape share them."""
    sizes = (shape.heads, shape.kv_heads, shape.head_dim, shape.max_history)
    ranked = LowRankWorkspace(*sizes, 1, 1, dtype, device)
    return ranked, summaries.workspace(*sizes[1:], dtype, device)


class DecodeKernels:
    """The kernels of sparse decode over a layer's request states; see `decode.DecodeBackend`."""

    def __init__(self, shape: DecodeShape, dtype: torch.dtype, device: torch.device):
        self.states = RequestStates(shape, dtype, device, shared_scratch(shape, device))
        self.basis_scratch = basis_scratch(shape, dtype, device)
        self.tile: AttendTile | None = None  # another one than that of the table

    def take(
        self,
        snapshot: Snapshot,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        work: WorkList,
        *,
        scale: float,
    ) -> None:
        """See `decode.DecodeBackend.take`."""
        ranked, means = self.basis_scratch
        span = work.spans[snapshot.span]
        take_moments(query, kv_cache, block_table, work.row, span, ranked.basis)
        find_bases(ranked.basis, scale=scale)
        project_keys(kv_cache, block_table, work.row, span.tokens, ranked)
        summaries.summarise(kv_cache, block_table, work, means)
        self.states.store(snapshot, ranked, means, work.max_seen)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        rows: DecodeList,
        out: torch.Tensor,
        counters: torch.Tensor,
        *,
        scale: float,
        v_scale: float,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> None:
        """See :func:`decode`."""
        decode(
            query, kv_cache, block_table, rows, self.states, out, counters, scale=scale,
            v_scale=v_scale, softcap=softcap, sinks=sinks, tile=self.tile,
        )  # fmt: skip
