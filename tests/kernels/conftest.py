"""Kernels run on the GPU where there is one, else in Triton's interpreter on the CPU."""

import os

import pytest
import torch


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _fresh_inputs(request):
    """New random inputs in every run; the seed is printed when a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))
    print(f"seed {seed}")
