"""Mean keys and values of the regions of a history, which stand for what a list leaves out.

Softmax attention to few tokens leaves the mass of all others out. A mean key and a mean value tell
of a whole region what that mass is about; the attend kernel adds them as tokens of the weight
that is missing (FlashPrefill's mean term, of fixed regions instead of blocks: ours).
"""

import torch
import triton
import triton.language as tl

from .plan import REGION_SAMPLES, REGION_TOKENS, Regions, WorkList


@triton.jit(do_not_specialize=["row", "history"])
def _region_kernel(
    p_kv, p_table, p_means, row, history,
    stride_block, stride_head, stride_token, stride_table, stride_means,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, PAGE: tl.constexpr,
    REGION: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Mean of a region's keys and values, which are neighbours, of one KV head."""
    i_region, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if (i_region + 1) * REGION > history:
        return
    STEP: tl.constexpr = REGION // SAMPLES
    position = i_region * REGION + tl.arange(0, SAMPLES) * STEP + STEP // 2
    page = tl.load(p_table + row.to(tl.int64) * stride_table + position // PAGE).to(tl.int64)
    o_kv = page * stride_block + (position % PAGE) * stride_token + i_head * stride_head
    o_w = tl.arange(0, WIDTH_PAD)
    m_w = o_w < WIDTH
    tokens = tl.load(p_kv + o_kv[:, None] + o_w[None, :], m_w[None, :], 0.0).to(tl.float32)
    mean = tl.sum(tokens, 0) / SAMPLES
    p_means += i_head * stride_means + i_region * WIDTH
    tl.store(p_means + o_w, mean.to(p_means.dtype.element_ty), m_w)


def workspace(
    kv_heads: int,
    head_dim: int,
    max_history: int,
    dtype: torch.dtype,
    device: torch.device,
    region: int = REGION_TOKENS,
) -> Regions:
    """Return room for the regions of a history; nothing in it is set."""
    shape = (kv_heads, max(1, max_history // region), 2 * head_dim)
    return Regions(torch.empty(shape, dtype=dtype, device=device), region)


def average(
    kv_cache: torch.Tensor, block_table: torch.Tensor, work: WorkList, regions: Regions
) -> None:
    """Average the regions that a work list's chunk sees, from samples of them.

    Means are in units of the cache: an fp8 cache's scales apply to them as to its tokens.

    Args:
        kv_cache: ``[blocks, kv_heads, block_size, 2 * head_dim]``.
        block_table: int32 ``[rows, max_blocks]``.
        work: segments of one request.
        regions: written to.
    """
    count = max(1, work.max_fit_tokens // regions.tokens)  # a warm-up compiles it without a region
    kv_heads, page, width = kv_cache.shape[1:]
    _region_kernel[(count, kv_heads)](
        kv_cache, block_table, regions.means, work.row, work.max_fit_tokens,
        kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0),
        regions.means.stride(0), WIDTH=width, WIDTH_PAD=triton.next_power_of_2(width), PAGE=page,
        REGION=regions.tokens, SAMPLES=min(REGION_SAMPLES, regions.tokens),
    )  # fmt: skip
