"""The operator over a whole prompt: its times, what it visits, and the check before any of them."""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from s2o_vllm.config import RANKINGS
from s2o_vllm.kernels.attention import attend
from s2o_vllm.kernels.layout import (
    DROPPED,
    DROPPED_UNIT,
    ELIGIBLE,
    HISTORY,
    NUM_COUNTERS,
    NUM_QUERIES,
    SAMPLED,
    VISITED,
)
from s2o_vllm.kernels.prefill import SparsePrefill, Workspace
from s2o_vllm.kernels.selection.selected import SelectedTokens
from s2o_vllm.kernels.shape import Shape
from s2o_vllm.kernels.tiles import AttendTile
from s2o_vllm.kernels.work_list import PrefillRow, WorkList, build_work_lists

from .dense import (
    REPEAT_MS,
    Prompt,
    fa3_paged,
    in_turn,
    make_prompt,
    milliseconds,
    quantised,
    to_fp8,
)

NEVER = 1e-30  # an early-stop threshold that no tile falls below: its cost alone
GATE_CONTEXT = 2048
GATE_FACTOR = 2.0  # promise 3: error at most twice that of PyTorch in the same dtype
ELEMENT_BYTES = {"bf16": 2, "fp8": 1}  # of the cache


class Visits(NamedTuple):
    """What one run of the operator visits.

    Attributes:
        density: share of the history.
        operations: floating-point operations, see :func:`attend_operations`.
        gathered: bytes, see :func:`attend_bytes`.
        dropped_mass: mean estimated softmax mass of what a row does not visit; not a number where
            nothing was sampled.
    """

    density: float
    operations: float
    gathered: float
    dropped_mass: float


class Times(NamedTuple):
    """What is measured of one setting of the operator, in ms on the device.

    Attributes:
        visits: what it visits.
        rank_ms: ranking and selection.
        attend_ms: attention to what is selected.
        stopping_ms: the same with an early stop that never comes.
        total_ms: all of it.
    """

    visits: Visits
    rank_ms: float
    attend_ms: float
    stopping_ms: float
    total_ms: float


def lengths(tokens: int, segment: int) -> list[int]:
    """Return the queries of each segment of a prompt; the last may be shorter."""
    return [min(segment, tokens - start) for start in range(0, tokens, segment)]


def attend_operations(shape: Shape, tokens: int, visited: float) -> float:
    """Return the floating-point operations of the two products over what is visited.

    Args:
        shape: sizes of the operator.
        tokens: of the prompt.
        visited: history tokens, summed over queries and heads.

    Returns:
        4 * head_dim for each of them and, causal, for each of the segments' own.
    """
    own = shape.heads * sum(n * (n + 1) / 2 for n in lengths(tokens, shape.segment))
    return 4 * shape.head_dim * (visited + own)


