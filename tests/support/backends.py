"""One attention layer of vLLM's, built for real, and batches over a shuffled, poisoned cache."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from cases import Batch, dense_attention, make_sinks, to_fp8
from s2o_vllm import metadata, plugin
from s2o_vllm.kernels.work_list import PrefillRow

LAYER = "model.layers.0.self_attn.attn"
NULL_BLOCK = 0  # vLLM's: never a request's own, named where a table has no block
MAX_MODEL_LEN = 4096
# Of queries, keys and values: powers of two, by which a number of e4m3 divides into one.
FP8_SCALES = (0.125, 0.0625, 0.25)
FP8_CPU = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 cache on a CPU needs AVX-512"
)


class Row(NamedTuple):
    """One request's share of a step: its queries, its length with them, whether it prefills."""

    queries: int
    length: int
    prefill: bool = True


def decode(length: int) -> Row:
    return Row(1, length, False)


@dataclass
class Step:
    """A batch: what vLLM's model runner hands to a backend, and the same for the references."""

    rows: list[Row]
    query: torch.Tensor  # as the layer gives it to the backend
    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    common: Any
    batch: Batch  # the cache as tokens, for dense_attention

    def tokens(self, row: int) -> slice:
        """A row's place among the step's queries."""
        start = sum(one.queries for one in self.rows[:row])
        return slice(start, start + self.rows[row].queries)


