import pytest
import torch

from s2o_vllm.benchmarks.speed import dense, sparse
from s2o_vllm.kernels.shape import Shape


def shape(heads, kv_heads, head_dim, segment):
    return Shape(heads, kv_heads, head_dim, 1024, 1024, segment)


def prompt(tokens=40):
    return dense.paged(*(torch.randn(tokens, n, 64).bfloat16() for n in (4, 2, 2)))


def test_an_fp8_prompt_is_the_same_prompt_rounded():
    before = prompt()
    after = dense.quantised(before)
    assert (before.kv_dtype, after.kv_dtype) == ("bf16", "fp8")
    assert all(map(torch.equal, before.cached(), (before.key.float(), before.value.float())))
    for one, other in zip(
        (before.query, before.key, before.value), (after.query, *after.cached()), strict=True
    ):
        error = (one.float() - other.float()).norm() / one.float().norm()
        assert 0.01 < error < 0.04, "three bits of mantissa"


def test_an_fp8_cache_gathers_half_of_the_bytes():
    fp8 = sparse.attend_bytes(shape(4, 2, 64, 4), 5, 10, 400, "fp8")
    assert fp8 == 32768 / 2


def test_operations_are_those_of_the_history_and_of_the_own_tokens():
    # Segments of 4, 4 and 2 queries see 1+2+3+4, 1+2+3+4 and 1+2 of their own tokens: 23 of each
    # of 4 heads. 400 + 92 tokens, 2 products, 2 operations for each of 64 numbers.
    assert sparse.attend_operations(shape(4, 2, 64, 4), 10, 400) == 492 * 256 == 125952


def test_a_tile_gathers_for_all_of_its_rows_at_once():
    # 2 heads a group, so 5 rows hold 2 queries: 2 tiles of 4 rows a segment. 400 / 4 = 100 tokens
    # of history. Own: tiles end at 2 and 4, 2 and 4, 2, for each of 2 KV heads: 28. Key and value
    # of 64 numbers of 2 bytes: 256.
    assert sparse.attend_bytes(shape(4, 2, 64, 4), 5, 10, 400) == 128 * 256 == 32768


def test_the_last_tile_of_a_segment_serves_fewer_rows():
    # 6 heads a group, so 128 rows hold 21 queries: 64 take tiles of 21, 21, 21 and 1, which are
    # 96 rows in the mean of 384. 960 / 96 = 10 tokens of history. Own: 21 + 42 + 63 + 64 = 190
    # for each of 2 KV heads.
    assert sparse.attend_bytes(shape(12, 2, 128, 64), 128, 64, 960) == (10 + 380) * 512


def test_lists_of_single_heads_are_gathered_for_each():
    # 4 heads, 4 queries in tiles of 4 rows: 400 / 4 tokens of history; own 4, 4 and 2 for each.
    own = sparse.attend_bytes(shape(4, 2, 64, 4), 4, 10, 400, list_heads=4)
    assert own == pytest.approx((100 + 4 * 10) * 256)


def test_the_mean_of_several_sets():
    visits = [sparse.Visits(0.1, 2e12, 4e9, 0.2), sparse.Visits(0.3, 4e12, 8e9, 0.4)]
    times = [sparse.Times(one, 1.0, 2.0, 2.2, 4.0) for one in visits]
    card = {"matmul_tflops": 500.0, "copy_gb_s": 2000.0}
    found = sparse.columns(sparse.mean_times(times), card)
    assert found["density"] == pytest.approx(0.2)
    assert found["dropped_mass"] == pytest.approx(0.3)
    assert found["attend_tflops"] == pytest.approx(1500)
    assert found["early_stop_overhead"] == pytest.approx(0.1)
    assert (found["rank_ms"], found["attend_ms"], found["total_ms"]) == (1, 2, 4)


def test_no_sample_is_no_dropped_mass():
    times = sparse.Times(sparse.Visits(0.1, 2e12, 4e9, float("nan")), 1.0, 2.0, 2.0, 4.0)
    assert sparse.columns(times, {"matmul_tflops": 1.0, "copy_gb_s": 1.0})["dropped_mass"] is None


def test_a_prompt_shorter_than_a_segment_has_its_own_tiles():
    # 3 queries in tiles of 2: ends 2 and 3, for 2 KV heads.
    assert sparse.attend_bytes(shape(4, 2, 64, 512), 4, 3, 0) == 10 * 256


@pytest.mark.parametrize(
    ("gathered", "bytes_ms", "share"),
    [(8e9, 4, 0.8), (2e9, 1, 0.4), (12e9, 6, 1.2)],
    ids=["bytes", "arithmetic", "L2"],
)
def test_the_share_of_the_ceiling_is_that_of_what_takes_longer(gathered, bytes_ms, share):
    # 1e12 operations at 500e12 a second: 2 ms; bytes at 2000e9 a second.
    card = {"matmul_tflops": 500.0, "copy_gb_s": 2000.0}
    found = sparse.against_ceilings(1e12, gathered, 5.0, card)
    assert found == pytest.approx(
        {
            "attend_tflops": 200, "attend_operations": 1e12, "attend_bytes": gathered,
            "arithmetic_ms": 2, "bytes_ms": bytes_ms, "attend_of_ceiling": share,
        }
    )  # fmt: skip