def attend_bytes(
    shape: Shape,
    block_m: int,
    tokens: int,
    visited: float,
    kv_dtype: str = "bf16",
    list_heads: int | None = None,
) -> float:
    """Return the bytes of keys and values that the attend kernel gathers.

    A tile's rows share what it loads: key and value of a token that it visits, once. What several
    tiles visit counts for each, though the L2 cache may hold it. Queries, output, lists and the
    estimate of the dropped mass are not counted.

    Args:
        shape: sizes of the operator.
        block_m: rows (queries x heads that share a list) that a tile has room for.
        tokens: of the prompt, a multiple of the segment or else the last one counts as whole.
        visited: history tokens, summed over queries and heads.
        kv_dtype: of the cache, ``bf16`` or ``fp8``.
        list_heads: heads that have lists; default: the KV heads.
    """
    list_heads = list_heads or shape.kv_heads
    sharing = shape.heads // list_heads
    queries = block_m // sharing
    segment = min(shape.segment, tokens)
    rows = segment * sharing / -(-segment // queries)  # of a tile in the mean: the last has fewer
    own = sum(
        min(start + queries, n)  # from the segment's first token to the tile's last
        for n in lengths(tokens, shape.segment)
        for start in range(0, n, queries)
    )
    token = 2 * shape.head_dim * ELEMENT_BYTES[kv_dtype]
    return token * (visited / rows + list_heads * own)


def against_ceilings(
    operations: float, gathered: float, attend_ms: float, card: Mapping[str, float]
) -> dict[str, float]:
    """Return what operations and bytes would take at the card's ceilings, and how near the time is.

    Args:
        operations: floating-point operations.
        gathered: bytes.
        attend_ms: measured milliseconds.
        card: ``matmul_tflops`` and ``copy_gb_s``, see :func:`ceilings`.

    Returns:
        ``attend_tflops``, the rate of the operations; ``attend_operations`` and ``attend_bytes``;
        ``arithmetic_ms`` and ``bytes_ms``, the time of either alone; ``attend_of_ceiling``, the
        larger of the two over ``attend_ms``. More than 1 is possible: what tiles share is gathered
        from L2 faster than a copy from memory.
    """
    arithmetic_ms = operations / card["matmul_tflops"] / 1e9
    bytes_ms = gathered / card["copy_gb_s"] / 1e6
    return {
        "attend_tflops": operations / attend_ms / 1e9,
        "attend_operations": operations,
        "attend_bytes": gathered,
        "arithmetic_ms": arithmetic_ms,
        "bytes_ms": bytes_ms,
        "attend_of_ceiling": max(arithmetic_ms, bytes_ms) / attend_ms,
    }


class Sparse:
    """The operator over a whole prompt, its two halves callable on their own."""

    def __init__(
        self, prompt: Prompt, ranking: str, budget: float, segment: int, min_context: int,
        min_tokens: int = 0,
    ):  # fmt: skip
        tokens, heads, head_dim = prompt.query.shape
        self.prompt = prompt
        self.operator = SparsePrefill(
            Shape(heads, prompt.kv_cache.shape[1], head_dim, tokens, 8192, segment, ranking),
            prompt.query.dtype, prompt.query.device, scale=prompt.scale,
        )  # fmt: skip
        self.works = build_work_lists(
            [PrefillRow(0, 0, tokens, 0, budget, min_tokens=min_tokens)], segment, min_context,
            prompt.query.device, self.operator.shape.limits,
        )  # fmt: skip
        self.out = torch.empty_like(prompt.query)
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=prompt.query.device)
        self.lists: list[SelectedTokens] = []
        self.query, self.k_scale, self.query_e4m3 = prompt.query, prompt.unit, None
        if prompt.kv_dtype == "fp8":  # as a layer hands it on, in units of its own
            self.query_e4m3 = to_fp8(prompt.query)
            self.query = self.query_e4m3.to(prompt.query.dtype)
            self.k_scale *= prompt.unit
        self.kv_scales: dict[str, Any] = {
            "k_scale": self.k_scale, "v_scale": prompt.unit, "query_e4m3": self.query_e4m3,
        }  # fmt: skip

    @property
    def space(self) -> Workspace:
        """The operator's scratch."""
        assert self.operator.space is not None, "the kernels are timed on a card"
        return self.operator.space

    def arguments(self, work: WorkList) -> tuple:
        """Return what every launch takes first."""
        return self.query, self.prompt.kv_cache, self.prompt.block_table, work

    def tiles(self, work: WorkList) -> tuple[AttendTile, AttendTile]:
        """Return the tile shapes that a work list's segments are attended with."""
        return self.operator.tiles_of(work, self.query_e4m3 is not None)

    def run(self) -> torch.Tensor:
        """Rank, select and attend; return the output ``[tokens, heads, head_dim]``."""
        for work in self.works:
            self.operator(*self.arguments(work), self.out, self.counters, **self.kv_scales)
        return self.out

    def rank(self) -> None:
        """Rank and select only."""
        for work in self.works:
            self.operator.rank(*self.arguments(work), k_scale=self.k_scale)

    def attend(self, stop_threshold: float = 0.0) -> None:
        """Attend only, over the lists that :meth:`visits` kept and the last chunk's summaries."""
        summaries = self.space.summaries
        for work, lists in zip(self.works, self.lists, strict=True):
            tile, dense_tile = self.tiles(work)
            attend.attend(
                *self.arguments(work), lists, summaries, self.out, self.counters,
                scale=self.prompt.scale * self.k_scale, v_scale=self.prompt.unit,
                stop_threshold=stop_threshold, query_e4m3=self.query_e4m3,
                tile=tile, dense_tile=dense_tile,
            )  # fmt: skip

    def visits(self, first: int = 0) -> Visits:
        """Run once; keep the lists and return what was visited.

        Args:
            first: history from which on the dropped mass is measured.
        """
        self.counters.zero_()
        self.lists.clear()
        shape, gathered, before = self.operator.shape, 0.0, [0] * NUM_COUNTERS
        dropped, sampled = 0, 0
        for work in self.works:
            self.operator(*self.arguments(work), self.out, self.counters, **self.kv_scales)
            lists = self.space.selection.lists(work)
            self.lists.append(SelectedTokens(*(part.clone() for part in lists)))
            counters, queries = self.counters.tolist(), int(work.segments[:, NUM_QUERIES].sum())
            rows = self.tiles(work)[0].block_m
            gathered += attend_bytes(
                shape, rows, queries, counters[VISITED] - before[VISITED],
                self.prompt.kv_dtype, lists.lengths.shape[1],
            )  # fmt: skip
            if int(work.segments[:, HISTORY].min()) >= first:
                dropped += counters[DROPPED] - before[DROPPED]
                sampled += counters[SAMPLED] - before[SAMPLED]
            before = counters
        return Visits(
            before[VISITED] / before[ELIGIBLE],
            attend_operations(shape, self.prompt.query.shape[0], before[VISITED]),
            gathered,
            DROPPED_UNIT * dropped / sampled if sampled else float("nan"),
        )


