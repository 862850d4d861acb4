import pytest
import torch

ops = pytest.importorskip("vllm._custom_ops")
pytest.importorskip("vllm.v1.attention.backends.cpu_attn")

from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # noqa: E402

from backends import FP8_CPU  # noqa: E402
from s2o_vllm.backend_cpu import CacheLayout  # noqa: E402

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM's CPU build")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("page", "head_dim", "fp8"),
    [
        (128, 64, False), (32, 128, False), (16, 96, False), (64, 256, False),
        (1024, 64, False), (512, 128, False), (1056, 64, False), (1056, 256, False),
        pytest.param(32, 96, True, marks=FP8_CPU), pytest.param(128, 256, True, marks=FP8_CPU),
    ],
)  # fmt: skip
def test_reads_back_what_vllm_wrote(dtype, page, head_dim, fp8):
    isa = _get_attn_isa(dtype, page, head_dim)
    stored = torch.float8_e4m3fn if fp8 else dtype
    layout = CacheLayout(isa, page, head_dim, stored)
    blocks, heads, tokens = 5, 3, 2 * page + 7
    cache = torch.zeros(blocks, heads, page, 2 * head_dim, dtype=torch.uint8 if fp8 else dtype)
    keys, values = (torch.randn(tokens, heads, head_dim).to(stored).to(dtype) for _ in range(2))
    placed = torch.tensor([3, 0, 4])
    positions = torch.arange(tokens)
    slots = placed[positions // page] * page + positions % page
    halves = cache.view(blocks, heads, 2 * page, head_dim).chunk(2, dim=2)
    name = "fp8" if fp8 else "auto"
    ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa, kv_cache_dtype=name)
    read = layout.tokens(cache[placed].view(stored))  # [3, heads, page, 2 * head_dim]
    read = read.transpose(1, 2).reshape(-1, heads, 2 * head_dim)[:tokens]
    assert torch.equal(read.to(dtype), torch.cat([keys, values], -1))
