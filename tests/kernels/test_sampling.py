import pytest
import torch
import triton
import triton.language as tl

from s2o_vllm.kernels.sampling import stratified
from s2o_vllm.kernels.strata import stratum_offset


@triton.jit(do_not_specialize=["step", "room"])
def _positions_kernel(p_out, step, room, N: tl.constexpr):
    number = tl.arange(0, N)
    tl.store(p_out + number, number * step + stratum_offset(number, room))


@pytest.mark.parametrize(("step", "room"), [(1, 1), (2, 2), (8, 1), (24, 17), (513, 513)])
def test_kernels_take_the_same_tokens(device, step, room):
    got = torch.full((256,), -1, dtype=torch.int32, device=device)
    _positions_kernel[(1,)](got, step, room, N=256)
    assert torch.equal(got.long().cpu(), stratified(256 * step, step, room))


@pytest.mark.parametrize("step", [2, 4, 8, 63])
@pytest.mark.parametrize("period", [2, 8, 24, 32])
def test_no_phase_of_a_period_is_missed(step, period):
    tokens = 2**20
    phases = torch.bincount(stratified(tokens, step) % period, minlength=period)
    fair = tokens / step / period
    assert (phases > 0.75 * fair).all()
    assert (phases < 1.25 * fair).all()


def test_every_stratum_has_one_token():
    assert torch.equal(stratified(1000, 8) // 8, torch.arange(125))
    assert torch.equal(stratified(7, 1), torch.arange(7))
    assert (stratified(10_000, 32, 25) % 32 < 25).all()
