"""Every kernel variant compiles for every architecture of the tile table, and fits.

Compiled without a GPU, in a process of its own: the other tests may be in the interpreter.
"""

import re

import pytest
import triton

import launch_keys
from compiling import printed
from s2o_vllm.kernels.tiles import BY_CAPABILITY, SHARED_MEMORY, WIDE

BF16, FP8 = "bfloat16", "float8_e4m3fn"
MATRIX_UNIT = {90: "wgmma", 100: "tcgen05"}
# Bytes of stack a thread may use. On Hopper Triton 3.7 needs none and 3.9 up to 48, but for tiles
# of 128 registers a thread.
SPILLED_BYTES = {90: 64}
SPILLED_ELSEWHERE = 400
# Of head_dim 512, outside of the loop over a list: on Hopper with a bf16 cache 168 in Triton 3.7.
SPILLED_LARGE, LOOP_SPILLS_LARGE = 864, 1
TRITON = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
# 128 registers a thread; faster all the same. A tile of a list, which is what nearly all of the
# time goes to, touches the stack so often. Over an fp8 cache 13 times in Triton 3.7, and in 3.9,
# which no card has run, up to 60.
SPILLED_CROWDED = {BF16: 256, FP8: 256 if TRITON < (3, 8) else 304}
LOOP_SPILLS_CROWDED = {BF16: 8, FP8: 16 if TRITON < (3, 8) else 64}
# Triton sets the proxy fence of pipelined loops from 3.7.1 on. Before, these go without: one
# stage would cost them their speed, and they have passed on cards.
FENCED = TRITON >= (3, 7, 1)
UNFENCED = () if FENCED else ("_mean_score_kernel", "_score_kernel", "_attend_kernel")
# vLLM's FlashAttention takes an fp8 cache on these two only.
TARGETS = [*((capability, BF16) for capability in BY_CAPABILITY), (90, FP8), (100, FP8)]


@pytest.fixture(scope="module")
def measured():
    """For each layer and setting the kernels that compile late, and the memory of a step."""
    return printed("launch_keys.py")


@pytest.mark.parametrize("case", launch_keys.cases())
def test_no_step_needs_a_variant_that_the_warm_up_does_not_compile(measured, case):
    late, _ = measured[case]
    assert late == []


@pytest.mark.parametrize("case", launch_keys.cases())
def test_a_step_of_prefill_takes_next_to_no_memory(measured, case):
    """What it needs is made at the start, inside vLLM's memory profile."""
    _, allocated = measured[case]
    assert allocated < 2**20


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_compiles_and_fits(target):
    kernels, capability = printed("compiling.py", *target), target[0]
    assert {one["name"].split()[0] for one in kernels} == {
        "_mean_kernel", "_mean_score_kernel", "_score_kernel", "_moment_kernel", "_basis_kernel",
        "_project_keys_kernel", "_project_probes_kernel", "_row_lse_kernel", "_count_kernel",
        "plan_kernel", "_emit_kernel", "_left_kernel", "initial_kernel", "label_kernel",
        "sum_kernel", "mean_kernel", "_covariance_kernel", "_mean_covariance_kernel",
        "_attend_kernel", "_append_kernel", "_merge_kernel", "_far_mass_kernel", "_pick_kernel",
    }  # fmt: skip
    for one in kernels:
        assert one["shared"] <= SHARED_MEMORY[capability], one
        assert not one["unfenced"] or one["name"].split()[0] in UNFENCED, one
        if one["name"].startswith("_attend") and "decode" in one["name"]:
            # Few rows, for which no unit is too small. On Hopper two numbers are kept outside of
            # the loop: of an fp8 tile by Triton 3.9, of a bf16 one by 3.6. Of head_dim 512 four.
            limit = 8 if capability == 90 else 0
            assert one["spills"] <= (64 if "decode 512" in one["name"] else limit), one
        elif one["name"].startswith("_attend"):
            assert one["asm"] == MATRIX_UNIT.get(capability, "mma.sync"), one
            wide = any(str(tile) in one["name"] for tile in WIDE.get(capability, {}).values())
            crowded = wide or "registers=128" in one["name"]
            large = str(BY_CAPABILITY[capability].get(512)) in one["name"]
            limit = SPILLED_BYTES.get(capability, SPILLED_ELSEWHERE)
            limit = SPILLED_LARGE if large else limit
            assert one["spills"] <= (SPILLED_CROWDED[target[1]] if crowded else limit), one
            if capability == 90:
                limit = LOOP_SPILLS_LARGE if large else 0
                limit = LOOP_SPILLS_CROWDED[target[1]] if crowded else limit
                assert one["loop_spills"] <= limit, one
