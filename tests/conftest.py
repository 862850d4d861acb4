"""What all tests share."""

import os

import hypothesis
import pytest
import torch

from models import write_model

# The same examples in every run, few of them; `HYPOTHESIS_PROFILE=fresh` draws others.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, max_examples=100, deadline=None, database=None
)
hypothesis.settings.register_profile("fresh", max_examples=1000, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# Read when a kernel is defined, so set before anything imports one. bf16 dots are silently
# wrong there: see tests/support/cases.py.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A test machine has little memory to give to a KV cache, and no hub.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def make_model(tmp_path):
    return lambda **changes: write_model(tmp_path, **changes)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def fresh_seed():
    """Draw a new seed; it is printed when a test fails."""

    def draw():
        seed = int.from_bytes(os.urandom(4), "little")
        torch.manual_seed(seed)
        print(f"seed {seed}")

    return draw


@pytest.fixture(autouse=True)
def _fresh_inputs(fresh_seed):
    """New random inputs in every run."""
    fresh_seed()
