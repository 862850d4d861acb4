import pytest
import torch

ops = pytest.importorskip("vllm._custom_ops")
pytest.importorskip("vllm.v1.attention.backends.cpu_attn")

from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # noqa: E402

from s2o_vllm.backend_cpu import CacheLayout  # noqa: E402

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("page", "head_dim"), [(128, 64), (32, 128), (16, 96), (64, 256)])
def test_reads_back_what_vllm_wrote(dtype, page, head_dim):
    isa = _get_attn_isa(dtype, page, head_dim)
    layout = CacheLayout(isa, page, head_dim, dtype)
    blocks, heads, tokens = 5, 3, 2 * page + 7
    cache = torch.zeros(blocks, heads, page, 2 * head_dim, dtype=dtype)
    keys = torch.randn(tokens, heads, head_dim).to(dtype)
    values = torch.randn(tokens, heads, head_dim).to(dtype)
    placed = torch.tensor([3, 0, 4])
    positions = torch.arange(tokens)
    slots = placed[positions // page] * page + positions % page
    halves = cache.view(blocks, heads, 2 * page, head_dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa)
    read = layout.tokens(cache[placed])  # [3, heads, page, 2 * head_dim]
    read = read.transpose(1, 2).reshape(-1, heads, 2 * head_dim)[:tokens]
    assert torch.equal(read, torch.cat([keys, values], -1))