def check(shape: tuple[int, int, int], ranking: str, kv_dtype: str) -> dict[str, float]:
    """Compare the operator with everything listed to fp64 attention over what is in the cache.

    Returns:
        ``error`` of the operator and ``torch_error`` of bf16 PyTorch, ‖x − truth‖ / ‖truth‖. Of
        an fp8 cache also ``quantised_error`` and ``fa3_quantised_error``, those of the operator
        and of FlashAttention 3 against fp64 attention before anything was quantised.

    Raises:
        SystemExit: if the operator's error is more than ``GATE_FACTOR`` times PyTorch's.
    """
    before = make_prompt(shape, GATE_CONTEXT)
    prompt = quantised(before) if kv_dtype == "fp8" else before
    group = shape[0] // shape[1]

    def dense(dtype: torch.dtype, of: Prompt) -> torch.Tensor:
        query = of.query.to(dtype).transpose(0, 1)
        key, value = (x.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for x in of.cached())
        scores = query @ key.transpose(1, 2) * prompt.scale
        future = torch.ones(GATE_CONTEXT, GATE_CONTEXT, device="cuda").triu(1).bool()
        return (scores.masked_fill(future, float("-inf")).softmax(-1) @ value).transpose(0, 1)

    def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
        return float((x.double() - truth).norm() / truth.norm())

    truth = dense(torch.float64, prompt)
    sparse = Sparse(
        prompt, ranking, 1.0, RANKINGS[ranking], 0
    )  # every list holds the whole history
    sparse.out.fill_(float("nan"))
    result = sparse.run()
    error = relative(result, truth)
    torch_error = relative(dense(torch.bfloat16, prompt), truth)
    if not error <= GATE_FACTOR * torch_error:
        raise SystemExit(
            f"s2o bench attention: the operator's error {error:.2e} is more than {GATE_FACTOR} "
            f"times PyTorch's {torch_error:.2e}: no time is reported."
        )
    errors = {"error": error, "torch_error": torch_error}
    if kv_dtype == "fp8":
        unquantised = dense(torch.float64, before)
        errors["quantised_error"] = relative(result, unquantised)
        errors["fa3_quantised_error"] = relative(fa3_paged(prompt)(), unquantised)
    return errors


def timed(sparse: Sparse, visits: Visits, repeat_ms: float = REPEAT_MS) -> Times:
    """Time one setting of the operator, whose lists :meth:`Sparse.visits` kept."""
    attend_ms, stopping_ms = in_turn(
        sparse.attend, functools.partial(sparse.attend, NEVER), repeat_ms=repeat_ms
    )
    rank_ms, total_ms = (milliseconds(run, repeat_ms) for run in (sparse.rank, sparse.run))
    return Times(visits, rank_ms, attend_ms, stopping_ms, total_ms)


def mean_times(times: Sequence[Times]) -> Times:
    """Return the mean of each time and of what is visited."""
    visits, *own = zip(*times, strict=True)
    return Times(
        Visits(*map(statistics.fmean, zip(*visits, strict=True))), *map(statistics.fmean, own)
    )


def columns(times: Times, card: Mapping[str, float]) -> dict[str, float | None]:
    """Return the columns of a result row."""
    visits, attend_ms = times.visits, times.attend_ms
    return {
        "density": visits.density,
        "dropped_mass": None if math.isnan(visits.dropped_mass) else visits.dropped_mass,
        "rank_ms": times.rank_ms,
        "attend_ms": attend_ms,
        **against_ceilings(visits.operations, visits.gathered, attend_ms, card),
        "total_ms": times.total_ms,
        "early_stop_overhead": times.stopping_ms / attend_ms - 1,
    }
