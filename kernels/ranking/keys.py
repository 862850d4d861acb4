"""Load keys of a paged cache: projecting, appending and finding retrieval heads share it."""

import triton
import triton.language as tl


@triton.jit
def load_keys(
    p_kv, page, o_n, o_d, end, stride_block, stride_token, PAGE: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Keys [N, D_PAD] of the tokens o_n, on the pages ``page``, of a head; 0 from ``end`` on."""
    o_k = page.to(tl.int64) * stride_block + (o_n % PAGE) * stride_token
    m_k = (o_n < end)[:, None] & (o_d < D)[None, :]
    return tl.load(p_kv + o_k[:, None] + o_d[None, :], m_k, 0.0)
