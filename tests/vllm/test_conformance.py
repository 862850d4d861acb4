"""The CPU backend through vLLM's own layer and builder, over shuffled and poisoned pages."""

import pytest
import torch
from vllm.platforms import current_platform

from backends import FP8_CPU
from conformance import (
    BATCHES,
    DECODE,
    HEADS,
    check_alone,
    check_decode,
    check_end_of_prompt,
    check_full,
    check_nearly_full,
    maker,
)
from s2o_vllm.config import RANKINGS

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")


@pytest.fixture(scope="module")
def backend(tiny_model):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from s2o_vllm.backend_cpu import S2OCPUBackend

    shape = {"heads": 8, "kv_heads": 2, "head_dim": 64, "page": 32}
    return maker(CPUAttentionBackend, S2OCPUBackend, tiny_model, "cpu", shape)


@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch(backend, batch):
    check_full(backend(), backend(stock_only=True), BATCHES[batch])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("batch", ["chunks", "drafts"])
def test_every_dtype(backend, batch, dtype):
    check_full(backend(dtype=dtype), backend(dtype=dtype, stock_only=True), BATCHES[batch])


@FP8_CPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", ["one chunk", "chunks", "mixed"])
def test_an_fp8_cache(backend, batch, dtype):
    options = {"dtype": dtype, "fp8": True}
    check_full(backend(**options), backend(**options, stock_only=True), BATCHES[batch])


@FP8_CPU
@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_ranked_fp8_cache(backend, ranking):
    options, batch = {"fp8": True, "ranking": ranking}, BATCHES["mixed"]
    check_nearly_full(backend(**options), batch)
    ranked = backend(**options, sparsity_budget=0.1)
    check_alone(ranked, batch)
    check_end_of_prompt(ranked, backend(fp8=True, stock_only=True), batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [{}, {"heads": 6, "kv_heads": 1, "head_dim": 96, "page": 48}], ids=str
)
def test_sparse_decode(backend, shape, dtype):
    shape = shape | DECODE
    check_decode(backend(dtype=dtype, decode_budget=0.9999, **shape), full=True)
    check_decode(backend(dtype=dtype, decode_budget=0.5, **shape), full=False)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_sparse_decode_whatever_ranked_the_prompt(backend, ranking):
    options = DECODE | {"ranking": ranking, "segment_size": 0}
    check_decode(backend(decode_budget=0.9999, **options), full=True)
    check_decode(backend(decode_budget=0.5, **options), full=False)


@FP8_CPU
@pytest.mark.parametrize("ranking", RANKINGS)
def test_sparse_decode_over_an_fp8_cache(backend, ranking):
    options = DECODE | {"ranking": ranking}
    check_decode(backend(fp8=True, decode_budget=0.9999, **options), full=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", ["one chunk", "mixed", "drafts"])
def test_attention_sinks(backend, batch, dtype):
    options = {"dtype": dtype, "sinks": True}
    check_full(backend(**options), backend(**options, stock_only=True), BATCHES[batch])


@pytest.mark.parametrize("ranking", RANKINGS)
def test_ranked_attention_with_sinks(backend, ranking):
    options, batch = {"sinks": True, "ranking": ranking}, BATCHES["mixed"]
    check_nearly_full(backend(**options), batch)
    ranked = backend(**options, sparsity_budget=0.1)
    check_alone(ranked, batch)
    check_end_of_prompt(ranked, backend(sinks=True, stock_only=True), batch)


def test_sparse_decode_with_sinks(backend):
    options = DECODE | {"sinks": True}
    check_decode(backend(decode_budget=0.9999, **options), full=True)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_every_page_and_head_split(backend, page, heads, kv_heads):
    shape = {"page": page, "heads": heads, "kv_heads": kv_heads}
    check_full(backend(**shape), backend(**shape, stock_only=True), BATCHES["chunks"])


@pytest.mark.parametrize("head_dim", [96, 128, 256, 512])
def test_every_head_dim(backend, head_dim):
    shape = {"head_dim": head_dim}
    check_full(backend(**shape), backend(**shape, stock_only=True), BATCHES["chunks"])


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("batch", ["one chunk", "mixed", "drafts"])
def test_a_budget_just_under_one(backend, batch, ranking):
    check_nearly_full(backend(ranking=ranking), BATCHES[batch])


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("batch", ["chunks", "mixed", "decode last"])
def test_a_row_does_not_depend_on_its_neighbours(backend, batch, ranking):
    check_alone(backend(ranking=ranking, sparsity_budget=0.1), BATCHES[batch])


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("batch", ["one chunk", "mixed", "decode last"])
def test_the_end_of_a_prompt_is_stock(backend, batch, ranking):
    stock = backend(stock_only=True)
    check_end_of_prompt(backend(ranking=ranking, sparsity_budget=0.1), stock, BATCHES[batch])


@pytest.mark.parametrize("ranking", RANKINGS)
def test_segments_of_the_size_that_suits_the_ranking(backend, ranking):
    """As a server has them, not as short as in the other tests."""
    options = {"ranking": ranking, "segment_size": 0}
    check_nearly_full(backend(**options), BATCHES["mixed"])
    ranked = backend(**options, sparsity_budget=0.1)
    check_alone(ranked, BATCHES["mixed"])
    check_end_of_prompt(ranked, backend(stock_only=True), BATCHES["mixed"])


@pytest.mark.parametrize("batch", ["one chunk", "mixed"])
def test_a_cpu_is_left_dense_unless_asked(backend, batch):
    """Stock attention to the bit, and the parent's own metadata."""
    step = backend().step(BATCHES[batch])
    output, plan = backend(dense_where_faster=True).attend(step)
    assert plan is None
    assert torch.equal(output, backend(stock_only=True).attend(step)[0])
    assert backend().attend(step)[1].sparse_rows, "the tests above ask"
