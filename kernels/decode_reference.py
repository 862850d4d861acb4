"""What the kernels of sparse decode compute, in plain PyTorch; see :mod:`ranking.reference`."""

from dataclasses import replace

import torch

from . import paging
from .attention import reference as attention_reference
from .decode_state import (
    DecodeList,
    DecodeShape,
    Snapshot,
    empty_summaries,
    store_summaries,
)
from .layout import APPEND_COUNT, APPEND_FIRST, APPEND_ROW, APPEND_SLOT, DENSE_START, SLOT
from .ranking import basis
from .ranking import reference as ranking_reference
from .selection import reference as selection_reference
from .tuning import CLUSTERS, REGION_TOKENS, TIERS_UNORDERED
from .work_list import WorkList


class DecodeReference:
    """The states of a layer's requests; see `decode.DecodeBackend` and `decode_step.RequestStates`.

    Attributes:
        projected_keys: ``[slots, kv_heads, max_history, WIDTH]``.
        basis: float32, leading dimensions ``[slots, kv_heads]``.
        summaries: of skipped tokens, in ``dtype``.
    """

    def __init__(
        self,
        shape: DecodeShape,
        dtype: torch.dtype,
        device: torch.device,
        clusters: int = CLUSTERS,
        region: int = REGION_TOKENS,
    ):
        leading = (shape.requests, shape.kv_heads)
        projection = basis.projection_dtype(device)
        self.projected_keys = torch.zeros(
            *leading, shape.max_history, basis.WIDTH, dtype=projection, device=device
        )
        self.basis = basis.Basis(
            torch.zeros(*leading, shape.head_dim, basis.RANK, device=device),
            torch.zeros(*leading, shape.head_dim, basis.RANK, device=device),
            torch.zeros(*leading, basis.RANK, device=device),
        )
        self.summaries = empty_summaries(shape, dtype, device, clusters, region)

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
        slot, number, tokens, _ = snapshot
        span, bases = work.spans[number], kv_cache.shape[1]
        fitted = basis.fit_span(query, kv_cache, block_table, work.row, span, bases, scale)
        for own, part in zip(self.basis, fitted, strict=True):
            own[slot] = part
        self.project(kv_cache, block_table[work.row], slot, 0, tokens)
        held = self.summaries
        found = attention_reference.summarise(
            kv_cache, block_table, work, held.means.dtype, held.clusters, held.region_tokens
        )
        store_summaries(held, found, slot, work.max_seen)

    def project(
        self, kv_cache: torch.Tensor, table_row: torch.Tensor, slot: int, first: int, count: int
    ) -> None:
        """Project the keys of some tokens by a slot's basis.

        Args:
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
            table_row: int32 ``[max_blocks]``, the request's row of the block table.
            slot: of the request's state; written to.
            first: position of the first token.
            count: of tokens.
        """
        positions = torch.arange(first, first + count, device=kv_cache.device)
        slots = paging.physical_slots(positions, table_row, kv_cache.shape[2])
        keys, _ = paging.load_tokens(kv_cache, slots, kv_cache.shape[3] // 2)
        own = basis.Basis(*(part[slot] for part in self.basis))
        projected = basis.project_keys(keys, own, self.projected_keys.dtype)
        self.projected_keys[slot, :, first : first + count] = projected.to(
            self.projected_keys.dtype
        )

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
            query, kv_cache, block_table, rows, self, out, counters,
            scale=scale, v_scale=v_scale, softcap=softcap, sinks=sinks,
        )  # fmt: skip


def scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    bases: basis.Basis,
    work: WorkList,
) -> torch.Tensor:
    """Score the history of every query by all of its rows.

    Args:
        query: ``[tokens, heads, head_dim]``.
        keys: projected ``[slots, kv_heads, >= max_history, WIDTH]``, the queries' own included.
        bases: the slots'.
        work: of a decode step.

    Returns:
        float16 ``[segments, kv_heads, max_history]``.
    """
    kv_heads = keys.shape[1]
    found = query.new_full(
        (work.num_segments, kv_heads, work.max_history), float("-inf"), dtype=torch.float32
    )
    for number, line in enumerate(work.segments.tolist()):
        n, slot = line[DENSE_START], line[SLOT]
        if n == 0:
            continue
        rows = paging.segment_queries(query, line, kv_heads)[:, :, 0]
        every = torch.arange(rows.shape[1], device=query.device).expand(kv_heads, -1)
        own = basis.Basis(*(part[slot] for part in bases))
        found[number, :, :n] = ranking_reference.estimated_scores(
            rows, every, line, own, keys[slot].float(), keys.dtype
        )
    return found.clamp(min=-torch.finfo(torch.half).max).half()


def decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: DecodeList,
    space: DecodeReference,
    out: torch.Tensor,
    counters: torch.Tensor,
    *,
    scale: float,
    v_scale: float = 1.0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Rank, select and attend for every query of a decode step; see :func:`decode_step.decode`."""
    page = kv_cache.shape[2]
    count = len(rows.rows)
    if count == 0:
        return
    work = replace(rows.work, segments=rows.work.segments[:count])
    for one in rows.appends[:count].tolist():
        space.project(
            kv_cache, block_table[one[APPEND_ROW]], one[APPEND_SLOT], one[APPEND_FIRST],
            one[APPEND_COUNT],
        )  # fmt: skip
    found = scores(query, space.projected_keys, space.basis, work)
    lists = selection_reference.select(
        found, block_table, work, page, TIERS_UNORDERED, summaries=space.summaries
    )
    attention_reference.attend(
        query, kv_cache, block_table, work, lists, space.summaries, out,
        counters, scale=scale, v_scale=v_scale, softcap=softcap, sinks=sinks, queries_per_tile=1,
    )  # fmt: skip
