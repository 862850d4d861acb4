"""The CUDA backend through vLLM's own layer and builder, over shuffled and poisoned pages."""

import pytest
import torch

from cases import FP8_CARD
from conformance import (
    BATCHES,
    DECODE,
    HEADS,
    check_alone,
    check_decode,
    check_end_of_prompt,
    check_full,
    check_nearly_full,
    check_shadow,
    maker,
)
from s2o_vllm.config import RANKINGS


@pytest.fixture(scope="module")
def backend(tiny_model):
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    from s2o_vllm.backend_cuda import S2OBackend

    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "page": 16}
    return maker(FlashAttentionBackend, S2OBackend, tiny_model, "cuda", shape)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_batch(backend, batch, dtype):
    check_full(backend(dtype=dtype), backend(dtype=dtype, stock_only=True), BATCHES[batch])


@pytest.mark.parametrize("head_major", [True, False])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [*HEADS, (32, 8)])
def test_every_page_layout_and_head_split(backend, page, heads, kv_heads, head_major):
    shape = {"page": page, "heads": heads, "kv_heads": kv_heads}
    check_full(
        backend(**shape), backend(**shape, stock_only=True), BATCHES["mixed"], head_major=head_major
    )


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_every_head_dim(backend, head_dim):
    shape = {"head_dim": head_dim}
    check_full(backend(**shape), backend(**shape, stock_only=True), BATCHES["mixed"])


@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=FP8_CARD)])
def test_shadow_mode(backend, fp8):
    own = {"sparsity_budget": 0.1, "fp8": fp8}
    check_shadow(backend(shadow_rate=0.5, **own), backend(**own), BATCHES["mixed"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [{}, {"heads": 6, "kv_heads": 1, "head_dim": 96}], ids=str)
def test_sparse_decode(backend, shape, dtype):
    shape = shape | DECODE
    check_decode(backend(dtype=dtype, decode_budget=0.9999, **shape), full=True)
    check_decode(backend(dtype=dtype, decode_budget=0.5, **shape), full=False)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_sparse_decode_whatever_ranked_the_prompt(backend, ranking):
    options = DECODE | {"ranking": ranking, "segment_size": 0}
    check_decode(backend(decode_budget=0.9999, **options), full=True)
    check_decode(backend(decode_budget=0.5, **options), full=False)


@FP8_CARD
@pytest.mark.parametrize("ranking", RANKINGS)
def test_sparse_decode_over_an_fp8_cache(backend, ranking):
    options = {"dtype": torch.bfloat16, "fp8": True, "ranking": ranking} | DECODE
    check_decode(backend(decode_budget=0.9999, **options), full=True)


@FP8_CARD
@pytest.mark.parametrize("batch", BATCHES)
def test_an_fp8_cache(backend, batch):
    """The query comes in fp8, too: the references attend to it and to the cache dequantised.

    In bf16 alone: FlashAttention 3 has no fp16 output for fp8 input, so neither has stock vLLM.
    """
    options = {"dtype": torch.bfloat16, "fp8": True}
    check_full(backend(**options), backend(**options, stock_only=True), BATCHES[batch])


@FP8_CARD
@pytest.mark.parametrize("head_major", [True, False])
@pytest.mark.parametrize("page", [16, 64])
def test_an_fp8_cache_of_every_layout(backend, page, head_major):
    shape = {"page": page, "fp8": True}
    check_full(
        backend(**shape), backend(**shape, stock_only=True), BATCHES["mixed"], head_major=head_major
    )


@FP8_CARD
@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_ranked_fp8_cache(backend, ranking):
    """Not the end of a prompt: FlashAttention 3 rounds probabilities to fp8, tile by tile."""
    check_nearly_full(backend(fp8=True, ranking=ranking), BATCHES["mixed"])
    check_alone(backend(fp8=True, ranking=ranking, sparsity_budget=0.1), BATCHES["mixed"])


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