class Backend:
    """A backend's layer and metadata builder, outside of a server.

    Args:
        cls: the backend.
        model: folder of any model with a configuration; only its type matters.
        settings: of S2O, None for stock.
        fp8: whether the cache is quantised, with ``FP8_SCALES``.
        sinks: whether heads have attention sinks.
    """

    def __init__(
        self, cls, model, *, heads, kv_heads, head_dim, page, dtype, device, settings, fp8=False,
        sinks=False,
    ):  # fmt: skip
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.layers.attention import Attention

        plugin.register()
        asked = {} if settings is None else {"attention_backend": "s2o"}
        if settings is not None:
            asked["additional_config"] = {"s2o": settings}
        self.config = EngineArgs(
            model=model, dtype=str(dtype).removeprefix("torch."), max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=MAX_MODEL_LEN, enforce_eager=True,
            kv_cache_dtype="fp8" if fp8 else "auto", **asked,
        ).create_engine_config()  # fmt: skip
        self.config.cache_config.block_size = page
        self.shape, self.fp8 = (heads, kv_heads, head_dim, page, dtype, device), fp8
        given = {"sinks": make_sinks(heads, dtype, device)} if sinks else {}
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with set_current_vllm_config(self.config):
                self.layer = Attention(
                    heads, head_dim, head_dim**-0.5, kv_heads,
                    cache_config=self.config.cache_config, prefix=LAYER, attn_backend=cls, **given,
                ).to(device)  # fmt: skip
                spec = self.layer.get_kv_cache_spec(self.config)
                self.builder = cls.get_builder_cls()(
                    spec, [LAYER], self.config, torch.device(device)
                )
        finally:
            torch.set_default_dtype(default)
        for name, scale in zip("qkv", FP8_SCALES, strict=True) if fp8 else ():
            getattr(self.layer, f"_{name}_scale").fill_(scale)
            setattr(self.layer, f"_{name}_scale_float", scale)

    def attend(self, step: Step, *, full: bool = False):
        """Run a step as the model runner does; the output begins as NaN.

        Args:
            step: what is attended.
            full: replace the lists by ones that hold the whole history, which no budget below
                1 asks for; a budget of 1 would leave the rows to the parent.

        Returns:
            The output ``[tokens, heads, head_dim]`` and the step's plan, None for a stock backend.
        """
        from vllm.config import set_current_vllm_config

        impl = self.layer.impl
        with set_current_vllm_config(self.config):
            impl.do_kv_cache_update(
                self.layer, step.key, step.value, step.cache, step.common.slot_mapping
            )
            with full_lists() if full else nullcontext():
                built = self.builder.build(0, step.common)
            plan = getattr(built, "s2o", None)
            dtype = step.batch.query.dtype
            output = torch.full_like(step.query, float("nan"), dtype=dtype)
            impl.forward(self.layer, step.query, step.key, step.value, step.cache, built, output)
        return output, plan

    def step(self, rows: list[Row], *, head_major: bool = True) -> Step:
        """Draw a step: queries, keys and values, and a cache that holds what came before.

        Requests own shuffled blocks. All else, the null block and every unused place of an own
        block, is poisoned: what reads it answers with NaN or with a value that is far off.
        """
        heads, kv_heads, head_dim, page, dtype, device = self.shape
        counts = [-(-row.length // page) for row in rows]
        blocks = sum(counts) + 4
        shape = (blocks, kv_heads, page, 2 * head_dim)
        if not head_major:
            shape = (blocks, page, kv_heads, 2 * head_dim)
        cache = torch.full(shape, float("nan"), device=device, dtype=dtype)
        cache = cache if head_major else cache.transpose(1, 2)
        own = (1 + torch.randperm(blocks - 1, device=device))[: sum(counts)].int()
        cache[own.long()] = 50.0  # stale tokens; NaN there would spread through a masked product
        if self.fp8:
            cache = cache.to(torch.float8_e4m3fn).view(torch.uint8)
        table = torch.full((len(rows), max(counts) + 2), NULL_BLOCK, dtype=torch.int32)
        table = table.to(device)
        first = 0
        for row, count in enumerate(counts):
            table[row, :count] = own[first : first + count]
            first += count
        # Tokens of whole requests, one after the other, and which of them this step computes.
        lengths = torch.tensor([row.length for row in rows], device=device)
        owner = torch.repeat_interleave(torch.arange(len(rows), device=device), lengths)
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        positions = torch.arange(len(owner), device=device) - starts[owner]
        slots = table[owner, positions // page].long() * page + positions % page
        computed = positions >= torch.tensor(
            [row.length - row.queries for row in rows], device=device
        )[owner]  # fmt: skip
        keys, values = (
            torch.randn(len(owner), kv_heads, head_dim, device=device, dtype=dtype)
            for _ in range(2)
        )
        of_query, of_keys, of_values = FP8_SCALES
        if self.fp8:  # numbers that the cache holds exactly: the references attend to them as well
            keys = to_fp8(keys, of_keys).to(dtype) * of_keys
            values = to_fp8(values, of_values).to(dtype) * of_values
        if not computed.all():  # a kernel takes no empty grid
            self.layer.impl.do_kv_cache_update(
                self.layer, keys[~computed], values[~computed], cache, slots[~computed]
            )
        query = torch.randn(int(computed.sum()), heads, head_dim, device=device, dtype=dtype)
        given = query
        if self.fp8 and self.layer.query_quant is not None:  # vLLM's layer hands it on in fp8
            given = to_fp8(query, of_query)
            query = given.to(dtype) * of_query
        plain = torch.zeros(blocks, kv_heads, page, 2 * head_dim, device=device, dtype=dtype)
        plain[slots // page, :, slots % page] = torch.cat([keys, values], -1)
        chunks, start = [], 0
        for number, row in enumerate(rows):
            chunks.append(PrefillRow(number, start, row.queries, row.length - row.queries, 1.0))
            start += row.queries
        sinks = self.layer.impl.sinks
        batch = Batch(query, plain, table, chunks, head_dim**-0.5, sinks=sinks)
        common = common_metadata(rows, table, slots[computed], device)
        return Step(rows, given, keys[computed], values[computed], cache, common, batch)

    def alone(self, step: Step, row: int) -> Step:
        """The same step with one of its rows only; cache and blocks stay where they are."""
        tokens, one = step.tokens(row), step.rows[row]
        table = step.batch.block_table[row : row + 1]
        common = common_metadata([one], table, step.common.slot_mapping[tokens], table.device)
        return replace(
            step, rows=[one], query=step.query[tokens], key=step.key[tokens],
            value=step.value[tokens], common=common,
        )  # fmt: skip

    def part(self, step: Step, start: int, count: int) -> Step:
        """Return a step of one row as the chunk of its queries from ``start`` on."""
        (row,) = step.rows
        tokens = slice(start, start + count)
        length = row.length - row.queries + start + count
        table = step.batch.block_table
        one = Row(count, length, row.prefill)
        common = common_metadata([one], table, step.common.slot_mapping[tokens], table.device)
        return replace(
            step, rows=[one], query=step.query[tokens], key=step.key[tokens],
            value=step.value[tokens], common=common,
        )  # fmt: skip


def full_lists() -> Any:
    """Let lists be as long as at a budget of 1, in all that is built inside."""
    build = metadata.build_work_lists

    def longer(rows: list[PrefillRow], *arguments: Any) -> Any:
        return build([row._replace(budget=1.0) for row in rows], *arguments)

    return patch.object(metadata, "build_work_lists", longer)


def common_metadata(rows: list[Row], table: torch.Tensor, slots: torch.Tensor, device: Any) -> Any:
    """vLLM's own description of a step."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0] + [row.queries for row in rows], dtype=torch.int32).cumsum(0).int()
    lengths = torch.tensor([row.length for row in rows], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(row.queries for row in rows),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=slots,
        is_prefilling=torch.tensor([row.prefill for row in rows]),
    )


def row_errors(step: Step, output: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """Relative error of each row's output; NaN where something was not written."""
    errors = []
    for row in range(len(step.rows)):
        got, wanted = (x[step.tokens(row)].double() for x in (output, truth))
        errors.append(float((got - wanted).norm() / wanted.norm()))
    return errors


__all__ = ["Backend", "Row", "Step", "decode", "dense_attention", "row_errors"]
